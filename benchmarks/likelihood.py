"""Log-likelihood of test images under a trained model: network runs, time and error of one solver after another.

python -m benchmarks.likelihood --config=configs/digits.py:u --workdir=runs/digits/u [--images=64] [--rounds=3]

``paper`` is our own writing of what the public code does: scipy's RK45 on host arrays, one step size for the batch,
and the network run twice at every point, for the drift and for the divergence. The error is that against a solution in
float64 to a tolerance of 1e-7, for the same images, dequantisation and probes.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from run_evaluation import load_for_evaluation, run_for_evaluation, spread
from run_setup import InvalidRun, Run, Runtime, check_compile, checked
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.clock import clock_of
from experiment.command_line import parse_flags
from experiment.randomness import SampleGenerators, rademacher_like
from likelihood import LIKELIHOOD_EPS, LikelihoodEvaluator, bits_per_dim
from sde_lib import SDE, ScoreFunction

TIGHT = 1e-7
ALLOWED = 0.005
"""In bits/dim, of every image: what the comparison is about."""
PAPER = "paper: scipy over t, 1e-5"
PAPERS = {PAPER: (1e-5, 1e-5), "paper: scipy over t, 1e-3 and 1e-5": (1e-3, 1e-5)}
"""rtol and atol: of the public code, and of the paper."""
VARIANTS: dict[str, dict] = {
    "rk45 over t, 1e-5": {"solver": "rk45", "rtol": 1e-5, "atol": 1e-5},
    "rk45 over t, 1e-3 and 1e-5": {"solver": "rk45", "rtol": 1e-3, "atol": 1e-5},
    "rk45 over ln(σ/α), 1e-3": {"solver": "rk45", "time": "log_ratio", "rtol": 1e-3, "atol": 1e-3},
    **{
        f"heun over ln(σ/α), {steps} steps": {"solver": "heun", "time": "log_ratio", "num_steps": steps}
        for steps in (80, 160)
    },
    **{
        f"adams over ln(σ/α), {steps} steps": {"solver": "adams", "time": "log_ratio", "num_steps": steps}
        for steps in (40, 80, 160, 240, 320)
    },
}


class Solution(NamedTuple):
    """Bits per dimension (B,) and network runs per image."""

    bits: Tensor
    runs: float


def paper_log_prob(
    sde: SDE, score: ScoreFunction, x: Tensor, probe: Tensor, *, rtol: float, atol: float
) -> tuple[Tensor, float]:
    """Log-densities (B,), in nats, of data x (B, ...) and network runs per image, as the public code has them."""
    from scipy.integrate import solve_ivp

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


class Problem:
    """Test images of a run, evenly spaced, dequantised, with one probe each; and their solutions."""

    def __init__(self, run: Run, num_images: int) -> None:
        if not 1 <= num_images <= len(run.test_data):
            raise ValueError(f"--images={num_images}: allowed are 1 to {len(run.test_data)}")
        self.run = run
        self.indices = spread(torch.arange(num_images), num_images, len(run.test_data)).tolist()
        generator = self.generators("dequantisation")
        images, _ = run.test_data.batch(self.indices)
        self.x = run.to_model(images, generator, dequantize=True).to(run.device)
        self.model = run.ema.model.eval().requires_grad_(False)

    def generators(self, purpose: str) -> SampleGenerators:
        return SampleGenerators((self.run.config.seed, purpose), self.indices)

    def bits(self, log_prob: Tensor) -> Tensor:
        levels, centered = self.run.train_data.num_levels, self.run.config.data.centered
        return bits_per_dim(log_prob.double().cpu(), self.run.dimension, num_levels=levels, centered=centered)

    def score(self, model: nn.Module, autocast: bool) -> ScoreFunction:
        """The unconditional score, in the dtype of x, in the precision asked for or that of the model."""

        def score(x: Tensor, t: Tensor) -> Tensor:
            labels = torch.full((len(x),), self.run.num_classes, device=x.device) if self.run.num_classes else None
            with self.run.accelerator.autocast() if autocast else contextlib.nullcontext():
                return model(x, t, labels).to(x.dtype)

        return score

    def paper(self, rtol: float, atol: float) -> Solution:
        probe = rademacher_like(self.x, self.generators("probe"))
        score = self.score(self.model, autocast=True)
        log_prob, runs = paper_log_prob(self.run.sde, score, self.x, probe, rtol=rtol, atol=atol)
        return Solution(self.bits(log_prob), runs)

    def ours(self, model: nn.Module, **settings) -> Solution:
        evaluate = LikelihoodEvaluator(self.run.sde, **settings)
        result = evaluate(self.score(model, autocast=True), self.x, self.generators("probe"))
        return Solution(self.bits(result.log_prob), result.nfe)

    def tight(self) -> Tensor:
        """Bits per dimension (B,), in float64, with the probes of the others."""
        device = "cpu" if self.run.device.type == "mps" else self.run.device  # which has no float64
        model = copy.deepcopy(self.model).to(device, torch.float64)
        x, probe = self.x.to(device), rademacher_like(self.x, self.generators("probe")).to(device)
        evaluate = LikelihoodEvaluator(self.run.sde, rtol=TIGHT, atol=TIGHT)
        result = evaluate.with_probes(self.score(model, autocast=False), x.double(), [probe.double()])
        return self.bits(result.log_prob)


def compare(
    config: ConfigDict, workdir: str, runtime: Runtime, num_images: int, rounds: int, compiled: bool = False
) -> str:
    """The table of all variants, for the moving average of the newest checkpoint in ``workdir``.

    Args:
        config, workdir, runtime: of the run; the precision is that of the network in all variants.
        num_images: test images, solved as one batch.
        rounds: how often every variant is timed; the medians count.
        compiled: whether our variants run a compiled network.

    Raises:
        InvalidRun: bad config, working directory or number.
    """
    with checked():
        if rounds < 1:
            raise ValueError(f"--rounds={rounds}: at least 1")
        run = run_for_evaluation(config, workdir, runtime, None)
        if compiled:
            check_compile(run.device, config.model.parameterization)
        step = load_for_evaluation(run, None)
        problem = Problem(run, num_images)
    model = torch.compile(problem.model) if compiled else problem.model
    variants: dict[str, Callable[[], Solution]] = {
        name: lambda tolerances=tolerances: problem.paper(*tolerances) for name, tolerances in PAPERS.items()
    }
    variants |= {name: lambda settings=settings: problem.ours(model, **settings) for name, settings in VARIANTS.items()}

    clock, kind = clock_of(run.device)
    solutions: dict[str, Solution] = {}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    with tqdm(total=1 + rounds * len(variants), unit="solution") as bar:
        exact = problem.tight()
        bar.update()
        if compiled:
            for name in VARIANTS:  # compiled for each number of images that is asked for
                variants[name]()
        for _ in range(rounds):
            for name, solve in variants.items():
                started = clock()
                solutions[name] = solve()
                seconds[name].append(clock() - started)
                bar.update()
    median = {name: statistics.median(times) for name, times in seconds.items()}
    lines = [
        f"{config.data.dataset}, step {step}, {num_images} images, {exact.mean():.3f} bits/dim, {run.device}, "
        f"{runtime.precision}{', ours compiled' if compiled else ''}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, medians of {rounds}, {kind}\n",
        f"| solver | network runs | seconds per image | paper's time over it | largest error, bits/dim | rms | mean "
        f"| images within {ALLOWED} |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (bits, runs) in solutions.items():
        error = bits - exact
        within = (error.abs() <= ALLOWED).double().mean()
        lines.append(
            f"| {name} | {runs:.0f} | {median[name] / num_images:.4f} | {median[PAPER] / median[name]:.2f} | "
            f"{error.abs().max():.4f} | {error.square().mean().sqrt():.4f} | {error.mean():+.4f} | {within:.0%} |"
        )
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        runtime = Runtime(given.device, given.precision)
        print(compare(given.config, given.workdir, runtime, given.images, given.rounds, given.compile))
    except InvalidRun as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Of the run.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Of the run, trained.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16, of the network; the exact solution is in float64.")
    flags.DEFINE_bool("compile", False, "Compile the network of our variants.")
    flags.DEFINE_integer("images", 64, "Test images, solved as one batch.")
    flags.DEFINE_integer("rounds", 3, "Times that every variant is run; the medians are printed.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
