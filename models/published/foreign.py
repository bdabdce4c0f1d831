"""Models of other projects as checkpoints of ours: what a config says of them, and their weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from torch import Tensor

from checkpoints import CHECKPOINT_VERSION
from configs.checks import item_shape
from configs.defaults import base_config
from configs.ranges import is_import_path
from data.format import DataFormat
from models.published import diffusers, given
from models.published.edm import read_edm
from models.published.exported import read_exported


class Foreign(NamedTuple):
    """A published model: where it was found, fields of its config, and what reads its weights, under the names of the
    network that ``model.name`` makes of these fields."""

    path: Path
    fields: Mapping[str, object]
    weights: Callable[[], Mapping[str, Tensor]]

    def config(self, given: ConfigDict | None) -> ConfigDict:
        """The given config with what this model says of itself; without one the usual, and its usual sampler."""
        config = base_config() if given is None else ConfigDict(given.to_dict())
        with config.unlocked():
            for name, value in {"model.parameterization": "unconstrained", **self.fields}.items():
                section, _, key = name.partition(".")
                if given is None or section != "sampling":
                    config[section][key] = value
        return config

    def state(self, config: ConfigDict | None) -> dict:
        """What ``read_checkpoint`` would find of it, if it were ours; the config, see ``config``, has what the model
        does not say of itself."""
        config = self.config(config)
        data = config.data
        images = DataFormat(
            item_shape(data),
            num_levels=256,
            num_classes=None,
            centered=data.centered,
            dequantized=data.uniform_dequantization,
        )
        weights = {f"network.{name}": tensor for name, tensor in self.weights().items()}
        return whole_state(weights, {"config": config.to_json(), "images": images.as_dict(), "data": None})


class Exported(NamedTuple):
    """A model of ours that was exported, with the same methods."""

    path: Path
    own_config: ConfigDict
    own_state: dict

    def config(self, given: ConfigDict | None) -> ConfigDict:
        return self.own_config if given is None else given

    def state(self, config: ConfigDict | None) -> dict:
        return self.own_state


def whole_state(weights: Mapping[str, Tensor], record: Mapping[str, object], step: int = 0) -> dict:
    """A checkpoint of nothing but weights, which are also their average."""
    return {
        "version": CHECKPOINT_VERSION,
        "step": step,
        "model": weights,
        "ema": {"num_updates": step, "model": weights},
        "optimizer": None,
        "scaler": None,
        "sums": {},
        "log_size": 0,
        "hooks_done": True,
        "record": record,
    }


def read_foreign(path: str | Path) -> Foreign | Exported | None:
    """The published model at a path: a folder that ``exported`` has written; a folder of diffusers, or its name on the
    hub after ``diffusers:``; a ``.pkl`` of EDM; a ``module:attribute``. None if it is nothing of the kind.

    Raises:
        CheckpointError, ValueError: it is, and cannot be read.
    """
    if is_import_path(str(path)) and not str(path).startswith(diffusers.PREFIX) and not Path(path).exists():
        return Foreign(Path(path), given.fields(str(path)), given.Given(str(path)).state_dict)
    if str(path).endswith(".pkl") and Path(path).is_file():
        fields, weights = read_edm(Path(path))
        return Foreign(Path(path), fields, lambda: weights)
    if (found := read_exported(Path(path))) is not None:
        config, record, weights, step = found
        return Exported(Path(path), config, whole_state(weights, record, step))
    if (folders := diffusers.find(path)) is not None:
        return Foreign(folders[0], diffusers.fields(*folders), partial(diffusers.weights, folders[0]))
    return None
