"""Where and how to compute: device, precision, processes. None of it changes what is computed beyond rounding.

A device works through a queue that the host fills; whenever the host reads a number from it, both wait for each other.
Everything in training steps, sampling and likelihoods that reads one does so by ``to_host``.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from tqdm import tqdm

from experiment.files import check_folder, flatten, memory_size, read_arrays, take_lock, write_arrays

logger = logging.getLogger(__name__)

_PRECISIONS = {"tf32": "no", "fp32": "no", "bf16": "bf16", "fp16": "fp16"}
_DEVICES = ("auto", "cpu", "cuda", "mps")
COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""How long processes wait for each other: while one trains the feature classifier, or ends a long batch of samples."""


class InvalidRun(ValueError):
    """The config, data, checkpoint or working directory cannot be used; raised before any work."""


class Interrupted(Exception):
    """A signal asked the run to stop; what had been computed is kept."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command resumes")
        self.signal_number = signal_number

    def __reduce__(self) -> tuple:  # it may come from another process
        return Interrupted, (self.signal_number,)


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Errors of preparation become InvalidRun, so that a caller can tell bad input from a defect."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidRun(str(error)) from error


def check_finite(values: Mapping[str, object]) -> None:
    """Raise a FloatingPointError that names those of some numbers or arrays which are not finite."""
    if bad := [name for name, value in values.items() if not np.isfinite(value).all()]:
        raise FloatingPointError(f"{', '.join(bad)}: not finite")


@contextlib.contextmanager
def named(stage: str) -> Iterator[None]:
    """Let a FloatingPointError say where it happened."""
    try:
        yield
    except FloatingPointError as error:
        raise FloatingPointError(f"{stage}: {error}") from error


class _ProgressBar(tqdm):
    """A progress bar that also tells somebody else."""

    on_progress: Callable[[int], object] | None = None

    def update(self, n: int = 1) -> bool | None:
        if self.on_progress is not None and n:
            self.on_progress(n)
        return super().update(n)


@dataclass(frozen=True)
class Runtime:
    """Device, precision and processes of a command.

    Args:
        device: 'auto', 'cpu', 'cuda' or 'mps'.
        precision: 'fp32'; 'tf32', the same with products in TF32 where a GPU has it; or mixed, 'bf16' or 'fp16'.
        accumulation_steps: passes that each process's share of a training batch is split into.
        compile: have training and samplers run a compiled network (torch.compile).
        cache_dir: where the feature classifier and the data's features are kept; empty: W/eval/cache.
        on_progress: told how many more steps or items are done, in place of progress bars.
        threads: of a CPU; 0: as many as OMP_NUM_THREADS says, or as cores are free at the start; None: as torch was
            told before. They change results by rounding; a resumed training takes as many as it began with, unless
            they are given.

    Raises:
        InvalidRun: unknown or unavailable device or precision, or a number outside its range.
    """

    device: str = "auto"
    precision: str = "tf32"
    accumulation_steps: int = 1
    compile: bool = False
    cache_dir: str = ""
    on_progress: Callable[[int], object] | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.device not in _DEVICES:
            raise InvalidRun(f"--device={self.device}: allowed are {', '.join(_DEVICES)}")
        available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if not available.get(self.device, lambda: True)():
            raise InvalidRun(f"--device={self.device}: no such device on this machine")
        if self.precision not in _PRECISIONS:
            raise InvalidRun(f"--precision={self.precision}: allowed are {', '.join(_PRECISIONS)}")
        if self.accumulation_steps < 1:
            raise InvalidRun(f"--accumulation_steps={self.accumulation_steps}: at least 1")
        if self.threads is not None and not 0 <= self.threads <= 1024:
            raise InvalidRun(f"--threads={self.threads}: allowed are 1 to 1024, and 0 for the cores that are free")
        if self.cache_dir:
            with checked():
                check_folder(self.cache_dir, "--cache_dir")

    @cached_property
    def accelerator(self) -> Accelerator:
        # Left to itself accelerate takes CUDA, or else MPS. That there is neither it must be told, or several
        # processes on CPUs would not find each other.
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        accelerator = Accelerator(
            cpu=self.device == "cpu" or not accelerated,
            mixed_precision=_PRECISIONS[self.precision],
            # As a plugin, because a number would give way to the one in the user's settings of accelerate.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=self.accumulation_steps),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                # All buffers are constants, and all parameters take part in every step.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
            raise InvalidRun(
                f"the launcher asks for {accelerator.distributed_type.value}: allowed are one process, or several that "
                "each hold the whole model"
            )
        if accelerator.device.type == "cpu":
            keep_freed_memory()
            if threads := self.threads or (self._chooses_threads and cores() - self.busy_cores):
                torch.set_num_threads(threads)
        if accelerator.device.type == "cuda":
            allow_tf32(self.precision != "fp32")
        return accelerator

    @property
    def _chooses_threads(self) -> bool:
        return self.threads == 0 and "OMP_NUM_THREADS" not in os.environ

    @cached_property
    def busy_cores(self) -> int:
        """How many cores other work has taken now, of those that this process may use; one is left to this one.

        Threads that share one layer wait for the slowest at its end, and spin meanwhile: where one of them has no core
        for itself, two are many times slower than one.
        """
        import psutil

        usage = psutil.cpu_percent(interval=0.15, percpu=True)
        own = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(usage))
        return min(round(sum(usage[core] for core in own if core < len(usage)) / 100), cores() - 1)

    def keep_threads(self, began_with: int | None) -> None:
        """Go on with as many threads as a run began with, so that it ends the same to the last bit; say so if not."""
        if self.torch_device.type != "cpu" or began_with is None:
            return
        if self._chooses_threads:
            torch.set_num_threads(min(began_with, cores()))
        if began_with != (threads := torch.get_num_threads()) and self.is_main:
            logger.warning("began with %d thread(s), goes on with %d, which round otherwise", began_with, threads)

    @property
    def torch_device(self) -> torch.device:
        return self.accelerator.device

    @property
    def numbers(self) -> str:
        """What products are computed in: the precision, but TF32 only where a GPU has it."""
        has_tf32 = self.torch_device.type == "cuda" and torch.cuda.get_device_capability(self.torch_device) >= (8, 0)
        return "fp32" if self.precision == "tf32" and not has_tf32 else self.precision

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files."""
        return self.accelerator.is_main_process

    @property
    def shows_progress(self) -> bool:
        return self.is_main and self.on_progress is None

    @property
    def where(self) -> str:
        """Device, threads, processes and precision, in words."""
        device, count = self.torch_device, self.accelerator.num_processes
        words = [torch.cuda.get_device_name(device) if device.type == "cuda" else device.type]
        if device.type == "cpu":
            words.append(f"{torch.get_num_threads()} thread(s)")
            if self._chooses_threads and self.busy_cores:
                words.append(f"other work on {self.busy_cores} of {cores()} cores")
        return ", ".join([*words, *([f"{count} processes"] if count > 1 else []), self.numbers])

    def announce(self, what: str, workdir: str | Path, data: str = "") -> None:
        """The first two lines of a command: what it does and how much of it; where, and what it writes to. A third one
        is of its data, if it reads any."""
        if self.shows_progress:
            logger.info("%s\non %s; writes to %s%s", what, self.where, workdir, data and f"\n{data}")

    def progress(self, *, initial: int = 0, **options) -> tqdm:
        """A progress bar of the main process, or in its place calls of ``on_progress``; options are tqdm's."""
        bar = _ProgressBar(initial=initial, disable=not self.shows_progress, dynamic_ncols=True, **options)
        bar.on_progress = self.on_progress
        if self.on_progress is not None and initial:
            self.on_progress(initial)
        return bar

    @contextlib.contextmanager
    def together(self, given: Mapping[str, object]) -> Iterator[None]:
        """A block that all processes enter with the same things given, and end in when one of them ends.

        Raises:
            InvalidRun: in all processes; one was given other things, flags or code than process 0.
        """
        if self.accelerator.num_processes == 1:
            yield
            return
        from experiment.processes import watched

        flags = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "on_progress"}
        mine = {f"--{name}": value for name, value in flatten({**given, **flags}).items()}
        mine["the code"] = code_version()
        with watched(self.accelerator.process_index, self.accelerator.num_processes):
            first, *others = gather_object([mine])
            for number, other in enumerate(others, 1):
                names = (name for name in sorted(first | other) if first.get(name) != other.get(name))
                if different := [f"{name} is {other.get(name)!r}, not {first.get(name)!r}" for name in names]:
                    what = "; ".join(different[:3])
                    raise InvalidRun(f"process {number} was given other things than process 0: {what}")
            yield

    def check_agreement(self, what: str, value: object, workdir: Path) -> None:
        """Raise a ValueError in all processes if they see different things, as they would if hosts did not share the
        folder."""
        values = gather_object([value])
        if any(other != values[0] for other in values):
            raise ValueError(
                f"--workdir={workdir}: the processes disagree on {what} ({', '.join(map(str, values))}); it must "
                "be one folder that all hosts share"
            )

    def in_main_process(self, action: Callable[[], object]) -> None:
        """Run ``action`` in the main process; its ValueError or OSError is raised in all of them, as a ValueError."""
        error = None
        if self.is_main:
            try:
                action()
            except (ValueError, OSError) as reason:
                error = str(reason)
        if error := next((e for e in gather_object([error]) if e), None):
            raise ValueError(error)

    def gather(self, items: list) -> list:
        """The items of all processes, one after the other."""
        return gather_object(items)

    def share(self, size: int) -> range:
        """Items of a whole set for this process. The shares of all processes, one after the other, are 0, …, size − 1;
        they differ by one item at most."""
        index, count = self.accelerator.process_index, self.accelerator.num_processes
        return range(size * index // count, size * (index + 1) // count)

    def compute(
        self,
        path: Path,
        key: str,
        size: int,
        batch_size: int,
        compute: Callable[[range], dict[str, np.ndarray]],
        *,
        description: str,
        large: tuple[str, ...] = (),
    ) -> dict[str, np.ndarray]:
        """Arrays with one row per item, computed in batches over all processes; every finished batch is kept. While
        another command computes the same, this one waits, and then takes its result.

        Args:
            path: the ``.npz`` that keeps the result; the batches on the way are kept in ``parts/`` next to it.
            key: what decides the result. A file of another key, or a damaged one, is computed again.
            size: number of items; batch_size: of this process.
            compute: maps the numbers of b items to arrays of b rows.
            large: arrays that only the main process is to hold as a whole, by way of the folder; of these another one
                returns the rows of its share, if it has any.

        Raises:
            FloatingPointError: what was computed is not finite; it is not stored.
        """
        share, parts = self.share(size), path.parent / "parts" / path.stem

        def kept() -> dict[str, np.ndarray] | None:
            result = _keyed_arrays(path, key)
            # All processes must take the same branch even if one cannot read the file.
            return result if all(gather_object([result is not None])) else None

        def compute_finite(items: range) -> dict[str, np.ndarray]:
            with named(f"{description}, items {items[0]} to {items[-1]}"):
                check_finite(arrays := compute(items))
            return arrays

        def refuse(items: range) -> dict[str, np.ndarray]:
            raise ValueError(f"{parts} lacks files of other processes; it must be one folder that all hosts share")

        with self.progress(total=len(share), unit="item", desc=description) as bar:
            if (result := kept()) is None:
                with self.exclusive(path.with_name(f".{path.name}.lock"), wait=True):
                    if (result := kept()) is None:
                        batches = []
                        for items, arrays in _batches(parts, key, share, batch_size, compute_finite):
                            batches.append(arrays)
                            bar.update(len(items))
                        small = [{name: arrays[name] for name in arrays.keys() - set(large)} for arrays in batches]
                        result = _joined(gather_object(small))  # by when all parts have been written
                        if self.is_main and large and self.accelerator.num_processes > 1:
                            batches = [arrays for _, arrays in _batches(parts, key, range(size), batch_size, refuse)]
                        result |= _joined([{name: arrays[name] for name in large} for arrays in batches])
                        if self.is_main:
                            write_arrays(path, key=key, **result)
                            shutil.rmtree(parts)
                        self.accelerator.wait_for_everyone()
                        return result
            elif self.is_main and parts.exists():  # a command was killed before it deleted them
                lock = take_lock(path.with_name(f".{path.name}.lock"), True)
                shutil.rmtree(parts, ignore_errors=True)
                lock.release()
            bar.update(bar.total)
        own = {} if self.is_main else {name: result[name][share.start : share.stop].copy() for name in large}
        return result | own

    @contextlib.contextmanager
    def exclusive(self, path: Path, *, wait: bool = False) -> Iterator[None]:
        """Hold the lock ``path``, a file: no other command does the same work in this folder meanwhile. If one does
        already, a ValueError is raised in all processes, or they ``wait`` for its end."""
        locks: list = []
        self.in_main_process(lambda: locks.append(take_lock(path, wait)))
        try:
            yield
        finally:
            for lock in locks:
                lock.release()


def _joined(batches: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The rows of all batches; nothing if there is none."""
    return {name: np.concatenate([arrays[name] for arrays in batches]) for name in (batches[0] if batches else ())}


def _batches(
    folder: Path, key: str, share: range, batch_size: int, compute: Callable[[range], dict[str, np.ndarray]]
) -> Iterator[tuple[range, dict[str, np.ndarray]]]:
    """A share in order: the batches that ``folder`` keeps, whatever their size, and between them new ones of at most
    ``batch_size`` items, which are added to them. A file FIRST-LAST.npz says in its key what it is, so that files
    cannot be mixed up. Processes may differ by a batch: gather results after the pass, not within."""
    numbers = [re.fullmatch(r"(\d+)-(\d+)\.npz", path.name) for path in folder.glob("*.npz")]
    finished = [range(int(match[1]), int(match[2]) + 1) for match in numbers if match]
    first = share.start
    while first < share.stop:
        items = next((items for items in finished if first in items), None)
        if items is not None:
            name = f"{items.start}-{items[-1]}"
            if (arrays := _keyed_arrays(folder / f"{name}.npz", f"{key} {name}")) is None:
                finished.remove(items)
                continue
            wanted = range(first, min(items.stop, share.stop))
            arrays = {name: rows[first - items.start : wanted.stop - items.start] for name, rows in arrays.items()}
        else:
            following = [items.start for items in finished if items.start > first]
            wanted = range(first, min(first + batch_size, share.stop, *following))
            name = f"{first}-{wanted[-1]}"
            arrays = compute(wanted)
            write_arrays(folder / f"{name}.npz", key=f"{key} {name}", **arrays)
        yield wanted, arrays
        first = wanted.stop


def _keyed_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None if it is missing, damaged, or stored under another key than its name says."""
    if not path.exists():
        return None
    try:
        arrays = read_arrays(path)
        if str(arrays.pop("key", "")) != key:
            raise ValueError("it holds something else")
        return arrays
    except ValueError as error:
        logger.warning("%s is damaged and is computed again: %s", path, error)
        return None


def code_version() -> str:
    """The commit the code is at, with a mark if files differ from it; 'unknown' outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def hardware() -> str:
    """The GPU, or else the processor, and the version of torch."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    info = Path("/proc/cpuinfo")  # on Linux, where platform.processor() is the architecture or nothing
    if not torch.cuda.is_available() and info.exists():
        found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        name = found[1].strip() if found else name
    return f"{name or platform.machine()}, torch {torch.__version__}"


@contextlib.contextmanager
def within_memory(field: str, copies: int) -> Iterator[None]:
    """Let a network be built, unless so many copies of its weights need more memory than this machine has: then a
    ValueError names ``field``."""
    memory, size = memory_size(), 0

    def count(module: torch.nn.Module, name: str, weight: torch.Tensor | None) -> None:
        nonlocal size
        size += 0 if weight is None else copies * weight.nbytes
        if size > memory:
            needed = f"the network needs over {size / 1e9:,.0f} GB of memory"
            raise ValueError(f"{field}: {needed}, the machine has {memory / 1e9:,.0f} GB")

    hook = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        raise ValueError(f"{field}: the network needs more memory than there is: {error}") from error
    finally:
        hook.remove()


def to_device(x: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A tensor on a device; None as it is. A copy from the host to CUDA waits for its turn, and the host does not wait
    for it."""
    if x is None:
        return None
    if device.type == "cuda" and x.device.type == "cpu":
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)  # not to be read before it is there


def to_host(x: torch.Tensor) -> torch.Tensor:
    """A tensor of a device, on the host, which waits for it."""
    return x.cpu()


def allow_tf32(allowed: bool) -> None:
    """Whether this process's GPU computes products and convolutions of float32 numbers in TF32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed


def keep_freed_memory() -> None:
    """With glibc, let this process keep the memory it frees until it ends, blocks above 32 MiB excepted.

    Every step allocates and frees the same hundreds of megabytes. glibc would give large blocks back to the kernel,
    which hands them out again page by page and filled with zeros.
    """
    if sys.platform.startswith("linux") and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD of malloc.h
        mallopt(-3, 32 * 2**20)  # M_MMAP_THRESHOLD, the most that it may be
