"""Two processes do the work of one: the same training, samples and measurements, whoever starts them."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run_lib import ROOT, environment, rows, weights, without_times
from two_processes import BEGUN, CPU, RUNS, SETTINGS, config_of, runtime_of, train_bridge

import run_lib
from checkpoints import read_checkpoint
from experiment import runtime
from experiment.files import read_arrays, write_arrays

LAST = SETTINGS["training.n_iters"]


def launched(*command: str | Path) -> subprocess.CompletedProcess:
    # Processes on CPUs: also where there is a GPU, which two could not share.
    environ = {**environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, env=environ, capture_output=True, text=True, errors="replace"
    )


def on_two_processes(part: str, folder: Path) -> subprocess.CompletedProcess:
    program = ROOT / "tests/two_processes.py"
    return launched("torch.distributed.run", "--standalone", "--nproc_per_node=2", program, part, folder)


def what_it_said(finished: subprocess.CompletedProcess) -> str:
    return f"exit status {finished.returncode}\n{finished.stdout[-4000:]}\n{finished.stderr[-12000:]}"


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    """The folder in which two processes have trained all runs, and sampled from one."""
    folder = tmp_path_factory.mktemp("two")
    name = "c, begun by one process"
    config = config_of(name)
    config.training.n_iters = BEGUN
    run_lib.train(config, folder / name, runtime_of(name))
    # The last step of a shorter run has a row of its own in the log: go on from the checkpoint before it.
    (folder / name / "checkpoints" / f"step_{BEGUN:08d}.pt").unlink()
    finished = on_two_processes("train", folder)
    assert finished.returncode == 0, what_it_said(finished)
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("one")


@pytest.fixture
def trained_by_one(one) -> Path:
    """The same runs, by this process; those that differ in how they are computed are one run."""
    for name in RUNS:
        if not (one / name.split(",")[0]).exists():
            run_lib.train(config_of(name), one / name.split(",")[0], CPU)
    return one


@pytest.mark.parametrize("name", RUNS)
def test_same_training(name, two, trained_by_one):
    """Losses, gradient norms, weights, averages and Adam's moments."""
    expected = trained_by_one / name.split(",")[0]
    ours, theirs = weights(two / name, LAST), weights(expected, LAST)
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        torch.testing.assert_close(ours[key], tensor, rtol=1e-5, atol=1e-5, msg=key)
    logged = without_times(rows(two / name)), without_times(rows(expected))
    for mine, other in zip(*logged, strict=True):
        assert mine == pytest.approx(other, rel=1e-5)
    # The term is there, and large enough to matter.
    assert not name.startswith("qc") or all(row["qc"] > 1 for row in logged[0] if "loss" in row)


def test_same_bridge(two, one):
    """A Schrödinger bridge: both networks, the measurements and the log of one process."""
    expected = train_bridge(one / "bridge")
    for direction in ("01_backward", "02_forward"):
        folders = [workdir / "bridge" / "half_bridges" / direction for workdir in (one, two)]
        theirs, ours = (read_checkpoint(folder / "checkpoints" / "step_00000006.pt") for folder in folders)
        for kind, state in (("model", theirs["model"]), ("average", theirs["ema"]["model"])):
            found = ours["model"] if kind == "model" else ours["ema"]["model"]
            for name, tensor in state.items():
                torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{kind} {direction} {name}")
        losses = [[row["loss"] for row in rows(folder)] for folder in folders]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    measured = json.loads((two / "bridge" / "history.json").read_text())["half_bridges"]
    assert len(measured) == len(expected.history) == 3
    for ours, theirs in zip(measured, expected.history, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-4)), name


def test_same_samples(two, trained_by_one):
    """The grid made while training, and --mode=sample, of which the processes took 10 and 11 images."""
    run_lib.sample(config_of("u"), trained_by_one / "u", runtime_of("u"))
    # The folders' names end with a digest of the weights too, which rounding makes different.
    folders = [workdir / "u" / "samples" for workdir in (trained_by_one, two)]
    paths = [list(folder.glob(f"step_{LAST:08d}-*/samples.npz")) for folder in folders]
    assert [len(found) for found in paths] == [1, 1]
    expected, found = (read_arrays(path)["images"].astype(int) for (path,) in paths)
    assert len(found) == SETTINGS["eval.num_samples"] and np.ptp(expected) > 5
    assert np.abs(found - expected).max() <= 1  # rounding may move a pixel to the next grey level
    name = f"samples/step_{LAST:08d}.png"
    grids = [np.asarray(Image.open(folder / "u" / name), dtype=int) for folder in (two, trained_by_one)]
    assert np.abs(grids[0] - grids[1]).max() <= 17  # one of 16 levels


@pytest.mark.slow
def test_killed_evaluation_goes_on_under_another_launcher(two, trained_by_one):
    """accelerate launch finishes what torchrun began: finished batches are kept, and all is as one process has it."""
    killed = on_two_processes("evaluate", two)
    assert killed.returncode == 1 and "Signal 9 (SIGKILL)" in killed.stderr, what_it_said(killed)
    workdir, cache = two / "u", two / "cache"
    stages = workdir / "eval" / "stages"
    parts = sorted((stages / "parts").rglob("*.npz"), key=lambda path: int(path.stem.split("-")[0]))
    assert parts and len(parts) < 6 and not list(stages.glob("nll-*.npz"))
    # A mark, to recognise the finished batch by.
    first = int(parts[-1].stem.split("-")[0])
    marked = read_arrays(parts[-1])
    marked["nll_bits_per_dim"] = marked["nll_bits_per_dim"] + 1000
    write_arrays(parts[-1], **marked)
    overrides = [f"--config.{name}={value}" for name, value in SETTINGS.items()]
    finished = launched(
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1", "--dynamo_backend=no"),
        *("--mixed_precision=no", "--main_process_port=0", str(ROOT / "main.py"), f"--cache_dir={cache}"),
        *(f"--config={ROOT / 'configs/digits.py'}:u", f"--workdir={workdir}", "--mode=eval", *overrides),
    )
    assert finished.returncode == 0, what_it_said(finished)
    assert finished.stdout.count("nll_bits_per_dim_se") == 1  # of the two, one prints

    config = config_of("u")
    runtime = dataclasses.replace(runtime_of("u"), cache_dir=str(cache))
    metrics = run_lib.evaluate(config, trained_by_one / "u", runtime)
    for stage, name, length in (("nll", "nll_bits_per_dim", 35), ("asymmetry_items", "asym", 21)):
        paths = [next((folder / "u" / "eval" / "stages").glob(f"{stage}-*.npz")) for folder in (two, trained_by_one)]
        found, expected = (read_arrays(path)[name] for path in paths)
        if stage == "nll":
            batch = slice(first, first + len(marked["nll_bits_per_dim"]))
            assert (found[batch] > 900).all()
            found[batch] -= 1000
        assert len(found) == length
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=stage)
    by_two = json.loads((workdir / "eval" / "metrics.json").read_text())
    for name, value in metrics.items():
        if not name.startswith("nll_bits"):
            close = dict(rel=0.05) if name in ("fid", "kid", "kid_se") else dict(rel=1e-4)
            assert by_two[name] == (pytest.approx(value, **close) if isinstance(value, float) else value), name


def test_processes_that_see_different_folders_are_refused(monkeypatch, tmp_path):
    """Hosts without a common folder would train different models as one."""
    monkeypatch.setattr(runtime, "gather_object", lambda values: [*values, 6] if values == [0] else values)
    with pytest.raises(run_lib.InvalidRun, match=r"disagree on the step to go on from \(0, 6\); it must be one folder"):
        run_lib.train(config_of("u"), tmp_path, runtime_of("u"))


def test_settings_of_accelerate_do_not_change_a_run(monkeypatch):
    """What a user's settings file says about accumulation gives way to ours; sharded models are refused."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert run_lib.Runtime(device="cpu", accumulation_steps=2).accelerator.gradient_accumulation_steps == 2
