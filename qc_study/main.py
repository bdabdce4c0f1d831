"""Does quasi-conservativeness help? The study of the README, part by part.

    python -m qc_study.main --workdir=W [--part=digits|plane]
    python -m qc_study.main --workdir=W --part=mnist|cifar10|gpu --data=FILE.npz

Everything is in W/PART: ``results.json`` with every model of every seed, ``table.md`` and ``delta_nll.png``; what was
measured first, ``costs.json`` and ``placebo.json``; and the runs. Interrupted, the same command resumes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

import run_lib
from experiment.command_line import available_cores, check_positive, command
from experiment.files import claim, read_json, write_json
from experiment.jobs import Update, run_all
from experiment.results import write_results
from experiment.runtime import Runtime

from . import analysis, plane
from .arms import (
    PARTS,
    PILOT_SEEDS,
    Arm,
    Part,
    arms,
    measure_costs,
    pilot,
    placebo_weight,
    silent,
    train_u,
    trainer,
    weights_path,
)
from .measures import measure


def run(
    workdir: str,
    *,
    part: str = "digits",
    data: str = "",
    seeds: int = 0,
    jobs: int = available_cores(),
    device: str = "cpu",
) -> str:
    """Train, measure, analyse, write all files and return the table.

    Args:
        workdir: W.
        part: digits, plane, mnist, cifar10 or gpu.
        data: the .npz with images of mnist (28×28), cifar10 and gpu (32×32), see docs/own_data.md.
        seeds: fewer than the plan's, or 0 for those; more can be added later.
        jobs: processes that share the work, about 1 GB each; they change no result.
        device: auto, cpu or cuda.

    Raises:
        ValueError: bad input; nothing has been written.
    """
    if part not in (*PARTS, "plane"):
        raise ValueError(f"--part={part}: allowed are {', '.join((*PARTS, 'plane'))}")
    if (part in ("digits", "plane")) != (not data):
        raise ValueError(f"--data={data}: {'give a file for' if not data else 'not with'} --part={part}")
    planned = plane.SEEDS if part == "plane" else PARTS[part]().seeds
    if not 0 <= seeds <= planned:
        raise ValueError(f"--seeds={seeds}: allowed are 0 to {planned}")
    check_positive(jobs=jobs)
    device = Runtime(device).torch_device.type
    torch.set_num_threads(1)  # as in the jobs, and so that costs are processor time
    make = _plane if part == "plane" else partial(_images, PARTS[part]())
    return make(Path(workdir) / part, data, seeds or planned, jobs, device)


def _images(part: Part, folder: Path, data: str, seeds: int, jobs: int, device: str) -> str:
    config = part.config
    if data:
        config.data.path = data
    runtime = Runtime(device, cache_dir=str(folder / "cache"))
    run_lib.load_data(config)  # what is wrong with them is said before anything is written
    settings = {"device": device, "config": json.loads(config.to_json()), **part._replace(config=None)._asdict()}
    claim(folder, f"qc_study, {folder.name}", {name: value for name, value in settings.items() if name != "seeds"})
    run_lib.statistics(config, folder, runtime)  # once, and while there is no more to lose if the images have no labels

    costs = _kept(folder / "costs.json", lambda: measure_costs(part, runtime))
    pilots = []
    if part.controls_at is not None:
        tasks = {
            f"pilot, seed {seed}": partial(pilot, part, seed, folder / "pilot" / f"seed_{seed}", device)
            for seed in PILOT_SEEDS
        }
        find = partial(run_all, tasks, jobs=jobs, total=3 * len(tasks), unit="stage", description="placebo's weight")
        pilots = _kept(folder / "placebo.json", lambda: {"pilots": find()})["pilots"]
    models = arms(part, costs, placebo_weight(pilots) if pilots else 0.0)

    own = sorted({arm.step for arm in models.values() if arm.fork is None})
    folders = {seed: folder / f"seed_{seed}" for seed in range(seeds)}
    tasks = {f"U, seed {s}": partial(train_u, part, s, own, at, device) for s, at in folders.items()}
    run_all(tasks, jobs=jobs, total=own[-1] * seeds, unit="step", description="train U")
    tasks = {
        f"{name}, seed {seed}": partial(train_and_measure, part, name, arm, seed, at, runtime.cache_dir, device)
        for seed, at in folders.items()
        for name, arm in models.items()
    }
    rows = run_all(tasks, jobs=jobs, total=len(tasks), unit="model", description="train and measure")

    found = analysis.primary(analysis.primary_differences(rows, part))
    other = analysis.secondary(rows, analysis.comparisons(part), list(analysis.MEASURES))
    results = {"experiment": f"qc_study, {folder.name}", "seeds": seeds, "seeds_planned": part.seeds, "costs": costs}
    results |= {"pilots": pilots, "primary": found, "secondary": other, "rows": rows}
    rank = "Primary" if folder.name == "digits" else "Secondary"
    table = f"""# {folder.name}: {seeds} of {part.seeds} seeds

Costs of a step in steps of U: {", ".join(f"{kind} {cost:.2f}" for kind, cost in costs.items())}.

## {rank}: NLL of QC, λ = {part.weights[-1]:g}, minus that of U at equal compute

{analysis.primary_table(found)}
## Secondary: differences with 95 % intervals, corrected for nothing

{analysis.secondary_table(other, analysis.MEASURES)}
## All models: mean ± standard error over seeds

{analysis.models_table(rows, analysis.MEASURES)}"""
    return write_results(folder, results, table, {"delta_nll": analysis.draw_delta(rows, part)})


def train_and_measure(
    part: Part, name: str, arm: Arm, seed: int, seed_folder: Path, cache_dir: str, device: str, update: Update
) -> dict:
    """One model of one seed, as a row of the results."""
    checkpoint, workdir = weights_path(seed_folder, arm.step), seed_folder / name
    runtime = Runtime(device, cache_dir=cache_dir, on_progress=silent)
    if arm.fork is not None:
        loop = trainer(part, arm, seed, seed_folder, workdir, runtime)
        loop.run()
        checkpoint = loop.store.path(arm.step)
    row = {"model": name, "seed": seed, **arm._asdict()}
    row |= measure(part.config, checkpoint, seed_folder / "measured" / name, runtime)
    update(1)
    return row


def _plane(folder: Path, data: str, seeds: int, jobs: int, device: str) -> str:
    claim(folder, "qc_study, plane", {"device": device})
    costs = _kept(folder / "costs.json", lambda: plane.measure_costs(Runtime(device)))
    tasks = {
        f"{dataset}, seed {seed}": partial(
            plane.run_pair, dataset, seed, costs, folder / dataset / f"seed_{seed}", device
        )
        for seed in range(seeds)
        for dataset in plane.configs.DATASETS
    }
    found = run_all(tasks, jobs=jobs, total=3 * len(tasks), unit="model", description="plane")
    rows = [row for part in found for row in part]
    text, other = f"# plane: {seeds} of {plane.SEEDS} seeds\n\nA step of QC costs {costs['qc']:.2f} of U.\n", {}
    for dataset in plane.configs.DATASETS:
        own = [row for row in rows if row["dataset"] == dataset]
        other[dataset] = analysis.secondary(own, plane.COMPARISONS, list(plane.MEASURES))
        text += f"\n## {dataset}: differences with 95 % intervals, corrected for nothing; all models\n\n"
        text += analysis.secondary_table(other[dataset], plane.MEASURES)
        text += f"\n{analysis.models_table(own, plane.MEASURES)}"
    results = {"experiment": "qc_study, plane", "seeds": seeds, "costs": costs, "secondary": other, "rows": rows}
    return write_results(folder, results, text)


def _kept(path: Path, compute: Callable[[], Mapping]) -> Mapping:
    """What is measured once, and all later runs go by."""
    if not path.exists():
        write_json(path, compute(), checksum=True)
    return read_json(path, checksum=True)


if __name__ == "__main__":
    command(run)
