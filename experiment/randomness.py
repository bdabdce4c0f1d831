"""Random numbers that belong to a sample, not to a batch.

A sample's noise is drawn from a generator of its own, seeded by (seed, purpose, index). It depends neither on the batch
the sample is in, nor on the number of processes, nor on the device: numbers are drawn on the CPU and moved. In training
the key contains the step, so that a run which resumes at a step draws the same numbers without replaying any.

The functions ``normal_like``, ``rademacher_like``, ``uniform`` and ``random_bits`` accept the per-sample generators, an
ordinary ``torch.Generator``, or ``None`` for torch's global stream; everything in the project draws through them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from experiment.runtime import to_device

_MASK32 = 0xFFFFFFFF


def seed_from(*key: int | str) -> int:
    """A 32-bit seed from a key of integers and strings, the same on every machine and in every process."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "little")


class SampleGenerators:
    """One random stream per sample of a batch.

    Args:
        key: what the numbers are for, e.g. ``(seed, "prior")``.
        indices: the position of each sample of the batch in the whole set, non-negative and below 2³².

    Under one key different indices never share a seed: torch's CPU generator keeps only 32 bits of its seed,
    and the map from index to seed below is a bijection of those 32 bits (a hash would make some of 50 000
    samples identical twins about one time in four).
    """

    def __init__(self, key: Sequence[int | str], indices: Iterable[int]) -> None:
        offset = seed_from(*key)
        self.generators = [torch.Generator().manual_seed(mix32(int(i) + offset)) for i in indices]

    def __len__(self) -> int:
        return len(self.generators)

    def __getitem__(self, part: slice) -> SampleGenerators:
        """The streams of some of the samples; they are shared, not copied."""
        chosen = SampleGenerators.__new__(SampleGenerators)
        chosen.generators = self.generators[part]
        return chosen


Generator: TypeAlias = torch.Generator | SampleGenerators | None
IntegerOrTensor = TypeVar("IntegerOrTensor", int, Tensor)


def mix32(value: IntegerOrTensor) -> IntegerOrTensor:
    """A bijective scrambling of 32-bit integers (xor-shifts and odd multiplications), so that neighbouring
    indices get unrelated values. Of a tensor: int64, element by element."""
    value = value & _MASK32
    value = ((value ^ (value >> 16)) * 0x7FEB352D) & _MASK32
    value = ((value ^ (value >> 15)) * 0x846CA68B) & _MASK32
    return value ^ (value >> 16)


def _draw(
    fill: Callable[..., Tensor], shape: Sequence[int], generator: Generator, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """``fill(tensor, generator=…)`` writes random numbers into a tensor and returns it."""
    if isinstance(generator, SampleGenerators):
        if shape[0] != len(generator):
            raise ValueError(f"a batch of {shape[0]} samples was given the generators of {len(generator)}")
        # In place: of a batch of small images this takes two thirds of the time of stacking single draws.
        values = torch.empty(tuple(shape), dtype=dtype)
        for row, own in zip(values.unbind(0), generator.generators, strict=True):
            fill(row, generator=own)
        return to_device(values, device)
    own_device = device if generator is None else generator.device
    values = fill(torch.empty(tuple(shape), dtype=dtype, device=own_device), generator=generator)
    return to_device(values, device)


def normal_like(x: Tensor, generator: Generator = None) -> Tensor:
    """Standard normal numbers in the shape (B, ...), dtype and device of ``x``."""
    return _draw(Tensor.normal_, x.shape, generator, x.device, x.dtype)


def uniform(
    shape: Sequence[int],
    generator: Generator = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Numbers uniform on [0, 1) of shape (B, ...)."""
    return _draw(Tensor.uniform_, shape, generator, torch.device(device), dtype or torch.get_default_dtype())


def random_bits(shape: Sequence[int], generator: Generator = None, *, device: torch.device | str = "cpu") -> Tensor:
    """Integers int64 of shape (B, ...), uniform on all that there are (but the largest)."""

    def fill(values: Tensor, generator: torch.Generator | None) -> Tensor:
        return values.random_(-(2**63), 2**63 - 1, generator=generator)

    return _draw(fill, shape, generator, torch.device(device), torch.int64)


def rademacher_like(x: Tensor, generator: Generator = None) -> Tensor:
    """Independent ±1 with equal probability, in the shape, dtype and device of ``x``: probes v with E[vvᵀ] = I."""
    return torch.where(uniform(x.shape, generator, device=x.device, dtype=x.dtype) < 0.5, -1.0, 1.0).to(x.dtype)
