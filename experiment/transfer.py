"""Between the host and the device of a computation.

A device works through a queue that the host fills; whenever the host reads a number from it, both wait for each other.
Everything in training, sampling and likelihoods that reads one does so by ``to_host``, so that a test can count how
often.
"""

from __future__ import annotations

import torch
from torch import Tensor


def host_buffer(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the host, not set, from which ``to_device`` copies without waiting."""
    return torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host, on a device; on CUDA the copy waits for its turn, and the host does not wait for it."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def to_host(x: Tensor) -> Tensor:
    """A tensor of a device, on the host, which waits for it."""
    return x.cpu()
