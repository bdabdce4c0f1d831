"""``metrics.jsonl`` and TensorBoard: what a run measures as it goes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

__all__ = ["MetricsLog"]


class MetricsLog:
    """Writes rows of a run to ``DIRECTORY/metrics.jsonl`` and ``DIRECTORY/tensorboard/``.

    Args:
        directory: of the run.
        step: where the run resumes; TensorBoard drops what it has of later steps.
        size: bytes of ``metrics.jsonl`` at that moment (``sync``); the rest, which is computed again, is cut off.
    """

    def __init__(self, directory: Path, step: int = 0, size: int = 0) -> None:
        # TensorBoard imports TensorFlow where it is installed (seconds, and pages of warnings), unless it finds this.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        directory.mkdir(parents=True, exist_ok=True)
        self.file = open(directory / "metrics.jsonl", "a+b")  # noqa: SIM115
        self.file.truncate(min(size, self.file.seek(0, os.SEEK_END)))
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1 if size else 0)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.file.write((json.dumps({"step": step, **row}) + "\n").encode())
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Bring every row to the disk; the size of the file, which a checkpoint remembers."""
        os.fsync(self.file.fileno())
        return self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.board.close()
