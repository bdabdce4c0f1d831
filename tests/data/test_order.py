"""The order in which training sees a set, and the batches of evaluation."""

from __future__ import annotations

import pytest
import torch

from data import sets
from data.sets import batch_indices, epoch_batches


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


@pytest.mark.parametrize("num_processes", [1, 2, 3, 4])
def test_processes_share_the_single_process_batch(num_processes):
    for step in range(12):
        whole = batch_indices(1, step, 24, 17)
        shares = [
            batch_indices(1, step, 24, 17, process_index=r, num_processes=num_processes) for r in range(num_processes)
        ]
        assert {len(share) for share in shares} == {24 // num_processes}
        assert torch.equal(torch.cat(shares), whole)


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
        ({"batch_size": 0}, "config.training.batch_size=0"),
        ({"size": 0}, "of 0 images"),
        ({"step": -1}, "step -1"),
        ({"batch_size": 9, "num_processes": 2}, "config.training.batch_size=9.*2 processes"),
        ({"process_index": 2, "num_processes": 2}, "process 2"),
    ],
)
def test_impossible_batches(arguments, message):
    with pytest.raises(ValueError, match=message):
        batch_indices(**{"seed": 0, "step": 0, "batch_size": 8, "size": 10, **arguments})


@pytest.mark.parametrize("size", [0, 1, 7, 360])
@pytest.mark.parametrize("batch_size", [1, 7, 128, 1000])
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_evaluation_covers_the_whole_set_once(size, batch_size, num_processes):
    shares = [epoch_batches(size, batch_size, r, num_processes) for r in range(num_processes)]
    order = [i for share in shares for batch in share for i in batch.tolist()]
    assert order == list(range(size))
    lengths = [sum(len(batch) for batch in share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    for share, length in zip(shares, lengths, strict=True):
        assert len(share) == -(-length // batch_size)  # none empty, none small but the last
        assert all(len(batch) == batch_size for batch in share[:-1])


def test_impossible_evaluation_batches():
    with pytest.raises(ValueError, match=r"config.eval.batch_size=0"):
        epoch_batches(10, 0)
    with pytest.raises(ValueError, match="process 1"):
        epoch_batches(10, 2, 1, 1)
