"""Allowed values of a field. No comparison holds for NaN, so that it is in no range.

All ranges end somewhere: a number of 20 digits is a mistake that would cost memory or time without end.
"""

import re
from collections.abc import Callable
from typing import NamedTuple


class Range(NamedTuple):
    """The description of the allowed values, a test of them, and how an error introduces the description."""

    text: str
    contains: Callable
    verb: str = "allowed are "


def at_least(bound: int, most: int = 10**6) -> Range:
    return Range(f"at least {bound}, at most {most:,}", lambda value: bound <= value <= most, verb="")


def choices(*names: object, or_path: bool = False, any_case: bool = False) -> Range:
    """Some names; with ``or_path`` also an import path, 'module:attribute'; with ``any_case`` in capitals or not."""

    def contains(value) -> bool:
        known = value in names or (any_case and value.lower() in (name.lower() for name in names))
        return known or (or_path and is_import_path(value))

    shown = [str(name) for name in names if name != ""]
    shown += ["or module:attribute"] * or_path + ["or empty"] * ("" in names)
    return Range(", ".join(shown), contains, "allowed is " if len(shown) == 1 else "allowed are ")


def positive_integers(*, least: int, most: int = 2**13) -> Range:
    """A tuple of ``least`` or more of them, each at most ``most``."""

    def contains(values) -> bool:
        return len(values) >= least and all(type(value) is int and 0 < value <= most for value in values)

    count = {0: ", or ()", 1: ""}.get(least, f", {least} or more")
    return Range(f"positive integers up to {most}{count}", contains)


def is_import_path(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[\w.]+:[\w.]+", value) is not None


# Their squares are finite and not 0 in single precision.
positive = Range("numbers from 1e-12 to 1e12", lambda value: 1e-12 <= value <= 1e12)
not_negative = Range("0, and numbers from 1e-12 to 1e12", lambda value: value == 0 or positive.contains(value))
fraction = Range("numbers in [0, 1)", lambda value: 0 <= value < 1)
import_paths = Range("tuples of module:attribute", lambda values: all(map(is_import_path, values)))
unlimited = Range("any", lambda value: True)
