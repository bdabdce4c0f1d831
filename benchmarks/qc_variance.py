"""Variance of the quasi-conservative term's gradient, per unit of time: the paper's estimator against the default.

python -m benchmarks.qc_variance --workdir=runs/digits/u [--probes=100]

Weights, images and noise stay the same; only the probe changes. The variance is that of the gradient over the probes,
summed over all parameters; to equal accuracy of the mean, time goes as variance × time. Fields are s(x) = Wx with a
random matrix W of NAsym 1e-3, and the network of a run. ``paper`` is the public code's way (benchmarks/public_code.py).
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

import run_lib
from benchmarks.measure import conditions, in_turn
from benchmarks.public_code import in_public_style, qc_backward
from conservativeness import EXACT_MAX_DIMENSION, asymmetry
from data import Split, evenly_spaced
from experiment.command_line import command
from experiment.randomness import SampleGenerators, normal_like, rademacher_like
from experiment.results import markdown_table
from sde_lib import expand

LINEAR_DIMENSION = 256
TIMES = (None, 0.1, 0.75)  # of images: evenly spaced, or one
PAPER, DEFAULT = "paper: trace", "antisymmetric (default)"
HEADER = (
    *("field", "NAsym", "estimator", "ms per gradient", "standard deviation / norm of the mean"),
    *("paper's variance over it", "paper's variance × time over it"),
)


class Batch(NamedTuple):
    """Perturbed images x (B, ...), times t (B,) and weights σ² (B,) of the term, and the seed of its probes."""

    x: Tensor
    t: Tensor
    weight: Tensor
    seed: int


def run(workdir: str, *, batch_size: int = 32, probes: int = 100, device: str = "cpu") -> str:
    """Measure gradients of the moving average of the newest checkpoint.

    Args:
        workdir: Folder of the run.
        batch_size: Images.
        probes: Gradients of every variant; at least 10, for a standard error that means something.
        device: auto, cpu, cuda or mps.
    """
    runtime = run_lib.Runtime(device)
    score = run_lib.load(workdir, device=runtime.torch_device)
    if probes < 10:
        raise ValueError(f"--probes={probes}: at least 10")
    _, test = run_lib.load_data(score.config, runtime)
    if not 1 <= batch_size <= len(test):
        raise ValueError(f"--batch_size={batch_size}: allowed are 1 to {len(test)}")
    dataset, seed, ones = score.config.data.dataset, score.config.seed, torch.ones(batch_size, device=score.device)
    field = LinearField(LINEAR_DIMENSION, 1e-3**0.5, seed).to(score.device)
    points = Batch(ones[:, None].repeat(1, LINEAR_DIMENSION), ones, ones, seed)  # which do not matter
    rows = compare(f"linear, {LINEAR_DIMENSION} dimensions", field, field, points, probes)
    # A new one, which knows what is trained.
    model = run_lib.build_score_model(score.config, score.sde, score.images).to(score.device).eval()
    model.load_state_dict(score.model.state_dict())
    for time in TIMES:
        title = f"{dataset}, {'all times' if time is None else f't = {time:g}'}"
        batch = make_batch(score, test, batch_size, time)
        rows += compare(title, model, in_public_style(model), batch, probes)
    text = f"{dataset}, step {score.step}, {batch_size} images, {conditions(score.device)}"
    return f"{text}\n{markdown_table(HEADER, rows)}"


class LinearField(nn.Linear):
    """s(x) = Wx with W = S + rN, random parts of about the same norm, symmetric and not: NAsym = r²/(1 + r²)."""

    def __init__(self, dimension: int, r: float, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(dimension, dimension, bias=False, dtype=dtype)
        noise = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.weight.data.copy_(noise + noise.T + r * (noise - noise.T))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return super().forward(x)


def make_batch(score: run_lib.TrainedScore, test: Split, batch_size: int, time: float | None) -> Batch:
    """Test images, evenly spaced, at one time, or at times that are evenly spaced, too."""
    indices, seed = evenly_spaced(range(batch_size), batch_size, len(test)), score.config.seed
    generator = SampleGenerators((seed, "qc variance"), indices)
    x0 = score.images.to_model(test.batch(indices)[0], generator).to(score.device)
    # Neighbours in the set are often of one class, so the times are dealt out in another order.
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(seed))
    t = (order + 0.5) / batch_size * score.sde.end_time if time is None else torch.full((batch_size,), time)
    t = t.to(x0)
    mean, std = score.sde.marginal(x0, t)
    return Batch(mean + expand(std, x0) * normal_like(x0, generator), t, std**2, seed)


def compare(title: str, model: nn.Module, public: nn.Module, batch: Batch, probes: int) -> list:
    """Rows of the table, for a score and the same in the public code's style."""
    variants = {
        PAPER: partial(gradient, public, batch, "paper"),
        "trace": partial(gradient, model, batch, "trace"),
        DEFAULT: partial(gradient, model, batch, "antisymmetric"),
    }
    timed = in_turn(variants, probes, batch.x.device)
    gradients = {name: torch.stack(found.results) for name, found in timed.items()}
    squares = {name: (g - g.mean(0)).double().square().sum(1) for name, g in gradients.items()}
    norm = gradients[DEFAULT].mean(0).double().norm()
    exact = batch.x[0].numel() <= EXACT_MAX_DIMENSION
    nasym = asymmetry(model, batch.x, batch.t, probes=None if exact else 16).nasym.mean()
    rows = []
    for name, found in timed.items():
        deviation = (squares[name].sum() / (probes - 1)).sqrt()
        ratio, error = ratio_with_error(squares[PAPER], squares[name])
        factors = (1, timed[PAPER].median / found.median)
        ratios = [f"{f * ratio:.3g} ± {f * error:.1g}" for f in factors] if name != PAPER else ["1", "1"]
        rows.append((title, f"{nasym:.1e}", name, f"{1e3 * found.median:.1f}", f"{deviation / norm:.2g}", *ratios))
    return rows


def gradient(model: nn.Module, batch: Batch, estimator: str, number: int) -> Tensor:
    """That of ½ mean(σ² Asym), (P,), for one random probe per image."""
    model.zero_grad()
    generator = SampleGenerators((batch.seed, "qc probe", number), range(len(batch.x)))
    if estimator == "paper":
        v = rademacher_like(batch.x, generator)
        qc_backward(model, batch.x, batch.t, v, lambda _, asym: 0.5 * (batch.weight * asym).mean())
    else:
        options = {"probes": 1, "estimator": estimator, "generator": generator, "create_graph": True}
        asym = asymmetry(model, batch.x.clone(), batch.t, **options).asym
        (0.5 * (batch.weight * asym).mean()).backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def ratio_with_error(numerator: Tensor, denominator: Tensor) -> tuple[float, float]:
    """The ratio of the variances of gradients, and its standard error, from ‖gᵢ − ḡ‖² (n,) of each.

    The error is that of the logarithm by the jackknife: a ratio of variances is far from normal.
    """
    n = len(numerator)
    # Leaving out gᵢ takes n/(n−1) ‖gᵢ − ḡ‖² from the sum of squares about the mean.
    log_a, log_b = ((d.sum() - n / (n - 1) * d).log() for d in (numerator, denominator))
    ratio, logs = float(numerator.sum() / denominator.sum()), log_a - log_b
    return ratio, ratio * float(((n - 1) / n * (logs - logs.mean()).square().sum()).sqrt())


if __name__ == "__main__":
    command(run)
