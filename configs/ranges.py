"""Allowed values of a field. No comparison holds for NaN, so that it is in no range."""

import math
import re
from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """The description of the allowed values, a test of them, and how an error introduces the description."""

    text: str
    contains: Callable
    verb: str = "allowed are "


def at_least(bound: float) -> Range:
    return Range(f"at least {bound:g}", lambda value: bound <= value < math.inf, verb="")


def choices(*names: object, or_path: bool = False, any_case: bool = False) -> Range:
    """Some names; with ``or_path`` also an import path, 'module:attribute'; with ``any_case`` in capitals or not."""

    def contains(value) -> bool:
        known = value in names or (any_case and value.lower() in (name.lower() for name in names))
        return known or (or_path and is_import_path(value))

    shown = [str(name) for name in names if name != ""]
    shown += ["or module:attribute"] * or_path + ["or empty"] * ("" in names)
    return Range(", ".join(shown), contains, "allowed is " if len(shown) == 1 else "allowed are ")


def positive_integers(*, least: int) -> Range:
    """A tuple of ``least`` or more of them."""

    def contains(values) -> bool:
        return len(values) >= least and all(type(value) is int and value > 0 for value in values)

    return Range("positive integers" + (", or ()" if least == 0 else ""), contains)


def is_import_path(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value) is not None


positive = Range("positive numbers", lambda value: 0 < value < math.inf)
not_negative = Range("numbers from 0 on", lambda value: 0 <= value < math.inf)
fraction = Range("numbers in [0, 1)", lambda value: 0 <= value < 1)
import_paths = Range("tuples of module:attribute", lambda values: all(map(is_import_path, values)))
unlimited = Range("any", lambda value: True)
