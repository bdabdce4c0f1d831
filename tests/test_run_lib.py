"""Whole runs: training that survives being killed, evaluation that does not depend on batches, clear errors."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import run_lib
from checkpoints import CheckpointError, read_checkpoint
from configs.digits import get_config
from experiment.files import claim, read_arrays
from training import Trainer

ROOT = Path(__file__).parents[1]
CPU = run_lib.Runtime(device="cpu")

# Random elements of every kind.
TINY = {
    "model.nf": 8,
    "model.ch_mult": (1,),
    "model.attn_resolutions": (),
    "model.dropout": 0.2,
    "training.batch_size": 8,
    "training.n_iters": 12,
    "training.log_freq": 3,
    "training.eval_freq": 4,
    "training.snapshot_freq": 6,
    "training.snapshot_freq_for_preemption": 2,
    "training.snapshot_sampling": False,
    "data.random_flip": True,
    "sampling.num_steps": 3,
    "likelihood.solver": "heun",
    "likelihood.num_steps": 3,
    "eval.features": "user_classes:moments",
    "eval.batch_size": 16,
    "eval.num_samples": 20,
    "sampling.num_samples": 20,
    "eval.asym_levels": 2,
    "eval.asym_images": 3,
}


def tiny_config(model: str = "u", **overrides):
    config = get_config(model)
    config.update_from_flattened_dict(TINY | {name.replace("__", "."): value for name, value in overrides.items()})
    return config


def weights(workdir: Path, step: int) -> dict[str, torch.Tensor]:
    state = read_checkpoint(workdir / "checkpoints" / f"step_{step:08d}.pt")
    flat = {f"model.{k}": v for k, v in state["model"].items()}
    flat.update({f"ema.{k}": v for k, v in state["ema"]["model"].items()})
    for index, moments in state["optimizer"]["state"].items():
        flat.update({f"optimizer.{index}.{k}": v for k, v in moments.items()})
    return flat


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different[:5]


def rows(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def lines_logged(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def without_times(logged: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in ("seconds", "steps_per_second")} for row in logged]


def command(workdir: Path, mode: str, *extra: str) -> list[str]:
    overrides = [f"--config.{name}={value}" for name, value in TINY.items()]
    base = [sys.executable, str(ROOT / "main.py"), f"--config={ROOT / 'configs/digits.py'}:qc", "--device=cpu"]
    return [*base, f"--workdir={workdir}", f"--mode={mode}", *overrides, *extra]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_any_moment_and_resumed_ends_with_identical_weights(tmp_path):
    """SIGKILL at a random moment, then SIGTERM, against an uninterrupted run: bit-identical weights, averages,
    optimiser and log."""
    longer = "--config.training.n_iters=40"
    options = dict(cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    broken = tmp_path / "broken"
    moments = np.random.default_rng(0)
    for signal_number in (signal.SIGKILL, signal.SIGTERM):
        process = subprocess.Popen(command(broken, "train", longer), **options)
        before = lines_logged(broken)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline and lines_logged(broken) <= before:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.2))
        process.send_signal(signal_number)
        _, errors = process.communicate()
        assert process.returncode in (-signal.SIGKILL, 128 + signal.SIGTERM), "it ended before it could be stopped"
    assert "the same command resumes" in errors and "Traceback" not in errors
    for workdir in (broken, tmp_path / "whole"):
        run_lib.train(tiny_config("qc", training__n_iters=40), workdir, CPU)

    assert_identical(weights(tmp_path / "whole", 40), weights(broken, 40))
    assert without_times(rows(tmp_path / "whole")) == without_times(rows(broken))


def test_a_conservative_model_resumes(tmp_path):
    for folder, n_iters in (("whole", 2), ("parts", 1), ("parts", 2)):
        run_lib.train(tiny_config("c", training__n_iters=n_iters), tmp_path / folder, CPU)
    assert_identical(weights(tmp_path / "whole", 2), weights(tmp_path / "parts", 2))


def test_truncated_newest_checkpoint_falls_back_and_still_ends_the_same(trained, tmp_path, caplog):
    run_lib.train(tiny_config(training__n_iters=8), tmp_path / "cut", CPU)
    newest = tmp_path / "cut" / "checkpoints" / "step_00000008.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    run_lib.train(tiny_config(), tmp_path / "cut", CPU)
    assert "step_00000008.pt" in caplog.text and "falling back" in caplog.text
    assert_identical(weights(trained, 12), weights(tmp_path / "cut", 12))
    assert without_times(rows(trained)) == without_times(rows(tmp_path / "cut"))


def test_a_finished_run_is_left_alone(trained):
    before = {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}
    run_lib.train(tiny_config(), trained, CPU)
    assert before == {p: p.stat().st_mtime_ns for p in trained.rglob("*") if p.is_file()}


def test_accumulation_gives_the_same_training(tmp_path):
    """And one runtime does not change what another does in the same process."""
    config = tiny_config("qc", training__n_iters=2)
    for folder, passes in (("one", 1), ("four", 4), ("again", 1)):
        runtime = run_lib.Runtime(device="cpu", accumulation_steps=passes) if passes > 1 else CPU
        run_lib.train(config, tmp_path / folder, runtime)
    one, four = weights(tmp_path / "one", 2), weights(tmp_path / "four", 2)
    for name in one:
        if name.startswith("model"):
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5, msg=name)
    assert_identical(one, weights(tmp_path / "again", 2))


def test_mixed_precision_trains_alike(tmp_path, forget_accelerator):
    """bfloat16 keeps 8 bits: the losses of the first steps agree to a few per cent. What the QC term is computed from
    is in float32: until the weights part, after the first step without it, the losses are the same."""
    settings = dict(training__n_iters=4, training__log_freq=1, training__qc_interval=2)
    config = tiny_config("qc", model__init_scale=1.0, **settings)
    run_lib.train(config, tmp_path / "fp32", CPU)
    forget_accelerator()
    run_lib.train(config, tmp_path / "bf16", run_lib.Runtime(device="cpu", precision="bf16"))
    full, mixed = (rows(tmp_path / name) for name in ("fp32", "bf16"))
    for one, other in zip(full, mixed, strict=True):
        for name in {"dsm", "qc"} & one.keys():
            assert other[name] == pytest.approx(one[name], rel=0.1), (name, one["step"])
    assert mixed[0]["qc"] == full[0]["qc"] and mixed[0]["dsm"] == full[0]["dsm"]
    assert "qc" not in full[1] and mixed[1]["dsm"] != full[1]["dsm"]


def test_qc_continues_a_u_run(trained, tmp_path):
    """init_from takes weights, averages, optimiser and step; with λ = 0 it is the U run itself going on."""
    start = str(trained / "checkpoints" / "step_00000006.pt")
    control = tiny_config(training__init_from=start)
    run_lib.train(control, tmp_path / "control", CPU)
    assert_identical(weights(trained, 12), weights(tmp_path / "control", 12))
    run_lib.train(tiny_config("qc", training__init_from=start), tmp_path / "qc", CPU)
    qc, u = weights(tmp_path / "qc", 12), weights(trained, 12)
    assert any(not torch.equal(qc[name], u[name]) for name in u)
    assert min(row["step"] for row in rows(tmp_path / "qc")) > 6
    assert all("qc" in row for row in rows(tmp_path / "qc") if "loss" in row)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    run_lib.train(tiny_config(), workdir, CPU)
    return workdir


def evaluated(trained: Path, workdir: Path, **overrides) -> dict:
    (workdir / "checkpoints").mkdir(parents=True)
    (workdir / "checkpoints" / "step_00000012.pt").symlink_to(trained / "checkpoints" / "step_00000012.pt")
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(trained / "cache"))
    return run_lib.evaluate(tiny_config(**overrides), workdir, runtime)


def test_evaluation_does_not_depend_on_the_batch_size(trained, tmp_path, monkeypatch):
    """Batches of 1, 3 and all: the same images, bits and asymmetries, the last partial batch included."""
    _shorten_test_set(monkeypatch, 5, training_images=40)
    results = {}
    for batch_size in (1, 3, 64):
        settings = dict(eval__batch_size=batch_size, eval__num_samples=5, eval__asym_probes=2)
        metrics = evaluated(trained, tmp_path / str(batch_size), **settings)
        arrays = {}
        for name in ("nll", "sample_items", "asymmetry_items"):
            (path,) = (tmp_path / str(batch_size) / "eval" / "stages").glob(f"{name}-*.npz")
            arrays |= {f"{name}.{field}": values for field, values in read_arrays(path).items() if field != "key"}
        assert len(arrays["nll.nll_bits_per_dim"]) == 5 and len(arrays["sample_items.images"]) == 5
        results[batch_size] = metrics, arrays
    for batch_size in (1, 3):
        for name, values in results[64][1].items():
            if name == "sample_items.images":
                assert np.abs(values.astype(int) - results[batch_size][1][name].astype(int)).max() <= 1
            elif not name.endswith("nfe"):
                np.testing.assert_allclose(results[batch_size][1][name], values, rtol=2e-3, err_msg=name)
        for name, value in results[64][0].items():
            if isinstance(value, float) and not name.startswith("kid"):
                assert results[batch_size][0][name] == pytest.approx(value, rel=2e-3), name


def _shorten_test_set(monkeypatch, size: int, training_images: int | None = None) -> None:
    original = data.load_dataset

    def shortened(*arguments, **options):
        train, test = original(*arguments, **options)
        for split, count in ((train, training_images), (test, size)):
            if count:
                split.images, split.labels, split.fingerprint = split.images[:count], split.labels[:count], f"{count}"
        return train, test

    monkeypatch.setattr(data, "load_dataset", shortened)


def test_metrics_file_and_reuse(trained, tmp_path, monkeypatch):
    _shorten_test_set(monkeypatch, 9)
    metrics = evaluated(trained, tmp_path / "w")
    stored = json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text())
    wanted = {"fid", "kid", "inception_score", "precision", "recall", "num_samples", "checkpoint_step"}
    wanted |= {"nfe_sampling", "nfe_likelihood", "nll_bits_per_dim", "nll_bits_per_dim_se"}
    wanted |= {"asym", "asym_se", "nasym", "nasym_se", "nll_images", "asym_images", "asym_levels", "asym_probes"}
    wanted |= {"asym_first_level"}
    assert wanted <= stored.keys()
    assert all(isinstance(stored[name], (int, float)) for name in wanted)
    assert stored["nfe_sampling"] == 2 * 3 + 1 and stored["num_samples"] == 20 and stored["checkpoint_step"] == 12
    assert stored["nll_bits_per_dim"] == metrics["nll_bits_per_dim"]
    assert stored["sampler"] == "PC, reverse_diffusion + langevin (snr 0.16), 3 steps" and stored["sampling_steps"] == 3

    # A second evaluation computes nothing: the score is never called.
    calls = []
    monkeypatch.setattr(run_lib.TrainedScore, "__call__", lambda self, x, t: calls.append(1))
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(trained / "cache"))
    assert run_lib.evaluate(tiny_config(), tmp_path / "w", runtime) == metrics
    assert not calls
    # A changed setting computes its own stage again, and only that.
    with pytest.raises(Exception):  # noqa: B017 -- the score is broken on purpose
        run_lib.evaluate(tiny_config(sampling__snr=0.1), tmp_path / "w", runtime)
    assert len(calls) == 1


def test_likelihood_of_some_test_images_is_a_part_of_the_whole(trained, tmp_path, monkeypatch):
    """4 of 9 images are number 0, 2, 4 and 6, spread over the set, and get the bits they get among all nine."""
    _shorten_test_set(monkeypatch, 9)
    nll, metrics = {}, {}
    for count in (0, 4, 50):
        settings = dict(eval__nll_images=count, eval__enable_sampling=False, eval__enable_asymmetry=False)
        metrics[count] = evaluated(trained, tmp_path / str(count), **settings)
        with np.load(tmp_path / str(count) / "eval" / "nll.npz", allow_pickle=False) as file:
            nll[count] = file["nll_bits_per_dim"]
    np.testing.assert_array_equal(nll[50], nll[0])
    np.testing.assert_allclose(nll[4], nll[0][[0, 2, 4, 6]], rtol=1e-5)
    assert [metrics[count]["nll_images"] for count in (0, 4, 50)] == [9, 4, 9]
    assert metrics[4]["test_images"] == 9
    assert metrics[4]["nll_bits_per_dim_se"] == pytest.approx(nll[4].std(ddof=1) / 2)
    assert metrics[4]["likelihood"] == "rademacher divergence, heun in ln(σ/α), 3 steps"


def test_noise_levels_of_asym(trained, tmp_path):
    """i/3 for i = 1, 2, 3; or for i = 0, 1, 2 on [1e-5, 1], QCSBM's. Asym is dominated by the first."""
    curves, means = {}, {}
    for first in (1, 0):
        settings = dict(eval__asym_levels=3, eval__asym_images=1, eval__asym_probes=1, eval__asym_first_level=first)
        settings |= dict(eval__enable_bpd=False, eval__enable_sampling=False)
        if first:
            metrics = evaluated(trained, tmp_path / "w", **settings)
        else:  # in the same folder, not taking the other's results for its own
            metrics = run_lib.evaluate(tiny_config(**settings), tmp_path / "w", CPU)
        assert (metrics["asym_levels"], metrics["asym_first_level"]) == (3, first)
        with np.load(tmp_path / "w" / "eval" / "asymmetry.npz", allow_pickle=False) as file:
            curves[first], means[first] = file["t"], metrics["asym"]
    np.testing.assert_allclose(curves[1], np.array([1, 2, 3]) / 3, rtol=1e-6)
    np.testing.assert_allclose(curves[0], 1e-5 + np.array([0, 1, 2]) / 3 * (1 - 1e-5), rtol=1e-6)
    assert means[0] > 2 * means[1]


def test_damaged_evaluation_files_are_computed_again(trained, tmp_path, monkeypatch, caplog):
    _shorten_test_set(monkeypatch, 9)
    first = evaluated(trained, tmp_path / "w", eval__enable_sampling=False, eval__enable_asymmetry=False)
    (path,) = (tmp_path / "w" / "eval" / "stages").glob("nll-*.npz")
    path.write_bytes(path.read_bytes()[:100])
    runtime = run_lib.Runtime(device="cpu")
    config = tiny_config(eval__enable_sampling=False, eval__enable_asymmetry=False)
    assert run_lib.evaluate(config, tmp_path / "w", runtime) == first
    assert f"{path} is damaged" in caplog.text
    assert first["fid"] is None and first["asym"] is None


def test_sampling_needs_checkpoints_and_no_data(trained, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step_00000012.pt").symlink_to(trained / "checkpoints" / "step_00000012.pt")
    config = tiny_config(data__dataset="npz", data__path="nothing.npz")
    folder = run_lib.sample(config, tmp_path, CPU)
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        assert file["images"].shape == (20, 8, 8, 1) and file["images"].dtype == np.uint8
        assert file["images"].max() <= 16 and int(file["num_levels"]) == 17
    from PIL import Image

    with Image.open(folder / "grid.png") as grid:
        assert min(grid.size) > 64


def test_a_loaded_score_computes_what_evaluation_and_sampling_do(trained, tmp_path, monkeypatch):
    _shorten_test_set(monkeypatch, 3)
    evaluated(trained, tmp_path / "w", eval__enable_asymmetry=False, eval__enable_sampling=False)
    folder = run_lib.sample(tiny_config(), tmp_path / "w", CPU)
    with np.load(tmp_path / "w" / "eval" / "nll.npz", allow_pickle=False) as file:
        bits = file["nll_bits_per_dim"]
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    score = run_lib.load(trained)
    state = read_checkpoint(trained / "checkpoints" / "step_00000012.pt")
    for name, weight in score.model.state_dict().items():
        assert torch.equal(weight, state["ema"]["model"][name])
    assert not torch.equal(state["model"][name], state["ema"]["model"][name])
    assert score.config.to_dict() == tiny_config().to_dict() and score.shape == (1, 8, 8)
    levels, _ = run_lib.load_data(tiny_config())[1].batch(range(3))
    assert np.array_equal(score.bits_per_dim(levels, seed=42), bits)
    assert torch.equal(score.images.to_data(score.sample(16, seed=42)), images[:16])  # a batch of 16, as there
    assert score.sample(2, method="few_step", solver="heun", num_steps=2).shape == (2, 1, 8, 8)
    assert score.config.sampling.method == "pc"
    for options, message in (
        (dict(solver="x"), r"sampling\.solver='x': allowed are"),
        (dict(steps=3), r"sampling\.steps: no such field"),
        (dict(condition="ct"), r"sampling\.condition='ct': only with --mode=sample"),
    ):
        with pytest.raises(ValueError, match=message):
            score.sample(1, **options)
    x, t = score.images.to_model(levels, None, dequantize=False), torch.tensor([0.1, 0.5, 1.0])
    exact = score.asymmetry(x, t)
    assert score.log_prob(x).shape == exact.asym.shape == (3,) and (exact.nasym > 0).all()
    # Other checkpoints.
    file = trained / "checkpoints" / "step_00000006.pt"
    earlier = run_lib.load(trained, step=6)
    assert (score.step, earlier.step) == (12, 6) and torch.equal(earlier(x, t), run_lib.load(file)(x, t))
    assert not torch.equal(earlier(x, t), score(x, t))
    for path, options, message in (
        (trained, dict(step=5), "no checkpoint at .*step_00000005"),
        (tmp_path, {}, "no checkpoint there"),
        (tmp_path / "gone.pt", {}, "no checkpoint there"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_lib.load(path, **options)
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_official_checkpoint_is_sampled_with_its_averages(tmp_path):
    """A public checkpoint goes straight into --mode=sample, and into load; its raw weights play no part."""
    config = importlib.import_module("configs.ve.cifar10_ncsnpp_continuous").get_config()
    config.model.update(nf=8, num_res_blocks=1)
    config.data.update(dataset="npz", path=str(tmp_path / "images.npz"))
    config.sampling.update(num_steps=2, num_samples=2)
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    golden = ROOT / "tests" / "models" / "published" / "ve_ncsnpp_cifar10.pth"
    checkpoint = read_checkpoint(golden)
    trainable = [name for name in checkpoint["model"] if name not in ("module.sigmas", "module.all_modules.0.W")]
    checkpoint["model"].update({name: torch.zeros_like(checkpoint["model"][name]) for name in trainable})
    torch.save(checkpoint, tmp_path / "no_raw_weights.pth")
    samples = []
    for path in (golden, tmp_path / "no_raw_weights.pth"):
        folder = run_lib.sample(config, tmp_path / path.stem, CPU, path)
        assert folder.name.startswith("step_00000123-pc-reverse_diffusion-langevin-2-")
        with np.load(folder / "samples.npz", allow_pickle=False) as file:
            samples.append(file["images"])
    assert np.array_equal(*samples) and samples[0].std() > 10
    score = run_lib.load(golden, config=config)
    assert score.step == 123
    loaded = score.images.to_data(score.sample(2, seed=config.seed)).permute(0, 2, 3, 1)
    assert np.array_equal(loaded, samples[0])
    with pytest.raises(ValueError, match=r"ve_ncsnpp_cifar10\.pth is a public checkpoint: give load\(…, config=…\)"):
        run_lib.load(golden)
    # The feature classifier needs labels, which this file has not: said before any sampling.
    config.eval.update(features="classifier", num_samples=4)
    with pytest.raises(run_lib.InvalidRun, match="no labels"):
        run_lib.evaluate(config, tmp_path / "eval", CPU, golden)
    config.model.parameterization = "conservative"
    with pytest.raises(run_lib.InvalidRun, match="public format"):
        run_lib.sample(config, tmp_path / "c", CPU, golden)


@pytest.mark.parametrize("name", ["vp.ddpm.cifar10", "ve.ncsn.cifar10", "ve.ncsnv2.cifar10"])
def test_networks_without_the_fields_of_the_unet_train_resume_and_sample(name, tmp_path):
    def config(**overrides):
        config = importlib.import_module(f"configs.{name}").get_config()
        config.data.update(dataset="digits", image_size=8, num_channels=1)
        if "ch_mult" in config.model:
            config.model.update(num_res_blocks=1)
        fields = TINY | {"model.num_scales": 30, "sampling.n_steps_each": 1, "sampling.num_samples": 2} | overrides
        known = {field: value for field, value in fields.items() if field.split(".")[1] in config[field.split(".")[0]]}
        config.update_from_flattened_dict(known)
        return config

    for folder, n_iters in (("whole", 2), ("parts", 1), ("parts", 2)):
        run_lib.train(config(**{"training.n_iters": n_iters}), tmp_path / folder, CPU)
    assert_identical(weights(tmp_path / "whole", 2), weights(tmp_path / "parts", 2))
    folder = run_lib.sample(config(), tmp_path / "whole", CPU)
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        assert file["images"].shape == (2, 8, 8, 1)


def test_settings_of_the_optimiser_are_those_of_the_config(trained, tmp_path):
    """init_from brings the moments of another run, not its settings."""
    start = str(trained / "checkpoints" / "step_00000006.pt")
    run_lib.train(tiny_config(training__init_from=start, optim__weight_decay=0.5), tmp_path / "decayed", CPU)
    state = read_checkpoint(tmp_path / "decayed" / "checkpoints" / "step_00000012.pt")
    assert state["optimizer"]["param_groups"][0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(optim__lr=0.0), r"optim\.lr=0\.0: allowed are numbers from 1e-12"),
        (dict(training__qc_stride=3), r"training\.qc_stride=3: must divide the 8 samples"),
        (dict(data__dataset="x:y"), r"data\.dataset='x:y'"),
        (dict(data__image_size=16), r"image_size=16"),
        (dict(data__num_channels=3, eval__asym_probes=1), r"num_channels=3"),
        (dict(data__dataset="npz", data__path="nothing.npz"), r"nothing\.npz"),
        (dict(model__name="x:y"), r"model\.name='x:y'"),
        (dict(model__sigma_min=20.0), r"model\.sigma_min=20\.0"),
        (dict(training__continuous=False), r"needs model\.embedding_type='positional'"),
        (dict(training__init_from="nowhere.pt"), r"nowhere\.pt"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_refused_before_any_work(tmp_path, overrides, message):
    with pytest.raises(run_lib.InvalidRun, match=message) as caught:
        run_lib.train(tiny_config(**overrides), tmp_path / "w", CPU)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("options", [dict(device="tpu"), dict(precision="fp8"), dict(accumulation_steps=0)], ids=str)
def test_bad_runtime(options):
    with pytest.raises(run_lib.InvalidRun, match=next(iter(options))):
        run_lib.Runtime(**options)


def test_a_workdir_of_another_run_is_refused(trained, tmp_path):
    with pytest.raises(run_lib.InvalidRun, match=r"holds another run: model\.nf was 8, is 16"):
        run_lib.train(tiny_config(model__nf=16), trained, CPU)


@pytest.mark.parametrize(
    ("field", "value", "was"),
    [
        ("model__sigma_max", 9.0, r"model\.sigma_max was 10\.0, is 9\.0"),
        ("model__parameterization", "unconstrained", r"model\.parameterization was 'preconditioned'"),
    ],
)
def test_weights_of_another_score_are_refused(trained, tmp_path, field, value, was):
    """They fit the network, and would be read as a score that nobody trained: in sampling, as a start of training, and
    from Python. What changes no score may differ."""
    checkpoint = trained / "checkpoints" / "step_00000012.pt"
    other = tiny_config(**{field: value})
    with pytest.raises(run_lib.InvalidRun, match=rf"step_00000012\.pt is of another model: .*{was}"):
        run_lib.sample(other, tmp_path, CPU, checkpoint)
    with pytest.raises(ValueError, match=was):
        run_lib.load(checkpoint, config=other)
    other.training.update(init_from=str(checkpoint), n_iters=20)
    with pytest.raises(run_lib.InvalidRun, match=was):
        run_lib.train(other, tmp_path / "run", CPU)
    run_lib.load(checkpoint, config=tiny_config(model__dropout=0.5, training__n_iters=99, eval__batch_size=7))


def test_a_resumed_run_is_told_with_how_many_threads_it_began(trained, monkeypatch):
    told = []
    monkeypatch.setattr(run_lib.Runtime, "keep_threads", lambda _, threads: told.append(threads))
    run_lib.trainer(tiny_config(), trained, CPU)
    assert told == [torch.get_num_threads()]


def test_a_workdir_of_an_example_is_refused(tmp_path):
    claim(tmp_path / "w", "some example")
    with pytest.raises(run_lib.InvalidRun, match="belongs to one of the examples"):
        run_lib.train(tiny_config(), tmp_path / "w", CPU)


def test_checkpoint_of_another_architecture_is_refused(trained, tmp_path):
    checkpoint = trained / "checkpoints" / "step_00000012.pt"
    with pytest.raises(run_lib.InvalidRun, match=r"is of another model: model\.nf was 8, is 16"):
        run_lib.evaluate(tiny_config(model__nf=16), tmp_path / "w", CPU, checkpoint)
    with pytest.raises(run_lib.InvalidRun, match=r"--checkpoint=gone\.pt: no checkpoint there"):
        run_lib.sample(tiny_config(), tmp_path / "w", CPU, "gone.pt")
    with pytest.raises(run_lib.InvalidRun, match="train first"):
        run_lib.evaluate(tiny_config(), tmp_path / "w", CPU)


@pytest.mark.parametrize("poison", ["weights", "gradient"])
def test_a_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, poison):
    original = Trainer.train_step

    def poisoned(self):
        if self.step == 7:
            bias = self.model.network.stem.bias
            if poison == "weights":
                with torch.no_grad():
                    bias.fill_(float("nan"))
            else:  # the loss itself stays finite
                bias.register_hook(lambda gradient: gradient * float("nan"))
        original(self)

    monkeypatch.setattr(Trainer, "train_step", poisoned)
    with pytest.raises(FloatingPointError, match="not finite"):
        run_lib.train(tiny_config(), tmp_path, CPU)
    newest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert newest.name == "step_00000006.pt"
    assert all(torch.isfinite(v).all() for v in read_checkpoint(newest)["model"].values())
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path) if "loss" in row)


def test_training_loads_what_it_needs(tmp_path):
    """Nor does ``data`` load what some sets need, or TensorBoard TensorFlow, as it does where that is installed."""
    images = np.random.default_rng(0).integers(0, 256, (8, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", train_images=images, test_images=images)
    program = f"""
import sys
import data
sys.path.insert(0, "tests")
def loaded(*names):
    return set(names) & set(sys.modules)
assert not loaded("torchvision", "sklearn", "scipy"), loaded("torchvision", "sklearn", "scipy")
import test_run_lib
NEEDLESS = "evaluation", "likelihood", "guidance", "features", "exact", "tensorflow"
assert not loaded(*NEEDLESS), loaded(*NEEDLESS)
options = dict(training__n_iters=1, data__dataset="npz", data__path={str(tmp_path / "images.npz")!r})
test_run_lib.run_lib.train(test_run_lib.tiny_config(**options), {str(tmp_path / "w")!r}, test_run_lib.CPU)
assert not loaded(*NEEDLESS), loaded(*NEEDLESS)
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), check=True)
    assert list((tmp_path / "w" / "tensorboard").iterdir())


def test_help_is_light():
    """--help loads neither torch nor any data set."""
    program = "import sys, main; sys.exit(bool({'torch', 'tensorflow', 'torchvision', 'sklearn'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config=configs/nothing.py"], "error: --config=configs/nothing.py: no such file"),
        (["--config=configs/digits.py:x"], "error: config argument 'x': allowed are u, c, qc"),
        (["--config=configs/digits.py", "--config.model.foo=1"], "error: --config.model.foo: the config has no field"),
        (["--config=configs/digits.py", "--config.model.nf=x"], "error: flag --config.model.nf=x: invalid literal"),
        (["--config=configs/digits.py", "--checkpoint=x"], "--checkpoint: only for --mode=eval, sample, score or"),
        (["--config=configs/digits.py", "--workdir= "], "error: --workdir is empty: give a folder"),
    ],
)
def test_bad_flags_answer_in_one_line(arguments, message, tmp_path):
    answer = subprocess.run(
        [sys.executable, "main.py", "--mode=train", f"--workdir={tmp_path / 'w'}", *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert answer.returncode != 0 and not (tmp_path / "w").exists()
    assert message in answer.stderr and "Traceback" not in answer.stderr


def test_a_dry_run_measures_and_keeps_nothing(tmp_path):
    """Two of its steps are of the QC term and its interval; a run that has begun is left as it is."""
    config = tiny_config("qc", training__qc_interval=2, training__n_iters=4)
    found = run_lib.dry_run(config, tmp_path / "new", CPU)
    assert not (tmp_path / "new").exists()
    assert found["parameters"] == sum(
        p.numel() for p in run_lib.trainer(config, tmp_path / "new", CPU).model.parameters()
    )
    assert found["hours_for_the_rest"] == pytest.approx(config.training.n_iters * found["seconds_per_step"] / 3600)
    assert found["seconds_per_step"] > 0 and found["memory_gib"] > 0.1
    run_lib.train(config, tmp_path / "begun", CPU)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "begun").rglob("*")}
    assert run_lib.dry_run(config, tmp_path / "begun", CPU)["hours_for_the_rest"] == 0
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "begun").rglob("*")}
