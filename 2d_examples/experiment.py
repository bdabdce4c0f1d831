"""One run of the 2-D examples: train one model with one seed, and measure it on fresh points.

Data, noise and initial weights are keyed by the seed alone, so that U and QC of one seed start from the same weights
and see the same points and noise: their differences are paired.
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from checkpoints import CheckpointError, CheckpointStore, load_state_dict_strictly
from conservativeness import asymmetry
from evaluation import neighbourhood_metrics
from exact.distributions import TWO_DIMENSIONAL, NoisedDistribution, entropy
from experiment.files import claim, read_arrays, read_json, write_arrays, write_json
from experiment.jobs import Update
from experiment.randomness import normal_like, seed_from
from experiment.registry import resolve
from experiment.runtime import Runtime
from likelihood import LIKELIHOOD_EPS, LikelihoodEvaluator
from losses import make_objective
from models import ScoreModel, make_network, make_score_model
from sampling import make_sampler
from sde_lib import SDE, ScoreFunction, expand, make_sde
from training import Trainer

from .configs import check as check_config

LEVELS = 10
"""Asym and the score error are measured at times t = k/10, k = 1 … 10."""
NEIGHBOURS = 3  # of precision and recall


def check(config: ConfigDict) -> None:
    """Raise a ValueError that names the field unless everything can be built from the config."""
    check_config(config)
    sde, distribution = forward_process(config), noised_distribution(config)
    try:
        distribution.log_prob(torch.zeros(1, 2), torch.zeros(1))
    except ValueError as error:
        raise ValueError(f"model.sigma_min={config.model.sigma_min}: {error}") from None
    make_sampler(sde, config.sampling, num_scales=0, continuous=True)
    LikelihoodEvaluator(sde, **config.likelihood)
    make_objective(initial_model(config), config.training)


def forward_process(config: ConfigDict) -> SDE:
    return make_sde(config.training.sde, "", config.model)


def claim_run(config: ConfigDict, workdir: Path, device: str) -> None:
    """Refuse a folder that belongs to anything but this run."""
    claim(workdir, "2d_examples run", {**json.loads(config.to_json()), "device": device})


def generator(config: ConfigDict, *purpose: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(seed_from(config.seed, *purpose))


def noised_distribution(config: ConfigDict) -> NoisedDistribution:
    return resolve(config.data.dataset, TWO_DIMENSIONAL, "data.dataset")(forward_process(config))


def points(config: ConfigDict, purpose: str, count: int) -> Tensor:
    """Points of the data (count, 2), float32."""
    return noised_distribution(config).sample(count, generator(config, purpose)).float()


def initial_model(config: ConfigDict) -> ScoreModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(config.seed, "weights"))
        network = make_network(config.model.name, config.model, dimension=2)
        options = {name: config.model[name] for name in ("parameterization", "scale_by_sigma")}
        return make_score_model(forward_process(config), network, **options)


def trained_model(config: ConfigDict, workdir: Path) -> tuple[ScoreModel, int]:
    """The model of the newest checkpoint, and its step.

    Raises:
        CheckpointError: there is none.
    """
    store = CheckpointStore(workdir / "checkpoints")
    state = store.load_latest()
    if state is None:
        raise CheckpointError(f"no checkpoint in {store.directory}: train first")
    model = initial_model(config)
    load_state_dict_strictly(model, state["model"], store.path(state["step"]))
    return model, state["step"]


def trainer(config: ConfigDict, workdir: Path, runtime: Runtime) -> Trainer:
    """Trains to ``config.training.n_iters`` steps, or goes on from where an earlier call was stopped."""
    training, optim, device = config.training, config.optim, runtime.torch_device
    model = initial_model(config).to(device)
    data = points(config, "training points", config.data.num_train).to(device)
    batches_per_epoch = len(data) // training.batch_size

    @lru_cache(maxsize=1)
    def order(epoch: int) -> Tensor:
        return torch.randperm(len(data), generator=generator(config, "order", epoch)).to(device)

    def loss(objective: nn.Module, step: int, positions: range) -> dict[str, Tensor]:
        epoch, batch = divmod(step, batches_per_epoch)
        x0 = data[order(epoch)[batch * training.batch_size : (batch + 1) * training.batch_size]]
        return objective(x0, generator(config, "train", step), step=step)

    betas = (optim.beta1, optim.beta2)
    optimizer = torch.optim.Adam(model.parameters(), lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
    options = {name: training[name] for name in ("n_iters", "log_freq", "save_freq")}
    options |= {"objective": make_objective(model, training), "grad_clip": optim.grad_clip, "runtime": runtime}
    return Trainer(model, optimizer, loss, workdir, **options)


def evaluate_score(config: ConfigDict, score: ScoreFunction, device: str = "cpu") -> tuple[dict, dict]:
    """The metrics of any score on fresh test points.

    * ``nll``: −ln p(x) in nats per point (both dimensions) by the probability-flow ODE with the paper's prior
      N(0, σ_max² I); ``nll_matched_prior``: the same with the exact density of x_1 instead, which that prior is not.
    * ``score_error``: mean over the noise levels and points of ½‖s − s*‖², s* the exact score of the same x_t.
    * ``asym``, ``nasym``: from the exact Jacobian at the same points.
    * ``precision``, ``recall`` of as many samples as there are test points, k = 3, in the plane itself.

    Returns:
        These numbers, and arrays: ``samples`` (N, 2); ``score_error``, ``asym``, ``nasym`` (LEVELS,) at times ``t``.
    """
    sde, distribution = forward_process(config), noised_distribution(config)
    x0 = points(config, "test points", config.data.num_test).to(device)
    likelihood = LikelihoodEvaluator(sde, **config.likelihood)(score, x0, generator(config, "likelihood"))
    latent = likelihood.latent.double()
    change = likelihood.log_prob - sde.prior_log_prob(latent)
    matched = change + distribution.log_prob(latent, torch.ones(len(x0), dtype=torch.float64, device=device))

    levels = torch.arange(1, LEVELS + 1) / LEVELS
    per_level: dict[str, list[float]] = {"score_error": [], "asym": [], "nasym": []}
    for k, level in enumerate(levels):
        t = torch.full((len(x0),), float(level), device=device)
        mean, std = sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator(config, "levels", k))
        result = asymmetry(score, xt, t)
        error = 0.5 * ((result.score - distribution.score(xt, t)) ** 2).sum(1)
        for values, value in zip(per_level.values(), (error, result.asym, result.nasym), strict=True):
            values.append(float(value.mean()))

    sampler = make_sampler(sde, config.sampling, num_scales=0, continuous=True)
    samples = sampler(score, x0, generator(config, "prior"))
    precision, recall, *_ = neighbourhood_metrics(x0.cpu().numpy(), samples.x.cpu().numpy(), k=NEIGHBOURS)
    metrics = {
        "nll": -float(likelihood.log_prob.mean()),
        "nll_matched_prior": -float(matched.mean()),
        **{name: float(np.mean(values)) for name, values in per_level.items()},
        "precision": precision,
        "recall": recall,
        "nfe_sampling": samples.nfe,
        "nfe_likelihood": likelihood.nfe,
    }
    curves = {name: np.array(values) for name, values in per_level.items()}
    return metrics, {"t": levels.numpy(), **curves, "samples": samples.x.cpu().numpy()}


def evaluate(config: ConfigDict, workdir: Path, model: ScoreModel | None, step: int, device: str = "cpu") -> dict:
    """Measure a model with the weights of ``step``; write W/eval/metrics.json and W/eval/arrays.npz; return the former.

    ``model=None`` is the exact score. To its metrics belong, in nats, ``entropy``, of the density at t = 1e-5, and its
    ``cross_entropy`` with the test points, their mean −ln p, which a perfect model with the exact prior scores.
    """
    distribution = noised_distribution(config)
    metrics, arrays = evaluate_score(config, distribution.score if model is None else model, device)
    record = {"step": step, **metrics}
    if model is None:
        eps = LIKELIHOOD_EPS
        x0 = points(config, "test points", config.data.num_test).double()
        log_prob = distribution.log_prob(x0, torch.full((len(x0),), eps, dtype=torch.float64))
        record |= {"cross_entropy": -float(log_prob.mean()), "entropy": entropy(distribution, eps)}
    write_arrays(workdir / "eval" / "arrays.npz", **arrays)
    write_json(workdir / "eval" / "metrics.json", record, checksum=True)
    return record


def train_and_evaluate(config: ConfigDict, workdir: Path, device: str, exact: bool, update: Update) -> dict:
    """Metrics of a trained model, or of the exact score; what an earlier call has finished is taken from its files."""
    claim_run(config, workdir, device)
    if not exact:
        trainer(config, workdir, Runtime(device, on_progress=update)).run()
    step = 0 if exact else config.training.n_iters
    try:
        record = read_json(workdir / "eval" / "metrics.json", checksum=True)
        if record["step"] == step and read_arrays(workdir / "eval" / "arrays.npz"):
            return record
    except (OSError, ValueError, KeyError):
        pass  # there is none yet, or it is damaged
    model = None if exact else trained_model(config, workdir)[0].to(device)
    return evaluate(config, workdir, model, step=step, device=device)
