"""Variants timed in turn, and the memory and operations of one: what all benchmarks are made of."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm


class Timed(NamedTuple):
    """Of a variant, in every round: seconds, and what it returned."""

    seconds: list[float]
    results: list[Any]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def clock_of(device: torch.device) -> tuple[Callable[[], float], str]:
    """A clock, in seconds, that waits for the device's work to be done, and its kind.

    Of one thread on a CPU it is processor time: what else the machine does then plays no part.
    """
    if device.type != "cpu":
        return lambda: torch.accelerator.synchronize(device) or time.perf_counter(), "time on the clock"
    if torch.get_num_threads() > 1:
        return time.perf_counter, "time on the clock"
    return time.process_time, "processor time"


def conditions(device: torch.device) -> str:
    """The line above a table: where and how was timed."""
    return f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, {clock_of(device)[1]}\n"


def in_turn(
    variants: Mapping[str, Callable[[int], Any]], rounds: int, device: torch.device, *, warm_up: int = 1
) -> dict[str, Timed]:
    """Call all variants in every round, each with the number of the round; the first ``warm_up`` do not count."""
    if rounds < 1:
        raise ValueError(f"--rounds={rounds}: at least 1")
    clock, _ = clock_of(device)
    timed = {name: Timed([], []) for name in variants}
    for number in tqdm(range(warm_up + rounds), unit="round"):
        for name, variant in variants.items():
            started = clock()
            result = variant(number)
            if number >= warm_up:
                timed[name].seconds.append(clock() - started)
                timed[name].results.append(result)
    return timed


def peak_memory(work: Callable[[], object], device: torch.device) -> int:
    """The most memory, in bytes, that ``work`` holds above what was there before, as torch's allocator counts it."""
    gc.collect()  # what earlier work left is not to be freed in the middle of this
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"), default=0)  # of numpy 0


def operations_of(work: Callable[[], object]) -> float:
    """Floating-point operations of the convolutions and matrix products in ``work``; a product with its sum is two."""
    total = 0.0

    class Counter(TorchDispatchMode):  # torch's FlopCounterMode does not bear autograd.grad within a module
        def __torch_dispatch__(self, function, types, args=(), kwargs=None) -> object:
            nonlocal total
            result = function(*args, **(kwargs or {}))
            if count := flop_registry.get(function.overloadpacket):
                total += count(*args, **(kwargs or {}), out_val=result)
            return result

    with Counter():
        work()
    return total
