"""A training step as the public code of score_sde and QCSBM has it, in our own writing: what ours is compared with.

The network is ours with the modules that differ taken back: contiguous memory in the order (B, C, H, W), attention by
einsum over pixels, blurs by inserted zeros and a convolution with all images and channels as its batch, torch's dropout
and second derivatives. The term is that of two products of a vector and the Jacobian, ‖Jᵀv‖² − vᵀJᵀw at w = Jᵀv, whose
gradient takes two backward passes, with w held fixed, together with that of score matching, and for w.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.randomness import Generator, normal_like, rademacher_like, uniform
from losses import TRAINING_EPS
from models import Dropout, ScoreModel
from models.layers import Attention, FIRDown, FIRUp
from sde_lib import ScoreFunction, expand


class _Mix(nn.Module):
    """A 1×1 convolution: channels last, times a matrix (C, C'), and back."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight.detach().flatten(1).T.contiguous())
        self.bias = nn.Parameter(conv.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return (torch.einsum("bhwc,cd->bhwd", x.permute(0, 2, 3, 1), self.weight) + self.bias).permute(0, 3, 1, 2)


class _Attention(nn.Module):
    def __init__(self, ours: Attention) -> None:
        super().__init__()
        self.norm, self.rescale = ours.norm, ours.rescale
        self.query, self.key, self.value, self.out = map(_Mix, (ours.query, ours.key, ours.value, ours.out))

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        h = self.norm(x)
        query, key, value = self.query(h), self.key(h), self.value(h)
        weights = torch.einsum("bchw,bcij->bhwij", query, key) * channels**-0.5
        weights = F.softmax(weights.reshape(batch, height, width, height * width), dim=-1)
        weights = weights.reshape(batch, height, width, height, width)
        return self.rescale * (x + self.out(torch.einsum("bhwij,bcij->bchw", weights, value)))


class _Resample(nn.Module):
    """Insert up − 1 zeros after every pixel, pad, correlate with a kernel, keep every down-th pixel."""

    def __init__(self, kernel: Tensor, up: int, down: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.kernel, self.up, self.down, self.padding = kernel, up, down, padding

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = F.pad(x.reshape(-1, height, 1, width, 1), (0, self.up - 1, 0, 0, 0, self.up - 1))
        x = F.pad(x.reshape(-1, 1, height * self.up, width * self.up), 2 * self.padding)
        x = F.conv2d(x, self.kernel[None, None])[:, :, :: self.down, :: self.down]
        return x.reshape(batch, channels, *x.shape[2:])


def _replacement(module: nn.Module) -> nn.Module:
    if isinstance(module, Attention):
        return _Attention(module)
    if isinstance(module, Dropout):
        return nn.Dropout(module.p)
    if isinstance(module, FIRDown):
        return _Resample(module.kernel, 1, module.stride, module.padding)
    if isinstance(module, FIRUp) and module.margin == 0:
        rest = len(module.kernel) - 2
        return _Resample(module.kernel.flip(0, 1), 2, 1, ((rest + 1) // 2 + 1, rest // 2))
    return module


def in_public_style(model: ScoreModel) -> ScoreModel:
    """A copy of a score model around a U-Net that computes the same in the way of the public code; only dropout comes
    from torch's global stream."""
    model = copy.deepcopy(model)
    model.network.own_derivatives, model.network.memory_format = False, torch.contiguous_format
    for parent in list(model.network.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _replacement(child))
    for parameter in model.network.parameters():
        parameter.data = parameter.data.contiguous()
    return model


def public_loss(model: ScoreModel, x0: Tensor, generator: Generator, qc_weight: float, probes: int) -> Tensor:
    """L_SM of data x0 (B, C, H, W); for λ_QC > 0 the gradient of it and of λ_QC·L_QC is left in the parameters, and the
    result has none. For K probes the batch is K times as large, each part with noise and a probe of its own."""
    sde = model.sde
    t = uniform((len(x0),), generator, device=x0.device, dtype=x0.dtype)
    t = TRAINING_EPS + t * (sde.end_time - TRAINING_EPS)
    x0, t = (v.repeat(probes, *(1,) * (v.ndim - 1)) if qc_weight else v for v in (x0, t))
    mean, std = sde.marginal(x0, t)
    z = normal_like(x0, generator)
    xt = mean + expand(std, x0) * z

    def matching(score: Tensor) -> Tensor:
        return 0.5 * ((score * expand(std, x0) + z) ** 2).flatten(1).sum(1).mean()

    if not qc_weight:
        return matching(model(xt, t))
    v = rademacher_like(x0, generator)
    total = qc_backward(model, xt, t, v, lambda score, asym: matching(score) + qc_weight * (std**2 * asym).mean())
    return total.requires_grad_()


def qc_backward(
    model: ScoreFunction, x: Tensor, t: Tensor, v: Tensor, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Add to the gradients of the score's parameters that of ``reduce``, of the score (B, ...) and, linearly, of the
    estimates (B,) with probes v (B, ...) at x (B, ...) and t (B,); return its value."""
    x = x.detach().requires_grad_()
    value = model(x, t)
    (jtv,) = torch.autograd.grad(value, x, v, create_graph=True)
    w = jtv.detach().requires_grad_()
    (jtw,) = torch.autograd.grad(value, x, w, create_graph=True)
    total = reduce(value, (jtv**2 - jtw * v).flatten(1).sum(1))
    total.backward(retain_graph=True)
    jtv.backward(w.grad)
    return total.detach()
