"""The programs in small, each run in a forked process that can be killed or disturbed, and what they leave in a folder.

A fork costs nothing, where a start of Python with torch costs five seconds: hundreds of tries take minutes.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from from_config import get_dataset  # noqa: F401  imported before the fork, as are all below
from small_settings import BRIDGE, PLANE, small_study
from test_run_lib import tiny_config, without_times

import run_lib
from autoencoder_example import main as autoencoder
from checkpoints import read_checkpoint
from configs.wasserstein.digits import get_config as wasserstein_config
from experiment.runtime import Runtime
from gaussian_example import main as gaussian
from qc_study import main as study
from report import audit
from report import main as report
from schrodinger_bridge import compare
from schrodinger_bridge import main as bridge
from tutorial_example import epsilon_and_score, scarce_data
from tutorial_example import main as tutorial
from wasserstein_example import digits as wasserstein_digits
from wasserstein_example import main as wasserstein
from wasserstein_example import theory

plane = importlib.import_module("2d_examples.main")
plane_config = importlib.import_module("2d_examples.configs").get_config
bridge_config = importlib.import_module("configs.dsb.2d").get_config

TINY_CLASSIFIER = {"nf": 8, "n_iters": 8, "batch_size": 8, "log_freq": 3, "save_freq": 2}


def runtime() -> Runtime:
    return Runtime("cpu")


def run_config():
    config = tiny_config("qc", training__snapshot_sampling=True, training__snapshot_freq=6)
    config.eval.num_reference = 100
    config.classifier.update(TINY_CLASSIFIER)
    return config


def inpainting():
    config = run_config()
    config.sampling.update(condition="inpaint", num_images=3)
    return config


def run_gaussian(workdir: Path) -> None:
    gaussian.REPETITIONS = 4
    gaussian.run(workdir, epsilons=(100.0,))


def run_plane(workdir: Path) -> None:
    def tiny(name: str):
        config = plane_config(name)
        config.update_from_flattened_dict(PLANE)
        return config

    plane.DATASETS, plane.get_config = ["gaussian_8"], tiny
    plane.run(workdir, "table", seeds=1, jobs=1)


def run_theory(workdir: Path) -> None:
    theory.LONG_STEPS, theory.EPSILONS, theory.HORIZON_EPSILON = (2**9, 2**10), (0.4, 0.2), 0.2
    wasserstein.run(str(workdir), steps=(16, 8, 64), dimensions=(4, 1))


def run_wasserstein_digits(workdir: Path) -> None:
    def tiny(process: str):
        config = wasserstein_config(process)
        config.training.update(n_iters=4, batch_size=4, snapshot_freq_for_preemption=1)
        config.eval.update(num_samples=40, batch_size=20)
        return config

    import features.classifier

    features.classifier._IMAGES_SEEN = 1
    wasserstein_digits.get_config = tiny
    options = dict(seeds=1, jobs=1, steps=(2,), ancestral_steps=(), heun_steps=(2,))
    wasserstein_digits.run(str(workdir), processes=("ve_v1",), **options)


def run_audit(workdir: Path) -> None:
    audit.time = SimpleNamespace(perf_counter=lambda: 0.0)  # for the seconds are in its results
    os.chdir(workdir)  # models are shown as they are named
    audit.audit(run_config(), workdir, runtime(), ".,export")


def run_study(workdir: Path) -> None:
    small_study(pytest.MonkeyPatch())
    study.measure_costs = lambda *_: {"qc": 3.7, "lazy": 1.7, "placebo": 4.8}
    study.run(str(workdir), seeds=1, jobs=1)


def tiny_bridge(pair: str):
    config = bridge_config(pair)
    config.update_from_flattened_dict(BRIDGE | {"bridge.num_ipf": 1, "evaluation.num_sets": 1})
    return config


def run_comparison(workdir: Path) -> None:
    compare.get_config = tiny_bridge
    compare.run(str(workdir), ("moons",), jobs=1)


def run_tutorial(workdir: Path) -> None:
    tutorial.FIGURES = {"epsilon_and_score": 36, "scarce_data": 36}
    epsilon, scarce = epsilon_and_score.run, scarce_data.run
    epsilon_and_score.run = lambda folder, update: epsilon(folder, update, points=50)
    scarce_data.run = lambda folder, update: scarce(folder, update, n_iters=12, num_train=1000)
    try:
        tutorial.run(workdir, jobs=1)
    except SystemExit as error:  # of models trained for twelve steps not everything holds
        assert "not everything that must hold does" in str(error)


@dataclass(frozen=True)
class Program:
    """What it does in a folder, and which program's finished folder it begins with."""

    run: Callable[[Path], object]
    after: str = ""


PROGRAMS = {
    "train": Program(lambda workdir: run_lib.train(run_config(), workdir, runtime())),
    "sample, inpainting": Program(lambda workdir: run_lib.sample(inpainting(), workdir, runtime()), after="train"),
    "eval": Program(lambda workdir: run_lib.evaluate(run_config(), workdir, runtime()), after="train"),
    "sample": Program(lambda workdir: run_lib.sample(run_config(), workdir, runtime()), after="train"),
    "stats": Program(lambda workdir: run_lib.statistics(run_config(), workdir, runtime())),
    "train_classifier": Program(lambda workdir: run_lib.train_classifier(run_config(), workdir, runtime())),
    "gaussian_example": Program(run_gaussian),
    "2d_examples": Program(run_plane),
    "autoencoder_example": Program(
        lambda workdir: autoencoder.run(workdir, seeds=1, estimator="exact", n_iters=600, jobs=1)
    ),
    "wasserstein_example": Program(run_theory),
    "wasserstein_example.digits": Program(run_wasserstein_digits),
    "schrodinger_bridge": Program(lambda workdir: bridge.run(tiny_bridge("moons"), str(workdir), "cpu")),
    "schrodinger_bridge.compare": Program(run_comparison),
    "tutorial_example": Program(run_tutorial),
    "qc_study": Program(run_study),
    "score": Program(lambda workdir: run_lib.score(run_config(), workdir, runtime()), after="train"),
    "export": Program(lambda workdir: run_lib.export(run_config(), workdir, runtime()), after="train"),
    "audit": Program(run_audit, after="export"),
    "report": Program(lambda workdir: report.write_report(workdir, output=workdir / "report"), after="eval"),
}


# ------------------------------------------------------------------------------------------------------------ processes


@dataclass(frozen=True)
class Outcome:
    """Exit status, negative for a signal, and all that was written to the terminal."""

    status: int
    said: str

    @property
    def refusal(self) -> str:
        """The one line with which the program refused to go on; empty if it did not end so."""
        lines = [line for line in self.said.splitlines() if line.startswith("error: ")]
        return lines[0] if self.status == REFUSED and len(lines) == 1 and "Traceback" not in self.said else ""


REFUSED = 2
SECONDS = 300
"""What takes longer hangs."""


def attempt(
    program: Program, folder: Path, *, disturb: Callable[[], None] | None = None, kill_after: float = SECONDS
) -> Outcome:
    """Run a program in a process of its own, until it ends or is killed after some seconds.

    It answers errors as ``experiment.command_line.run_main`` does. ``disturb`` is called in the process first.
    """
    log = tempfile.TemporaryFile()  # noqa: SIM115  not in a folder that may be full
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            logging.disable(logging.NOTSET)
            torch.set_num_threads(1)
            if disturb is not None:
                disturb()
            program.run(folder)
            status = 0
        except (ValueError, FloatingPointError, OSError) as error:
            os.write(2, f"\nerror: {error}\n".encode())
            status = REFUSED
        except BaseException:
            os.write(2, traceback.format_exc().encode())
        finally:
            os._exit(status)
    deadline = time.monotonic() + kill_after
    while (found := os.waitpid(pid, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.002)
    if found[0] == 0:
        os.kill(pid, signal.SIGKILL)
        found = os.waitpid(pid, 0)
    with log:
        log.seek(0)
        return Outcome(os.waitstatus_to_exitcode(found[1]), log.read().decode(errors="replace"))


_WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}


def on_change(folder: Path, act: Callable[[int], None]) -> None:
    """Before every change of a file or folder below ``folder``, in this process, call ``act`` with its number.

    Changes are files opened for writing, renamed, removed; folders made, removed.
    """
    number, inside = 0, f"{folder}{os.sep}"

    def hook(event: str, arguments: tuple) -> None:
        nonlocal number
        if event == "open":
            path, mode, _ = arguments
            changes = isinstance(mode, str) and any(letter in mode for letter in "wax+")
        else:
            path, changes = arguments[0] if arguments else "", event in _WRITING
        if changes and isinstance(path, str | os.PathLike) and f"{os.fspath(path)}{os.sep}".startswith(inside):
            number += 1
            act(number)

    sys.addaudithook(hook)


def count_changes(program: Program, folder: Path) -> int:
    """How many changes of files a program makes from beginning to end."""
    record = folder.with_name(f"{folder.name}.changes")

    def note(number: int) -> None:
        with open(record, "w") as file:
            file.write(str(number))

    outcome = attempt(program, folder, disturb=lambda: on_change(folder, note))
    assert outcome.status == 0, outcome.said
    return int(record.read_text())


# -------------------------------------------------------------------------------------------------------------- results


def prepare(name: str, folder: Path, finished: Path) -> None:
    """The folder that a program begins with: none, or the finished one of another."""
    if before := PROGRAMS[name].after:
        shutil.copytree(finished / before, folder)


def finish(name: str, finished: Path) -> Path:
    """The folder of a program that was let run to its end, and before it of the one it begins with."""
    folder = finished / name
    if not folder.exists():
        if before := PROGRAMS[name].after:
            finish(before, finished)
        prepare(name, folder, finished)
        outcome = attempt(PROGRAMS[name], folder)
        assert outcome.status == 0, outcome.said
    return folder


def contents(folder: Path) -> dict[str, object]:
    """Every file of a folder but locks and TensorBoard's, without the time that work took."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_dir() or path.suffix == ".lock" or path.name == ".lock" or "tensorboard" in path.parts:
            continue
        if path.suffix == ".pt":
            state = read_checkpoint(path)
            found[name] = _plain({key: state[key] for key in state.keys() - {"log_size"}})  # rows have times in them
        elif path.suffix == ".jsonl":
            found[name] = without_times([json.loads(line) for line in path.read_text().splitlines()])
        else:
            # A path of the folder may stand in a file: it is another in every try, and so is the width of its column.
            text = path.read_bytes().replace(str(folder).encode(), b"W")
            found[name] = re.sub(rb" +|-{3,}", b" ", text) if path.suffix == ".md" else text
    return found


def _plain(state: object) -> object:
    """Tensors as bytes, so that two states can be compared with ==."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [_plain(value) for value in state]
    return (str(state.dtype), state.shape, state.numpy().tobytes()) if torch.is_tensor(state) else state


def differing(a: dict[str, object], b: dict[str, object]) -> list[str]:
    """Names of files that only one has, or that differ."""
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
