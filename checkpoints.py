"""Checkpoints: written whole or not at all, and read without trusting them.

A checkpoint is one file ``checkpoints/step_00000123.pt`` of tensors and plain values. It is written under another
name, synced to disk and renamed, so that a process killed at any moment leaves the previous file intact. It is
read with ``weights_only=True`` from what its checksums have verified, and all of it is compared with what it is for
before any of it is used; a damaged file is reported and the one before it is used. Those of other projects are read by
``models.published``.
"""

from __future__ import annotations

import hashlib
import io
import logging
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from experiment.files import first_line, write_atomically

__all__ = [
    "CheckpointError",
    "CheckpointStore",
    "check_optimizer_state",
    "check_state_dict",
    "check_version",
    "is_count",
    "load_state_dict_strictly",
    "mismatch",
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
    """Read a file written by ``torch.save``, on the CPU, without unpickling anything but tensors, plain values and
    numpy's scalars, which come out as plain numbers.

    Ours is a dict; a list is what some other projects write.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, no file of PyTorch, or holds other objects.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if start not in (b"PK", b"\x80\x02"):  # an archive, or a pickle of before PyTorch 1.6
            raise CheckpointError(f"{path} is {'no file of PyTorch' if start else 'empty'}, or it is damaged")
        with torch.serialization.safe_globals(_NUMPY_SCALARS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is refused later, such as sparse tensors
            content = _verified(path) if start == b"PK" else path
            state = torch.load(content, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        objects = re.search(r"GLOBAL (\S+)", str(error))
        reason = "damaged, or not written by torch.save"
        if objects:
            reason = f"it holds objects ({objects[1]}), which could run anything; read are tensors and plain values"
        raise CheckpointError(f"cannot read checkpoint {path}: {reason}") from None
    except Exception as error:  # zipfile and torch.load raise half a dozen unrelated types on damaged files
        raise CheckpointError(f"cannot read checkpoint {path}: {first_line(error)}") from error
    if not isinstance(state, dict | list):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint")
    return state


def _verified(path: Path) -> io.BytesIO:
    """An archive of ``torch.save``, made anew of what its checksums have verified.

    torch verifies nothing: a flipped bit in the weights would pass, and one in the directory of the archive can make it
    read nothing into fresh memory.
    """
    copy = io.BytesIO()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(copy, "w") as verified:
        parts = archive.infolist()
        if sum(part.file_size for part in parts) > path.stat().st_size:  # torch never compresses
            raise zipfile.BadZipFile("it claims to hold more than it does")
        if not any(part.filename.endswith("/data.pkl") for part in parts):
            raise zipfile.BadZipFile("an archive, but not one of PyTorch")
        for part in parts:
            verified.writestr(part.filename, archive.read(part))
    copy.seek(0)
    return copy


class _NumpyType:
    """Stands for ``numpy.dtype`` in a pickle; nothing of numpy's is called with what a file says."""

    def __init__(self, name: str, *_: object) -> None:
        if not re.fullmatch("[fiu][1248]|b1", name):
            raise ValueError(f"a numpy scalar of type {name!r}; read are numbers")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


def _plain_number(kind: _NumpyType, content: bytes) -> float | int | bool:
    return np.frombuffer(content, kind.order + kind.name).item()


# The learning rate in what the public codes save. The module's name is numpy 1's, then numpy 2's.
_NUMPY_SCALARS: list = [(_NumpyType, "numpy.dtype")]
_NUMPY_SCALARS += [(_plain_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def is_count(value: object) -> bool:
    """Whether it is an integer of at least 0, of 64 bits."""
    return type(value) is int and 0 <= value < 2**63


def check_version(state: dict | list, source: object) -> None:
    """Raise a CheckpointError unless ``state`` has the parts of what a training run of this version saves
    (``training.Trainer``); whether they fit model and optimiser, loading them says."""
    version = state.get("version") if isinstance(state, dict) else None
    if not is_count(version) or version != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{source}: a checkpoint of another version, or of another program; version {CHECKPOINT_VERSION} is read"
        )
    ema, sums = (state.get(name, ...) for name in ("ema", "sums"))
    whole = {
        "step": is_count(state.get("step")),
        "model": isinstance(state.get("model"), dict),
        "ema": ema is None
        or (isinstance(ema, dict) and is_count(ema.get("num_updates")) and isinstance(ema.get("model"), dict)),
        **{name: isinstance(state.get(name, ...), dict | None) for name in ("optimizer", "scaler")},
        "sums": isinstance(sums, dict) and all(map(_is_sum, sums.values())),
        "log_size": is_count(state.get("log_size")),
        "hooks_done": isinstance(state.get("hooks_done"), bool),
        "record": isinstance(state.get("record"), dict),
    }
    if wrong := [name for name, is_whole in whole.items() if not is_whole]:
        raise CheckpointError(f"{source}: not a whole checkpoint; missing, or of another form: {', '.join(wrong)}")


def _is_sum(value: object) -> bool:
    """Whether it is a sum, and of how many numbers."""
    return isinstance(value, list) and [*map(type, value)] == [float, int] and value[1] > 0


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
        self._damaged: set[Path] = set()

    def path(self, step: int) -> Path:
        return self.directory / f"step_{step:08d}.pt"

    def steps(self) -> list[int]:
        """Steps of which a checkpoint exists, ascending."""
        return sorted(int(path.stem[5:]) for path in self.directory.glob("step_*.pt") if path.stem[5:].isdigit())

    def save(self, state: dict, step: int) -> Path:
        """Write the state of ``step`` and delete what is no longer kept.

        What could not be read is not counted, but set aside as ``NAME.damaged``.
        """
        path = self.path(step)
        write_checkpoint(path, state)
        for damaged in filter(Path.exists, self._damaged - {path}):
            damaged.rename(f"{damaged}.damaged")
        self._damaged.clear()
        self.delete_old()
        return path

    def delete_old(self) -> None:
        """Delete what is no longer kept, unless what is newer cannot be read."""
        if self._damaged:
            return
        for old in self.steps()[: -self.keep]:
            if not (self.milestone_every and old % self.milestone_every == 0):
                self.path(old).unlink()

    def load_latest(self) -> dict | None:
        """The newest readable checkpoint, or None if there is none at all.

        Raises:
            CheckpointError: there are checkpoints, and none of them can be read, or it is another program's.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                state = read_checkpoint(self.path(step))
            except CheckpointError as error:
                logger.warning("%s; falling back to the checkpoint before it", error)
                self._damaged.add(self.path(step))
                continue
            check_version(state, self.path(step))
            return state
        if steps:
            raise CheckpointError(f"none of the {len(steps)} checkpoints in {self.directory} can be read")
        return None


def load_state_dict_strictly(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Load weights, or say how they do not fit; then the module is left unchanged.

    Raises:
        CheckpointError: see ``check_state_dict``; or weights that are not finite.
    """
    check_state_dict(module, state, source)
    if bad := not_finite(state):
        raise CheckpointError(f"{source}: {bad} is not finite; an earlier checkpoint may be good")
    module.load_state_dict(state)


def check_state_dict(module: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Compare names, shapes and types with those of a module's weights.

    Raises:
        CheckpointError: the first that do not match, and how many there are.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is unexpected" for name in state if name not in own]
    differences = ((name, mismatch(state[name], own[name])) for name in own if name in state)
    problems += [f"{name} {difference}" for name, difference in differences if difference]
    if problems:
        for prefix, wrapper in (("module.", "DataParallel"), ("_orig_mod.", "torch.compile")):
            if state and all(str(name).startswith(prefix) for name in state):
                raise CheckpointError(f"{source}: weights of a wrapper ({wrapper}), whose names begin with {prefix!r}")
        what = "precision" if all(problem.endswith(" instead of float32") for problem in problems) else "architecture"
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(f"{source} was made for another {what}: {'; '.join(problems[:3])}{more}")


def check_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping, source: object) -> None:
    """Compare the state of an optimiser with its parameters, which torch does not: Adam's fused step would walk through
    the memory of moments of another shape.

    Raises:
        CheckpointError: other parameters, or the first of them whose state does not fit.
    """
    own = [group["params"] for group in optimizer.state_dict()["param_groups"]]
    try:
        states, groups = dict(state["state"]), [group["params"] for group in state["param_groups"]]
        states = {index: dict(moments) for index, moments in states.items()}
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{source}: the optimiser state is not in torch's form") from None
    if groups != own or not states.keys() <= {index for group in own for index in group}:
        raise CheckpointError(f"{source}: the optimiser state is that of other parameters")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    adam = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
    for index, moments in states.items():
        where = f"{source}: the optimiser state of parameter {index}"
        if adam and moments.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise CheckpointError(f"{where} is {', '.join(map(str, moments)) or 'empty'}, not that of Adam")
        for name, moment in moments.items():
            like = torch.zeros(()) if name == "step" else parameters[index]
            if (adam or moment is not None) and (difference := mismatch(moment, like)):
                raise CheckpointError(f"{where} does not fit: {name} {difference}")
            if name == "step" and not moment >= 0:
                raise CheckpointError(f"{where} has done {float(moment)} steps")


def mismatch(value: object, like: Tensor) -> str:
    """How a value differs from a plain tensor of the shape and type of ``like``; empty if it does not."""
    if type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__} instead of a tensor"
    if value.layout != torch.strided or value.device.type != "cpu":
        return f"is a tensor without plain numbers ({value.layout}, {value.device})"
    if value.shape != like.shape:
        return f"has shape {tuple(value.shape)} instead of {tuple(like.shape)}"
    if value.dtype != like.dtype:
        return f"is {str(value.dtype)[6:]} instead of {str(like.dtype)[6:]}"
    return ""


def not_finite(state: dict[str, Tensor]) -> str:
    """The first of a module's weights that is not finite; empty if all are."""
    return next((name for name, tensor in state.items() if not bool(tensor.isfinite().all())), "")


def weights_digest(module: nn.Module) -> str:
    """32 hexadecimal digits that change with any weight or buffer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
