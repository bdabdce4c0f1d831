"""The feature classifier: what it learns, that it is reproducible, and its cache."""

from __future__ import annotations

import os
import shutil
import signal

import pytest
import torch

from checkpoints import CheckpointError
from data import TensorSplit, load_dataset
from evaluation import sample_quality
from experiment.runtime import Interrupted, Runtime
from features import classifier, extract_features, train_classifier
from training import Trainer


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


def train_quietly(splits, folder, seed=0, **runtime):
    quiet = Runtime("cpu", on_progress=lambda count: pytest.fail("these steps are not of the caller"), **runtime)
    return train_classifier(*splits, seed=seed, cache_dir=folder, runtime=quiet)


def weights(extractor) -> dict[str, torch.Tensor]:
    return extractor.network.state_dict()


def assert_equal(first, second) -> None:
    assert first.key == second.key and first.test_accuracy == second.test_accuracy
    for name, value in weights(first).items():
        assert torch.equal(value, weights(second)[name]), name


def test_classifier_recognises_digits(digits, tmp_path, monkeypatch):
    """After 10 epochs, of the 30 that it is trained for."""
    monkeypatch.setattr(classifier, "_IMAGES_SEEN", 1)
    train, test = digits
    extractor = train_quietly(digits, tmp_path)
    assert extractor.test_accuracy >= 0.97
    pool, logits = extractor(test.images)
    assert pool.shape == (360, 64) and logits.shape == (360, 10) and not logits.requires_grad
    assert (logits.argmax(1) == test.labels).double().mean() == pytest.approx(extractor.test_accuracy)

    # The features order sets as the eye does: test digits, noisy digits, noise.
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 17, test.images.shape, generator=generator)
    noisy = (0.6 * test.images + 0.4 * noise).round()
    real = extract_features(extractor, train.images)
    sets = [extract_features(extractor, x.to(torch.uint8)) for x in (test.images, noisy, noise)]
    scores = [sample_quality(real.pool, features, seed=0) for features in sets]
    assert scores[0]["fid"] < scores[1]["fid"] < scores[2]["fid"]
    assert abs(scores[0]["kid"]) < 5 * scores[0]["kid_se"]
    assert scores[1]["kid"] > 5 * scores[1]["kid_se"]
    assert scores[0]["inception_score"] > 6
    assert scores[0]["precision"] > 0.8 > 0.4 > scores[2]["precision"]


def test_rate_and_momentum_follow_one_cycle(small, tmp_path, monkeypatch):
    """The defaults of torch's OneCycleLR: the rate rises to its peak over 30 % of the steps, from 1/25 of it, and falls
    to 1/25e4 of it; β₁ falls from 0.95 to 0.85 and rises again."""
    seen, take_step = [], Trainer.train_step

    def recording(self) -> None:
        take_step(self)
        group = self.optimizer.param_groups[0]
        seen.append((group["lr"] / classifier._PEAK_LEARNING_RATE, group["betas"][0]))

    monkeypatch.setattr(Trainer, "train_step", recording)
    monkeypatch.setattr(classifier, "_IMAGES_SEEN", 1)
    train_quietly(small, tmp_path)
    assert len(seen) == 10 * 2  # epochs of two batches
    for step, expected in ((0, (1 / 25, 0.95)), (5, (1.0, 0.85)), (19, (1 / 25e4, 0.95))):
        assert seen[step] == pytest.approx(expected, rel=1e-6)


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
    assert_equal(first, second)
    assert first.key != other.key and not torch.equal(first.network.head.weight, other.network.head.weight)


def test_neither_precision_nor_passes_change_what_is_trained(small, trained, tmp_path, forget_accelerator):
    forget_accelerator()
    assert_equal(trained[0], train_quietly(small, tmp_path, precision="bf16", accumulation_steps=2))


def test_interrupted_training_goes_on_to_the_same_classifier(small, trained, tmp_path):
    class Stopping(TensorSplit):
        """The training half, which asks the process to end with its 25th batch, as a job's time limit does."""

        count = 0

        def batch(self, indices):
            self.count += 1
            if self.count == 25:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch(indices)

    train, test = small
    stopping = Stopping(train.name, train.images, train.labels, num_levels=17, num_classes=10)
    with pytest.raises(Interrupted):
        train_quietly((stopping, test), tmp_path)
    (checkpoint,) = tmp_path.glob("classifier-*/checkpoints/*.pt")
    assert checkpoint.name == "step_00000025.pt"
    assert_equal(trained[0], train_quietly(small, tmp_path))


def test_classifier_is_read_from_its_cache(small, trained, monkeypatch):
    first, folder = trained

    def fail(*arguments):
        raise AssertionError("trained again")

    monkeypatch.setattr(classifier.Trainer, "train_step", fail)
    again = train_quietly(small, folder)
    assert_equal(first, again)
    images = small[1].images
    for a, b in zip(first(images), again(images), strict=True):
        assert torch.equal(a, b)
    train, test = small
    relabelled = TensorSplit(train.name, train.images, train.labels.flip(0), num_levels=17, num_classes=10)
    for splits, seed in ((small, 5), ((relabelled, test), 0)):
        with pytest.raises(AssertionError, match="trained again"):
            train_quietly(splits, folder, seed)


def test_a_damaged_classifier_is_not_used(small, trained, tmp_path):
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    (checkpoint,) = tmp_path.glob("classifier-small-train-*/checkpoints/step_00000060.pt")
    os.truncate(checkpoint, 1000)
    with pytest.raises(CheckpointError, match=r"none of the 1 checkpoints in .*classifier-small-train-\w+"):
        train_quietly(small, tmp_path)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 4, 4), (2, 9, 21)])
def test_classifier_adapts_to_the_image_size(shape):
    network = classifier._Classifier(shape, 7)
    grids = []
    network.stages[-1].register_forward_hook(lambda module, inputs, output: grids.append(output.shape[2:]))
    pool, logits = network(torch.zeros(2, *shape))
    assert pool.shape == (2, 64) and logits.shape == (2, 7)
    assert max(grids[0]) in (3, 4)


def test_shifts_stay_within_an_eighth():
    image = torch.zeros(1, 1, 16, 16)
    image[..., 8, 8] = 1
    shifted = classifier._shifted(image.repeat(500, 1, 1, 1), torch.rand(500, 2))
    positions = {tuple(p) for p in shifted.nonzero()[:, 2:].tolist()}
    assert positions == {(row, column) for row in range(6, 11) for column in range(6, 11)}
    assert torch.equal(shifted.sum((1, 2, 3)), torch.ones(500))


def test_classifier_refuses_what_it_cannot_use(small, trained, tmp_path):
    train, test = small
    extractor, _ = trained
    with pytest.raises(ValueError, match="small/train: image shape, levels and classes differ from t"):
        train_quietly((train, TensorSplit("t", test.images, test.labels, num_classes=10)), tmp_path)
    with pytest.raises(ValueError, match=r"uint8 of shape \(B, 1, 8, 8\), not torch.float32"):
        extractor(test.images.float())
    with pytest.raises(ValueError, match=r"not torch.uint8 of shape \(50, 1, 8, 7\)"):
        extractor(test.images[..., :7])
    with pytest.raises(ValueError, match="pixels must be 0 … 16, but one is 17"):
        extractor(test.images + 1)
