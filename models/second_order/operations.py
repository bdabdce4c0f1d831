"""The layers of a U-Net with second derivatives that are cheap.

torch differentiates a convolution twice by a convolution with a kernel as large as the image, one with groups by one
convolution per group, and a normalisation by a dozen passes over memory for each product. The quasi-conservative loss
and conservative models consist of such derivatives. Here, and in ``normalisation``, they are written out, in
terms of what runs forward and backward anyway:

* A convolution y = w * x, a blur among them, is bilinear: its derivatives of all orders are those of ⟨g, w * x⟩ for g,
  for x and for w.
* A concatenation is linear. torch differentiates its transpose by padding each part with zeros, in another memory
  format, and adding up; as that of a split it is a concatenation again.

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

_higher_order = False
_compiled_passes = False
_gradients_of = "everything"


def is_higher_order() -> bool:
    """Whether layers use the functions of this file."""
    return _higher_order


def passes_are_compiled() -> bool:
    """Whether their passes over memory are to be compiled (torch.compile)."""
    return _compiled_passes


@contextlib.contextmanager
def higher_order(compiled: bool = False) -> Iterator[None]:
    """Let layers use the functions of this file within the context."""
    global _higher_order, _compiled_passes
    before = _higher_order, _compiled_passes
    _higher_order, _compiled_passes = True, compiled
    try:
        yield
    finally:
        _higher_order, _compiled_passes = before


def differentiated_twice(x: Tensor) -> bool:
    """Whether what is computed from a network's input ``x`` may be differentiated more than once, by reverse mode.

    Not under autocast, for whose casts these functions have no rule, nor for dual numbers, torch.func, torch.compile.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and x.requires_grad
        and not under_autocast(x)
        and forward_ad.unpack_dual(x).tangent is None
        and torch.func.debug_unwrap(x) is x
    )


def without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which operations on ``x``'s device are computed in the types of their operands."""
    device_type = x.device.type
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else contextlib.nullcontext()


def under_autocast(x: Tensor) -> bool:
    device_type = x.device.type
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


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
# Convolution, in one, two or three dimensions

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class _Convolution(Function):
    """The gradient of ⟨g, w * x⟩ for one of g, x and w: w * x (+ b) for g, and the two transposes for x and w.

    Of the one itself only shape and memory format matter; g may be None. For a ``constant`` w no more is kept than w.
    """

    @staticmethod
    def forward(ctx, one: int, geometry: tuple, constant: bool, *operands: Tensor | None) -> Tensor:
        g, x, weight, bias = operands
        ctx.one, ctx.geometry, ctx.constant, ctx.shape = one, geometry, constant, x.shape
        kept = (None, None, weight) if constant else (g, x, weight)
        ctx.save_for_backward(*(None if i == one else operand for i, operand in enumerate(kept)))
        if one == 0:
            return CONVOLUTIONS[x.ndim - 2](x, weight, bias, *geometry)
        return _convolution_backward(g, x, weight, geometry, (one == 1, one == 2, False))[one - 1]

    @staticmethod
    def backward(ctx, c: Tensor) -> tuple[Tensor | None, ...]:
        operands, geometry = [*ctx.saved_tensors], ctx.geometry
        operands[ctx.one] = c
        if operands[1] is None:
            operands[1] = _empty(ctx.shape, c)
        # Linear in x, as in a cotangent.
        asked = wanted(ctx, "", "", "", "cotangents", "cotangents", "weights", "weights")[3:]
        if ctx.one == 0 and not torch.is_grad_enabled():
            return None, None, None, None, *_convolution_backward(*operands, geometry, asked[1:])
        gradients = [None, None, None, c.sum((0, *range(2, c.ndim))) if asked[3] else None]
        for i in range(3):
            if asked[i] and i != ctx.one:
                given = [*operands]
                given[i] = operands[i].detach() if i else None
                gradients[i] = _Convolution.apply(i, geometry, ctx.constant, *given, None)
        return None, None, None, *gradients


def _empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """An image in the memory format of another."""
    image = like.ndim == 4 and not like.is_contiguous()
    channels_last = image and like.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format)


def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, geometry: tuple, asked: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    stride, padding, dilation, groups = geometry
    if len(weight) == 1:  # a clone in channels-last format has strides that torch's kernel refuses
        weight = weight.contiguous()
    bias_sizes, output_padding = [len(weight)], [0] * (x.ndim - 2)
    return torch.ops.aten.convolution_backward(
        g, x, weight, bias_sizes, stride, padding, dilation, False, output_padding, groups, list(asked)
    )


class _Layer:
    """torch's convolution, zeros outside of the image."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_higher_order():
            return super().forward(x)
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        return _Convolution.apply(0, geometry, False, None, x, view(self.weight), view(self.bias))


class Conv1d(_Layer, nn.Conv1d):
    pass


class Conv2d(_Layer, nn.Conv2d):
    pass


class Conv3d(_Layer, nn.Conv3d):
    pass


def blur(x: Tensor, kernel: Tensor, *, stride: int, padding: int = 0) -> Tensor:
    """Each channel of x (B, C, ...) correlated with a constant kernel of as many axes, every ``stride``-th pixel."""
    if is_higher_order():
        return _Convolution.apply(0, _geometry(x, stride, padding), True, None, x, _for_channels(kernel, x), None)
    return _precise(CONVOLUTIONS[kernel.ndim], x, kernel, stride, padding)


def blur_transposed(x: Tensor, kernel: Tensor, *, stride: int, padding: int = 0) -> Tensor:
    """The transpose of ``blur``: (B, C, H, ...) → (B, C, stride(H − 1) + k − 2·padding, ...)."""
    if is_higher_order():
        size = (stride * (n - 1) + k - 2 * padding for n, k in zip(x.shape[2:], kernel.shape, strict=True))
        given = x, _empty((*x.shape[:2], *size), x), _for_channels(kernel, x)
        return _Convolution.apply(1, _geometry(x, stride, padding), True, *given, None)
    transposed = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[kernel.ndim]
    return _precise(transposed, x, kernel, stride, padding)


def _for_channels(kernel: Tensor, x: Tensor) -> Tensor:
    return kernel.to(x.dtype).expand(x.shape[1], 1, *kernel.shape)


def _geometry(x: Tensor, stride: int, padding: int) -> tuple:
    dims = x.ndim - 2
    return (stride,) * dims, (padding,) * dims, (1,) * dims, x.shape[1]


def _precise(function: Callable[..., Tensor], x: Tensor, kernel: Tensor, stride: int, padding: int) -> Tensor:
    """``function`` of each channel; on the CPU in float32, also under autocast, since torch's kernel for the transposed
    of these convolutions takes a hundred times as long in bfloat16."""
    dtype = torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype
    with torch.autocast("cpu", enabled=False):
        kernel = _for_channels(kernel, x.to(dtype))
        return function(x.to(dtype), kernel, stride=stride, padding=padding, groups=x.shape[1]).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------
# Concatenation


class _Concatenate(Function):
    @staticmethod
    def forward(ctx, *parts: Tensor) -> Tensor:
        ctx.sizes = [part.shape[1] for part in parts]
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, g: Tensor) -> tuple[Tensor, ...]:
        return g.split(ctx.sizes, dim=1)


def concatenate(*parts: Tensor) -> Tensor:
    """Tensors (B, C_i, ...) → (B, ΣC_i, ...)."""
    return _Concatenate.apply(*parts) if is_higher_order() else torch.cat(parts, dim=1)
