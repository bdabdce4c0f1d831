"""The config of a run that exists, which commands take where none is given: main.py --workdir=W --mode=eval."""

import json
from pathlib import Path

from ml_collections import ConfigDict

from configs.defaults import FIELDS


def get_config(path: str) -> ConfigDict:
    """That in W/config.json.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        stored = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {str(error).partition(chr(10))[0]}") from None
    return config_of(stored, path)


def config_of(stored: object, path: object) -> ConfigDict:
    """A config of what ``to_json`` has written, with the tuples that JSON has not, and the defaults of fields that are
    newer than it, but for those of ``model``, where a field may be left out on purpose; errors name ``path``."""
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no object")

    def with_tuples(value: object) -> object:
        if isinstance(value, dict):
            return {name: with_tuples(field) for name, field in value.items()}
        return tuple(value) if isinstance(value, list) else value

    config = ConfigDict(with_tuples(stored))
    for name, field in FIELDS.items():
        section, _, key = name.rpartition(".")
        if section not in ("", "model") and isinstance(part := config.get(section), ConfigDict) and key not in part:
            part[key] = field.default
    return config
