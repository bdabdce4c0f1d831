"""Runs side by side: order, threads, failures and the end of the processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from documents import ROOT
from job_tasks import Task, work

from experiment.jobs import run_all


def run(tasks: list[Task], jobs: int) -> list[dict]:
    by_name = {str(task): partial(work, task) for task in tasks}
    return run_all(by_name, jobs=jobs, total=3 * len(tasks), unit="step", description="runs")


def test_results_in_order_on_one_thread_whatever_the_number_of_jobs(capsys):
    torch.set_num_threads(2)
    try:
        alone = run([Task(k) for k in range(5)], jobs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert {result.pop("pid") for result in alone} == {os.getpid()}
    assert {result.pop("ctrl_c_blocked") for result in alone} == {False}
    assert "15/15" in capsys.readouterr().err

    together = run([Task(k) for k in range(5)], jobs=2)
    pids = {result.pop("pid") for result in together}
    assert os.getpid() not in pids
    assert {result.pop("ctrl_c_blocked") for result in together} == {True}
    assert together == alone
    assert [result["index"] for result in alone] == list(range(5))
    assert {result["threads"] for result in alone} == {1}
    assert "15/15" in capsys.readouterr().err


def test_no_more_processes_than_tasks():
    (result,) = run([Task(0)], jobs=8)
    assert result["pid"] == os.getpid()
    assert run([], jobs=8) == []


def test_failure_in_this_process_names_the_task_and_stops_the_rest(tmp_path):
    threads = torch.get_num_threads()
    tasks = [Task(0, "work", str(tmp_path)), Task(1, "fail", str(tmp_path)), Task(2, "work", str(tmp_path))]
    with pytest.raises(FloatingPointError, match=r"^task 1: not finite$"):
        run(tasks, jobs=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]
    with pytest.raises(KeyboardInterrupt):
        run([Task(0, "interrupt")], jobs=1)
    assert torch.get_num_threads() == threads


def test_at_least_one_job():
    with pytest.raises(ValueError, match="jobs=0: at least 1"):
        run([Task(0)], jobs=0)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def pids(folder: Path) -> list[int]:
    return [int(path.read_text() or 0) for path in folder.iterdir()]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_failure_in_another_process_names_the_task_and_ends_the_rest(tmp_path):
    started = time.monotonic()
    with pytest.raises(FloatingPointError, match=r"^task 1: not finite$"):
        run([Task(0, "wait", str(tmp_path)), Task(1, "fail", str(tmp_path)), Task(2, "wait", str(tmp_path))], jobs=2)
    assert time.monotonic() - started < 55  # the tasks that wait take 60 s
    assert pids(tmp_path) and not any(map(running, pids(tmp_path)))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_processes_end_when_their_parent_is_killed(tmp_path):
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], cwd=ROOT / "tests", env=ENVIRONMENT)
    try:
        wait_until(lambda: len(list(tmp_path.iterdir())) == 2 and all(pids(tmp_path)))
    finally:
        parent.kill()
        parent.wait()
    wait_until(lambda: not any(map(running, pids(tmp_path))))  # the tasks take 60 s


PARENT = """
import sys
from functools import partial
from job_tasks import Task, work
from experiment.jobs import run_all

if __name__ == "__main__":
    tasks = {str(k): partial(work, Task(k, "wait", sys.argv[1])) for k in range(2)}
    run_all(tasks, jobs=2, total=2, unit="step", description="runs")
"""
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 50
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
