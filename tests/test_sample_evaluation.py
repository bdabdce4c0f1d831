"""FID and its relatives within a run: features shared, resumed and never mistaken, statistics of the data, and the
protocol of the paper in small."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from user_classes import Moments

import run_lib
from checkpoints import read_checkpoint, write_checkpoint
from configs.digits import get_config
from evaluation import Backend, Features, inception_score, sample_quality
from experiment.files import read_arrays, read_json
from features import quality, tfgan
from report import main

ROOT = Path(__file__).parents[1]
CPU = run_lib.Runtime(device="cpu")
TINY = {
    "model.nf": 8,
    "model.parameterization": "unconstrained",  # else untrained weights hardly matter
    "training.batch_size": 8,
    "training.n_iters": 2,
    "training.snapshot_sampling": False,
    "sampling.num_steps": 2,
    "eval.enable_bpd": False,
    "eval.enable_asymmetry": False,
    "eval.features": "inception",
    "eval.batch_size": 7,
    "eval.num_samples": 20,
    "sampling.num_samples": 20,
}
has_tensorflow = all(importlib.util.find_spec(name) for name in ("tensorflow", "tensorflow_gan"))


@pytest.fixture
def moments(monkeypatch) -> Moments:
    """The extractor that a test's runs use, whatever eval.features says."""
    extractor = Moments()
    monkeypatch.setattr(quality, "make_extractor", lambda *arguments, **options: extractor)
    return extractor


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("trained")
    images = np.random.default_rng(0).integers(0, 256, (110, 8, 8), dtype=np.uint8)
    np.savez(workdir / "images.npz", train_images=images[:100], test_images=images[100:])
    run_lib.train(config(workdir), workdir, CPU)
    return workdir


def config(trained: Path, **overrides):
    """The config of the run ``trained``: digits' network on 100 images of noise without labels."""
    result = get_config("u")
    result.data.update(dataset="npz", path=str(trained / "images.npz"))
    result.update_from_flattened_dict(TINY | {name.replace("__", "."): value for name, value in overrides.items()})
    return result


def evaluated(trained: Path, workdir: Path, cache: Path, **overrides) -> dict:
    (workdir / "checkpoints").mkdir(parents=True, exist_ok=True)
    link = workdir / "checkpoints" / "step_00000002.pt"
    if not link.exists():
        link.symlink_to(trained / "checkpoints" / "step_00000002.pt")
    return run_lib.evaluate(config(trained, **overrides), workdir, run_lib.Runtime(device="cpu", cache_dir=str(cache)))


def test_metrics_are_those_of_samples_against_the_training_set(trained, tmp_path, moments):
    metrics = evaluated(trained, tmp_path / "w", tmp_path / "cache")
    assert moments.seen == 100 + 20
    with np.load(tmp_path / "w" / "eval" / "samples.npz", allow_pickle=False) as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2)
    (statistics,) = (tmp_path / "cache").glob("*.npz")
    with np.load(statistics, allow_pickle=False) as file:
        real = file["pool_3"]
    expected = sample_quality(real, Features(*(values.numpy() for values in Moments()(images))), seed=42)
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    described = {"features": "moments", "reference": "training images", "num_reference": 100, "backend": "torch"}
    assert described.items() <= metrics.items() and metrics["feature_test_accuracy"] is None
    assert json.loads((tmp_path / "w" / "eval" / "metrics.json").read_text()) == metrics


def test_interrupted_extraction_resumes(trained, tmp_path, moments, monkeypatch):
    """Stopped within the data and again within the samples: no finished batch is computed again."""
    whole = evaluated(trained, tmp_path / "whole", tmp_path / "cache of whole")
    moments.seen = 0
    for stop, kept in ((49, 49), (100 + 7, 100 + 7)):
        moments.breaks_at = stop
        with pytest.raises(KeyboardInterrupt):
            evaluated(trained, tmp_path / "broken", tmp_path / "cache")
        assert moments.seen == kept
    moments.breaks_at = None
    assert evaluated(trained, tmp_path / "broken", tmp_path / "cache") == whole
    assert moments.seen == 100 + 20
    assert not list((tmp_path / "broken" / "eval" / "stages" / "parts").iterdir())


def test_finished_results_stay(trained, tmp_path, moments, caplog):
    """Whatever is evaluated or sampled after them: fewer samples, no samples, other weights."""
    workdir, cache = tmp_path / "w", tmp_path / "cache"
    first = evaluated(trained, workdir, cache)
    assert first["fid"] is not None and first["checkpoint_step"] == 2

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (workdir / "eval").rglob("*") if path.is_file()}

    before = contents()
    run_lib.sample(config(trained, sampling__num_samples=4), workdir, CPU)
    assert before.items() <= contents().items()
    # Of the same weights, what is not measured again stays.
    assert evaluated(trained, workdir, cache, eval__enable_sampling=False) == first
    # Older weights have their own file.
    state = read_checkpoint(trained / "checkpoints" / "step_00000002.pt")
    state["step"] = 1
    state["ema"]["model"] = {name: 0.9 * weight for name, weight in state["ema"]["model"].items()}
    write_checkpoint(tmp_path / "older.pt", state)
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(cache))
    older = run_lib.evaluate(config(trained), workdir, runtime, tmp_path / "older.pt")
    assert older["checkpoint_step"] == 1 and older["fid"] != first["fid"]
    assert before.items() <= contents().items()
    assert f"{workdir / 'eval' / 'metrics.json'} is of step 2, and stays" in caplog.text
    (path,) = (workdir / "eval" / "metrics").glob("step_00000001-*.json")
    assert read_json(path, checksum=True) == older
    # Newer ones take the place that a report reads, whole: of what they were not measured nothing is left there.
    state["step"] = 3
    write_checkpoint(tmp_path / "newer.pt", state)
    newer = run_lib.evaluate(config(trained, eval__enable_sampling=False), workdir, runtime, tmp_path / "newer.pt")
    assert newer["fid"] is None and json.loads((workdir / "eval" / "metrics.json").read_text()) == newer
    assert not (workdir / "eval" / "samples.npz").exists()
    seen = moments.seen
    assert evaluated(trained, workdir, cache) == first and moments.seen == seen  # nothing is computed again


def test_statistics_are_computed_once_for_every_run(trained, tmp_path, moments):
    """--mode=stats makes the file that evaluations with the same cache use, of whatever model."""
    cache = tmp_path / "cache"
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(cache))
    path = run_lib.statistics(config(trained, model__nf=16), tmp_path / "elsewhere", runtime)
    assert path.parent == cache and moments.seen == 100
    with np.load(path, allow_pickle=False) as file:
        assert file["pool_3"].shape == (100, 6) and file["logits"].shape == (100, 5)
    assert run_lib.statistics(config(trained), trained, runtime) == path and moments.seen == 100
    first = evaluated(trained, tmp_path / "w", cache)
    assert moments.seen == 100 + 20
    # The same file, given by its path, in the place of somebody else's statistics.
    again = evaluated(trained, tmp_path / "w", tmp_path / "empty", eval__stats_path=str(path))
    assert moments.seen == 100 + 20 and not (tmp_path / "empty").exists()
    assert again == first | {"reference": path.name}
    # Without a cache the statistics stay with the run.
    own = run_lib.statistics(config(trained), tmp_path / "own", CPU)
    assert own.is_relative_to(tmp_path / "own" / "eval" / "cache") and own.name == path.name
    with pytest.raises(run_lib.InvalidRun, match=r"eval\.stats_path=x\.npz: there is nothing to compute"):
        run_lib.statistics(config(trained, eval__stats_path="x.npz"), tmp_path / "own", CPU)


def test_statistics_of_something_else_are_not_used(trained, tmp_path, moments, caplog):
    cache = tmp_path / "cache"
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(cache))
    original = run_lib.statistics(config(trained), tmp_path / "w", runtime)
    with np.load(original, allow_pickle=False) as file:
        whole = file["pool_3"]
    # Fewer images, evenly spaced.
    fewer = run_lib.statistics(config(trained, eval__num_reference=30), tmp_path / "w", runtime)
    with np.load(fewer, allow_pickle=False) as file:
        assert np.array_equal(file["pool_3"], whole[np.arange(30) * 100 // 30])
    # Another extractor.
    moments.key = "moments-2"
    other = run_lib.statistics(config(trained), tmp_path / "w", runtime)
    assert len({original, fewer, other}) == 3 and moments.seen == 100 + 30 + 100
    # A file that is not what its name says, or is damaged, is replaced.
    other.write_bytes(original.read_bytes())
    run_lib.statistics(config(trained), tmp_path / "w", runtime)
    other.write_bytes(other.read_bytes()[:500])
    run_lib.statistics(config(trained), tmp_path / "w", runtime)
    assert moments.seen == 100 + 30 + 3 * 100 and f"{other.name} is damaged" in caplog.text


def test_features_of_samples_belong_to_samples_and_extractor(trained, tmp_path, moments):
    first = evaluated(trained, tmp_path / "w", tmp_path / "cache")
    seen = moments.seen
    assert evaluated(trained, tmp_path / "w", tmp_path / "cache") == first and moments.seen == seen
    evaluated(trained, tmp_path / "w", tmp_path / "cache", sampling__snr=0.1)
    assert moments.seen == seen + 20
    moments.key = "moments-2"
    evaluated(trained, tmp_path / "w", tmp_path / "cache", sampling__snr=0.1)
    assert moments.seen == seen + 20 + 100 + 20


@pytest.mark.parametrize(
    "overrides, message",
    [
        (dict(eval__features="vgg"), r"eval\.features='vgg': allowed are inception, classifier"),
        (dict(eval__features="vgg:net"), r"eval\.features='vgg:net': No module named 'vgg'"),
        (dict(eval__backend="x:y"), r"eval\.backend='x:y': No module named 'x'"),
        (dict(eval__metrics=("x:y",)), r"eval\.metrics='x:y': No module named 'x'"),
        (dict(eval__num_samples=3), r"eval\.num_samples=3: FID and its relatives need at least 4"),
        (dict(eval__inception_path="gone.pth"), r"eval\.inception_path=gone\.pth: no such file"),
        (dict(eval__inception_path="README.md"), r"weights of Inception in README\.md are not those expected"),
        (dict(eval__stats_path="gone.npz", eval__features="user_classes:moments"), r"eval\.stats_path: gone\.npz"),
        (dict(sampling__predictor="x:y"), r"sampling\.predictor='x:y'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_settings_are_refused_before_any_work(trained, tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(ROOT)
    with pytest.raises(run_lib.InvalidRun, match=message) as caught:
        evaluated(trained, tmp_path / "w", tmp_path / "cache", **overrides)
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "w").iterdir()} == {"checkpoints"}


def test_missing_tensorflow_is_said_before_any_work(trained, tmp_path, moments, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    with pytest.raises(
        run_lib.InvalidRun, match=r"eval\.backend='tfgan': it cannot be imported \(import of tensorflow"
    ):
        evaluated(trained, tmp_path / "w", tmp_path / "cache", eval__backend="tfgan")
    assert moments.seen == 0


# ------------------------------------------------------------------------------------------------ the paper's protocol


PROTOCOL = {
    "model.nf": 8,
    "model.num_res_blocks": 1,
    "model.ch_mult": (1, 1),
    "training.qc_probes": 2,
    "training.batch_size": 4,
    "training.n_iters": 2,
    "training.snapshot_sampling": False,
    "data.dataset": "npz",
    "sampling.num_steps": 2,
    "likelihood.solver": "heun",
    "likelihood.num_steps": 2,
    "eval.batch_size": 6,
    "eval.asym_levels": 2,
    "eval.asym_probes": 1,
}


def protocol(folder: Path, inception_weights: tuple[Path, str], num_samples: int) -> dict[str, object]:
    """Overrides of the config of CIFAR-10: a tiny network, 8 + 4 unlabelled images, and Inception from a file."""
    # Large blocks rather than noise: images that differ in Inception's eyes.
    blocks = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    images = blocks.repeat(8, axis=1).repeat(8, axis=2)
    np.savez(folder / "images.npz", train_images=images[:8], test_images=images[8:])
    path, sha256 = inception_weights
    given = {"data.path": str(folder / "images.npz"), "eval.num_samples": num_samples}
    return PROTOCOL | given | {"eval.inception_path": str(path), "eval.inception_sha256": sha256}


def check_metrics(folder: Path, num_samples: int, **described) -> dict:
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    names = "nll_bits_per_dim asym nasym fid kid kid_se inception_score precision recall density coverage"
    assert all(np.isfinite(metrics[name]) for name in names.split())
    # Two steps of predictor and corrector and one denoising.
    expected = {"num_samples": num_samples, "num_reference": 8, "checkpoint_step": 2, "nfe_sampling": 5.0, **described}
    assert expected.items() <= metrics.items()
    stored = [read_arrays(path) for path in (folder / "eval" / "stages").glob("sample_features-*.npz")]
    assert all(len(arrays["pool_3"]) == num_samples for arrays in stored)
    scores = [inception_score(arrays["logits"], 1)[0] for arrays in stored]
    assert any(metrics["inception_score"] == pytest.approx(score, rel=1e-3) for score in scores)
    return metrics


def test_protocol_of_the_paper_in_small(tmp_path, inception_weights):
    """Training with the QC term, statistics, all metrics and the report, in one process."""
    settings = importlib.import_module("configs.qcsbm.cifar10").get_config("qc")
    settings.update_from_flattened_dict(protocol(tmp_path, inception_weights, num_samples=8))
    runtime = run_lib.Runtime(device="cpu", cache_dir=str(tmp_path / "cache"))
    run_lib.train(settings, tmp_path / "qc", runtime)
    statistics = run_lib.statistics(settings, tmp_path / "qc", runtime)
    with np.load(statistics, allow_pickle=False) as file:
        assert file["pool_3"].shape == (8, 2048) and file["logits"].shape == (8, 1008)
    written = statistics.stat().st_mtime_ns
    features = f"inception-{inception_weights[1][:8]}"
    run_lib.evaluate(settings, tmp_path / "qc", runtime)
    check_metrics(tmp_path / "qc", 8, features=features, backend="torch", reference="training images")
    assert statistics.stat().st_mtime_ns == written
    text = main.write_report(tmp_path / "qc")
    assert "QC-NCSN++" in text and features in text


def test_the_backend_asked_for_is_the_one_used(trained, tmp_path, moments, monkeypatch):
    backend = Backend("other", lambda x, y: 2.5, lambda x, y: float(len(x)), lambda logits: 1.5)
    monkeypatch.setattr(tfgan, "tfgan_backend", lambda: backend)
    metrics = evaluated(trained, tmp_path / "w", tmp_path / "cache", eval__backend="tfgan")
    # KID averages over subsets of half of the smaller set.
    assert (metrics["fid"], metrics["kid"], metrics["inception_score"]) == (2.5, 10.0, 1.5)
    assert (metrics["backend"], metrics["features"]) == ("other", "moments") and moments.seen == 100 + 20


@pytest.mark.slow
def test_protocol_of_the_paper_by_its_commands(tmp_path, inception_weights):
    """What the README says, with 64 samples: both backends from the same activations, and TF-Hub's Inception."""
    options = [f"--config.{name}={value}" for name, value in protocol(tmp_path, inception_weights, 64).items()]

    def run(*arguments: str) -> str:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        answer = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout

    def main(mode: str, *arguments: str) -> str:
        folders = [f"--workdir={tmp_path / 'qc'}", f"--cache_dir={tmp_path / 'cache'}"]
        config = f"--config={ROOT / 'configs/qcsbm/cifar10.py'}:qc"
        return run("main.py", config, *folders, f"--mode={mode}", "--device=cpu", *options, *arguments)

    main("train")
    statistics = Path(main("stats").strip())
    assert statistics.parent == tmp_path / "cache" and statistics.is_file()
    printed = main("eval")
    own = check_metrics(tmp_path / "qc", 64, backend="torch", reference="training images")
    assert f"fid                      {own['fid']:.6g}" in printed
    if has_tensorflow:
        main("eval", "--config.eval.backend=tfgan")
        theirs = check_metrics(tmp_path / "qc", 64, backend="tensorflow-gan", features=own["features"])
        for name in ("fid", "kid", "inception_score"):
            assert theirs[name] == pytest.approx(own[name], rel=1e-3), name
        run(
            "-c",
            "import sys; sys.path.insert(0, 'tests'); import saved_model; saved_model.save(sys.argv[1])",
            str(tmp_path / "hub"),
        )
        options = [option for option in options if not option.startswith("--config.eval.inception_")]
        main("eval", "--config.eval.backend=tfgan", f"--config.eval.tfhub_inception={tmp_path / 'hub'}")
        check_metrics(tmp_path / "qc", 64, backend="tensorflow-gan", features="inception-tfhub")
    assert "QC-NCSN++" in run("-m", "report.main", str(tmp_path / "qc"))
