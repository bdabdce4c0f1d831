"""Group normalisation followed by x·sigmoid(x) and dropout, with second derivatives that are cheap.

A normalisation a = (x − μ)r, r = (var + ε)^(−1/2), over groups of n numbers has the Jacobian

    J = r(I − 11ᵀ/n − aaᵀ/n) = Jᵀ,

so that what the backward pass does to a gradient also maps a tangent forward, and

    ∇ₓ(cᵀJu) = −(r/n)(a cᵀJu + Jc aᵀu + Ju aᵀc).

x ↦ x·sigmoid(x) acts on each number by itself: its first two derivatives are computed once and then multiply. Dropout's
factors are part of them.
See ``models.second_order`` for where these are used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, cached_property, lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from experiment.randomness import mix32, random_bits
from models.second_order.operations import is_higher_order, passes_are_compiled, view, wanted

# ---------------------------------------------------------------------------------------------------------------
# Dropout


class Dropout(nn.Module):
    """In training, each number of (B, C, H, W) becomes 0 with probability p and is else divided by 1 − p.

    The masks belong to a sample: not to the batch, the process or the device. Number j of a sample becomes 0 if

        (a·mix(j) + b + 2⁶³) mod 2⁶⁴  <  p·2⁶⁴

    under the sample's key, two random integers a and b of 64 bits. Multiply-shift hashing is pairwise independent;
    mix, a fixed scrambling of j, prevents patterns of neighbours. Under the same keys a second evaluation sees the same
    network: probes in chunks and recomputation need it.

    Attributes:
        keys: int64 (B, 2), used until others are set; None: keys from torch's global stream, others at every call.

    Sources: Srivastava, Hinton, Krizhevsky, Sutskever, Salakhutdinov (JMLR 2014); Dietzfelbinger, "Universal hashing
    and k-wise independent random variables via integer arithmetic without primes" (STACS 1996) for the hash.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.keys: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        factor = self.factor(x)
        return x if factor is None else x * factor

    def factor(self, x: Tensor) -> Tensor | None:
        """What the numbers of x (B, C, H, W) are multiplied by, 0 or 1/(1 − p); None where that is 1 for all."""
        if not self.training or self.p == 0:
            return None
        keys = random_bits((len(x), 2), device=x.device) if self.keys is None else self.keys
        channels, height, *others = x.shape[1:]
        compute = _compiled(_factor) if passes_are_compiled() else _factor
        return compute(keys, channels, height, math.prod(others), self.p, x.dtype).view_as(x)


def _factor(keys: Tensor, channels: int, height: int, width: int, p: float, dtype: torch.dtype) -> Tensor:
    # In the order of channels-last memory, which is that of the images.
    position = torch.arange(height * width * channels, device=keys.device).view(height, width, channels)
    multiplier, offset = keys[:, :, None, None, None].unbind(1)
    bits = (multiplier * mix32(position)).add_(offset)
    # The bits are those of a signed integer, between −2⁶³ and 2⁶³. As a factor, because torch.where is slow, and
    # slower still to differentiate.
    factor = (bits >= round((p - 0.5) * 2**64)).to(dtype).mul_(1 / (1 - p))
    return factor.permute(0, 3, 1, 2)


def set_dropout_keys(layers: Sequence[Dropout], keys: Tensor) -> None:
    """Give each layer its keys for the batch that comes next: int64 (B, layers, 2)."""
    for layer, own in zip(layers, keys.unbind(1), strict=True):
        layer.keys = own


# ---------------------------------------------------------------------------------------------------------------
# Group normalisation


class GroupNorm(nn.GroupNorm):
    """torch's, for images (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.dtype != self.weight.dtype:
            # Autocast leaves half precision to torch's kernel, which on the CPU is several times slower in it.
            return super().forward(x.to(self.weight.dtype)).to(x.dtype)
        return super().forward(x)


def _format(x: Tensor) -> torch.memory_format:
    """What torch's kernels of group normalisation take: on the CPU that of ``x``."""
    channels_last = x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def _sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _of_channels(groups: Tensor, channels: int) -> Tensor:
    """(..., groups) → (..., C)."""
    return groups.repeat_interleave(channels // groups.shape[-1], -1)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _normalised(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """a (B, groups, C/groups, H, W) and r, as functions of x that torch differentiates."""
    x = x.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(x, (2, 3, 4), correction=0, keepdim=True)
    rstd = (variance + eps).rsqrt()
    return (x - mean) * rstd, rstd


def _project(u: Tensor, x: Tensor, groups: int, eps: float) -> Tensor:
    """Ju (B, C, H, W), as a function of u and x that torch differentiates."""
    (a, rstd), u = _normalised(x, groups, eps), u.unflatten(1, (groups, -1))
    mean, slope = u.mean((2, 3, 4), keepdim=True), (a * u).mean((2, 3, 4), keepdim=True)
    return (rstd * (u - mean - a * slope)).flatten(1, 2)


# ---------------------------------------------------------------------------------------------------------------
# Followed by φ(z) = d·z·sigmoid(z), d the factors of dropout or 1


class _Constants:
    """What the derivatives of y = φ(z), z = γa + β, share: numbers without a graph, computed when first asked for, or
    again in every pass if the passes are ``compiled``, where that takes no time."""

    def __init__(
        self,
        x: Tensor,
        z: Tensor,
        mean: Tensor,
        rstd: Tensor,
        same_group: Tensor,
        factor: Tensor | None,
        eps: float,
        compiled: bool = False,
    ) -> None:
        self.x, self.z, self.mean, self.rstd, self.factor = x.detach(), z.detach(), mean, rstd, factor
        self.same_group, self.eps, self.compiled = same_group, eps, compiled

    def compute(self, name: str, *arguments) -> tuple[Tensor, ...]:
        """The pass of that name."""
        if not self.compiled:
            return getattr(self, name)(*arguments)
        tensors = self.x, self.z, self.mean, self.rstd, self.same_group, self.factor
        return _compiled(_pass)(name, tensors, self.eps, *arguments)

    # -- passes over memory

    def gradients(
        self, g: Tensor | None, g_z: Tensor | None, weight: Tensor, asked: list[bool]
    ) -> tuple[Tensor | None, ...]:
        """Of x, γ and β, given those of y and z."""
        total = g_z if g is None else self.slope * g
        if g is not None and g_z is not None:
            total = total + g_z
        x, groups = self.x, self.rstd.shape[1]
        operands = total.contiguous(memory_format=_format(x)), x, self.mean, self.rstd, weight, *_sizes(x), groups
        return torch.ops.aten.native_group_norm_backward(*operands, asked)

    def product_for_c(self, g: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """J(γφ'(z)ȳ), and the sums that belong to it."""
        return self.project(self.slope * g, weight)

    def product_for_g(self, c: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """γφ'(z)Jc, and Jc with its sums."""
        projected, sums = self.project(c)
        return (self.slope * projected).mul_(_per_channel(weight[None])), projected, sums

    def derivatives_for_c(
        self, g: Tensor, c: Tensor, ju: Tensor, au: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of (γφ'(z)ȳ)ᵀJc, for ȳ, x, γ and z; ``ju`` and ``au`` from ``product_for_c``."""
        jc, ac = self.project(c)
        for_g = (self.slope * jc).mul_(_per_channel(weight[None]))
        return for_g, *self.derivatives(g, weight, (ju, au), (jc, ac))

    def derivatives_for_g(
        self, c: Tensor, g: Tensor, jc: Tensor, ac: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of the same, for c, x, γ and z; ``jc`` and ``ac`` from ``product_for_g``."""
        ju, au = self.project(self.slope * g, weight)
        return ju, *self.derivatives(g, weight, (ju, au), (jc, ac))

    # -- their parts

    @cached_property
    def scale(self) -> Tensor:
        """r of every channel, (B, C)."""
        return _of_channels(self.rstd, self.x.shape[1])

    @cached_property
    def minus_scale_over_size(self) -> Tensor:
        """−r/n of every channel, (B, C)."""
        return self.scale * (-self.rstd.shape[1] / math.prod(self.x.shape[1:]))

    @cached_property
    def normalised(self) -> Tensor:
        """a (B, C, H, W)."""
        shift = _of_channels(self.mean, self.x.shape[1]).mul(self.scale).neg_()
        return torch.addcmul(_per_channel(shift), self.x, _per_channel(self.scale))

    @cached_property
    def slope(self) -> Tensor:
        """φ'(z)."""
        ones = self.z.new_ones(()).expand_as(self.z) if self.factor is None else self.factor
        return torch.ops.aten.silu_backward(ones, self.z)

    @cached_property
    def half_curvature(self) -> Tensor:
        """½φ''(z) = (1 − s)(φ' − ½φ), s = sigmoid(z)."""
        s = torch.sigmoid(self.z)
        scaled = self.z if self.factor is None else self.z * self.factor
        bracket = torch.addcmul(self.slope, s, scaled, value=-0.5)
        return bracket.mul_(s.neg_().add_(1))

    def project(self, u: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """J(γu) (B, C, H, W), and aᵀγu of each channel's group (B, C); γ (C,), or 1."""
        sums = torch.stack([u.sum((2, 3)), (self.normalised * u).sum((2, 3))])
        scale = self.scale
        if weight is not None:
            sums, scale = sums * weight, scale * weight
        sums = sums @ self.same_group
        shift, slope = (sums * self.minus_scale_over_size)[..., None, None].unbind()
        product = torch.addcmul(shift, u, _per_channel(scale))
        return product.addcmul_(self.normalised, slope), sums[1]

    def derivatives(
        self, g: Tensor, weight: Tensor, ju: tuple[Tensor, Tensor], jc: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The derivatives of (γφ'(z)ȳ)ᵀJ(x)c for x, γ and z, with u = γφ'(z)ȳ; ``ju`` and ``jc`` from ``project``."""
        (ju, au), (jc, ac) = ju, jc
        for_z = g * jc
        products = (self.slope * for_z).sum((2, 3))  # the part of each channel in uᵀJc, over γ
        for_z.mul_(self.half_curvature).mul_(_per_channel(2 * weight[None]))
        coefficients = torch.stack([(products * weight) @ self.same_group, au, ac]) * self.minus_scale_over_size
        first, second, third = coefficients[..., None, None].unbind()
        for_x = (self.normalised * first).addcmul_(jc, second).addcmul_(ju, third)
        return for_x, products.sum(0), for_z

    # As functions that torch differentiates:

    def times_slope(self, g: Tensor, z: Tensor) -> Tensor:
        """φ'(z)g."""
        s = torch.sigmoid(z)
        slope = s * (1 + z * (1 - s))
        return g * (slope if self.factor is None else slope * self.factor)

    def product(self, c: Tensor, g: Tensor, x: Tensor, weight: Tensor, z: Tensor) -> Tensor:
        """cᵀJ(γφ'(z)ȳ), a number."""
        u = self.times_slope(g, z) * _per_channel(weight[None])
        return (c * _project(u, x, self.rstd.shape[1], self.eps)).sum()


@lru_cache(maxsize=64)
def _same_group(channels: int, groups: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(C, C), 1 where two channels are of one group: a product with it sums over groups."""
    group = torch.arange(channels, device=device) // (channels // groups)
    return (group[:, None] == group).to(dtype)


def _pass(name: str, tensors: tuple, eps: float, *arguments) -> tuple[Tensor, ...]:
    return getattr(_Constants(*tensors, eps), name)(*arguments)


def _evaluate(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, factor: Tensor | None
) -> tuple[Tensor, ...]:
    """y, z, and mean and r of every group."""
    z, mean, rstd = torch.native_group_norm(x, weight, bias, *_sizes(x), groups, eps)
    y = F.silu(z)
    return y if factor is None else y.mul_(factor), z, mean, rstd


@cache
def _compiled(function: Callable) -> Callable:
    """Without a graph, and for all sizes at once: there are dozens in a network."""
    compiled = torch.compile(function, dynamic=True)
    return lambda *arguments: compiled(*(a.detach() if torch.is_tensor(a) else a for a in arguments))


class _NormAct(Function):
    """(x, γ, β) ↦ y = φ(z) and, for what is derived from y, z = γa + β."""

    @staticmethod
    def forward(
        ctx, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, factor: Tensor | None, compiled: bool
    ) -> tuple[Tensor, Tensor]:
        if compiled:
            y, z, mean, rstd = _compiled(_evaluate)(x, weight, bias, groups, eps, factor)
        else:
            x = x.contiguous(memory_format=_format(x))
            y, z, mean, rstd = _evaluate(x, weight, bias, groups, eps, factor)
        ctx.save_for_backward(x, weight, z)
        same_group = _same_group(x.shape[1], groups, x.dtype, x.device)
        ctx.constants = _Constants(x, z, mean, rstd, same_group, factor, eps, compiled)
        ctx.set_materialize_grads(False)
        return y, z

    @staticmethod
    def backward(ctx, g: Tensor | None, g_z: Tensor | None) -> tuple[Tensor | None, ...]:
        x, weight, z = ctx.saved_tensors
        constants, asked = ctx.constants, wanted(ctx, "inputs", "weights", "weights")
        groups, eps = constants.rstd.shape[1], constants.eps
        if not torch.is_grad_enabled():
            return *constants.compute("gradients", g, g_z, weight, asked), None, None, None, None
        for_x = for_weight = for_bias = None
        if asked[0] and g is not None:
            for_x = _Product.apply(True, g, x, weight, z, constants)
        if asked[0] and g_z is not None:
            part = _project(g_z * _per_channel(weight[None]), x, groups, eps)
            for_x = part if for_x is None else for_x + part
        if any(asked[1:]):
            total = (0 if g is None else constants.times_slope(g, z)) + (0 if g_z is None else g_z)
            for_weight = (total * _normalised(x, groups, eps)[0].flatten(1, 2)).sum((0, 2, 3))
            for_bias = total.sum((0, 2, 3))
        return for_x, for_weight, for_bias, None, None, None, None


class _Product(Function):
    """Derivatives of b = cᵀJ(γφ'(z)ȳ): with ``for_c`` that for c, x̄ = J(γφ'(z)ȳ), else that for ȳ, γφ'(z)Jc.

    ``given`` is the other of the two vectors, ȳ or c.
    """

    @staticmethod
    def forward(ctx, for_c: bool, given: Tensor, x: Tensor, weight: Tensor, z: Tensor, constants: _Constants) -> Tensor:
        ctx.for_c, ctx.constants = for_c, constants
        if for_c:
            projected, ctx.sums = constants.compute("product_for_c", given, weight)
            result = projected
        else:
            result, projected, ctx.sums = constants.compute("product_for_g", given, weight)
        ctx.save_for_backward(given, x, weight, z, projected)
        return result

    @staticmethod
    def backward(ctx, other: Tensor) -> tuple[Tensor | None, ...]:
        given, x, weight, z, projected = ctx.saved_tensors
        constants, for_c = ctx.constants, ctx.for_c
        asked = wanted(ctx, "", "cotangents", "inputs", "weights", "inputs")[1:]
        if not any(asked[1:]):
            return None, _Product.apply(not for_c, other, x, weight, z, constants), None, None, None, None
        if torch.is_grad_enabled():  # for what is differentiated further than need be fast
            # Views, so that x does not count once more where z is a function of it.
            views = [tensor.view_as(tensor) for tensor in (given, x, weight, z)]
            pair = (other, views[0]) if for_c else (views[0], other)
            tensors = [view for view, needed in zip(views, asked, strict=True) if needed]
            total = constants.product(*pair, *views[1:])
            found = iter(torch.autograd.grad(total, tensors, create_graph=True, materialize_grads=True))
            return None, *(next(found) if needed else None for needed in asked), None
        name = "derivatives_for_c" if for_c else "derivatives_for_g"
        return None, *constants.compute(name, given, other, projected, ctx.sums, weight), None


def norm_act(norm: GroupNorm, activation: nn.Module, x: Tensor, dropout: Dropout | None = None) -> Tensor:
    """``dropout(activation(norm(x)))`` for images (B, C, H, W), signals (B, C, L) or volumes (B, C, D, H, W)."""
    if is_higher_order() and isinstance(activation, nn.SiLU):
        if x.ndim != 4:  # no neighbours are looked at
            return norm_act(norm, activation, x.flatten(2)[..., None], dropout).reshape(x.shape)
        factor = None if dropout is None else dropout.factor(x)
        options = norm.num_groups, norm.eps, factor, passes_are_compiled()
        return _NormAct.apply(x, view(norm.weight), view(norm.bias), *options)[0]
    y = activation(norm(x))
    return y if dropout is None else dropout(y)
