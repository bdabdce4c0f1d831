"""What is measured of one model: by ``run_lib.evaluate``, and in a few lines more.

Test images, their dequantisation, noise, probes and latents are the same for all models and seeds.
"""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path

import torch
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from data.sets import evenly_spaced
from experiment.files import read_arrays, read_json, write_json
from experiment.randomness import SampleGenerators, normal_like
from experiment.runtime import Runtime
from likelihood import LIKELIHOOD_EPS, bits_per_dim
from losses import denoising_score_matching
from run_lib import TrainedScore
from sampling import edm_times
from sde_lib import expand

SAMPLERS = {
    "pc": dict(method="pc", num_steps=50),
    "ode": dict(method="ode", solver="rk45", rtol=1e-2, atol=1e-2),
    "few_step": dict(method="few_step", solver="dpmpp_2m_sde", num_steps=19),
}
LEVELS = 64
"""Intervals in ln σ between the noise levels of the test loss."""
PATHS, PATH_STEPS = 64, 200
CURVE_LEVELS = 6
"""Noise levels of the circulation and of the inconsistency, evenly spaced in ln σ between those of the test loss."""
POINTS = 12
"""Of the score on each side of a triangle: midpoints of equal parts."""
DRAWS, DRAW_STEPS = 4, 16
"""Of the reverse process from each noised image, down to half its noise; each draw is two, of opposite noise."""


def measure(config: ConfigDict, checkpoint: Path, folder: Path, runtime: Runtime) -> dict[str, object]:
    """All measures of a checkpoint of ours, from VE; kept in ``folder/measures.json``."""
    path = folder / "measures.json"
    try:
        return read_json(path, checksum=True)
    except (OSError, ValueError):  # there is none yet, or it is damaged
        pass
    config = config.copy_and_resolve_references()
    row: dict[str, object] = {}
    for name, options in SAMPLERS.items():
        config.sampling.update(options)
        found = run_lib.evaluate(config, folder, runtime, checkpoint)
        row |= {f"fid_{name}": found["fid"], f"nfe_{name}": found["nfe_sampling"]}
        config.eval.update(enable_bpd=False, enable_asymmetry=False)  # done, and kept
    row |= {"nll": found["nll_bits_per_dim"], "asym": found["asym"], "nasym": found["nasym"]}
    arrays = read_arrays(folder / "eval" / "asymmetry.npz")
    row |= {f"{name}_by_t": arrays[name].tolist() for name in ("t", "asym", "nasym")}
    score = run_lib.load(checkpoint, device=str(runtime.torch_device), config=config)
    images = test_images(config)
    row |= denoising_measures(score, images, config.eval.batch_size) | {"path_excess": path_excess(score)}
    row |= curve_measures(score, images)
    row["bound_gap"] = row["bound"] - row["nll"]
    write_json(path, row, checksum=True)
    shutil.rmtree(folder / "eval" / "stages")  # samples and features, of which nothing more is needed
    return row


def test_images(config: ConfigDict) -> Tensor:
    """The grey levels (N, C, H, W) of those test images whose likelihood is measured."""
    data = run_lib.load_data(config)[1]
    count = min(config.eval.nll_images or len(data), len(data))
    return data.batch(evenly_spaced(range(count), count, len(data)))[0]


@torch.no_grad()
def denoising_measures(score: TrainedScore, levels: Tensor, batch_size: int) -> dict[str, object]:
    """The test loss ½‖σs + z‖² by noise level, and a bound of the negative log-likelihood by the reverse SDE.

    For VE, with x_σ = x + σz and ε the noise at which the reverse process ends, in nats,

        −E ln p(x_ε) ≤ −E ln π(x_T) + ∫ (E‖σs + z‖² − D) d ln σ,

    by the trapezoidal rule. It is of test images with noise ε, ``bound`` in bits/dim of them; the likelihood of the ODE
    is of images without it (Song, Durkan, Murray, Ermon, NeurIPS 2021, Theorem 1).
    """
    sde, ends = score.sde, torch.tensor([LIKELIHOOD_EPS, score.sde.end_time], dtype=torch.float64)
    first, last = sde.std(ends).log().tolist()
    grid = torch.linspace(first, last, LEVELS + 1, dtype=torch.float64)
    times = sde.time_at_noise_ratio(grid.exp()).clamp(*ends.tolist()).float().to(score.device)
    losses, prior = torch.zeros(LEVELS + 1, dtype=torch.float64), 0.0
    for start in range(0, len(levels), batch_size):
        batch = levels[start : start + batch_size]
        generator = SampleGenerators((score.config.seed, "test loss by level"), range(start, start + len(batch)))
        x0 = score.images.to_model(batch, generator, dequantize=True).to(score.device)
        for k, time in enumerate(times):
            t = time.expand(len(x0))
            loss = sde.std(t) ** 2 * denoising_score_matching(score, sde, x0, t, generator)
            losses[k] += float(loss.double().sum()) / len(levels)
        mean, std = sde.marginal(x0, t)
        prior -= float(sde.prior_log_prob(mean + expand(std, x0) * normal_like(x0, generator)).double().sum())
    dimension, log2_unit = math.prod(score.shape), score.images.log2_unit
    nats = prior / len(levels) + float(torch.trapezoid(2 * losses - dimension, grid))
    return {
        "bound": float(bits_per_dim(torch.tensor(-nats, dtype=torch.float64), dimension, log2_unit)),
        "dsm": float(losses.mean()),
        "sigma": grid.exp().tolist(),
        "dsm_by_sigma": losses.tolist(),
    }


@torch.no_grad()
def path_excess(score: TrainedScore) -> float:
    """Length over chord, minus 1, of the paths of the probability flow from the prior: 0 where they are straight.

    The mean over paths of Euler's steps of dx/dσ = −σ s, for VE.
    """
    times = edm_times(score.sde, PATH_STEPS).float().to(score.device)
    sigma = score.sde.std(times)
    generator = SampleGenerators((score.config.seed, "paths"), range(PATHS))
    x = start = score.sde.prior_std * normal_like(torch.zeros((PATHS, *score.shape), device=score.device), generator)
    length = torch.zeros(PATHS, device=score.device)
    for t, now, after in zip(times[:-1], sigma[:-1], sigma[1:], strict=True):
        step = (now - after) * now * score(x, t.expand(PATHS))
        x, length = x + step, length + step.flatten(1).norm(dim=1)
    return float((length / (x - start).flatten(1).norm(dim=1)).mean()) - 1


@torch.no_grad()
def curve_measures(score: TrainedScore, levels: Tensor) -> dict[str, object]:
    """The circulation of the score along closed curves, and the inconsistency of its denoiser, by noise level.

    Both are of noised test images x, with VE, and are 0 for the score of a distribution: that of data with noise is a
    gradient, and its denoiser D(x, σ) = x + σ²s is a martingale of the reverse process (Daras, Dagan, Dimakis,
    Daskalakis, NeurIPS 2023). A field with both properties is the score of a diffusion.

    * ``circulation``: |∮ s·dx| / ∮ |s·dx|, sums over triangles whose corners are the images; ``circulation_nats`` is
      the mean of |∮ s·dx|, the ambiguity of ln p along two paths between images.
    * ``inconsistency``: ‖E D(x', σ/2) − D(x, σ)‖² / (σ² dim), x' being where the reverse SDE, by Euler's steps, leads
      from x; the square of the mean over draws, less its variance, so that noise does not count.
    """
    sde, device = score.sde, score.device
    ends = torch.tensor([LIKELIHOOD_EPS, sde.end_time], dtype=torch.float64)
    sigmas = torch.linspace(*sde.std(ends).log().tolist(), CURVE_LEVELS + 2, dtype=torch.float64).exp()[1:-1]
    generator = SampleGenerators((score.config.seed, "curves"), range(count := min(PATHS, len(levels))))
    x0 = score.images.to_model(levels[:count], generator, dequantize=True).to(device)

    def at(x: Tensor, sigma: Tensor) -> Tensor:
        return score(x, sde.time_at_noise_ratio(sigma).float().to(device).expand(len(x)))

    found: dict[str, list[float]] = {"circulation": [], "circulation_nats": [], "inconsistency": []}
    for sigma in sigmas:
        x = x0 + float(sigma) * normal_like(x0, generator)
        corners = [x, x.roll(-1, 0), x.roll(-2, 0)]
        work, path = torch.zeros(count, device=device), torch.zeros(count, device=device)
        for start, end in zip(corners, [*corners[1:], x], strict=True):
            for k in range(POINTS):
                along = (at(start + (k + 0.5) / POINTS * (end - start), sigma) * (end - start)).flatten(1).sum(
                    1
                ) / POINTS
                work, path = work + along, path + along.abs()
        found["circulation"].append(float(work.abs().sum() / path.sum()))
        found["circulation_nats"].append(float(work.abs().mean()))

        before = x + float(sigma) ** 2 * at(x, sigma)
        after = torch.zeros((DRAWS, *x.shape), device=device)
        for draw in range(DRAWS):
            y = torch.cat((x, x))
            for now, then in pairwise(sigma * 2 ** -torch.linspace(0, 1, DRAW_STEPS + 1, dtype=torch.float64)):
                less, z = float(now**2 - then**2), normal_like(x, generator)
                y = y + less * at(y, now) + less**0.5 * torch.cat((z, -z))
            after[draw] = torch.stack((y + float(then) ** 2 * at(y, then)).chunk(2)).mean(0)
        squared = (after.mean(0) - before) ** 2 - after.var(0) / DRAWS
        found["inconsistency"].append(float(squared.mean() / sigma**2))
    return (
        {name: float(torch.tensor(of).mean()) for name, of in found.items()}
        | {f"{name}_by_sigma": of for name, of in found.items()}
        | {"curve_sigma": sigmas.tolist()}
    )
