"""Class-conditional generation: classifier guidance and classifier-free guidance on a labelled mixture.

Divergence: KL (nats) of the samples' histogram of 16×16 cells to p(x given c), which for draws of the density itself is
not 0 either; wanted: mean of p(c given x); error of the mean in standard deviations; variance over the true one.
Sources: Dhariwal and Nichol (NeurIPS 2021); Ho and Salimans (2022).
"""

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from exact.distributions import GaussianMixture
from experiment.figures import COLOURS, new_figure, plane_grid
from experiment.randomness import uniform
from guidance.conditions import ClassifierFreeGuidance, ClassifierGuidance
from losses import Objective
from models.score import UnconstrainedScore
from sampling import PCSampler
from sde_lib import SDE
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator

COMPONENTS = (slice(0, 2), slice(2, 4))  # of either class
WANTED, WEIGHTS = 1, (1.0, 4.0)  # the class that is sampled, and the weights γ
DROPPED_LABELS = 0.2  # how many labels the class-conditional score is trained without
WIDTH = 2.8


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
    counts = np.histogram2d(*samples.double().T, bins, [(-half_width, half_width)] * 2)[0]
    q = torch.from_numpy(np.append(counts, len(samples) - counts.sum())) / len(samples)
    return float(torch.where(q > 0, q * (q / p.clamp(min=1e-300)).log(), 0.0).sum())


def run(folder: Path, update: Update, *, n_iters: int = 3000, num_steps: int = 500, samples: int = 5000) -> Result:
    sde = SDES["VP"]
    mixture = labelled_mixture(sde)
    density = class_density(mixture, WANTED)

    def labelled(source: torch.Generator) -> tuple[Tensor, Tensor]:
        """A batch of points (B, 2) and their classes (B,), drawn from p(c | x)."""
        x0 = mixture.sample(512, source)
        second = class_log_probs(mixture, x0, constant(x0, 0.0))[:, 1].exp()
        return x0.float(), (uniform((len(x0),), source, dtype=torch.float64) < second).long()

    # Train a score, one that knows p(x | c) and p(x) alike, and a classifier of noised points.
    def trained_score(name: str, num_classes: int) -> UnconstrainedScore:
        model = common.score_model(sde, "conditional", num_classes, num_classes=num_classes)
        objective = Objective(model)

        def loss(step: int) -> Tensor:
            source = generator("conditional", "batch", step)
            x0, labels = labelled(source)
            labels = torch.where(uniform((len(labels),), source) < DROPPED_LABELS, num_classes, labels)
            return objective(x0, source, class_labels=labels if num_classes else None)["loss"]

        common.train(model, loss, folder / name, update, n_iters=n_iters)
        return model

    score, conditional = trained_score("score", 0), trained_score("conditional_score", len(COMPONENTS))
    classifier = common.network("conditional", "classifier", outputs=len(COMPONENTS))

    def classifier_loss(step: int) -> Tensor:
        source = generator("conditional", "classifier batch", step)
        x0, labels = labelled(source)
        t = uniform((len(x0),), source)
        return F.cross_entropy(classifier(common.noised(sde, x0, t, source), 999 * t), labels)

    common.train(classifier, classifier_loss, folder / "classifier", update, n_iters=n_iters)

    def learned_log_probs(x: Tensor, t: Tensor) -> Tensor:
        return classifier(x, 999 * t).log_softmax(1)

    # Sample one class, and measure the samples, and draws of its density.
    exact_log_probs = partial(class_log_probs, mixture)
    drawn, rows, labels = {}, [], torch.full((samples,), WANTED)
    sampler = PCSampler(sde, "euler_maruyama", "none", num_steps=num_steps)
    guided = {
        "exact classifier, true score": partial(ClassifierGuidance, mixture.score, exact_log_probs, labels),
        "learned classifier, learned score": partial(ClassifierGuidance, score, learned_log_probs, labels),
        "classifier-free": partial(ClassifierFreeGuidance, conditional, labels, len(COMPONENTS)),
    }
    for weight, name in product(WEIGHTS, guided):
        like = torch.empty(samples, 2, dtype=torch.float64 if "true" in name else torch.float32)
        found = sampler(guided[name](weight=weight), like, generator("conditional", "samples"))
        drawn[f"{name}, γ = {weight:g}"] = found.x.double()
        update(num_steps + 1)
    drawn["draws of the density itself"] = density.sample(samples, generator("conditional", "truth"))
    mean, covariance = density.moments(0.0)
    for name, x in drawn.items():
        row = {"method": name, "divergence": histogram_divergence(x, density)}
        row["wanted"] = float(class_log_probs(mixture, x, constant(x, 0.0))[:, WANTED].exp().mean())
        row["mean_error"] = float(((x.mean(0) - mean) / covariance.diagonal().sqrt()).abs().max())
        rows.append({**row, "variance_ratio": float(x.T.cov().trace() / covariance.trace())})

    # What must hold.
    claims, (*sampled, truth) = {}, rows
    for row in sampled[: len(guided)]:  # γ = 1
        excess, bound = row["divergence"] - truth["divergence"], 0.02 if "true" in row["method"] else 0.05
        claims[f"{row['method']}: KL beyond that of draws of the density (nats)"] = excess, "<=", bound
    for row in sampled[len(guided) :]:
        claims[f"{row['method']}: probability of the wanted class"] = row["wanted"], ">=", truth["wanted"]

    # The picture: samples over lines of equal density of both classes.
    figure = new_figure(8.4, 5.2)
    grid = plane_grid(WIDTH, 101)
    for ax, row in zip(figure.subplots(2, 3).flat, sampled, strict=True):
        common.draw_points(ax, drawn[row["method"]][:1500], WIDTH)
        for c, what, height in ((WANTED, "wanted", -1.9), (1 - WANTED, "the other class", 2.2)):
            p, style = class_density(mixture, c).log_prob(grid, constant(grid, 0.0)).exp(), COLOURS[1 - (c == 0)]
            extent = (-WIDTH, WIDTH, -WIDTH, WIDTH)
            ax.contour(p.view(101, 101), levels=(0.02, 0.1, 0.3), extent=extent, colors=style, linewidths=0.7)
            ax.annotate(what, (-1.9, height), color=style, fontsize=7)
        ax.set_title(row["method"].replace(", ", ",\n", 1), fontsize=8)
    return Result({"rows": rows}, claims, figure)
