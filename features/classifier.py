"""The features of a small classifier, trained here on a set's own training labels.

For images of which the usual Inception network makes no sense (8×8 digits, say). Such numbers compare models on that
set with each other; they cannot be compared with published Inception FIDs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from data import Split
from experiment.files import write_atomically
from experiment.randomness import seed_from, uniform
from features.extraction import canonical, file_stem, key_digest, reproducible_convolutions

__all__ = ["ClassifierFeatures", "train_classifier"]

logger = logging.getLogger(__name__)

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
        pool = self.stages(x).mean((2, 3))
        return pool, self.head(pool)


class ClassifierFeatures:
    """A trained classifier as feature extractor: uint8 images (B, C, H, W) -> pooled features (B, 64), logits (B, K).

    Made by :func:`train_classifier`.

    Attributes:
        name: for reports.
        key: names the data, architecture, training settings and a hash of the weights. The hash matters because the
            same training on another device or library version gives slightly different weights.
        test_accuracy: fraction of the test split classified correctly.
    """

    dimension = _WIDTH

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        key: str,
        test_accuracy: float,
        image_shape: tuple[int, int, int],
        num_levels: int,
        device: torch.device | str,
    ) -> None:
        self.network = network.to(device).eval().requires_grad_(False)
        self.name = name
        self.key = key
        self.test_accuracy = test_accuracy
        self.image_shape = tuple(image_shape)
        self.num_levels = num_levels
        self.device = torch.device(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features of a batch.

        Raises:
            ValueError: if the images are not uint8, or not of the shape and levels the classifier was trained on.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"{self.name}: images must be uint8 of shape (B, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} of shape {tuple(images.shape)}"
            )
        if len(images) and int(images.max()) >= self.num_levels:
            raise ValueError(f"{self.name}: pixels must be 0 … {self.num_levels - 1}, but one is {int(images.max())}")
        with reproducible_convolutions():
            return self.network(_scaled(images.to(self.device), self.num_levels))


def train_classifier(
    train: Split,
    test: Split,
    *,
    seed: int,
    cache_dir: str | os.PathLike[str],
    device: torch.device | str,
    progress: bool = True,
) -> ClassifierFeatures:
    """Train a small classifier on a set's own training labels, or read it from ``cache_dir``.

    AdamW with a one-cycle learning rate for 10 to 30 epochs (about 100 000 images where that lies between), on images
    shifted at random by up to an eighth of their size. Training depends on ``seed`` alone and leaves torch's global
    random state as it was. The weights (``.pt``) and their accuracy (``.json``) are cached under a key that names
    data, architecture, version of the training settings and seed; a damaged pair is reported and trained anew.

    Args:
        train: split whose labels are learned; ``test``: split whose accuracy is reported.
        seed: of initialisation, order and shifts.
        cache_dir: folder, made if missing.
        device: where to train and to evaluate.
        progress: show a progress bar.

    Raises:
        ValueError: if the set has no labels, or the two splits differ in image shape, levels or classes.
    """
    for split in (train, test):
        if split.num_classes is None:
            raise ValueError(f"dataset {split.name!r} has no labels to train a classifier on: choose other features")
    described = [(tuple(s.image_shape), s.num_levels, s.num_classes) for s in (train, test)]
    if described[0] != described[1]:
        raise ValueError(
            f"dataset {train.name!r}: (image shape, levels, classes) is {described[0]} in training but "
            f"{described[1]} in testing"
        )

    recipe = {
        "train": train.fingerprint,
        "test": test.fingerprint,
        "image_shape": list(train.image_shape),
        "num_levels": train.num_levels,
        "num_classes": train.num_classes,
        "network": f"cnn{_WIDTH}",
        "version": _CLASSIFIER_VERSION,
        "seed": seed,
    }
    weights_path = Path(cache_dir) / f"classifier-{file_stem(train.name)}-{key_digest(canonical(recipe))}.pt"
    record_path = weights_path.with_suffix(".json")

    network = None
    if weights_path.exists():
        try:
            network, record = _read_classifier(weights_path, record_path, recipe)
        except Exception as error:  # damage shows in torch, zipfile, json or here: the remedy is the same
            logger.warning("%s cannot be used and is trained anew: %s", weights_path, error)
    if network is None:
        network = _initial_classifier(train.image_shape, train.num_classes, seed).to(device)
        _fit(network, train, seed=seed, device=device, progress=progress)
        record = {
            "recipe": recipe,
            "weights": _weights_digest(network.state_dict()),
            "test_accuracy": _accuracy(network, test, device),
        }
        state = {name: value.cpu() for name, value in network.state_dict().items()}
        write_atomically(weights_path, lambda file: torch.save(state, file))
        write_atomically(record_path, lambda file: file.write(json.dumps(record, indent=2).encode()))
        logger.info("trained %s: test accuracy %.4f", weights_path.stem, record["test_accuracy"])
    return ClassifierFeatures(
        network,
        name=f"classifier-{file_stem(train.name)}",
        key=f"classifier-{key_digest(canonical(recipe))}-{record['weights']}",
        test_accuracy=record["test_accuracy"],
        image_shape=train.image_shape,
        num_levels=train.num_levels,
        device=device,
    )


def _initial_classifier(image_shape: Sequence[int], num_classes: int, seed: int) -> _Classifier:
    # Constructing modules draws from the global stream: fork it, and seed the CPU's generator alone (the function
    # torch.manual_seed would reseed every accelerator as well).
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed_from(seed, "classifier weights"))
        return _Classifier(image_shape, num_classes)


def _read_classifier(weights_path: Path, record_path: Path, recipe: dict) -> tuple[_Classifier, dict]:
    record = json.loads(record_path.read_text())
    if record["recipe"] != recipe:
        raise ValueError(f"it was trained as {record['recipe']}, not as {recipe}")
    state = torch.load(weights_path, map_location="cpu", weights_only=True)
    if _weights_digest(state) != record["weights"]:
        raise ValueError(f"the weights are not those of {record_path.name}")
    network = _initial_classifier(recipe["image_shape"], recipe["num_classes"], recipe["seed"])
    network.load_state_dict(state)
    return network, record


def _fit(network: nn.Module, train: Split, *, seed: int, device: torch.device | str, progress: bool) -> None:
    epochs = min(max(round(_IMAGES_SEEN / len(train)), 10), 30)
    steps = epochs * -(-len(train) // _BATCH)
    optimizer = torch.optim.AdamW(network.parameters(), lr=_PEAK_LEARNING_RATE, weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_PEAK_LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed_from(seed, "classifier training"))
    network.train()
    with (
        reproducible_convolutions(),
        tqdm(total=steps, desc="feature classifier", unit="step", disable=not progress) as bar,
    ):
        for _ in range(epochs):
            for indices in torch.randperm(len(train), generator=generator).split(_BATCH):
                images, labels = train.batch(indices)
                x = _shifted(_scaled(images.to(device), train.num_levels), generator)
                _, logits = network(x)
                loss = F.cross_entropy(logits, labels.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    network.eval()


def _shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Each image of (B, C, H, W) moved by its own offset of at most an eighth of its size; edges are repeated."""
    batch, channels, height, width = x.shape
    reach = min(height, width) // 8
    offsets = (uniform((batch, 2), generator, device=x.device) * (2 * reach + 1)).long()
    rows = offsets[:, :1] + torch.arange(height, device=x.device)
    columns = offsets[:, 1:] + torch.arange(width, device=x.device)
    sample = torch.arange(batch, device=x.device)[:, None, None, None]
    channel = torch.arange(channels, device=x.device)[None, :, None, None]
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


@torch.no_grad()
def _accuracy(network: nn.Module, split: Split, device: torch.device | str) -> float:
    correct = 0
    with reproducible_convolutions():
        for indices in torch.arange(len(split)).split(512):
            images, labels = split.batch(indices)
            _, logits = network(_scaled(images.to(device), split.num_levels))
            correct += int((logits.argmax(1) == labels.to(device)).sum())
    return correct / len(split)


def _scaled(images: Tensor, num_levels: int) -> Tensor:
    """Levels 0 … num_levels − 1 to [−1, 1]."""
    return images.float() * (2 / (num_levels - 1)) - 1


def _weights_digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.cpu().numpy().tobytes())
    return digest.hexdigest()
