"""Every program, killed at 20 random and at 20 chosen moments and started again, ends with the very same files."""

from __future__ import annotations

import os
import shutil
import signal
import time

import numpy as np
import pytest
from programs import PROGRAMS, attempt, contents, count_changes, differing, finish, on_change, prepare

pytestmark = pytest.mark.faults
TRIES = 20


@pytest.mark.parametrize("name", PROGRAMS)
def test_killed_at_any_moment_and_started_again(name, finished, tmp_path):
    """Random moments are uniform in time. Chosen ones lie right before a file or folder is made, renamed or removed,
    evenly spaced among all such changes."""
    program, expected = PROGRAMS[name], contents(finish(name, finished))
    folder = tmp_path / "counted" / name  # which reports show
    prepare(name, folder, finished)
    began = time.monotonic()
    changes = count_changes(program, folder)
    duration = time.monotonic() - began
    assert differing(contents(folder), expected) == []  # it is deterministic to begin with

    def kill_at(moment: int) -> None:
        on_change(folder, lambda number: number == moment and os.kill(os.getpid(), signal.SIGKILL))

    killed = 0
    random = np.random.default_rng(0)
    moments = np.unique(np.linspace(1, changes, TRIES).round().astype(int)).tolist()
    tries = [dict(kill_after=seconds) for seconds in random.uniform(0, duration, TRIES)]
    tries += [dict(disturb=lambda moment=moment: kill_at(moment)) for moment in moments]
    for number, disturbance in enumerate(tries):
        folder = tmp_path / f"try_{number}" / name
        prepare(name, folder, finished)
        outcome = attempt(program, folder, **disturbance)
        assert outcome.status in (0, -signal.SIGKILL), outcome.said
        killed += outcome.status != 0
        again = attempt(program, folder)
        assert again.status == 0, (disturbance, again.said)
        assert differing(contents(folder), expected) == [], disturbance
        shutil.rmtree(folder)
    print(f"\n{name}: killed {killed} times of {len(tries)}, at {len(moments)} of {changes} changes of files")
    assert killed >= len(moments)
