"""Files that are written wholly or not at all, and read without trusting them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np

__all__ = ["first_line", "read_arrays", "write_arrays", "write_atomically", "write_json", "write_text"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a binary file that then takes the place of ``path``.

    Readers see the old file or the whole new one, also when several processes write it, when this one is killed, or
    after a power cut. Missing folders are made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself must reach the disk as well.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: object) -> None:
    """Numbers that are not finite are refused (ValueError): JSON has none."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_arrays(path: Path, **arrays: object) -> None:
    """A compressed ``.npz``."""
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``; nothing is unpickled.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    try:
        # Opened here because numpy leaves a damaged file open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as archive:
            # A member that is no array comes out as bytes.
            return {name: np.asarray(archive[name]) for name in archive.files}
    except Exception as error:  # numpy, zipfile and zlib raise half a dozen unrelated types on damaged files
        raise ValueError(f"{path} is missing or damaged: {error}") from error


def first_line(error: Exception) -> str:
    """What an error says, cut to one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
