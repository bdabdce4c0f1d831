"""Streams that belong to samples: independence of the batch, no twins, and the right distributions."""

from __future__ import annotations

import hashlib

import pytest
import torch

from experiment.randomness import SampleGenerators, normal_like, rademacher_like, seed_from, uniform

KEY = (7, "test")


def drawn(indices, template: torch.Tensor) -> torch.Tensor:
    """Three successive draws of three kinds for the samples with these indices, (B, 3, ...)."""
    generators = SampleGenerators(KEY, indices)
    like = template.expand(len(generators), *template.shape)
    parts = [
        normal_like(like, generators),
        uniform(like.shape, generators, dtype=template.dtype),
        rademacher_like(like, generators),
    ]
    return torch.stack(parts, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (3, 8, 8)])
def test_a_sample_gets_the_same_numbers_in_any_batch(dtype, shape):
    template = torch.zeros(shape, dtype=dtype)
    together = drawn(range(10), template)
    assert together.dtype == dtype and together.shape == (10, 3, *shape)
    alone = torch.cat([drawn([i], template) for i in range(10)])
    in_threes = torch.cat([drawn(range(i, min(i + 3, 10)), template) for i in range(0, 10, 3)])
    assert torch.equal(alone, together)
    assert torch.equal(in_threes, together)
    assert torch.equal(drawn(reversed(range(10)), template).flip(0), together)
    assert not torch.equal(together[0], together[1])


def test_some_of_the_samples_continue_their_own_streams():
    keep = torch.tensor([True, False, True, False, True])
    generators, others = SampleGenerators(KEY, range(5)), SampleGenerators(KEY, range(5))
    x = torch.zeros(5, 4)
    normal_like(x, generators), normal_like(x, others)
    second = normal_like(x, others)
    selected = generators[::2]
    assert len(selected) == 3
    assert torch.equal(normal_like(x[keep], selected), second[keep])
    # Streams are shared: the samples that were selected have moved on, the others have not.
    third = normal_like(x, others)
    after = normal_like(x, generators)
    assert torch.equal(after[keep], third[keep])
    assert torch.equal(after[~keep], second[~keep])


def test_no_two_of_200_000_samples_share_a_seed():
    seeds: set[int] = set()
    for start in range(0, 200_000, 10_000):
        generators = SampleGenerators(KEY, range(start, start + 10_000)).generators
        # More than 32 bits would be dropped by torch's generator, and different seeds could be one.
        seeds.update(g.initial_seed() % 2**32 for g in generators)
    assert len(seeds) == 200_000
    wrapped = SampleGenerators(KEY, [0, 2**32 - 1]).generators
    assert wrapped[0].initial_seed() != wrapped[1].initial_seed()


def test_keys():
    # The documented hash, so that published seeds mean the same numbers on every machine and in every process.
    expected = int.from_bytes(hashlib.blake2b(b"(3, 'prior')", digest_size=4).digest(), "little")
    assert seed_from(3, "prior") == expected
    keys = [(1, 23), (12, 3), (1, "23"), ("1", 23), (123,), (1, 2, 3), ("a", "b"), ("ab",), ()]
    assert len({seed_from(*key) for key in keys}) == len(keys)
    x = torch.zeros(2, 3)
    prior, probe = (normal_like(x, SampleGenerators((3, purpose), [0, 1])) for purpose in ("prior", "probe"))
    assert not torch.equal(prior, probe)


def test_moments_within_four_standard_errors():
    generators = SampleGenerators(KEY, range(1000))
    like = torch.zeros(1000, 500, dtype=torch.float64)
    n = like.numel()
    z, u = normal_like(like, generators), uniform(like.shape, generators, dtype=like.dtype)
    v = rademacher_like(like, generators)
    # Standard errors of sample means: √(Var/n), with Var z² = 2, Var z⁴ = 96, Var u = 1/12, Var u² = 4/45.
    assert abs(z.mean()) < 4 * (1 / n) ** 0.5
    assert abs((z**2).mean() - 1) < 4 * (2 / n) ** 0.5
    assert abs((z**4).mean() - 3) < 4 * (96 / n) ** 0.5
    assert abs(u.mean() - 1 / 2) < 4 * (1 / 12 / n) ** 0.5
    assert abs((u**2).mean() - 1 / 3) < 4 * (4 / 45 / n) ** 0.5
    assert u.min() >= 0 and u.max() < 1
    assert set(v.unique().tolist()) == {-1.0, 1.0}
    assert abs(v.mean()) < 4 * (1 / n) ** 0.5


@pytest.mark.parametrize("draw", [normal_like, rademacher_like])
def test_neighbouring_samples_are_uncorrelated(draw):
    samples, numbers = 2000, 256
    x = draw(torch.zeros(samples, numbers, dtype=torch.float64), SampleGenerators(KEY, range(samples)))
    for lag in (1, 2, 8):
        products = x[lag:] * x[:-lag]
        # Products of independent standardised numbers have mean 0 and variance 1.
        assert abs(products.mean()) < 4 * products.numel() ** -0.5
        # Nor is any pair alike: 2000 correlations of standard error 1/16, of which the largest is near 3.5 s.e.
        assert products.mean(1).abs().max() < 6 * numbers**-0.5
        # Nor are the streams similar where they begin, the known weakness of generators with close seeds.
        assert abs(products[:, 0].mean()) < 4 * len(products) ** -0.5


def test_components_of_one_probe_are_uncorrelated():
    v = rademacher_like(torch.zeros(4000, 8, dtype=torch.float64), SampleGenerators(KEY, range(4000)))
    covariance = v.T @ v / len(v)
    # E[vvᵀ] = I: the diagonal exactly, 28 pairs each with standard error 1/√4000.
    assert torch.equal(covariance.diagonal(), torch.ones(8).double())
    assert covariance.triu(1).abs().max() < 4 * len(v) ** -0.5


@pytest.mark.parametrize("draw", [normal_like, rademacher_like, lambda x, g: uniform(x.shape, g, dtype=x.dtype)])
def test_ordinary_generators(draw):
    x = torch.zeros(6, 2, dtype=torch.float64)
    first, second = (draw(x, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second) and first.dtype == x.dtype
    torch.manual_seed(5)
    assert torch.equal(draw(x, None), first)
    generator = torch.Generator().manual_seed(5)
    assert not torch.equal(draw(x, generator), draw(x, generator))


def test_a_batch_needs_as_many_generators():
    with pytest.raises(ValueError, match="a batch of 3 samples was given the generators of 2"):
        normal_like(torch.zeros(3, 2), SampleGenerators(KEY, [0, 1]))
