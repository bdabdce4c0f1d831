"""One run of the 2-D examples: train one model with one seed, and measure it on fresh points.

Data, noise and initial weights are keyed by the seed alone, so that U and QC of one seed start from the same weights
and see the same points and noise: their differences are paired.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from checkpoints import CheckpointError, CheckpointStore, load_state_dict_strictly
from conservativeness import asymmetry
from evaluation import precision_recall
from exact.distributions import NoisedDistribution, get_distribution
from experiment.files import write_atomically
from experiment.randomness import normal_like, seed_from
from experiment.workdir import check_at_least
from likelihood import get_likelihood
from losses import Objective, get_objective
from models import ScoreModel, create_score_model
from sampling import get_sampler
from sde_lib import SDE, ScoreFunction, expand, get_sde
from training import fit

__all__ = ["LEVELS", "METRICS", "VERSION", "Run", "evaluate", "evaluate_score", "exact_entropy", "train"]

LEVELS = 10
"""Asym and the score error are measured at times t = k/10, k = 1 … 10."""
VERSION = 1
"""Part of what a stored run is known by: to be raised when a fix changes what training or evaluation compute."""
NEIGHBOURS = 3
"""k of precision and recall."""

METRICS = (
    "nll",
    "nll_matched_prior",
    "score_error",
    "asym",
    "nasym",
    "precision",
    "recall",
    "nfe_sampling",
    "nfe_likelihood",
)


class Run:
    """Everything built from a config, checked before any work starts.

    Raises:
        ValueError: a field outside what is allowed.
    """

    def __init__(self, config: ConfigDict, workdir: Path, device: torch.device | str = "cpu") -> None:
        _check(config)
        self.config, self.workdir, self.device = config, workdir, torch.device(device)
        if self.device.type == "mps":
            raise ValueError("--device=mps: the exact densities need double precision, which it does not have; use cpu")
        self.sde: SDE = get_sde(config)
        self.distribution: NoisedDistribution = get_distribution(config, self.sde)
        try:
            self.distribution.log_prob(torch.zeros(1, 2), torch.zeros(1))
        except ValueError as error:
            raise ValueError(f"model.sigma_min={config.model.sigma_min}: {error}") from None
        self.sampler = get_sampler(config, self.sde)
        self.likelihood = get_likelihood(config, self.sde)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(config.seed, "weights"))
            self.model: ScoreModel = create_score_model(config, self.sde).to(self.device)
        self.objective: Objective = get_objective(config, self.model)

    def generator(self, *purpose: int | str) -> torch.Generator:
        return torch.Generator().manual_seed(seed_from(self.config.seed, *purpose))

    def points(self, purpose: str, count: int) -> Tensor:
        """Fresh points (count, 2), float32."""
        return self.distribution.sample(count, self.generator(purpose)).float().to(self.device)

    @property
    def test_points(self) -> Tensor:
        return self.points("test points", self.config.data.num_test)

    def load(self) -> int:
        """Load the newest checkpoint; return its step."""
        store = CheckpointStore(self.workdir / "checkpoints", keep=1, milestone_every=0)
        state = store.load_latest()
        if state is None:
            raise CheckpointError(f"no checkpoint in {store.directory}: train first")
        load_state_dict_strictly(self.model, state["model"], store.path(state["step"]))
        return state["step"]

    def evaluation(self, step: int) -> dict[str, float] | None:
        """What ``evaluate`` wrote about the weights of ``step``; None if that is missing or damaged."""
        folder = self.workdir / "eval"
        try:
            record = json.loads((folder / "metrics.json").read_bytes())
            with open(folder / "arrays.npz", "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
                complete = len(arrays["samples"]) == self.config.data.num_test
            good = complete and record["step"] == step and all(name in record for name in METRICS)
        except (OSError, ValueError, LookupError, TypeError, BadZipFile):
            return None
        return record if good else None


def _check(config: ConfigDict) -> None:
    """Fields that no module of its own checks."""
    only = {"sampling.method": "ode", "training.continuous": True, "model.name": "mlp"}
    for name, value in only.items():
        section, field = name.split(".")
        if config[section][field] != value:
            raise ValueError(f"{name}={config[section][field]!r}: the examples know {value!r} only")
    at_least = {
        "data.num_train": 1,
        "data.num_test": NEIGHBOURS + 1,
        "training.batch_size": 1,
        "training.n_iters": 1,
        "training.log_freq": 1,
        "training.save_freq": 1,
        "sampling.num_steps": 1,
    }
    check_at_least(config.to_dict(), at_least)
    if config.training.batch_size > config.data.num_train:
        raise ValueError(
            f"training.batch_size={config.training.batch_size}: at most data.num_train={config.data.num_train}"
        )
    if config.training.batch_size % config.training.qc_stride:
        raise ValueError(
            f"training.qc_stride={config.training.qc_stride}: must divide "
            f"training.batch_size={config.training.batch_size}"
        )
    if config.seed < 0:
        raise ValueError(f"seed={config.seed}: at least 0")
    for name in ("lr", "grad_clip", "eps"):
        if not 0 < config.optim[name] < math.inf:
            raise ValueError(f"optim.{name}={config.optim[name]}: allowed are positive, finite numbers")
    for name in ("beta1", "beta2"):
        if not 0 <= config.optim[name] < 1:
            raise ValueError(f"optim.{name}={config.optim[name]}: allowed are numbers in [0, 1)")


# ---------------------------------------------------------------------------------------------------------------
# Training


def train(run: Run, update: Callable[[int], object] = lambda steps: None) -> None:
    """Train to ``config.training.n_iters`` steps, or go on from where an earlier call was stopped.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    config, optim = run.config, run.config.optim
    data = run.points("training points", config.data.num_train)
    batches_per_epoch = len(data) // config.training.batch_size
    order: dict[int, Tensor] = {}  # of the present epoch

    def loss(step: int) -> dict[str, Tensor]:
        epoch, position = divmod(step, batches_per_epoch)
        if epoch not in order:
            order.clear()
            order[epoch] = torch.randperm(len(data), generator=run.generator("order", epoch)).to(run.device)
        start = position * config.training.batch_size
        x0 = data[order[epoch][start : start + config.training.batch_size]]
        return run.objective(x0, run.generator("train", step), step=step)

    optimizer = torch.optim.Adam(
        run.model.parameters(), lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True
    )
    fit(
        run.model,
        loss,
        optimizer,
        run.workdir,
        n_iters=config.training.n_iters,
        grad_clip=optim.grad_clip,
        log_freq=config.training.log_freq,
        save_freq=config.training.save_freq,
        update=update,
    )


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


class Evaluation(NamedTuple):
    """What was measured: scalars by the names of ``METRICS``, curves (LEVELS,) against ``t``, samples (N, 2)."""

    metrics: dict[str, float]
    curves: dict[str, np.ndarray]
    samples: np.ndarray


def evaluate(run: Run, score: ScoreFunction, *, step: int, exact: bool = False) -> dict[str, float]:
    """Measure a score on the run's test points; write W/eval/metrics.json and W/eval/arrays.npz; return the former.

    ``step`` says which weights of the run the score has.

    If the score is the exact one, two more numbers belong to it: the ``entropy`` of the density at t = 1e-5, and its
    ``cross_entropy`` with the test points, their mean −ln p, which a perfect model with the exact prior scores. Both
    are in nats.
    """
    result = evaluate_score(run, score)
    record = {"step": step, **result.metrics}
    if exact:
        points, eps = run.test_points.double(), run.likelihood.eps
        t = torch.full((len(points),), eps, dtype=torch.float64, device=run.device)
        record["cross_entropy"] = -float(run.distribution.log_prob(points, t).mean())
        record["entropy"] = exact_entropy(run.distribution, eps)
    folder = run.workdir / "eval"
    write_atomically(folder / "arrays.npz", lambda file: np.savez(file, samples=result.samples, **result.curves))
    text = json.dumps(record, indent=1) + "\n"
    write_atomically(folder / "metrics.json", lambda file: file.write(text.encode()))
    return record


def evaluate_score(run: Run, score: ScoreFunction) -> Evaluation:
    """The metrics of the spec for any score on the run's fresh test points.

    * ``nll``: −ln p(x) in nats per point (both dimensions) by the probability-flow ODE with the paper's prior
      N(0, σ_max² I); ``nll_matched_prior``: the same with the exact density of x_1 instead, which that prior is not.
    * ``score_error``: mean over the noise levels and points of ½‖s − s*‖², s* the exact score of the same x_t.
    * ``asym``, ``nasym``: from the exact Jacobian at the same points.
    * ``precision``, ``recall`` of as many samples as there are test points, k = 3, in the plane itself.
    """
    points = run.test_points
    likelihood = run.likelihood(score, points, run.generator("likelihood"))
    ones = torch.ones(len(points), dtype=torch.float64, device=run.device)
    change = likelihood.log_prob - run.sde.prior_log_prob(likelihood.latent.double())
    matched = change + run.distribution.log_prob(likelihood.latent.double(), ones)

    levels = torch.arange(1, LEVELS + 1) / LEVELS
    curves: dict[str, np.ndarray] = {"t": levels.numpy()}
    per_level: dict[str, list[float]] = {"score_error": [], "asym": [], "nasym": []}
    for k, level in enumerate(levels):
        t = torch.full((len(points),), float(level), device=run.device)
        mean, std = run.sde.marginal(points, t)
        xt = mean + expand(std, points) * normal_like(points, run.generator("levels", k))
        result = asymmetry(score, xt, t)
        exact = run.distribution.score(xt, t)
        per_level["score_error"].append(float(0.5 * ((result.score - exact) ** 2).sum(1).mean()))
        per_level["asym"].append(float(result.asym.mean()))
        per_level["nasym"].append(float(result.nasym.mean()))
    curves |= {name: np.array(values) for name, values in per_level.items()}

    samples = run.sampler(score, points, run.generator("prior"))
    precision, recall = precision_recall(points.cpu().numpy(), samples.x.cpu().numpy(), k=NEIGHBOURS)
    metrics = {
        "nll": -float(likelihood.log_prob.mean()),
        "nll_matched_prior": -float(matched.mean()),
        **{name: float(np.mean(values)) for name, values in per_level.items()},
        "precision": precision,
        "recall": recall,
        "nfe_sampling": samples.nfe,
        "nfe_likelihood": likelihood.nfe,
    }
    return Evaluation(metrics, curves, samples.x.cpu().numpy())


def exact_entropy(
    distribution: NoisedDistribution, t: float, *, half_width: float = 10.0, spacing: float = 0.1
) -> float:
    """Differential entropy of x_t in nats: −∫ p ln p by the trapezoidal rule on a grid.

    Of a smooth density that vanishes at the border the rule converges faster than any power of the spacing, once that
    is no larger than σ_t.
    """
    axis = torch.arange(-half_width, half_width + spacing / 2, spacing, dtype=torch.float64)
    total = 0.0
    for x1 in axis:
        x = torch.stack([x1.expand(len(axis)), axis], dim=1)
        log_p = distribution.log_prob(x, torch.full((len(axis),), t, dtype=torch.float64))
        total -= float((log_p.exp() * log_p).sum())
    return total * spacing**2
