"""A score with its Jacobian-vector products as one compiled function.

torch.compile cannot differentiate twice through a compiled module. But with Jᵀv and Jv formed inside of what is
compiled, by functional transforms, only the gradient with respect to the weights is left to take from outside.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

__all__ = ["CompiledProducts"]


class CompiledProducts:
    """s(x, t), Jv and Jᵀv of a network of x (B, ...) and t (B,), differentiable once with respect to its weights.

    Compiled at the first call, again for other sizes and for each number of directions; that takes minutes.

    Args:
        model: called with x, t and, where it is given one, ``class_labels`` (B,).
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._evaluate = torch.compile(self._products)

    def __call__(
        self, x: Tensor, t: Tensor, directions: Iterable[Tensor], class_labels: Tensor | None = None
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The score (B, ...) and, for each direction v (B, ...), Jv and Jᵀv."""
        arguments = (t,) if class_labels is None else (t, class_labels)
        return self._evaluate(dict(self.model.named_parameters()), x.detach(), arguments, list(directions))

    def _products(
        self, weights: dict[str, Tensor], x: Tensor, arguments: tuple[Tensor, ...], directions: list[Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        value, pull = vjp(lambda x: functional_call(self.model, weights, (x, *arguments)), x)
        products = []
        for v in directions:
            (jtv,) = pull(v)
            # Jᵀu is linear in u: its derivative in direction v is Jv.
            jv = grad(lambda u, v=v: (pull(u)[0] * v).sum())(v)
            products.append((jv, jtv))
        return value, products
