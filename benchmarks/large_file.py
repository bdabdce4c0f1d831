"""What it costs a training step that its items are on a disk, and not in memory.

python -m benchmarks.large_file [--gib=4] [--rounds=60]

Before each step that reads from the file, all that the system keeps of it in memory is dropped: each item is read from
the disk, as of a file that is larger than the memory by any factor. The next batch is read during a step.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import run_lib
from configs.own_arrays import get_config
from data import TrainingBatches
from data.arrays import read_halves
from experiment.command_line import command
from experiment.results import markdown_table

SHAPE = (2, 2048)  # 16 KiB
BLOCK = 4096  # items of 64 MiB


def run(*, gib: float = 4.0, rounds: int = 60, folder: str = "") -> str:
    """Time steps with either source of items in turn.

    Args:
        gib: Size of the file.
        rounds: Steps of each; the medians of the time on the clock are printed.
        folder: Where it is written, and removed from; by default where temporary files are.
    """
    with tempfile.TemporaryDirectory(dir=folder or None) as place:
        config = get_config("signal")
        config.update_from_flattened_dict({"data.shape": SHAPE, "data.path": place, "data.normalization": "none"})
        size, seed = config.training.batch_size, config.seed
        block = np.random.default_rng(seed).standard_normal((BLOCK, *SHAPE)).astype(np.float32)
        for half, count in (("test", 1), ("train", 1), ("large", round(16 * gib))):
            write(Path(place) / f"{half}.npy", block, count)
        loop = run_lib.trainer(config, Path(place) / "run")
        (Path(place) / "large.npy").rename(Path(place) / "train.npy")
        batches = TrainingBatches(read_halves(Path(place), shape=SHAPE)[0], seed=seed, batch_size=size)
        seconds: dict[str, list[float]] = {"memory": [], "disk": []}
        for number in range(rounds + 3):
            for source, found in seconds.items():
                if source == "disk":
                    drop(Path(place) / "train.npy")
                started = time.perf_counter()
                if source == "disk":
                    batches(number, range(size))
                loop.train_step()
                found.append(time.perf_counter() - started)
    medians = {source: 1e3 * statistics.median(found[3:]) for source, found in seconds.items()}
    rows = [(source, f"{ms:.1f}", f"{ms / medians['memory']:.2f}") for source, ms in medians.items()]
    title = f"a file of {gib:g} GiB, batches of {size} items of 16 KiB, {torch.get_num_threads()} thread(s)\n"
    return f"{title}\n{markdown_table(('items from', 'ms per step', 'ratio'), rows)}"


def write(path: Path, block: np.ndarray, count: int) -> None:
    """An .npy of ``count`` times the block, on the disk."""
    shape = (count * len(block), *block.shape[1:])
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for _ in range(count):
            file.write(block)
        os.fsync(file.fileno())


def drop(path: Path) -> None:
    """Let the system forget what it keeps of a file in memory."""
    with open(path, "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    command(run)
