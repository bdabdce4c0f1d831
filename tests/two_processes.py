"""What test_several_processes starts with torchrun, in two processes: python tests/two_processes.py PART FOLDER.

PART is ``train``, every run of ``RUNS`` and a Schrödinger bridge, and samples of one run; or ``evaluate``, that run,
until one process is killed.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import run_lib  # noqa: E402
from configs.digits import get_config  # noqa: E402
from configs.dsb import digits as dsb_digits  # noqa: E402
from experiment import runtime as experiment_runtime  # noqa: E402
from experiment.runtime import Runtime  # noqa: E402
from schrodinger_bridge.half_bridges import BridgeRun  # noqa: E402
from training import Trainer  # noqa: E402

CPU = run_lib.Runtime(device="auto")

# The last layer does not start at zero and there is no warm-up: a QC term that is nothing would agree with anything.
# Adam's ε is above the rounding of gradients, which it would else turn into whole steps where a gradient vanishes.
SETTINGS = {
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "model.init_scale": 1.0,
    "model.dropout": 0.2,
    "optim.warmup": 0,
    "optim.eps": 1e-4,
    "training.batch_size": 8,
    "training.n_iters": 6,
    "training.log_freq": 2,
    "training.eval_freq": 3,
    "training.snapshot_freq": 4,
    "training.snapshot_freq_for_preemption": 2,
    "training.snapshot_sampling": False,
    "data.random_flip": True,
    "sampling.num_steps": 3,
    "likelihood.solver": "heun",
    "likelihood.num_steps": 2,
    "eval.features": "user_classes:moments",
    "eval.batch_size": 8,
    "eval.nll_images": 35,
    "eval.num_samples": 21,
    "sampling.num_samples": 21,
    "eval.asym_levels": 3,
    "eval.asym_images": 7,
}
QC = {
    "training.qc_probes": 2,
    "training.qc_interval": 2,
    "training.qc_stride": 2,
    "training.activation_checkpointing": True,
}
CLASSES = {"model.num_classes": 10, "training.label_dropout": 0.3, "sampling.condition": "class_free"}
# Name: model, overrides, accumulation steps.
RUNS = {
    "u": ("u", {"training.snapshot_sampling": True}, 1),
    "c, begun by one process": ("c", {}, 1),
    "qc, accumulated, stopped by a signal": ("qc", QC, 2),
    "classes": ("u", CLASSES, 1),
}
BEGUN = 3  # steps
STOPPED = 3


BRIDGE = {
    "bridge.num_ipf": 1,
    "bridge.num_steps": 4,
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "model.init_scale": 1.0,
    "optim.eps": 1e-4,
    "training.n_iters": 6,
    "training.batch_size": 8,
    "training.cache_size": 32,
    "training.refresh_freq": 4,
    "training.log_freq": 2,
    "training.save_freq": 3,
    "evaluation.num_samples": 12,
    "evaluation.num_sets": 2,
    "evaluation.batch_size": 8,
}


def train_bridge(workdir: Path) -> BridgeRun:
    """Digits to digits: images, noise and batches are shared out, gradients averaged."""
    config = dsb_digits.get_config("3-8")
    config.update_from_flattened_dict(BRIDGE)
    run = BridgeRun(config, workdir, Runtime("auto"))
    run.train()
    return run


def config_of(name: str):
    model, overrides, _ = RUNS[name]
    config = get_config(model)
    config.update_from_flattened_dict(SETTINGS | overrides)
    config.training.n_iters = SETTINGS["training.n_iters"]
    return config


def runtime_of(name: str) -> run_lib.Runtime:
    return dataclasses.replace(CPU, accumulation_steps=RUNS[name][2])


def train_with_a_signal(name: str, workdir: Path) -> int:
    """Let the second process get SIGTERM in one of the steps; returns the step at which all have stopped."""
    take_step = Trainer.train_step

    def step_with_signal(self) -> None:
        take_step(self)
        if self.step == STOPPED and self.accelerator.process_index == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    Trainer.train_step = step_with_signal
    try:
        run_lib.train(config_of(name), workdir, runtime_of(name))
    except run_lib.Interrupted as interruption:
        assert interruption.signal_number == signal.SIGTERM
    else:
        raise AssertionError("it did not stop")
    finally:
        Trainer.train_step = take_step
    return max(int(path.stem[5:]) for path in (workdir / "checkpoints").glob("step_*.pt"))


def evaluate_until_killed(workdir: Path) -> None:
    write = experiment_runtime.write_arrays

    def write_and_die(path: Path, **arrays) -> None:
        write(path, **arrays)
        if path.parent.parent.name == "parts" and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)

    experiment_runtime.write_arrays = write_and_die
    run_lib.evaluate(config_of("u"), workdir, CPU)


def train(folder: Path) -> None:
    from accelerate.state import AcceleratorState, GradientState

    for name in RUNS:
        if "signal" in name:
            assert STOPPED < train_with_a_signal(name, folder / name) <= STOPPED + 2
        run_lib.train(config_of(name), folder / name, runtime_of(name))
        # accelerate keeps these for the life of the process; the processes stay connected.
        AcceleratorState._reset_state()
        GradientState._reset_state()
    train_bridge(folder / "bridge")
    AcceleratorState._reset_state()
    GradientState._reset_state()
    run_lib.sample(config_of("u"), folder / "u", CPU)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "train":
        train(Path(sys.argv[2]))
    else:
        evaluate_until_killed(Path(sys.argv[2]) / "u")
