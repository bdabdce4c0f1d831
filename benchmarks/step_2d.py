"""A training step of the 2-D examples: U, C, and QC with each estimator, in turn.

python -m benchmarks.step_2d [--rounds=40]
"""

from __future__ import annotations

import importlib
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.measure import conditions, in_turn
from benchmarks.training_step import take
from experiment.command_line import command
from experiment.results import markdown_table
from run_lib import Runtime

ALL = {"training.qc_stride": 1}
VARIANTS: dict[str, dict] = {
    "U": {},
    "C": {},
    "QC, exact, on all points": ALL | {"training.qc_estimator": "exact"},
    "QC, trace, on all points": ALL | {"training.qc_estimator": "trace"},
    "QC, antisymmetric, on all points": ALL,
    "QC, antisymmetric, every second step on all points": ALL | {"training.qc_interval": 2},
    "QC, antisymmetric, on every second point (default)": {},
}


def run(*, device: str = "cpu", rounds: int = 40) -> str:
    """Time pairs of steps, so that a term that is due every second step counts half.

    Args:
        device: auto, cpu or cuda.
        rounds: Rounds; the medians are printed.
    """
    configs, experiment = (importlib.import_module(f"2d_examples.{name}") for name in ("configs", "experiment"))
    torch.set_num_threads(1)
    runtime = Runtime(device)

    variants = {}
    for name, overrides in VARIANTS.items():
        config = configs.get_config(f"gaussian_8-{name.split(',')[0].lower()}")
        config.update_from_flattened_dict(overrides)
        with tempfile.TemporaryDirectory() as folder:  # without a checkpoint
            variants[name] = partial(take, experiment.trainer(config, Path(folder), runtime), 2)
    timed = in_turn(variants, rounds, runtime.torch_device, warm_up=2)
    ms = {name: 1e3 * found.median / 2 for name, found in timed.items()}
    rows = [(name, f"{time:.1f}", f"{time / ms['U']:.2f}") for name, time in ms.items()]
    return f"{conditions(runtime.torch_device)}\n{markdown_table(('variant', 'ms per step', 'relative to U'), rows)}"


if __name__ == "__main__":
    command(run)
