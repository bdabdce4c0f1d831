"""Annealed Langevin dynamics: one network for a ladder of noise levels, sampled from the largest to the smallest.

Plain dynamics starts from the same points, U([−8, 8]²), and makes as many steps, all at the smallest level: it finds
the modes, not their weights. Minor weight: of the mode whose true weight is 0.2; start: its share at the start.
Source: Song and Ermon (NeurIPS 2019), Sections 3.2.2 and 4, Algorithm 1.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.figures import COLOURS, curve_style, new_figure
from experiment.randomness import uniform
from sampling import AnnealedLangevinCorrector
from sde_lib import VE, GeometricSigma
from tutorial_example import common
from tutorial_example.common import Result, Update, constant, generator

SIGMA_MIN, SIGMA_MAX, LEVELS = 0.5, 20.0, 10
STEPS, SNR = 100, 0.25  # of the sampler at every level; its step size is 2(snr·σ)²


def exact_share(std: float) -> float:
    """P(x₁ + x₂ < 0) at a noise level: x₁ + x₂ ~ Σ w_k N(±10, 2(1 + σ²))."""
    tail = 0.5 * math.erfc(10 / math.sqrt(2 * (1 + std**2)) / math.sqrt(2))
    return 0.2 * (1 - tail) + 0.8 * tail


def minor_share(x: Tensor) -> float:
    """The share of points (B, 2) on the side of the mode whose weight is 0.2."""
    return float((x.sum(1) < 0).double().mean())


def run(folder: Path, update: Update, *, particles: int = 2000, n_iters: int = 4000, seeds: tuple = (5, 3)) -> Result:
    """``seeds``: how many with the true score, and how many with learned ones, each of a training of its own."""
    sde = VE(GeometricSigma(SIGMA_MIN, SIGMA_MAX))
    mixture = common.two_modes(sde)
    schedules = {"plain": [0.0] * LEVELS, "annealed": sde.ladder(LEVELS).time.flip(0).tolist()}

    # Train and sample.
    rows, shares, samples = [], {}, {}
    for kind, seed in [("true", seed) for seed in range(seeds[0])] + [("learned", seed) for seed in range(seeds[1])]:
        score, dtype = mixture.score, torch.float64
        if kind == "learned":
            score = common.score_model(sde, "annealed_langevin", seed, num_scales=LEVELS, input_scale=10.0)
            loss, dtype = common.denoising_loss(score, mixture, "annealed_langevin", "batch", seed), torch.float32
            common.train(score, loss, folder / f"seed_{seed}", update, n_iters)
        corrector = AnnealedLangevinCorrector(sde, score, SNR, STEPS)
        for sampler, times in schedules.items():
            source = generator("annealed_langevin", "start", seed)
            x = start = 16 * uniform((particles, 2), source, dtype=torch.float64).to(dtype) - 8
            share = []
            for t in times:
                x = corrector.step(x, constant(x, t), source)
                share.append(minor_share(x))
            update(LEVELS * STEPS)
            shares.setdefault((kind, sampler), []).append(share)
            samples.setdefault((kind, sampler), x)
            row = {"score": kind, "sampler": sampler, "seed": seed, "start": minor_share(start)}
            rows.append({**row, "minor_weight": minor_share(x)})

    # What must hold.
    claims = {}
    for kind in ("true", "learned"):
        plain, annealed = (
            [abs(row["minor_weight"] - 0.2) for row in rows if (row["score"], row["sampler"]) == (kind, sampler)]
            for sampler in schedules
        )
        claims[f"annealed, {kind} score: largest error of the weight 0.2"] = max(annealed), "<=", 0.05
        claims[f"plain, {kind} score: smallest error of the weight"] = min(plain), ">=", 0.2

    # The picture: samples, and the share of the minor mode level by level.
    figure = new_figure(8.4, 4.6)
    grid = figure.add_gridspec(2, 3)
    levels = np.geomspace(SIGMA_MAX, SIGMA_MIN, LEVELS)
    ax = figure.add_subplot(grid[:, 2])
    ax.plot([exact_share(std) for std in levels], color="black", linewidth=2, label="exact, at the level's σ")
    for k, ((kind, sampler), x) in enumerate(samples.items()):
        points = figure.add_subplot(grid[k // 2, k % 2])
        common.draw_points(points, x, 9.0, f"{sampler}, {kind} score")
        points.annotate(f"{minor_share(x):.2f}", (-6, -1.0), color=COLOURS[1])
        points.annotate(f"{1 - minor_share(x):.2f}", (4, 0.2), color=COLOURS[1])
        lines = ax.plot(np.transpose(shares[kind, sampler]), **curve_style(k) | {"linewidth": 0.8})
        lines[0].set_label(f"{sampler}, {kind} score")
    ax.axhline(0.2, color="0.6", linewidth=0.8)
    ax.set(xlabel=f"σ of annealed dynamics, {STEPS} steps each", ylabel="share", ylim=(0, 0.65))
    ax.set(title="samples with $x_1 + x_2 < 0$")
    ax.set_xticks(range(LEVELS)[::3], [f"{std:.2g}" for std in levels[::3]])
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return Result({"rows": rows}, claims, figure)
