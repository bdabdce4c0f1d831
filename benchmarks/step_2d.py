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
    from run_setup import Runtime
    from torch import nn
    from tqdm import trange

    from benchmarks.clock import clock_of

    configs = importlib.import_module("2d_examples.configs")
    experiment = importlib.import_module("2d_examples.experiment")
    torch.set_num_threads(1)
    try:
        device = Runtime(flags.FLAGS.device).accelerator().device
    except ValueError as error:
        sys.exit(f"error: {error}")

    clock, kind = clock_of(device)
    steps = {}
    for name, (model, overrides) in VARIANTS.items():
        config = configs.get_config(f"gaussian_8-{model}")
        config.update_from_flattened_dict(overrides)
        run = experiment.Run(config, Path(), device)
        optimizer = torch.optim.Adam(run.model.parameters(), lr=config.optim.lr, fused=True)
        steps[name] = (run, optimizer, run.points("training points", config.training.batch_size))

    def take(name: str, step: int) -> float:
        run, optimizer, x0 = steps[name]
        started = clock()
        optimizer.zero_grad()
        run.objective(x0, run.generator("train", step), step=step)["loss"].backward()
        nn.utils.clip_grad_norm_(run.model.parameters(), run.config.optim.grad_clip)
        optimizer.step()
        return 1e3 * (clock() - started)

    # A sample is a pair of consecutive steps, so that a term that is due every second step counts half.
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for repeat in trange(-2, repeats, unit="round"):
        for name in VARIANTS:
            pair = (take(name, 2 * repeat) + take(name, 2 * repeat + 1)) / 2
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
