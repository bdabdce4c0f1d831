"""The layers of a U-Net with second derivatives that are cheap.

torch differentiates a convolution twice by a convolution with a kernel as large as the image, one with groups by one
convolution per group, and a normalisation by a dozen passes over memory for each product. The quasi-conservative loss
and conservative models consist of such derivatives. Here, and in ``normalisation``, they are written out, in
terms of what runs forward and backward anyway:

* A convolution y = w * x is bilinear. With its two transposes, ȳ ↦ x̄ and (ȳ, x) ↦ w̄, it forms a set that is closed
  under differentiation.
* A blur is linear, and the derivative of its transpose the blur again; so it is with a concatenation and its
  transpose, which torch differentiates by padding each part with zeros, in another memory format, and adding up.

All can be differentiated any number of times. Layers use them only where the input of the network itself has a
gradient (``higher_order``): to train by the score alone torch's own are faster by what a call from Python costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

__all__ = [
    "Conv2d",
    "blur",
    "blur_transposed",
    "concatenate",
    "differentiated_twice",
    "gradients_of",
    "higher_order",
    "is_higher_order",
    "setting",
    "view",
    "wanted",
]

_higher_order = False
_gradients_of = "everything"


def is_higher_order() -> bool:
    """Whether layers use the functions of this file."""
    return _higher_order


@contextlib.contextmanager
def higher_order() -> Iterator[None]:
    """Let layers use the functions of this file within the context."""
    global _higher_order
    before, _higher_order = _higher_order, True
    try:
        yield
    finally:
        _higher_order = before


def differentiated_twice(x: Tensor) -> bool:
    """Whether what is computed from a network's input ``x`` may be differentiated more than once, by reverse mode.

    Not under autocast, for whose casts these functions have no rule, nor for dual numbers, torch.func, torch.compile.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.requires_grad
        and not torch.is_autocast_enabled(x.device.type)
        and forward_ad.unpack_dual(x).tangent is None
        and torch.func.debug_unwrap(x) is x
    )


@contextlib.contextmanager
def gradients_of(what: str) -> Iterator[None]:
    """Within the context backward passes through the functions of this file form the gradients of ``what`` alone:

    * 'inputs', the images, and not of weights: for Jᵀv;
    * 'cotangents', which a backward pass that is differentiated was given and in which it is linear: for the
      derivative of Jᵀu along u, which is Jv.

    torch does not tell such a function which of its gradients a pass needs. The setting is that of the process, because
    torch runs backward passes in threads of its own; two threads that differentiate at a time must not differ in it.
    """
    global _gradients_of
    before, _gradients_of = _gradients_of, what
    try:
        yield
    finally:
        _gradients_of = before


def setting() -> str:
    """What ``gradients_of`` was given; 'everything' outside of it."""
    return _gradients_of


def wanted(ctx, *kinds: str) -> list[bool]:
    """Of which of its first inputs a function forms the gradient now, given their kinds: 'cotangents', 'inputs' or
    'weights'."""
    excluded = {"everything": (), "inputs": ("weights",), "cotangents": ("weights", "inputs")}[_gradients_of]
    return [needed and kind not in excluded for needed, kind in zip(ctx.needs_input_grad, kinds, strict=False)]


def view(parameter: Tensor | None) -> Tensor | None:
    """The same tensor as a node of its own in the graph: what functions of one evaluation contribute to its gradient is
    added up there, before it joins that of other evaluations."""
    return None if parameter is None else parameter.view_as(parameter)


# ---------------------------------------------------------------------------------------------------------------
# Convolution


class _Conv(Function):
    """(x, w, b) ↦ w * x + b."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, geometry: tuple) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = geometry
        return F.conv2d(x, weight, bias, *geometry)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        asked = wanted(ctx, "cotangents", "weights", "weights")  # linear in x, as in a cotangent
        if not torch.is_grad_enabled():
            return *_convolution_backward(g, x, weight, ctx.geometry, asked), None
        return (
            _ConvInput.apply(g, weight, x.detach(), ctx.geometry) if asked[0] else None,
            _ConvWeight.apply(g, x, weight.detach(), ctx.geometry) if asked[1] else None,
            g.sum((0, 2, 3)) if asked[2] else None,
            None,
        )


class _ConvInput(Function):
    """(ȳ, w) ↦ x̄, the transpose in x; of ``like``, an x, only the shape matters."""

    @staticmethod
    def forward(ctx, g: Tensor, weight: Tensor, like: Tensor, geometry: tuple) -> Tensor:
        ctx.save_for_backward(g, weight)
        ctx.geometry = geometry
        return _convolution_backward(g, like, weight, geometry, [True, False, False])[0]

    @staticmethod
    def backward(ctx, c: Tensor) -> tuple[Tensor | None, ...]:
        g, weight = ctx.saved_tensors
        for_g, for_weight = wanted(ctx, "cotangents", "weights")
        if not torch.is_grad_enabled():
            product = F.conv2d(c, weight, None, *ctx.geometry) if for_g else None
            return product, _convolution_backward(g, c, weight, ctx.geometry, [False, for_weight, False])[1], None, None
        return (
            _Conv.apply(c, weight, None, ctx.geometry) if for_g else None,
            _ConvWeight.apply(g, c, weight.detach(), ctx.geometry) if for_weight else None,
            None,
            None,
        )


class _ConvWeight(Function):
    """(ȳ, x) ↦ w̄, the transpose in w; of ``like``, a w, only the shape matters."""

    @staticmethod
    def forward(ctx, g: Tensor, x: Tensor, like: Tensor, geometry: tuple) -> Tensor:
        ctx.save_for_backward(g, x)
        ctx.geometry = geometry
        return _convolution_backward(g, x, like, geometry, [False, True, False])[1]

    @staticmethod
    def backward(ctx, c: Tensor) -> tuple[Tensor | None, ...]:
        g, x = ctx.saved_tensors
        for_g, for_x, *_ = ctx.needs_input_grad
        return (
            _Conv.apply(x, c, None, ctx.geometry) if for_g else None,
            _ConvInput.apply(g, c, x.detach(), ctx.geometry) if for_x else None,
            None,
            None,
        )


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: tuple, asked: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    if len(weight) == 1:  # a clone in channels-last format has strides that torch's kernel refuses
        weight = weight.contiguous()
    bias_sizes, output_padding = [len(weight)], [0, 0]
    return torch.ops.aten.convolution_backward(
        g, x, weight, bias_sizes, stride, padding, dilation, False, output_padding, groups, list(asked)
    )


class Conv2d(nn.Conv2d):
    """torch's, zeros outside of the image."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_higher_order():
            return super().forward(x)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Conv.apply(x, view(self.weight), view(self.bias), geometry)


# ---------------------------------------------------------------------------------------------------------------
# Blur


class _Blur(Function):
    """The correlation of each channel of x (B, C, H, W) with one kernel, which has no gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
        ctx.kernel, ctx.options, ctx.size = kernel, (stride, padding), x.shape[2:]
        return _correlated(x, kernel, stride, padding)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, None]:
        return _BlurTransposed.apply(g, ctx.kernel, *ctx.options, ctx.size), None, None, None


class _BlurTransposed(Function):
    """The transpose of ``_Blur`` on images of a given size."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, stride: int, padding: int, size: Sequence[int]) -> Tensor:
        ctx.kernel, ctx.options = kernel, (stride, padding)
        missing = [n - m for n, m in zip(size, _transposed_size(x, kernel, stride, padding), strict=True)]
        return _transposed(x, kernel, stride, padding, missing)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, None, None, None, None]:
        return _Blur.apply(g, ctx.kernel, *ctx.options), None, None, None, None


def _each(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, -1, -1)


def _correlated(x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, _each(kernel, x), None, stride, padding, groups=x.shape[1])


def _transposed(x: Tensor, kernel: Tensor, stride: int, padding: int, missing: int | Sequence[int] = 0) -> Tensor:
    return F.conv_transpose2d(x, _each(kernel, x), None, stride, padding, missing, groups=x.shape[1])


def _transposed_size(x: Tensor, kernel: Tensor, stride: int, padding: int) -> list[int]:
    return [stride * (n - 1) + k - 2 * padding for n, k in zip(x.shape[2:], kernel.shape, strict=True)]


def blur(x: Tensor, kernel: Tensor, *, stride: int, padding: int = 0) -> Tensor:
    """Each channel of x (B, C, H, W) correlated with a constant kernel (k, l), every ``stride``-th pixel of it."""
    if is_higher_order():
        return _Blur.apply(x, kernel, stride, padding)
    return _precise(_correlated, x, kernel, stride, padding)


def blur_transposed(x: Tensor, kernel: Tensor, *, stride: int, padding: int = 0) -> Tensor:
    """The transpose of ``blur``: (B, C, H, W) → (B, C, stride(H − 1) + k − 2·padding, ...)."""
    if is_higher_order():
        return _BlurTransposed.apply(x, kernel, stride, padding, _transposed_size(x, kernel, stride, padding))
    return _precise(_transposed, x, kernel, stride, padding)


def _precise(function: Callable[..., Tensor], x: Tensor, *options) -> Tensor:
    """``function(x)``; on the CPU in float32, also under autocast, since torch's kernel for the transposed of these
    convolutions takes a hundred times as long in bfloat16."""
    if x.device.type != "cpu":
        return function(x, *options)
    with torch.autocast("cpu", enabled=False):
        return function(x.to(torch.promote_types(x.dtype, torch.float32)), *options).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Concatenation


class _Concatenate(Function):
    """Tensors (B, C_i, H, W) ↦ (B, ΣC_i, H, W)."""

    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:
        return _Split.apply(g, ctx.sizes)


class _Split(Function):
    """Its transpose, (B, ΣC_i, H, W) ↦ tensors (B, C_i, H, W)."""

    @staticmethod
    def forward(ctx, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return x.split(sizes, dim=1)

    @staticmethod
    def backward(ctx, *parts: Tensor) -> tuple[Tensor, None]:
        return _Concatenate.apply(*parts), None


def concatenate(*parts: Tensor) -> Tensor:
    """Tensors (B, C_i, H, W) → (B, ΣC_i, H, W)."""
    return _Concatenate.apply(*parts) if is_higher_order() else torch.cat(parts, dim=1)
