"""Reading pickles that hold data and nothing else.

A pickle is a program: it calls what it names. Here it is not run. Its instructions are read one by one, and those are
understood that build dictionaries, lists, tuples, strings, bytes, numbers, booleans, None, and NumPy's arrays of
integers, floating-point numbers or booleans. An array is made when its data type, shape and bytes have been found to
fit. A dictionary, list or tuple may stand in one place only, so that what comes out is no larger than the file allows.

Read are the pickles of NumPy 1 and 2 on Python 3, in protocols 3 and 4, which ImageNet-32x32 is published in.
"""

from __future__ import annotations

import math
import os
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiment.files import first_line

__all__ = ["load_plain_pickle"]

_NUMERIC = re.compile(r"[biuf][1248]|b1")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_SET": set, "EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_TAKEN = {
    "TUPLE": 0,
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "APPENDS": 0,
    "APPEND": 1,
    "ADDITEMS": 0,
    "SETITEMS": 0,
    "SETITEM": 2,
}
"""How many values an instruction takes from the stack; 0: all above the mark."""
_VALUE = re.compile(r"(SHORT_)?BIN(INT[12]?|FLOAT|BYTES8?|UNICODE8?)|LONG[14]")
_VALUES = {opcode.name for opcode in pickletools.opcodes if _VALUE.fullmatch(opcode.name)}


def load_plain_pickle(path: str | os.PathLike[str], stand_ins: Mapping[str, Callable[..., Any]] | None = None) -> Any:
    """The data in a pickle file; arrays are read-only.

    Args:
        path: the file.
        stand_ins: of a file that holds objects: what is called in place of what it names, 'module name', and gives what
            stands for the object. Sets come out empty.

    Raises:
        ValueError: the file is damaged, or would need anything but data to be read.
        OSError: there is no such file, or it cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        return _data(_build(content, _CALLED)) if stand_ins is None else _build(content, stand_ins, shared=True)
    except Exception as error:  # a damaged pickle fails in whatever it says by accident
        raise ValueError(f"{path} is not a pickle of plain data: {first_line(error)}") from error


class _DataType:
    """Stands for numpy.dtype(code)."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not _NUMERIC.fullmatch(code):
            raise ValueError(f"arrays of {code!r} are not numbers")
        self.code, self.order = code, "|"

    def set_state(self, state: Any) -> None:
        order, subarray, names, fields = state[1:5]
        if order not in ("<", ">", "|", "=") or (subarray, names, fields) != (None, None, None):
            raise ValueError("arrays of records are not numbers")
        self.order = order


class _Array:
    """Stands for an array, which is made of its state."""

    value: np.ndarray | None = None

    def __init__(self, *_: Any) -> None:
        pass

    def set_state(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _DataType) or not isinstance(data, bytes) or not isinstance(shape, tuple):
            raise ValueError("an array is not numbers of a shape")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"an array cannot have the shape {shape}")
        numpy_dtype = np.dtype(dtype.order + dtype.code)
        if len(data) != math.prod(shape) * numpy_dtype.itemsize:
            raise ValueError(f"an array of shape {shape} and {numpy_dtype} cannot have {len(data)} bytes")
        self.value = np.frombuffer(data, numpy_dtype).reshape(shape, order="F" if fortran else "C")


_CALLED = {
    "numpy dtype": _DataType,
    "numpy ndarray": _Array,  # only ever an argument of _reconstruct
    "numpy.core.multiarray _reconstruct": _Array,  # NumPy 1
    "numpy._core.multiarray _reconstruct": _Array,  # NumPy 2
}


def _build(content: bytes, called: Mapping[str, Callable[..., Any]], shared: bool = False) -> Any:
    """What the instructions build, with stand-ins for objects; ``shared``: one may stand in several places."""
    stack: list[Any] = []
    below: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    for opcode, argument, _ in pickletools.genops(content):
        name = opcode.name
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
            if isinstance(stack[-1], dict | list | tuple) and not shared:
                raise ValueError(f"a {type(stack[-1]).__name__} stands in it twice")
        elif name == "MARK":
            below.append(stack)
            stack = []
        elif name in _TAKEN:
            if count := _TAKEN[name]:
                items = stack[-count:]
                del stack[-count:]
            else:
                items, stack = stack, below.pop()
            if name == "ADDITEMS":
                continue
            if name.startswith("TUPLE"):
                stack.append(tuple(items))
            elif name.startswith("APPEND"):
                stack[-1].extend(items)
            elif all(isinstance(key, str) for key in items[::2]):
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            else:
                raise ValueError("a dictionary has other keys than strings")
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                argument = f"{stack.pop(-2)} {stack.pop()}"
            if argument not in called:
                raise ValueError(f"it asks for {argument.replace(' ', '.')}")
            stack.append(called[argument])
        elif name in ("REDUCE", "NEWOBJ"):
            function, arguments = stack[-2:]
            if all(function is not known for known in called.values()):
                raise ValueError("it calls what it has made")
            stack[-2:] = [function(*arguments)]
        elif name == "BUILD":
            stack[-2].set_state(stack.pop())
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise ValueError(f"it has the instruction {name}")


def _data(value: Any) -> Any:
    """The data with arrays in place of their stand-ins.

    Raises:
        ValueError: something other than data came out.
    """
    if isinstance(value, _Array) and value.value is not None:
        return value.value
    if isinstance(value, dict):
        return {key: _data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map(_data, value))
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    raise ValueError(f"it holds a {type(value).__name__}")
