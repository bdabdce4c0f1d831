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
flow           t                           none                   velocity, below
=============  ==========================  =====================  ===================

with i the index of the noise level. A discrete-time model has N of them, the ladder; between two of its times i is
interpolated, which the positional embedding allows: an ODE solver needs a score that is continuous in t.

What other networks predict (``PREDICTIONS``) says as much of x_t = α x_0 + σ ε:

==================  =========================================  =======================
prediction          h estimates, given x_t                     score
==================  =========================================  =======================
scaled_score        σ s                                        h/σ
score               s                                          h
epsilon             ε                                          −h/σ
sample              x_0                                        (α h − x)/σ²
v_prediction        v = α ε − σ x_0, so that ε = α v + σ x     −(α h + σ x)/σ
velocity            u = α̇ x_0 + σ̇ ε = −f x − ½ g² s            −2 (h + f x)/g²
velocity_to_data    −u, and is told 1 − t                      2 (h − f x)/g²
==================  =========================================  =======================

v is of processes with α² + σ² = 1. The formula for u is ε = (α u − α̇ x)/(α σ̇ − α̇ σ), because α̇ = −f α and
α σ̇ − α̇ σ = α g²/(2σ).

Sources: Salimans, Ho (ICLR 2022), for v; Lipman, Chen, Ben-Hamu, Nickel, Le (ICLR 2023), for u.
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
    "flow": lambda sde, t: t,
}
# Of the real-valued index and the number N of levels.
DISCRETE_LABELS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "ve": lambda index, n: n - 1 - index,
    "vp": lambda index, n: index,
}
# The score (B, ...) of a network's output h at x (B, ...) and t (B,), by what h predicts; σ is (B, 1, ...).
PREDICTIONS: dict[str, Callable[[SDE, Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "scaled_score": lambda sde, h, x, t, std: h / std,
    "score": lambda sde, h, x, t, std: h,
    "epsilon": lambda sde, h, x, t, std: -h / std,
    "sample": lambda sde, h, x, t, std: (expand(sde.mean_coefficient(t), x) * h - x) / std**2,
    "v_prediction": lambda sde, h, x, t, std: -expand(sde.mean_coefficient(t), x) * h / std - x,
    "velocity": lambda sde, h, x, t, std: -2 * (h - sde.drift(x, t)) / expand(sde.diffusion(t) ** 2, x),
    "velocity_to_data": lambda sde, h, x, t, std: 2 * (h + sde.drift(x, t)) / expand(sde.diffusion(t) ** 2, x),
}
# Of the networks that are trained here and of the public codes' checkpoints.
USUAL_PREDICTION = {"ve": "scaled_score", "vp": "epsilon", "subvp": "epsilon", "flow": "velocity"}


class NoiseLevel(nn.Module):
    """Maps a time t (B,) to the network's label (B,) and the scale σ (B,) of the noise.

    ``num_scales`` is None for a model of continuous time, or the number N of levels of a discrete-time one.
    ``backwards``: the label is that of 1 − t instead, for a network of continuous time whose data is at t = 1.
    """

    def __init__(self, sde: SDE, num_scales: int | None = None, *, backwards: bool = False) -> None:
        super().__init__()
        self.sde = sde
        self.backwards = backwards
        self.num_scales = num_scales
        if num_scales is not None:
            if num_scales < 2:
                raise ValueError(f"model.num_scales={num_scales}: a discrete-time model needs at least 2 levels")
            self.register_buffer("ladder_time", sde.ladder(num_scales).time.float(), persistent=False)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        std = self.sde.std(t)
        if self.num_scales is None:
            return CONTINUOUS_LABELS[self.sde.name](self.sde, 1 - t if self.backwards else t), std
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
    """A score s(x, t[, c][, y]): x (B, C, H, W) and t (B,) → (B, C, H, W).

    A network that knows classes is told c (B,), one that takes conditions y (B, C', H, W), as further channels of its
    input. Derivatives are with respect to x alone.
    """

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

    def residual(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None, condition: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The network's output h (B, C, H, W) and the noise's scale σ (B, 1, 1, 1)."""
        label, std = self.noise_level(t)
        network = self.network
        if self._compiled and not x.requires_grad:
            network = self._compiled[0]
        given = x if condition is None else torch.cat([x, condition.to(x)], dim=1)
        h = network(given, label) if class_labels is None else network(given, label, class_labels)
        return h, expand(std, x)


class UnconstrainedScore(ScoreModel):
    """The score that follows from what the network predicts, a key of ``PREDICTIONS``; by default the family's own."""

    def __init__(self, network: nn.Module, noise_level: NoiseLevel, *, prediction: str = "") -> None:
        super().__init__(network, noise_level)
        self.prediction = prediction or USUAL_PREDICTION[noise_level.sde.name]

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        h, std = self.residual(x, t, class_labels, condition)
        return PREDICTIONS[self.prediction](self.sde, h, x, t, std)


class ConservativeScore(ScoreModel):
    """s = ∇ₓ(−‖h‖²/(2σ)): conservative by construction, at the price of a backward pass per evaluation."""

    def log_density(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        """The unnormalised log-density −‖h(x, t)‖²/(2σ_t), (B,) in nats."""
        h, std = self.residual(x, t, class_labels, condition)
        return -(h**2 / (2 * std)).flatten(1).sum(1)

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            if not x.requires_grad:
                x = x.clone().requires_grad_()  # unlike detach(), keeps the tangent of a dual number
            log_density = self.log_density(x, t, class_labels, condition)
            with gradients_of("inputs"):
                (score,) = torch.autograd.grad(log_density.sum(), x, create_graph=differentiable)
        return score


class PreconditionedScore(ScoreModel):
    """s = −x/v + α d h(x/√v)/(σ√v), v = α² d² + σ², where d is the data's standard deviation, roughly."""

    data_std = 0.5

    def forward(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, condition: Tensor | None = None
    ) -> Tensor:
        signal = expand(self.sde.mean_coefficient(t), x) * self.data_std
        total = (signal**2 + expand(self.sde.std(t), x) ** 2).sqrt()
        h, std = self.residual(x / total, t, class_labels, condition)
        return signal / (std * total) * h - x / total**2


def make_score_model(
    sde: SDE,
    network: nn.Module,
    *,
    parameterization: str,
    num_scales: int | None = None,
    scale_by_sigma: bool | None = None,
    prediction: str = "",
) -> ScoreModel:
    """The score model around a network.

    Args:
        network: h(x, label[, class_labels]).
        parameterization: 'unconstrained', 'conservative' or 'preconditioned'.
        num_scales: None for a model of continuous time, or the number of levels of a discrete-time one.
        scale_by_sigma: of VE, whether an unconstrained score is h/σ (the default) or h.
        prediction: what the network predicts, a key of ``PREDICTIONS``; by default as ``scale_by_sigma`` says.

    Raises:
        ValueError: unknown parameterisation, or one that contradicts the rest, naming the config fields.
    """
    if sde.name != "ve" and scale_by_sigma:
        raise ValueError(f"model.scale_by_sigma=True: only for VE; a {sde.name} network is divided by σ by its score")
    if sde.name == "ve" and scale_by_sigma is False:
        prediction = prediction or "score"
    if prediction and prediction not in PREDICTIONS:
        raise ValueError(f"model.prediction={prediction!r}: allowed are {', '.join(PREDICTIONS)}")
    noise_level = NoiseLevel(sde, num_scales, backwards=prediction == "velocity_to_data")
    if parameterization == "unconstrained":
        return UnconstrainedScore(network, noise_level, prediction=prediction)
    others = {"conservative": ConservativeScore, "preconditioned": PreconditionedScore}
    if parameterization not in others:
        allowed = ", ".join(("unconstrained", *others))
        raise ValueError(f"model.parameterization={parameterization!r}: allowed are {allowed}")
    if prediction == "score":
        raise ValueError(f"model.scale_by_sigma=False: a {parameterization} model always divides by σ")
    if prediction:
        raise ValueError(f"model.prediction={prediction!r}: a {parameterization} model has its own form")
    return others[parameterization](network, noise_level)
