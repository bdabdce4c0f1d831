"""Memory and time of a training step: U, C and QC, by number of probes, chunks of them, and activation checkpointing.

python -m benchmarks.qc_memory [--nf=32] [--num_res_blocks=2] [--batch_size=8] [--device=cpu] [--repeats=3]
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from absl import app, flags

from experiment.command_line import parse_flags

if TYPE_CHECKING:
    import torch

# Name: overrides of the config.
VARIANTS = {
    "U": {},
    "U, activation checkpointing": {"training.activation_checkpointing": True},
    "C": {"model.parameterization": "conservative"},
    "C, activation checkpointing": {
        "model.parameterization": "conservative",
        "training.activation_checkpointing": True,
    },
    "QC, K = 1": {"training.qc_probes": 1},
    "QC, K = 1, activation checkpointing": {"training.qc_probes": 1, "training.activation_checkpointing": True},
    "QC, K = 4, all at once": {"training.qc_probes": 4, "training.qc_probe_chunk": 4},
    "QC, K = 4, chunks of 2": {"training.qc_probes": 4, "training.qc_probe_chunk": 2},
    "QC, K = 4, chunks of 1": {"training.qc_probes": 4},
    "QC, K = 16, chunks of 2": {"training.qc_probes": 16, "training.qc_probe_chunk": 2},
    "QC, K = 16, chunks of 1 (default)": {"training.qc_probes": 16},
    "QC, K = 16, chunks of 1, activation checkpointing": {
        "training.qc_probes": 16,
        "training.activation_checkpointing": True,
    },
}


def peak_memory(step: Callable[[], object], device: torch.device) -> int:
    """The most memory, in bytes, that ``step`` holds above what was there before, as torch's allocator counts it."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    held = peak = 0
    for event in recorded.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    for name in ("nf", "num_res_blocks", "batch_size", "repeats"):
        if given[name].value < 1:
            sys.exit(f"error: --{name}={given[name].value}: at least 1")

    import torch
    from run_setup import Runtime
    from tqdm import tqdm

    from configs.defaults import base_config
    from losses import get_objective
    from models import create_score_model
    from sde_lib import get_sde

    torch.set_num_threads(1)
    try:
        device = Runtime(given.device).accelerator().device
    except ValueError as error:
        sys.exit(f"error: {error}")

    rows = []
    for name, overrides in tqdm(VARIANTS.items(), unit="variant"):
        config = base_config()
        config.model.update(nf=given.nf, num_res_blocks=given.num_res_blocks)
        config.training.qc_weight = 1e-4 if name.startswith("QC") else 0.0
        config.update_from_flattened_dict(overrides)
        torch.manual_seed(0)
        objective = get_objective(config, create_score_model(config, get_sde(config))).to(device)
        x0 = torch.rand(given.batch_size, *objective.score_model.network.image_shape, device=device)

        def step(objective=objective, x0=x0) -> None:
            objective.zero_grad()
            objective(x0, torch.Generator().manual_seed(1))["loss"].backward()

        step()
        objective.zero_grad()
        peak = peak_memory(step, device)
        seconds = []
        for _ in range(given.repeats):
            # Processor time, so that what else the machine does plays no part; of a GPU, time on the clock.
            clock = time.perf_counter if device.type == "cuda" else time.process_time
            started = clock()
            step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(clock() - started)
        rows.append((name, peak / 2**20, statistics.median(seconds)))
    memory, duration = rows[0][1:]
    print(
        f"NCSN++, 3x32x32, nf {given.nf}, {given.num_res_blocks} blocks, dropout {config.model.dropout}, "
        f"batch {given.batch_size}, one thread, {device}, torch {torch.__version__}\n"
    )
    print("| step | peak memory, MiB | of U | seconds | of U |\n|---|---|---|---|---|")
    for name, peak, time_taken in rows:
        print(f"| {name} | {peak:.0f} | {peak / memory:.2f} | {time_taken:.2f} | {time_taken / duration:.2f} |")


if __name__ == "__main__":
    flags.DEFINE_integer("nf", 32, "Width of the network.")
    flags.DEFINE_integer("num_res_blocks", 2, "Residual blocks per level.")
    flags.DEFINE_integer("batch_size", 8, "Images.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_integer("repeats", 3, "Timed steps; the median is printed.")
    app.run(main, flags_parser=parse_flags)
