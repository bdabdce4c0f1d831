"""A disk that fills at every size: one line that names a file, nothing lost, and the same result once there is room."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from programs import PROGRAMS, attempt, contents, differing, finish, prepare

pytestmark = pytest.mark.faults
SIZES = 20


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("finished")


@pytest.mark.parametrize("name", PROGRAMS)
def test_full_disk(name, finished, tmp_path):
    whole = finish(name, finished)
    expected, disk = contents(whole), tmp_path / "disk"
    disk.mkdir()
    begun = finished / PROGRAMS[name].after if PROGRAMS[name].after else None
    smallest, largest = (0 if folder is None else size_of(folder) for folder in (begun, whole))
    refused = 0
    for size in np.linspace(smallest + 30_000, 1.3 * largest + 100_000, SIZES).astype(int):
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=False)
        if mounted.returncode:
            pytest.skip("mounting a small disk needs the rights of root")
        try:
            folder = disk / "w"
            prepare(name, folder, finished)
            outcome = attempt(PROGRAMS[name], folder)
            if outcome.status != 0:
                assert "No space left on device" in outcome.refusal and str(disk) in outcome.refusal, outcome.said
                refused += 1
            elsewhere = tmp_path / "w"
            shutil.copytree(folder, elsewhere) if folder.exists() else prepare(name, elsewhere, finished)
        finally:
            subprocess.run(["umount", str(disk)], check=True)
        again = attempt(PROGRAMS[name], elsewhere)
        assert again.status == 0, again.said
        assert differing(contents(elsewhere), expected) == []
        shutil.rmtree(elsewhere)
    print(f"\n{name}: full {refused} times of {SIZES}")
    assert 0 < refused < SIZES


def size_of(folder: Path) -> int:
    """Bytes on a disk of pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 + 4096 for path in folder.rglob("*"))
