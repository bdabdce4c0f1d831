"""A training step as the public code of score_sde and QCSBM has it: what ``benchmarks.training_step`` compares with.

The network is ours with the modules that differ taken back: contiguous memory in the order (B, C, H, W), attention by
einsum over pixels with its channel mixing by permutations, blurs by inserted zeros and a convolution of one channel
with all images and channels as its batch, torch's dropout and second derivatives. The loss is score matching, and for
every probe another evaluation of the score at the same points with two products of a vector and the Jacobian,

    ‖Jᵀv‖² − vᵀJᵀw at w = Jᵀv,

whose gradient is found in two backward passes, one with w held fixed and one for w. The optimiser and the moving
average go through the parameters one by one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.randomness import Generator, normal_like, rademacher_like
from losses import Objective
from models import Dropout
from models.layers import Attention, FIRDown, FIRUp
from models.score import ScoreModel
from models.unet import UNet
from sde_lib import ScoreFunction, expand

__all__ = ["PublicEMA", "in_public_style", "public_step", "qc_backward"]


class _Mix(nn.Module):
    """A 1×1 convolution as the public code writes it: channels last, times a matrix (C, C'), and back."""

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

    def __init__(self, kernel: Tensor, *, up: int, down: int, padding: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel.clone(), persistent=False)
        self.up, self.down, self.padding = up, down, padding

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = x.reshape(-1, height, 1, width, 1)
        x = F.pad(x, (0, self.up - 1, 0, 0, 0, self.up - 1))
        x = F.pad(x.reshape(-1, 1, height * self.up, width * self.up), 2 * self.padding)
        x = F.conv2d(x, self.kernel[None, None])[:, :, :: self.down, :: self.down]
        return x.reshape(batch, channels, *x.shape[2:])


def _replacement(module: nn.Module) -> nn.Module | None:
    if isinstance(module, Attention):
        return _Attention(module)
    if isinstance(module, Dropout):
        return nn.Dropout(module.p)
    if isinstance(module, FIRDown):
        return _Resample(module.kernel, up=1, down=module.stride, padding=module.padding)
    if isinstance(module, FIRUp) and module.margin == 0:
        rest = len(module.kernel) - 2
        return _Resample(module.kernel.flip(0, 1), up=2, down=1, padding=((rest + 1) // 2 + 1, rest // 2))
    return None


def in_public_style(model: ScoreModel) -> ScoreModel:
    """A copy of a score model around a U-Net that computes the same in the way of the public code, except that
    dropout comes from torch's global stream."""
    model = copy.deepcopy(model)
    network: UNet = model.network
    network.own_derivatives, network.memory_format = False, torch.contiguous_format
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if (module := _replacement(child)) is not None:
                setattr(parent, name, module)
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    return model


class PublicEMA:
    """The moving average of parameters, one by one."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.num_updates = decay, 0
        self.shadows = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = [p for p in model.parameters() if p.requires_grad]
        for shadow, parameter in zip(self.shadows, parameters, strict=True):
            shadow.sub_((1 - decay) * (shadow - parameter))


def public_step(objective: Objective, x0: Tensor, generator: Generator, *, probes: int = 0) -> None:
    """Leave in the parameters the gradient of L_SM and, for probes > 0, of λ_QC·L_QC of the trace estimator.

    Args:
        objective: continuous times, σ² as weight; its weight λ_QC and its model are used.
        x0: data (B, C, H, W).
        generator: of times, noise and probes.
        probes: K.
    """
    model = objective.score_model
    t, mean_coefficient, std = objective._noise_level(x0, generator)
    z = normal_like(x0, generator)
    xt = expand(mean_coefficient, x0) * x0 + expand(std, x0) * z
    error = ((model(xt, t) * expand(std, x0) + z) ** 2).flatten(1).sum(1)
    objective._reduce(error, x0).backward()
    for _ in range(probes):
        v = rademacher_like(x0, generator)
        qc_backward(model, xt, t, v, lambda a: objective._reduce(std**2 * a, x0) * objective.qc_weight / probes)


def qc_backward(score: ScoreFunction, x: Tensor, t: Tensor, v: Tensor, reduce: Callable[[Tensor], Tensor]) -> None:
    """Add to the gradients of the score's parameters that of ``reduce`` of ‖Jᵀv‖² − vᵀJᵀw, w = Jᵀv.

    Args:
        score: s(x, t), of x (B, ...) and t (B,).
        v: probes (B, ...).
        reduce: of one value per sample (B,), linear.
    """
    x = x.detach().requires_grad_()
    value = score(x, t)
    (jtv,) = torch.autograd.grad(value, x, v, create_graph=True)
    w = jtv.detach().requires_grad_()
    (jtw,) = torch.autograd.grad(value, x, w, create_graph=True)
    reduce((jtv**2 - jtw * v).flatten(1).sum(1)).backward(retain_graph=True)
    jtv.backward(w.grad)
