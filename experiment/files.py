"""Files that are written wholly or not at all, read without trusting them; folders that belong to one experiment."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout


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
    """Numbers that are not finite, which JSON has not, are a FloatingPointError; then nothing is written."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        names = flatten(value) if isinstance(value, Mapping) else {}
        bad = ", ".join(name for name, part in names.items() if re.search(r"\b(NaN|Infinity)\b", json.dumps(part)))
        raise FloatingPointError(f"{path} is not written: {bad or 'a number'} is not finite") from None
    write_text(path, text + "\n")


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


_WAIT_SECONDS = 2.0
"""For a lock: the processes that a killed one had started end a moment after it."""

_held: dict[Path, FileLock] = {}
"""Locks of folders that this process has claimed, which it keeps until it ends."""


def take_lock(path: Path) -> FileLock:
    """The lock ``path``, a file, which no other process can take until it is released or this process ends.

    Raises:
        ValueError: another process has it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=_WAIT_SECONDS)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"--workdir: {path.parent} is in use by another process; wait for it, or stop it") from None
    return lock


def check_folder(workdir: str | Path) -> None:
    """Raise a ValueError unless ``workdir`` is a folder, or could be made."""
    folder = Path(workdir)
    if not str(workdir).strip():
        raise ValueError("--workdir is empty: give a folder")
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"--workdir={workdir}: is, or lies below, a file, not a folder")


def claim(
    workdir: str | Path,
    experiment: str,
    settings: Mapping[str, object] | None = None,
    *,
    exclusive: bool = True,
    free_fields: tuple[str, ...] = (),
) -> Path:
    """Mark a folder as that of ``experiment``, in ``workdir/experiment.json``, and return it; make it if need be.

    ``settings`` decide the results; a folder keeps those it was first claimed with. ``exclusive``: no other process can
    claim the folder until this one ends. ``free_fields``: see ``differences``. To be called once all other input has
    been checked, before anything is computed or written.

    Raises:
        ValueError: ``workdir`` is a file, holds a run of ``main.py``, or belongs to another experiment, or to this
            one with other settings, or is in use by another process. Nothing is written then.
    """
    folder = Path(workdir)
    marker = folder / "experiment.json"
    check_folder(workdir)
    if (folder / "config.json").exists():
        raise ValueError(f"--workdir={workdir}: holds a run of main.py (config.json); choose another folder")
    if marker.exists():
        try:
            record = json.loads(marker.read_bytes())
            owner, stored = record["experiment"], dict(record["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{marker} is damaged: {error!r}") from None
        if owner != experiment:
            raise ValueError(f"--workdir={workdir}: belongs to the experiment {owner!r}, not to {experiment!r}")
        if different := differences(stored, json.loads(json.dumps(settings or {})), free_fields):
            raise ValueError(f"--workdir={workdir} holds results of other settings: {different}")
    if exclusive and folder.resolve() not in _held:
        _held[folder.resolve()] = take_lock(folder / ".lock")
    if marker.exists():
        return folder
    write_text(marker, json.dumps({"experiment": experiment, "settings": settings or {}}, indent=1) + "\n")
    return folder


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def differences(stored: Mapping[str, object], given: Mapping[str, object], free_fields: tuple[str, ...] = ()) -> str:
    """In words, the first fields in which two nested settings differ; empty if they agree.

    Fields whose dotted name starts with one of ``free_fields`` may differ.
    """
    before, after = flatten(stored), flatten(given)
    different = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(free_fields)
    ]
    more = f" and {len(different) - 3} more" if len(different) > 3 else ""
    return "; ".join(different[:3]) + more
