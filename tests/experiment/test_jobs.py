"""Runs side by side: order, threads, failures and the end of the processes."""

from __future__ import annotations

import os
import time
from functools import partial
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import pytest
import torch
from job_tasks import Task, work

from experiment import jobs
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


def test_a_process_ends_when_its_parent_has_died(monkeypatch):
    class Exit(Exception):
        pass

    def end(status: int) -> None:
        raise Exit

    parents = iter([7, 7, 1])
    monkeypatch.setattr(os, "getppid", lambda: next(parents))
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0)
    with pytest.raises(Exit):
        jobs._exit_with_parent(7, RawValue("b", 0))
    assert list(parents) == []
