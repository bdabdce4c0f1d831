"""The config of a run that exists, which commands take where none is given: main.py --workdir=W --mode=eval."""

import json
import re
from pathlib import Path

from ml_collections import ConfigDict

from configs.defaults import FIELDS
from configs.fields import flatten

OURS = ("models.published.diffusers:UNet2D", "models.published.edm:Preconditioned", "sde_lib:LadderVP")
"""The code that an exported model may name."""


def get_config(path: str) -> ConfigDict:
    """That in W/config.json, or beside the weights of an exported model, which may be anybody's.

    Raises:
        ValueError: the file cannot be read, or is that of an exported model and names code by an import path.
    """
    try:
        stored = json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {str(error).partition(chr(10))[0]}") from None
    config = config_of(stored, path)
    if (Path(path).parent / "model.safetensors").exists():
        for name, value in flatten(config.to_dict()).items():
            for text in value if isinstance(value, tuple | list) else [value]:
                code = isinstance(text, str) and re.fullmatch("[^/{]*:[^/]*", text) and text not in OURS
                if code and name not in ("label", "training.init_from"):
                    raise ValueError(
                        f"{path}: {name}={text!r} would run code that this project has not; if you trust it, give a "
                        "config of your own that names it"
                    )
    return config


def config_of(stored: object, path: object) -> ConfigDict:
    """A config of what ``to_json`` has written, with the tuples that JSON has not, and the defaults of fields that are
    newer than it, but for those of ``model``, where a field may be left out on purpose; errors name ``path``."""
    if not isinstance(stored, dict):
        raise ValueError(f"{path} is damaged: it holds no object")

    def with_tuples(value: object) -> object:
        if isinstance(value, dict):
            return {name: with_tuples(field) for name, field in value.items()}
        return tuple(value) if isinstance(value, list) else value

    try:
        config = ConfigDict(with_tuples(stored))
    except RecursionError:
        raise ValueError(f"{path} is damaged: it is nested too deeply") from None
    for name, field in FIELDS.items():
        section, _, key = name.rpartition(".")
        part = config.get(section) if section else config
        if section != "model" and isinstance(part, ConfigDict) and key not in part:
            part[key] = field.default
    return config
