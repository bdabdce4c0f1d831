"""Probability-flow ODE: trajectories, likelihood against the exact density, interpolation between latents.

Errors of log p in nats, by the ODE with rtol = atol = 1e-5; round trip: data → latents → data, with 1e-8.
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
PIECES = 60  # of a trajectory that is drawn


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


def run(folder: Path, update: Update, *, n_iters: int = 4000, points: int = 1000) -> Result:
    sde = SDES["VP"]
    mixture, end = common.three_modes(sde), sde.end_time

    # Train.
    model = common.score_model(sde, "probability_flow")
    loss = common.denoising_loss(model, mixture, "probability_flow", "batch")
    common.train(model, loss, folder / "score", update, n_iters)

    # Data, and their exact density.
    data = mixture.sample(points, generator("probability_flow", "points"))
    exact = mixture.log_prob(data, constant(data, EPS))

    figure = new_figure(8.4, 5.2)
    likelihoods, round_trips, claims, pairs = [], [], {}, 2 * points // 5
    for kind, score, x, axes in zip(
        ("true", "learned"), (mixture.score, model), (data, data.float()), figure.subplots(2, 3), strict=True
    ):
        # Likelihood by the exact trace, and by an estimate of it from one probe.
        styles = {"exact": {"color": "black", "zorder": 3}, "rademacher": {"color": COLOURS[5]}}
        for trace, style in styles.items():
            evaluator = LikelihoodEvaluator(sde, divergence=trace, rtol=1e-5, atol=1e-5)
            found = evaluator(score, x, generator("probability_flow", "probe", 0))
            update(1)
            error = found.log_prob.double() - exact
            row = {"score": kind, "trace": trace, "mean_absolute_error": float(error.abs().mean())}
            row |= {"mean_error": float(error.mean()), "mean_error_se": standard_error(error), "nfe": found.nfe}
            likelihoods.append(row)
            axes[2].plot(exact, error, ".", markersize=2, label=f"{trace} trace", **style)

        # To the latents and back; interpolation between the latents of four distant pairs of points.
        in_double = score if kind == "true" else copy.deepcopy(model).double()
        latent = follow_flow(sde, in_double, data[:100], EPS, end, TOLERANCE)
        back = follow_flow(sde, in_double, latent, end, EPS, TOLERANCE)
        round_trips.append({"score": kind, "round_trip": float((back - data[:100]).abs().max())})
        a, b = x[:pairs], x[pairs : 2 * pairs]
        far = (a - b).norm(dim=1).argsort(descending=True)[:4]
        latents = interpolate_latents(*(follow_flow(sde, score, ends[far], EPS, end) for ends in (a, b)), BETWEEN)
        decoded = follow_flow(sde, score, latents.flatten(0, 1), end, EPS).view_as(latents)

        # The picture: trajectories from the prior, some interpolations, errors of the likelihood.
        y = sde.prior_sample(torch.empty(40, 2, dtype=torch.float64), generator("probability_flow", "latents"))
        path = [y.to(x.dtype)]
        for t, s in itertools.pairwise(torch.linspace(end, EPS, PIECES + 1, dtype=torch.float64).tolist()):
            path.append(follow_flow(sde, score, path[-1], t, s, 1e-4))
        common.draw_density(axes[0], mixture, EPS, WIDTH, f"from latents (•) to data (×), {kind} score")
        axes[0].plot(*torch.stack(path).permute(2, 0, 1), color=COLOURS[0], linewidth=0.6)
        axes[0].plot(*path[0].T, "o", color=COLOURS[0], markersize=1.5)
        axes[0].plot(*path[-1].T, "x", color=COLOURS[1], markersize=3)
        common.draw_density(axes[1], mixture, EPS, WIDTH, "decoded interpolations")
        for line, colour in zip(decoded.unbind(1), COLOURS, strict=False):
            axes[1].plot(*line.T, ".-", color=colour, markersize=3, linewidth=0.6)
        axes[2].set(xlabel="exact log p (nats)", ylabel="nats", title="log p by the ODE − exact", ylim=(-1.5, 1.5))

    figure.legend(
        *axes[2].get_legend_handles_labels(), loc="outside lower right", ncols=2, markerscale=3, frameon=False
    )

    # What must hold.
    bounds = {"true": 0.002, "learned": 0.1}
    for exact_trace, estimate, trip in zip(likelihoods[::2], likelihoods[1::2], round_trips, strict=True):
        kind, error = trip["score"], exact_trace["mean_absolute_error"]
        claims[f"{kind} score, exact trace: mean absolute error of log p (nats)"] = error, "<=", bounds[kind]
        deviation = abs(estimate["mean_error"] - exact_trace["mean_error"]) / estimate["mean_error_se"]
        claims[f"{kind} score, 1 probe: bias in standard errors"] = deviation, "<=", 4.0
        claims[f"{kind} score: there and back"] = trip["round_trip"], "<=", 1e-4
    return Result({"likelihood": likelihoods, "round_trip": round_trips}, claims, figure)
