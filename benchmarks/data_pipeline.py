"""The share of a training step that is spent on its input: from the data set to images on the device.

python -m benchmarks.data_pipeline [--config=configs/digits.py:u] [--rounds=40] [--compile]

``paper`` is our own writing of what public code does: a loader that takes the images out of the set one by one, makes
each a float tensor, flips and dequantises it, and stacks them. Ours takes a whole batch of levels out of memory; the
random numbers still belong to the single image, and their streams are those of the whole step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, default_collate

import run_lib
from benchmarks.measure import conditions, in_turn
from configs.digits import get_config
from data import DataFormat, Split, TrainingBatches, random_flip
from data.format import scale, to_unit_interval
from experiment.command_line import command
from experiment.randomness import SampleGenerators
from experiment.results import markdown_table


def run(config: ConfigDict = None, *, rounds: int = 40, device: str = "cpu", compile: bool = False) -> str:
    """Time steps, and their input apart.

    Args:
        config: Model, data and batch size; configs/digits.py:u if none is given.
        rounds: Training steps; the medians are printed.
        device: auto, cpu, cuda or mps.
        compile: Compile the network.
    """
    config, runtime = config or get_config("u"), run_lib.Runtime(device, compile=compile)
    data, size, where = config.data, config.training.batch_size, runtime.torch_device
    train, _ = run_lib.load_data(config, runtime)
    images = DataFormat.of(train, centered=data.centered, dequantized=data.uniform_dequantization)
    loader = public_loader(train, images, size, data.random_flip)
    batches = TrainingBatches(train, seed=config.seed, batch_size=size)

    def ours(step: int) -> None:
        streams = SampleGenerators((config.seed, "train", step), range(size))
        x0 = images.to_model(batches(step, range(size))[0], streams)
        (random_flip(x0, streams) if data.random_flip else x0).to(where)

    with tempfile.TemporaryDirectory() as folder:
        loop = run_lib.trainer(config, folder, runtime)
        variants = {"paper": lambda _: next(loader)[0].to(where), "ours": ours, "step": lambda _: loop.train_step()}
        timed = in_turn(variants, rounds, where, warm_up=3)
    ms = {name: 1e3 * found.median for name, found in timed.items()}
    rest = ms["step"] - ms["ours"]
    rows = [
        (title, f"{ms[name]:.2f}", f"{ms[name] / (rest + ms[name]):.1%}", f"{ms['paper'] / ms[name]:.1f}")
        for name, title in (("paper", "paper: a loader, image by image"), ("ours", "ours: a batch at a time"))
    ]
    title = f"{data.dataset}, batch {size}{', compiled' * compile}, a step {ms['step']:.1f} ms, "
    header = ("input", "ms per batch", "share of a step", "paper's time over it")
    return f"{title}{conditions(where)}\n{markdown_table(header, rows)}"


def public_loader(split: Split, images: DataFormat, batch_size: int, flip: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Images (B, C, H, W) as the model sees them, and labels, with replacement: a set may be smaller than a batch."""

    def single(index: int) -> tuple[Tensor, Tensor]:
        levels, labels = split.batch([index])
        image = levels[0].flip(-1) if flip and torch.rand(()) < 0.5 else levels[0]
        noise = torch.rand(image.shape) if images.dequantized else None
        return scale(to_unit_interval(image, images.num_levels, dequantization=noise), images.centered), labels[0]

    numbers = range(len(split))
    order = RandomSampler(numbers, replacement=True, num_samples=10**9)
    return iter(
        DataLoader(
            numbers, batch_size, sampler=order, collate_fn=lambda indices: default_collate([*map(single, indices)])
        )
    )


if __name__ == "__main__":
    command(run)
