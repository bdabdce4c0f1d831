"""What the tests run side by side: in a module that spawned processes can import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import torch


class Task(NamedTuple):
    index: int
    action: str = "work"
    folder: str = ""

    def __str__(self) -> str:
        return f"task {self.index}"


def work(task: Task, update) -> dict:
    if task.folder:
        (Path(task.folder) / str(task.index)).write_text(str(os.getpid()))
    if task.action == "fail":
        raise FloatingPointError("not finite")
    if task.action == "interrupt":
        raise KeyboardInterrupt
    if task.action == "wait":
        time.sleep(60)
    # The later a task, the sooner it is done.
    time.sleep(0.2 if task.index == 0 else 0)
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(task.index))
    update(1)
    update(2)
    return {
        "index": task.index,
        "threads": torch.get_num_threads(),
        "product": (x @ x).sum().item(),
        "pid": os.getpid(),
        "ctrl_c_blocked": signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, []),
    }
