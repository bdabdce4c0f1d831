"""Whether bf16 learns as float32 does: the training loss of both, step by step.

python -m benchmarks.bf16_loss [--config=configs/digits.py:u] [--steps=500] [--seeds=3] [--figure=FILE.png]

Every run is a process of main.py. The runs of one seed have the same first weights, data, times and noise in both
precisions, so that their losses differ by rounding alone, and by what rounding has led to since. How much the loss
differs between seeds of float32 is what that is to be compared with.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags

from experiment.command_line import parse_flags

ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "bf16")
WINDOW = 20
"""Steps that a point of the curves is the mean of."""
END = 100
"""Last steps that the table compares."""


class Failed(RuntimeError):
    """A run did not end well."""


def losses(config: str, steps: int, seed: int, precision: str, device: str, workdir: Path) -> np.ndarray:
    """The training loss (steps,) of one run.

    Raises:
        Failed: with the last line of its output.
    """
    training = {"n_iters": steps, "log_freq": 1, "eval_freq": steps, "snapshot_freq": 0, "snapshot_sampling": False}
    command = [
        *(sys.executable, "main.py", f"--config={config}", f"--workdir={workdir}", "--mode=train"),
        *(f"--device={device}", f"--precision={precision}", f"--config.seed={seed}"),
        *(f"--config.training.{field}={value}" for field, value in training.items()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or ["no output"])[-1])
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return np.array([row["loss"] for row in rows if "loss" in row])


def smooth(curves: np.ndarray) -> np.ndarray:
    """Means (..., n // WINDOW) of WINDOW neighbours each."""
    whole = curves[..., : curves.shape[-1] // WINDOW * WINDOW]
    return whole.reshape(*curves.shape[:-1], -1, WINDOW).mean(-1)


def table(curves: dict[str, np.ndarray]) -> str:
    """Markdown, of the losses (seeds, steps) by precision: the mean of the last steps and what it differs by."""
    ends = {precision: values[:, -END:].mean(1) for precision, values in curves.items()}
    difference = ends["bf16"] - ends["fp32"]
    rows = {
        f"float32, mean of the last {END} steps": (ends["fp32"].mean(), ends["fp32"].std(ddof=1)),
        "bf16": (ends["bf16"].mean(), ends["bf16"].std(ddof=1)),
        "bf16 − float32, same seed": (difference.mean(), difference.std(ddof=1)),
    }
    lines = ["| loss | mean over seeds | standard deviation over seeds |", "|---|---|---|"]
    return "\n".join(lines + [f"| {name} | {mean:.3f} | {deviation:.3f} |" for name, (mean, deviation) in rows.items()])


def draw(curves: dict[str, np.ndarray], path: Path) -> None:
    """Both losses against the step, and their difference beside that between seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    fp32, bf16 = smooth(curves["fp32"]), smooth(curves["bf16"])
    step = WINDOW * (np.arange(fp32.shape[1]) + 0.5)
    figure = Figure(figsize=(7, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    for values, name, style in ((fp32, "float32", {"color": "C0"}), (bf16, "bf16", {"color": "C1", "ls": "--"})):
        for seed, curve in enumerate(values):
            left.plot(step, curve, lw=1, label=None if seed else f"{name}, {len(values)} seeds", **style)
    left.set(xlabel="training step", ylabel=f"loss, mean of {WINDOW} steps", yscale="log")
    for axis_part in (left.yaxis.set_major_formatter, left.yaxis.set_minor_formatter):
        axis_part(ScalarFormatter())
    left.legend(fontsize=8)
    spread = fp32.std(0, ddof=1)
    right.fill_between(step, -spread, spread, color="C0", alpha=0.25, label="± standard deviation, float32's seeds")
    for seed, curve in enumerate(bf16 - fp32):
        right.plot(step, curve, color="C1", lw=1, label=None if seed else "bf16 − float32, same seed")
    right.axhline(0, color="0.5", lw=0.8)
    limit = 1.6 * max(spread.max(), np.abs(bf16 - fp32).max())  # room for the legend
    right.set(xlabel="training step", ylabel="difference in loss", ylim=(-limit, limit))
    right.legend(fontsize=8, loc="upper left")
    figure.savefig(path, dpi=150)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if given.steps < END:
        sys.exit(f"error: --steps={given.steps}: at least {END}")
    if given.seeds < 2:
        sys.exit(f"error: --seeds={given.seeds}: at least 2")
    figure = Path(given.figure)
    if not figure.parent.is_dir():
        sys.exit(f"error: --figure={figure}: no such folder")
    if figure.suffix != ".png":
        sys.exit(f"error: --figure={figure}: a file .png")
    from tqdm import tqdm

    runs = [(seed, precision) for seed in range(given.seeds) for precision in PRECISIONS]
    found: dict[str, list[np.ndarray]] = {precision: [] for precision in PRECISIONS}
    with tempfile.TemporaryDirectory() as folder:
        for seed, precision in tqdm(runs, unit="run"):
            workdir = Path(folder) / f"{precision}_{seed}"
            try:
                found[precision].append(losses(given.config, given.steps, seed, precision, given.device, workdir))
            except Failed as error:
                sys.exit(f"error: {error}")
    curves = {precision: np.stack(values) for precision, values in found.items()}
    draw(curves, figure)
    print(f"{given.config}, {given.device}, {given.steps} steps, {given.seeds} seeds\n\n{table(curves)}\n\n{figure}")


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/digits.py:u", "What is trained.")
    flags.DEFINE_integer("steps", 500, "Of every run.")
    flags.DEFINE_integer("seeds", 3, "Runs in each precision.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps: passed on.")
    flags.DEFINE_string("figure", "bf16_loss.png", "Where the figure goes.")
    app.run(main, flags_parser=parse_flags)
