"""Fields of the public configs, score_sde_pytorch's and QCSBM's, that ours do not have.

An override of one that says what is done anyway is accepted and changes nothing; any other is refused with what takes
its place. ``PUBLIC`` lists them all, and fields of the 2-D examples under the names they have there.
"""

import ast
from collections.abc import Mapping
from typing import NamedTuple


class Public(NamedTuple):
    """What takes the place of a public field: a field of ours, or words.

    ``same``: of words, the public values that say what is done anyway; of a field, what its values are called there.
    """

    instead: str
    same: tuple | Mapping[object, object] = ()


_NO_ENERGY = ("unconstrained", "preconditioned")
_SCORE = {False: _NO_ENERGY, True: "conservative", "score_model": _NO_ENERGY, "energy_model": "conservative"}
_REFINE = ("ncsn", "ncsnv2", "ncsnv2_64", "ncsnv2_128", "ncsnv2_256")
_ONE_EVALUATION, _PLOTS = "--checkpoint=FILE, one evaluation for each", "figures, which --mode=table draws"

PUBLIC = {
    "data.category": Public("data.path, the folder of the images"),
    "data.dataset_size": Public("data.num_train", {}),
    "data.dtype": Public("single precision", ("torch.float32",)),
    "data.shuffle_files": Public("an order that is always shuffled, by the seed", (True,)),
    "data.tfrecords_path": Public("data.path, the folder of the images"),
    "device": Public("the flag --device"),
    "eval.begin_ckpt": Public(_ONE_EVALUATION),
    "eval.bpd_dataset": Public("bits/dim of the test images", ("test",)),
    "eval.division_idx": Public("torchrun, whose processes share the samples", (0,)),
    "eval.enable_loss": Public("training.eval_freq: test losses are measured in training", (False,)),
    "eval.encoding_rounds": Public("eval.num_reference", {}),
    "eval.end_ckpt": Public(_ONE_EVALUATION),
    "eval.nearest_k": Public("3 neighbours", (3,)),
    "eval.noise_levels": Public("eval.asym_levels", {}),
    "eval.num_divisions": Public("torchrun, whose processes share the samples", (1,)),
    "eval.repeat": Public("one pass over the test images", (0,)),
    "eval.restore_path": Public("--workdir, the folder of the run", ("", None)),
    "eval.total_repeat": Public("one pass over the test images", (1,)),
    "eval.type": Public("--mode=eval, which measures everything"),
    "loss.balancing_fac": Public("training.qc_weight", {}),
    "loss.loss_type": Public("denoising score matching", ("dsm",)),
    "loss.reg_type": Public("training.qc_weight", {"none": 0.0}),
    "loss.slices": Public("training.qc_probes", {}),
    "loss.std_max": Public("model.sigma_max", {}),
    "loss.std_min": Public("model.sigma_min", {}),
    "model.act_": Public("swish", ("swish",)),
    "model.act__": Public("model.output_activation", {"lrelu": "leaky_relu"}),
    "model.attention_type": Public("the attention of DDPM", ("ddpm",)),
    "model.conv_size": Public("convolutions of size 3", (3,)),
    "model.energy": Public("model.parameterization", _SCORE),
    "model.interpolation": Public("bilinear interpolation", ("bilinear",)),
    "model.n_scales": Public("continuous time"),
    "model.normalization": Public("model.name", {"GroupNorm": ("ncsnpp", "ddpm"), "InstanceNorm++": _REFINE}),
    "model.sigma_begin": Public("model.sigma_max", {}),
    "model.type": Public("model.parameterization", _SCORE),
    "optim.amsgrad": Public("Adam as it is", (False,)),
    "sampling.batch_size": Public("grids of 64 samples in training; eval.batch_size in evaluation"),
    "sampling.density": Public(_PLOTS),
    "sampling.height": Public(_PLOTS),
    "sampling.last_step_snr": Public("sampling.noise_removal, by Tweedie's formula"),
    "sampling.probability_flow": Public("sampling.predictor=probability_flow, or sampling.method=ode", (False,)),
    "sampling.score_restore_path": Public("the flag --checkpoint", ("", None)),
    "sampling.shape": Public("eval.num_samples, sampling.num_samples; in the plane data.num_test"),
    "sampling.width": Public(_PLOTS),
    "training.continuouse": Public("training.continuous", {}),
    "training.deterministic": Public("results that always follow from the seed", (False, True)),
    "training.init_step": Public("training.init_from, the step of which goes on"),
    "training.loss": Public("training.sde", {}),
    "training.plot_freq": Public(_PLOTS),
    "training.restore_path": Public("training.init_from", {None: ""}),
    "training.snapshot_freq": Public("training.save_freq", {}),
}


def refusal(name: str, text: str, fields: Mapping[str, object]) -> str | None:
    """Why an override of a public field, with the value ``text``, is not accepted for a config with these fields; None
    if it is."""
    instead, same = PUBLIC[name]
    try:
        value = ast.literal_eval(text)
    except (SyntaxError, ValueError):
        value = text
    ours = fields.get(instead)
    if isinstance(same, tuple):
        accepted = value in same
    else:
        names = same.get(value, value)
        accepted = ours is not None and (ours in names if isinstance(names, tuple) else ours == names)
    now = "" if ours is None else f", which is {ours!r}"
    return None if accepted else f"--config.{name}={text}: is of the public code; here there is {instead}{now}"
