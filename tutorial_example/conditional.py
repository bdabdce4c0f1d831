"""Conditional generation on a labelled mixture: classifier guidance and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

from exact.distributions import GaussianMixture
from experiment.randomness import normal_like, seed_from, uniform
from guidance.conditions import ClassifierFreeGuidance, ClassifierGuidance
from losses import Objective
from models.mlp import TimeConditionalMLP
from models.score import NoiseLevel, UnconstrainedScore
from sampling import ConditionalScore, PCSampler
from sde_lib import SDE, expand

from .tutorial_figure import (
    EXPERIMENT,
    SDES,
    Claim,
    Result,
    TutorialFigure,
    Update,
    constant,
    generator,
    markdown_table,
    new_figure,
    plane,
    plane_grid,
    train,
)

__all__ = ["Conditional", "histogram_divergence"]

COMPONENTS = (slice(0, 2), slice(2, 4))
"""Of either class."""
NUM_CLASSES = len(COMPONENTS)


def labelled_mixture(sde: SDE) -> GaussianMixture:
    """Four components, two of either class, which overlap."""
    means = torch.tensor([[-1.4, 0.6], [0.6, 1.2], [-0.5, -0.9], [1.4, -0.2]])
    first = torch.tensor([[[0.12, 0.06], [0.06, 0.20]], [[0.25, -0.10], [-0.10, 0.15]]])
    second = torch.tensor([[[0.30, 0.00], [0.00, 0.10]], [[0.10, 0.00], [0.00, 0.30]]])
    return GaussianMixture(sde, torch.tensor([0.3, 0.2, 0.3, 0.2]), means, torch.cat([first, second]))


def class_density(mixture: GaussianMixture, c: int) -> GaussianMixture:
    """p(x | c)."""
    chosen = COMPONENTS[c]
    weights = mixture.weights[chosen]
    return GaussianMixture(mixture.sde, weights / weights.sum(), mixture.means[chosen], mixture.covariances[chosen])


def class_log_probs(mixture: GaussianMixture, x: Tensor, t: Tensor) -> Tensor:
    """log p(c | x_t) (B, 2): what a time-dependent classifier should give."""
    shares = mixture.responsibilities(x, t)
    return torch.stack([shares[:, chosen].sum(1) for chosen in COMPONENTS], 1).log().to(x.dtype)


def histogram_divergence(samples: Tensor, density: GaussianMixture, half_width: float = 3.0, bins: int = 16) -> float:
    """KL(samples ‖ p_0) in nats between the histogram of samples (N, 2) and p_0's probabilities of its cells.

    Over cells of a square, by sums of the density on a grid eight times as fine; what lies outside counts as one more.
    """
    fine = 8 * bins
    x = (torch.arange(fine, dtype=torch.float64) + 0.5) * (2 * half_width / fine) - half_width
    points = torch.cartesian_prod(x, x)
    mass = density.log_prob(points, constant(points, 0.0)).exp() * (2 * half_width / fine) ** 2
    cells = mass.view(bins, 8, bins, 8).sum((1, 3)).flatten()
    p = torch.cat([cells, (1 - cells.sum()).clamp(min=1e-12)[None]])
    index = ((samples.double() + half_width) * (bins / (2 * half_width))).floor().long()
    inside = ((index >= 0) & (index < bins)).all(1)
    flat = torch.where(inside, index[:, 0] * bins + index[:, 1], bins * bins)
    q = torch.bincount(flat, minlength=bins * bins + 1).double() / len(samples)
    return float(torch.where(q > 0, q * (q / p.clamp(min=1e-300)).log(), 0.0).sum())


@dataclass(frozen=True)
class Conditional(TutorialFigure):
    """Samples of one class by guidance with the exact classifier, a learned one, and without classifier.

    Args:
        n_iters, batch_size: of score, classifier and class-conditional score.
        dropped_labels: how many labels the last one is trained without.
        num_steps: of the sampler, Euler–Maruyama.
        samples: of every sampler.
        strong: a weight γ other than 1.
        wanted: the class.
    """

    n_iters: int = 3000
    batch_size: int = 512
    dropped_labels: float = 0.2
    num_steps: int = 500
    samples: int = 5000
    strong: float = 4.0
    wanted: int = 1

    name = "conditional"
    title = "Class-conditional generation: classifier and classifier-free guidance"

    @property
    def methods(self) -> dict[str, tuple[str, str, float]]:
        """Name → score, guidance, γ."""
        return {
            "exact classifier, true score": ("true", "exact", 1.0),
            "learned classifier, learned score": ("learned", "learned", 1.0),
            "classifier-free": ("learned", "free", 1.0),
            f"exact classifier, true score, γ = {self.strong:g}": ("true", "exact", self.strong),
            f"learned classifier, learned score, γ = {self.strong:g}": ("learned", "learned", self.strong),
            f"classifier-free, γ = {self.strong:g}": ("learned", "free", self.strong),
        }

    @property
    def steps(self) -> int:
        return 3 * self.n_iters + len(self.methods) * (self.num_steps + 1)

    def compute(self, folder: Path, update: Update) -> Result:
        sde = SDES["VP"]
        mixture = labelled_mixture(sde)
        density = class_density(mixture, self.wanted)
        score = self.fit_score(mixture, 0, folder / "score", update)
        conditional = self.fit_score(mixture, NUM_CLASSES, folder / "conditional_score", update)
        classifier = self.fit_classifier(mixture, folder / "classifier", update)

        def learned_log_probs(x: Tensor, t: Tensor) -> Tensor:
            return classifier(x, 999 * t).log_softmax(1)

        sampler = PCSampler(sde, "euler_maruyama", "none", num_steps=self.num_steps)
        labels = torch.full((self.samples,), self.wanted)
        rows, arrays = [], {}
        for name, (kind, guidance, weight) in self.methods.items():
            dtype = torch.float64 if kind == "true" else torch.float32
            if guidance == "free":
                guided = ClassifierFreeGuidance(conditional, labels, NUM_CLASSES, weight=weight)
            else:
                log_probs = learned_log_probs
                if guidance == "exact":
                    log_probs = lambda x, t: class_log_probs(mixture, x, t)  # noqa: E731
                unconditional = mixture.score if kind == "true" else score
                guided = ClassifierGuidance(unconditional, log_probs, labels, weight=weight)
            like = torch.empty(self.samples, 2, dtype=dtype)
            reported = Reported(guided, update)
            result = sampler(reported, like, generator(self.name, "samples"))
            measured = self.measure(result.x, mixture, density)
            rows.append({"method": name, "weight": weight, "nfe": result.nfe, **measured})
            arrays[name] = result.x[:1500].numpy()
        truth = density.sample(self.samples, generator(self.name, "truth"))
        measured = self.measure(truth, mixture, density)
        rows.append({"method": "draws of the density itself", "weight": None, "nfe": None, **measured})
        x = mixture.sample(20_000, generator(self.name, "classified"))
        grid = plane_grid(2.8, 101)
        for c in range(NUM_CLASSES):
            log_density = class_density(mixture, c).log_prob(grid, constant(grid, 0.0))
            arrays[f"density {c}"] = log_density.exp().numpy()
        errors = self.classifier_errors(mixture, learned_log_probs, x)
        numbers = {"rows": rows, "classifier": errors}
        return Result(numbers, self.claims(numbers), arrays)

    # -- learning

    def labelled(self, mixture: GaussianMixture, source: torch.Generator) -> tuple[Tensor, Tensor]:
        """Points (B, 2) and their classes (B,), drawn from p(c | x)."""
        x0 = mixture.sample(self.batch_size, source)
        second = class_log_probs(mixture, x0, constant(x0, 0.0))[:, 1].exp()
        return x0.float(), (uniform((len(x0),), source, dtype=torch.float64) < second).long()

    def fit_score(self, mixture: GaussianMixture, num_classes: int, folder: Path, update: Update) -> UnconstrainedScore:
        """A score, of p(x | c) and p(x) in one network if there are classes."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(EXPERIMENT, "weights", self.name, num_classes))
            network = TimeConditionalMLP(2, num_classes=num_classes)
        model = UnconstrainedScore(network, NoiseLevel(mixture.sde))
        objective = Objective(model)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "batch", step)
            x0, labels = self.labelled(mixture, source)
            dropped = uniform((len(labels),), source) < self.dropped_labels
            labels = torch.where(dropped, num_classes, labels)
            return objective(x0, source, class_labels=labels if num_classes else None)["loss"]

        train(model, loss, folder, update, n_iters=self.n_iters)
        return model

    def fit_classifier(self, mixture: GaussianMixture, folder: Path, update: Update) -> nn.Module:
        """Logits of p(c | x_t): cross-entropy at uniform times."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(EXPERIMENT, "weights", self.name, "classifier"))
            network = TimeConditionalMLP(2, outputs=NUM_CLASSES)

        def loss(step: int) -> Tensor:
            source = generator(self.name, "classifier batch", step)
            x0, labels = self.labelled(mixture, source)
            t = uniform((len(x0),), source)
            mean, std = mixture.sde.marginal(x0, t)
            x = mean + expand(std, x0) * normal_like(x0, source)
            return F.cross_entropy(network(x, 999 * t), labels)

        train(network, loss, folder, update, n_iters=self.n_iters)
        return network

    # -- measuring

    def measure(self, x: Tensor, mixture: GaussianMixture, density: GaussianMixture) -> dict[str, float]:
        x = x.double()
        t = constant(x, 0.0)
        mean, covariance = density.moments(0.0)
        std = covariance.diagonal().sqrt()
        return {
            "divergence": histogram_divergence(x, density),
            "wanted": float(class_log_probs(mixture, x, t)[:, self.wanted].exp().mean()),
            "mean_error": float(((x.mean(0) - mean) / std).abs().max()),
            "variance_ratio": float(x.T.cov().trace() / covariance.trace()),
        }

    def classifier_errors(self, mixture: GaussianMixture, log_probs, x0: Tensor) -> list[dict[str, float]]:
        """At several times: mean |p(c | x) − learned p(c | x)|."""
        rows = []
        for t in (0.001, 0.1, 0.25, 0.5, 1.0):
            times = constant(x0, t)
            mean, std = mixture.sde.marginal(x0, times)
            x = mean + expand(std, x0) * normal_like(x0, generator(self.name, "classified", repr(t)))
            exact = class_log_probs(mixture, x, times)[:, 1].exp()
            learned = log_probs(x.float(), times.float())[:, 1].exp()
            rows.append({"t": t, "error": float((exact - learned).abs().mean())})
        return rows

    def claims(self, numbers: Mapping) -> list[Claim]:
        *sampled, truth = numbers["rows"]
        claims = []
        for row in sampled:
            if row["weight"] == 1:
                bound = 0.02 if "true" in row["method"] else 0.05
                excess = row["divergence"] - truth["divergence"]
                text = f"{row['method']}: KL beyond that of draws of the density (nats)"
                claims.append(Claim(text, excess, "<=", bound))
            else:
                text = f"{row['method']}: probability of the wanted class"
                claims.append(Claim(text, row["wanted"], ">=", truth["wanted"]))
        worst = max(row["error"] for row in numbers["classifier"])
        claims.append(Claim("learned classifier: mean error of the probability, at any time", worst, "<=", 0.02))
        return claims

    def table(self, numbers: Mapping) -> str:
        header = ("samples", "KL to p(x given c) (nats)", "probability of the class", "mean", "variance", "NFE")
        rows = [
            (
                row["method"],
                f"{row['divergence']:.4f}",
                f"{row['wanted']:.4f}",
                f"{row['mean_error']:.3f}",
                f"{row['variance_ratio']:.3f}",
                "" if row["nfe"] is None else f"{row['nfe']:g}",
            )
            for row in numbers["rows"]
        ]
        errors = ", ".join(f"{row['error']:.4f} at t = {row['t']:g}" for row in numbers["classifier"])
        return (
            f"{self.samples} samples of class {self.wanted}, {self.num_steps} steps of Euler–Maruyama. KL of their "
            "histogram of 16×16 cells, which for draws of the density itself is not 0 either; mean: error "
            "in standard deviations; variance: over the true one; probability: the mean of p(c given x).\n\n"
            + markdown_table(header, rows)
            + f"\nLearned classifier, mean error of p(c given x): {errors}.\n"
        )

    def draw(self, result: Result) -> Figure:
        figure = new_figure(8.4, 5.2)
        width, count = 2.8, 101
        for ax, name in zip(figure.subplots(2, 3).flat, self.methods, strict=True):
            for c, colour in ((1 - self.wanted, "tab:blue"), (self.wanted, "tab:red")):
                ax.contour(
                    result.arrays[f"density {c}"].reshape(count, count),
                    levels=(0.02, 0.1, 0.3),
                    extent=(-width, width, -width, width),
                    colors=colour,
                    linewidths=0.7,
                )
            ax.scatter(*result.arrays[name].T, s=1, color="black", linewidths=0)
            plane(ax, width)
            ax.annotate("wanted", (-1.9, -1.9), color="tab:red", fontsize=7)
            ax.annotate("the other class", (-1.9, 2.2), color="tab:blue", fontsize=7)
            ax.set_title(name.replace(", ", ",\n", 1), fontsize=8)
        return figure


class Reported(ConditionalScore):
    """A guided score that reports every evaluation of a batch as one step."""

    def __init__(self, guided: ConditionalScore, update: Update) -> None:
        self.guided = guided
        self.update = update
        self.evaluations = guided.evaluations

    def __call__(self, x: Tensor, t: Tensor, rows: Tensor | None = None) -> Tensor:
        self.update(1)
        return self.guided(x, t, rows)
