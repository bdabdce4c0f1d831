"""Files that are written wholly or not at all, read without trusting them; folders that belong to one experiment."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import socket
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock, Timeout

from configs.fields import flatten

logger = logging.getLogger(__name__)

_HOST = socket.gethostname()
_REMEDIES = {
    errno.ENOSPC: "free some space; the same command then goes on",
    errno.EDQUOT: "free some of your quota; the same command then goes on",
    errno.EFBIG: "allow larger files (ulimit -f); the same command then goes on",
    errno.ENOENT: "it has been removed meanwhile: bring its folder back, or begin anew",
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "make it writable, or choose another folder"),
}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system within become an OSError of one line, which names ``path`` and says what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__  # torch.save says only that it failed
        if not isinstance(cause, OSError):
            raise
        remedy = _REMEDIES.get(cause.errno, "the same command goes on once it can be written")
        raise OSError(f"cannot write {path}: {cause.strerror or cause}; {remedy}") from error


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a binary file that then takes the place of ``path``.

    Readers see the old file or the whole new one, also when several processes write it, when this one is killed, or
    after a power cut. Missing folders are made.

    Raises:
        OSError: see ``writing``.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        temporary = path.with_name(f".{path.name}.{_HOST}.{os.getpid()}")
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


@functools.cache  # once is enough: what this process begins it also removes
def _remove_abandoned(folder: Path) -> None:
    """Remove what processes of this host that were killed had begun to write in a folder."""
    for path in folder.glob(f".*.{_HOST}.*"):
        if path.suffix[1:].isdigit():
            try:
                os.kill(int(path.suffix[1:]), 0)  # 0 is no signal: only asks
            except ProcessLookupError:
                path.unlink(missing_ok=True)
            except OSError:
                pass  # it lives, and is another user's


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path: Path, value: object, *, checksum: bool = False) -> None:
    """Numbers that are not finite, which JSON has not, are a FloatingPointError; then nothing is written. ``checksum``:
    a mapping gets one more item, by which ``read_json`` knows that it is whole."""
    try:
        text = json.dumps(value, indent=1, allow_nan=False)
    except ValueError:
        names = flatten(value) if isinstance(value, Mapping) else {}
        bad = ", ".join(name for name, part in names.items() if re.search(r"\b(NaN|Infinity)\b", json.dumps(part)))
        raise FloatingPointError(f"{path} is not written: {bad or 'a number'} is not finite") from None
    if checksum:
        text = json.dumps({**value, "checksum": _json_checksum(value)}, indent=1)
    write_text(path, text + "\n")


def _json_checksum(value: Mapping[str, object]) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).hexdigest()


def write_arrays(path: Path, **arrays: object) -> None:
    """A compressed ``.npz``, with a checksum of all that is in it, first of all, so that no other can get lost without
    it."""

    def write(file: BinaryIO) -> None:  # np.savez leaves a file open that it could not write
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, values in {"checksum": _checksum(arrays), **arrays}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, np.asarray(values), allow_pickle=False)

    write_atomically(path, write)


def _checksum(arrays: Mapping[str, object]) -> str:
    """32 hexadecimal digits that change with any name, type, shape or number."""
    digest = hashlib.blake2b(digest_size=16)
    for name, values in sorted(arrays.items()):
        values = np.asarray(values)
        digest.update(f"{name} {values.dtype.str} {values.shape} ".encode() + values.tobytes())
    return digest.hexdigest()


_EXPANSION = 1032
"""How many times its size deflated data can be at most."""
_JSON_DEPTH = 100
"""Levels of nesting; ours have five."""


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an ``.npz``; nothing is unpickled, and no memory taken for more than the file can hold. What
    ``write_arrays`` wrote is compared with its checksum: damage may be in what zipfile does not look at.

    Raises:
        ValueError: the file is missing or damaged, or holds something else.
    """
    with _reading(path) as stream, zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        _check_size(sum(member.file_size for member in members), _EXPANSION * os.fstat(stream.fileno()).st_size)
        if any(member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for member in members):
            raise ValueError("it is compressed in another way than NumPy does")
        arrays = {}
        for member in members:
            with archive.open(member) as array:
                arrays[member.filename.removesuffix(".npy")] = _read_array(array, member.file_size)
        checksum = arrays.pop("checksum", None)
        if checksum is not None and str(checksum) != _checksum(arrays):
            raise ValueError("its content is not what its checksum says")
        return arrays


def read_array(path: Path) -> np.ndarray:
    """The array of an ``.npy``, read and refused like those of ``read_arrays``."""
    with _reading(path) as stream:
        return _read_array(stream, os.fstat(stream.fileno()).st_size)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The file, opened; whatever is raised meanwhile becomes a ValueError that names it."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is no regular file")  # a pipe would be waited for
        with open(path, "rb") as stream:
            yield stream
    except Exception as error:  # numpy, zipfile and zlib raise a dozen unrelated types on damaged files
        raise ValueError(f"{path} is missing or damaged: {first_line(error)}") from error


def _read_array(stream: BinaryIO, size: int) -> np.ndarray:
    """The array in a stream of ``size`` bytes in the format of ``.npy``."""
    version = np.lib.format.read_magic(stream)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(stream)
    if dtype.hasobject:
        raise ValueError("it holds objects, which are pickled (allow_pickle): only arrays of numbers are read")
    _check_size(stream.tell() + math.prod(shape) * dtype.itemsize, size)
    stream.seek(0)
    array = np.lib.format.read_array(stream, allow_pickle=False)
    if stream.read(1):  # which at the end of a zip's member also compares its checksum
        raise ValueError("more is in it than its header says")
    return array


def memory_size() -> int:
    """Of this machine, in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _check_size(claimed: int, most: int) -> None:
    memory = memory_size()
    if claimed > min(most, memory):
        reason = f"the file can hold {most}" if claimed > most else f"this machine has {memory}"
        raise ValueError(f"it claims {claimed} bytes, but {reason}")


def read_json(path: Path, *, checksum: bool = False) -> object:
    """The value in a ``.json``; a ValueError that names the file if it is damaged. ``checksum``: it must be a mapping
    that was written with one."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is damaged: it is no regular file")  # a pipe would be waited for
    value = parse_json(path.read_bytes(), path)
    if checksum and not (isinstance(value, dict) and value.pop("checksum", None) == _json_checksum(value)):
        raise ValueError(f"{path} is damaged: its content is not what its checksum says")
    return value


def parse_json(text: bytes | str, path: Path) -> object:
    """The same of ``text``, which was read from the file ``path``."""
    try:
        value = json.loads(text)
        level = [value]
        for _ in range(_JSON_DEPTH):
            nested = [item for item in level if isinstance(item, dict | list)]
            level = [inner for item in nested for inner in (item.values() if isinstance(item, dict) else item)]
            if not level:
                return value
        raise ValueError("it is nested too deeply")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {first_line(error)}") from None


def first_line(error: Exception) -> str:
    """What an error says, cut to one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


_WAIT_SECONDS = 2.0
"""For a lock: the processes that a killed one had started end a moment after it."""

_held: dict[Path, FileLock] = {}
"""Locks of folders that this process has claimed, which it keeps until it ends."""


def take_lock(path: Path, wait: bool = False) -> FileLock:
    """The lock ``path``, a file, which no other process can take until it is released or this process ends.

    Raises:
        ValueError: another process has it, and this one is not to ``wait``.
        OSError: see ``writing``.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=_WAIT_SECONDS)
        except Timeout:
            if not wait:
                message = f"--workdir: {path.parent} is in use by another process; wait for it, or stop it"
                raise ValueError(message) from None
            logger.info("another process is at work on the same; waiting for it to release %s", path)
            lock.acquire()
    return lock


def check_folder(workdir: str | Path, flag: str = "--workdir") -> None:
    """Raise a ValueError unless what ``flag`` names is a folder, or could be made."""
    folder = Path(workdir)
    if not str(workdir).strip():
        raise ValueError(f"{flag} is empty: give a folder")
    if any(path.exists() and not path.is_dir() for path in (folder, *folder.parents)):
        raise ValueError(f"{flag}={workdir}: is, or lies below, a file, not a folder")


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
        record = read_json(marker)
        try:
            owner, stored = record["experiment"], dict(record["settings"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{marker} is damaged: {error!r}") from None
        if owner != experiment:
            raise ValueError(f"--workdir={workdir}: belongs to the experiment {owner!r}, not to {experiment!r}")
        if different := differences(stored, json.loads(json.dumps(settings or {})), free_fields):
            raise ValueError(f"--workdir={workdir} holds results of other settings: {different}")
    if exclusive and folder.resolve() not in _held:
        _held[folder.resolve()] = take_lock(folder / ".lock")
        # What it holds may have changed until now.
        return claim(workdir, experiment, settings, free_fields=free_fields)
    if marker.exists():
        return folder
    write_text(marker, json.dumps({"experiment": experiment, "settings": settings or {}}, indent=1) + "\n")
    return folder


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
