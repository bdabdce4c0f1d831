"""Weights in safetensors files: a table of names, types and shapes in JSON, then numbers; nothing to execute."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from checkpoints import CheckpointError
from experiment.files import first_line, write_atomically

__all__ = ["read_metadata", "read_safetensors", "write_safetensors"]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name, on the CPU; those of half precision in float32.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise CheckpointError(f"no weights at {path}")
    try:
        # Of bytes, and not by its name, which maps a file that somebody may change.
        tensors = safetensors.torch.load(path.read_bytes())
    except (safetensors.SafetensorError, KeyError, ValueError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is no safetensors file, or it is damaged: {first_line(error)}") from error
    half = ("torch.float16", "torch.bfloat16")
    return {name: tensor.float() if str(tensor.dtype) in half else tensor for name, tensor in tensors.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """What a file, which has been read already, says besides."""
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write tensors wholly or not at all; two that share memory are written twice."""
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = safetensors.torch.save(own, {"format": "pt", **(metadata or {})})
    write_atomically(Path(path), lambda file: file.write(content))
