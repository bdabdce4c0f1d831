"""From a network to a score: the one place that knows time labels, the division by σ and the sign.

A network h(x, label) has no scale of its own. Three parameterisations turn it into a score s(x, t) = ∇ log p_t(x), the
first two after Eq. 10 of Chao, Sun, Cheng, Lee (ICML 2023); all have exactly the network's parameters:

* unconstrained:  s = ±h(x, t)/σ_t; in general ∂s/∂x is not symmetric and s is no gradient of anything;
* conservative:   s = ∇ₓ(−‖h(x, t)‖²/(2σ_t)), the gradient of a scalar by construction;
* preconditioned: s = −x/v + α_t d h(x/√v, t)/(σ_t √v) with v = α_t² d² + σ_t² and d = ½, as unconstrained as the first
  (Karras, Aittala, Aila, Laine, NeurIPS 2022, Table 1). The first term is the score of N(0, d²) data.

In the paper's notation h = x − f(x, t): the network predicts the residual h itself, as NCSN++ does, rather than f.

Every group norm of a U-Net divides by the size of its features, and so forgets that of x. Where there is much noise
‖x‖ varies by a part 1/√(2D) from sample to sample, in 8×8 images by 9 %, which the first two then get wrong and the
probability flow never mends; the third needs the network for what is left only.

The label is what each family's public checkpoints were trained with:

=============  ==========================  =====================  ===================
family         continuous time             discrete time          unconstrained score
=============  ==========================  =====================  ===================
VE             σ(t)                        N − 1 − i (σ falling)  h/σ
VP             999·t                       i                      −h/σ
sub-VP         999·t                       none                   −h/σ
=============  ==========================  =====================  ===================

with i the index of the noise level. A discrete-time model has N of them, the ladder; between two of its times i is
interpolated, which the positional embedding allows: an ODE solver needs a score that is continuous in t.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.second_order.operations import gradients_of
from sde_lib import SDE, expand

CONTINUOUS_LABELS: dict[str, Callable[[SDE, Tensor], Tensor]] = {
    "ve": lambda sde, t: sde.std(t),
    "vp": lambda sde, t: 999 * t,
    "subvp": lambda sde, t: 999 * t,
}
# Of the real-valued index and the number N of levels.
DISCRETE_LABELS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ve": lambda index, n: n - 1 - index,
    "vp": lambda index, n: index,
}
# A VE network predicts −z (score times σ), a VP network the noise z itself.
NETWORK_SIGN = {"ve": 1.0, "vp": -1.0, "subvp": -1.0}


class NoiseLevel(nn.Module):
    """Maps a time t (B,) to the network's label (B,) and the scale σ (B,) of the noise.

    ``num_scales`` is None for a model of continuous time, or the number N of levels of a discrete-time one.
    """

    def __init__(self, sde: SDE, num_scales: int | None = None) -> None:
        super().__init__()
        self.sde = sde
        self.num_scales = num_scales
        if num_scales is not None:
            if num_scales < 2:
                raise ValueError(f"model.num_scales={num_scales}: a discrete-time model needs at least 2 levels")
            self.register_buffer("ladder_time", sde.ladder(num_scales).time.float(), persistent=False)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        std = self.sde.std(t)
        if self.num_scales is None:
            return CONTINUOUS_LABELS[self.sde.name](self.sde, t), std
        return DISCRETE_LABELS[self.sde.name](self._index(t), self.num_scales), std

    def _index(self, t: Tensor) -> Tensor:
        """Where t lies on the ladder, a real number in [0, N − 1]; whole, exactly, at the ladder's own times."""
        position = torch.searchsorted(self.ladder_time, t.to(self.ladder_time.dtype).contiguous())
        above = position.clamp(1, self.num_scales - 1)
        start, end = self.ladder_time[above - 1], self.ladder_time[above]
        index = (above - 1 + (t - start) / (end - start)).clamp(0, self.num_scales - 1)
        # Rounding errors of t are a part in 10⁴ of the distance between two of 1000 levels.
        nearest = index.round()
        return torch.where((index - nearest).abs() < 1e-3, nearest, index).to(t.dtype)


class ScoreModel(nn.Module):
    """A score s(x, t): x (B, C, H, W) and t (B,) → (B, C, H, W)."""

    def __init__(self, network: nn.Module, noise_level: NoiseLevel) -> None:
        super().__init__()
        self.network = network
        self.noise_level = noise_level
        self._compiled: list[Callable[..., Tensor]] = []  # in a list, so as not to be a submodule

    def compile_network(self) -> None:
        """Compile the network (torch.compile) for where it is differentiated once; twice, a compiled one cannot be. On
        a GPU its passes over memory are compiled there; on a CPU that costs more than it saves."""
        self._compiled = [torch.compile(self.network)]
        self.network.compile_passes = next(self.network.parameters()).device.type != "cpu"

    @property
    def sde(self) -> SDE:
        return self.noise_level.sde

    def residual(self, x: Tensor, t: Tensor, class_labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """The network's output h (B, C, H, W) and the noise's scale σ (B, 1, 1, 1)."""
        label, std = self.noise_level(t)
        network = self.network
        if self._compiled and not x.requires_grad:
            network = self._compiled[0]
        h = network(x, label) if class_labels is None else network(x, label, class_labels)
        return h, expand(std, x)


class UnconstrainedScore(ScoreModel):
    """s = ±h/σ, or with ``divide_by_sigma=False`` the network itself: s = ±h."""

    def __init__(self, network: nn.Module, noise_level: NoiseLevel, *, divide_by_sigma: bool = True) -> None:
        super().__init__(network, noise_level)
        self.divide_by_sigma = divide_by_sigma
        self.sign = NETWORK_SIGN[noise_level.sde.name]

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        h, std = self.residual(x, t, class_labels)
        return self.sign * (h / std if self.divide_by_sigma else h)


class ConservativeScore(ScoreModel):
    """s = ∇ₓ(−‖h‖²/(2σ)): conservative by construction, at the price of a backward pass per evaluation."""

    def log_density(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The unnormalised log-density −‖h(x, t)‖²/(2σ_t), (B,) in nats."""
        h, std = self.residual(x, t, class_labels)
        return -(h**2 / (2 * std)).flatten(1).sum(1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.clone().requires_grad_()  # unlike detach(), keeps the tangent of a dual number
            log_density = self.log_density(x, t, class_labels)
            with gradients_of("inputs"):
                (score,) = torch.autograd.grad(log_density.sum(), x, create_graph=differentiable)
        return score


class PreconditionedScore(ScoreModel):
    """s = −x/v + α d h(x/√v)/(σ√v), v = α² d² + σ², where d is the data's standard deviation, roughly."""

    data_std = 0.5

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        signal = expand(self.sde.mean_coefficient(t), x) * self.data_std
        total = (signal**2 + expand(self.sde.std(t), x) ** 2).sqrt()
        h, std = self.residual(x / total, t, class_labels)
        return signal / (std * total) * h - x / total**2


def make_score_model(
    sde: SDE,
    network: nn.Module,
    *,
    parameterization: str,
    num_scales: int | None = None,
    scale_by_sigma: bool | None = None,
) -> ScoreModel:
    """The score model around a network.

    Args:
        network: h(x, label[, class_labels]).
        parameterization: 'unconstrained', 'conservative' or 'preconditioned'.
        num_scales: None for a model of continuous time, or the number of levels of a discrete-time one.
        scale_by_sigma: of VE, whether an unconstrained score is h/σ (the default) or h.

    Raises:
        ValueError: unknown parameterisation, or one that contradicts the rest, naming the config fields.
    """
    if sde.name != "ve" and scale_by_sigma:
        raise ValueError(f"model.scale_by_sigma=True: only for VE; a {sde.name} network is divided by σ by its score")
    divide = sde.name != "ve" or scale_by_sigma is not False
    if parameterization == "unconstrained":
        return UnconstrainedScore(network, NoiseLevel(sde, num_scales), divide_by_sigma=divide)
    others = {"conservative": ConservativeScore, "preconditioned": PreconditionedScore}
    if parameterization not in others:
        allowed = ", ".join(("unconstrained", *others))
        raise ValueError(f"model.parameterization={parameterization!r}: allowed are {allowed}")
    if not divide:
        raise ValueError(f"model.scale_by_sigma=False: a {parameterization} model always divides by σ")
    return others[parameterization](network, NoiseLevel(sde, num_scales))
