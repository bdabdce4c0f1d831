"""Arrays of numbers as splits: in files that may be larger than memory, and whatever else can be indexed.

*Numbers* are floating-point, or levels: unsigned integers of 8 or 16 bits, or any others of which ``data.num_levels``
says how many there are. Complex numbers are two channels, their real and their imaginary parts.
"""

from __future__ import annotations

import hashlib
import math
import os
import struct
import weakref
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.files import first_line, read_arrays

__all__ = ["ArraySplit", "ConditionSplit", "DatasetSplit", "HuggingFaceSplit", "read_conditions", "read_halves"]

_FINGERPRINT_ITEMS = 1000


class ArraySplit:
    """A split of anything that has a length and, under an index, arrays; attributes as in ``data.sets.Split``.

    The fingerprint is a hash of at most 1000 evenly spaced items.

    Args:
        name: the set and the half.
        items: ``items[i]`` is an array, a tensor or a picture (PIL).
        labels: integers (N,), or None.
        shape: of an item, with the channels first, which one of a single channel may lack; None: that of the first.
        num_levels: of integers; 0: as many as 8 or 16 bits have.
        num_classes: number of classes, None if and only if there are no labels.
        conditions: what a network is told of each item, see ``ConditionSplit``.

    Raises:
        ValueError: items or labels of another type or shape; from ``batch`` also numbers that are not finite, and
            levels that are none.
    """

    def __init__(
        self,
        name: str,
        items: object,
        labels: Sequence[int] | None = None,
        *,
        shape: Sequence[int] | None = None,
        num_levels: int = 0,
        num_classes: int | None = None,
        conditions: object = None,
    ) -> None:
        count = _number_of(name, items)
        self.name, self.items, self.num_classes = name, items, num_classes
        self.labels = None if labels is None else np.asarray(labels)
        if self.labels is not None and (self.labels.shape != (len(items),) or self.labels.dtype.kind not in "ui"):
            raise ValueError(
                f"{name}: labels must be integers of shape {(len(items),)}, not {self.labels.dtype} of shape "
                f"{self.labels.shape}"
            )
        if not count:
            raise ValueError(f"{name} holds no items")
        first = _channels_first(self._item(0)[0])
        self.num_levels = _levels(name, first.dtype, num_levels)
        self.shape = tuple(shape or (_parts(first)[0] if first.dtype.kind == "c" else first).shape)
        digest = hashlib.blake2b(repr((self.shape, self.num_levels, num_classes, len(items))).encode(), digest_size=8)
        count = min(len(items), _FINGERPRINT_ITEMS)
        for i in range(count):
            values, label = self._item(i * len(items) // count)
            digest.update(repr(int(label)).encode() + np.ascontiguousarray(_channels_first(values)).tobytes())
        if self.labels is not None:
            digest.update(self.labels.astype("<i8").tobytes())
        self.conditions = None
        if conditions is not None:
            self.conditions = ConditionSplit(f"{name}-conditions", conditions, len(self.shape))
            digest.update(self.conditions.fingerprint.encode())
        self.fingerprint = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.items)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64).tolist()
        items = [self._item(i) for i in chosen]
        values = np.stack([self._checked(i, values) for i, (values, _) in zip(chosen, items, strict=True)])
        labels = torch.tensor([int(label) for _, label in items])
        for i, label in zip(chosen, labels.tolist(), strict=True):
            if not 0 <= label < (self.num_classes or 1):
                raise ValueError(f"{self.name}: item {i} has the label {label}, not 0 to {(self.num_classes or 1) - 1}")
        return torch.from_numpy(values), labels

    def read_all(self, progress: Callable[[int], object] = lambda count: None) -> None:
        """Read every item, before there is work that a bad one could stop; ``progress`` is told how many more are done.

        Raises:
            ValueError: see ``batch``.
        """
        for start in range(0, len(self), 256):
            part = range(start, min(start + 256, len(self)))
            self.batch(part)
            progress(len(part))

    def _item(self, i: int) -> tuple[object, int]:
        """Array and label."""
        return self.items[i], 0 if self.labels is None else self.labels[i]

    def _checked(self, i: int, values: object) -> np.ndarray:
        """Item ``i`` in the shape and type of all."""
        values = _channels_first(values)
        dtype, wanted = values.dtype, "levels" if self.num_levels else "floating-point numbers"
        if (dtype.kind in "ui") != bool(self.num_levels) or dtype.kind not in "uifc":
            raise ValueError(f"{self.name}: item {i} is {dtype}, others are {wanted}")
        fitting = next((array for array in _layouts(values) if array.shape == self.shape), None)
        if fitting is None:
            complex_too = f" ({dtype})" if dtype.kind == "c" else ""
            raise ValueError(f"data.shape={self.shape}, but item {i} of {self.name} is {values.shape}{complex_too}")
        if self.num_levels:
            if fitting.min() < 0 or fitting.max() >= self.num_levels:
                worst = fitting.min() if fitting.min() < 0 else fitting.max()
                raise ValueError(f"{self.name}: item {i} has the level {worst}, not 0 to {self.num_levels - 1}")
            return fitting.astype(np.uint8 if self.num_levels <= 256 else np.int32)
        if not np.isfinite(fitting).all():
            raise ValueError(f"{self.name}: item {i} has values that are not finite")
        return fitting.astype(np.float32 if fitting.itemsize <= 4 else np.float64)


class ConditionSplit(ArraySplit):
    """What a network is told of the items of a split, one by one: arrays of their shape, but for the number of
    channels. Integers and truth values are numbers like others.

    Args:
        name: see ``ArraySplit``.
        items: ``items[i]`` is an array of such a shape, or without the axis of a single channel.
        axes: number of axes of an item of the data, that of the channels included.
    """

    def __init__(self, name: str, items: object, axes: int) -> None:
        self.items, shape = items, None
        if _number_of(name, items):
            first = self._item(0)[0]
            shape = next((array.shape for array in _layouts(first) if array.ndim == axes), first.shape)
        super().__init__(name, items, shape=shape)

    def _item(self, i: int) -> tuple[object, int]:
        values = _channels_first(self.items[i])
        whole = values.dtype.kind in "uib"
        return values.astype(np.float32 if values.itemsize <= 2 else np.float64) if whole else values, 0


class DatasetSplit(ArraySplit):
    """The same of a ``torch.utils.data.Dataset``, whose items are arrays or, if there are classes, (array, label)."""

    def _item(self, i: int) -> tuple[object, int]:
        item = self.items[i]
        values = item[0] if isinstance(item, tuple | list) else item
        return values, item[1] if self.num_classes else 0


class HuggingFaceSplit(ArraySplit):
    """The same of a Hugging Face data set, or of any sequence of dictionaries.

    Args:
        column, label_column: the keys of array and label.
    """

    def __init__(self, name: str, items: object, *, column: str, label_column: str = "", **options) -> None:
        self.column, self.label_column = column, label_column
        super().__init__(name, items, **options)

    def _item(self, i: int) -> tuple[object, int]:
        row = self.items[i]
        if missing := [key for key in (self.column, self.label_column) if key and key not in row]:
            raise ValueError(f"{self.name}: no column {missing[0]!r}; it has {', '.join(row)}")
        return row[self.column], row[self.label_column] if self.label_column else 0


def _channels_first(values: object) -> np.ndarray:
    """An array; of a picture, whose channels come last, with the channels first."""
    array = np.asarray(values)
    return np.moveaxis(array, -1, 0) if hasattr(values, "getbands") and array.ndim == 3 else array


def _parts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary parts of complex numbers (...): as two channels, or as twice as many channels."""
    pair = values.real, values.imag
    return np.stack(pair), np.concatenate([np.atleast_1d(part) for part in pair])


def _number_of(name: str, items: object) -> int:
    try:
        return len(items)
    except TypeError:  # numpy and h5py have single numbers as arrays
        raise ValueError(f"{name} is a single {type(items).__name__}, not a number of items") from None


def _layouts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The forms that an array may have as an item."""
    return _parts(values) if values.dtype.kind == "c" else (values, values[None])


def _levels(name: str, dtype: np.dtype, num_levels: int) -> int | None:
    if dtype.kind in "fc":
        if num_levels:
            raise ValueError(f"data.num_levels={num_levels}: {name} has floating-point numbers ({dtype}), not levels")
        return None
    if dtype.kind in "ui" and num_levels:
        return num_levels
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 256**dtype.itemsize
    raise ValueError(
        f"{name} is {dtype}: allowed are floating-point and complex numbers, unsigned integers of 8 or 16 bits, and "
        "other integers from 0 with data.num_levels"
    )


# ------------------------------------------------------------------------------------------------------------ files


class _Rows:
    """The rows of an .npy, which may lie uncompressed in an .npz, each read when it is asked for.

    Read and not mapped: neither the memory that a process may address limits the size, nor can a file that has become
    shorter kill it.
    """

    def __init__(self, path: Path, offset: int = 0) -> None:
        if not path.is_file():
            raise ValueError(f"{path.name} is no regular file")  # a pipe would be waited for
        with open(path, "rb") as stream:
            stream.seek(offset)
            version = np.lib.format.read_magic(stream)
            old = version == (1, 0)
            read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
            shape, fortran, self.dtype = read_header(stream)
            if not shape:
                raise ValueError("it holds a single number where items are to be")
            (count, *self.shape), self.start = shape, stream.tell()
            self.count = count
            self.size = math.prod(self.shape) * self.dtype.itemsize
            if self.dtype.hasobject:
                raise ValueError("it holds objects, which are pickled (allow_pickle): only arrays of numbers are read")
            if min(shape) < 0 or len(shape) > 32 or not self.size:  # 32: most that numpy has
                raise ValueError(f"{self.dtype} of shape {str(shape)[:80]} are no items")
            if fortran and self.shape:
                raise ValueError("its order is that of Fortran; save it with numpy.ascontiguousarray")
            if self.start + count * self.size > os.fstat(stream.fileno()).st_size:
                raise ValueError("it is shorter than its header says")
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> np.ndarray:
        if not 0 <= i < self.count:
            raise IndexError(i)
        data = os.pread(self.descriptor, self.size, self.start + i * self.size)
        return np.frombuffer(data, self.dtype).reshape(self.shape)


def read_halves(path: Path, *, shape: Sequence[int], num_levels: int = 0, **_) -> tuple[ArraySplit, ArraySplit]:
    """Training and test arrays ``train`` and ``test``, (N, C, ...), if there are labels ``train_labels`` and
    ``test_labels``, integers (N,) from 0, and if there are conditions ``train_conditions`` and ``test_conditions``: in
    an .npz or HDF5 file, or in a folder of .npy files of these names.

    Raises:
        ValueError: a file that is missing, damaged or of another kind; an array that is missing.
    """
    try:
        arrays = _open(path)
    except Exception as error:  # numpy, zipfile and h5py raise a dozen unrelated types on damaged files
        raise ValueError(f"data.path={path}: {first_line(error)}") from error
    has_labels, has_conditions = (
        any(f"{half}_{what}" in arrays for half in ("train", "test")) for what in ("labels", "conditions")
    )
    wanted = ["train", "test", *(["train_labels", "test_labels"] if has_labels else [])]
    wanted += ["train_conditions", "test_conditions"] if has_conditions else []
    if missing := [name for name in wanted if name not in arrays]:
        raise ValueError(f"data.path={path} lacks {', '.join(missing)} (it has {', '.join(arrays) or 'nothing'})")
    labels: dict[str, np.ndarray | None] = {"train": None, "test": None}
    if has_labels:
        for half in labels:
            rows = arrays[f"{half}_labels"]
            labels[half] = np.array([rows[i] for i in range(len(rows))])
            if labels[half].dtype.kind not in "ui":
                raise ValueError(f"data.path={path}: {half}_labels must be integers from 0, not {labels[half].dtype}")
    num_classes = 1 + max(int(array.max(initial=0)) for array in labels.values()) if has_labels else None
    options = dict(shape=shape, num_levels=num_levels, num_classes=num_classes)
    train, test = (
        ArraySplit(
            f"{path.stem}-{half}", arrays[half], labels[half], conditions=arrays.get(f"{half}_conditions"), **options
        )
        for half in labels
    )
    return train, test


def read_conditions(path: Path, axes: int) -> ConditionSplit:
    """Conditions for samples: those of an .npy, or the ``test_conditions`` of what ``read_halves`` reads.

    Raises:
        ValueError: as there.
    """
    given, name = f"sampling.conditions_path={path}", "test_conditions"
    try:
        arrays = {name: _Rows(path)} if path.suffix == ".npy" and path.is_file() else _open(path)
    except Exception as error:
        raise ValueError(f"{given}: {first_line(error)}") from error
    if name not in arrays:
        raise ValueError(f"{given} lacks {name} (it has {', '.join(arrays) or 'nothing'})")
    return ConditionSplit(given, arrays[name], axes)


def _open(path: Path) -> Mapping[str, object]:
    """The arrays of a file or folder by name, opened and not yet read."""
    if path.is_dir():
        return {file.stem: _Rows(file) for file in sorted(path.glob("*.npy"))}
    if not path.is_file():
        raise ValueError("there is no such file or folder")
    if path.suffix in (".h5", ".hdf5"):
        try:
            import h5py
        except ImportError:
            raise ValueError("to read HDF5 h5py is needed, which is not installed: pip install h5py") from None
        file = h5py.File(path, "r")
        return {name: array for name in file if isinstance(array := file[name], h5py.Dataset)}
    if path.suffix != ".npz":
        raise ValueError("read are .npz, .h5 and .hdf5 files, and folders with train.npy and test.npy")
    with zipfile.ZipFile(path) as archive, open(path, "rb") as stream:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            return read_arrays(path)  # as a whole, into memory
        rows = {}
        for member in archive.infolist():
            stream.seek(member.header_offset + 26)
            lengths = struct.unpack("<HH", stream.read(4))  # of the name and of what follows it
            rows[member.filename.removesuffix(".npy")] = _Rows(path, member.header_offset + 30 + sum(lengths))
        return rows
