"""Section 3.2: train or evaluate one model of points in the plane, or make the table of all nine.

python -m 2d_examples.main --config=2d_examples/configs.py:DATASET-MODEL --workdir=W --mode=train
python -m 2d_examples.main --config=2d_examples/configs.py:DATASET-MODEL --workdir=W --mode=eval
python -m 2d_examples.main --mode=table --workdir=W [--seeds=5] [--jobs=2]
"""

from functools import partial
from itertools import product
from pathlib import Path

import torch
from ml_collections import ConfigDict

from experiment.command_line import available_cores, check_positive, command
from experiment.files import claim
from experiment.jobs import run_all
from experiment.results import write_results
from experiment.runtime import Runtime

from .configs import DATASETS, MODELS, get_config
from .experiment import check, claim_run, evaluate, train_and_evaluate, trained_model, trainer
from .figures import draw_table
from .table import EXACT, markdown, paired_differences


def run(
    workdir: str | Path,
    mode: str,
    *,
    config: ConfigDict | None = None,
    seeds: int = 5,
    jobs: int = available_cores(),
    device: str = "cpu",
) -> str | None:
    """Train or evaluate one model, or make the table; return what is to be printed.

    Args:
        workdir: W, of the run or of the table, for checkpoints, logs, results and figures.
        mode: train, eval or table.
        config: one model, for train and eval; override fields with --config.x.y=VALUE.
        seeds: N, for the seeds 0 … N − 1 of the table.
        jobs: processes that share the runs of the table, about 1 GB each; they change no result.
        device: auto, cpu or cuda; a GPU is no faster for networks as small as these.

    Raises:
        ValueError: bad input, or a workdir that belongs to something else; nothing has been computed then.
    """
    if mode not in ("train", "eval", "table"):
        raise ValueError(f"--mode={mode}: allowed are train, eval, table")
    if (mode == "table") != (config is None):
        raise ValueError("--config: needed for --mode=train and eval; the table has all nine, without it")
    folder, runtime = Path(workdir), Runtime(device)
    device = runtime.torch_device.type
    if device == "mps":
        raise ValueError("--device=mps: the exact densities need double precision, which it does not have; use cpu")
    if mode == "table":
        return make_table(folder, seeds=seeds, jobs=jobs, device=device)

    check(config)
    if mode == "train":
        claim_run(config, folder, device)
        return trainer(config, folder, runtime).run()
    trained_model(config, folder)  # if there is none nothing is written, and what is used is read in a claimed folder
    claim_run(config, folder, device)
    model, step = trained_model(config, folder)
    record = evaluate(config, folder, model.to(device), step=step, device=device)
    return "\n".join(f"{name:20} {value:.6g}" for name, value in record.items())


def make_table(workdir: Path, *, seeds: int, jobs: int, device: str) -> str:
    """Train and evaluate every pair with every seed, or what is left of that; write results, table and figures."""
    check_positive(seeds=seeds, jobs=jobs)
    claim(workdir, "2d_examples table", {"device": device})
    configs = {(dataset, EXACT, 0): get_config(f"{dataset}-u") for dataset in DATASETS}
    for seed, dataset, model in product(range(seeds), DATASETS, MODELS):
        configs[dataset, model, seed] = get_config(f"{dataset}-{model}")
        configs[dataset, model, seed].seed = seed
    folders = {run: workdir / "runs" / f"{run[0]}-{run[1]}" / f"seed_{run[2]}" for run in configs}
    tasks = {
        f"{run[0]}-{run[1]}, seed {run[2]}": partial(train_and_evaluate, config, folders[run], device, run[1] == EXACT)
        for run, config in configs.items()
    }
    total = sum(config.training.n_iters for run, config in configs.items() if run[1] != EXACT)
    records = run_all(tasks, jobs=jobs, total=total, unit="step", description="2-D examples")
    names = ("dataset", "model", "seed")
    rows = [dict(zip(names, run, strict=True)) | record for run, record in zip(configs, records, strict=True)]
    differences = paired_differences(rows)
    results = {"experiment": "2d_examples", "seeds": seeds, "rows": rows, "paired_differences": differences}
    return write_results(workdir, results, markdown(rows, differences), draw_table(configs, folders, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)  # as in the table's processes, because the number of threads changes the rounding
    command(run)
