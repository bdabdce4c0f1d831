"""Independent tasks in parallel: one process and one torch thread each, one progress bar for all of them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from multiprocessing.sharedctypes import RawArray
from typing import TypeVar

import torch
from tqdm import tqdm

from experiment.runtime import Interrupted

Update = Callable[[int], object]
Result = TypeVar("Result")

_POLL_SECONDS = 0.2


def run_all(
    tasks: Mapping[str, Callable[[Update], Result]], *, jobs: int, total: int, unit: str, description: str
) -> list[Result]:
    """The results of all tasks, in their order, ``jobs`` at a time.

    Every task runs on one torch thread, whatever ``jobs`` is, so that the results do not depend on it. With one job
    (or one task) that happens in this process, otherwise in spawned ones. Those end when this one ends, however that
    happens, so a task must survive being killed at any moment.

    Args:
        tasks: by name, for messages, what to do: a ``functools.partial`` of a function at the top level of its module,
            with arguments and a result that can be pickled. It reports steps done by its argument, ``update(steps)``.
        jobs: how many tasks at a time, at least 1.
        total, unit, description: of the progress bar.

    Raises:
        ValueError: fewer than one job.
        KeyboardInterrupt: Ctrl-C.
        concurrent.futures.process.BrokenProcessPool: a process was killed from outside, for its memory perhaps.
        Exception: what a task raised, with the task's name before its message (an OSError or a RuntimeError if its type
            takes no message). All other tasks are ended first.
    """
    if jobs < 1:
        raise ValueError(f"jobs={jobs}: at least 1")
    with tqdm(total=total, unit=unit, desc=description, dynamic_ncols=True) as bar:
        if min(jobs, len(tasks)) <= 1:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return [_named(name, task, bar.update) for name, task in tasks.items()]
            finally:
                torch.set_num_threads(threads)
        return _run_in_processes(tasks, min(jobs, len(tasks)), bar)


def _run_in_processes(tasks: Mapping[str, Callable], jobs: int, bar: tqdm) -> list[Result]:
    # One counter per task, written by one process only: there is no lock that a killed process could keep.
    steps_done = RawArray("q", len(tasks))
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _prepare_process, (steps_done,))
    try:
        # The processes inherit the blocked signal: Ctrl-C reaches only this process, which ends the others.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            futures = [pool.submit(_run_task, *item, index) for index, item in enumerate(tasks.items())]
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        pending = set(futures)
        while pending:
            done, pending = wait(pending, _POLL_SECONDS, FIRST_EXCEPTION)
            bar.update(sum(steps_done) - bar.n)
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except BaseException:
        for process in multiprocessing.active_children():
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _named(name: str, task: Callable[[Update], Result], update: Update) -> Result:
    try:
        return task(update)
    except Interrupted:
        raise
    except Exception as error:
        message = f"{name}: {error}"
        error.args = (message,)
        if str(error) != message:  # of a type that makes its text from something else
            raise (OSError if isinstance(error, OSError) else RuntimeError)(message) from error
        raise


_steps_done = None  # of a spawned process


def _prepare_process(steps_done: RawArray) -> None:
    global _steps_done
    _steps_done = steps_done
    torch.set_num_threads(1)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)


def _run_task(name: str, task: Callable[[Update], Result], index: int) -> Result:
    def update(steps: int) -> None:
        _steps_done[index] += steps

    return _named(name, task, update)
