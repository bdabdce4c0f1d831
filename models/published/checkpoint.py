"""The files of the public codes.

score_sde_pytorch and QCSBM share one format: a dict with ``model`` (a state dict), ``ema`` (a list of averages in the
order of the parameters), ``optimizer`` and, in the former, ``step``. The codes of NCSN and NCSNv2 write lists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import CheckpointError, check_state_dict, is_count, mismatch
from models.ncsnv2 import RefineNet
from models.published.names import official_names
from models.score import USUAL_PREDICTION, NoiseLevel, ScoreModel, UnconstrainedScore
from models.unet import UNet


def _from_ncsn_list(values: list) -> dict:
    """What the codes of NCSN and NCSNv2 write, in score_sde_pytorch's form: model and optimiser, then in NCSNv2 epoch
    and step, then, if it keeps one, the moving average by name."""
    model, optimizer, *rest = values
    names = [name.removeprefix("module.") for name in model if name.removeprefix("module.") != "sigmas"]
    shadow = rest[2] if len(rest) == 3 else {name.removeprefix("module."): tensor for name, tensor in model.items()}
    step = rest[1] if rest else max((int(state["step"]) for state in optimizer["state"].values()), default=0)
    ema = {"num_updates": step, "shadow_params": [shadow[name] for name in names if name in shadow]}
    return {"model": model, "optimizer": optimizer, "ema": ema, "step": step}


class PublicCheckpoint:
    """A checkpoint of score_sde_pytorch, of the QCSBM code, or of those of NCSN and NCSNv2.

    Args:
        checkpoint: what ``read_checkpoint`` found in the ``.pth`` file.
        path: the file, which errors name.

    Attributes:
        step: steps of the optimiser; where a file has no ``step``, as QCSBM's, the updates of its moving average, of
            which every step is one.
        num_updates: updates of the moving average.

    Raises:
        CheckpointError: not of these formats, or damaged.
    """

    def __init__(self, checkpoint: dict | list, path: str | Path) -> None:
        self.path = path
        if isinstance(checkpoint, list):
            try:
                checkpoint = _from_ncsn_list(checkpoint)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise CheckpointError(f"{path} holds a list that is none of NCSN's checkpoints") from None
        model, ema = checkpoint.get("model"), checkpoint.get("ema")
        ema = ema if isinstance(ema, dict) else {}
        self._averages: list[Tensor] = ema.get("shadow_params")
        self.num_updates: int = ema.get("num_updates")
        self.step: int = checkpoint.get("step", self.num_updates)
        self._optimizer: dict | None = checkpoint.get("optimizer")
        whole = {
            "model": isinstance(model, dict),
            "ema.shadow_params": isinstance(self._averages, list),
            "ema.num_updates": is_count(self.num_updates),
            "step": is_count(self.step),
            "optimizer": isinstance(self._optimizer, dict | None),
        }
        if wrong := [name for name, is_whole in whole.items() if not is_whole]:
            parts = ", ".join(wrong)
            raise CheckpointError(f"{path} is not a score_sde_pytorch checkpoint; missing, or of another form: {parts}")
        for name, tensor in [*model.items(), *(("an average", average) for average in self._averages)]:
            if problem := mismatch(tensor, tensor):
                raise CheckpointError(f"{path}: {name} {problem}")
        self._weights: dict[str, Tensor] = {str(name).removeprefix("module."): model[name] for name in model}
        # The noise levels are a buffer there, the largest first; here they belong to the SDE.
        self._noise_levels: Tensor | None = self._weights.pop("sigmas", None)
        # The Fourier frequencies have neither gradient nor average.
        self._trainable = [name for name in self._weights if not name.endswith(".W") or ".NIN_" in name]

    def weights(self, network: UNet | RefineNet) -> dict[str, Tensor]:
        """The weights under a network's names and in its layout; what it has no name for stands as in the file."""
        return self._translated("the weight", self._weights, network)

    def averages(self, network: UNet | RefineNet) -> dict[str, Tensor]:
        """The same of the moving averages; the fixed Fourier frequencies have none and stand for themselves.

        Raises:
            CheckpointError: not one average for every trainable parameter, in its shape.
        """
        if len(self._averages) != len(self._trainable):
            raise CheckpointError(
                f"{self.path} has {len(self._averages)} averages for {len(self._trainable)} trainable parameters"
            )
        averages = dict(zip(self._trainable, self._averages, strict=True))
        return self.weights(network) | self._translated("the average", averages, network)

    def optimizer_state(self, network: UNet | RefineNet) -> dict[str, dict[str, Tensor]] | None:
        """Adam's moments ``exp_avg`` and ``exp_avg_sq`` and its ``step`` of every trainable parameter, under the
        network's names and in its layout; None if the file has none.

        The public codes give Adam all parameters, the fixed Fourier frequencies included: these have an index, and no
        state, as they never have a gradient.

        Raises:
            CheckpointError: another optimiser than Adam, or states that do not belong to these parameters.
        """
        if (states := (self._optimizer or {}).get("state")) in (None, {}):
            return None
        try:
            indices = [index for group in self._optimizer["param_groups"] for index in group["params"]]
            states = {index: dict(states.get(index, {})) for index in indices}
            steps = {index: torch.tensor(float(state["step"])) for index, state in states.items() if "step" in state}
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
            raise CheckpointError(f"{self.path}: the optimiser state is not in torch's form") from None
        if len(indices) != len(self._weights):
            raise CheckpointError(
                f"{self.path}: its optimiser has {len(indices)} parameters, its model {len(self._weights)}"
            )
        index_of = dict(zip(self._weights, indices, strict=True))
        for name in self._trainable:
            if (state := states[index_of[name]]).keys() != {"exp_avg", "exp_avg_sq", "step"}:
                found = ", ".join(sorted(map(str, state))) or "nothing"
                raise CheckpointError(
                    f"{self.path}: the optimiser state of {name} is {found}; read is Adam's, which is exp_avg, "
                    "exp_avg_sq, step"
                )
        first, second = (
            self._translated(field, {name: states[index_of[name]][field] for name in self._trainable}, network)
            for field in ("exp_avg", "exp_avg_sq")
        )
        return {
            own: {"step": steps[index_of[name]], "exp_avg": first[own], "exp_avg_sq": second[own]}
            for own, name in zip(first, self._trainable, strict=True)
        }

    def check_noise_levels(self, noise_level: NoiseLevel) -> None:
        """Compare the noise levels with those that the file was trained with, its ``sigmas``: of VE all of them, of a
        VP model in discrete time, which keeps the same table and reads it nowhere, how many they are.

        Raises:
            CheckpointError: other noise levels, naming the config fields.
        """
        if (table := self._noise_levels) is None:
            return
        sde, count = noise_level.sde, noise_level.num_scales
        if table.ndim != 1 or len(table) < 2 or not table.is_floating_point():
            raise CheckpointError(f"{self.path}: its sigmas are no list of noise levels")
        if count not in (None, len(table)):
            raise CheckpointError(f"model.num_scales={count}: {self.path} was trained with {len(table)} noise levels")
        if sde.name != "ve":
            return
        theirs, ours = table.double().flip(0), sde.std(torch.linspace(0, 1, len(table), dtype=torch.float64))
        if not torch.allclose(ours, theirs, rtol=1e-4, atol=0):
            raise CheckpointError(
                f"model.sigma_min={ours[0]:g}, model.sigma_max={ours[-1]:g}, model.schedule: {self.path} was trained "
                f"with {len(table)} other noise levels, from {theirs[0]:g} to {theirs[-1]:g}"
            )

    def _translated(self, what: str, tensors: dict[str, Tensor], network: UNet | RefineNet) -> dict[str, Tensor]:
        """Tensors in the shapes of the parameters, under the network's names and in its layout."""
        own_name = {official: own for own, official in official_names(network).items()}
        translated = {}
        for name, tensor in tensors.items():
            if problem := mismatch(tensor, self._weights[name]):
                raise CheckpointError(f"{self.path}: {what} of {name} {problem}")
            # A matrix (in, out), here a 1×1 convolution (out, in, 1, 1).
            if ".NIN_" in name and name.endswith(".W") and tensor.ndim == 2:
                tensor = tensor.t()[:, :, None, None]
            translated[own_name.get(name, name)] = tensor
        return translated


def convert_public_checkpoint(
    checkpoint: dict | list, path: str | Path, score_model: ScoreModel, optimizer: torch.optim.Adam | None
) -> dict:
    """A public checkpoint as one of ours: what training needs to go on with it.

    Args:
        checkpoint, path: see ``PublicCheckpoint``.
        score_model: of the network and the SDE that the file was trained with.
        optimizer: Adam of the trainable parameters of ``score_model``, in their order; None leaves its state out.

    Returns:
        ``step``, ``model``, ``ema`` and ``optimizer``, which is None if the file has no optimiser state.

    Raises:
        CheckpointError: not of a public format, or made for another architecture, noise or optimiser.
    """
    public, network = PublicCheckpoint(checkpoint, path), score_model.network
    weights = public.weights(network)
    check_state_dict(network, weights, path)
    public.check_noise_levels(score_model.noise_level)
    averages = public.averages(network)
    states = None if optimizer is None else public.optimizer_state(network)
    if states is not None:
        trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        state = {index: states[name] for index, name in enumerate(trainable)}
        states = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    model, average = ({f"network.{name}": t for name, t in tensors.items()} for tensors in (weights, averages))
    ema = {"num_updates": public.num_updates, "model": average}
    return {"step": public.step, "model": model, "ema": ema, "optimizer": states}


def public_checkpoint(state: Mapping, score_model: ScoreModel) -> dict:
    """A checkpoint of ours in the form of score_sde_pytorch: what ``convert_public_checkpoint`` reads, backwards.

    Raises:
        CheckpointError: the public code has no such model.
    """
    network, trainable = score_model.network, dict(score_model.network.named_parameters())
    family, known = score_model.sde.name, isinstance(score_model, UnconstrainedScore) and isinstance(network, UNet)
    known = known and score_model.prediction in (USUAL_PREDICTION[family], "score" if family == "ve" else "")
    if not known or network.num_classes or network.condition_channels or len(network.image_shape) != 3:
        raise CheckpointError(
            "score_sde_pytorch has unconstrained U-Nets of images without classes or conditions, and no other model"
        )
    trainable = {name: parameter for name, parameter in trainable.items() if parameter.requires_grad}
    names = official_names(network)  # in the order of its parameters

    def theirs(name: str, tensor: Tensor) -> Tensor:
        matrix = ".NIN_" in names[name] and names[name].endswith(".W")
        return tensor[:, :, 0, 0].t().contiguous() if matrix else tensor.contiguous()

    def weights(part: Mapping, kept: Iterable[str]) -> dict[str, Tensor]:
        return {f"module.{names[name]}": theirs(name, part[f"network.{name}"]) for name in names if name in kept}

    model = weights(state["model"], names)
    sde, levels = score_model.sde, score_model.noise_level.num_scales
    if sde.name == "ve" and levels:
        model["module.sigmas"] = sde.std(torch.linspace(0, 1, levels, dtype=torch.float64)).flip(0)
    averages = list(weights(state["ema"]["model"], trainable).values())
    adam = {"state": {}, "param_groups": []}
    if state["optimizer"] is not None:
        own = dict(zip(trainable, state["optimizer"]["state"].values(), strict=True))
        for index, name in enumerate(names):
            if name in own:
                moments = {key: theirs(name, own[name][key]) for key in ("exp_avg", "exp_avg_sq")}
                adam["state"][index] = {"step": own[name]["step"], **moments}
        (group,) = state["optimizer"]["param_groups"]
        adam["param_groups"] = [{**group, "params": list(range(len(names)))}]
    ema = {"decay": 0.0, "num_updates": state["ema"]["num_updates"], "shadow_params": averages}
    return {"optimizer": adam, "model": model, "ema": ema, "step": state["step"]}
