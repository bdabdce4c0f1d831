"""Section 6: the QC loss alone makes a one-layered autoencoder conservative, and does not tie its weights.

    python -m autoencoder_example.main --workdir=W [--seeds=5] [--estimator=all] [--jobs=2]

The autoencoder s(x) = R h(Wᵀx + b) + c with two inputs and two units (``models.autoencoder``) minimises nothing but
L_QC = mean of tr JJᵀ − tr JJ over a 40×40 grid on [−10, 10]², exact or estimated with one probe per point.

Files: W/results.json, W/table.md, W/autoencoder.png, W/runs/ESTIMATOR/seed_K/.

Source: Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative Models"
(ICML 2023).
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from conservativeness import asymmetry
from experiment.command_line import available_cores, check_positive, command
from experiment.figures import COLOURS, LINES, MARKERS, new_figure
from experiment.files import claim, parse_json
from experiment.jobs import Update, run_all
from experiment.randomness import seed_from
from experiment.results import markdown_table, write_results
from experiment.runtime import Runtime
from models.autoencoder import OneLayerAutoencoder
from training import fit

EXPERIMENT = "autoencoder_example"
ESTIMATORS = ("exact", "antisymmetric", "trace")
FIRST_SEED = 8  # the paper's
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
"""What decides the result of a run, with its estimator, seed, steps and device."""
LOG_FREQ, SAVE_FREQ, LATE_STEPS = 200, 2000, 2000
QUANTITIES = ("l_qc", "product_asymmetry", "unit_asymmetry", "weight_difference")
REFERENCE = {
    0: (2.6e-1, 8.4e-1, 0.999),
    1000: (7.1e-2, 4.3e-1, 0.925),
    2400: (5.5e-3, 8.9e-2, 0.981),
    5000: (4.9e-6, 2.2e-4, 1.007),
    10000: (8.0e-11, 6.0e-8, 1.007),
}
"""The public code, seed 8: step → L_QC, |(RWᵀ)₁₂ − (RWᵀ)₂₁|, ‖W − R‖_F."""

Curve = list[dict[str, float]]  # the log of a run: a row at step 0, every 200 steps and at the end


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


def train(workdir: Path, estimator: str, seed: int, n_iters: int, device: str, update: Update) -> Curve:
    """Train a run, or what is left of it, in W/runs/ESTIMATOR/seed_K.

    Raises:
        FloatingPointError: L_QC is not finite.
        ValueError: the log has been cut short or damaged.
    """
    folder = workdir / "runs" / estimator / f"seed_{seed}"
    runtime = Runtime(device, on_progress=update)
    model, x = initial_model(seed).to(runtime.torch_device), grid().to(runtime.torch_device)
    t = x.new_zeros(len(x))

    def loss(model: nn.Module, step: int, positions: range) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed_from(EXPERIMENT, "probes", seed, step))
        options = {"probes": RECIPE["probes"], "estimator": estimator, "generator": generator}
        return {"loss": asymmetry(model, x, t, create_graph=True, **options).asym.mean()}

    def observe() -> dict[str, float]:
        l_qc = asymmetry(model, x, t, estimator="exact").asym.mean().item()
        return {"l_qc": l_qc} | {name: getattr(model, name)() for name in QUANTITIES[1:]}

    betas = (RECIPE["beta1"], 0.999)
    optimizer = torch.optim.Adam(model.parameters(), lr=RECIPE["learning_rate"], betas=betas, eps=RECIPE["eps"])
    options = {"n_iters": n_iters, "log_freq": LOG_FREQ, "save_freq": SAVE_FREQ, "grad_clip": RECIPE["grad_clip"]}
    fit(model, optimizer, loss, folder, observe=observe, runtime=runtime, **options)
    log = folder / "metrics.jsonl"
    curve = [parse_json(row, log) for row in log.read_bytes().splitlines()]
    if not curve or curve[-1]["step"] != n_iters:
        raise ValueError(f"{log} has been cut short; delete {folder} to train this run again")
    return curve


def summary(estimator: str, seed: int, curve: Curve) -> dict[str, float | int | str]:
    """A run's row of the results: where it ends, and the greatest L_QC logged in its last 2000 steps."""
    end = {name: curve[-1][name] for name in ("step", "grad_norm", *QUANTITIES)}
    late = [row["l_qc"] for row in curve if row["step"] >= end["step"] - LATE_STEPS]
    return {"estimator": estimator, "seed": seed, **end, "greatest_late_l_qc": max(late)}


def draw(curves: Mapping[tuple[str, int], Curve]) -> Figure:
    """The paper's figure for one estimator, and L_QC and ‖RWᵀ − WRᵀ‖_F for all of them on logarithmic axes."""
    titles = {"l_qc": "$L_{QC}$", "product_asymmetry": "‖RWᵀ − WRᵀ‖$_F$", "weight_difference": "‖W − R‖$_F$"}
    figure = new_figure(10, 3.5)
    panels = figure.subplots(1, 3)
    estimators = list(dict.fromkeys(estimator for estimator, _ in curves))
    for (estimator, seed), curve in curves.items():
        k, bold = estimators.index(estimator), seed == FIRST_SEED
        style = {"linewidth": 2.0, "zorder": 3} if bold else {"linewidth": 0.7, "alpha": 0.6}
        for i, (name, title) in enumerate(titles.items()):
            points = [row["step"] for row in curve], [row[name] for row in curve]
            marks = {"markevery": max(1, len(curve) // 8), "markersize": 4 if bold else 0}
            if k == 0:
                panels[0].plot(
                    *points,
                    LINES[i] + MARKERS[i],
                    color=COLOURS[i + 2],
                    **marks,
                    label=title if bold else None,
                    **style,
                )
            if i < 2:
                panels[i + 1].plot(
                    *points,
                    LINES[k] + MARKERS[k],
                    color=COLOURS[k],
                    **marks,
                    label=estimator if bold else None,
                    **style,
                )
    panels[0].set(ylim=(0, None))
    of = (f"trained with {estimators[0]} $L_{{QC}}$; bold: seed {FIRST_SEED}", *["trained with"] * 2)
    for axes, label, title in zip(panels, ("$L_{QC}$ and norms", *titles.values()), of, strict=False):
        axes.set(xlabel="step", ylabel=label)
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1), "ncols": 3, "frameon": False}
        axes.legend(title=title, fontsize="small", title_fontsize="small", **above)
    for axes in panels[1:]:
        axes.set_yscale("log", nonpositive="mask")  # float32 reaches exact zeros
    return figure


def table(first: Curve, rows: Sequence[Mapping]) -> str:
    """Markdown: the first run against the public code's, and all ends."""
    compared = []
    for row in first:
        if reference := REFERENCE.get(row["step"]):
            ours = (row["l_qc"], row["product_asymmetry"] / 2**0.5, row["weight_difference"])
            pairs = zip((".1e", ".1e", ".3f"), ours, reference, strict=True)
            compared.append((row["step"], *(f"{value:{form}}" for form, *pair in pairs for value in pair)))
    header = ("step", "L_QC", "public", "abs((RWᵀ)₁₂ − (RWᵀ)₂₁)", "public", "‖W − R‖_F", "public")
    names = ("estimator", "seed", "step", "greatest_late_l_qc", *QUANTITIES)
    forms = ("", "", "", ".1e", ".1e", ".1e", ".1e", ".3f")
    ends = [[f"{row[name]:{form}}" for name, form in zip(names, forms, strict=True)] for row in rows]
    titles = ("estimator", "seed", "steps", "late L_QC", "L_QC", "‖RWᵀ − WRᵀ‖_F", "by unit", "‖W − R‖_F")
    return f"""Estimator {rows[0]["estimator"]}, seed {rows[0]["seed"]}, and the public code (exact L_QC, seed 8):

{markdown_table(header, compared)}
At the end. Late L_QC: the greatest logged in the last {LATE_STEPS} steps. By unit: (Σ_k ‖r_k w_kᵀ − w_k r_kᵀ‖²_F)^½.

{markdown_table(titles, ends)}"""


def run(
    workdir: str | Path,
    *,
    seeds: int = 5,
    estimator: str = "all",
    n_iters: int = 10_001,
    jobs: int = available_cores(),
    device: str = "cpu",
) -> str:
    """Train all runs, or what is left of them; write results, table and figure to ``workdir``; return the table.

    Args:
        workdir: W, a folder.
        seeds: N, for the seeds 8, the paper's, … 7 + N.
        estimator: of L_QC: exact, antisymmetric, trace, or all of them.
        n_iters: steps of every run.
        jobs: processes that share the runs, about 1 GB each; they change no result.
        device: auto, cpu, cuda or mps; a GPU is no faster for so small a network.

    Raises:
        ValueError: bad input, or a workdir of another experiment or other settings; nothing has been computed then.
    """
    check_positive(seeds=seeds, n_iters=n_iters, jobs=jobs)
    if estimator not in (*ESTIMATORS, "all"):
        raise ValueError(f"--estimator={estimator}: allowed are {', '.join(ESTIMATORS)}, all")
    device = Runtime(device).torch_device.type
    settings = {**RECIPE, "n_iters": n_iters, "device": device}
    folder = claim(workdir, EXPERIMENT, settings)
    runs = list(product(ESTIMATORS if estimator == "all" else (estimator,), range(FIRST_SEED, FIRST_SEED + seeds)))
    tasks = {f"{name}, seed {seed}": partial(train, folder, name, seed, n_iters, device) for name, seed in runs}
    curves = run_all(tasks, jobs=jobs, total=n_iters * len(tasks), unit="step", description="one-layered autoencoder")
    curves = dict(zip(runs, curves, strict=True))
    results = {"experiment": EXPERIMENT, "settings": settings, "rows": [summary(*key, curves[key]) for key in runs]}
    text = table(curves[runs[0]], results["rows"])
    return write_results(folder, results, text, {"autoencoder": draw(curves)})


if __name__ == "__main__":
    command(run)
