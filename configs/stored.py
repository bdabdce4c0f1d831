"""The config of a run that exists, which commands take where none is given: main.py --workdir=W --mode=eval."""

import json
from pathlib import Path

from ml_collections import ConfigDict


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
    """A config of what ``to_json`` has written, with the tuples that JSON has not; errors name ``path``."""
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no object")

    def with_tuples(value: object) -> object:
        if isinstance(value, dict):
            return {name: with_tuples(field) for name, field in value.items()}
        return tuple(value) if isinstance(value, list) else value

    return ConfigDict(with_tuples(stored))
