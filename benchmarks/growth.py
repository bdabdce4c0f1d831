"""How time, memory and operations grow, with one axis at a time: what grows faster than its operations.

python -m benchmarks.growth [--axes=batch,resolution,width,depth,probes,items] [--rounds=3] [--output=FOLDER]

The network is that of ``benchmarks.training_step``, but for the axis. ``slope`` is that of a straight line through the
upper half of a curve in logarithms: 1 where twice as much takes twice as long.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

import run_lib
from benchmarks.measure import conditions, in_turn, operations_of, peak_memory
from benchmarks.training_step import QC, make_trainer, take
from configs.defaults import base_config
from data import DataFormat
from evaluation import fid_with_error, kid, neighbourhood_metrics
from experiment.command_line import command
from experiment.figures import curve_style, new_figure
from experiment.results import markdown_table, number, write_results
from experiment.runtime import Runtime
from likelihood import LikelihoodEvaluator

SIZE = {"model.nf": 32, "model.num_res_blocks": 2, "training.batch_size": 8, "data.image_size": 32}
AXES = {
    "batch": ("training.batch_size", (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "resolution": ("data.image_size", (8, 16, 32, 64, 128, 256)),
    "width": ("model.nf", (32, 64, 128, 256)),
    "depth": ("model.num_res_blocks", (1, 2, 4, 8)),
    "probes": ("training.qc_probes", (1, 2, 4, 8, 16)),
    "items": ("", (1000, 2000, 5000, 10_000, 20_000, 50_000)),
}
FEATURES = 2048
SMALL = {"training.batch_size": 1}
"""Of the axes on which an image becomes large."""


def run(
    *,
    axes: tuple[str, ...] = tuple(AXES),
    longest: float = 20.0,
    rounds: int = 3,
    threads: int = 1,
    device: str = "cpu",
    output: str = "runs/growth",
) -> str:
    """Measure along every axis; write ``results.json``, ``table.md`` and ``growth.png``.

    Args:
        axes: batch, resolution, width, depth, probes, items (of an evaluation).
        longest: seconds; a curve ends with the first point that takes longer.
        rounds: medians count.
        threads: of the CPU.
        device: auto, cpu or cuda.
        output: where the results are written.
    """
    if unknown := set(axes) - set(AXES):
        raise ValueError(f"--axes={min(unknown)}: allowed are {', '.join(AXES)}")
    torch.set_num_threads(threads)
    runtime, rows = Runtime(device), []
    for axis in axes:
        field, values = AXES[axis]
        ended, measured = set(), {}
        for value in values:
            if measured and ended == measured.keys():  # what is larger need not be built
                break
            measured = works(axis, field, value, runtime)
            for what, work in measured.items():
                if what in ended:
                    continue
                seconds = in_turn({"": lambda _, work=work: work()}, rounds, runtime.torch_device)[""].median
                row = {"axis": axis, "value": value, "what": what, "seconds": seconds}
                row |= {"MiB": peak_memory(work, runtime.torch_device) / 2**20, "GFLOP": operations_of(work) / 1e9}
                rows.append(row)
                if seconds > longest:
                    ended.add(what)
    slopes = [
        (*key, *(number(slope(points, of)) for of in ("seconds", "GFLOP", "MiB")))
        for key, points in curves(rows).items()
    ]
    text = markdown_table(("axis", "what", "slope of time", "of operations", "of memory"), slopes)
    every = [tuple(value if isinstance(value, str) else number(value) for value in row.values()) for row in rows]
    text = f"{conditions(runtime.torch_device)}\n{text}\n{markdown_table(tuple(rows[0]), every)}"
    return write_results(Path(output), {"rows": rows}, text, {"growth": draw(rows)})


def works(axis: str, field: str, value: int, runtime: Runtime) -> dict[str, Callable[[], object]]:
    """What is measured at a value of an axis."""
    if axis == "items":
        return of_items(value, runtime)
    size = SIZE | (SMALL if axis in ("resolution", "width", "depth") else {}) | {field: value}
    side = size.pop("data.image_size")
    # At 16×16 pixels, or the nearest of the network's four levels.
    size["model.attn_resolutions"] = (max(min(16, side // 2), side // 8),)
    images = DataFormat((3, side, side), num_levels=256, num_classes=None, centered=False, dequantized=False)

    def step(name: str, overrides: Mapping[str, object]) -> Callable[[], None]:
        return partial(take, make_trainer(name, size | overrides, runtime, images), 1)

    if axis == "probes":
        return {"training step, QC": step("QC", QC)}
    config, device = base_config(size), runtime.torch_device
    with device:
        model = run_lib.build_score_model(config, run_lib.build_sde(config), images).eval().requires_grad_(False)
    x = torch.rand((config.training.batch_size, *images.shape), device=device)
    t = torch.full((len(x),), 0.5, device=device)
    likelihood = LikelihoodEvaluator(model.sde, time="log_ratio", solver="adams", num_steps=1)
    return {
        "training step, U": step("U", {}),
        "training step, QC": step("QC", QC),
        "sampling: a score": lambda: model(x, t),
        "likelihood: a step": lambda: likelihood.with_probes(model, x, [torch.ones_like(x)]),
    }


def of_items(count: int, runtime: Runtime) -> dict[str, Callable[[], object]]:
    """Of an evaluation of so many samples: metrics of their features, and what it takes to keep them in batches."""
    rng = np.random.default_rng(0)
    real, generated = (rng.standard_normal((count, FEATURES), dtype=np.float32) for _ in range(2))
    image = np.zeros((100, 32, 32, 3), dtype=np.uint8)

    def keep() -> None:
        with tempfile.TemporaryDirectory() as folder:
            compute = partial(runtime.compute, Path(folder) / "samples.npz", "key", count, len(image))
            compute(lambda items: {"images": image[: len(items)]}, description="items", large=("images",))

    return {
        "FID with its error": lambda: fid_with_error(real, generated),
        "KID": lambda: kid(real, generated, seed=0),
        "precision, recall, density, coverage": lambda: neighbourhood_metrics(real, generated),
        "keep samples": keep,
    }


def curves(rows: Sequence[Mapping]) -> dict[tuple[str, str], list[Mapping]]:
    """The points of every curve, by axis and what was measured."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for row in rows:
        found.setdefault((row["axis"], row["what"]), []).append(row)
    return found


def slope(points: Sequence[Mapping], of: str) -> float | None:
    """d ln y / d ln x by least squares over the upper half of a curve, at least two points; None if there are not as
    many, or y is 0 there."""
    upper = points[min(len(points) // 2, len(points) - 2) :] if len(points) > 1 else []
    x, y = (np.array([point[name] for point in upper], dtype=float) for name in ("value", of))
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(upper) and (y > 0).all() else None


def draw(rows: Sequence[Mapping]) -> Figure:
    """Seconds against each axis, both in logarithms; thin: in proportion to the operations, through the last point."""
    axes_of = list(dict.fromkeys(row["axis"] for row in rows))
    figure = new_figure(7.2, 2.6 * math.ceil(len(axes_of) / 2))
    for k, axis in enumerate(axes_of):
        axes = figure.add_subplot(math.ceil(len(axes_of) / 2), 2, k + 1)
        for index, ((_, what), points) in enumerate(
            (key, points) for key, points in curves(rows).items() if key[0] == axis
        ):
            x, y, work = (np.array([point[name] for point in points]) for name in ("value", "seconds", "GFLOP"))
            axes.loglog(x, y, label=what, **curve_style(index, len(x)))
            if work[-1] > 0:
                axes.loglog(x, y[-1] * work / work[-1], color=curve_style(index)["color"], linewidth=0.5)
        values = sorted({row["value"] for row in rows if row["axis"] == axis})
        axes.set_xticks(values, map(str, values), fontsize=7)
        axes.set_xticks([], minor=True)
        axes.set(xlabel=AXES[axis][0] or "items", ylabel="seconds")
        axes.legend(fontsize=6, frameon=False, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


if __name__ == "__main__":
    command(run)
