"""A disk that is full ends every program in one line, and with more room the same call goes on to the same result."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import PROGRAMS, attempt, contents, differing, finish, prepare

pytestmark = pytest.mark.faults


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB, or makes it larger or smaller."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kib: int) -> Path:
        how = "remount," if folder.is_mount() else ""
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={kib}k", "tmpfs", folder]
        subprocess.run(command, check=True, capture_output=True)
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_full_disk_ends_in_one_line_and_the_same_call_goes_on(name, disk, finished, tmp_path):
    """At whatever it is that does not fit: lock, log, checkpoint, grid, batch, result. After each refusal the disk
    grows by a tenth of what the program has written, or by a page."""
    expected = contents(finish(name, finished))
    folder = disk(1_000_000) / name  # which reports show
    prepare(name, folder, finished)
    begun = kib = max(8, shutil.disk_usage(folder.parent).used // 1024)
    refused = []
    while (outcome := attempt(PROGRAMS[name], disk(kib) / name)).status != 0:
        said = re.search(rf"cannot write ({folder}\S*): No space left on device; free some space", outcome.refusal)
        assert said, outcome.said
        refused.append(said[1])
        kib += max(4, (kib - begun) // 10)
    assert differing(contents(folder), expected) == []
    print(f"\n{name}: refused {len(refused)} times, at {len(set(refused))} files")
    assert len(refused) >= 3
