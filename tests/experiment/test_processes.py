"""Several processes are given the same, and none outlives another that failed or was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_run_lib import CPU, ROOT, environment, tiny_config

import run_lib
from experiment import processes, runtime
from experiment.runtime import InvalidRun, Runtime

OTHER = "process 1 on there"


class Exited(Exception):
    pass


@pytest.fixture
def watch(monkeypatch, capsys):
    """Lets process 0 watch two others; ``end`` is called with the other ends, and what process 0 did is returned."""
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.05)

    def exited(status: int) -> None:
        raise Exited(status)

    monkeypatch.setattr(os, "_exit", exited)

    def run(end, failed: bool = False) -> tuple[bool, str]:
        pairs = [socket.socketpair() for _ in range(2)]
        with contextlib.ExitStack() as stack:
            mine, others = zip(*[[stack.enter_context(end) for end in pair] for pair in pairs], strict=True)
            event = threading.Event()
            if failed:
                event.set()
            end(*others)
            try:
                processes._watch(dict(zip(mine, (OTHER, "process 2"), strict=True)), event)
            except Exited:
                others[1].settimeout(1)
                return True, capsys.readouterr().err + others[1].recv(1000).decode()
            return False, capsys.readouterr().err

    return run


def test_a_killed_process_ends_the_others(watch):
    """Its connection is closed; whoever sees that says so, here and to those that do not."""
    ended, said = watch(lambda one, two: one.close())
    assert ended and said.count(f"{OTHER} was killed") == 2


def test_a_process_that_fails_says_why(watch):
    ended, said = watch(lambda one, two: one.sendall(f"{OTHER} failed: no space\n".encode()))
    assert ended and said.count(f"{OTHER} failed: no space") == 2
    # All of them fail: each in its own words.
    ended, said = watch(lambda *ends: [end.sendall(b"process 1 failed: no space\n") for end in ends], failed=True)
    assert not ended and said == ""


def test_processes_that_end_well_end_alone(watch):
    assert watch(lambda *ends: [(end.sendall(b"\n"), end.close()) for end in ends]) == (False, "")


def test_nothing_is_left_waiting(monkeypatch):
    """The block ends when the other process has done it, too, and the thread that waited for it has ended by then."""
    mine, other = socket.socketpair()
    monkeypatch.setattr(processes, "_connect", lambda *_: {mine: OTHER})
    before = threading.enumerate()
    with mine, other:
        later = threading.Timer(0.3, other.sendall, [b"\n"])
        later.start()
        with processes.watched(0, 2):
            pass
        assert set(threading.enumerate()) <= {*before, later}


@pytest.fixture
def beside(monkeypatch):
    """Two processes, of which this is the first, and ``beside(change)`` what the second was given."""
    monkeypatch.setattr(processes, "watched", lambda *_: contextlib.nullcontext())

    def start(change) -> Runtime:
        monkeypatch.setattr(runtime, "gather_object", lambda values: [*values, {**values[0], **change}])
        both = Runtime("cpu")
        both.__dict__["accelerator"] = SimpleNamespace(num_processes=2, process_index=0)
        return both

    return start


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--config.optim.lr": 0.5}, "--config.optim.lr is 0.5, not 0.001"),
        ({"--config.eval.num_samples": 30, "--x": 1}, "--config.eval.num_samples is 30, not 20; --x is 1, not None"),
        ({"--precision": "bf16"}, "--precision is 'bf16', not 'tf32'"),
        ({"--mode": "stat"}, "--mode is 'stat', not '"),
        ({"the code": "v2"}, "the code is 'v2', not '"),
    ],
)
def test_processes_that_were_given_different_things_are_refused(beside, tmp_path, change, message):
    """In every mode, before any work."""
    for recipe in (run_lib.train, run_lib.evaluate, run_lib.sample, run_lib.statistics, run_lib.train_classifier):
        with pytest.raises(InvalidRun) as error:
            recipe(tiny_config(), tmp_path / "w", beside(change))
        assert f"process 1 was given other things than process 0: {message}" in str(error.value)
    assert not (tmp_path / "w").exists()


def finished(workdir: Path, mode: str, what: str, who: int) -> list[tuple[int, float, str]]:
    """Two processes without a launcher, of which one fails: of each the exit status, seconds since, the last line."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environ = {**environment(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/one_of_two.py"), str(workdir), mode, what]
    both = []
    for rank in map(str, range(2)):
        own = environ | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "WHO": str(who)}
        both.append(subprocess.Popen(command, env=own, cwd=ROOT, stderr=subprocess.PIPE, text=True, errors="replace"))
    said: dict[int, str] = {}
    ends: dict[int, float] = {}

    def wait_for(number: int) -> None:
        said[number] = both[number].communicate(timeout=300)[1]
        ends[number] = time.time()

    threads = [threading.Thread(target=wait_for, args=(number,)) for number in range(2)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for process in both:
            process.kill()
    mark = Path(f"{workdir}.failed")
    since = float(mark.read_text()) if mark.exists() else 0.0
    return [(both[n].returncode, ends[n] - since, ["", *said[n].splitlines()][-1]) for n in range(2)]


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mode", "what", "who"),
    [
        ("train", "killed", 0),
        ("train", "full", 1),
        ("train", "defect", 0),
        ("evaluate", "killed", 1),
        ("evaluate", "full", 0),
        ("sample", "defect", 1),
        ("bridge", "killed", 1),
        ("bridge", "full", 0),
    ],
)
def test_when_one_fails_the_other_ends(tmp_path, mode, what, who):
    """Within a minute, however busy, and says which one and why; without a launcher, as hosts are to each other."""
    workdir = tmp_path / "w"
    if mode in ("evaluate", "sample"):
        run_lib.train(tiny_config(training__n_iters=2), workdir, CPU)
    both = finished(workdir, mode, what, who)
    (own_status, *_), (status, seconds, line) = both[who], both[1 - who]
    reason = {"killed": " was killed", "full": " failed: [Errno 28] No space left", "defect": " failed: a defect"}[what]
    assert own_status == (-signal.SIGKILL if what == "killed" else 1)
    assert status == 1 and seconds < 60, both
    assert line.startswith(f"error: process {who} on {socket.gethostname()}{reason}"), both


@pytest.mark.faults
@pytest.mark.parametrize(
    ("mode", "change"), [("train", "optim.lr=0.5"), ("statistics", "eval.num_reference=9"), ("bridge", "optim.lr=0.5")]
)
def test_two_processes_given_different_things_end(tmp_path, mode, change):
    both = finished(tmp_path / "w", mode, change, 1)
    name, value = change.split("=")
    for status, _, line in both:
        assert status == 1 and f"given other things than process 0: --config.{name} is {value}" in line, both
    assert not (tmp_path / "w").exists()
