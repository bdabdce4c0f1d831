"""A disk that is full ends every program in one line, and with more space the same call goes on to the same result."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_run_lib import TINY, assert_identical, weights

import run_lib
from autoencoder_example import main as autoencoder
from configs.digits import get_config
from experiment.runtime import Runtime
from schrodinger_bridge.half_bridges import BridgeRun

CPU = run_lib.Runtime(device="cpu")
TINY_BRIDGE = {
    "bridge.num_ipf": 1,
    "bridge.num_steps": 4,
    "model.width": 8,
    "training.n_iters": 6,
    "training.batch_size": 8,
    "training.cache_size": 32,
    "training.save_freq": 3,
    "evaluation.num_samples": 20,
    "evaluation.num_sets": 2,
}


def config(condition: str = ""):
    settings = get_config("u")
    settings.update_from_flattened_dict(TINY | {"sampling.condition": condition, "training.snapshot_sampling": True})
    settings.update_from_flattened_dict({"classifier.nf": 8, "classifier.n_iters": 4, "sampling.num_images": 3})
    return settings


def learn_bridge(workdir: Path) -> list[dict]:
    settings = importlib.import_module("configs.dsb.2d").get_config("moons")
    settings.update_from_flattened_dict(TINY_BRIDGE)
    run = BridgeRun(settings, workdir, Runtime("cpu"))
    run.train()
    return run.history


def train(workdir: Path) -> None:
    run_lib.train(config(), workdir, CPU)


PROGRAMS: dict[str, Callable[[Path], object]] = {
    "train": train,
    "eval": lambda workdir: run_lib.evaluate(config(), workdir, CPU),
    "sample": lambda workdir: run_lib.sample(config(), workdir, CPU).name,
    "sample under a condition": lambda workdir: run_lib.sample(config("inpaint"), workdir, CPU).name,
    "stats": lambda workdir: run_lib.statistics(config(), workdir, CPU).name,
    "classifier": lambda workdir: run_lib.train_classifier(config(), workdir, CPU),
    "bridge": learn_bridge,
    "autoencoder": lambda workdir: autoencoder.run(workdir, seeds=1, estimator="exact", n_iters=200, jobs=1),
}


@pytest.fixture
def disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Makes a small disk, or makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resize(kib: int) -> Path:
        how = "remount," if folder.is_mount() else ""
        try:
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"{how}size={kib}k", "tmpfs", folder], check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("only root can make a small disk")
        return folder

    yield resize
    subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.mark.faults
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_full_disk_ends_in_one_line_and_the_same_call_goes_on(name, disk, tmp_path):
    """At whatever it is that does not fit: lock, log, checkpoint, grid, batch, result."""
    program, needs_training = PROGRAMS[name], name in ("eval", "sample", "sample under a condition")
    whole, kib, refused = tmp_path / "whole", 8, []
    if needs_training:
        train(whole)
        shutil.copytree(whole, disk(100_000) / "w")
        kib = shutil.disk_usage(tmp_path / "disk").used // 1024
    expected = program(whole)
    while True:
        workdir = disk(kib) / "w"
        try:
            found = program(workdir)
            break
        except (OSError, ValueError) as error:
            message = str(error)
        assert "\n" not in message and f"cannot write {workdir}" in message, message
        assert "No space left on device; free some space; the same command then goes on" in message
        refused.append(message.split()[2])
        kib += 4 if needs_training else max(4, kib // 10)
    assert len(refused) >= 5 and len(set(refused)) > 1, refused
    assert json.dumps(found) == json.dumps(expected)
    if name == "train":
        assert_identical(weights(workdir, 12), weights(whole, 12))
    assert not [path for path in workdir.rglob(".*") if not path.name.endswith(".lock")]
    print(f"{name}: {len(refused)} tries, of {len(set(refused))} files")
