"""``metrics.jsonl`` and TensorBoard: what a run measures as it goes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from experiment.files import write_atomically

__all__ = ["MetricsLog"]


class MetricsLog:
    """Writes rows of a run to ``DIRECTORY/metrics.jsonl`` and ``DIRECTORY/tensorboard/``.

    Args:
        directory: of the run.
        step: where the run resumes; rows after it are dropped, because they are computed again.
    """

    def __init__(self, directory: Path, step: int) -> None:
        # TensorBoard imports TensorFlow where it is installed (seconds, and pages of warnings), unless it finds this.
        sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
        from torch.utils.tensorboard import SummaryWriter

        self.path = directory / "metrics.jsonl"
        if self.path.exists():
            kept = []
            for line in self.path.read_text(errors="replace").splitlines():
                # A process killed while writing may leave half a line at the end, a full disk other bytes.
                with contextlib.suppress(json.JSONDecodeError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
            write_atomically(self.path, lambda file: file.write("".join(kept).encode()))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a")  # noqa: SIM115
        self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, row: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Bring every row to the disk; to be called before a checkpoint, which a resumed log is cut to."""
        os.fsync(self.file.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()
        self.board.close()
