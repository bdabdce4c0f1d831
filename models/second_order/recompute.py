"""Activation checkpointing that survives differentiating several times: memory for computation.

Of a block y = f(x, θ) only the inputs are kept; backward evaluates it once more. The quasi-conservative loss and
conservative models differentiate the backward pass itself, and a backward pass that merely restores what f would have
kept leaves those very activations in the graph of the derivative: torch.utils.checkpoint saves nothing there. So the
backward pass is itself a block of which only the inputs are kept,

    f: x ↦ y,    f': (x, ȳ) ↦ ȳᵀ ∂f/∂x,    f'': (x, ȳ, x̄) ↦ the derivatives of f' in direction x̄,    …

each evaluated from its inputs with the graphs of all lower ones built and dropped again inside one block.

Source: Griewank, Walther, "Evaluating Derivatives" (SIAM, 2008), Chapter 12, for one order; Chen, Xu, Zhang, Guestrin,
"Training Deep Nets with Sublinear Memory Cost" (2016).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from functools import partial
from types import MethodType

import torch
from torch import Tensor, nn

from models.second_order.normalisation import Dropout
from models.second_order.operations import (
    gradients_of,
    higher_order,
    is_higher_order,
    passes_are_compiled,
    setting,
    view,
    wanted,
)


def recompute_activations(network: nn.Module) -> None:
    """Have the training of a network keep no more than the inputs of its blocks.

    Blocks are its modules with ``recomputable = True``: they map tensors to one tensor, and their only randomness is
    ``Dropout`` under given keys.

    Raises:
        ValueError: there are none.
    """
    blocks = [module for module in network.modules() if getattr(module, "recomputable", False)]
    if not blocks:
        raise ValueError("training.activation_checkpointing=True: the network has no blocks for it")
    for block in blocks:
        block.forward = MethodType(_forward, block)  # a method, so that a copy of the block has its own


def _forward(block: nn.Module, *inputs: Tensor | None) -> Tensor:
    evaluate = MethodType(type(block).forward, block)
    if not (block.training and torch.is_grad_enabled()):
        return evaluate(*inputs)
    dropouts = [module for module in block.modules() if isinstance(module, Dropout)]
    keys = [dropout.keys for dropout in dropouts]
    # Known here alone: backward, which evaluates again, is outside of the network.
    context = partial(higher_order, passes_are_compiled()) if is_higher_order() else contextlib.nullcontext

    def function(*inputs: Tensor | None) -> Tensor:
        # By the time of backward the layers may have been given the keys of another batch.
        for dropout, own in zip(dropouts, keys, strict=True):
            dropout.keys = own
        with context():
            return evaluate(*inputs)

    return recomputed(function, inputs, tuple(block.parameters()))


def recomputed(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], parameters: Sequence[Tensor] = ()
) -> Tensor:
    """``function(*inputs)``, differentiable as often as ``function`` itself, keeping only the tensors given here.

    Args:
        function: deterministic; depends on nothing that requires a gradient but its inputs and ``parameters``. It is
            evaluated again during backward, under the autocast setting of now.
        inputs: what it is called with.
        parameters: leaves it uses besides.
    """
    given = [x is not None for x in inputs]
    tensors = [x for x in inputs if x is not None]
    device_type, autocast = tensors[0].device.type, contextlib.nullcontext()
    if torch.amp.is_autocast_available(device_type):
        dtype, enabled = torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type)
        # Without the cache: what is cast while no graph is built must not be found while one is.
        autocast = torch.autocast(device_type, dtype, enabled, cache_enabled=False)

    def call(*tensors: Tensor) -> tuple[Tensor]:
        rest = iter(tensors)
        with autocast:
            return (function(*(next(rest) if there else None for there in given)),)

    # A block is given an image and, of what depends on weights alone, the noise level's embedding.
    kinds = ("inputs", *("weights" for _ in tensors[1:]))
    return _Recomputed.apply(call, parameters, kinds, *map(view, (*tensors, *parameters)))[0]


class _Recomputed(torch.autograd.Function):
    """``function`` of inputs of the given kinds, with ``parameters`` that it uses besides; both follow once more as
    ``tensors``, from which the graph learns of them."""

    @staticmethod
    def forward(
        ctx, function: Callable[..., Sequence[Tensor]], parameters: Sequence[Tensor], kinds: Sequence[str], *tensors
    ) -> tuple[Tensor, ...]:
        inputs = tensors[: len(kinds)]
        ctx.function, ctx.parameters, ctx.kinds = function, parameters, kinds
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(function(*inputs))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        function, inputs, parameters, count = ctx.function, ctx.saved_tensors, ctx.parameters, len(ctx.kinds)
        what = setting()
        needed = wanted(ctx, "", "", "", *ctx.kinds, *("weights" for _ in parameters))[3:]
        asked = [index for index, flag in enumerate(needed) if flag]
        present = [index for index, cotangent in enumerate(cotangents) if cotangent is not None]

        def derivative(*arguments: Tensor) -> Sequence[Tensor]:
            nested = torch.is_grad_enabled()  # part of a derivative of higher order
            with torch.enable_grad():
                x = [
                    argument if nested and argument.requires_grad else argument.detach().requires_grad_(i in asked)
                    for i, argument in enumerate(arguments[:count])
                ]
                y = function(*x)
                outputs = [(y[i], v) for i, v in zip(present, arguments[count:], strict=True) if y[i].requires_grad]
                tensors = [(*x, *parameters)[i] for i in asked]
                if not outputs:
                    return [torch.zeros_like(tensor) for tensor in tensors]
                values, directions = zip(*outputs, strict=True)
                with gradients_of(what):
                    return torch.autograd.grad(values, tensors, directions, create_graph=nested, materialize_grads=True)

        arguments = [*inputs, *(cotangents[i] for i in present)]
        if torch.is_grad_enabled():
            kinds = ["weights" if kind == "weights" else "inputs" for kind in ctx.kinds]
            kinds += ["cotangents"] * len(present)
            found = _Recomputed.apply(derivative, parameters, kinds, *map(view, (*arguments, *parameters)))
        else:
            found = derivative(*arguments)
        gradients = dict(zip(asked, found, strict=True))
        return None, None, None, *(gradients.get(index) for index in range(len(needed)))
