"""Models of other projects as checkpoints of ours: what a config says of them, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

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


def read_published(path: str | Path, config: ConfigDict | None) -> tuple[tuple[dict, Path], ConfigDict] | None:
    """The model of another project at a path, as what ``read_checkpoint`` would find of it if it were ours, and where;
    and the config with what the model says of itself, without one the usual and its usual sampler. None if there is no
    such model.

    A folder that ``exported`` has written; a folder of diffusers, or its name on the hub after ``diffusers:``; a
    ``.pkl`` of EDM; a ``module:attribute``.

    Raises:
        CheckpointError, ValueError: there is one that cannot be read.
    """
    if is_import_path(str(path)) and not str(path).startswith(diffusers.PREFIX) and not Path(path).exists():
        fields, weights = given.fields(str(path)), given.Given(str(path)).state_dict()
    elif str(path).endswith(".pkl") and Path(path).is_file():
        fields, weights = read_edm(Path(path))
    elif (exported := read_exported(Path(path), config)) is not None:
        config, record, weights, step = exported
        return (whole_state(weights, record, step), Path(path)), config
    elif (folders := diffusers.find(path)) is not None:
        path = folders[0]
        fields, weights = diffusers.fields(*folders), diffusers.weights(path)
    else:
        return None
    if config is not None:  # with the sampler that it asks for
        fields = {name: value for name, value in fields.items() if not name.startswith("sampling.")}
    config = base_config() if config is None else ConfigDict(config.to_dict())
    with config.unlocked():
        for name, value in {"model.parameterization": "unconstrained", **fields}.items():
            section, _, key = name.partition(".")
            config[section][key] = value
    num_classes = fields.get("model.num_classes", 0)
    if num_classes and config.training.label_dropout and "training.label_dropout" not in fields:
        num_classes = config.model.num_classes = num_classes - 1  # what it has learned last stands for none
    if num_classes and not config.training.label_dropout and not config.sampling.condition:
        config.sampling.condition = "class_free"  # of each class in turn, for the network has no other score
    data = config.data
    images = DataFormat(
        item_shape(data),
        num_levels=256,
        num_classes=num_classes or None,
        centered=data.centered,
        dequantized=data.uniform_dequantization,
    )
    record = {"config": config.to_json(), "images": images.as_dict(), "data": None}
    return (whole_state({f"network.{name}": t for name, t in weights.items()}, record), Path(path)), config
