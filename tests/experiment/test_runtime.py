"""Freed memory stays with the process."""

from __future__ import annotations

import subprocess
import sys

import pytest
from documents import ROOT

PROGRAM = """
import resource
import numpy as np
from experiment.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        np.ones(2_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
np.ones(2_000_000)
print(given_back, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    # 16 MB are 3906 pages of 4 KiB, or 8 of 2 MiB.
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 0.2 * given_back
