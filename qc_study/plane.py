"""The study in the plane: QC and U, from scratch, on the three sets of Section 3.2, where the true score is known.

U is measured after as many steps as QC, and after as many as QC's compute is worth.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.measure import in_turn
from benchmarks.training_step import take
from conservativeness import asymmetry, helmholtz_hodge
from experiment.figures import plane_grid
from experiment.files import read_json, write_json
from experiment.jobs import Update
from experiment.randomness import normal_like
from experiment.runtime import Runtime
from models.score import ScoreModel
from sde_lib import expand

from .arms import silent

configs, experiment = (importlib.import_module(f"2d_examples.{name}") for name in ("configs", "experiment"))

SEEDS = 20
TIME = 0.5
"""At which the error of the score is split; σ is 0.55 there."""
HALF_WIDTH, POINTS = 8.0, 161
MEASURES = {
    "nll": "NLL, prior N(0, 9I) (nats)",
    "nll_matched_prior": "NLL, exact prior (nats)",
    "score_error": "score error",
    "asym": "Asym",
    "nasym": "NAsym",
    "error_gradient": "its gradient part, t = 0.5",
    "error_rotational": "its rotational part, t = 0.5",
    "error_nasym": "NAsym of the error, t = 0.5",
}
COMPARISONS = {"QC − U, equal steps": ("qc", "u-steps"), "QC − U, equal compute": ("qc", "u-compute")}


def measure_costs(runtime: Runtime, rounds: int = 20) -> dict[str, float]:
    """What a step of QC costs in steps of U."""
    with tempfile.TemporaryDirectory() as folder:
        loops = {
            model: experiment.trainer(configs.get_config(f"gaussian_8-{model}"), Path(folder) / model, runtime)
            for model in ("u", "qc")
        }
        timed = in_turn({name: partial(take, loop, 1) for name, loop in loops.items()}, rounds, runtime.torch_device)
    return {"qc": timed["qc"].median / timed["u"].median}


def steps(dataset: str, costs: Mapping[str, float]) -> dict[str, int]:
    """Of the three models."""
    count = configs.get_config(f"{dataset}-u").training.n_iters
    return {"u-steps": count, "u-compute": round(count * costs["qc"]), "qc": count}


def run_pair(dataset: str, seed: int, costs: Mapping[str, float], folder: Path, device: str, update: Update) -> list:
    """Train and measure U, twice, and QC of one set and seed."""
    rows = []
    for model, count in steps(dataset, costs).items():
        path = folder / f"{model}.json"
        try:
            rows.append(read_json(path, checksum=True))
        except (OSError, ValueError):  # there is none yet, or it is damaged
            kind = model.partition("-")[0]
            config = configs.get_config(f"{dataset}-{kind}")
            config.seed, config.training.n_iters = seed, count
            experiment.trainer(config, folder / kind, Runtime(device, on_progress=silent)).run()
            trained, step = experiment.trained_model(config, folder / kind)
            if step != count:
                raise ValueError(f"{folder / kind} has gone on to step {step}, and {path} is missing") from None
            config.seed = 0  # the same test points, noise and latents for all
            metrics, _ = experiment.evaluate_score(config, trained.to(device), device)
            row = {"dataset": dataset, "seed": seed, "model": model, "step": count}
            rows.append(row | metrics | split_error(config, trained))
            write_json(path, rows[-1], checksum=True)
        update(1)
    return rows


def split_error(config, score: ScoreModel) -> dict[str, float]:
    """The error e = s − s* of the score at t = 0.5, as a gradient and a rotational rest: the means of ½‖·‖² over a
    square that holds the data (unweighted), and NAsym of e at noised test points."""
    truth, device = experiment.noised_distribution(config), next(score.parameters()).device

    def error(x: Tensor, t: Tensor) -> Tensor:
        return score(x, t) - truth.score(x, t)

    points = plane_grid(HALF_WIDTH, POINTS).float().to(device)
    with torch.no_grad():
        field = error(points, torch.full((len(points),), TIME, device=device))
    # x₁ runs fastest: of the field on the grid the first axis must be x₁'s.
    parts = helmholtz_hodge(field.view(POINTS, POINTS, 2).transpose(0, 1), 2 * HALF_WIDTH / (POINTS - 1))
    x0 = experiment.points(config, "test points", config.data.num_test).to(device)
    t = torch.full((len(x0),), TIME, device=device)
    mean, std = experiment.forward_process(config).marginal(x0, t)
    noised = mean + expand(std, x0) * normal_like(x0, experiment.generator(config, "error"))
    return {
        "error_gradient": float(0.5 * (parts.gradient**2).sum(-1).mean()),
        "error_rotational": float(0.5 * (parts.rotational**2).sum(-1).mean()),
        "error_nasym": float(asymmetry(error, noised, t).nasym.mean()),
    }
