"""What benchmarks measure time with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

__all__ = ["clock_of"]


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """A clock, in seconds, that waits for the device's work to be done, and in words which.

    Of one thread on a CPU it is processor time: what else the machine does then plays no part, neither in the ratio of
    two variants nor in the share of a short part in a long one, which seldom has to wait for others.
    """
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.process_time, "processor time"

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now, "time on the clock"
