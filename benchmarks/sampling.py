"""Samplers of a trained model side by side: network evaluations, time, and FID with its standard error.

python -m benchmarks.sampling --config=configs/digits.py:u --workdir=runs/digits/u [--device=cpu] [--precision=fp32]

``paper`` is the sampler of the paper, 1000 steps of predictor and corrector. All start from the same random numbers.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from run_evaluation import draw, load_for_evaluation, run_for_evaluation
from run_setup import InvalidRun, Runtime, checked
from tqdm import tqdm

from evaluation import JACKKNIFE_GROUPS, fid_with_error
from experiment.command_line import parse_flags
from features.extraction import extract_features
from guidance.measurements import MEASUREMENTS
from sampling import get_sampler
from wasserstein_example.digits import reference_features

PAPER = "paper: PC, 1000 steps"
VARIANTS: dict[str, dict] = {
    PAPER: {"method": "pc", "num_steps": 1000},
    "PC, 100 steps": {"method": "pc", "num_steps": 100},
    "PC, 19 steps": {"method": "pc", "num_steps": 19},
    "ancestral, 39 steps": {
        "method": "pc",
        "predictor": "ancestral_sampling",
        "corrector": "none",
        "num_steps": 39,
    },
    "rk45, 1e-5": {"method": "ode", "solver": "rk45"},
    "rk45, 1e-2": {"method": "ode", "solver": "rk45", "rtol": 1e-2, "atol": 1e-2},
    "Heun, equal steps in time, 19 steps": {"method": "ode", "solver": "heun", "num_steps": 19},
    **{
        f"{name}, {steps} steps": {"method": "few_step", "solver": solver, "num_steps": steps}
        for name, solver, counts in (
            ("Heun, EDM grid", "heun", (19, 9)),
            ("DPM-Solver++(2M)", "dpmpp_2m", (39, 19, 9)),
            ("SDE-DPM-Solver++(2M)", "dpmpp_2m_sde", (39, 19, 12, 9)),
        )
        for steps in counts
    },
}
BATCH = 250


def compare(config: ConfigDict, workdir: str, runtime: Runtime, num_samples: int) -> str:
    """The table of all variants, for the moving average of the newest checkpoint in ``workdir``.

    Raises:
        InvalidRun: bad config or working directory, or fewer samples than the error of FID takes.
    """
    with checked():
        if num_samples < 2 * JACKKNIFE_GROUPS:
            raise ValueError(f"--num_samples={num_samples}: at least {2 * JACKKNIFE_GROUPS}, for the error of FID")
        if config.sampling.condition in MEASUREMENTS:
            raise ValueError(f"sampling.condition={config.sampling.condition!r}: only for main.py --mode=sample")
        run = run_for_evaluation(config, workdir, runtime, None)
        step = load_for_evaluation(run, None)
        samplers = {name: get_sampler(_variant(config, change), run.sde) for name, change in VARIANTS.items()}
    cache = runtime.cache_dir or str(Path(workdir) / "eval" / "cache")
    extractor, real = reference_features(config, cache, run.device)

    batches = [list(part) for part in np.array_split(np.arange(num_samples), -(-num_samples // BATCH))]
    rows = []
    if runtime.compile:  # for each size of batch, by the sampler of the fewest evaluations
        run.sampler = list(samplers.values())[-1]
        for indices in {len(indices): indices for indices in (batches[0][:2], *batches)}.values():
            draw(run, indices)
    with tqdm(total=len(samplers) * num_samples, unit="sample") as bar:
        for name, sampler in samplers.items():
            run.sampler = sampler
            draw(run, batches[0][:2])  # what is done once only
            images, evaluations, seconds = [], 0.0, 0.0
            for indices in batches:
                started = time.perf_counter()
                levels, nfe = draw(run, indices)  # on the host, so all work is done
                seconds += time.perf_counter() - started
                images.append(torch.from_numpy(levels).permute(0, 3, 1, 2))
                evaluations += nfe * len(indices)
                bar.update(len(indices))
            generated = extract_features(extractor, images, num_samples)
            rows.append((name, evaluations / num_samples, seconds, *fid_with_error(real.pool, generated.pool)))
    _, _, paper_seconds, paper_fid, paper_error = rows[0]
    lines = [
        f"{config.data.dataset}, step {step}, {num_samples} samples, {run.device}, {runtime.precision}"
        f"{', compiled' if runtime.compile else ''}, {torch.get_num_threads()} thread(s), torch {torch.__version__}\n",
        "| sampler | NFE | seconds | paper's time over it | FID | from the paper's, in its standard errors |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {nfe:.0f} | {seconds:.1f} | {paper_seconds / seconds:.1f} | {distance:.3f} ± {error:.3f} | "
        f"{(distance - paper_fid) / paper_error:+.1f} |"
        for name, nfe, seconds, distance, error in rows
    ]
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        runtime = Runtime(given.device, given.precision, compile=given.compile, cache_dir=given.cache_dir)
        print(compare(given.config, given.workdir, runtime, given.num_samples))
    except InvalidRun as error:
        sys.exit(f"error: {error}")


def _variant(config: ConfigDict, change: dict) -> ConfigDict:
    """The config with another sampler: the paper's in all that is not changed, the last noise removed."""
    config = config.copy_and_resolve_references()
    config.sampling.update(
        predictor="reverse_diffusion", corrector="langevin", n_steps_each=1, rtol=1e-5, atol=1e-5, noise_removal=True
    )
    config.sampling.update(change)
    return config


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Of the run.", lock_config=True)
    flags.DEFINE_string("workdir", None, "Of the run, trained.")
    flags.DEFINE_string("cache_dir", "", "Where the features of the data are kept; the run's own without it.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16.")
    flags.DEFINE_bool("compile", False, "Compile the network.")
    flags.DEFINE_integer("num_samples", 1000, "Samples of every sampler.")
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=parse_flags)
