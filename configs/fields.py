"""Fields of a config: default, meaning and allowed values are declared in one place, and checked from there.

A table is a dictionary from names ('section.field', or 'field') to ``Field``. ``configs.defaults`` has that of image
models; the bridges and the 2-D examples take fields from it and add others. Overrides of a table are dictionaries by
field, {'model.nf': 64}, or by section, {'model': {'nf': 64}}.
"""

from collections.abc import Mapping
from typing import NamedTuple

from ml_collections import ConfigDict

from configs.ranges import Range, unlimited

_KINDS = {bool: "True, False", int: "integers", float: "numbers", str: "text", tuple: "tuples"}


class Field(NamedTuple):
    """A field of a config, whose values have the type of the default."""

    default: object
    meaning: str
    allowed: Range = unlimited


Table = Mapping[str, Field]
Overrides = Mapping[str, object]


def with_defaults(table: Table, defaults: Overrides) -> dict[str, Field]:
    """Some fields of a table, with other defaults."""
    return {name: table[name]._replace(default=default) for name, default in flatten(defaults).items()}


def options(table: Table) -> list[tuple[str, object, str, str]]:
    """(name, default, allowed values, meaning) of every field, for documents."""
    return [
        (name, default, _KINDS[type(default)] if allowed is unlimited else allowed.text, meaning)
        for name, (default, meaning, allowed) in table.items()
    ]


def make_config(table: Table, *overrides: Overrides) -> ConfigDict:
    """A config with the fields of a table, their defaults, and then ``overrides`` one after the other."""
    config = ConfigDict({name.partition(".")[0]: {} for name in table if "." in name})
    for name, field in table.items():
        part, key = _place(config, name)
        part[key] = field.default
    return apply(config, *overrides)


def apply(config: ConfigDict, *overrides: Overrides) -> ConfigDict:
    """Set fields that the config has; None deletes one that a network does not read."""
    for name, value in (item for override in overrides for item in flatten(override).items()):
        part, key = _place(config, name)
        if key not in part:
            raise KeyError(f"{name}: no such field")
        if value is None:
            del part[key]
        else:
            part[key] = value
    return config


def choose(config: ConfigDict, name: str, variants: Mapping[str, Overrides]) -> ConfigDict:
    """Apply the overrides of one of a file's variants, the argument after the colon in ``--config=FILE:NAME``.

    Raises:
        ValueError: there is no such variant.
    """
    if name not in variants:
        raise ValueError(f"config argument {name!r}: allowed are {', '.join(variants) or 'none'}")
    return apply(config, variants[name])


def check_fields(config: ConfigDict, table: Table, kind: str) -> None:
    """Whether a config has the sections of a table, and values in the ranges of those fields that are not deleted.

    Raises:
        ValueError: naming the first field out of range, or saying that this is no config of a ``kind``.
    """
    sections = [name for name, part in config.items() if isinstance(part, ConfigDict)]
    if missing := [name for name in table if "." in name and name.partition(".")[0] not in sections]:
        raise ValueError(f"--config: no config of {kind}: it has no {missing[0]}")
    for name, (default, _, allowed) in table.items():
        part, key = _place(config, name)
        value = part.get(key, default)
        if isinstance(value, ConfigDict):
            raise ValueError(f"{name}: is no section; allowed are {_KINDS[type(default)]}")
        if not isinstance(value, type(default)) or (isinstance(value, bool) and not isinstance(default, bool)):
            raise ValueError(f"{name}={value!r}: allowed are {_KINDS[type(default)]}")
        if key in part and not allowed.contains(value):
            raise ValueError(f"{name}={value!r}: {allowed.verb}{allowed.text}")


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Nested settings as one level of dotted names."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _place(config: ConfigDict, name: str) -> tuple[ConfigDict, str]:
    section, _, key = name.rpartition(".")
    return (config[section] if section else config), key
