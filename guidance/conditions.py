"""Conditional sampling: what is given to the one sampling loop (``sampling``) so that it samples p(x_0 | condition).

The reverse SDE of p(x_0 | y) has the score ∇ log p_t(x) + ∇ log p_t(y | x). How the second term is had, or avoided:

* *a projection* puts, after every step, what has been measured into the state, noised to its time. Nothing tells the
  rest of the state but the network; as the measurement's noise is drawn anew at every step, the result is not
  p(x_0 | y), but consistent with y;
* *DPS*: p_t(y | x) ≈ p(y | x̂_0), with x̂_0 = E[x_0 | x_t] from Tweedie's formula, and a step size ζ;
* *ΠGDM*: p_t(y | x) ≈ N(y; A x̂_0, r_t² AAᵀ + σ_y² I), r_t² a guess at the variance of x_0 given x_t;
* *classifier guidance*: log p_t(y | x) is a network of its own, trained on noised images;
* *classifier-free guidance*: one network has learned both scores, s(x, t, y) and s(x, t).

The last two take a weight γ, s(x, t) + γ ∇ log p_t(y | x): 1 is the conditional distribution, more than 1 favours what
the classifier is sure of. (Ho and Salimans's w is γ − 1.)

Sources: Song et al. (ICLR 2021), Appendix I, and Song, Shen, Xing, Ermon (ICLR 2022), for projections; Kawar, Elad,
Ermon, Song (DDRM, NeurIPS 2022), for measurements with noise in them; Chung, Kim, Mccann, Klasky, Ye (DPS, ICLR 2023);
Song, Vahdat, Mardani, Kautz (ΠGDM, ICLR 2023); Dhariwal and Nichol (NeurIPS 2021); Ho and Salimans (2022).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from conservativeness import vjp
from experiment.randomness import Generator, normal_like
from guidance.measurements import BlockMean, ChannelMean, LinearOperator, Mask, MatrixOperator, radon_transform
from sampling import ConditionalScore, Projection
from sde_lib import SDE, ScoreFunction, expand

__all__ = [
    "CLASS_CONDITIONS",
    "CONDITION_FIELDS",
    "MEASUREMENTS",
    "ClassifierFreeGuidance",
    "ClassifierGuidance",
    "DiffusionPosteriorSampling",
    "MeasurementProjection",
    "PseudoinverseGuidance",
    "check_condition",
    "condition_on_measurement",
    "get_operator",
]


class MeasurementProjection:
    """Measured coordinates of the state are replaced by those of the measurement, noised to the same time.

    In the coordinates c = Vᵀx_t, of which c_i ~ N(α (Vᵀx_0)_i, σ²) should hold, and with ȳ_i = (Uᵀy)_i/s_i, which is
    (Vᵀx_0)_i up to noise of standard deviation ν_i = σ_y/s_i,

        c_i ← α ȳ_i + √(σ² − α²ν_i²) z_i    where α ν_i ≤ σ,

    z fresh at every step: that has exactly the right distribution. Where αν_i > σ the measurement is noisier than the
    state, which is left as it is. Without noise x_0 satisfies A x_0 = y in the end; the rest of x_0 is denoised like
    any sample.

    Args:
        sde: the forward process.
        operator: A.
        y: measurements (B, m).
        noise_std: σ_y.
    """

    def __init__(self, sde: SDE, operator: LinearOperator, y: Tensor, noise_std: float = 0.0) -> None:
        self.sde = sde
        self.operator = operator
        self.measured = operator.spectrum(y) / operator.singular_values.to(y)
        self.noise_std = noise_std / operator.singular_values.to(y)

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t)[:, None].to(x), self.sde.std(t)[:, None].to(x)
        z = self.operator.coordinates(normal_like(x, generator))
        added = std**2 - (alpha * self.noise_std) ** 2
        target = alpha * self.measured + added.clamp(min=0).sqrt() * z
        return self._replace(x, target, added >= 0)

    def finish(self, x: Tensor) -> Tensor:
        return self._replace(x, self.measured, self.noise_std == 0)

    def _replace(self, x: Tensor, target: Tensor, where: Tensor) -> Tensor:
        return x + self.operator.lift(torch.where(where, target - self.operator.coordinates(x), 0.0))


class _MeasurementScore(ConditionalScore):
    """A score that looks at what the network makes of the state, x̂_0 = (x + σ² s)/α, and at y − A x̂_0."""

    def __init__(self, sde: SDE, score: ScoreFunction, operator: LinearOperator, y: Tensor) -> None:
        self.sde = sde
        self.score = score
        self.operator = operator
        self.spectrum = operator.spectrum(y)

    def _denoised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """s and x̂_0, both (b, ...) and differentiable."""
        s = self.score(x, t)
        return s, (x + expand(self.sde.std(t), x) ** 2 * s) / expand(self.sde.mean_coefficient(t), x)

    def _residual(self, x0: Tensor, rows: Tensor | None) -> Tensor:
        """Uᵀ(y − A x_0) (b, r). What of y lies outside the range of A tells nothing about x_0."""
        y = self.spectrum if rows is None else self.spectrum[rows]
        return y - self.operator.spectrum(self.operator(x0))


class PseudoinverseGuidance(_MeasurementScore):
    """ΠGDM: s + γ (∂x̂_0/∂x)ᵀ Aᵀ (r_t² AAᵀ + σ_y² I)⁻¹ (y − A x̂_0) (Song et al., 2023).

    r_t² = v σ²/(v α² + σ²) is the variance of x_0 given x_t for data of variance v in all directions, for which the
    score is exact; the source has v = 1. One backward pass per evaluation.

    For such data ∂x̂_0/∂x is αv/(α²v + σ²), far below 1 at much noise, and Aᵀ(…)⁻¹ of the order of 1/v. A network knows
    its x̂_0 to more or less 1 %, not to that, and would be driven to infinity. So the guidance is no longer than
    ``TRUST`` times what that derivative makes of the same pull. (The source multiplies by r_t² instead, which does away
    with nearly all guidance at much noise.) Gaussians of all kinds are left as they are.

    Args:
        sde: the forward process.
        score: the unconditional score.
        operator, y: A, and measurements (B, m).
        noise_std: σ_y.
        prior_variance: v. With 0, and noise, the likelihood of DPS before its step size (Chung et al., 2023).
        weight: γ.

    Raises:
        ValueError: neither noise nor a prior variance.
    """

    TRUST = 5.0

    def __init__(
        self,
        sde: SDE,
        score: ScoreFunction,
        operator: LinearOperator,
        y: Tensor,
        noise_std: float = 0.0,
        *,
        prior_variance: float = 1.0,
        weight: float = 1.0,
    ) -> None:
        if not (prior_variance >= 0 and noise_std >= 0 and prior_variance + noise_std > 0):
            raise ValueError(f"prior_variance={prior_variance}, noise_std={noise_std}: need one that is positive")
        super().__init__(sde, score, operator, y)
        self.noise_std = noise_std
        self.prior_variance = prior_variance
        self.weight = weight

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t)[:, None].to(x), self.sde.std(t)[:, None].to(x)
        variance = self.prior_variance * std**2 / (self.prior_variance * alpha**2 + std**2)
        values = self.operator.singular_values.to(x)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s, x0 = self._denoised(x, t)
            # Aᵀ (r² AAᵀ + σ_y²)⁻¹ = V S (r² S² + σ_y²)⁻¹ Uᵀ
            pull = values / (variance * values**2 + self.noise_std**2) * self._residual(x0, rows)
            guidance = vjp(x0, x, self.operator.lift(pull).detach())
        if self.prior_variance:
            # αv/(α²v + σ²) = αr²/σ²
            longest = self.TRUST * (alpha * variance / std**2)[:, 0] * pull.detach().norm(dim=1)
            norm = guidance.flatten(1).norm(dim=1).clamp(min=1e-30)
            guidance = guidance * expand((longest / norm).clamp(max=1), guidance)
        return s.detach() + self.weight * guidance


class DiffusionPosteriorSampling(_MeasurementScore):
    """DPS: every step of a predictor is followed by x ← x − ζ/‖y − A x̂_0‖ ∇ₓ‖y − A x̂_0(x)‖² (Chung et al., 2023,
    Algorithm 1), the gradient being taken at the state before the step.

    To be given to the loop both as score, which is the unconditional one, and as projection, which makes that move.
    Its length does not depend on how long the steps are, so ζ must be tuned along with their number. One backward pass
    per evaluation.

    Args:
        sde, score, operator, y: as for ``PseudoinverseGuidance``.
        step_size: ζ.
    """

    def __init__(
        self, sde: SDE, score: ScoreFunction, operator: LinearOperator, y: Tensor, *, step_size: float
    ) -> None:
        super().__init__(sde, score, operator, y)
        self.step_size = step_size
        self.move: Tensor | float = 0.0

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            s, x0 = self._denoised(x, t)
            residual = self._residual(x0, rows)
            norm = residual.norm(dim=1, keepdim=True)
            # ∇‖y − A x̂_0‖²/‖y − A x̂_0‖ = −2 (∂x̂_0/∂x)ᵀ Aᵀ (y − A x̂_0)/‖y − A x̂_0‖
            direction = self.operator.adjoint(self.operator.spectrum_adjoint(residual / norm.clamp(min=1e-12)))
            self.move = 2 * self.step_size * vjp(x0, x, direction.detach())
        return s.detach()

    def step(self, x: Tensor, t: Tensor, generator: Generator) -> Tensor:
        moved, self.move = x + self.move, 0.0
        return moved

    def finish(self, x: Tensor) -> Tensor:
        return x


class ClassifierGuidance(ConditionalScore):
    """s(x, t) + γ ∇ₓ log p(c | x, t) (Dhariwal and Nichol, 2021; Song et al., 2021, Eq. 14).

    Args:
        score: the unconditional score.
        log_probs: log p(· | x, t): x (b, ...), t (b,) → (b, K).
        labels: the class c wanted of every sample, int64 (B,).
        weight: γ.
    """

    def __init__(
        self,
        score: ScoreFunction,
        log_probs: Callable[[Tensor, Tensor], Tensor],
        labels: Tensor,
        *,
        weight: float = 1.0,
    ) -> None:
        self.score = score
        self.log_probs = log_probs
        self.labels = labels
        self.weight = weight

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        labels = self.labels if rows is None else self.labels[rows]
        with torch.enable_grad():
            position = x.detach().requires_grad_()
            wanted = self.log_probs(position, t).gather(1, labels[:, None])
            (gradient,) = torch.autograd.grad(wanted.sum(), position)
        return self.score(x, t) + self.weight * gradient.to(x.dtype)


class ClassifierFreeGuidance(ConditionalScore):
    """s(x, t) + γ (s(x, t, c) − s(x, t)) of one network (Ho and Salimans, 2022, Eq. 6 with w = γ − 1).

    With γ = 0 or 1 only one of the two scores is evaluated.

    Args:
        score: s(x, t, labels), in which ``null_label`` stands for no class at all.
        labels: the class c wanted of every sample, int64 (B,).
        null_label: its number.
        weight: γ.
    """

    def __init__(
        self,
        score: Callable[[Tensor, Tensor, Tensor], Tensor],
        labels: Tensor,
        null_label: int,
        *,
        weight: float = 1.0,
    ) -> None:
        self.score = score
        self.labels = labels
        self.null_label = null_label
        self.weight = weight
        self.evaluations = 1 if weight in (0, 1) else 2

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        labels = self.labels if rows is None else self.labels[rows]
        null = torch.full_like(labels, self.null_label)
        if self.weight in (0, 1):
            return self.score(x, t, labels if self.weight else null)
        without = self.score(x, t, null)
        return without + self.weight * (self.score(x, t, labels) - without)


# ---------------------------------------------------------------------------------------------------------------
# From a config

CLASS_CONDITIONS = ("class", "class_free")
"""Values of ``sampling.condition`` that ask for a class."""

MEASUREMENTS: dict[str, Callable[..., LinearOperator]] = {
    "inpaint": lambda sampling, shape, device: Mask(known_pixels(sampling.mask, shape).to(device)),
    "colorize": lambda sampling, shape, device: ChannelMean(shape, device),
    "super_resolution": lambda sampling, shape, device: BlockMean(shape, sampling.factor, device),
    "ct": lambda sampling, shape, device: radon_transform(shape, sampling.num_views, device),
    "linear": lambda sampling, shape, device: MatrixOperator(_read_matrix(sampling.operator).to(device), shape),
}
"""Values of ``sampling.condition`` that measure an image, and the operator of each."""

CONDITIONINGS = ("projection", "dps", "pigdm")

CONDITION_FIELDS = (
    *("condition", "conditioning", "guidance_weight", "class_label", "mask", "factor", "num_views", "operator"),
    *("measurement_noise", "num_images", "samples_per_image"),
)
"""Fields of ``config.sampling`` that unconditional sampling does not read."""

_HALVES: dict[str, tuple[float, float, float, float]] = {
    "top": (0, 0, 0.5, 1),
    "bottom": (0.5, 0, 1, 1),
    "left": (0, 0, 1, 0.5),
    "right": (0, 0.5, 1, 1),
    "center": (0.25, 0.25, 0.75, 0.75),
}
"""Unknown parts by name: from and to, as fractions of height, width, height and width."""


def check_condition(config) -> None:
    """Whether ``config.sampling`` asks for something that its sampler and the network can do.

    Raises:
        ValueError: unknown condition or conditioning, a number outside its range, or a combination without a meaning.
    """
    sampling, num_classes = config.sampling, config.model.get("num_classes", 0)
    condition, conditioning, weight = sampling.condition, sampling.conditioning, sampling.guidance_weight
    if condition not in ("", *MEASUREMENTS, *CLASS_CONDITIONS):
        raise ValueError(
            f"sampling.condition={condition!r}: allowed are {', '.join((*MEASUREMENTS, *CLASS_CONDITIONS))}, or none"
        )
    if conditioning not in CONDITIONINGS:
        raise ValueError(f"sampling.conditioning={conditioning!r}: allowed are {', '.join(CONDITIONINGS)}")
    if not 0 <= weight < math.inf:
        raise ValueError(f"sampling.guidance_weight={weight}: allowed are numbers from 0 on")
    guided = condition in CLASS_CONDITIONS or (condition in MEASUREMENTS and conditioning != "projection")
    if weight != 1 and not guided:
        how = "unconditional sampling" if not condition else f"sampling.condition={condition!r} by projection"
        raise ValueError(f"sampling.guidance_weight={weight}: {how} has no guidance")
    if sampling.class_label != -1 and condition not in CLASS_CONDITIONS:
        raise ValueError(
            f"sampling.class_label={sampling.class_label}: only for sampling.condition {' or '.join(CLASS_CONDITIONS)}"
        )
    if condition == "class_free" and not num_classes:
        raise ValueError("sampling.condition='class_free': needs a network that knows classes, model.num_classes > 0")
    unconditional_needed = condition != "class_free" or weight != 1
    if num_classes and not config.training.label_dropout and unconditional_needed:
        raise ValueError(
            f"sampling.condition={condition!r}, sampling.guidance_weight={weight}: a network trained with "
            "training.label_dropout=0 has no unconditional score; it can do 'class_free' with weight 1"
        )
    if condition in MEASUREMENTS:
        _check_measurement(sampling)


def _check_measurement(sampling) -> None:
    for name in ("num_images", "samples_per_image"):
        if sampling[name] < 1:
            raise ValueError(f"sampling.{name}={sampling[name]}: at least 1")
    if not 0 <= sampling.measurement_noise < math.inf:
        raise ValueError(f"sampling.measurement_noise={sampling.measurement_noise}: allowed are numbers from 0 on")
    if sampling.conditioning == "projection" and sampling.method == "ode" and sampling.solver != "heun":
        raise ValueError(
            f"sampling.solver={sampling.solver!r}: a projection follows every step, so needs 'heun', or "
            "sampling.method=few_step; or use sampling.conditioning=pigdm"
        )
    if (
        (sampling.conditioning, sampling.method) == ("projection", "pc")
        and sampling.measurement_noise
        and sampling.corrector != "none"
    ):
        raise ValueError(
            f"sampling.measurement_noise={sampling.measurement_noise}: a projection leaves out what is noisier than "
            "the state, which Langevin steps then forget; use sampling.corrector=none, or sampling.conditioning=pigdm"
        )
    if sampling.conditioning == "dps" and (
        sampling.method != "pc" or sampling.predictor == "none" or sampling.corrector != "none"
    ):
        raise ValueError(
            "sampling.conditioning='dps': its move follows a predictor's step, so needs sampling.method=pc, a "
            "predictor, and sampling.corrector=none"
        )


def get_operator(config, image_shape: tuple[int, int, int], device: torch.device | str = "cpu") -> LinearOperator:
    """What ``config.sampling.condition`` measures of images (C, H, W).

    Raises:
        ValueError: it does not suit such images.
        FileNotFoundError: there is no such mask or matrix.
    """
    sampling = config.sampling
    try:
        return MEASUREMENTS[sampling.condition](sampling, image_shape, device)
    except ValueError as error:
        raise ValueError(f"sampling.condition={sampling.condition!r}: {error}") from None


def condition_on_measurement(
    config,
    sde: SDE,
    score: ScoreFunction,
    operator: LinearOperator,
    y: Tensor,
    *,
    prior_variance: float,
) -> tuple[ScoreFunction, Projection | None]:
    """The score and the projection that ``config.sampling.conditioning`` makes of measurements y (B, m).

    Args:
        config: checked by ``check_condition``.
        sde, score, operator: the forward process, the unconditional score, A.
        y: measurements.
        prior_variance: of the data, for ΠGDM.
    """
    sampling = config.sampling
    if sampling.conditioning == "projection":
        return score, MeasurementProjection(sde, operator, y, sampling.measurement_noise)
    if sampling.conditioning == "dps":
        dps = DiffusionPosteriorSampling(sde, score, operator, y, step_size=sampling.guidance_weight)
        return dps, dps
    guided = PseudoinverseGuidance(
        sde,
        score,
        operator,
        y,
        sampling.measurement_noise,
        prior_variance=prior_variance,
        weight=sampling.guidance_weight,
    )
    return guided, None


def known_pixels(mask: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Booleans (C, H, W) from a description of what is unknown: left, right, top or bottom half; center, half as high
    and wide; a box 'top,left,height,width' in pixels; or the file of an image of this size, white where unknown.

    Raises:
        ValueError: none of these, a box that is not within the image, an image of another size, or nothing unknown.
        FileNotFoundError: there is no such file.
    """
    _, height, width = image_shape
    known = torch.ones(height, width, dtype=torch.bool)
    parts = mask.split(",")
    if mask in _HALVES:
        top, left, bottom, right = (
            round(part * size) for part, size in zip(_HALVES[mask], (height, width) * 2, strict=True)
        )
        known[top:bottom, left:right] = False
    elif len(parts) == 4 and all(part.strip().isdecimal() for part in parts):
        top, left, rows, columns = map(int, parts)
        if min(rows, columns) < 1 or top + rows > height or left + columns > width:
            raise ValueError(
                f"sampling.mask={mask!r}: the box top,left,height,width is not within the {height}x{width} image"
            )
        known[top : top + rows, left : left + columns] = False
    else:
        known = _read_mask(mask, height, width)
    if known.all() or not known.any():
        raise ValueError(f"sampling.mask={mask!r}: {'nothing' if known.all() else 'everything'} is unknown")
    return known.expand(image_shape).contiguous()


def _read_mask(mask: str, height: int, width: int) -> Tensor:
    from PIL import Image

    allowed = f"{', '.join(_HALVES)}, top,left,height,width, or the file of an image"
    if not Path(mask).suffix:
        raise ValueError(f"sampling.mask={mask!r}: allowed are {allowed}")
    if not Path(mask).is_file():
        raise FileNotFoundError(f"sampling.mask={mask!r}: no such file; allowed are {allowed}")
    try:
        with Image.open(mask) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"sampling.mask={mask!r}: not an image that can be read: {error}") from None
    if pixels.shape != (height, width):
        raise ValueError(
            f"sampling.mask={mask!r}: is {pixels.shape[1]}x{pixels.shape[0]}, the images are {width}x{height}"
        )
    return torch.from_numpy(pixels < 128)


def _read_matrix(path: str) -> Tensor:
    """A matrix (m, D) from a .npy file."""
    if not path:
        raise ValueError("sampling.operator is not set: give a .npy file with a matrix (m, channels·height·width)")
    if not Path(path).is_file():
        raise FileNotFoundError(f"sampling.operator={path!r}: no such file")
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        raise ValueError(f"sampling.operator={path!r}: not a .npy file that can be read: {error}") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
        raise ValueError(f"sampling.operator={path!r}: holds no matrix of numbers")
    return torch.from_numpy(array.astype(np.float64))
