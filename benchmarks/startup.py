"""How long main.py takes to answer: its help, a mistake, and the first step of training, in fresh processes.

python -m benchmarks.startup [--device=cpu] [--precision=fp32] [--compile] [--config=configs/digits.py:u] [--rounds=5]

``paper`` imports everything before it looks at the command line, as the public code does (ours: what ours needs; the
public code also imports TensorFlow).
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from experiment.command_line import parse_flags

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_FIRST = "import runpy, sys, run_lib; sys.argv[0] = 'main.py'; runpy.run_path('main.py', run_name='__main__')"
"""``-c`` and this is main.py with all imports at the top."""
PAPER = "paper: --help"
HELP = "--help"
TRAIN = "train: one step and its checkpoint"


class Failed(ValueError):
    """A command did not do what it is timed for."""


def commands(config: str, runtime: Sequence[str], workdir: Path) -> dict[str, tuple[list[str], str]]:
    """Arguments of Python by variant, and what the output must have in it; ``runtime``: flags of main.py."""
    required = [f"--config={config}", f"--workdir={workdir}", "--mode=train", *runtime]
    one_step = ["n_iters=1", "snapshot_sampling=False"]
    help_text = "Folder of the run"
    return {
        PAPER: (["-c", IMPORTED_FIRST, "--help", *runtime], help_text),
        HELP: (["main.py", "--help", *runtime], help_text),
        "a mistyped field": (["main.py", *required, "--config.training.n_itres=1"], "n_itres"),
        TRAIN: (
            ["main.py", *required, *(f"--config.training.{field}" for field in one_step)],
            "1/1",
        ),
    }


def measure(arguments: list[str], expected: str) -> float:
    """Seconds from start to end of ``python ARGUMENTS``.

    Raises:
        Failed: the output does not have ``expected`` in it.
    """
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    output = done.stdout + done.stderr
    if expected not in output:
        raise Failed((output.strip().splitlines() or ["no output"])[-1].removeprefix("error: "))
    return seconds


def compare(config: str, runtime: Sequence[str], rounds: int) -> str:
    """The table: medians of so many fresh processes, the variants in turn.

    Raises:
        Failed: a command did not do what it is timed for, or a bad number.
    """
    from tqdm import tqdm

    if rounds < 1:
        raise Failed(f"--rounds={rounds}: at least 1")
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        names = list(commands(config, runtime, Path(folder)))
        with tqdm(total=rounds * len(names), unit="process") as bar:
            for round_number in range(rounds):
                workdir = Path(folder) / str(round_number)
                for name, (arguments, expected) in commands(config, runtime, workdir).items():
                    seconds.setdefault(name, []).append(measure(arguments, expected))
                    bar.update()
    paper = statistics.median(seconds[PAPER])
    lines = [
        f"{config} {' '.join(runtime)}, medians of {rounds} processes\n",
        "| command | seconds | slowest | paper's time over it |",
        "|---|---|---|---|",
    ]
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = "–" if name == TRAIN else f"{paper / median:.1f}"  # which does more than to answer
        lines.append(f"| {name} | {median:.2f} | {max(values):.2f} | {ratio} |")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    try:
        runtime = [f"--device={given.device}", f"--precision={given.precision}"] + ["--compile"] * given.compile
        print(compare(given.config, runtime, given.rounds))
    except Failed as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    flags.DEFINE_string("config", "configs/digits.py:u", "What is trained for a step.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps: passed on.")
    flags.DEFINE_string("precision", "fp32", "fp32, bf16 or fp16: passed on.")
    flags.DEFINE_bool("compile", False, "Passed on.")
    flags.DEFINE_integer("rounds", 5, "Processes of every command; the medians are printed.")
    app.run(main, flags_parser=parse_flags)
