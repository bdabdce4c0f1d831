"""A training step of the 2-D examples: U, C, and QC with each estimator, side by side.

python -m benchmarks.step_2d [--device=cpu] [--repeats=40]
"""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path

from absl import app, flags

from experiment.command_line import parse_flags

VARIANTS = {
    "U": ("u", {}),
    "C": ("c", {}),
    "QC, exact, on all points": ("qc", {"training.qc_estimator": "exact", "training.qc_stride": 1}),
    "QC, trace, on all points": ("qc", {"training.qc_estimator": "trace", "training.qc_stride": 1}),
    "QC, antisymmetric, on all points": ("qc", {"training.qc_stride": 1}),
    "QC, antisymmetric, every second step on all points": ("qc", {"training.qc_interval": 2, "training.qc_stride": 1}),
    "QC, antisymmetric, on every second point (default)": ("qc", {}),
}


def main(argv: list[str]) -> None:
    repeats = flags.FLAGS.repeats
    if repeats < 1:
        sys.exit(f"error: --repeats={repeats}: at least 1")

    import torch
    from tqdm import trange

    from benchmarks.clock import clock_of
    from experiment.runtime import Runtime

    configs = importlib.import_module("2d_examples.configs")
    experiment = importlib.import_module("2d_examples.experiment")
    torch.set_num_threads(1)
    try:
        runtime = Runtime(flags.FLAGS.device)
        device = runtime.torch_device
    except ValueError as error:
        sys.exit(f"error: {error}")

    clock, kind = clock_of(device)
    trainers = {}
    for name, (model, overrides) in VARIANTS.items():
        config = configs.get_config(f"gaussian_8-{model}")
        config.update_from_flattened_dict(overrides)
        trainers[name] = experiment.trainer(config, Path(), runtime)

    def take(name: str) -> float:
        started = clock()
        trainers[name].train_step()
        return 1e3 * (clock() - started)

    # A sample is a pair of consecutive steps, so that a term that is due every second step counts half.
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in trange(-2, repeats, unit="round"):
        for name in VARIANTS:
            pair = (take(name) + take(name)) / 2
            if repeat >= 0:
                times[name].append(pair)
    reference = statistics.median(times["U"])
    print(f"batch 5000, one thread, {device}, torch {torch.__version__}, median of {repeats}, {kind}\n")
    print("| variant | ms per step | relative to U |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {statistics.median(values):.1f} | {statistics.median(values) / reference:.2f} |")


if __name__ == "__main__":
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_integer("repeats", 40, "Rounds; the medians are printed.")
    app.run(main, flags_parser=parse_flags)
