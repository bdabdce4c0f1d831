"""One way to name things that users may add: a name that the project knows, or an import path."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TypeVar

Entry = TypeVar("Entry")


def resolve(name: str, known: Mapping[str, Entry], field: str, kind: type = object) -> Entry:
    """What ``name`` stands for: an entry of ``known``, or the ``attribute`` of ``module`` for 'module:attribute'.

    Args:
        name: a value of a config field or flag, e.g. 'ncsnpp' or 'my_package.networks:MyUNet'.
        known: the project's own entries.
        field: what the error calls it, e.g. 'model.name'.
        kind: what it must be a subclass of, if it is to be a class. A path may come with somebody's checkpoint: a
            function of another kind would do anything with the values that stand beside it.

    Raises:
        ValueError: neither; the message names the field, the value and what is allowed.
    """
    if name in known:
        return known[name]
    module_name, colon, attribute = str(name).partition(":")
    if not colon:
        raise ValueError(f"{field}={name!r}: allowed are {', '.join(known)}, or module:attribute")
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        where = "; is its folder in PYTHONPATH?" if isinstance(error, ModuleNotFoundError) else ""
        raise ValueError(f"{field}={name!r}: {error}{where}") from error
    if not callable(found):
        raise ValueError(f"{field}={name!r}: is no class or function")
    if kind is not object and not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{field}={name!r}: is no subclass of {kind.__name__}")
    return found
