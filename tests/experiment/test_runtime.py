"""Freed memory stays with the process; processes share a set between them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
from documents import ROOT

from experiment.runtime import InvalidRun, Runtime

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
keep_freed_memory()
np.ones(2_000_000)
print(given_back, faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of glibc")
def test_freed_memory_is_used_again_without_page_faults():
    # 16 MB are 3906 pages of 4 KiB, or 8 of 2 MiB.
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < 0.2 * given_back


@pytest.mark.parametrize("size", [0, 1, 7, 360])
@pytest.mark.parametrize("batch_size", [1, 7, 128, 1000])
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_evaluation_covers_the_whole_set_once(size, batch_size, num_processes):
    shares = []
    for process in range(num_processes):
        runtime = Runtime("cpu")
        runtime.__dict__["accelerator"] = SimpleNamespace(process_index=process, num_processes=num_processes)
        shares.append(runtime.batches(size, batch_size))
    order = [i for share in shares for batch in share for i in batch]
    assert order == list(range(size))
    lengths = [sum(len(batch) for batch in share) for share in shares]
    assert max(lengths) - min(lengths) <= 1
    for share, length in zip(shares, lengths, strict=True):
        assert len(share) == -(-length // batch_size)  # none empty, none small but the last
        assert all(len(batch) == batch_size for batch in share[:-1])


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InvalidRun, match=f"--cache_dir={path}: is, or lies below, a file"):
            Runtime("cpu", cache_dir=str(path))
