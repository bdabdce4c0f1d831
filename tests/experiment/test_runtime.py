"""Freed memory stays with the process; processes share a set between them; what has been computed is kept."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from documents import ROOT
from locks import lock_held_elsewhere

from experiment import files
from experiment import runtime as runtime_module
from experiment.files import read_arrays, write_arrays
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
@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_evaluation_covers_the_whole_set_once(size, num_processes):
    shares = []
    for process in range(num_processes):
        runtime = Runtime("cpu")
        runtime.__dict__["accelerator"] = SimpleNamespace(process_index=process, num_processes=num_processes)
        shares.append(runtime.share(size))
    assert [i for share in shares for i in share] == list(range(size))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


def test_tf32_is_float32_on_a_cpu():
    """So that evaluations keep their keys, whichever of the two was asked for."""
    assert [Runtime("cpu", precision).numbers for precision in ("tf32", "fp32")] == ["fp32", "fp32"]


@pytest.fixture
def machine(monkeypatch):
    """Of four cores, of which so many are busy; the number of threads is as before afterwards."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(runtime_module, "cores", lambda: 4)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    yield lambda *busy: monkeypatch.setattr("psutil.cpu_percent", lambda **_: [*busy, 100.0])
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("busy", "threads"),
    [((3, 0, 9, 1), 4), ((100, 0, 40, 0), 3), ((100, 100, 95, 60), 1), ((100, 100, 100, 100), 1)],
)
def test_as_many_threads_as_cores_are_free(machine, busy, threads):
    """Of those that the process may use: the fifth is another's. It is said where it is fewer."""
    machine(*busy)
    where = Runtime("cpu", threads=0).where
    assert torch.get_num_threads() == threads and f"cpu, {threads} thread(s)" in where
    assert (f"other work on {4 - threads} of 4 cores" in where) == (threads < 4)


def test_threads_that_are_given_are_taken(machine, monkeypatch):
    machine(100, 100, 0, 0)
    torch.set_num_threads(3)
    for runtime in (Runtime("cpu"), Runtime("cpu", threads=3)):
        assert runtime.where == "cpu, 3 thread(s), fp32"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert Runtime("cpu", threads=0).where == "cpu, 3 thread(s), fp32"
    with pytest.raises(InvalidRun, match=r"--threads=-1: allowed are 1 to 1024"):
        Runtime("cpu", threads=-1)


def test_a_run_goes_on_with_the_threads_it_began_with(machine, caplog):
    machine(100, 100, 100, 0)
    (runtime := Runtime("cpu", threads=0)).keep_threads(2)
    assert torch.get_num_threads() == 2 and not caplog.records
    runtime.keep_threads(16)  # of another machine: there are four cores here
    assert torch.get_num_threads() == 4 and "began with 16 thread(s), goes on with 4" in caplog.text
    Runtime("cpu", threads=1).keep_threads(2)
    assert torch.get_num_threads() == 1 and "began with 2 thread(s), goes on with 1" in caplog.text


def test_a_cache_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(InvalidRun, match=f"--cache_dir={path}: is, or lies below, a file"):
            Runtime("cpu", cache_dir=str(path))


class Squares:
    """A set of 20 items, computed in batches; which of them have been computed."""

    def __init__(self, folder: Path) -> None:
        self.path, self.parts, self.stop = folder / "x-k.npz", folder / "parts" / "x-k", None
        self.seen, self.lengths = [], []

    def __call__(self, batch_size: int, stop: int | None = None) -> np.ndarray:
        """``stop``: the item at which the process is interrupted."""
        self.seen, self.lengths, self.stop = [], [], stop
        return Runtime("cpu").compute(self.path, "k", 20, batch_size, self.compute, description="squares")["square"]

    def compute(self, items: range) -> dict[str, np.ndarray]:
        if self.stop is not None and self.stop in items:
            raise KeyboardInterrupt
        self.seen += items
        self.lengths.append(len(items))
        return {"square": np.array(items) ** 2}


@pytest.fixture
def squares(tmp_path) -> Squares:
    """Interrupted when items 0 to 11 were done, in batches of 4."""
    interrupted = Squares(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        interrupted(4, stop=12)
    assert interrupted.seen == list(range(12))
    return interrupted


EXPECTED = np.arange(20) ** 2


@pytest.mark.parametrize("batch_size", [1, 4, 7, 100])
def test_finished_batches_serve_whatever_the_batch_size(squares, batch_size):
    assert np.array_equal(squares(batch_size), EXPECTED) and squares.seen == list(range(12, 20))
    assert squares.lengths == [batch_size] * (8 // batch_size) + [8 % batch_size] * (8 % batch_size > 0)
    assert not squares.parts.exists()
    squares.parts.mkdir()  # as a command leaves them that is killed before it deletes them
    assert np.array_equal(squares(batch_size), EXPECTED) and squares.seen == []
    assert not squares.parts.exists()


def test_finished_batches_serve_whatever_the_number_of_processes(squares):
    """Of three processes the second has items 6 to 12, two of which are in a batch of the first's."""
    runtime, found, squares.stop = Runtime("cpu"), [], None
    for process in range(3):
        runtime.__dict__["accelerator"] = SimpleNamespace(process_index=process, num_processes=3)
        share = runtime.share(20)
        batches = list(runtime_module._batches(squares.parts, "k", share, 5, squares.compute))
        assert [item for items, _ in batches for item in items] == list(share)
        found += [arrays["square"] for _, arrays in batches]
    assert np.array_equal(np.concatenate(found), EXPECTED)


def damage(parts: Path) -> None:
    (parts / "4-7.npz").write_bytes((parts / "4-7.npz").read_bytes()[:200])


def swap(parts: Path) -> None:
    content = (parts / "4-7.npz").read_bytes()
    (parts / "4-7.npz").write_bytes((parts / "8-11.npz").read_bytes())
    (parts / "8-11.npz").write_bytes(content)


def emptied(parts: Path) -> None:
    key = str(read_arrays(parts / "4-7.npz")["key"])
    np.savez(parts / "4-7.npz", key=key, checksum=files._checksum({"key": key, "square": EXPECTED[4:8]}))


@pytest.mark.parametrize("harm, again", [(damage, range(4, 8)), (swap, range(4, 12)), (emptied, range(4, 8))])
def test_batches_that_are_not_what_they_should_be_are_computed_again_and_only_those(squares, harm, again, caplog):
    harm(squares.parts)
    assert np.array_equal(squares(4), EXPECTED) and squares.seen == [*again, *range(12, 20)]
    assert f"{squares.parts / '4-7.npz'} is damaged and is computed again" in caplog.text


def test_one_command_computes_and_another_waits_and_takes_it(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(files, "_WAIT_SECONDS", 0.0)
    caplog.set_level(logging.INFO)
    squares, found = Squares(tmp_path), []
    with lock_held_elsewhere(tmp_path / ".x-k.npz.lock") as taken:
        assert taken
        waiting = threading.Thread(target=lambda: found.append(squares(4)))
        waiting.start()
        while "waiting for it" not in caplog.text:
            waiting.join(0.01)
        write_arrays(squares.path, key="k", square=EXPECTED + 1)  # what the other has computed
    waiting.join()
    assert np.array_equal(found[0], EXPECTED + 1) and squares.seen == []


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

        monkeypatch.setattr(runtime_module, "gather_object", gathered)

        def compute(items: range) -> dict[str, np.ndarray]:
            return {"images": np.array([[i, i] for i in items]), "nfe": np.array(items)}

        return both.compute(tmp_path / "result.npz", "key", 7, 2, compute, description="", large=("images",))

    other, main = started(1), started(0)
    assert other["images"][:, 0].tolist() == [3, 4, 5, 6]
    assert main["images"][:, 1].tolist() == main["nfe"].tolist() == list(range(7))
    again = started(1), started(0)
    assert again[0]["images"].tolist() == other["images"].tolist() and again[0]["nfe"].tolist() == list(range(7))
    assert again[1]["images"].tolist() == main["images"].tolist()
