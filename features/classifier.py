"""The features of a small classifier, trained here on a set's own training labels.

For images of which the usual Inception network makes no sense (8×8 digits, say). Such numbers compare models on that
set with each other; they cannot be compared with published Inception FIDs.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import weights_digest
from data import Split
from experiment.randomness import seed_from, uniform
from experiment.runtime import Runtime
from features.extraction import check_images, file_stem, key_digest, reproducible_convolutions
from training import Trainer

# A change to the network or to its training must change this number: it is part of the cache key.
_CLASSIFIER_VERSION = 1
_WIDTH = 64
_BATCH = 64
_IMAGES_SEEN = 100_000
_PEAK_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-2


class _Classifier(nn.Module):
    """A small convolutional network: (B, C, H, W) in [−1, 1] -> pooled features (B, 64) and logits (B, K).

    Strided convolutions halve the image until it is about 4×4, so that digits (8×8) and CIFAR-10 (32×32) end alike.
    """

    def __init__(self, image_shape: Sequence[int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape

        def stage(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1)
            return nn.Sequential(convolution, nn.GroupNorm(8, outputs), nn.SiLU())

        stages = [stage(channels, _WIDTH // 2, stride=1)]
        outputs, size = _WIDTH // 2, max(height, width)
        while size > 4:
            stages.append(stage(outputs, _WIDTH, stride=2))
            outputs, size = _WIDTH, (size + 1) // 2
        stages.append(stage(outputs, _WIDTH, stride=1))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(_WIDTH, num_classes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):  # in float32 also where the runtime's precision is another
            pool = self.stages(x).mean((2, 3))
            return pool, self.head(pool)


@dataclass(frozen=True, eq=False)
class ClassifierFeatures:
    """A trained classifier as feature extractor: uint8 images (B, C, H, W) -> pooled features (B, 64), logits (B, K).

    Images must be of the shape and levels of ``test``, the test split. The key names the data, architecture, training
    settings and a hash of the weights, because the same training on another device or library version gives slightly
    different weights.
    """

    network: nn.Module
    name: str
    key: str
    test: Split
    device: torch.device
    dimension: ClassVar[int] = _WIDTH

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shape = tuple(self.test.shape)
        wanted = f"(B, {', '.join(map(str, shape))})"
        check_images(self.name, images, wanted, tuple(images.shape[1:]) == shape, self.test.num_levels)
        with reproducible_convolutions():
            return self.network(_scaled(images.to(self.device), self.test.num_levels))

    @functools.cached_property
    def test_accuracy(self) -> float:
        """The fraction of the test split that it classifies correctly."""
        correct = 0
        for indices in torch.arange(len(self.test)).split(512):
            images, labels = self.test.batch(indices)
            correct += int((self(images)[1].argmax(1).cpu() == labels).sum())
        return correct / len(self.test)


def train_classifier(
    train: Split, test: Split, *, seed: int, cache_dir: str | Path, runtime: Runtime
) -> ClassifierFeatures:
    """Train a small classifier on a set's own training labels, or read it from ``cache_dir``.

    AdamW with a one-cycle learning rate for 10 to 30 epochs (about 100 000 images where that lies between), on images
    shifted at random by up to an eighth of their size. Training depends on ``seed`` alone, leaves torch's global
    random state as it was, and is in float32 whatever the precision of ``runtime``. It happens in a folder of the cache
    whose name has a digest of data, architecture, version of the training settings and seed, and goes on there if it
    was interrupted. Every process of ``runtime`` must call this; another command that wants the same classifier waits.
    The accuracy reported is that on ``test``.

    Raises:
        ValueError: the two splits differ in image shape, levels or classes.
        CheckpointError: the classifier in the cache is damaged.
        Interrupted: SIGINT or SIGTERM arrived.
    """
    described = [(tuple(s.shape), s.num_levels, s.num_classes) for s in (train, test)]
    if described[0] != described[1]:
        raise ValueError(f"{train.name}: image shape, levels and classes differ from {test.name}: {described}")
    recipe = {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "image_shape": list(train.shape),
        "num_levels": train.num_levels,
        "num_classes": train.num_classes,
        "network": f"cnn{_WIDTH}",
        "version": _CLASSIFIER_VERSION,
        "seed": seed,
    }
    name, digest = f"classifier-{file_stem(train.name)}", key_digest(json.dumps(recipe, sort_keys=True))
    folder = Path(cache_dir) / f"{name}-{digest}"
    # Constructing modules draws from the global stream: fork it, and seed the CPU's generator alone (the function
    # torch.manual_seed would reseed every accelerator as well).
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_from(seed, "classifier weights"))
        network = _Classifier(train.shape, train.num_classes).to(runtime.torch_device)
    with runtime.exclusive(folder / ".lock", wait=True), reproducible_convolutions():
        _fit(network, train, folder, seed=seed, runtime=runtime)
    return ClassifierFeatures(
        network.requires_grad_(False),
        name=name,
        key=f"classifier-{digest}-{weights_digest(network)}",
        test=test,
        device=runtime.torch_device,
    )


def _fit(network: nn.Module, train: Split, folder: Path, *, seed: int, runtime: Runtime) -> None:
    epochs = min(max(round(_IMAGES_SEEN / len(train)), 10), 30)
    steps = epochs * -(-len(train) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)

    @functools.lru_cache(maxsize=1)  # every pass of a step takes the same
    def batch(step: int) -> tuple[Tensor, Tensor]:
        indices, shifts = next(draws)
        images, labels = train.batch(indices)
        x = _scaled(images.to(runtime.torch_device), train.num_levels)
        return _shifted(x, shifts), labels.to(runtime.torch_device)

    def loss(objective: nn.Module, step: int, positions: range) -> dict[str, Tensor]:
        for group in optimizer.param_groups:
            group["betas"] = (_one_cycle(steps)[step][1], group["betas"][1])
        x, labels = batch(step)
        return {"loss": F.cross_entropy(objective(x)[1], labels)}

    if runtime.on_progress is not None:  # it counts other things
        runtime = dataclasses.replace(runtime, on_progress=lambda count: None)
    trainer = Trainer(
        network,
        optimizer,
        loss,
        folder,
        n_iters=steps,
        # Every pass of every process computes the whole of a small batch, the last of which could not be divided.
        batch_size=runtime.accelerator.num_processes * runtime.accumulation_steps,
        learning_rate=lambda step: _one_cycle(steps)[step][0],
        save_freq=1000,
        runtime=runtime,
        description="feature classifier",
    )
    draws = itertools.islice(_draws(len(train), epochs, seed), trainer.step, None)
    if trainer.step < steps:
        trainer.run()
    network.eval()


def _draws(size: int, epochs: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Step by step, which images (B,) and uniform numbers (B, 2) for their shifts."""
    generator = torch.Generator().manual_seed(seed_from(seed, "classifier training"))
    for _ in range(epochs):
        for indices in torch.randperm(size, generator=generator).split(_BATCH):
            yield indices, uniform((len(indices), 2), generator)


@functools.lru_cache(maxsize=1)  # seconds for a large set, which a classifier that is only read need not wait for
def _one_cycle(steps: int) -> list[tuple[float, float]]:
    """Learning rate and β₁ of every step, of torch's OneCycleLR, in a table, so that training can go on anywhere."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=steps)
    table = []
    for _ in range(steps):
        table.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["betas"][0]))
        optimizer.step()
        schedule.step()
    return table


def _shifted(x: Tensor, u: Tensor) -> Tensor:
    """Each image of (B, C, H, W) moved by its own offset of at most an eighth of its size, which ``u`` (B, 2), uniform
    on [0, 1), selects; edges are repeated."""
    batch, channels, height, width = x.shape
    reach = min(height, width) // 8
    offsets = (u.to(x.device) * (2 * reach + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def _scaled(images: Tensor, num_levels: int) -> Tensor:
    """Levels 0 … num_levels − 1 to [−1, 1]."""
    return images.float() * (2 / (num_levels - 1)) - 1
