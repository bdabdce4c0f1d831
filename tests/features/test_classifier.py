"""The feature classifier: what it learns, that it is reproducible, and its cache."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
import torch

from data import TensorSplit, load_dataset
from evaluation import sample_quality
from features import classifier
from features.classifier import train_classifier
from features.extraction import Features


@pytest.fixture(scope="module")
def digits() -> tuple[TensorSplit, TensorSplit]:
    return load_dataset("digits", image_size=8, num_channels=1)


@pytest.fixture(scope="module")
def small(digits) -> tuple[TensorSplit, TensorSplit]:
    """A hundred images: what is trained on them is poor, and quick."""
    train, test = digits
    return (
        TensorSplit("small/train", train.images[:100], train.labels[:100], num_levels=17, num_classes=10),
        TensorSplit("small/test", test.images[:50], test.labels[:50], num_levels=17, num_classes=10),
    )


def train_quietly(splits, folder, seed=0):
    return train_classifier(*splits, seed=seed, cache_dir=folder, device="cpu", progress=False)


def test_classifier_recognises_digits(digits, tmp_path):
    train, test = digits
    extractor = train_quietly(digits, tmp_path)
    assert extractor.test_accuracy >= 0.97
    pool, logits = extractor(test.images)
    assert pool.shape == (360, 64) and logits.shape == (360, 10) and not logits.requires_grad
    assert (logits.argmax(1) == test.labels).double().mean() == pytest.approx(extractor.test_accuracy)

    # The features order sets as the eye does: test digits, noisy digits, noise.
    def features(images: torch.Tensor) -> Features:
        return Features(*(values.numpy() for values in extractor(images)))

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 17, test.images.shape, generator=generator)
    noisy = (0.6 * test.images + 0.4 * noise).round()
    real = features(train.images)
    scores = [sample_quality(real.pool, features(x.to(torch.uint8)), seed=0) for x in (test.images, noisy, noise)]
    assert scores[0]["fid"] < scores[1]["fid"] < scores[2]["fid"]
    assert abs(scores[0]["kid"]) < 5 * scores[0]["kid_se"]
    assert scores[1]["kid"] > 5 * scores[1]["kid_se"]
    assert scores[0]["inception_score"] > 8
    assert scores[0]["precision"] > 0.8 > 0.2 > scores[2]["precision"]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The extractor trained on the small set, and the folder that holds its files."""
    folder = tmp_path_factory.mktemp("classifier")
    return train_quietly(small, folder), folder


def test_training_is_deterministic_and_leaves_the_global_random_state(small, trained, tmp_path):
    first, _ = trained
    torch.manual_seed(123)
    before = torch.get_rng_state()
    second = train_quietly(small, tmp_path)
    assert torch.equal(before, torch.get_rng_state())
    other = train_quietly(small, tmp_path, seed=1)
    for name, value in first.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name])
    assert first.key == second.key != other.key
    assert not torch.equal(first.network.head.weight, other.network.head.weight)


def test_classifier_is_read_from_its_cache(small, trained, monkeypatch):
    first, folder = trained
    weights, record = sorted(folder.iterdir(), key=lambda p: p.suffix, reverse=True)
    assert (weights.suffix, record.suffix) == (".pt", ".json")
    assert json.loads(record.read_text())["test_accuracy"] == first.test_accuracy

    def fail(*args, **kwargs):
        raise AssertionError("trained again")

    monkeypatch.setattr(classifier, "_fit", fail)
    again = train_quietly(small, folder)
    assert again.key == first.key and again.test_accuracy == first.test_accuracy
    images = small[1].images
    for a, b in zip(first(images), again(images), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(AssertionError, match="trained again"):
        train_quietly(small, folder, seed=5)
    train = small[0]
    relabelled = TensorSplit(train.name, train.images, train.labels.flip(0), num_levels=17, num_classes=10)
    with pytest.raises(AssertionError, match="trained again"):
        train_quietly((relabelled, small[1]), folder)


@pytest.mark.parametrize("damage", ["truncated weights", "other weights", "no record", "empty record"])
def test_damaged_classifier_is_trained_anew(damage, small, trained, tmp_path, caplog):
    first, folder = trained
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = next(tmp_path.glob("*.pt"))
    record = weights.with_suffix(".json")
    if damage == "truncated weights":
        os.truncate(weights, 1000)
    elif damage == "other weights":
        torch.save({name: value + 1 for name, value in first.network.state_dict().items()}, weights)
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("")
    with caplog.at_level(logging.WARNING):
        again = train_quietly(small, tmp_path)
    assert "trained anew" in caplog.text
    assert again.key == first.key
    caplog.clear()
    train_quietly(small, tmp_path)
    assert not caplog.records  # the repaired pair is good
    assert len(list(tmp_path.iterdir())) == 2  # nothing temporary is left


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 4, 4), (2, 9, 21)])
def test_classifier_adapts_to_the_image_size(shape):
    network = classifier._initial_classifier(shape, 7, seed=0)
    grids = []
    network.stages[-1].register_forward_hook(lambda module, inputs, output: grids.append(output.shape[2:]))
    pool, logits = network(torch.zeros(2, *shape))
    assert pool.shape == (2, 64) and logits.shape == (2, 7)
    assert max(grids[0]) in (3, 4)


def test_shifts_stay_within_an_eighth():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8, 8] = 1
    shifted = classifier._shifted(image.repeat(500, 1, 1, 1), torch.Generator().manual_seed(0))
    positions = {tuple(p) for p in shifted.nonzero()[:, 2:].tolist()}
    assert positions == {(row, column) for row in range(6, 11) for column in range(6, 11)}
    assert torch.equal(shifted.sum((1, 2, 3)), torch.ones(500))


def test_classifier_refuses_what_it_cannot_use(small, trained, tmp_path):
    train, test = small
    extractor, _ = trained
    unlabelled = TensorSplit("faces", train.images, None, num_levels=17)
    with pytest.raises(ValueError, match="'faces' has no labels"):
        train_quietly((unlabelled, test), tmp_path)
    with pytest.raises(ValueError, match="in training but"):
        train_quietly((train, TensorSplit("t", test.images, test.labels, num_classes=10)), tmp_path)
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 1, 8, 8\), not torch.float32"):
        extractor(test.images.float())
    with pytest.raises(ValueError, match=r"not torch.uint8 of shape \(50, 1, 8, 7\)"):
        extractor(test.images[..., :7])
    with pytest.raises(ValueError, match="pixels must be 0 … 16, but one is 17"):
        extractor(test.images + 1)
