"""Whatever a command stumbles over, it ends with one line."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STOPPED = "stopped; the same command resumes\n"


def answer(program: str) -> str:
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode
    return ended.stderr


def test_an_interruption_while_modules_are_imported_ends_in_one_line():
    assert answer("import experiment, os, signal; os.kill(os.getpid(), signal.SIGINT)") == STOPPED


def test_all_programs_can_be_interrupted_from_the_first_import_on():
    """A package's __init__ is what ``python -m`` imports first."""
    paths = [path for path in ROOT.glob("*/*.py") if path.parent.name not in ("experiment", "tests")]
    programs = [path for path in paths if '__name__ == "__main__"' in path.read_text()]
    assert len(programs) > 15
    for path in (ROOT / "main.py", *{program.parent / "__init__.py" for program in programs}):
        first = re.search(r"^(?:import|from) (?!__future__)(\w+)", path.read_text(), re.MULTILINE)
        assert first and first[1] == "experiment", path


def test_mistake_in_a_list_is_answered_in_one_line(tmp_path):
    program = "from experiment.command_line import command\ndef run(workdir, steps=(8, 16)): raise SystemExit('work')\n"
    said = answer(f"import sys; sys.argv += ['--workdir={tmp_path}', '--steps=8,x']\n{program}command(run)")
    assert said == "error: --steps=8,x: allowed are integers, separated by commas\n"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        # What numpy makes of an interruption, within main.
        ("try: os.kill(os.getpid(), signal.SIGINT)\n    except KeyboardInterrupt: raise ImportError('numpy')", STOPPED),
        ("raise MemoryError", "error: not enough memory for what is computed at once: MemoryError:\n"),
        ("raise RuntimeError('std::bad_alloc')", "error: not enough memory for what is computed at once: RuntimeError"),
    ],
    ids=("interruption", "MemoryError", "bad_alloc"),
)
def test_faults_within_a_command(fault, message):
    program = "import os, signal\nfrom experiment.command_line import run_main\ndef main(argv):\n    "
    said = answer(f"{program}{fault}\nrun_main(main)")
    assert said.startswith(message) and said.count("\n") == 1
