"""Reading pickles that hold data and nothing else.

A pickle is a program: it calls what it names. Here every name but those below is refused, before anything is called,
and of those that NumPy's arrays are pickled with none is NumPy's own: stand-ins take note of data type, shape and
bytes, and the array is made from them when they have been found to fit. What can come out is dictionaries, lists,
tuples, strings, bytes, numbers, booleans, None, and arrays and scalars of integers, floating-point numbers or booleans.

Known are the pickles of NumPy 1 and 2 on Python 2 and 3, in all protocols: Python 2's strings come out as Latin-1.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["load_plain_pickle"]

_NUMERIC = re.compile(r"[biuf][1248]|b1|\?")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """The data in a pickle file; arrays are read-only.

    Raises:
        ValueError: the file is damaged, or would need anything but data to be read.
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _without_stand_ins(_Unpickler(file, encoding="latin1").load())
        except OSError:
            raise
        except Exception as error:  # a damaged pickle fails in whatever it says by accident
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path} is not a pickle of plain data: {reason}") from error


class _DataType:
    """Stands in for numpy.dtype."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise pickle.UnpicklingError(f"arrays of {code!r} are not numbers")
        self.code, self.order = code, "|"

    def __setstate__(self, state: Any) -> None:
        order, subarray, names, fields = state[1:5]
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise pickle.UnpicklingError("arrays of records are not numbers")
        self.order = order

    def array(self, data: Any, shape: Any, fortran: bool) -> np.ndarray:
        dtype = np.dtype(self.order + self.code)
        data = data.encode("latin1") if isinstance(data, str) else data
        plain = isinstance(data, bytes | bytearray) and isinstance(shape, tuple)
        if not plain or not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError("an array is not bytes of a shape")
        if len(data) != math.prod(shape) * dtype.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} and {dtype} cannot have {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


class _Array:
    """Stands in for an array of which only the kind is known, until its state comes."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        self.value = _as_data_type(dtype).array(data, shape, bool(fortran))


def _as_data_type(value: Any) -> _DataType:
    if not isinstance(value, _DataType):
        raise pickle.UnpicklingError("an array without a data type")
    return value


def _scalar(dtype: Any, data: Any) -> Any:
    return _as_data_type(dtype).array(data, (), False)[()]


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    return _as_data_type(dtype).array(data, shape, order == "F")


def _encode(text: Any, encoding: Any) -> bytes:
    # How Python 3 writes bytes in the protocols of Python 2.
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"a string in {encoding!r} instead of Latin-1")
    return text.encode("latin1")


def _no_bytes() -> bytes:
    return b""


class _Name:
    """What a permitted name stands for. A fresh one each time: whatever a pickle does to it ends with it."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> Any:
        return self._call(*arguments)


_NAMES: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _DataType,
    ("numpy", "ndarray"): lambda *_: _Array(),  # only ever an argument of _reconstruct
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,  # the same of none at all
}
for _package in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _NAMES[f"{_package}.multiarray", "_reconstruct"] = lambda *_: _Array()
    _NAMES[f"{_package}.multiarray", "scalar"] = _scalar
    _NAMES[f"{_package}.numeric", "_frombuffer"] = _from_buffer


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> _Name:
        if (module, name) not in _NAMES:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _Name(_NAMES[module, name])


def _without_stand_ins(value: Any) -> Any:
    """The data with arrays in place of stand-ins.

    Raises:
        pickle.UnpicklingError: something other than data came out.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, dict):
        return {_without_stand_ins(k): _without_stand_ins(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_without_stand_ins, value))
    if value is None or isinstance(value, bool | int | float | str | bytes | np.ndarray | np.generic):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
