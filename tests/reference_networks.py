"""What the networks of score_sde_pytorch compute, as functions of a state dict under its names.

Written from the papers' equations, with other torch functions than ``models``: the oracle of networks for which no
files with outputs exist. ``*_shapes`` lists the names of such a state dict in its order, which is the order in which
the public code constructs its modules, with their shapes.
"""

from __future__ import annotations

import math
from itertools import count

import torch
import torch.nn.functional as F
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
State = dict[str, Tensor]


def random_state(shapes: Shapes, seed: int = 0, dtype: torch.dtype = torch.float32) -> State:
    """Random weights of a size that keeps activations near one; normalisations near the identity."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("embed.weight") or (len(shape) == 1 and name.endswith((".weight", ".alpha", ".gamma"))):
            values = 1 + 0.3 * values
        elif len(shape) > 1:
            values = values / math.sqrt(shape[0] if name.endswith(".W") else math.prod(shape[1:]))
        else:
            values = 0.1 * values
        state[name] = values.to(dtype)
    return state


def conv(state: State, name: str, x: Tensor, **options) -> Tensor:
    return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **options)


# ---------------------------------------------------------------------------------------------------------------- DDPM


def ddpm_shapes(
    nf: int, ch_mult: tuple[int, ...], num_res_blocks: int, attention_levels: tuple[int, ...], channels: int = 3
) -> Shapes:
    """DDPM that is told the time, with learned resampling."""
    shapes: Shapes = {}
    number = count()

    def add(kind: str, c_in: int, c_out: int, kernel: int = 3) -> None:
        prefix = f"all_modules.{next(number)}"
        if kind == "conv":
            parts = {"": (c_out, c_in, kernel, kernel)}
        elif kind == "linear":
            parts = {"": (c_out, c_in)}
        elif kind == "norm":
            parts = {"": (c_out,)}
        elif kind == "resample":
            parts = {".Conv_0": (c_out, c_in, 3, 3)}
        elif kind == "attention":
            parts = {".GroupNorm_0": (c_in,), **{f".NIN_{i}": (c_in, c_in) for i in range(4)}}
        else:
            parts = {".GroupNorm_0": (c_in,), ".GroupNorm_1": (c_out,), ".Conv_0": (c_out, c_in, 3, 3)}
            parts |= {".Conv_1": (c_out, c_out, 3, 3), ".Dense_0": (c_out, 4 * nf)}
            parts |= {".NIN_0": (c_in, c_out)} if c_in != c_out else {}
        for part, shape in parts.items():
            weight, bias = ("W", "b") if ".NIN" in part else ("weight", "bias")
            shapes[f"{prefix}{part}.{weight}"] = shape
            shapes[f"{prefix}{part}.{bias}"] = shape[1:2] if ".NIN" in part else shape[:1]

    add("linear", nf, 4 * nf)
    add("linear", 4 * nf, 4 * nf)
    add("conv", channels, nf)
    width, skips = nf, [nf]
    for level, multiplier in enumerate(ch_mult):
        for _ in range(num_res_blocks):
            add("block", width, nf * multiplier)
            width = nf * multiplier
            if level in attention_levels:
                add("attention", width, width)
            skips.append(width)
        if level < len(ch_mult) - 1:
            add("resample", width, width)
            skips.append(width)
    for kind in ("block", "attention", "block"):
        add(kind, width, width)
    for level in reversed(range(len(ch_mult))):
        for _ in range(num_res_blocks + 1):
            add("block", width + skips.pop(), nf * ch_mult[level])
            width = nf * ch_mult[level]
        if level in attention_levels:
            add("attention", width, width)
        if level:
            add("resample", width, width)
    add("norm", width, width)
    add("conv", width, channels)
    return shapes


def ddpm(
    state: State,
    x: Tensor,
    label: Tensor,
    *,
    nf: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    attention_levels: tuple[int, ...],
) -> Tensor:
    """ε(x, label) of DDPM on centred images."""
    number = count()

    def name() -> str:
        return f"all_modules.{next(number)}"

    def group_norm(part: str, h: Tensor) -> Tensor:
        groups = 32 if nf % 32 == 0 else min(max(h.shape[1] // 4, 1), 32)  # there always 32
        return F.group_norm(h, groups, state[f"{part}.weight"], state[f"{part}.bias"], eps=1e-6)

    def mix(part: str, h: Tensor) -> Tensor:
        return torch.einsum("bchw,cd->bdhw", h, state[f"{part}.W"]) + state[f"{part}.b"][:, None, None]

    def linear(part: str, h: Tensor) -> Tensor:
        return F.linear(h, state[f"{part}.weight"], state[f"{part}.bias"])

    def block(h: Tensor) -> Tensor:
        prefix = name()
        inner = conv(state, f"{prefix}.Conv_0", F.silu(group_norm(f"{prefix}.GroupNorm_0", h)), padding=1)
        inner = inner + linear(f"{prefix}.Dense_0", F.silu(temb))[:, :, None, None]
        inner = conv(state, f"{prefix}.Conv_1", F.silu(group_norm(f"{prefix}.GroupNorm_1", inner)), padding=1)
        return (mix(f"{prefix}.NIN_0", h) if f"{prefix}.NIN_0.W" in state else h) + inner

    def attention(h: Tensor) -> Tensor:
        prefix = name()
        normed = group_norm(f"{prefix}.GroupNorm_0", h)
        q, k, v = (mix(f"{prefix}.NIN_{i}", normed) for i in range(3))
        logits = torch.einsum("bchw,bcij->bhwij", q, k) / math.sqrt(h.shape[1])
        weights = logits.flatten(3).softmax(-1).view_as(logits)
        return h + mix(f"{prefix}.NIN_3", torch.einsum("bhwij,bcij->bchw", weights, v))

    frequencies = 10_000 ** (-torch.arange(nf // 2, dtype=x.dtype) / (nf // 2 - 1))
    angle = label.to(x.dtype)[:, None] * frequencies
    temb = linear(name(), torch.cat([angle.sin(), angle.cos()], 1))
    temb = linear(name(), F.silu(temb))
    skips = [conv(state, name(), x, padding=1)]
    for level in range(len(ch_mult)):
        for _ in range(num_res_blocks):
            h = block(skips[-1])
            skips.append(attention(h) if level in attention_levels else h)
        if level < len(ch_mult) - 1:
            skips.append(conv(state, f"{name()}.Conv_0", F.pad(skips[-1], (0, 1, 0, 1)), stride=2))
    h = block(attention(block(skips[-1])))
    for level in reversed(range(len(ch_mult))):
        for _ in range(num_res_blocks + 1):
            h = block(torch.cat([h, skips.pop()], 1))
        if level in attention_levels:
            h = attention(h)
        if level:
            h = conv(state, f"{name()}.Conv_0", h.repeat_interleave(2, 2).repeat_interleave(2, 3), padding=1)
    h = F.silu(group_norm(name(), h))
    return conv(state, name(), h, padding=1)


# ------------------------------------------------------------------------------------------------------ NCSN, NCSNv2

# Of each architecture the stages of the encoder, in the order of construction (which is that of computation): number,
# width, and what its first block does to the resolution or how far its convolutions are dilated.
STAGES: dict[int, tuple[tuple[int, int, str | int], ...]] = {
    64: ((1, 1, 1), (2, 2, "pool"), (3, 2, 2), (4, 2, 4)),
    128: ((1, 1, 1), (2, 2, "pool"), (3, 2, "pool"), (4, 4, 2), (5, 4, 4)),
    256: ((1, 1, 1), (2, 2, "pool"), (3, 2, "pool"), (31, 2, "pool"), (4, 4, 2), (5, 4, 4)),
}
# The decoder's blocks in the order of construction: number, width of the inputs, width of the output, and the stage
# whose features it takes. They are computed deepest stage first.
REFINEMENTS: dict[int, tuple[tuple[int, int, int, int], ...]] = {
    64: ((1, 2, 2, 4), (2, 2, 2, 3), (3, 2, 1, 2), (4, 1, 1, 1)),
    128: ((1, 4, 4, 5), (2, 4, 2, 4), (3, 2, 2, 3), (4, 2, 1, 2), (5, 1, 1, 1)),
    256: ((1, 4, 4, 5), (2, 4, 2, 4), (3, 2, 2, 3), (31, 2, 2, 31), (4, 2, 1, 2), (5, 1, 1, 1)),
}


def refinenet_shapes(architecture: int, nf: int, num_levels: int | None = None, channels: int = 3) -> Shapes:
    """NCSNv2, or with ``num_levels`` NCSN."""
    shapes: Shapes = {}

    def add_conv(name: str, c_in: int, c_out: int, kernel: int = 3, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (c_out, c_in, kernel, kernel)
        if bias:
            shapes[f"{name}.bias"] = (c_out,)

    def add_norm(name: str, width: int) -> None:
        if num_levels is None:
            shapes.update({f"{name}.{part}": (width,) for part in ("alpha", "gamma", "beta")})
        else:
            shapes[f"{name}.embed.weight"] = (num_levels, 3 * width)

    def add_block(name: str, c_in: int, c_out: int, *, begins: bool, pool: bool) -> None:
        add_conv(f"{name}.conv1", c_in, c_in)
        add_norm(f"{name}.normalize2", c_in)
        add_conv(f"{name}.conv2.conv" if pool else f"{name}.conv2", c_in, c_out)
        if begins:
            add_conv(f"{name}.shortcut.conv" if pool else f"{name}.shortcut", c_in, c_out, kernel=1 if pool else 3)
        add_norm(f"{name}.normalize1", c_in)

    def add_units(name: str, width: int, units: int) -> None:
        for i in range(1, units + 1):
            for j in (1, 2):
                if num_levels is not None:
                    add_norm(f"{name}.{i}_{j}_norm", width)
                add_conv(f"{name}.{i}_{j}_conv", width, width, bias=False)

    add_conv("begin_conv", channels, nf)
    add_norm("normalizer", nf)
    add_conv("end_conv", nf, channels)
    before = nf
    for number, multiplier, kind in STAGES[architecture]:
        width = nf * multiplier
        add_block(f"res{number}.0", before, width, begins=number > 1, pool=kind == "pool")
        add_block(f"res{number}.1", width, width, begins=False, pool=False)
        before = width
    for number, width_in, width_out, _ in REFINEMENTS[architecture]:
        name, width_in, width_out = f"refine{number}", nf * width_in, nf * width_out
        inputs = 1 if number == 1 else 2
        for i in range(inputs):
            add_units(f"{name}.adapt_convs.{i}", width_in, 2)
        add_units(f"{name}.output_convs", width_out, 3 if number == REFINEMENTS[architecture][-1][0] else 1)
        if inputs > 1:
            for i in range(inputs):
                add_conv(f"{name}.msf.convs.{i}", width_in, width_out)
            for i in range(inputs if num_levels is not None else 0):
                add_norm(f"{name}.msf.norms.{i}", width_in)
        for i in range(2):
            add_conv(f"{name}.crp.convs.{i}", width_out, width_out, bias=False)
        for i in range(2 if num_levels is not None else 0):
            add_norm(f"{name}.crp.norms.{i}", width_out)
    return shapes


def refinenet(state: State, x: Tensor, label: Tensor, *, architecture: int) -> Tensor:
    """The output of NCSNv2, or of NCSN if the state has embeddings, before any division by σ; images in [0, 1]."""
    conditional = "normalizer.embed.weight" in state
    features: dict[int, Tensor] = {}

    def norm(name: str, h: Tensor) -> Tensor:
        pixels = h.flatten(2)
        means = pixels.mean(2)
        centred = means - means.mean(1, keepdim=True)
        plus = centred / (centred.square().sum(1, keepdim=True) / (means.shape[1] - 1) + 1e-5).sqrt()
        standard = F.instance_norm(h, eps=1e-5)
        if conditional:
            gamma, alpha, beta = state[f"{name}.embed.weight"][label.long()].chunk(3, 1)
        else:
            gamma, alpha, beta = (state[f"{name}.{part}"].expand(len(x), -1) for part in ("gamma", "alpha", "beta"))
        return gamma[..., None, None] * (standard + (alpha * plus)[..., None, None]) + beta[..., None, None]

    def mean_pool(h: Tensor) -> Tensor:
        return (h[..., ::2, ::2] + h[..., 1::2, ::2] + h[..., ::2, 1::2] + h[..., 1::2, 1::2]) / 4

    def block(name: str, h: Tensor, kind: str | int, begins: bool) -> Tensor:
        wide = {"padding": kind, "dilation": kind} if kind != "pool" else {"padding": 1}
        inner = conv(state, f"{name}.conv1", F.elu(norm(f"{name}.normalize1", h)), **wide)
        inner = F.elu(norm(f"{name}.normalize2", inner))
        if kind == "pool" and begins:
            return mean_pool(conv(state, f"{name}.shortcut.conv", h)) + mean_pool(
                conv(state, f"{name}.conv2.conv", inner, padding=1)
            )
        shortcut = conv(state, f"{name}.shortcut", h, **wide) if begins else h
        return shortcut + conv(state, f"{name}.conv2", inner, **wide)

    def units(name: str, h: Tensor) -> Tensor:
        i = 1
        while f"{name}.{i}_1_conv.weight" in state:
            inner = h
            for j in (1, 2):
                inner = norm(f"{name}.{i}_{j}_norm", inner) if conditional else inner
                inner = conv(state, f"{name}.{i}_{j}_conv", F.elu(inner), padding=1)
            h, i = h + inner, i + 1
        return h

    def refine(name: str, inputs: list[Tensor]) -> Tensor:
        inputs = [units(f"{name}.adapt_convs.{i}", h) for i, h in enumerate(inputs)]
        if len(inputs) > 1:
            size = inputs[0].shape[2:]
            for i, h in enumerate(inputs):
                h = norm(f"{name}.msf.norms.{i}", h) if conditional else h
                h = conv(state, f"{name}.msf.convs.{i}", h, padding=1)
                inputs[i] = F.interpolate(h, size, mode="bilinear", align_corners=True)
        h = path = F.elu(sum(inputs))
        for i in range(2):
            path = norm(f"{name}.crp.norms.{i}", path) if conditional else path
            path = F.avg_pool2d(path, 5, 1, 2) if conditional else F.max_pool2d(path, 5, 1, 2)
            path = conv(state, f"{name}.crp.convs.{i}", path, padding=1)
            h = h + path
        return units(f"{name}.output_convs", h)

    h = conv(state, "begin_conv", 2 * x - 1, padding=1)
    for number, _, kind in STAGES[architecture]:
        h = block(f"res{number}.0", h, kind, begins=number > 1)
        # The second block of a stage that pools has ordinary convolutions.
        h = features[number] = block(f"res{number}.1", h, 1 if kind == "pool" else kind, begins=False)
    h = None
    source = {stage: number for number, _, _, stage in REFINEMENTS[architecture]}
    for stage in reversed([number for number, _, _ in STAGES[architecture]]):
        h = refine(f"refine{source[stage]}", [features[stage]] if h is None else [features[stage], h])
    return conv(state, "end_conv", F.elu(norm("normalizer", h)), padding=1)
