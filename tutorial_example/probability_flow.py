"""Probability-flow ODE: trajectories, likelihood against the exact density, interpolation between latents.

Errors of log p in nats, by the ODE with rtol = atol = 1e-5; round trip: data → latents → data. Rare: of lower density
than 99 % of the data, so that 0.01 is right between latents.
Source: Song et al. (ICLR 2021), Section 4.3.
"""

import copy
import itertools
import math
from pathlib import Path

import torch
from torch import Tensor

from experiment.figures import COLOURS, new_figure
from likelihood import LIKELIHOOD_EPS as EPS
from likelihood import LikelihoodEvaluator
from ode import integrate
from sde_lib import SDE, ScoreFunction
from tutorial_example import common
from tutorial_example.common import SDES, Result, Update, constant, generator, standard_error

BETWEEN, WIDTH = 21, 2.8
TOLERANCE = 1e-8  # of the solver that goes there and back
RARE = 0.01  # share of the data whose density is called rare


@torch.no_grad()
def follow_flow(sde: SDE, score: ScoreFunction, x: Tensor, start: float, end: float, tolerance: float = 1e-5) -> Tensor:
    """Where the probability-flow ODE takes x (B, ...) from one time to another, either way."""
    flow = sde.reverse(score, probability_flow=True)

    def velocity(y: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return flow.drift(y.to(x.dtype).view(-1, *x.shape[1:]), t.to(x.dtype)).flatten(1).double()

    y = integrate(velocity, x.flatten(1).double(), start, end, rtol=tolerance, atol=tolerance)
    return y.to(x.dtype).view_as(x)


def interpolate_latents(a: Tensor, b: Tensor, count: int) -> Tensor:
    """a cos φ + b sin φ (count, B, ...) with φ from 0 to 90°, from a to b, both (B, ...).

    If a and b are independent draws of N(0, I), so is every point between them; those of a straight line are too short.
    """
    angle = torch.linspace(0, math.pi / 2, count, dtype=a.dtype).view(-1, *(1 for _ in a.shape))
    return a * angle.cos() + b * angle.sin()


def run(folder: Path, update: Update, *, n_iters: int = 4000, points: int = 1000, probes: int = 8) -> Result:
    """``probes`` of Skilling and Hutchinson are averaged, after a single one."""
    sde = SDES["VP"]
    mixture, end = common.three_modes(sde), sde.end_time

    # Train.
    model = common.score_model(sde, "probability_flow")
    loss = common.denoising_loss(model, mixture, "probability_flow", "batch")
    common.train(model, loss, folder / "score", update, n_iters)

    # Data, their exact density, and the density that one in a hundred falls below.
    data = mixture.sample(points, generator("probability_flow", "points"))
    exact = mixture.log_prob(data, constant(data, EPS))
    many = mixture.sample(100_000, generator("probability_flow", "rare"))
    threshold = mixture.log_prob(many, constant(many, EPS)).quantile(RARE)

    def rare(lines: Tensor) -> Tensor:
        """Of every pair, the share of what lies between that is rarer than 99 % of the data."""
        x = lines[1:-1].flatten(0, 1)
        return (mixture.log_prob(x, constant(x, EPS)) < threshold).double().view(len(lines) - 2, -1).mean(0)

    figure = new_figure(8.4, 5.2)
    likelihoods, interpolations, pairs = [], [], 2 * points // 5
    for kind, score, x, axes in zip(
        ("true", "learned"), (mixture.score, model), (data, data.float()), figure.subplots(2, 3), strict=True
    ):
        # Likelihood by the exact trace, and by estimates of it.
        for trace, count in (("exact", 1), ("rademacher", 1), ("rademacher", probes)):
            evaluator = LikelihoodEvaluator(sde, divergence=trace, rtol=1e-5, atol=1e-5)
            found = [evaluator(score, x, generator("probability_flow", "probe", probe)) for probe in range(count)]
            update(count)
            error = torch.stack([result.log_prob.double() for result in found]).mean(0) - exact
            row = {"score": kind, "trace": trace, "probes": count, "mean_absolute_error": float(error.abs().mean())}
            row |= {"mean_error": float(error.mean()), "mean_error_se": standard_error(error)}
            likelihoods.append({**row, "nfe": sum(result.nfe for result in found)})
            if count == 1:
                style = {"color": COLOURS[1], "zorder": 3} if trace == "exact" else {"color": "0.7"}
                axes[2].plot(exact, error, ".", markersize=2, label=f"{trace} trace", **style)

        # To the latents and back; interpolation between latents, and between data.
        in_double = score if kind == "true" else copy.deepcopy(model).double()
        latent = follow_flow(sde, in_double, data[:100], EPS, end, TOLERANCE)
        round_trip = (follow_flow(sde, in_double, latent, end, EPS, TOLERANCE) - data[:100]).abs().max()
        a, b = x[:pairs], x[pairs : 2 * pairs]
        latents = interpolate_latents(*(follow_flow(sde, score, ends, EPS, end) for ends in (a, b)), BETWEEN)
        decoded = follow_flow(sde, score, latents.flatten(0, 1), end, EPS).view_as(latents)
        straight = torch.lerp(a, b, torch.linspace(0, 1, BETWEEN, dtype=x.dtype)[:, None, None])
        row = {"score": kind, "round_trip": float(round_trip)}
        shares = {"rare_between_latents": rare(decoded), "rare_between_data": rare(straight)}
        shares["difference"] = shares["rare_between_data"] - shares["rare_between_latents"]
        for name, share in shares.items():
            row |= {name: float(share.mean()), f"{name}_se": standard_error(share)}
        interpolations.append(row)

        # The picture: trajectories from the prior, some interpolations, errors of the likelihood.
        y = sde.prior_sample(torch.empty(40, 2, dtype=torch.float64), generator("probability_flow", "latents"))
        path = [y.to(x.dtype)]
        for t, s in itertools.pairwise(torch.linspace(end, EPS, 61, dtype=torch.float64).tolist()):
            path.append(follow_flow(sde, score, path[-1], t, s, 1e-4))
        common.draw_density(axes[0], mixture, EPS, WIDTH, f"from latents (•) to data (×), {kind} score")
        axes[0].plot(*torch.stack(path).permute(2, 0, 1), color=COLOURS[0], linewidth=0.6)
        axes[0].plot(*path[0].T, "o", color=COLOURS[0], markersize=1.5)
        axes[0].plot(*path[-1].T, "x", color=COLOURS[1], markersize=3)
        common.draw_density(axes[1], mixture, EPS, WIDTH, "decoded interpolations")
        far = (a - b).norm(dim=1).argsort(descending=True)[:4]
        for line, colour in zip(decoded[:, far].unbind(1), COLOURS, strict=False):
            axes[1].plot(*line.T, ".-", color=colour, markersize=3, linewidth=0.6)
        axes[2].set(xlabel="exact log p (nats)", ylabel="nats", title="log p by the ODE − exact", ylim=(-1.5, 1.5))
        axes[2].legend(fontsize=7)

    # What must hold.
    claims = {}
    for exact_trace, *estimated in (likelihoods[:3], likelihoods[3:]):
        kind, bound = exact_trace["score"], 0.002 if exact_trace["score"] == "true" else 0.1
        error = exact_trace["mean_absolute_error"]
        claims[f"{kind} score, exact trace: mean absolute error of log p (nats)"] = error, "<=", bound
        for row in estimated:
            deviation = abs(row["mean_error"] - exact_trace["mean_error"]) / row["mean_error_se"]
            probes = "1 probe" if row["probes"] == 1 else f"{row['probes']} probes"
            claims[f"{kind} score, {probes}: bias in standard errors"] = deviation, "<=", 4.0
    # Four standard errors each, here those of one point per pair: points of a pair are rare together.
    bound = 4 * math.sqrt(RARE * (1 - RARE) / pairs)
    for row in interpolations:
        where, difference = f"{row['score']} score", abs(row["rare_between_latents"] - RARE)
        claims[f"{where}: there and back"] = row["round_trip"], "<=", 1e-4
        claims[f"{where}: share of rare points between latents, from 1 %"] = difference, "<=", bound
        claims[f"{where}: how much larger the share between data is"] = (
            row["difference"],
            ">=",
            4 * row["difference_se"],
        )
    return Result({"likelihood": likelihoods, "interpolation": interpolations}, claims, figure)
