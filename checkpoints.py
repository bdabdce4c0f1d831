"""Checkpoints: written whole or not at all, read without trusting them, and the public format's reader.

A checkpoint is one file ``checkpoints/step_00000123.pt`` of tensors and plain values. It is written under another
name, synced to disk and renamed, so that a process killed at any moment leaves the previous file intact. It is
read with ``weights_only=True`` after its checksums have been verified; a damaged file is reported and the one
before it is used.

The second half reads the checkpoints of score_sde_pytorch and of the QCSBM code, which share one format: a dict with
``model`` (state dict with names like ``module.all_modules.<i>.…``), ``ema`` (a list of averages in parameter order),
``optimizer`` and, in the former, ``step``; and those of the codes of NCSN and NCSNv2, which are lists.
"""

from __future__ import annotations

import logging
import math
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from experiment.files import write_atomically
from models import layers, ncsnv2
from models.score import ScoreModel
from sde_lib import SDE

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "PublicCheckpoint",
    "convert_public_checkpoint",
    "load_score_sde_checkpoint",
    "load_state_dict_strictly",
    "read_checkpoint",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or made for something else."""


# ---------------------------------------------------------------------------------------------------------------
# Files


def write_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) to ``path``: wholly, or not at all."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: str | Path) -> dict:
    """Read a file written by ``torch.save``, on the CPU, without unpickling anything but tensors and plain values.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        # torch does not verify the archive's checksums, so a flipped bit in the weights would pass unnoticed.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()
            if damaged is not None:
                raise CheckpointError(f"damaged checkpoint {path}: wrong checksum of {damaged}")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError:
        reason = "damaged, or more in it than tensors and plain values"
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from None
    except Exception as error:  # torch.load raises half a dozen unrelated types on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from error
    if isinstance(state, list) and len(state) in (2, 4, 5) and isinstance(state[0], dict):
        try:
            return _from_ncsn_list(state)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} holds a list that is none of NCSN's checkpoints: {error!r}") from None
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def check_whole(state: dict, source: object) -> None:
    """Raise a CheckpointError unless ``state`` has what a checkpoint of ``run_lib`` consists of."""
    kinds = {"step": int, "model": dict, "ema": dict, "optimizer": dict, "sums": dict}
    wrong = [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]
    if wrong or state["step"] < 0:
        raise CheckpointError(f"{source}: not a whole checkpoint; missing or wrong: {', '.join(wrong or ['step'])}")
    if not isinstance(state["ema"].get("model"), dict) or not isinstance(state["optimizer"].get("param_groups"), list):
        raise CheckpointError(f"{source}: not a whole checkpoint; its averages or its optimiser state lack a part")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they live.
        keep: how many of the newest are kept.
        milestone_every: steps divisible by this are kept for ever; 0 keeps none.
    """

    def __init__(self, directory: Path, *, keep: int, milestone_every: int) -> None:
        if keep < 1 or milestone_every < 0:
            raise ValueError(
                f"training.keep_checkpoints={keep}, training.snapshot_freq={milestone_every}: "
                "need at least 1 and at least 0"
            )
        self.directory = directory
        self.keep = keep
        self.milestone_every = milestone_every

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}.pt"

    def steps(self) -> list[int]:
        """Steps of which a checkpoint exists, ascending."""
        return sorted(int(path.stem[5:]) for path in self.directory.glob("step_*.pt") if path.stem[5:].isdigit())

    def save(self, state: dict, step: int) -> Path:
        """Write the state of ``step`` and delete what is no longer kept."""
        path = self.path(step)
        for abandoned in self.directory.glob(".step_*.pt.*"):  # by a process killed while it wrote
            abandoned.unlink()
        write_checkpoint(path, state)
        for old in self.steps()[: -self.keep]:
            if not (self.milestone_every and old % self.milestone_every == 0):
                self.path(old).unlink()
        return path

    def load_latest(self) -> dict | None:
        """The newest readable checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return read_checkpoint(self.path(step))
            except CheckpointError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
        if steps:
            raise CheckpointError(f"none of the {len(steps)} checkpoints in {self.directory} can be read")
        return None


def load_state_dict_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load weights, or say which names or shapes do not match; on a mismatch the module is left unchanged.

    Raises:
        CheckpointError: the first mismatching names, and how many there are.
    """
    check_state_dict(module, state, source)
    module.load_state_dict(state)


def check_state_dict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Raise a CheckpointError unless names and shapes are those of a module's weights."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    problems += [
        f"{name} has shape {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} was made for another architecture: {'; '.join(problems[:3])}{more}")


# ---------------------------------------------------------------------------------------------------------------
# The public format

# How the parts of each of our modules are called in score_sde_pytorch. A module that is not listed has the same
# names there (convolutions, linear layers, normalisation).
_RESIDUAL = {
    "norm1": "GroupNorm_0",
    "conv1": "Conv_0",
    "time": "Dense_0",
    "norm2": "GroupNorm_1",
    "conv2": "Conv_1",
}
_OFFICIAL_PARTS: dict[type[nn.Module], dict[str, str]] = {
    layers.BigGANBlock: {**_RESIDUAL, "shortcut": "Conv_2"},
    layers.DDPMBlock: {**_RESIDUAL, "shortcut": "NIN_0"},
    layers.Attention: {"norm": "GroupNorm_0", "query": "NIN_0", "key": "NIN_1", "value": "NIN_2", "out": "NIN_3"},
    layers.Combine: {"conv": "Conv_0"},
    layers.Downsample: {"conv": "Conv_0"},
    layers.Upsample: {"conv": "Conv_0"},
    layers.FIRConvDown: {"conv": "Conv2d_0"},
    layers.FIRConvUp: {"conv": "Conv2d_0"},
    layers.FourierEmbedding: {"frequencies": "W"},
    ncsnv2.ResidualBlock: {"norm1": "normalize1", "norm2": "normalize2"},
}


def _from_ncsn_list(values: list) -> dict:
    """The lists that the codes of NCSN and NCSNv2 write, in score_sde_pytorch's form.

    Those are model and optimiser, then in NCSNv2 epoch and step, then, if it keeps one, the moving average by name.
    """
    model, optimizer, *rest = values
    names = [name.removeprefix("module.") for name in model if name.removeprefix("module.") != "sigmas"]
    shadow = rest[2] if len(rest) == 3 else {name.removeprefix("module."): tensor for name, tensor in model.items()}
    step = rest[1] if rest else max((int(state["step"]) for state in optimizer["state"].values()), default=0)
    ema = {"num_updates": step, "shadow_params": [shadow[name] for name in names if name in shadow]}
    return {"model": model, "optimizer": optimizer, "ema": ema, "step": step}


class PublicNetwork(Protocol):
    """An ``nn.Module`` that the public codes have too: it knows what its modules are called there."""

    def official_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def official_names(network: PublicNetwork) -> dict[str, str]:
    """For each of our parameter names, its name in score_sde_pytorch's state dict, without the prefix ``module.``."""
    own_names = {id(parameter): name for name, parameter in network.named_parameters()}
    names = {}
    for prefix, module in network.official_modules():
        parts = _OFFICIAL_PARTS.get(type(module), {})
        for name, parameter in module.named_parameters():
            first, *rest = name.split(".")
            official = parts.get(first, first)
            if official.startswith("NIN"):
                rest = [{"weight": "W", "bias": "b"}[rest[0]]]
            names[own_names[id(parameter)]] = ".".join([prefix, official, *rest])
    return names


def _to_own_layout(tensor: Tensor, official_name: str) -> Tensor:
    """A channel-mixing matrix "NIN_i.W" (in, out) is a 1×1 convolution (out, in, 1, 1) here."""
    return tensor.t()[:, :, None, None] if ".NIN_" in official_name and official_name.endswith(".W") else tensor


class PublicCheckpoint:
    """A checkpoint of score_sde_pytorch, of the QCSBM code, or of those of NCSN and NCSNv2.

    Args:
        path: the ``.pth`` file.

    Attributes:
        step: steps of the optimiser; where a file has no ``step``, as QCSBM's, the updates of its moving average, of
            which every step is one.
        num_updates: updates of the moving average.

    Raises:
        CheckpointError: unreadable, or not of these formats.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = path
        checkpoint = read_checkpoint(path)
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

    def weights(self, network: PublicNetwork) -> dict[str, Tensor]:
        """The weights under a network's names and in its layout; what it has no name for stands as in the file."""
        return self._translated(self._weights, network)

    def averages(self, network: PublicNetwork) -> dict[str, Tensor]:
        """The same of the moving averages; the fixed Fourier frequencies have none and stand for themselves.

        Raises:
            CheckpointError: not one average for every trainable parameter, in its shape.
        """
        trainable = self._trainable()
        if len(self._averages) != len(trainable):
            raise CheckpointError(
                f"{self.path} has {len(self._averages)} averages for {len(trainable)} trainable parameters"
            )
        averages = dict(zip(trainable, self._averages, strict=True))
        for name, average in averages.items():
            self._check_shape(f"the average of {name}", average, name)
        return self._translated(self._weights | averages, network)

    def optimizer_state(self, network: PublicNetwork) -> dict[str, dict[str, Tensor]] | None:
        """Adam's moments ``exp_avg`` and ``exp_avg_sq`` and its ``step``, float32, of every trainable parameter under
        the network's names and in its layout; None if the file has none.

        The public codes give Adam all parameters, the fixed Fourier frequencies included: these have an index, and no
        state, as they never have a gradient.

        Raises:
            CheckpointError: another optimiser than Adam, or states that do not belong to these parameters.
        """
        states = self._optimizer.get("state")
        if not states:
            return None
        indices = [index for group in self._optimizer["param_groups"] for index in group["params"]]
        if len(indices) != len(self._weights):
            raise CheckpointError(
                f"{self.path}: its optimiser has {len(indices)} parameters, its model {len(self._weights)}"
            )
        index_of = dict(zip(self._weights, indices, strict=True))
        own_name = {official: own for own, official in official_names(network).items()}
        translated = {}
        for name in self._trainable():
            state = states.get(index_of[name])
            if state is None or set(state) != {"exp_avg", "exp_avg_sq", "step"}:
                raise CheckpointError(
                    f"{self.path}: the optimiser state of {name} is {', '.join(sorted(state or ['nothing']))}; read is "
                    "Adam's, which is exp_avg, exp_avg_sq, step"
                )
            moments = {"step": torch.tensor(float(state["step"]))}
            for field in ("exp_avg", "exp_avg_sq"):
                self._check_shape(f"{field} of {name}", state[field], name)
                moments[field] = _to_own_layout(state[field].float(), name)
            translated[own_name.get(name, name)] = moments
        return translated

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

    def _trainable(self) -> list[str]:
        """The parameters that have gradients, in the order of the file: all but the Fourier frequencies."""
        return [name for name in self._weights if not name.endswith(".W") or ".NIN_" in name]

    def _check_shape(self, what: str, tensor: Tensor, name: str) -> None:
        if tensor.shape != self._weights[name].shape:
            raise CheckpointError(
                f"{self.path}: {what} has shape {tuple(tensor.shape)}, the parameter {tuple(self._weights[name].shape)}"
            )

    @staticmethod
    def _translated(tensors: dict[str, Tensor], network: PublicNetwork) -> dict[str, Tensor]:
        names = official_names(network)
        unknown = set(tensors) - set(names.values())
        translated = {own: _to_own_layout(tensors[name], name) for own, name in names.items() if name in tensors}
        return translated | {name: tensors[name] for name in tensors if name in unknown}


def load_score_sde_checkpoint(path: str | Path, network: PublicNetwork, ema: bool, sde: SDE | None = None) -> int:
    """Load a public checkpoint into a network; returns its step.

    Args:
        path: the ``.pth`` file.
        network: a network built from the matching config.
        ema: take the moving averages instead of the raw weights.
        sde: the forward process, to be compared with the noise levels in the file.

    Raises:
        CheckpointError: unreadable, not of a public format, or made for another architecture (naming the first
            parameters that do not match) or other noise levels; the network is then unchanged.
    """
    checkpoint = PublicCheckpoint(path)
    if sde is not None:
        checkpoint.check_noise_levels(sde)
    load_state_dict_strictly(network, checkpoint.averages(network) if ema else checkpoint.weights(network), path)
    return checkpoint.step


def convert_public_checkpoint(path: str | Path, score_model: ScoreModel, optimizer: torch.optim.Adam) -> dict:
    """A public checkpoint as one of ours: what training needs to go on with it.

    Args:
        path: the ``.pth`` file.
        score_model: built from the matching config, with the network and the SDE that the file was trained with.
        optimizer: Adam of the trainable parameters of ``score_model``, in their order.

    Returns:
        ``step``, ``model``, ``ema`` and ``optimizer``, which is None if the file has no optimiser state.

    Raises:
        CheckpointError: unreadable, not of a public format, or made for another architecture, noise or optimiser.
    """
    checkpoint, network = PublicCheckpoint(path), score_model.network
    checkpoint.check_noise_levels(score_model.sde)
    weights = checkpoint.weights(network)
    check_state_dict(network, weights, path)
    averages, states = checkpoint.averages(network), checkpoint.optimizer_state(network)
    if states is not None:
        trainable = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
        state = {index: states[name] for index, name in enumerate(trainable)}
        states = {"state": state, "param_groups": optimizer.state_dict()["param_groups"]}

    def of_score_model(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"network.{name}": tensor for name, tensor in tensors.items()}

    return {
        "step": checkpoint.step,
        "model": of_score_model(weights),
        "ema": {"num_updates": checkpoint.num_updates, "model": of_score_model(averages)},
        "optimizer": states,
    }
