"""Checkpoints: written whole or not at all, and read without trusting them.

A checkpoint is one file ``checkpoints/step_00000123.pt`` of tensors and plain values. It is written under another
name, synced to disk and renamed, so that a process killed at any moment leaves the previous file intact. It is
read with ``weights_only=True`` after its checksums have been verified; a damaged file is reported and the one
before it is used. Those of other projects are read by ``models.published``.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from experiment.files import write_atomically

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "check_state_dict",
    "check_version",
    "load_state_dict_strictly",
    "not_finite",
    "read_checkpoint",
    "weights_digest",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

CHECKPOINT_VERSION = 2
"""To be raised when what a training run saves changes; a checkpoint of another version is refused."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or made for something else."""


# ---------------------------------------------------------------------------------------------------------------
# Files


def write_checkpoint(path: Path, state: dict) -> None:
    """Write ``state`` (tensors, numbers, strings, lists, dicts) to ``path``: wholly, or not at all."""
    write_atomically(path, lambda file: torch.save(state, file))


def read_checkpoint(path: str | Path) -> dict | list:
    """Read a file written by ``torch.save``, on the CPU, without unpickling anything but tensors and plain values.

    Ours is a dict; a list is what some other projects write.

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
    if not isinstance(state, dict | list):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def check_version(state: dict | list, source: object) -> None:
    """Raise a CheckpointError unless ``state`` is what a training run of this version saves (``training.Trainer``)."""
    if not isinstance(state, dict) or state.get("version") != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{source}: a checkpoint of another version, or of another program; version {CHECKPOINT_VERSION} is read"
        )
    parts = ("step", "model", "ema", "optimizer", "scaler", "sums", "log_size", "hooks_done", "record")
    if missing := [part for part in parts if part not in state]:
        raise CheckpointError(f"{source}: not a whole checkpoint, it lacks {', '.join(missing)}")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        directory: where they live.
        keep: how many of the newest are kept, at least 1.
        milestone_every: steps divisible by this are kept for ever; 0 keeps none.
    """

    def __init__(self, directory: Path, *, keep: int = 1, milestone_every: int = 0) -> None:
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
        CheckpointError: the first mismatching names, and how many there are; or weights that are not finite.
    """
    check_state_dict(module, state, source)
    if bad := not_finite(state):
        raise CheckpointError(f"{source}: {bad} is not finite; an earlier checkpoint may be good")
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


def not_finite(state: dict[str, Tensor]) -> str:
    """The first of a module's weights that is not finite; empty if all are."""
    return next((name for name, tensor in state.items() if not bool(tensor.isfinite().all())), "")


def weights_digest(module: nn.Module) -> str:
    """32 hexadecimal digits that change with any weight or buffer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
