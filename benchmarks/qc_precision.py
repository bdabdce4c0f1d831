"""What half precision does to the quasi-conservative loss.

python -m benchmarks.qc_precision [--steps=300]

First the NAsym that rounding alone produces: that of conservative networks, which have none. Then the errors of Asym
and of its gradient, against float64, in two kinds of field whose asymmetry can be turned down: a linear one, S + rN
with S symmetric and N antisymmetric, and s_C + r(s_U − s_C) of two U-Nets trained on digits, the first conservative.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from absl import app, flags
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import trange

from configs.defaults import base_config
from configs.digits import get_config
from conservativeness import jvp_and_vjp
from data.pixels import to_unit_interval
from data.sets import batch_indices, get_dataset
from experiment.command_line import parse_flags
from experiment.randomness import SampleGenerators, rademacher_like
from losses import get_objective
from models import create_score_model
from sde_lib import SDE, ScoreFunction, expand, get_sde

RATIOS = (1.0, 0.5, 0.2, 0.1)
DIMENSION = 768
IMAGES = 32


class TF32(TorchDispatchMode):
    """Operands of convolutions and matrix products keep 10 bits after the leading one, as in NVIDIA's TF32; sums are in
    float32. cuDNN's convolutions do this unless told otherwise."""

    PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        if function.__name__.split(".")[0] in self.PRODUCTS:
            args = torch.utils._pytree.tree_map(_round_to_tf32, args)
        return function(*args, **(kwargs or {}))


def _round_to_tf32(value: object) -> object:
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return value
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF  # to the nearest, ties to even
    return rounded.view(torch.float32).view_as(value).contiguous(memory_format=torch.preserve_format)


FORMATS: dict[str, tuple[torch.dtype, Callable[[], AbstractContextManager]]] = {
    "float64": (torch.float64, nullcontext),
    "float32": (torch.float32, nullcontext),
    "TF32 (emulated)": (torch.float32, TF32),
    "fp16 autocast": (torch.float32, lambda: torch.autocast("cpu", dtype=torch.float16)),
    "bf16 autocast": (torch.float32, lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
}


def measure(
    score: ScoreFunction, x: Tensor, t: Tensor, weight: Tensor, v: Tensor, parameters: list[Tensor]
) -> tuple[float, float, Tensor]:
    """NAsym, the mean of the weighted Asym, and its gradient, with one probe v per sample."""
    x = x.clone().requires_grad_()
    jv, jtv = jvp_and_vjp(score(x, t), x, v, create_graph=True)
    asym = (weight * 0.5 * ((jv - jtv) ** 2).flatten(1).sum(1)).mean()
    norm = (weight * (jtv**2).flatten(1).sum(1)).mean()
    gradients = torch.autograd.grad(asym, parameters, materialize_grads=True)
    return (asym / (2 * norm)).item(), asym.item(), torch.cat([g.double().flatten() for g in gradients])


def in_format(
    name: str, module: nn.Module, field: Callable[[AbstractContextManager], ScoreFunction], data: Sequence[Tensor]
) -> tuple[float, float, Tensor]:
    dtype, context = FORMATS[name]
    parameters = [p for p in module.to(dtype).parameters() if p.requires_grad]
    inside = context()
    # TF32 is a property of the hardware, in every pass; autocast is left before any backward pass.
    everywhere, around_score = (inside, nullcontext()) if isinstance(inside, TF32) else (nullcontext(), inside)
    with everywhere:
        return measure(field(around_score), *(d.to(dtype) for d in data), parameters)


def with_probes(x: Tensor, t: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return x, t, weight, rademacher_like(x, torch.Generator().manual_seed(1))


def error_table(
    title: str,
    field: Callable[[float, AbstractContextManager], ScoreFunction],
    module: nn.Module,
    data: tuple[Tensor, ...],
) -> None:
    columns = list(FORMATS)[1:]
    print(f"\n{title}\n\n| NAsym | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for ratio in RATIOS:
        nasym, exact, gradient = in_format("float64", module, partial(field, ratio), data)
        cells = []
        for name in columns:
            _, value, found = in_format(name, module, partial(field, ratio), data)
            cells.append(f"{value / exact - 1:+.1e}, {(found - gradient).norm() / gradient.norm():.1e}")
        print(f"| {nasym:.1e} | " + " | ".join(cells) + " |", flush=True)


def floor_table(trained: nn.Module, digits: tuple[Tensor, ...]) -> None:
    columns = list(FORMATS)
    print("\nNAsym of conservative networks\n\n| network | " + " | ".join(columns) + " |")
    print("|---|" + "---|" * len(columns))

    def row(title: str, model: nn.Module, data: tuple[Tensor, ...]) -> None:
        def field(context: AbstractContextManager) -> ScoreFunction:
            def score(x: Tensor, t: Tensor) -> Tensor:
                with context:
                    return model(x, t).to(x.dtype)

            return score

        cells = [f"{in_format(name, model, field, data)[0]:.1e}" for name in columns]
        print(f"| {title} | " + " | ".join(cells) + " |", flush=True)

    row("digits, 1 block per level, trained", trained, digits)
    for blocks in (1, 4, 8):
        config = base_config()
        config.model.update(nf=16, num_res_blocks=blocks, parameterization="conservative", init_scale=1.0)
        torch.manual_seed(0)
        sde = get_sde(config)
        model = create_score_model(config, sde).eval()
        x0 = torch.rand(4, 3, 32, 32, dtype=torch.float64)
        data = perturbed(sde, x0)
        row(f"3×32×32, nf 16, {blocks} block(s) per level, untrained", model, data)


def perturbed(sde: SDE, x0: Tensor) -> tuple[Tensor, ...]:
    t = torch.linspace(1e-5, 1, len(x0), dtype=torch.float64)
    std = sde.std(t)
    z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return with_probes(x0 + expand(std, x0) * z, t, std**2)


def linear_table() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(DIMENSION, DIMENSION, bias=False)
    noise = torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64)
    x = torch.randn(IMAGES, DIMENSION, generator=generator, dtype=torch.float64)

    def field(ratio: float, context: AbstractContextManager) -> ScoreFunction:
        # NAsym = (r/10)²/(1 + (r/10)²), since the two parts have the same norm.
        with torch.no_grad():
            layer.weight.copy_(noise + noise.T + 0.1 * ratio * (noise - noise.T))

        def score(x: Tensor, t: Tensor) -> Tensor:
            with context:
                return layer(x).to(x.dtype)

        return score

    t = torch.full((IMAGES,), 0.5, dtype=torch.float64)
    error_table(f"Linear field in {DIMENSION} dimensions", field, layer, with_probes(x, t, torch.ones_like(t)))


def trained_on_digits(name: str, steps: int) -> nn.Module:
    config = get_config(name)
    train, _ = get_dataset(config)
    torch.manual_seed(config.seed)
    model = create_score_model(config, get_sde(config))
    objective = get_objective(config, model)
    optimizer = torch.optim.Adam(objective.parameters(), lr=config.optim.lr)
    for step in trange(steps, desc=f"training {name}", unit="step"):
        indices = batch_indices(config.seed, step, config.training.batch_size, len(train))
        optimizer.zero_grad()
        generator = SampleGenerators((config.seed, "train", step), range(len(indices)))
        objective(to_unit_interval(train.batch(indices)[0], train.num_levels), generator)["loss"].backward()
        optimizer.step()
    return model.eval()


def network_tables(steps: int) -> None:
    conservative, unconstrained = (trained_on_digits(name, steps) for name in ("c", "u"))
    _, test = get_dataset(get_config("u"))
    x0 = to_unit_interval(test.batch(torch.arange(IMAGES))[0], test.num_levels).double()
    data = perturbed(unconstrained.sde, x0)

    def field(ratio: float, context: AbstractContextManager) -> ScoreFunction:
        def score(x: Tensor, t: Tensor) -> Tensor:
            with context:
                u, c = (model.to(x.dtype)(x, t).to(x.dtype) for model in (unconstrained, conservative))
            return c + ratio * (u - c)

        return score

    error_table("U-Nets on digits", field, unconstrained, data)
    floor_table(conservative, data)


def main(argv: list[str]) -> None:
    if flags.FLAGS.steps < 1:
        sys.exit(f"error: --steps={flags.FLAGS.steps}: at least 1")
    torch.set_num_threads(1)
    print("Errors are relative: of Asym and, after the comma, of its gradient, the norm of the difference.")
    linear_table()
    network_tables(flags.FLAGS.steps)


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 300, "Training steps of each network.")
    app.run(main, flags_parser=parse_flags)
