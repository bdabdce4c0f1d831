"""Training beside other work: steps per second on an idle machine, and beside one and two processes that are busy.

python -m benchmarks.busy [--threads=0,1,2] [--seconds=10]

Two networks: of configs/digits.py, batch 128, and of ``benchmarks.training_step``, 3×32×32, batch 8. Every run
is a process of its own, which begins when the others are busy; 0 threads are what ``main.py`` chooses.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time

import torch
from tqdm import tqdm

from benchmarks.training_step import IMAGES, SIZE, make_trainer
from configs import digits
from data import DataFormat
from experiment.command_line import command
from experiment.results import markdown_table
from experiment.runtime import Runtime, cores

DIGITS = DataFormat((1, 8, 8), num_levels=17, num_classes=None, centered=False, dequantized=True)
NETWORKS = ("8×8", "3×32×32")


def run(
    *,
    threads: tuple[int, ...] = (0, 1, cores()),
    busy: tuple[int, ...] = (0, 1, 2),
    seconds: float = 10.0,
    network: str = "",
    rounds: int = 1,
) -> str:
    """Time all of them in turn.

    Args:
        threads: of the training that is timed, one after the other.
        busy: other processes, of one thread each.
        seconds: of each.
        network: '8×8' or '3×32×32', alone; both by default.
        rounds: the best of so many counts.
    """
    if network not in ("", *NETWORKS):
        raise ValueError(f"--network={network}: allowed are {', '.join(NETWORKS)}")
    names, rates = [network] if network else NETWORKS, {}
    cases = [(name, count, load) for name in names for load in busy for count in threads]
    for case in tqdm(cases * rounds, unit="run"):
        rates[case] = max(rates.get(case, 0.0), rate(*case, seconds))
    rows = []
    for name, count, load in cases:
        idle = max(rates[name, other, busy[0]] for other in threads)
        value = rates[name, count, load]
        rows.append((name, load, count or "chosen", f"{value:.2f}", f"{value / idle:.2f}"))
    header = ("network", "busy processes", "threads", "steps/s", f"of the best beside {busy[0]}")
    return f"{cores()} cores, torch {torch.__version__}\n\n{markdown_table(header, rows)}"


def rate(network: str, threads: int, load: int, seconds: float) -> float:
    """Steps per second of a process of its own, beside so many busy ones."""
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_be_busy, daemon=True) for _ in range(load)]
    for other in others:
        other.start()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("OMP_")}
    try:
        code = f"from benchmarks.busy import train; train({network!r}, {threads}, {seconds})"
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    finally:
        for other in others:
            other.kill()
            other.join()
    return float(done.stdout.split()[-1])


def _be_busy() -> None:
    while True:
        pass


def train(network: str, threads: int, seconds: float) -> None:
    """Print the steps per second of a training."""
    runtime = Runtime("cpu", threads=threads)
    runtime.torch_device  # noqa: B018  chooses the threads
    size, images = SIZE, IMAGES
    if network == "8×8":
        config = digits.get_config("u")
        size = {"model": config.model.to_dict(), "training.batch_size": config.training.batch_size}
        images = DIGITS
    loop = make_trainer("U", size, runtime, images)
    for _ in range(2):
        loop.train_step()
    started, steps = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        loop.train_step()
        steps += 1
    print(steps / (time.monotonic() - started))


if __name__ == "__main__":
    command(run)
