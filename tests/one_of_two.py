"""One of the two processes of experiment/test_processes: python tests/one_of_two.py FOLDER MODE WHAT.

To process ``$WHO`` WHAT happens in the middle of its work: killed, full, defect; or it was given
another value than the other, FIELD=VALUE. Rank and address are in the variables that torch.distributed reads.
"""

from __future__ import annotations

import ast
import os
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from test_run_lib import tiny_config  # noqa: E402
from two_processes import BRIDGE  # noqa: E402

import run_lib  # noqa: E402
from configs.dsb import digits as dsb_digits  # noqa: E402
from experiment import runtime as experiment_runtime  # noqa: E402
from experiment.command_line import run_main  # noqa: E402
from schrodinger_bridge import main as schrodinger_bridge  # noqa: E402
from training import Trainer  # noqa: E402


def main(argv: list[str]) -> None:
    _, folder, mode, what = argv
    who = int(os.environ["WHO"])
    torch.set_num_threads(1)
    mine = int(os.environ["RANK"]) == who
    config = dsb_digits.get_config("3-8") if mode == "bridge" else tiny_config(training__n_iters=200)
    if mode == "bridge":
        config.update_from_flattened_dict(BRIDGE | {"training.n_iters": 200})
    if "=" in what and mine:
        field, _, value = what.partition("=")
        config.update_from_flattened_dict({field: ast.literal_eval(value)})

    def happen() -> None:
        if not mine:
            if mode in ("evaluate", "sample"):
                time.sleep(200)  # busy for long
            return
        Path(f"{folder}.failed").write_text(str(time.time()))
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "full":
            raise OSError(28, "No space left on device", "some.npz")
        elif what == "defect":
            raise RuntimeError("a defect")

    if mode in ("train", "bridge"):
        step = Trainer.train_step

        def step_and_fail(self) -> None:
            step(self)
            if self.step == 3 and mine:
                happen()

        Trainer.train_step = step_and_fail
    else:
        write = experiment_runtime.write_arrays

        def write_and_fail(path: Path, **arrays: object) -> None:
            write(path, **arrays)
            happen()

        experiment_runtime.write_arrays = write_and_fail
    if mode == "bridge":
        schrodinger_bridge.run(config, folder)
    else:
        getattr(run_lib, mode)(config, folder, run_lib.Runtime("auto"))


if __name__ == "__main__":
    run_main(main, words=True)
