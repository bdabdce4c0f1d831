"""Log-likelihood of test images under a trained model: network runs, time and error of one solver after another.

python -m benchmarks.likelihood --workdir=runs/digits/u [--images=64] [--rounds=3]

``paper`` is our own writing of what the public code does: scipy's RK45 on host arrays, one step size for the batch,
and the network run twice at every point, for the drift and for the divergence. The error is that against a solution in
float64 to a tolerance of 1e-7, for the same images, dequantisation and probes.
"""

from __future__ import annotations

import copy
import math
from functools import partial

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

import run_lib
from benchmarks.measure import conditions, in_turn
from data import evenly_spaced
from experiment.command_line import command
from experiment.randomness import SampleGenerators, rademacher_like
from experiment.results import markdown_table
from likelihood import LIKELIHOOD_EPS, LikelihoodEvaluator
from sde_lib import SDE, ScoreFunction

TIGHT = 1e-7
PAPERS = {"paper: scipy over t, 1e-5": (1e-5, 1e-5), "paper: scipy over t, 1e-3 and 1e-5": (1e-3, 1e-5)}
"""rtol and atol: of the public code, and of the paper."""
VARIANTS: dict[str, dict] = {
    "rk45 over t, 1e-5": {"solver": "rk45", "rtol": 1e-5, "atol": 1e-5},
    "rk45 over t, 1e-3 and 1e-5": {"solver": "rk45", "rtol": 1e-3, "atol": 1e-5},
    "rk45 over ln(σ/α), 1e-3": {"solver": "rk45", "time": "log_ratio", "rtol": 1e-3, "atol": 1e-3},
} | {
    f"{solver} over ln(σ/α), {steps} steps": {"solver": solver, "time": "log_ratio", "num_steps": steps}
    for solver, counts in (("heun", (80, 160)), ("adams", (40, 80, 160, 240, 320)))
    for steps in counts
}
HEADER = ("solver", "network runs", "seconds per image", "paper's time over it", "largest error, bits/dim", "rms")
HEADER += ("mean", "images within 0.005")


def run(workdir: str, *, images: int = 64, rounds: int = 3, device: str = "cpu") -> str:
    """Solve with every solver, under the moving average of the newest checkpoint.

    Args:
        workdir: Folder of the run.
        images: Test images, solved as one batch.
        rounds: Of all solvers in turn; median times are printed.
        device: auto, cpu, cuda or mps.
    """
    runtime = run_lib.Runtime(device)
    score = run_lib.load(workdir, device=runtime.torch_device)
    _, test = run_lib.load_data(score.config, runtime)
    if not 1 <= images <= len(test):
        raise ValueError(f"--images={images}: allowed are 1 to {len(test)}")
    indices = evenly_spaced(range(images), images, len(test))
    noise, probes = (SampleGenerators((score.config.seed, purpose), indices) for purpose in ("dequantisation", "probe"))
    x = score.images.to_model(test.batch(indices)[0], noise, dequantize=True).to(score.device)
    probe = rademacher_like(x, probes)

    def paper(tolerances: tuple[float, float], _: int) -> tuple[Tensor, float]:
        return paper_log_prob(score.sde, score, x, probe, *tolerances)

    def ours(settings: dict, _: int = 0, score=score, x=x, probe=probe) -> tuple[Tensor, float]:
        log_prob, _, runs = LikelihoodEvaluator(score.sde, **settings).with_probes(score, x, [probe])
        return log_prob.double().cpu(), runs

    variants = {name: partial(paper, tolerances) for name, tolerances in PAPERS.items()}
    variants |= {name: partial(ours, settings) for name, settings in VARIANTS.items()}
    timed = in_turn(variants, rounds, score.device, warm_up=0)
    device = "cpu" if x.device.type == "mps" else x.device  # MPS has no float64
    model = copy.deepcopy(score.model).to(device, torch.float64)
    precise = run_lib.TrainedScore(score.config, model, score.images, score.step)
    exact, _ = ours({"rtol": TIGHT, "atol": TIGHT}, 0, precise, *(v.to(device, torch.float64) for v in (x, probe)))
    rows, paper_seconds = [], timed[next(iter(PAPERS))].median
    for name, found in timed.items():
        log_prob, runs = found.results[-1]
        error = (exact - log_prob) / (score.images.dimension * math.log(2))
        row = (name, f"{runs:.0f}", f"{found.median / images:.4f}", f"{paper_seconds / found.median:.2f}")
        row += (f"{error.abs().max():.4f}", f"{error.square().mean().sqrt():.4f}", f"{error.mean():+.4f}")
        rows.append((*row, f"{(error.abs() <= 0.005).double().mean():.0%}"))
    title = f"{score.config.data.dataset}, step {score.step}, {images} images, "
    return f"{title}{conditions(score.device)}\n{markdown_table(HEADER, rows)}"


def paper_log_prob(
    sde: SDE, score: ScoreFunction, x: Tensor, probe: Tensor, rtol: float, atol: float
) -> tuple[Tensor, float]:
    """Log-densities (B,), in nats, of data x (B, ...) and network runs per image, as the public code has them."""
    runs, size = 0, x.numel()

    def velocity(position: Tensor, t: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return sde.reverse(score, probability_flow=True).drift(position, t)

    def host_velocity(t: float, state: np.ndarray) -> np.ndarray:
        position = torch.from_numpy(state[:size].reshape(x.shape)).to(x)
        times = torch.full((len(x),), t, dtype=x.dtype, device=x.device)
        with torch.no_grad():
            drift = velocity(position, times)
        with torch.enable_grad():
            position.requires_grad_()
            (product,) = torch.autograd.grad((velocity(position, times) * probe).sum(), position)
        divergence = (product * probe).flatten(1).sum(1)
        return np.concatenate([part.detach().cpu().double().numpy().ravel() for part in (drift, divergence)])

    start = np.concatenate([x.cpu().double().numpy().ravel(), np.zeros(len(x))])
    solution = solve_ivp(host_velocity, (LIKELIHOOD_EPS, sde.end_time), start, rtol=rtol, atol=atol, method="RK45")
    end = torch.from_numpy(solution.y[:, -1])
    return sde.prior_log_prob(end[:size].reshape(x.shape)) + end[size:], runs


if __name__ == "__main__":
    command(run)
