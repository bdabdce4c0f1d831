"""Training objectives: score matching and the quasi-conservative regulariser.

Models are trained by denoising score matching over all noise levels (``Objective``). With x_t = α_t x_0 + σ_t z,
z ~ N(0, I), the loss of one sample is

    L_SM = λ(t) ‖s(x_t, t) + z/σ_t‖²,    λ = σ_t² (default) or g(t)² (likelihood weighting)

summed over dimensions and halved, or averaged over dimensions (``reduce_mean``), as in Song et al. (ICLR 2021),
Eq. 7, and Song, Durkan, Murray, Ermon (NeurIPS 2021). Discrete-time training (SMLD, DDPM) is the same loss at the
times of the family's ladder of noise levels.

A quasi-conservative model adds λ_QC·L_QC: the asymmetry Asym of the score's Jacobian J at the same perturbed
sample, with the weight λ(t) of L_SM but without its half (Chao, Sun, Cheng, Lee, ICML 2023, Eqs. 8 and 9). The whole is

    E[ ½σ_t²‖s + z/σ_t‖² + λ_QC σ_t² Asym ],    Asym = tr(JJᵀ) − tr(JJ) = ½‖J − Jᵀ‖²_F,

by default; with ``reduce_mean`` L_QC is divided by the dimension D, as L_SM is. Two unbiased ways make it cheaper:
every k-th step with weight kλ_QC (``qc_interval``), or the mean over every k-th sample of the batch (``qc_stride``).
Probes are processed in chunks, so that only one chunk's graph is in memory: the gradients of all but the last are
computed in the forward pass, and backward adds them.

At one time t there are other ways to match a score to that of a density p_t. For x ~ p_t the means of their losses
differ from the Fisher divergence F by constants, so that their expected gradients are those of F:

==========  ================================================  =======================================================
explicit    ½‖s − ∇log p_t‖²                                  its mean is F
implicit    tr ∂s/∂x + ½‖s‖²                                  F − ½E‖∇log p_t‖²
sliced      vᵀ(∂s/∂x)v + ½(vᵀs)² (or + ½‖s‖²), E[vvᵀ] = I     F − ½E‖∇log p_t‖²
denoising   ½‖s(x_t) + z/σ_t‖²                                F − ½E‖∇log p_t‖² + D/(2σ_t²)
==========  ================================================  =======================================================

Sources: Hyvärinen (JMLR 2005), Theorem 1; Song, Garg, Shi, Ermon (UAI 2019), Eqs. 7 and 8; Vincent (Neural Computation,
2011).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conservativeness import Asymmetry, asymmetry, divergence
from experiment.randomness import Generator, SampleGenerators, normal_like, rademacher_like, random_bits, uniform
from experiment.runtime import to_device
from models import Dropout, set_dropout_keys
from models.score import ScoreModel
from sde_lib import SDE, ScoreFunction, expand

TRAINING_EPS = 1e-5
"""Smallest time in training, where VP's 1/σ is still finite (Song et al., 2021, Appendix C)."""


class Objective(nn.Module):
    """All terms of the loss in one forward pass, as wrappers for several processes, mixed precision and gradient
    accumulation need it. Times are uniform on [1e-5, 1], or on the ladder of noise levels of a discrete-time model.

    The keyword arguments are fields of ``config.training`` (configs/defaults.py). Every chunk of probes evaluates the
    score once more.

    Attributes:
        penalty: what λ_QC weighs, called as ``asymmetry`` is; an experiment may put another penalty in its place.

    Raises:
        ValueError: likelihood weighting of a discrete-time model.
    """

    def __init__(
        self,
        score_model: ScoreModel,
        *,
        likelihood_weighting: bool = False,
        reduce_mean: bool = False,
        qc_weight: float = 0.0,
        qc_probes: int = 1,
        qc_estimator: str = "antisymmetric",
        qc_interval: int = 1,
        qc_stride: int = 1,
        qc_probe_chunk: int = 1,
    ) -> None:
        super().__init__()
        num_scales = score_model.noise_level.num_scales
        if likelihood_weighting and num_scales is not None:
            raise ValueError("training.likelihood_weighting=True: needs training.continuous=True")
        self.score_model, self.sde = score_model, score_model.sde
        self.ladder = None if num_scales is None else torch.stack(self.sde.ladder(num_scales))
        self.likelihood_weighting, self.reduce_mean = likelihood_weighting, reduce_mean
        self.qc_weight, self.qc_estimator = qc_weight, qc_estimator
        self.qc_interval, self.qc_stride = qc_interval, qc_stride
        self.qc_probes, self.qc_probe_chunk = qc_probes, qc_probe_chunk
        self.penalty: Callable[..., Asymmetry] = asymmetry
        self.dropouts = [module for module in score_model.modules() if isinstance(module, Dropout) and module.p > 0]

    def forward(
        self,
        x0: Tensor,
        generator: Generator = None,
        *,
        step: int = 0,
        class_labels: Tensor | None = None,
        condition: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss terms of a batch.

        Args:
            x0: data (B, C, H, W), scaled as the model expects.
            generator: source of times, noise, dropout and probes.
            step: optimiser step, which decides whether a lazy QC term is due.
            class_labels: (B,) for a class-conditional model.
            condition: (B, C', H, W) for a model that takes conditions.

        Returns:
            Scalars: ``loss`` to minimise; ``dsm``, the score-matching term; ``qc``, L_QC without
            λ_QC, only in steps that evaluate it.
        """
        t, mean_coefficient, std = self._noise_level(x0, generator)
        z = normal_like(x0, generator)
        xt = expand(mean_coefficient, x0) * x0 + expand(std, x0) * z
        weight = self.sde.diffusion(t) ** 2 if self.likelihood_weighting else std**2
        dropout_keys = None  # a sample's own, and the same whenever it is evaluated
        if self.dropouts and self.score_model.training:
            dropout_keys = random_bits((len(x0), len(self.dropouts), 2), generator, device=x0.device)

        qc_due = self.qc_weight > 0 and step % self.qc_interval == 0
        terms: dict[str, Tensor] = {}
        errors = []
        for take, with_qc in self._parts(len(x0), qc_due):
            if dropout_keys is not None:
                set_dropout_keys(self.dropouts, take(dropout_keys))
            told = {"class_labels": class_labels, "condition": condition}.items()
            score = partial(self.score_model, **{name: take(given) for name, given in told if given is not None})
            if with_qc:
                probe_source = take(generator) if isinstance(generator, SampleGenerators) else generator
                value, terms["qc"] = self._score_and_qc(score, take(xt), take(t), take(weight), probe_source)
            else:
                value = score(take(xt), take(t))
            # σs + z rather than s + z/σ: the two differ by the weight, and this one never divides by a small σ.
            error = ((expand(take(std), x0) * value + take(z)) ** 2).flatten(1).sum(1)
            errors.append(take(weight) / take(std) ** 2 * error)
        terms["dsm"] = self._reduce(torch.cat(errors), x0) * (1.0 if self.reduce_mean else 0.5)
        terms["loss"] = terms["dsm"]
        if "qc" in terms:
            terms["loss"] = terms["dsm"] + self.qc_weight * self.qc_interval * terms["qc"]
        return terms

    def _parts(self, batch: int, qc_due: bool) -> list[tuple[Callable, bool]]:
        """What takes the samples that are evaluated together out of a batch, and whether with the QC term."""
        stride = self.qc_stride
        if not qc_due or stride == 1:
            return [(lambda samples: samples, qc_due)]
        if batch % stride:
            raise ValueError(f"training.qc_stride={stride}: must divide the {batch} samples that are processed at once")
        return [
            (lambda samples: samples[::stride], True),
            (lambda samples: samples.unflatten(0, (-1, stride))[:, 1:].flatten(0, 1), False),
        ]

    def _score_and_qc(
        self, score: ScoreFunction, xt: Tensor, t: Tensor, weight: Tensor, generator: Generator
    ) -> tuple[Tensor, Tensor]:
        """The score at x_t and L_QC there, weighted by λ(t) and averaged over all probes."""
        probes = 1 if self.qc_estimator == "exact" else self.qc_probes
        total: Tensor | float = 0.0
        parameters: list[Tensor] = []
        gradients: list[Tensor] = []
        for start in range(0, probes, self.qc_probe_chunk):
            count = min(self.qc_probe_chunk, probes - start)
            options = dict(estimator=self.qc_estimator, generator=generator, create_graph=torch.is_grad_enabled())
            value, asym, norm = self.penalty(score, xt, t, probes=count, **options)
            part = self._reduce(weight * asym, xt) * (count / probes)
            if start + count < probes and part.requires_grad:
                parameters = parameters or [p for p in self.score_model.parameters() if p.requires_grad]
                found = torch.autograd.grad(part, parameters, materialize_grads=True)
                if gradients:
                    torch._foreach_add_(gradients, found)
                else:
                    gradients = [gradient.clone() for gradient in found]  # two of them may be one tensor
                part = part.detach()
                del value, asym, norm, found  # the graph, before the next one is built
            total = total + part
        return value, _Attach.apply(total, *parameters, *gradients) if gradients else total

    def _noise_level(self, x0: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random times (B,) with their mean coefficients and standard deviations."""
        if self.ladder is None:
            u = uniform((len(x0),), generator, device=x0.device, dtype=x0.dtype)
            t = TRAINING_EPS + u * (self.sde.end_time - TRAINING_EPS)
            return t, self.sde.mean_coefficient(t), self.sde.std(t)
        u, levels = uniform((len(x0),), generator, dtype=x0.dtype), self.ladder.shape[1]
        index = (u * levels).long().clamp(max=levels - 1)
        return to_device(self.ladder[:, index].to(x0.dtype), x0.device).unbind()

    def _reduce(self, per_sample: Tensor, x0: Tensor) -> Tensor:
        """Batch mean of a per-sample sum over dimensions, which is divided by D if the mean over them is wanted."""
        return per_sample.mean() * (1 / x0[0].numel() if self.reduce_mean else 1.0)


def make_objective(score_model: ScoreModel, options: Mapping[str, object]) -> Objective:
    """The objective whose keyword arguments are those ``options`` of the same names, such as ``config.training``."""
    names = inspect.signature(Objective).parameters
    return Objective(score_model, **{name: options[name] for name in names if name in options})


class _Attach(torch.autograd.Function):
    """Returns a scalar as it is; further arguments are n tensors, then the n gradients of the scalar for them."""

    @staticmethod
    def forward(ctx, value: Tensor, *tensors_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors_and_gradients[len(tensors_and_gradients) // 2 :])
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, factor: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return factor, *torch._foreach_mul(gradients, factor), *(None for _ in gradients)


# ---------------------------------------------------------------------------------------------------------------
# Score matching at given times. The functions return one value per sample, (B,), in units of score², whose mean is
# the loss; they can be differentiated with respect to the parameters of s unless gradients are disabled.


def explicit_score_matching(score: ScoreFunction, true_score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """½‖s − ∇log p_t‖² (B,) at x ~ p_t (B, ...), t (B,), for a density whose score is known."""
    return 0.5 * ((score(x, t) - true_score(x, t)) ** 2).flatten(1).sum(1)


def implicit_score_matching(score: ScoreFunction, x: Tensor, t: Tensor) -> Tensor:
    """tr ∂s/∂x + ½‖s‖² (B,) at x ~ p_t (B, ...), t (B,): the exact trace, by D backward passes."""
    value, position, create_graph = _differentiable(score, x, t)
    return divergence(value, position, create_graph=create_graph) + 0.5 * (value**2).flatten(1).sum(1)


def sliced_score_matching(
    score: ScoreFunction,
    x: Tensor,
    t: Tensor,
    *,
    probes: int = 1,
    variance_reduction: bool = True,
    generator: Generator = None,
) -> Tensor:
    """vᵀ(∂s/∂x)v + ½(vᵀs)² (B,) at x ~ p_t (B, ...), t (B,): one backward pass per probe.

    Args:
        probes: number of directions v = ±1 in every dimension; their values are averaged.
        variance_reduction: ½‖s‖², the mean of ½(vᵀs)² over v, in its place (SSM-VR).
        generator: where the directions come from.

    Raises:
        ValueError: fewer than one probe.
    """
    if probes < 1:
        raise ValueError(f"probes={probes}: at least 1")
    value, position, create_graph = _differentiable(score, x, t)
    loss = 0.0
    for _ in range(probes):
        v = rademacher_like(x, generator)
        squared = (value**2).flatten(1).sum(1) if variance_reduction else (v * value).flatten(1).sum(1) ** 2
        loss = loss + (divergence(value, position, v, create_graph=create_graph) + 0.5 * squared) / probes
    return loss


def denoising_score_matching(
    score: ScoreFunction, sde: SDE, x0: Tensor, t: Tensor, generator: Generator = None
) -> Tensor:
    """½‖s(x_t, t) + z/σ_t‖² (B,) with x_t = α_t x_0 + σ_t z, for data x_0 (B, ...) and times t (B,)."""
    z = normal_like(x0, generator)
    mean, std = sde.marginal(x0, t)
    std = expand(std, x0)
    return 0.5 * ((score(mean + std * z, t) + z / std) ** 2).flatten(1).sum(1)


def _differentiable(score: ScoreFunction, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, bool]:
    """A score with a graph down to its points: the value, the points, and whether the caller differentiates further."""
    create_graph = torch.is_grad_enabled()
    position = x.detach().requires_grad_()
    with torch.enable_grad():
        return score(position, t), position, create_graph
