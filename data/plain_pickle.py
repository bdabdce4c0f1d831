"""Reading pickles that hold data and nothing else.

A pickle is a program: it calls what it names. Here every name but those that NumPy's arrays are pickled with is
refused, before anything is called, and of those none is NumPy's own: stand-ins take note of data type, shape and bytes,
and the array is made from them when they have been found to fit. What can come out is dictionaries, lists, tuples,
strings, bytes, numbers, booleans, None, and arrays of integers, floating-point numbers or booleans.

Read are the pickles of NumPy 1 and 2 on Python 3, in protocols 3 and 4, which ImageNet-32x32 is published in.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from functools import partial
from typing import Any

import numpy as np

__all__ = ["load_plain_pickle"]

_NUMERIC = re.compile(r"[biuf][1248]|b1")


def load_plain_pickle(path: str | os.PathLike[str]) -> Any:
    """The data in a pickle file; arrays are read-only.

    Raises:
        ValueError: the file is damaged, or would need anything but data to be read.
        OSError: there is no such file, or it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            return _with_arrays(_Unpickler(file).load())
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


class _Array:
    """Stands in for an array, which is made of its state."""

    value: np.ndarray | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DataType) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise pickle.UnpicklingError("an array is not numbers of a shape")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise pickle.UnpicklingError(f"an array cannot have the shape {shape}")
        numpy_dtype = np.dtype(dtype.order + dtype.code)
        if len(data) != math.prod(shape) * numpy_dtype.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} and {numpy_dtype} cannot have {len(data)} bytes")
        self.value = np.frombuffer(data, numpy_dtype).reshape(shape, order="F" if fortran else "C")


_STAND_INS = {
    ("numpy", "dtype"): _DataType,
    ("numpy", "ndarray"): _Array,  # only ever an argument of _reconstruct
    ("numpy.core.multiarray", "_reconstruct"): _Array,  # NumPy 1
    ("numpy._core.multiarray", "_reconstruct"): _Array,  # NumPy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> partial:
        if (module, name) not in _STAND_INS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return partial(_STAND_INS[module, name])  # a fresh one each time: what a pickle does to it ends with it


def _with_arrays(value: Any) -> Any:
    """The data with arrays in place of their stand-ins.

    Raises:
        pickle.UnpicklingError: something other than data came out.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, dict):
        return {_with_arrays(k): _with_arrays(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_with_arrays, value))
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")
