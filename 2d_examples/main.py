"""Section 3.2: train or evaluate one model of points in the plane, or make the table of all nine.

python -m 2d_examples.main --config=2d_examples/configs.py:DATASET-MODEL --workdir=W --mode=train
python -m 2d_examples.main --config=2d_examples/configs.py:DATASET-MODEL --workdir=W --mode=eval
python -m 2d_examples.main --mode=table --workdir=W [--seeds=5]
"""

from __future__ import annotations

import logging
import sys
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from experiment.command_line import available_cores, parse_flags


def main(argv: list[str]) -> None:
    options = flags.FLAGS
    if (options.mode == "table") != (options.config is None):
        sys.exit("error: --config: needed for --mode=train and eval; the table has all nine, without it")
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    import torch  # slow to import, which --help and a mistyped flag need not wait for
    from run_setup import Runtime
    from tqdm import tqdm

    from . import figures, table
    from .experiment import Run, evaluate, train

    # One thread, as in the table's processes, because the number of threads changes the rounding.
    torch.set_num_threads(1)
    workdir = Path(options.workdir)
    try:
        device = Runtime(options.device).accelerator().device
        if options.mode == "table":
            tasks = table.make_tasks(workdir, seeds=options.seeds, device=str(device))
            results = table.make_table(workdir, tasks, jobs=options.jobs)
            print(table.markdown(results))
            for path in figures.draw_table(workdir, results, tasks):
                print(path)
            return
        run = Run(options.config, workdir, device)
        step = run.load() if options.mode == "eval" else 0
        table.claim_run(run)
        if options.mode == "train":
            with tqdm(total=options.config.training.n_iters, unit="step", desc=f"train {workdir.name}") as bar:
                train(run, bar.update)
        else:
            for name, value in evaluate(run, run.model, step=step).items():
                print(f"{name:20} {value:.6g}")
            print(figures.draw_run(run))
    except (ValueError, FloatingPointError, OSError, BrokenProcessPool) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command resumes")


def define_flags() -> None:
    """Not on import: the other programs of this project define flags of the same names."""
    config_flags.DEFINE_config_file("config", None, "One model, for train and eval; override with --config.x.y=VALUE.")
    flags.DEFINE_string("workdir", None, "Folder of the run, or of the table: checkpoints, logs, results, figures.")
    flags.DEFINE_enum("mode", None, ["train", "eval", "table"], "What to do.")
    flags.DEFINE_integer("seeds", 5, "Seeds 0 … N−1 of the table.")
    flags.DEFINE_integer("jobs", available_cores(), "Processes that share the runs of the table, about 1 GB each.")
    flags.DEFINE_string("device", "cpu", "auto, cpu, cuda or mps; a GPU is no faster for networks as small as these.")
    flags.mark_flags_as_required(["workdir", "mode"])


if __name__ == "__main__":
    define_flags()
    app.run(main, flags_parser=parse_flags)
