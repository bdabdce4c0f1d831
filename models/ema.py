"""Exponential moving average of a model's weights, by name.

Source: Song et al. (ICLR 2021), Appendix H; the warm-up of the decay is that of its public code.
"""

from __future__ import annotations

import copy

import torch
from torch import nn


class EMA:
    """shadow ← shadow + (1 − d)(weights − shadow), with d = min(decay, (1 + n)/(10 + n)) at the n-th update.

    The average lives in ``model``, a frozen copy in evaluation mode that is used like the original; evaluation
    always uses it.

    Raises:
        ValueError: unless 0 ≤ decay < 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"model.ema_rate={decay}: allowed are values in [0, 1)")
        self.decay = decay
        self.num_updates = 0
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the weights of ``model``; buffers are copied.

        Raises:
            KeyError: the names of the weights differ from those of the averaged model.
        """
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = dict(model.named_parameters())
        names, shadows = zip(*self.model.named_parameters(), strict=True)
        if len(weights) != len(names):
            raise KeyError(f"a model of {len(weights)} parameters averaged into one of {len(names)}")
        torch._foreach_lerp_(shadows, [weights[name] for name in names], 1 - decay)
        buffers = dict(model.named_buffers())
        for name, buffer in self.model.named_buffers():
            buffer.copy_(buffers[name])

    def state_dict(self) -> dict:
        return {"decay": self.decay, "num_updates": self.num_updates, "model": self.model.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restore averages and the number of updates; ``decay`` stays as constructed, since it is a setting."""
        self.model.load_state_dict(state["model"])
        self.num_updates = state["num_updates"]
