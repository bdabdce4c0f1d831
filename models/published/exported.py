"""A model of ours to share: its moving average, without what training needs.

FOLDER/model.safetensors    the weights; as metadata the step, the images' format and what the data were
FOLDER/config.json          the config
FOLDER/README.md            the card: metrics, units, command, citation
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from checkpoints import CheckpointError, is_count
from configs.stored import get_config
from experiment.files import parse_json, read_json, write_text
from models.published.safetensors import read_metadata, read_safetensors, write_safetensors

WEIGHTS = "model.safetensors"


def read_exported(folder: Path, config: ConfigDict | None) -> tuple[ConfigDict, dict, dict, int] | None:
    """The config that is given, or else its own, record and weights of such a folder, and the step; None if it is none.

    Raises:
        CheckpointError, ValueError: it is, and is damaged.
    """
    path = folder / WEIGHTS
    if not (path.is_file() and (folder / "config.json").is_file()):
        return None
    weights, metadata = read_safetensors(path), read_metadata(path)
    record = {"images": ..., "step": ..., "data": ...}
    for name in record:
        if name not in metadata:
            raise CheckpointError(f"{path}: was not exported from a run of ours: it has no {name}")
        record[name] = parse_json(metadata[name], path)
    if not is_count(step := record.pop("step")):
        raise CheckpointError(f"{path}: its step is {step!r}")
    # What is asked of it may be in another config, which is compared with this one.
    record["config"] = json.dumps(read_json(folder / "config.json"))
    return config or get_config(str(folder / "config.json")), record, weights, step


def write_exported(folder: Path, state: Mapping, card: str) -> None:
    """Write the moving average of a checkpoint of ours, and a card."""
    record = state["record"]
    metadata = {name: json.dumps(record[name], sort_keys=True) for name in ("images", "data")}
    config = json.dumps(json.loads(record["config"]), indent=1, sort_keys=True)
    write_text(folder / "config.json", config + "\n")
    write_text(folder / "README.md", card)
    write_safetensors(folder / WEIGHTS, state["ema"]["model"], metadata | {"step": str(state["step"])})


def model_card(name: str, state: Mapping, metrics: Mapping) -> str:
    """What the folder of a model says of it."""
    config, images = json.loads(state["record"]["config"]), state["record"]["images"]
    training, shape = config["training"], "×".join(map(str, images["image_shape"]))
    if images["num_levels"] is None:
        takes = "numbers as `images` in the metadata of `model.safetensors` normalises them"
        likelihood = "nats per dimension of the data in their own units"
    else:
        units = "[−1, 1]" if images["centered"] else "[0, 1]"
        takes = f"images in {units}, of {images['num_levels']} grey levels"
        likelihood = "bits/dim of uniformly dequantised images"
    if "condition" in images:
        takes += f", with conditions of shape {'×'.join(map(str, images['condition']['image_shape']))}"
    kind = "QC" if training["qc_weight"] else "C" if config["model"]["parameterization"] == "conservative" else "U"
    measured = [name for name, value in metrics.items() if isinstance(value, int | float) and name != "checkpoint_step"]
    rows = "".join(f"| {name} | {metrics[name]:.6g} |\n" for name in measured)
    table = f"| metric | value |\n| --- | --- |\n{rows}" if rows else "It has not been evaluated yet.\n"
    return f"""# {name}

A score-based generative model of {config["data"]["dataset"]}, {shape} (channels first), {kind}
in the terms of the paper below, after {state["step"]} steps: the moving average of its weights.

It takes {takes},
and gives the score of {training["sde"]} in their units. Likelihoods are in {likelihood}; Asym is in units of score²
per data².

{table}
```
python main.py --mode=sample --checkpoint=FOLDER --workdir=runs/samples
```

```python
from run_lib import load

score = load("FOLDER")
```

Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models", ICML 2023.
"""
