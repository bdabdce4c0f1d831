"""The order in which training sees a set, and the batches of evaluation."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from image_files import save

from data import FileSplit, TensorSplit, TrainingBatches, UnreadableImage, batch_indices, sets


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (10, 5), (10, 10), (7, 20), (1, 4), (5, 5)])
def test_every_epoch_is_a_permutation(size, batch_size):
    steps = 4 * size  # batch_size whole epochs and more
    order = torch.cat([batch_indices(0, n, batch_size, size) for n in range(steps)])
    assert order.shape == (steps * batch_size,) and order.dtype == torch.int64
    epochs = order.reshape(-1, size)
    assert torch.equal(epochs.sort(1).values, torch.arange(size).expand_as(epochs))
    if size > 4:
        assert len({tuple(epoch.tolist()) for epoch in epochs}) > 1  # a fresh one each time


def test_any_step_is_available_without_replay():
    forward = [batch_indices(3, n, 6, 25) for n in range(40)]
    sets._permutation.cache_clear()
    assert torch.equal(batch_indices(3, 29, 6, 25), forward[29])
    for n in torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist():
        assert torch.equal(batch_indices(3, n, 6, 25), forward[n])
    assert not all(torch.equal(batch_indices(4, n, 6, 25), forward[n]) for n in range(4))


class CountedFiles:
    """Images made when asked for, each of one value, and a record of which; not a ``TensorSplit``."""

    num_levels, num_classes, shape, fingerprint, name = 256, None, (1, 2, 2), "x", "counted"

    def __init__(self, size: int) -> None:
        self.size, self.read, self.threads = size, [], set()

    def __len__(self) -> int:
        return self.size

    def batch(self, indices):
        self.read.append(indices.tolist())
        self.threads.add(threading.current_thread())
        return indices.to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2), indices + 100


@pytest.mark.parametrize("in_memory", [True, False])
def test_parts_make_up_the_batch_of_all_processes(in_memory):
    values = torch.arange(17, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)
    split = TensorSplit("x", values, torch.arange(17) + 100, num_classes=117) if in_memory else CountedFiles(17)
    batches = TrainingBatches(split, seed=1, batch_size=24)
    for step in (3, 4, 11):
        parts = [batches(step, range(start, start + 8)) for start in (0, 8, 16)]
        images, labels = (torch.cat(values) for values in zip(*parts, strict=True))
        assert torch.equal(images[:, 0, 1, 1].long(), batch_indices(1, step, 24, 17))
        assert torch.equal(labels, batch_indices(1, step, 24, 17) + 100)
    with pytest.raises(IndexError):
        batches(0, range(20, 28))


def test_files_are_decoded_once_and_one_step_ahead():
    """In another thread; the parts of an accumulated step one by one, and asking again decodes nothing."""
    split = CountedFiles(10)
    batches = TrainingBatches(split, seed=0, batch_size=6)
    parts = (range(0, 3), range(3, 6))
    for step in range(5, 9):
        for positions in (*parts, *parts):
            batches(step, positions)
    batches.reader.shutdown()  # what was to be decoded ahead has been
    expected = [batch_indices(0, step, 6, 10).split(3) for step in range(5, 10)]
    assert sorted(split.read) == sorted(part.tolist() for step in expected for part in step)
    assert threading.current_thread() not in split.threads and len(batches.batches) == 4


def test_an_unreadable_image_is_reported_by_its_own_step(tmp_path):
    for k in range(4):
        save(tmp_path / f"{k}.png", np.full((2, 2), k, np.uint8))
    split = FileSplit("files", tmp_path, [f"{k}.png" for k in range(4)], None, shape=(1, 2, 2))
    bad = int(batch_indices(0, 2, 1, 4))
    (tmp_path / f"{bad}.png").write_bytes(b"nothing")
    batches = TrainingBatches(split, seed=0, batch_size=1)
    for step in (0, 1):
        assert int(batches(step, range(1))[0][0, 0, 0, 0]) == int(batch_indices(0, step, 1, 4))
    with pytest.raises(UnreadableImage, match=rf"cannot read the image .*{bad}\.png"):
        batches(2, range(1))


def test_batches_are_copies():
    first = batch_indices(0, 0, 9, 9)
    kept = first.clone()
    first.zero_()
    assert torch.equal(batch_indices(0, 0, 9, 9), kept)


def test_first_image_is_uniform_over_seeds():
    counts = torch.bincount(torch.cat([batch_indices(seed, 0, 1, 4) for seed in range(4000)]), minlength=4)
    # Each a binomial with n = 4000, p = ¼: standard error √(n p (1 − p)) = 27.4; four of them.
    assert (counts - 1000).abs().max() < 4 * 27.4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "training.batch_size=0"),
        ({"size": 0}, "of 0 images"),
        ({"step": -1}, "step -1"),
    ],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(**{"seed": 0, "step": 0, "batch_size": 8, "size": 10, **arguments})
