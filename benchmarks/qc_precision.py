"""What half precision does to the quasi-conservative loss.

python -m benchmarks.qc_precision

The NAsym that rounding alone produces: that of conservative networks, which have none. And the errors of Asym and of
its gradient, against float64, in a linear field whose NAsym is turned down.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import run_lib
from benchmarks.qc_variance import LinearField
from benchmarks.training_step import IMAGES, C
from configs.defaults import base_config
from conservativeness import jvp_and_vjp
from experiment.command_line import command
from experiment.randomness import rademacher_like
from experiment.results import markdown_table
from sde_lib import expand


class TF32(TorchDispatchMode):
    """Operands of convolutions and matrix products keep 10 bits after the leading one, as in NVIDIA's TF32; sums are in
    float32. cuDNN's convolutions do this unless told otherwise."""

    PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm", "baddbmm")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
        if function.__name__.split(".")[0] in self.PRODUCTS:
            args = torch.utils._pytree.tree_map_only(Tensor, _round_to_tf32, args)
        return function(*args, **(kwargs or {}))


def _round_to_tf32(value: Tensor) -> Tensor:
    bits = value.contiguous().view(torch.int32)
    rounded = (bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF  # to the nearest, ties to even
    return rounded.view(torch.float32).view_as(value).contiguous(memory_format=torch.preserve_format)


FORMATS = {"float64": None, "float32": None, "TF32 (emulated)": None}
FORMATS |= {"fp16 autocast": torch.float16, "bf16 autocast": torch.bfloat16}
"""With the type of autocast."""


def measure(name: str, model: nn.Module, x: Tensor, t: Tensor, weight: Tensor) -> tuple[float, float, Tensor]:
    """NAsym, the mean of the weighted Asym, and its gradient (P,), with one fixed probe for each of the points."""
    dtype, half = torch.float64 if name == "float64" else torch.float32, FORMATS[name]
    model, x, t, weight = model.to(dtype), x.to(dtype).requires_grad_(), t.to(dtype), weight.to(dtype)
    v = rademacher_like(x.double(), torch.Generator().manual_seed(1)).to(dtype)
    with TF32() if "TF32" in name else nullcontext():  # in every pass, backward ones too
        with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
            value = model(x, t).to(dtype)
        jv, jtv = jvp_and_vjp(value, x, v, create_graph=True)
        asym = (weight * 0.5 * ((jv - jtv) ** 2).flatten(1).sum(1)).mean()
        norm = (weight * (jtv**2).flatten(1).sum(1)).mean()
        parameters = [p for p in model.parameters() if p.requires_grad]
        gradient = torch.autograd.grad(asym, parameters, materialize_grads=True)
    return (asym / (2 * norm)).item(), asym.item(), torch.cat([g.double().flatten() for g in gradient])


def linear_row(r: float, dimension: int = 768) -> list[str]:
    """NAsym, and relative errors of Asym and of its gradient in every format but float64."""
    x = torch.ones(32, dimension)  # the values do not matter

    field = LinearField(dimension, r, 0, torch.float64)
    found = [measure(name, copy.deepcopy(field), x, x[:, 0], x[:, 0]) for name in FORMATS]
    nasym, exact, gradient = found[0]
    errors = [f"{asym / exact - 1:+.1e}, {(g - gradient).norm() / gradient.norm():.1e}" for _, asym, g in found[1:]]
    return [f"{nasym:.1e}", *errors]


def run() -> str:
    """Measure, in a minute."""
    torch.set_num_threads(1)
    rows = []
    for blocks in (1, 4, 8):
        size = {"seed": 0, "model.nf": 16, "model.num_res_blocks": blocks, "model.init_scale": 1.0}
        config = base_config(C | size)
        model = run_lib.build_score_model(config, run_lib.build_sde(config), IMAGES).eval()
        x0, t = torch.rand(4, *IMAGES.shape, dtype=torch.float64), torch.linspace(1e-5, 1, 4, dtype=torch.float64)
        std = model.sde.std(t)
        z = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        floor = [measure(name, model, x0 + expand(std, x0) * z, t, std**2)[0] for name in FORMATS]
        rows.append((f"3×32×32, nf 16, {blocks} block(s) per level, untrained", *(f"{x:.1e}" for x in floor)))
    table = markdown_table(("NAsym", *list(FORMATS)[1:]), [linear_row(r) for r in (0.1, 0.05, 0.02, 0.01)])
    title = "Relative errors in a linear field, of Asym and, after the comma, of its gradient"
    return f"NAsym of conservative networks\n\n{markdown_table(('network', *FORMATS), rows)}\n{title}\n\n{table}"


if __name__ == "__main__":
    command(run)
