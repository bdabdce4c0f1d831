"""Samplers of a trained model: network evaluations, time, and FID with its standard error.

python -m benchmarks.sampling --workdir=runs/digits/u [--num_samples=1000] [--compile]

``paper`` is the sampler of the paper, 1000 steps of predictor and corrector. All start from the same random numbers.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

import run_lib
from benchmarks.measure import conditions, in_turn
from evaluation import JACKKNIFE_GROUPS, fid_with_error
from experiment.command_line import command
from experiment.results import markdown_table
from features.extraction import extract_features
from features.quality import SampleQuality
from sampling import make_sampler

PC = {"method": "pc", "predictor": "reverse_diffusion", "corrector": "langevin", "n_steps_each": 1}
ODE = {"method": "ode", "solver": "rk45", "rtol": 1e-5, "atol": 1e-5}
VARIANTS: dict[str, dict] = {
    "paper: PC, 1000 steps": PC | {"num_steps": 1000},
    "PC, 100 steps": PC | {"num_steps": 100},
    "PC, 19 steps": PC | {"num_steps": 19},
    "ancestral, 39 steps": PC | {"predictor": "ancestral_sampling", "corrector": "none", "num_steps": 39},
    "rk45, 1e-5": ODE,
    "rk45, 1e-2": ODE | {"rtol": 1e-2, "atol": 1e-2},
    "Heun, equal steps in time, 19 steps": ODE | {"solver": "heun", "num_steps": 19},
} | {
    f"{name}, {steps} steps": {"method": "few_step", "solver": solver, "num_steps": steps}
    for name, solver, counts in (
        ("Heun, EDM grid", "heun", (19, 9)),
        ("DPM-Solver++(2M)", "dpmpp_2m", (39, 19, 9)),
        ("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", (39, 19, 12, 9)),
    )
    for steps in counts
}
BATCH = 250


def run(workdir: str, *, num_samples: int = 1000, device: str = "cpu", compile: bool = False) -> str:
    """Draw and measure samples of the moving average of the newest checkpoint.

    Args:
        workdir: Folder of the run.
        num_samples: Samples of every sampler.
        device: auto, cpu, cuda or mps.
        compile: Compile the network, before anything is timed.
    """
    if num_samples < 2 * JACKKNIFE_GROUPS:
        raise ValueError(f"--num_samples={num_samples}: at least {2 * JACKKNIFE_GROUPS}, for the error of FID")
    runtime = run_lib.Runtime(device)
    score = run_lib.load(workdir, device=runtime.torch_device)
    config, base = score.config, {**score.config.sampling, "noise_removal": True}
    options = {"num_scales": config.model.num_scales, "continuous": config.training.continuous}
    samplers = {name: make_sampler(score.sde, base | change, **options) for name, change in VARIANTS.items()}
    data, cache = run_lib.load_data(config, runtime), Path(workdir) / "eval" / "cache"
    quality = SampleQuality(config.eval, *data, cache, runtime, seed=config.seed)
    _, real = quality.reference()

    # A round is a batch, and the first one, of two images, for what is done only once.
    parts = np.array_split(np.arange(num_samples), -(-num_samples // BATCH))
    batches = [range(2), *(range(part[0], part[-1] + 1) for part in parts)]
    if compile:
        run_lib.check_compile(config, runtime.torch_device)
        score.model.compile_network()
        for size in dict.fromkeys(map(len, batches)):  # by the sampler of the fewest evaluations
            score.draw(range(size), list(samplers.values())[-1], count=num_samples)

    variants = {
        name: lambda number, sampler=sampler: score.draw(batches[number], sampler, count=num_samples)
        for name, sampler in samplers.items()
    }
    rows, paper = [], None
    for name, timed in in_turn(variants, len(parts), runtime.torch_device).items():
        images = torch.from_numpy(np.concatenate([levels for levels, *_ in timed.results])).permute(0, 3, 1, 2)
        nfe = sum(nfe * len(levels) for levels, nfe, _ in timed.results) / num_samples
        fid, error = fid_with_error(real, extract_features(quality.extractor, images, BATCH).pool)
        seconds = sum(timed.seconds)
        paper = paper or (seconds, fid, error)
        difference = "–" if not rows else f"{fid - paper[1]:+.3f} ± {math.hypot(error, paper[2]):.3f}"
        row = (name, f"{nfe:.0f}", f"{seconds:.1f}", f"{paper[0] / seconds:.1f}")
        rows.append((*row, f"{fid:.3f} ± {error:.3f}", difference))
    header = ("sampler", "NFE", "seconds", "paper's time over it", "FID", "minus the paper's")
    title = f"{config.data.dataset}, step {score.step}, {num_samples} samples{', compiled' * compile}, "
    return f"{title}{conditions(runtime.torch_device)}\n{markdown_table(header, rows)}"


if __name__ == "__main__":
    command(run)
