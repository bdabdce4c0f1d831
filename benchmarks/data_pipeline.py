"""The share of a training step that is spent on its input: from the data set to images on the device.

python -m benchmarks.data_pipeline [--config=configs/digits.py:u] [--rounds=40]

``paper`` is our own writing of what public code does: a loader that takes the images out of the set one by one, makes
each a float tensor, flips and dequantises it, and stacks them. Ours takes a whole batch of levels out of memory; the
random numbers still belong to the single image. Setting up their streams is for the whole step, times and noise
included, and is shown apart.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator

import torch
from absl import app, flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags
from run_setup import FREE_IN_TRAINING, InvalidRun, Run, Runtime, checked
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from tqdm import trange

from benchmarks.clock import clock_of
from data import Split
from data.pixels import scale, to_unit_interval
from experiment.command_line import parse_flags
from run_lib import Training

PAPER = "paper: a loader, image by image"
OURS = "ours: a batch at a time"
STREAMS = "ours, and the random streams of the whole step"
WARM_UP = 3


class ImageByImage(Dataset):
    """Single images (C, H, W), as the model sees them, and their labels."""

    def __init__(self, split: Split, config: ConfigDict) -> None:
        self.split = split
        self.data = config.data

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.split.batch([index])
        image = images[0]
        if self.data.random_flip and torch.rand(()) < 0.5:
            image = image.flip(-1)
        noise = torch.rand(image.shape) if self.data.uniform_dequantization else None
        values = to_unit_interval(image, self.split.num_levels, dequantization=noise)
        return scale(values, self.data.centered), labels[0]


def public_loader(split: Split, config: ConfigDict, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end, in random order."""
    images = ImageByImage(split, config)
    while True:
        # With replacement, since a set may be smaller than a batch.
        order = RandomSampler(images, replacement=True, num_samples=batch_size * max(1, len(images) // batch_size))
        yield from DataLoader(images, batch_size, sampler=order)


def compare(config: ConfigDict, runtime: Runtime, rounds: int) -> str:
    """The table for training steps of the config's model from its first weights.

    Args:
        config: of the run; its batch size counts.
        runtime: the device and the precision of the step, and whether its network is compiled.
        rounds: training steps; medians count.

    Raises:
        InvalidRun: bad config or number; a training that cannot be compiled, compiled.
    """
    with tempfile.TemporaryDirectory() as workdir:
        with checked():
            if rounds < 1:
                raise ValueError(f"--rounds={rounds}: at least 1")
            training = Training(Run(config, workdir, runtime, free_fields=FREE_IN_TRAINING))
        return _compare(training, rounds)


def _compare(training: Training, rounds: int) -> str:
    config, run = training.config, training.run
    loader = public_loader(run.train_data, config, config.training.batch_size)
    seconds: dict[str, list[float]] = {PAPER: [], "streams": [], OURS: [], "batch and step": []}
    clock, kind = clock_of(run.device)
    for round_number in trange(-WARM_UP, rounds, unit="step"):
        times = [clock()]
        images, _ = next(loader)
        images.to(run.device)
        times.append(clock())
        streams = training.streams(training.positions())
        times.append(clock())
        training.inputs(training.batch(training.step)[0], streams)
        times.append(clock())
        training.train_step(training.batch(training.step))  # the whole, input and all
        times.append(clock())
        if round_number >= 0:
            for name, (start, end) in zip(seconds, itertools.pairwise(times), strict=True):
                seconds[name].append(end - start)
    median = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
    median[STREAMS] = median[OURS] + median["streams"]
    rest = median["batch and step"] - median[OURS]
    lines = [
        f"{config.data.dataset}, batch {config.training.batch_size}, {run.device}, {run.runtime.precision}"
        f"{', compiled' if run.runtime.compile else ''}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}, medians of {rounds}, {kind}; all but the input takes {rest:.1f} ms\n",
        "| input | ms per batch | share of a step | paper's time over it |",
        "|---|---|---|---|",
    ]
    for name in (PAPER, OURS, STREAMS):
        share = median[name] / (rest + median[PAPER if name == PAPER else OURS])
        lines.append(f"| {name} | {median[name]:.2f} | {share:.1%} | {median[PAPER] / median[name]:.1f} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        runtime = Runtime(given.device, given.precision, compile=given.compile)
        print(compare(given.config, runtime, given.rounds))
    except InvalidRun as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", "configs/digits.py:u", "Model, data and batch size.", lock_config=True)
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16, of the step.")
    flags.DEFINE_bool("compile", False, "Compile the network.")
    flags.DEFINE_integer("rounds", 40, "Training steps; the medians are printed.")
    app.run(main, flags_parser=parse_flags)
