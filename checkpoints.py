"""Checkpoints: written whole or not at all, read without trusting them, and the public format's reader.

A checkpoint is one file ``checkpoints/step_00000123.pt`` of tensors and plain values. It is written under another
name, synced to disk and renamed, so that a process killed at any moment leaves the previous file intact. It is
read with ``weights_only=True`` after its checksums have been verified; a damaged file is reported and the one
before it is used.

The second half reads the checkpoints of score_sde_pytorch and of the QCSBM code, which share one format: a dict with
``model`` (state dict with names ``module.all_modules.<i>.…``), ``ema`` (a list of averages in parameter order),
``optimizer`` and ``step``.
"""

from __future__ import annotations

import logging
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from atomic_write import write_atomically
from models import layers, ncsnv2

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "capture_rng_state",
    "load_score_sde_checkpoint",
    "load_state_dict_strictly",
    "read_checkpoint",
    "restore_rng_state",
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
    except Exception as error:  # torch.load raises half a dozen unrelated types on damaged files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


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


def capture_rng_state() -> dict:
    """The state of every global random stream of this process, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_rng_state(state: dict) -> None:
    """Undo ``capture_rng_state``. CUDA streams are restored where as many devices exist as were saved."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


def load_state_dict_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load weights, or say which names or shapes do not match; on a mismatch the module is left unchanged.

    Raises:
        CheckpointError: the first mismatching names, and how many there are.
    """
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
    module.load_state_dict(state)


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


def load_score_sde_checkpoint(path: str | Path, network: PublicNetwork, ema: bool) -> int:
    """Load a checkpoint of score_sde_pytorch, or of the QCSBM code, into a network; returns its step.

    Args:
        path: the ``.pth`` file.
        network: a network built from the matching config.
        ema: take the moving averages instead of the raw weights. Buffers and the fixed Fourier frequencies have
            no average and are the same in both.

    Raises:
        CheckpointError: unreadable, not of this format, or made for another architecture (naming the first
            parameters that do not match); the network is then unchanged.
    """
    checkpoint = read_checkpoint(path)
    missing = [key for key in ("model", "ema", "step") if key not in checkpoint]
    if not missing:
        missing = [f"ema.{key}" for key in ("shadow_params", "num_updates") if key not in checkpoint["ema"]]
    if missing:
        raise CheckpointError(f"{path} is not a score_sde_pytorch checkpoint: it has no {', '.join(missing)}")
    weights = {
        name.removeprefix("module."): tensor
        for name, tensor in checkpoint["model"].items()
        # The noise levels are a buffer there; here they belong to the SDE.
        if name.removeprefix("module.") != "sigmas"
    }
    if ema:
        # Averages are listed in the order of the parameters that require gradients, which excludes the Fourier
        # frequencies.
        trainable = [name for name in weights if name != "all_modules.0.W"]
        averages = checkpoint["ema"]["shadow_params"]
        if len(averages) != len(trainable):
            raise CheckpointError(f"{path} has {len(averages)} averages for {len(trainable)} trainable parameters")
        for name, average in zip(trainable, averages, strict=True):
            if average.shape != weights[name].shape:
                raise CheckpointError(
                    f"{path}: the average of {name} has shape {tuple(average.shape)}, "
                    f"the parameter {tuple(weights[name].shape)}"
                )
            weights[name] = average
    names = official_names(network)
    unexpected = [name for name in weights if name not in set(names.values())]
    translated = {own: _to_own_layout(weights[name], name) for own, name in names.items() if name in weights}
    # Names we have no translation for are reported as they stand in the file.
    translated.update({name: weights[name] for name in unexpected})
    load_state_dict_strictly(network, translated, path)
    return int(checkpoint["step"])
