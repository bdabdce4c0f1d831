"""The files of the public codes.

score_sde_pytorch and QCSBM share one format: a dict with ``model`` (a state dict), ``ema`` (a list of averages in the
order of the parameters), ``optimizer`` and, in the former, ``step``. The codes of NCSN and NCSNv2 write lists.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from checkpoints import CheckpointError, check_state_dict
from models.ncsnv2 import RefineNet
from models.published.names import official_names
from models.score import ScoreModel
from models.unet import UNet
from sde_lib import SDE


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
        CheckpointError: not of these formats.
    """

    def __init__(self, checkpoint: dict | list, path: str | Path) -> None:
        self.path = path
        if isinstance(checkpoint, list):
            try:
                checkpoint = _from_ncsn_list(checkpoint)
            except (ValueError, KeyError, TypeError, AttributeError, IndexError):
                raise CheckpointError(f"{path} holds a list that is none of NCSN's checkpoints") from None
        missing = [key for key in ("model", "ema") if key not in checkpoint]
        if not missing:
            missing = [f"ema.{key}" for key in ("shadow_params", "num_updates") if key not in checkpoint["ema"]]
        if missing:
            raise CheckpointError(f"{path} is not a score_sde_pytorch checkpoint: it has no {', '.join(missing)}")
        self.num_updates = int(checkpoint["ema"]["num_updates"])
        self.step = int(checkpoint.get("step", self.num_updates))
        self._weights = {name.removeprefix("module."): tensor for name, tensor in checkpoint["model"].items()}
        # The noise levels are a buffer there, the largest first; here they belong to the SDE.
        self._noise_levels: Tensor | None = self._weights.pop("sigmas", None)
        self._averages: list[Tensor] = checkpoint["ema"]["shadow_params"]
        self._optimizer: dict = checkpoint.get("optimizer") or {}
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
        """Adam's moments ``exp_avg`` and ``exp_avg_sq`` and its ``step``, float32, of every trainable parameter under
        the network's names and in its layout; None if the file has none.

        The public codes give Adam all parameters, the fixed Fourier frequencies included: these have an index, and no
        state, as they never have a gradient.

        Raises:
            CheckpointError: another optimiser than Adam, or states that do not belong to these parameters.
        """
        if not (states := self._optimizer.get("state")):
            return None
        indices = [index for group in self._optimizer["param_groups"] for index in group["params"]]
        if len(indices) != len(self._weights):
            raise CheckpointError(
                f"{self.path}: its optimiser has {len(indices)} parameters, its model {len(self._weights)}"
            )
        index_of = dict(zip(self._weights, indices, strict=True))
        adam = {name: states.get(index_of[name], {}) for name in self._trainable}
        for name, state in adam.items():
            if set(state) != {"exp_avg", "exp_avg_sq", "step"}:
                raise CheckpointError(
                    f"{self.path}: the optimiser state of {name} is {', '.join(sorted(state)) or 'nothing'}; read is "
                    "Adam's, which is exp_avg, exp_avg_sq, step"
                )
        first, second = (
            self._translated(field, {name: state[field].float() for name, state in adam.items()}, network)
            for field in ("exp_avg", "exp_avg_sq")
        )
        steps = (torch.tensor(float(state["step"])) for state in adam.values())
        return {
            name: {"step": step, "exp_avg": first[name], "exp_avg_sq": second[name]}
            for name, step in zip(first, steps, strict=True)
        }

    def check_noise_levels(self, sde: SDE) -> None:
        """Compare the σ of a VE model with those that the file was trained with.

        Raises:
            CheckpointError: other noise levels, naming the config fields.
        """
        if sde.name != "ve" or self._noise_levels is None:
            return
        theirs = float(self._noise_levels[-1]), float(self._noise_levels[0])
        ours = float(sde.std(torch.zeros((), dtype=torch.float64))), sde.prior_std
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(theirs, ours, strict=True)):
            raise CheckpointError(
                f"model.sigma_min={ours[0]:g}, model.sigma_max={ours[1]:g}: {self.path} was trained with "
                f"{theirs[0]:g} and {theirs[1]:g}"
            )

    def _translated(self, what: str, tensors: dict[str, Tensor], network: UNet | RefineNet) -> dict[str, Tensor]:
        """Tensors in the shapes of the parameters, under the network's names and in its layout."""
        own_name = {official: own for own, official in official_names(network).items()}
        translated = {}
        for name, tensor in tensors.items():
            if tensor.shape != (shape := self._weights[name].shape):
                raise CheckpointError(
                    f"{self.path}: {what} of {name} has shape {tuple(tensor.shape)}, the parameter {tuple(shape)}"
                )
            if ".NIN_" in name and name.endswith(".W"):  # a matrix (in, out), here a 1×1 convolution (out, in, 1, 1)
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
    public.check_noise_levels(score_model.sde)
    weights = public.weights(network)
    check_state_dict(network, weights, path)
    averages = public.averages(network)
    states = None if optimizer is None else public.optimizer_state(network)
    if states is not None:
        trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        state = {index: states[name] for index, name in enumerate(trainable)}
        states = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}
    model, average = ({f"network.{name}": t for name, t in tensors.items()} for tensors in (weights, averages))
    ema = {"num_updates": public.num_updates, "model": average}
    return {"step": public.step, "model": model, "ema": ema, "optimizer": states}
