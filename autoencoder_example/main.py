"""Section 6: the QC loss alone makes a one-layered autoencoder conservative, and does not tie its weights.

python -m autoencoder_example.main --workdir=W [--seeds=5] [--estimator=all] [--jobs=2]

The autoencoder s(x) = R h(Wᵀx + b) + c with two inputs and two units (``models.autoencoder``) minimises nothing but
L_QC = mean of tr JJᵀ − tr JJ over a 40×40 grid on [−10, 10]², exact or estimated with one probe per point.

Source: Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models"
(ICML 2023).
Files: W/results.json, W/table.md, W/autoencoder.png, W/runs/ESTIMATOR/seed_K/.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from absl import app, flags
from torch import Tensor

from conservativeness import asymmetry
from experiment.command_line import available_cores, parse_flags
from experiment.files import write_atomically
from experiment.jobs import run_all
from experiment.randomness import seed_from
from experiment.workdir import claim
from models.autoencoder import OneLayerAutoencoder
from training import fit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EXPERIMENT = "autoencoder_example"
ESTIMATORS = ("exact", "antisymmetric", "trace")
FIRST_SEED = 8
"""The paper's; N seeds are 8, 9, …, 7 + N."""

RECIPE = {
    "dimension": 2,
    "hidden": 2,
    "grid_points": 40,
    "half_width": 10.0,
    "learning_rate": 1e-4,
    "beta1": 0.9,
    "eps": 1e-8,
    "grad_clip": 1.0,
    "probes": 1,
}
"""What decides the result of a run, besides estimator, seed, steps and device."""

LOG_FREQ = 200
SAVE_FREQ = 2000
LATE_STEPS = 2000

REFERENCE = {
    0: (2.6e-1, 8.4e-1, 0.999),
    1000: (7.1e-2, 4.3e-1, 0.925),
    2400: (5.5e-3, 8.9e-2, 0.981),
    5000: (4.9e-6, 2.2e-4, 1.007),
    10000: (8.0e-11, 6.0e-8, 1.007),
}
"""The public code, seed 8: step → L_QC, |(RWᵀ)₁₂ − (RWᵀ)₂₁|, ‖W − R‖_F."""


@dataclass(frozen=True)
class Task:
    """One run: an estimator of L_QC and a seed."""

    workdir: Path
    estimator: str
    seed: int
    n_iters: int
    device: str

    @property
    def directory(self) -> Path:
        return self.workdir / "runs" / self.estimator / f"seed_{self.seed}"

    def __str__(self) -> str:
        return f"{self.estimator}, seed {self.seed}"


def grid() -> Tensor:
    """The points (1600, 2) that L_QC is averaged over."""
    axis = torch.linspace(-RECIPE["half_width"], RECIPE["half_width"], RECIPE["grid_points"])
    return torch.cartesian_prod(axis, axis)


def initial_model(seed: int) -> OneLayerAutoencoder:
    """The weights at step 0: those of the public code with this seed."""
    generator = torch.Generator().manual_seed(seed)
    # There two linear layers take these 12 numbers for the usual initialisation, before the uniform one.
    torch.rand(12, generator=generator)
    return OneLayerAutoencoder(RECIPE["dimension"], RECIPE["hidden"], generator=generator)


def train(task: Task, update: Callable[[int], None]) -> dict[str, float | int | str]:
    """Train a run, or what is left of it; its row of the results."""
    model = initial_model(task.seed).to(task.device)
    x = grid().to(task.device)
    t = torch.zeros(len(x), device=task.device)

    def loss(step: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(EXPERIMENT, "probes", task.seed, step))
        result = asymmetry(
            model,
            x,
            t,
            probes=RECIPE["probes"],
            estimator=task.estimator,
            generator=generator,
            create_graph=True,
        )
        return {"loss": result.asym.mean()}

    def observe() -> dict[str, float]:
        return {
            "l_qc": asymmetry(model, x, t, estimator="exact").asym.mean().item(),
            "product_asymmetry": model.product_asymmetry(),
            "unit_asymmetry": model.unit_asymmetry(),
            "weight_difference": model.weight_difference(),
        }

    optimizer = torch.optim.Adam(
        model.parameters(), lr=RECIPE["learning_rate"], betas=(RECIPE["beta1"], 0.999), eps=RECIPE["eps"]
    )
    fit(
        model,
        loss,
        optimizer,
        task.directory,
        n_iters=task.n_iters,
        grad_clip=RECIPE["grad_clip"],
        log_freq=LOG_FREQ,
        save_freq=SAVE_FREQ,
        observe=observe,
        update=update,
    )
    curve = read_curve(task)
    late = [row["l_qc"] for row in curve if row["step"] >= task.n_iters - LATE_STEPS]
    end = {name: value for name, value in curve[-1].items() if name != "loss"}
    return {"estimator": task.estimator, "seed": task.seed, **end, "greatest_late_l_qc": max(late)}


def read_curve(task: Task) -> list[dict[str, float]]:
    """The log of a finished run: a row at step 0, every 200 steps and at the end.

    Raises:
        ValueError: the log has been cut short or damaged.
    """
    path = task.directory / "metrics.jsonl"
    try:
        curve = [json.loads(line) for line in path.read_text().splitlines()]
        complete = curve[-1]["step"] == task.n_iters
    except (OSError, ValueError, LookupError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is damaged or cut short; delete {task.directory} to train this run again")
    return curve


# ---------------------------------------------------------------------------------------------------------------
# Table and figure


def table(rows: Sequence[dict], tasks: Sequence[Task]) -> str:
    """Markdown: the first run beside the public code's, and all ends."""
    lines = [
        f"Estimator {tasks[0].estimator}, seed {tasks[0].seed}, beside the public code (exact L_QC, seed 8):",
        "",
        "| step | L_QC | there | abs((RWᵀ)₁₂ − (RWᵀ)₂₁) | there | ‖W − R‖_F | there |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in read_curve(tasks[0]):
        if reference := REFERENCE.get(row["step"]):
            ours = (row["l_qc"], row["product_asymmetry"] / 2**0.5, row["weight_difference"])
            formats = (".1e", ".1e", ".3f")
            cells = [f"{v:{f}} | {r:{f}}" for v, r, f in zip(ours, reference, formats, strict=True)]
            lines.append(f"| {row['step']} | {' | '.join(cells)} |")
    lines += [
        "",
        f"All runs at the end. Late L_QC: the greatest logged in the last {LATE_STEPS} steps. By unit: "
        "(Σ_k ‖r_k w_kᵀ − w_k r_kᵀ‖²_F)^½.",
        "",
        "| estimator | seed | steps | L_QC | late L_QC | ‖RWᵀ − WRᵀ‖_F | by unit | ‖W − R‖_F |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['estimator']} | {row['seed']} | {row['step']} | {row['l_qc']:.1e} "
            f"| {row['greatest_late_l_qc']:.1e} | {row['product_asymmetry']:.1e} | {row['unit_asymmetry']:.1e} "
            f"| {row['weight_difference']:.3f} |"
        )
    return "\n".join(lines) + "\n"


ESTIMATOR_STYLES = {
    "exact": {"color": "tab:blue", "zorder": 2},
    "antisymmetric": {"color": "tab:orange", "linestyle": "--", "zorder": 3},
    "trace": {"color": "tab:red", "zorder": 1},
}


def draw(tasks: Sequence[Task]) -> Figure:
    """The paper's figure for one estimator, and L_QC and ‖RWᵀ − WRᵀ‖_F for all of them on logarithmic axes."""
    from matplotlib.figure import Figure  # not needed by the processes that train

    titles = {"l_qc": "$L_{QC}$", "product_asymmetry": "‖RWᵀ − WRᵀ‖$_F$", "weight_difference": "‖W − R‖$_F$"}
    curve_colours = dict(zip(titles, ("tab:purple", "tab:green", "tab:gray"), strict=True))
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    linear, *logarithmic = figure.subplots(1, 3)
    for task in reversed(tasks):  # the paper's seed on top
        curve = {name: [row[name] for row in read_curve(task)] for name in ("step", *titles)}
        bold = task.seed == FIRST_SEED
        style = {"linewidth": 2.0} if bold else {"linewidth": 0.7, "alpha": 0.6}
        if task.estimator == tasks[0].estimator:
            for name, title in titles.items():
                label = title if bold else None
                linear.plot(curve["step"], curve[name], color=curve_colours[name], label=label, **style)
        for axes, name in zip(logarithmic, titles, strict=False):
            label = task.estimator if bold else None
            axes.plot(curve["step"], curve[name], label=label, **ESTIMATOR_STYLES[task.estimator], **style)
    linear.set(title=f"trained with {tasks[0].estimator} $L_{{QC}}$", ylim=(0, None))
    linear.legend(title=f"bold: seed {FIRST_SEED}")
    for axes, name in zip(logarithmic, titles, strict=False):
        axes.set(title=titles[name])
        axes.set_yscale("log", nonpositive="mask")  # float32 reaches exact zeros
    logarithmic[0].legend(title="trained with", loc="upper right", fontsize="small", title_fontsize="small")
    for axes in (linear, *logarithmic):
        axes.set_xlabel("step")
    return figure


# ---------------------------------------------------------------------------------------------------------------
# Command


def run(
    workdir: str | Path,
    *,
    seeds: int = 5,
    estimator: str = "all",
    n_iters: int = 10_001,
    jobs: int = 1,
    device: str = "cpu",
) -> str:
    """Train all runs, or what is left of them; write results, table and figure to ``workdir``; return the table.

    Args:
        workdir: W.
        seeds: N, for the seeds 8 … 7 + N.
        estimator: of L_QC; 'all' for the three.
        n_iters: steps of every run.
        jobs: processes; they change no result.
        device: of every run.

    Raises:
        ValueError: bad input, or a workdir of another experiment or other settings; nothing has been computed then.
        FloatingPointError: L_QC of a run is not finite.
    """
    for flag, value in (("seeds", seeds), ("n_iters", n_iters), ("jobs", jobs)):
        if value < 1:
            raise ValueError(f"--{flag}={value}: at least 1")
    if estimator not in (*ESTIMATORS, "all"):
        raise ValueError(f"--estimator={estimator}: allowed are {', '.join(ESTIMATORS)}, all")
    settings = {**RECIPE, "n_iters": n_iters, "device": device}
    folder = claim(workdir, EXPERIMENT, settings)
    estimators = ESTIMATORS if estimator == "all" else (estimator,)
    tasks = [
        Task(folder, name, seed, n_iters, device)
        for name in estimators
        for seed in range(FIRST_SEED, FIRST_SEED + seeds)
    ]
    rows = run_all(
        tasks, train, jobs=jobs, total=n_iters * len(tasks), unit="step", description="one-layered autoencoder"
    )
    results = {"experiment": EXPERIMENT, "settings": settings, "rows": rows}
    text = table(rows, tasks)
    for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("table.md", text)):
        write_atomically(folder / name, lambda file, content=content: file.write(content.encode()))
    write_atomically(folder / "autoencoder.png", partial(draw(tasks).savefig, format="png", dpi=100))
    return text


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    flags.DEFINE_string("workdir", None, "Folder for results, table, figure and runs.", required=True)
    flags.DEFINE_integer("seeds", 5, f"How many seeds: {FIRST_SEED}, the paper's, and those after it.")
    flags.DEFINE_string("estimator", "all", f"Of L_QC: {', '.join(ESTIMATORS)}, or all of them.")
    flags.DEFINE_integer("n_iters", 10_001, "Steps of every run.")
    flags.DEFINE_integer("jobs", available_cores(), "Processes that share the runs, about 1 GB each.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps; a GPU is no faster for so small a network.")


def main(argv: list[str]) -> None:
    from run_setup import Runtime  # not needed by the processes that train

    options = flags.FLAGS
    try:
        text = run(
            options.workdir,
            seeds=options.seeds,
            estimator=options.estimator,
            n_iters=options.n_iters,
            jobs=options.jobs,
            device=str(Runtime(options.device).accelerator().device),
        )
    except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")
    print(text)


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
