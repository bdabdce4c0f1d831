"""Another process that has taken a lock."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_TAKE = """
import sys
from filelock import FileLock, Timeout
lock = FileLock(sys.argv[1], timeout=0)  # released when forgotten
try:
    lock.acquire()
except Timeout:
    print("refused", flush=True)
    sys.exit()
print("taken", flush=True)
sys.stdin.read()
"""


@contextmanager
def lock_held_elsewhere(path: Path) -> Iterator[bool]:
    """While another process has the lock ``path``; False if it could not take it."""
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process.stdout.readline() == "taken\n"
        process.stdin.close()
