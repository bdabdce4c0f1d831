"""How long main.py takes to answer: its help, a mistake, and the first step of training, in fresh processes.

python -m benchmarks.startup [--rounds=5]

``paper`` imports everything before it looks at the command line, as the public code does (ours: what ours needs; the
public code also imports TensorFlow).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from benchmarks.measure import in_turn
from experiment.command_line import command
from experiment.results import markdown_table

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_FIRST = "import runpy, sys, run_lib; sys.argv[0] = 'main.py'; runpy.run_path('main.py', run_name='__main__')"
TRAIN = ("main.py", "--config=configs/digits.py:u", "--mode=train", "--device=cpu")
ONE_STEP = ("--config.training.n_iters=1", "--config.training.snapshot_sampling=False")
# Arguments of Python, and what its output must have in it.
VARIANTS = {
    "paper: --help": (("-c", IMPORTED_FIRST, "--help"), "Folder of the run"),
    "--help": (("main.py", "--help"), "Folder of the run"),
    "a mistyped field": ((*TRAIN, "--config.training.n_itres=1"), "n_itres"),
    "train: one step and its checkpoint": ((*TRAIN, *ONE_STEP), "1/1"),
}


def run(*, rounds: int = 5) -> str:
    """Time the commands.

    Args:
        rounds: Processes of every command; the medians are printed.
    """
    with tempfile.TemporaryDirectory() as folder:
        variants = {name: partial(start, *variant, folder) for name, variant in VARIANTS.items()}
        timed = in_turn(variants, rounds, device=None, warm_up=0)
    rows = [(name, found.median, max(found.seconds)) for name, found in timed.items()]
    cells = [(name, f"{time:.2f}", f"{slowest:.2f}", f"{rows[0][1] / time:.1f}") for name, time, slowest in rows]
    return markdown_table(("command", "seconds", "slowest", "paper's time over it"), cells)


def start(arguments: tuple[str, ...], expected: str, folder: str, number: int) -> None:
    """Run ``python ARGUMENTS``; raise a ValueError unless its output has ``expected`` in it."""
    given = [sys.executable, *arguments, f"--workdir={folder}/{number}"]
    done = subprocess.run(given, cwd=ROOT, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    if expected not in output:
        raise ValueError((output.strip().splitlines() or ["no output"])[-1].removeprefix("error: "))


if __name__ == "__main__":
    command(run)
