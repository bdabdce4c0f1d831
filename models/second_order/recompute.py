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

import abc
import contextlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.dropout import Dropout
from models.second_order.operations import higher_order, is_higher_order

__all__ = ["Recomputable", "recompute_activations", "recomputed"]


class Recomputable(nn.Module, abc.ABC):
    """A block whose ``compute`` maps tensors to one tensor; its only randomness is dropout under given keys.

    While ``recompute`` is set, training keeps of it no more than its inputs.
    """

    recompute = False

    @abc.abstractmethod
    def compute(self, *inputs: Tensor | None) -> Tensor:
        """What the block does."""

    def forward(self, *inputs: Tensor | None) -> Tensor:
        if not (self.recompute and self.training and torch.is_grad_enabled()):
            return self.compute(*inputs)
        dropouts = [module for module in self.modules() if isinstance(module, Dropout)]
        keys = [dropout.keys for dropout in dropouts]
        # Known here alone: backward, which evaluates again, is outside of the network.
        context = higher_order if is_higher_order() else contextlib.nullcontext

        def compute(*inputs: Tensor | None) -> Tensor:
            # By the time of backward the layers may have been given the keys of another batch.
            for dropout, own in zip(dropouts, keys, strict=True):
                dropout.keys = own
            with context():
                return self.compute(*inputs)

        return recomputed(compute, inputs, tuple(self.parameters()))


def recompute_activations(network: nn.Module) -> int:
    """Set ``recompute`` in all blocks of a network; returns how many there are.

    Raises:
        ValueError: there are none.
    """
    blocks = [module for module in network.modules() if isinstance(module, Recomputable)]
    if not blocks:
        raise ValueError("training.activation_checkpointing=True: the network has no blocks for it")
    for block in blocks:
        block.recompute = True
    return len(blocks)


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
    device_type = tensors[0].device.type
    # Without the cache: what is cast while no graph is built must not be found while one is.
    autocast = torch.autocast(
        device_type,
        dtype=torch.get_autocast_dtype(device_type),
        enabled=torch.is_autocast_enabled(device_type),
        cache_enabled=False,
    )

    def call(*tensors: Tensor) -> tuple[Tensor]:
        rest = iter(tensors)
        with autocast:
            return (function(*(next(rest) if there else None for there in given)),)

    (value,) = _apply(call, tensors, parameters)
    return value


def _apply(
    function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    # Views, because the engine does not tell whether the gradient of a leaf is asked for.
    views = [x.view_as(x) for x in (*inputs, *parameters)]
    return _Recomputed.apply(function, parameters, *views)


class _Recomputed(torch.autograd.Function):
    """``function`` of inputs, with ``parameters`` that it uses besides; both follow once more as ``tensors``, from
    which the graph learns of them."""

    @staticmethod
    def forward(
        ctx, function: Callable[..., Sequence[Tensor]], parameters: Sequence[Tensor], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        inputs = tensors[: len(tensors) - len(parameters)]
        ctx.function, ctx.parameters = function, parameters
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return tuple(function(*inputs))

    @staticmethod
    def backward(ctx, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        function, inputs, parameters = ctx.function, ctx.saved_tensors, ctx.parameters
        count = len(inputs)
        # ctx.needs_input_grad says what has a gradient, not what is asked for now; computing all would multiply the
        # cost with every order. (torch's hooks for several gradients rest on the same question to the engine.)
        asked = [
            index
            for index, (node, _) in enumerate(ctx.next_functions)
            if node is not None and torch._C._will_engine_execute_node(node)
        ]
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
                wanted = [(*x, *parameters)[i] for i in asked]
                if not outputs:
                    return [torch.zeros_like(tensor) for tensor in wanted]
                values, directions = zip(*outputs, strict=True)
                return torch.autograd.grad(values, wanted, directions, create_graph=nested, materialize_grads=True)

        arguments = [*inputs, *(cotangents[i] for i in present)]
        found = _apply(derivative, arguments, parameters) if torch.is_grad_enabled() else derivative(*arguments)
        gradients: list[Tensor | None] = [None] * len(ctx.next_functions)
        for index, gradient in zip(asked, found, strict=True):
            gradients[index] = gradient
        return None, None, *gradients
