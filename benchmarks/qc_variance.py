"""Variance of the quasi-conservative term's gradient, per unit of time: the paper's estimator against the default.

python -m benchmarks.qc_variance --config=configs/digits.py:u --workdir=runs/digits/u [--probes=100] [--times=0.1,0.75]

Weights, images and noise stay the same; only the probe changes. The variance is that of the gradient over the probes,
summed over all parameters. An estimator that is r times as good by variance × time needs r times less of it for the
same accuracy of the mean over many probes.

Two kinds of field: s(x) = Wx with a random matrix W = S + rN, S symmetric, N antisymmetric and r such that NAsym is
1e-3; and the network of a run, its NAsym being what it is.

``paper`` is our own writing of what the public code does (benchmarks/public_code.py): the same function as the run's
network, in its modules and memory format, its estimator and its order of passes.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from run_evaluation import load_for_evaluation, run_for_evaluation, spread
from run_setup import InvalidRun, Run, Runtime, check_compile, checked
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.clock import clock_of
from benchmarks.public_code import in_public_style, qc_backward
from conservativeness import EXACT_MAX_DIMENSION, Products, asymmetry
from experiment.command_line import parse_flags
from experiment.randomness import SampleGenerators, normal_like, rademacher_like
from models.second_order.compiled import CompiledProducts
from sde_lib import ScoreFunction, expand

PAPER = "paper: trace"
DEFAULT = "antisymmetric (default)"
LINEAR_DIMENSION = 256
LINEAR_NASYM = 1e-3
LEAST_PROBES = 10
"""For a standard error that means something."""


class Batch(NamedTuple):
    """Perturbed images x (B, ...), their times t (B,) and the weights σ² (B,) of the term."""

    x: Tensor
    t: Tensor
    weight: Tensor


Gradient = Callable[[Batch, SampleGenerators], Sequence[Tensor]]
"""The gradient of ½ mean(σ² Asym) for one random probe per image: one tensor per parameter."""


def paper_gradient(
    score: ScoreFunction, parameters: list[nn.Parameter], batch: Batch, generator: SampleGenerators
) -> Sequence[Tensor]:
    """As the public code has it (benchmarks/public_code.py)."""
    for parameter in parameters:
        parameter.grad = None
    v = rademacher_like(batch.x, generator)
    qc_backward(score, batch.x, batch.t, v, lambda asym: 0.5 * (batch.weight * asym).mean())
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]


def our_gradient(
    score: ScoreFunction,
    parameters: list[nn.Parameter],
    batch: Batch,
    generator: SampleGenerators,
    *,
    estimator: str,
    products: Products | None = None,
) -> Sequence[Tensor]:
    """That of training."""
    options = dict(probes=1, estimator=estimator, generator=generator, create_graph=True, products=products)
    result = asymmetry(score, batch.x.clone(), batch.t, **options)
    return torch.autograd.grad(0.5 * (batch.weight * result.asym).mean(), parameters, materialize_grads=True)


# ---------------------------------------------------------------------------------------------------------- statistics


def deviations(gradients: Tensor) -> Tensor:
    """‖gᵢ − ḡ‖² (n,), float64, of gradients (n, P)."""
    return (gradients - gradients.mean(0)).double().square().sum(1)


def ratio_with_error(numerator: Tensor, denominator: Tensor) -> tuple[float, float]:
    """The ratio of two variances, and its standard error by the jackknife, from their deviations (n,) each.

    The logarithm is what is jackknifed: a ratio of variances is far from normal.
    """
    n = len(numerator)

    def without_each(deviation: Tensor) -> Tensor:
        # Leaving out gᵢ takes n/(n−1) ‖gᵢ − ḡ‖² from the sum of squares about the mean.
        return (deviation.sum() - n / (n - 1) * deviation) / (n - 2)

    ratio = float(numerator.sum() / denominator.sum())
    logs = (without_each(numerator) / without_each(denominator)).log()
    return ratio, ratio * float(((n - 1) / n * (logs - logs.mean()).square().sum()).sqrt())


# ---------------------------------------------------------------------------------------------------------- comparison


def make_batch(run: Run, batch_size: int, level: float | None) -> Batch:
    """Test images, evenly spaced, at one time, or at times that are spread over all evenly."""
    indices = spread(torch.arange(batch_size), batch_size, len(run.test_data))
    generator = SampleGenerators((run.config.seed, "qc variance"), indices.tolist())
    images, _ = run.test_data.batch(indices)
    x0 = run.to_model(images, generator, dequantize=run.config.data.uniform_dequantization).to(run.device)
    # Neighbours in the set are often of one class, so the times are dealt out in another order.
    order = torch.randperm(batch_size, generator=torch.Generator().manual_seed(run.config.seed))
    t = (order + 0.5) / batch_size * run.sde.end_time if level is None else torch.full((batch_size,), level)
    t = t.to(x0)
    mean, std = run.sde.marginal(x0, t)
    return Batch(mean + expand(std, x0) * normal_like(x0, generator), t, std**2)


def compare(
    config: ConfigDict,
    workdir: str,
    runtime: Runtime,
    batch_size: int,
    probes: int,
    times: Sequence[float] = (),
    compiled: bool = False,
) -> str:
    """The table, for the moving average of the newest checkpoint in ``workdir``.

    Args:
        config, workdir, runtime: of the run; the precision is that of the network in all variants.
        batch_size: images.
        probes: gradients of every variant.
        times: further rows for images that are all at one time.
        compiled: whether the default estimator is also compiled.

    Raises:
        InvalidRun: bad config, working directory or number.
    """
    with checked():
        if probes < LEAST_PROBES:
            raise ValueError(f"--probes={probes}: at least {LEAST_PROBES}")
        run = run_for_evaluation(config, workdir, runtime, None)
        if not 1 <= batch_size <= len(run.test_data):
            raise ValueError(f"--batch_size={batch_size}: allowed are 1 to {len(run.test_data)}")
        for level in times:
            if not 0 < level <= run.sde.end_time:
                raise ValueError(f"--times={level}: allowed are times above 0, up to {run.sde.end_time:g}")
        if compiled:
            check_compile(run.device, config.model.parameterization)
        if run.num_classes:
            raise ValueError(f"model.num_classes={run.num_classes}: only networks without classes")
        step = load_for_evaluation(run, None)
    model = run.ema.model.eval()
    for averaged, trained in zip(model.parameters(), run.score_model.parameters(), strict=True):
        averaged.requires_grad_(trained.requires_grad)
    paper_model = in_public_style(model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(runtime.precision)

    def score_of(network: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
        with torch.autocast(run.device.type, dtype=dtype, enabled=dtype is not None):
            value = network(x, t)
        return value.to(x.dtype)

    score, paper_score = partial(score_of, model), partial(score_of, paper_model)
    variants = _variants(score, _trained(model), paper_score, _trained(paper_model))
    if compiled:
        products = CompiledProducts(_InPrecision(model, score_of))
        variants["antisymmetric, compiled"] = partial(variants[DEFAULT], products=products)
    fields = [_linear_field(batch_size, run.config.seed, run.device)]
    for level in (None, *times):
        name = f"{config.data.dataset}, {'all times' if level is None else f't = {level:g}'}"
        fields.append((name, score, make_batch(run, batch_size, level), variants))

    lines = [
        f"{config.data.dataset}, step {step}, {batch_size} images, {probes} probes each, {run.device}, "
        f"{runtime.precision}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{clock_of(run.device)[1]}\n",
        "| field | NAsym | estimator | ms per gradient | standard deviation / norm of the mean "
        "| paper's variance over it | paper's variance × time over it |",
        "|---|---|---|---|---|---|---|",
    ]
    with tqdm(total=probes * sum(len(field[-1]) for field in fields), unit="gradient") as bar:
        for title, field_score, batch, own_variants in fields:
            gradients, seconds = _measure(run, batch, own_variants, probes, bar)
            squares = {name: deviations(rows) for name, rows in gradients.items()}
            norm = float(gradients[DEFAULT].mean(0).double().norm())
            exact = batch.x[0].numel() <= EXACT_MAX_DIMENSION
            nasym = asymmetry(field_score, batch.x, batch.t, probes=None if exact else 16).nasym.mean()
            for name in own_variants:
                ratio, error = ratio_with_error(squares[PAPER], squares[name])
                faster = seconds[PAPER] / seconds[name]
                deviation = float((squares[name].sum() / (probes - 1)).sqrt())
                row = (title, f"{nasym:.1e}", name, f"{1e3 * seconds[name]:.1f}", f"{deviation / norm:.2g}")
                if name == PAPER:
                    row += ("1", "1")
                else:
                    row += tuple(f"{factor * ratio:.3g} ± {factor * error:.1g}" for factor in (1, faster))
                lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class _InPrecision(nn.Module):
    """A network under the precision that ``score_of`` evaluates it in."""

    def __init__(self, network: nn.Module, score_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.score_of = network, score_of

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.score_of(self.network, x, t)


def _variants(
    score: ScoreFunction,
    parameters: list[nn.Parameter],
    paper_score: ScoreFunction,
    paper_parameters: list[nn.Parameter],
) -> dict[str, Gradient]:
    return {
        PAPER: partial(paper_gradient, paper_score, paper_parameters),
        "trace": partial(our_gradient, score, parameters, estimator="trace"),
        DEFAULT: partial(our_gradient, score, parameters, estimator="antisymmetric"),
    }


def _linear_field(
    batch_size: int, seed: int, device: torch.device
) -> tuple[str, ScoreFunction, Batch, dict[str, Gradient]]:
    """Its name, score, points (the gradient does not depend on them) and variants."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(LINEAR_DIMENSION, LINEAR_DIMENSION, generator=generator)
    layer = nn.Linear(LINEAR_DIMENSION, LINEAR_DIMENSION, bias=False)
    # The two parts have the same norm, about, so that NAsym = r²/(1 + r²).
    r = (LINEAR_NASYM / (1 - LINEAR_NASYM)) ** 0.5
    with torch.no_grad():
        layer.weight.copy_((noise + noise.T + r * (noise - noise.T)) / LINEAR_DIMENSION**0.5)
    layer.to(device)
    x = torch.randn(batch_size, LINEAR_DIMENSION, generator=generator).to(device)
    ones = torch.ones(batch_size, device=device)

    def score(x: Tensor, t: Tensor) -> Tensor:
        return layer(x)

    variants = _variants(score, _trained(layer), score, _trained(layer))
    return f"linear, {LINEAR_DIMENSION} dimensions", score, Batch(x, ones, ones), variants


def _measure(
    run: Run, batch: Batch, variants: dict[str, Gradient], probes: int, bar: tqdm
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients (probes, P) and the median of seconds, by variant. All variants have the same probes, in turn."""
    gradients: dict[str, list[Tensor]] = {name: [] for name in variants}
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    clock, _ = clock_of(run.device)
    for probe in range(-1, probes):  # the first is not counted
        for name, gradient in variants.items():
            generator = SampleGenerators((run.config.seed, "qc probe", probe + 1), range(len(batch.x)))
            started = clock()
            found = gradient(batch, generator)
            duration = clock() - started
            if probe >= 0:
                seconds[name].append(duration)
                gradients[name].append(torch.cat([part.flatten() for part in found]).cpu())
                bar.update()
    return (
        {name: torch.stack(rows) for name, rows in gradients.items()},
        {name: statistics.median(values) for name, values in seconds.items()},
    )


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        times = [float(value) for value in given.times]
    except ValueError:
        sys.exit(f"error: --times={','.join(given.times)}: allowed are numbers, separated by commas")
    try:
        runtime = Runtime(given.device, given.precision)
        print(compare(given.config, given.workdir, runtime, given.batch_size, given.probes, times, given.compile))
    except InvalidRun as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Of the run.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Of the run, trained.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16, of the network.")
    flags.DEFINE_bool("compile", False, "Have the default estimator compiled, too.")
    flags.DEFINE_integer("batch_size", 32, "Images.")
    flags.DEFINE_integer("probes", 100, f"Gradients of every variant; at least {LEAST_PROBES}.")
    flags.DEFINE_list("times", [], "Rows for images that are all at one time.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
