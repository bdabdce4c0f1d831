"""What a run refuses so that nothing is lost: another process, other data, damaged files; and where samples go."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import save
from locks import lock_held_elsewhere
from test_run_lib import CPU, ROOT, command, environment, tiny_config

import run_lib
from checkpoints import read_checkpoint
from configs.stored import get_config as get_stored_config
from data import FileSplit
from experiment import files, runtime


def test_the_same_work_in_one_workdir_at_once_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_WAIT_SECONDS", 0.0)
    config = tiny_config(training__n_iters=2)
    run_lib.train(config, tmp_path, CPU)
    for work, lock, condition in (
        (run_lib.train, "training", ""),
        (run_lib.evaluate, "evaluation", ""),
        (run_lib.sample, "samples-pc-reverse_diffusion-langevin-3", ""),
        (run_lib.sample, "samples-pc-reverse_diffusion-langevin-3-inpaint-projection", "inpaint"),
    ):
        config.sampling.condition = condition
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        with lock_held_elsewhere(tmp_path / f".{lock}.lock") as taken:
            assert taken
            with pytest.raises(run_lib.InvalidRun, match=f"--workdir: {tmp_path} is in use by another process"):
                work(config, tmp_path, CPU)
        after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
        before[tmp_path / f".{lock}.lock"] = after[tmp_path / f".{lock}.lock"]
        assert after == before


def test_training_reads_its_state_when_it_has_the_lock(tmp_path, monkeypatch):
    """A second training that is started while the first is at work finds it finished, and does nothing."""
    config, take, before = tiny_config(training__n_iters=2), runtime.take_lock, {}

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def take_after_another(path: Path, wait: bool = False):
        monkeypatch.setattr(runtime, "take_lock", take)
        run_lib.train(config, tmp_path, CPU)
        before.update(contents())
        return take(path, wait)

    monkeypatch.setattr(runtime, "take_lock", take_after_another)
    run_lib.train(config, tmp_path, CPU)
    assert tmp_path / "metrics.jsonl" in before and contents() == before


def test_samples_under_other_settings_go_to_another_folder(tmp_path):
    config = tiny_config(training__n_iters=2)
    run_lib.train(config, tmp_path, CPU)
    folders = []
    for change in ({}, {"sampling.snr": 0.3}, {"seed": 7}, {"sampling.num_samples": 4}):
        other = config.copy_and_resolve_references()
        other.update_from_flattened_dict(change)
        folders.append(run_lib.sample(other, tmp_path, CPU))
        settings = json.loads((folders[-1] / "settings.json").read_text())
        assert settings["sampling"]["snr"] == other.sampling.snr
    assert len(set(folders)) == 4
    assert run_lib.sample(config, tmp_path, CPU) == folders[0]


def save_images(path: Path, brightness: int, count: int = 40) -> None:
    rng = np.random.default_rng(0)
    train, test = rng.integers(brightness, brightness + 50, (2, count, 8, 8), dtype=np.uint8)
    labels = np.arange(count)
    np.savez(path, train_images=train, test_images=test, train_labels=labels, test_labels=labels)


def test_training_goes_on_with_the_same_data_only(tmp_path, caplog):
    save_images(tmp_path / "dark.npz", 0)
    save_images(tmp_path / "bright.npz", 200)
    (tmp_path / "copy.npz").write_bytes((tmp_path / "dark.npz").read_bytes())

    def config(name: str, steps: int):
        return tiny_config(data__dataset="npz", data__path=str(tmp_path / name), training__n_iters=steps)

    run_lib.train(config("dark.npz", 2), tmp_path / "w", CPU)
    with pytest.raises(run_lib.InvalidRun, match=r"data\.path: other training data than those of"):
        run_lib.train(config("bright.npz", 4), tmp_path / "w", CPU)
    run_lib.train(config("copy.npz", 4), tmp_path / "w", CPU)  # where they lie does not matter
    assert "other data" not in caplog.text
    other = config("bright.npz", 4)
    other.eval.update(enable_bpd=False, enable_asymmetry=False, enable_sampling=False)
    run_lib.evaluate(other, tmp_path / "w", CPU)
    assert "other data than those that" in caplog.text


def test_a_damaged_image_is_found_before_training(tmp_path, monkeypatch):
    """Files are decoded once, before a run begins with them, and again only if they change."""
    for k in range(20):
        half = tmp_path / "set" / ("train" if k < 16 else "test")
        save(half / f"{k:02d}.png", np.random.default_rng(k).integers(0, 256, (8, 8), dtype=np.uint8))
    damaged = tmp_path / "set/train/09.png"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:-40])
    decoded, read_all = [], FileSplit.read_all
    monkeypatch.setattr(FileSplit, "read_all", lambda split, told: decoded.append(split) or read_all(split, told))

    def train(steps: int) -> None:
        data = dict(data__dataset="folder", data__path=str(tmp_path / "set"), training__batch_size=2)
        run_lib.train(tiny_config(**data, training__n_iters=steps), tmp_path / "w", CPU)

    with pytest.raises(run_lib.InvalidRun, match=r"set-train: cannot read the image .*09\.png"):
        train(2)
    assert not (tmp_path / "w" / "config.json").exists()
    damaged.write_bytes(whole)
    train(1)
    assert len(decoded) == 3  # and the test images
    train(2)
    assert len(decoded) == 3
    damaged.write_bytes(whole[:-40])
    with pytest.raises(run_lib.InvalidRun, match=r"cannot read the image .*09\.png"):
        train(3)


def test_too_few_training_images_for_fid_are_refused_before_sampling(tmp_path):
    save_images(tmp_path / "few.npz", 0, count=3)
    config = tiny_config(
        data__dataset="npz", data__path=str(tmp_path / "few.npz"), training__n_iters=2, training__batch_size=2
    )
    run_lib.train(config, tmp_path / "w", CPU)
    with pytest.raises(run_lib.InvalidRun, match=r"few-train: 3 training image\(s\)"):
        run_lib.evaluate(config, tmp_path / "w", CPU)
    assert not (tmp_path / "w" / "eval").exists()


@pytest.mark.parametrize("text", ["[]", "null", "{", "\udcff"])
def test_damaged_config_of_a_workdir_is_said(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(run_lib.InvalidRun, match=r"config\.json is damaged"):
        run_lib.train(tiny_config(), tmp_path, CPU)


def test_checkpoint_of_another_version_or_program_is_refused(tmp_path):
    """To go on from, to start from, to sample from."""
    config = partial(tiny_config, model__parameterization="unconstrained")  # as public checkpoints are
    run_lib.train(config(training__n_iters=2), tmp_path / "u", CPU)
    state = read_checkpoint(tmp_path / "u" / "checkpoints" / "step_00000002.pt")
    (tmp_path / "w" / "checkpoints").mkdir(parents=True)
    own = tmp_path / "w" / "checkpoints" / "step_00000002.pt"
    without_averages = {name: part for name, part in state.items() if name != "ema"}
    for found, message in (
        (state | {"version": 0}, "another version"),
        (state | {"record": {}}, r"another program than main\.py"),  # a bridge's, say
        (without_averages, "not a whole checkpoint; missing, or of another form: ema"),
        ([1, 2], "another version|none of NCSN's"),
    ):
        torch.save(found, own)
        with pytest.raises(run_lib.InvalidRun, match=message):
            run_lib.train(config(training__n_iters=4, training__init_from=str(own)), tmp_path / "x", CPU)
        for work in (run_lib.train, run_lib.sample):
            with pytest.raises(run_lib.InvalidRun, match=message):
                work(config(training__n_iters=4), tmp_path / "w", CPU)
        written = [path for path in (tmp_path / "w").iterdir() if path.suffix != ".lock"]
        assert not (tmp_path / "x").exists() and len(written) == 1


@pytest.mark.faults
def test_commands_at_once_with_one_cache_and_killed_ones_give_one_result(tmp_path):
    """Statistics and evaluations beside each other; then an evaluation that is killed at ten random moments."""
    environment_of_users = {**environment(), "PYTHONPATH": str(ROOT / "tests")}
    overrides = [f"--config.eval.{name}=False" for name in ("enable_bpd", "enable_asymmetry")]
    overrides += ["--config.eval.batch_size=2", f"--cache_dir={tmp_path / 'cache'}"]

    def start(workdir: str, mode: str) -> subprocess.Popen:
        options = dict(cwd=ROOT, env=environment_of_users, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        return subprocess.Popen(command(tmp_path / workdir, mode, *overrides), **options)

    run_lib.train(tiny_config("qc", training__n_iters=2), tmp_path / "a", CPU)
    for name in "bcd":
        shutil.copytree(tmp_path / "a", tmp_path / name)
    modes = {"a": "eval", "b": "eval", "c": "stats", "d": "stats"}
    running = {name: start(name, mode) for name, mode in modes.items()}
    answers = {name: process.communicate() for name, process in running.items()}
    for name, process in running.items():
        assert process.returncode == 0 and "Traceback" not in answers[name][1], answers[name][1][-2000:]
    metrics = [json.loads((tmp_path / name / "eval" / "metrics.json").read_text()) for name in "ab"]
    (statistics,) = (tmp_path / "cache").glob("features-*.npz")
    assert metrics[0] == metrics[1] and answers["c"][0] == answers["d"][0] == f"{statistics}\n"
    assert not list((tmp_path / "cache" / "parts").iterdir())

    moments = np.random.default_rng(0)
    shutil.rmtree(tmp_path / "cache")
    for _ in range(10):
        process = start("c", "eval")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=moments.uniform(2, 20))
        process.kill()
        process.communicate()
    process = start("c", "eval")
    _, errors = process.communicate()
    assert process.returncode == 0, errors[-2000:]
    assert json.loads((tmp_path / "c" / "eval" / "metrics.json").read_text()) == metrics[0]
    assert not [path for path in tmp_path.rglob(".*") if not path.name.endswith(".lock")]


def test_a_run_of_an_earlier_version_goes_on_though_it_lacks_new_fields(tmp_path):
    """With their defaults, that is; its checkpoint too is read with them."""
    config = tiny_config()
    stored = json.loads(config.to_json())
    for name in ("shape", "num_levels", "normalization"):
        del stored["data"][name]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    run_lib._check_workdir(config, tmp_path, ())
    assert get_stored_config(str(tmp_path / "config.json")).to_dict() == config.to_dict()
    config.data.normalization = "range"
    with pytest.raises(ValueError, match=r"data\.normalization was 'standard', is 'range'"):
        run_lib._check_workdir(config, tmp_path, ())
