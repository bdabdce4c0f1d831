"""What a file may hold to do harm when it is unpickled."""

from __future__ import annotations

import os
from pathlib import Path


class Trap:
    """Makes a folder when unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)
