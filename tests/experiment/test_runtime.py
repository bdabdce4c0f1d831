"""Freed memory stays with the process; processes share a set between them."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from documents import ROOT

from experiment import runtime
from experiment.runtime import Runtime

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


def test_large_arrays_are_whole_in_the_main_process_only(tmp_path, monkeypatch):
    """It reads the rows of others from the folder; they keep theirs, also of a result that is there already."""
    sent: dict[int, list] = {}

    def started(process: int) -> dict[str, np.ndarray]:
        """Process 1 computes before process 0, and none knows a result before both do."""
        both = Runtime("cpu", on_progress=lambda count: None)
        both.__dict__["accelerator"] = SimpleNamespace(
            process_index=process, num_processes=2, is_main_process=process == 0, wait_for_everyone=lambda: None
        )

        def gathered(values: list) -> list:
            assert not any(isinstance(value, dict) and "images" in value for value in values)
            if isinstance(values[0], dict):
                sent[process] = values
            return [*values, *(sent.get(1, []) if process == 0 and isinstance(values[0], dict) else [])]

        monkeypatch.setattr(runtime, "gather_object", gathered)

        def compute(items: range) -> dict[str, np.ndarray]:
            return {"images": np.array([[i, i] for i in items]), "nfe": np.array(items)}

        return both.compute(tmp_path / "result.npz", "key", 7, 2, compute, description="", large=("images",))

    other, main = started(1), started(0)
    assert other["images"][:, 0].tolist() == [3, 4, 5, 6]
    assert main["images"][:, 1].tolist() == main["nfe"].tolist() == list(range(7))
    again = started(1), started(0)
    assert again[0]["images"].tolist() == other["images"].tolist() and again[0]["nfe"].tolist() == list(range(7))
    assert again[1]["images"].tolist() == main["images"].tolist()
