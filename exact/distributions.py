"""Distributions whose noised versions are known exactly.

Under a linear SDE (see ``sde_lib``) a sample x_0 becomes x_t = α(t) x_0 + σ(t) z, z ~ N(0, I). Its density and score

    p_t(x) = E_{x_0}[N(x; α x_0, σ² I)],        s(x, t) = ∇ log p_t(x) = E[α x_0 − x | x_t = x] / σ²

have closed forms for Gaussians, for mixtures of Gaussians and for mixtures of uniform distributions on boxes. The
two-dimensional sets of Chao, Sun, Cheng, Lee, "On Investigating the Conservative Property of Score-Based Generative
Models" (ICML 2023), Section 3.2, are of these kinds: 8-Gaussian, Checkerboard, and, with a quadrature along the
curve, Spirals.

Every distribution offers ``sample``, ``log_prob`` and ``score``, in double precision throughout.
"""

import abc
import math
from collections.abc import Callable

import torch
from scipy.special import roots_legendre
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from experiment.randomness import Generator, normal_like, uniform
from sde_lib import SDE


class NoisedDistribution(abc.ABC):
    """A distribution of x_0 ∈ R^D (``dimension`` is D), noised by an SDE."""

    def __init__(self, sde: SDE, dimension: int) -> None:
        self.sde = sde
        self.dimension = dimension

    @abc.abstractmethod
    def sample(self, count: int, generator: Generator) -> Tensor:
        """Independent draws of x_0, (count, D), float64 on the CPU."""

    @abc.abstractmethod
    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Log-density (B,) at x (B, D) under α, σ (B, 1), all float64."""

    @abc.abstractmethod
    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Score (B, D) at x (B, D) under α, σ (B, 1), all float64."""

    def log_prob(self, x: Tensor, t: Tensor) -> Tensor:
        """log p_t(x) in nats, (B,) float64, differentiable.

        Args:
            x: points of D dimensions in all, (B, ...), of any floating-point type, on any device.
            t: times (B,).

        Raises:
            ValueError: x or t is of another shape, or x not of floating point.
        """
        return self._log_prob(*self._noise_at(x, t))

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """∇ log p_t(x) in closed form, in the shape and type of x, differentiable; arguments as for ``log_prob``."""
        return self._score(*self._noise_at(x, t)).view_as(x).to(x.dtype)

    def _noise_at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x as (B, D), α(t) and σ(t) as (B, 1), all float64."""
        if x.ndim < 2 or math.prod(x.shape[1:]) != self.dimension or not x.is_floating_point():
            raise ValueError(f"x {tuple(x.shape)}, {x.dtype}: need floating-point numbers, {self.dimension} each")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t of shape {tuple(t.shape)}: need one time for each of {len(x)} points")
        t = t.double()
        alpha, sigma = self.sde.mean_coefficient(t), self.sde.std(t)
        return x.reshape(len(x), self.dimension).double(), alpha[:, None], sigma[:, None]


class Gaussian(NoisedDistribution):
    """x_0 ~ N(m, C), noised: x_t ~ N(α m, α² C + σ² I).

    Args:
        mean: m, (D,).
        covariance: C, (D, D), symmetric and positive semi-definite.

    Attributes:
        spectrum, basis: eigenvalues (D,) of C, and its eigenvectors in columns (D, D).
    """

    def __init__(self, sde: SDE, mean: Tensor, covariance: Tensor) -> None:
        super().__init__(sde, len(mean))
        self.mean, self.covariance = mean.double(), covariance.double()
        self.spectrum, self.basis = _eigendecomposition(self.covariance)

    def sample(self, count: int, generator: Generator) -> Tensor:
        z = normal_like(torch.empty(count, self.dimension, dtype=torch.float64), generator)
        return self.mean + (z * self.spectrum.sqrt()) @ self.basis.T

    def moments(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t at one time."""
        t = torch.as_tensor(t, dtype=torch.float64)
        noise = self.sde.std(t) ** 2 * torch.eye(self.dimension, dtype=torch.float64)
        alpha = self.sde.mean_coefficient(t)
        return alpha * self.mean, alpha**2 * self.covariance + noise

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """∇·s (B,); arguments as for ``log_prob``."""
        return -(1 / self._standardised(*self._noise_at(x, t))[1]).sum(1)

    def flow(self, x: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x (B, D) from times s to t, both (B,).

        In each eigendirection of C a point keeps its quantile.
        """
        coordinates, variance = self._standardised(*self._noise_at(x, s))
        x, alpha, sigma = self._noise_at(x, t)
        moved = coordinates * (self._standardised(x, alpha, sigma)[1] / variance).sqrt()
        return alpha * self.mean.to(x) + moved @ self.basis.T.to(x)

    def _standardised(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates (B, D) about the mean in the eigenbasis, and variances (B, D) there."""
        return (x - alpha * self.mean.to(x)) @ self.basis.to(x), alpha**2 * self.spectrum.to(x) + sigma**2

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        coordinates, variance = self._standardised(x, alpha, sigma)
        return -0.5 * (coordinates**2 / variance + torch.log(2 * math.pi * variance)).sum(1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        coordinates, variance = self._standardised(x, alpha, sigma)
        return -(coordinates / variance) @ self.basis.T.to(x)


class GaussianMixture(NoisedDistribution):
    """x_0 ~ Σ_k w_k N(m_k, C_k), noised: x_t ~ Σ_k w_k N(α m_k, α² C_k + σ² I).

    With r_k the posterior probability of component k given x_t and s_k its score, the score is Σ_k r_k s_k.

    Args:
        weights: w, (K,), positive with sum 1.
        means: m, (K, D).
        covariances: C, (K, D, D), symmetric and positive semi-definite.
    """

    def __init__(self, sde: SDE, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__(sde, means.shape[1])
        self.weights = _probabilities(weights, len(means))
        self.means, self.covariances = means.double(), covariances.double()
        self.spectra, self.bases = _eigendecomposition(self.covariances)

    def sample(self, count: int, generator: Generator) -> Tensor:
        component = _choose(self.weights, uniform((count,), generator, dtype=torch.float64))
        z = normal_like(torch.empty(count, self.dimension, dtype=torch.float64), generator)
        scaled = z * self.spectra[component].sqrt()
        return self.means[component] + (self.bases[component] @ scaled[:, :, None])[:, :, 0]

    def divergence(self, x: Tensor, t: Tensor) -> Tensor:
        """∇·s (B,) = Σ_k r_k (∇·s_k + ‖s_k‖²) − ‖s‖²; arguments as for ``log_prob``."""
        log_joint, scores, variance = self._components(*self._noise_at(x, t))
        share = log_joint.softmax(1)
        mean = (share[:, :, None] * scores).sum(1)
        return (share * ((scores**2).sum(2) - (1 / variance).sum(2))).sum(1) - (mean**2).sum(1)

    def responsibilities(self, x: Tensor, t: Tensor) -> Tensor:
        """r_k (B, K), the probability that x_t belongs to component k; arguments as for ``log_prob``."""
        return self._components(*self._noise_at(x, t))[0].softmax(1)

    def moments(self, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of x_t at one time."""
        mean = self.weights @ self.means
        within = torch.einsum("k,kde->de", self.weights, self.covariances)
        between = (self.weights[:, None] * (self.means - mean)).T @ (self.means - mean)
        return Gaussian(self.sde, mean, within + between).moments(t)

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Per component: log w_k p_k(x) (B, K), its score (B, K, D), and its variances (B, K, D) in its eigenbasis."""
        bases = self.bases.to(x)
        alpha, sigma = alpha[:, None], sigma[:, None]
        coordinates = torch.einsum("bkd,kde->bke", x[:, None] - alpha * self.means.to(x), bases)
        variance = alpha**2 * self.spectra.to(x) + sigma**2
        log_prob = -0.5 * (coordinates**2 / variance + torch.log(2 * math.pi * variance)).sum(2)
        scores = -torch.einsum("bke,kde->bkd", coordinates / variance, bases)
        return log_prob + self.weights.to(x).log(), scores, variance

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._components(x, alpha, sigma)[0].logsumexp(1)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        log_joint, scores, _ = self._components(x, alpha, sigma)
        return (log_joint.softmax(1)[:, :, None] * scores).sum(1)


_CHUNK_ELEMENTS = 2**16
"""Numbers per temporary when many boxes are evaluated: 0.5 MiB, which fits into a core's cache."""


class BoxMixture(NoisedDistribution):
    """x_0 ~ Σ_k w_k U(box_k), a mixture of uniform distributions on axis-aligned boxes [l_k, u_k], noised:

        p_t(x) = Σ_k w_k Π_d [Φ((x_d − α l_kd)/σ) − Φ((x_d − α u_kd)/σ)] / (α (u_kd − l_kd))

    with Φ the normal CDF. Every factor, and its score, keeps its relative precision in both tails and for boxes much
    narrower than σ. Points are evaluated in chunks, recomputed in the backward pass, so that the memory for
    temporaries is bounded however many boxes there are.

    Args:
        lower, upper: l and u, (K, D), with l < u.
        weights: w, (K,), positive with sum 1.

    Attributes:
        smallest_noise: σ/α must be above 0 and at least this for density and score, in units of the data.
    """

    smallest_noise: float = 0.0

    def __init__(self, sde: SDE, lower: Tensor, upper: Tensor, weights: Tensor) -> None:
        super().__init__(sde, lower.shape[1])
        self.weights = _probabilities(weights, len(lower))
        self.lower, self.upper = lower.double(), upper.double()

    def sample(self, count: int, generator: Generator) -> Tensor:
        u = uniform((count, 1 + self.dimension), generator, dtype=torch.float64)
        box = _choose(self.weights, u[:, 0])
        return torch.lerp(self.lower[box], self.upper[box], u[:, 1:])

    def _noise_at(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, alpha, sigma = super()._noise_at(x, t)
        noise = (sigma / alpha).detach()
        # The tolerance is for t in single precision.
        if not bool(((noise > 0) & (noise >= (1 - 1e-4) * self.smallest_noise)).all()):
            least = f"sigma/alpha = {noise.min():.6g}"
            raise ValueError(f"t: {least}; need it above 0 and at least smallest_noise={self.smallest_noise}")
        return x, alpha, sigma

    def _components(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Per box: log w_k p_k(x) (B, K), and its score (D, B, K)."""
        # Dimensions come first: sums over them then run over contiguous memory.
        centre, half_width = (0.5 * (self.upper + self.lower)).T.to(x), (0.5 * (self.upper - self.lower)).T.to(x)
        position = (x.T[:, :, None] - alpha * centre[:, None]) / sigma
        log_prob, score = _uniform_plus_normal(position, alpha / sigma * half_width[:, None])
        log_joint = log_prob.sum(0) + self.weights.to(x).log() - self.dimension * sigma.log()
        return log_joint, score / sigma

    def _log_prob(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._in_chunks(lambda log_joint, scores: log_joint.logsumexp(1), x, alpha, sigma)

    def _score(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return self._in_chunks(lambda log_joint, scores: (log_joint.softmax(1) * scores).sum(2).T, x, alpha, sigma)

    def _in_chunks(self, combine: Callable[[Tensor, Tensor], Tensor], *arguments: Tensor) -> Tensor:
        rows = max(1, _CHUNK_ELEMENTS // self.lower.numel())

        def values(*chunk: Tensor) -> Tensor:
            return combine(*self._components(*chunk))

        chunks = zip(*(a.split(rows) for a in arguments), strict=True)
        recomputed = {"use_reentrant": False, "preserve_rng_state": False}
        return torch.cat([checkpoint(values, *chunk, **recomputed) for chunk in chunks])


class Spirals(BoxMixture):
    """Two interleaved spirals of squares: x_0 = ±(2.3/3) (−n cos n + U₂/2, n sin n + U₃/2), n = 3π √U₁.

    U₁, U₂, U₃ are uniform on [0, 1], and either sign has probability ½. ``sample`` is exact. In the density the
    integral over n, which has density 2n/(9π²) on [0, 3π], is a Gauss–Legendre sum of N = 60 + 66/``smallest_noise``
    nodes, which makes it a ``BoxMixture`` of 2N squares. At the smallest noise log p is within 1e-8 of that of twice
    the nodes up to 3 σ off the spirals, and within 1e-6 up to 6 σ; at more noise it is closer.

    Args:
        smallest_noise: the least σ/α at which density and score are wanted.
    """

    _SCALE = 2.3 / 3
    _END = 3 * math.pi

    def __init__(self, sde: SDE, *, smallest_noise: float = 0.1) -> None:
        # On [−1, 1]; the rule is dense near both ends, at the far one of which the curve ends and is fastest.
        node, weight = (torch.from_numpy(a) for a in roots_legendre(60 + math.ceil(66 / smallest_noise)))
        fraction = 0.5 * (1 + node)
        lower, upper = self._square(self._END * fraction)
        # 2n/(9π²) dn is 2f df for n = 3π f; half of that for each sign.
        weight = 0.5 * fraction * weight
        super().__init__(sde, torch.cat([lower, -upper]), torch.cat([upper, -lower]), torch.cat([weight, weight]))
        self.smallest_noise = smallest_noise

    def _square(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper corners (..., 2) of the square at n (...) on the spiral of positive sign."""
        corner = torch.stack([-n * n.cos(), n * n.sin()], -1)
        return self._SCALE * corner, self._SCALE * (corner + 0.5)

    def sample(self, count: int, generator: Generator) -> Tensor:
        u = uniform((count, 4), generator, dtype=torch.float64)
        point = torch.lerp(*self._square(self._END * u[:, 0].sqrt()), u[:, 1:3])
        return torch.where(u[:, 3:] < 0.5, -point, point)


def _uniform_plus_normal(m: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Log-density and score at m of u + z, with u uniform on [−h, h] and z ~ N(0, 1).

    With Q = 1 − Φ, φ the normal density and, by symmetry, m ≥ 0, let a = m − h and b = m + h be the distances to the
    edges. The density is Δ/2h with Δ = Q(a) − Q(b), the score (φ(b) − φ(a))/Δ. In terms of the scaled function
    erfcx(v) = exp(v²) erfc(v), and as (a² − b²)/2 = −2mh,

        Δ = ½ exp(−a²/2) G,  G = erfcx(a/√2) − exp(−2mh) erfcx(b/√2),        score = −√(2/π) (1 − exp(−2mh)) / G

    in which no factor under- or overflows on its own. For h max(1, m) ≪ 1 the two terms of G cancel; there

        Δ = 2h φ(m) Σ_j He_2j(m) h^2j / (2j+1)!

    with the Hermite polynomials He, the integral of the Taylor series of φ.
    """
    sign = torch.where(m < 0, -1.0, 1.0).to(m)  # not abs(), whose derivative at 0 is 0
    m = sign * m
    # Beyond 20 standard deviations inside the edge Φ = 1 up to 3e-89; further in, products of erfcx, which higher
    # derivatives contain, would overflow.
    near, far = (m - h).clamp(min=-20), m + h
    decay = torch.exp(-2 * m * h)
    root_half = math.sqrt(0.5)
    density = (torch.special.erfcx(root_half * near) - decay * torch.special.erfcx(root_half * far)) / (4 * h)
    narrow = h * m.clamp(min=1) < 0.02
    narrow_h = torch.where(narrow, h, 0.0)  # where it is not used, the series must not overflow
    p, q = narrow_h**2, (narrow_h * m) ** 2
    series = 1 + (q - p) / 6 + (q**2 - 6 * p * q + 3 * p**2) / 120
    series = series * torch.exp(narrow_h * (0.5 * narrow_h - m)) / math.sqrt(2 * math.pi)
    density = torch.where(narrow, series, density)  # times exp(−a²/2)
    log_prob = density.log() - 0.5 * near**2
    score = sign * torch.expm1(-2 * m * h) / (2 * math.sqrt(2 * math.pi) * h * density)
    return log_prob, score


def entropy(distribution: NoisedDistribution, t: float, *, half_width: float = 10.0) -> float:
    """Differential entropy of x_t in the plane, in nats: −∫ p ln p by the trapezoidal rule on a grid.

    Of a smooth density that vanishes at the border the rule converges faster than any power of the spacing, once that
    is no larger than σ_t.
    """
    spacing = 0.1
    axis = torch.arange(-half_width, half_width + spacing / 2, spacing, dtype=torch.float64)
    total = 0.0
    for x1 in axis:
        x = torch.stack([x1.expand(len(axis)), axis], dim=1)
        log_p = distribution.log_prob(x, torch.full((len(axis),), t, dtype=torch.float64))
        total -= float((log_p.exp() * log_p).sum())
    return total * spacing**2


def _eigendecomposition(covariance: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., D), not below 0, and eigenvectors in columns (..., D, D) of covariance matrices."""
    spectrum, basis = torch.linalg.eigh(covariance)
    tolerance = 1e-6 * covariance.abs().amax()
    if not bool(((covariance - covariance.mT).abs().amax() <= tolerance) & (spectrum.amin() >= -tolerance)):
        raise ValueError(f"covariance={covariance.tolist()}: must be symmetric and positive semi-definite")
    return spectrum.clamp(min=0), basis


def _probabilities(weights: Tensor, count: int) -> Tensor:
    """The weights (K,) of K = ``count`` components in float64, made to add up exactly."""
    weights = weights.double()
    if weights.shape != (count,) or not bool((weights > 0).all()) or not abs(float(weights.sum()) - 1) < 1e-6:
        raise ValueError(f"weights={weights.tolist()}: need {count} positive numbers with sum 1")
    return weights / weights.sum()


def _choose(weights: Tensor, u: Tensor) -> Tensor:
    """Indices (B,) distributed as the weights (K,) if u (B,) is uniform on [0, 1)."""
    cumulative = weights.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], u.contiguous(), right=True)


def gaussian_8(sde: SDE) -> GaussianMixture:
    """8-Gaussian: (ε + c)/√2 with ε ~ N(0, I) and c one of 8 equally likely centres, at radius 8 and angles j·45°."""
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4)
    centres = 8 * torch.stack([angle.cos(), angle.sin()], 1)
    covariances = (0.5 * torch.eye(2, dtype=torch.float64)).expand(8, 2, 2)
    return GaussianMixture(sde, torch.full((8,), 1 / 8), centres / math.sqrt(2), covariances)


def checkerboard(sde: SDE) -> BoxMixture:
    """Checkerboard: 3 (x₁, x₂) with x₁ = 4U − 2 and x₂ = U′ − 2 Bernoulli(½) + (⌊x₁⌋ mod 2); U, U′ uniform on [0, 1].

    Equally likely squares of side 3: in the column [k, k + 1] × 3, k = −2 … 1, those of rows k mod 2 and (k mod 2) − 2.
    """
    corners = [(column, column % 2 + row) for column in range(-2, 2) for row in (0, -2)]
    lower = 3 * torch.tensor(corners, dtype=torch.float64)
    return BoxMixture(sde, lower, lower + 3, torch.full((8,), 1 / 8))


TWO_DIMENSIONAL: dict[str, Callable[[SDE], NoisedDistribution]] = {
    "gaussian_8": gaussian_8,
    "checkerboard": checkerboard,
    "spiral_2": Spirals,
}
"""The two-dimensional sets by name."""
