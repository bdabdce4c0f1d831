"""Files that are damaged at random."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def changed_bytes(whole: bytes, random: np.random.Generator, count: int = 3000) -> Iterator[bytes]:
    """So many copies of a file's content with a few bytes changed, one in ten of them cut off as well."""
    for _ in range(count):
        content = bytearray(whole)
        for k in random.integers(0, len(content), random.integers(1, 4)):
            content[k] = random.integers(256)
        yield content[: random.integers(1, len(content))] if random.random() < 0.1 else content
