"""Files of a workdir that are cut, zeroed, or have one wrong bit: the same result, or one line; never another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from programs import PROGRAMS, attempt, contents, differing, finish

pytestmark = pytest.mark.faults
FLIPS = 50
# What is written for people and read by no program.
UNREAD = {".png", ".md", ".lock"}


def damages(data: bytes, random: np.random.Generator) -> dict[str, bytes]:
    """A file's bytes, damaged in every way."""
    found = {"emptied": b"", "cut in half": data[: len(data) // 2], "zeroed": bytes(len(data))}
    for place in random.integers(8 * len(data), size=FLIPS if data else 0):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << (place % 8)
        found[f"bit {place} flipped"] = bytes(flipped)
    return found


@pytest.mark.parametrize(
    "name", ["eval", "sample", "train_classifier", "stats", "score", "audit", "2d_examples", "schrodinger_bridge"]
)
def test_damaged_file_of_a_finished_program(name, finished, tmp_path):
    """Started again, it ends with the same files, the damaged one restored or, where nothing reads it, as it is; or it
    refuses in one line. Every file but pictures and tables is damaged in 53 ways."""
    whole = finish(name, finished)
    check(name, whole, contents(whole), tmp_path)


def check(name: str, whole: Path, expected: dict[str, object], tmp_path: Path) -> None:
    random, counts, wrong = np.random.default_rng(0), {"the same": 0, "refused": 0}, []
    for path in sorted(path for path in whole.rglob("*") if path.is_file()):
        relative = path.relative_to(whole)
        if path.suffix in UNREAD or path.name == ".lock" or "tensorboard" in path.parts:
            continue
        for what, data in damages(path.read_bytes(), random).items():
            folder = tmp_path / "try"
            shutil.copytree(whole, folder)
            (folder / relative).write_bytes(data)
            outcome = attempt(PROGRAMS[name], folder)
            if outcome.status == 0:
                (folder / relative).unlink()  # if nothing reads it, it is as the damage left it
                different = [name for name in differing(contents(folder), expected) if name != str(relative)]
                wrong += [(str(relative), what, different)] if different else []
            elif not outcome.refusal:
                wrong.append((str(relative), what, outcome.said))
            counts["the same" if outcome.status == 0 else "refused"] += 1
            shutil.rmtree(folder)
    print(f"\n{name}: {counts}")
    assert wrong == []
