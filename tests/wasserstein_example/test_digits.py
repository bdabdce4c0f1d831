"""Nine forward processes on digits: what is trained and compared, the errors, and that killing it changes nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from from_config import get_dataset, get_sde
from PIL import Image

import features.classifier
from checkpoints import read_checkpoint
from configs.wasserstein import cifar10
from configs.wasserstein.digits import MODELS, get_config
from data.format import scale, to_unit_interval, unscale
from evaluation import fid, fid_with_error, frechet_distance
from exact.distributions import Gaussian
from sampling import ODESampler, PCSampler
from wasserstein_example import digits, theory

ROOT = Path(__file__).resolve().parents[2]
PROCESSES = ("ve_v1", "vp_v2")
STEPS = dict(steps=(2, 20), ancestral_steps=(3,), heun_steps=(2,))
PLAN = [("exponential_integrator", 2), ("exponential_integrator", 20), ("ancestral_sampling", 3), ("heun", 2)]


def tiny_config(process: str):
    """8 steps of training, which are next to none, of a small network, and 40 samples."""
    config = get_config(process)
    config.model.update(nf=8, num_res_blocks=1)
    config.training.update(n_iters=8, batch_size=4, snapshot_freq_for_preemption=1)
    config.eval.update(num_samples=40, batch_size=20)
    return config


def make_small(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(digits, "get_config", tiny_config)
    patch.setattr(features.classifier, "_IMAGES_SEEN", 1)  # 10 epochs instead of 30


@pytest.fixture(autouse=True, scope="module")
def small():
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        yield


def run(folder: Path, **options) -> str:
    return digits.run(str(folder), **dict(processes=PROCESSES, seeds=1, jobs=1) | STEPS | options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small) -> Path:
    """The whole experiment in small, uninterrupted."""
    folder = tmp_path_factory.mktemp("digits")
    run(folder)
    return folder


# --------------------------------------------------------------------------------------------------- what is compared


def test_processes_are_those_of_the_paper_and_theory():
    assert set(digits.NAMES.values()) == set(theory.SDES) and list(MODELS) == list(cifar10.MODELS)
    times = torch.linspace(0, 1, 7, dtype=torch.float64)
    for process, name in digits.NAMES.items():
        config = get_config(process)
        sde, exact = get_sde(config), theory.SDES[name]
        assert type(sde.schedule) is type(exact.schedule)
        if process.startswith("ve"):  # the same but for σ_max
            assert sde.std(times[[0, -1]]).tolist() == pytest.approx([0.01, 10.0]) and not config.data.centered
        else:
            torch.testing.assert_close(sde.std(times), exact.std(times))
            assert config.data.centered
        assert config.data.dataset == "digits" and config.sampling.predictor == theory.ANALYSED


@pytest.mark.parametrize(
    ("process", "sampler", "steps"),
    [
        ("ve_v1", "exponential_integrator", 5),
        ("vp", "exponential_integrator", 5),
        ("vp", "ancestral_sampling", 5),
        ("vp", "heun", 5),
    ],
)
def test_gaussian_prediction_agrees_with_monte_carlo(process, sampler, steps):
    """Samples of ``sampling`` with the exact score of digits dequantised by drawing. Few steps, at which W₂ is far
    above what 4000 samples of 64 dimensions add to it."""
    [row] = digits.gaussian_rows([process], [(sampler, steps)])
    config = get_config(process)
    data, _ = get_dataset(config)
    images = data.batch(torch.arange(len(data)))[0].repeat(20, 1, 1, 1)
    noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0 = to_unit_interval(images, data.num_levels, dequantization=noise).flatten(1)
    mean, covariance = x0.mean(0), x0.T.cov()
    x0 = scale(x0, config.data.centered)
    sde = get_sde(config)
    score = Gaussian(sde, x0.mean(0), x0.T.cov()).score
    like = torch.zeros(4000, 64, dtype=torch.float64)
    if sampler == "heun":
        users_sampler = ODESampler(sde, solver="heun", num_steps=steps, noise_removal=True)
    else:
        users_sampler = PCSampler(sde, sampler, "none", num_steps=steps)
    x = unscale(users_sampler(score, like, torch.Generator().manual_seed(1)).x, config.data.centered)
    distance = frechet_distance(x.mean(0), x.T.cov(), mean, covariance) ** 0.5
    assert row["w2"] == pytest.approx(distance, rel=0.03)


def test_samples_are_those_of_the_sampler_and_steps_that_are_reported(finished):
    for row in json.loads((finished / "results.json").read_text())["rows"]:
        assert row["nfe"] == digits.evaluations(row["sampler"], row["K"])
    samples = finished / "runs" / "vp_v2" / "seed_0" / "samples"
    names = {path.name.rpartition("-")[0] for path in samples.iterdir()}
    pc = ("exponential_integrator-none-2", "exponential_integrator-none-20", "ancestral_sampling-none-3")
    assert names == {"step_00000008-ode-heun-2", *(f"step_00000008-pc-{name}" for name in pc)}


# -------------------------------------------------------------------------------------------------------------- errors


def test_jackknife_error_is_the_deviation_between_sets_of_samples():
    random = np.random.default_rng(0)
    real = random.normal(size=(500, 4))
    sets = [1.3 * random.normal(size=(300, 4)) + 0.2 for _ in range(200)]
    values, errors = np.array([fid_with_error(real, generated) for generated in sets]).T
    assert values[0] == fid(real, sets[0])
    # 200 sets give their standard deviation within 5 % (one standard error); the jackknife errs upwards a little.
    assert np.sqrt(np.mean(errors**2)) == pytest.approx(values.std(ddof=1), rel=0.15)


def results_of(fids: list[list[float]], w2: list[float]) -> digits.Results:
    processes = tuple(list(MODELS)[: len(fids)])
    case = {"sampler": "heun", "K": 5}
    rows = [
        {"process": p, "seed": s, "num_samples": 100, "nfe": 11.0, "fid": value, "fid_se": 0.1 * value} | case
        for p, values in zip(processes, fids, strict=True)
        for s, value in enumerate(values)
    ]
    gaussian = [{"process": p, "w2": value} | case for p, value in zip(processes, w2, strict=True)]
    return digits.Results(processes, len(fids[0]), (("heun", 5),), rows, gaussian, 0.99)


def test_statistics_of_the_table():
    e = float(np.e)
    results = results_of([[1.0, e], [2.0, 2 * e], [3.0, 3 * e]], [0.1, 0.3, 0.2])
    statistics = results.statistics("heun", 5)
    assert statistics["deviation between seeds"] == pytest.approx(np.sqrt(0.5))
    assert statistics["rank correlation"] == pytest.approx(0.5)
    assert statistics["its p-value"] == pytest.approx(2 / 3)  # Student's t = 1/√3 with one degree of freedom
    assert statistics["error of the samples"] == pytest.approx(0.1)
    text = digits.table(results)
    assert "| VE constant             | 3.72 (2–5.44) |" in text and "exponential integrator" not in text
    one = results_of([[1.5], [2.5]], [0.1, 0.2])
    assert [*one.statistics("heun", 5).values()][1:] == [None, None, None]
    assert "| VE geometric            | 1.5   |" in digits.table(one)


# --------------------------------------------------------------------------------------------------- the whole command


def test_whole_experiment(finished):
    stored = json.loads((finished / "results.json").read_text())
    keys = {(row["process"], row["seed"], row["sampler"], row["K"]) for row in stored["rows"]}
    assert keys == {(p, 0, *case) for p in PROCESSES for case in PLAN} and len(stored["rows"]) == 8
    assert len(stored["gaussian"]) == 8 and stored["feature_test_accuracy"] > 0.97
    assert all(row["fid"] > 5 and row["fid_se"] > 0 for row in stored["rows"])
    with Image.open(finished / "fid.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(np.unique(np.asarray(image))) > 20


def test_work_that_is_done_is_reported_and_not_done_again(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    done: list[int] = []

    def run_all(tasks, **options):
        return [task(done.append) for task in tasks.values()]

    monkeypatch.setattr(digits, "run_all", run_all)
    monkeypatch.setattr(digits.run_lib, "sample", lambda *arguments: pytest.fail("sampled again"))
    assert run(folder) == (finished / "table.md").read_text()
    assert sum(done) == 2 * (8 + 40 * (3 + 21 + 4 + 5))
    assert (folder / "results.json").read_bytes() == (finished / "results.json").read_bytes()


def test_more_steps_are_added(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "copy")
    config, workdir = tiny_config("vp_v2"), folder / "runs" / "vp_v2" / "seed_0"
    done: list[int] = []
    plan = [("exponential_integrator", k) for k in (2, 3, 20)]
    rows = digits.sample(config, workdir, str(folder / "cache"), "cpu", plan, done.append)
    assert [row["K"] for row in rows] == [2, 3, 20] and sum(done) == 40 * (3 + 4 + 21)
    stored = [row | {"process": "vp_v2", "seed": 0} for row in rows]
    before = json.loads((finished / "results.json").read_text())["rows"]
    assert stored[0] in before and stored[2] in before and (workdir / "fid" / "exponential_integrator-3.json").exists()


SCRIPT = """
import sys
from pathlib import Path
import pytest
from test_digits import make_small, run
make_small(pytest.MonkeyPatch())
run(Path(sys.argv[1]))
"""


@pytest.mark.faults
def test_killed_at_any_moment_and_resumed_ends_with_identical_results(finished, tmp_path):
    """SIGKILL while sampling, with one network trained, against the uninterrupted run."""
    broken = tmp_path / "broken"
    shutil.copytree(finished / "cache", broken / "cache")
    path = os.pathsep.join(map(str, (ROOT, ROOT / "tests", Path(__file__).parent)))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(broken)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list(broken.glob("runs/*/seed_0/fid/*.json")):
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (broken / "results.json").exists()
    run(broken)
    for name in ("results.json", "table.md"):
        assert (broken / name).read_bytes() == (finished / name).read_bytes()
    for process in PROCESSES:
        whole, resumed = (
            read_checkpoint(root / "runs" / process / "seed_0" / "checkpoints" / "step_00000008.pt")
            for root in (finished, broken)
        )
        for name, tensor in whole["ema"]["model"].items():
            assert torch.equal(tensor, resumed["ema"]["model"][name])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(processes=("ve", "ve_v4")), "--processes=ve_v4: allowed are ve, ve_v1, "),
        (dict(processes=()), "--processes .*give at least one"),
        (dict(seeds=0), "--seeds=0: at least 1"),
        (dict(jobs=0), "--jobs=0: at least 1"),
        (dict(steps=(), ancestral_steps=(), heun_steps=()), "--heun_steps: give at least one"),
        (dict(heun_steps=(5, 0)), "--steps=0: at least 1"),
        (dict(device="gpu"), "--device=gpu: allowed are"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"experiment.json": '{"experiment": "circles", "settings": {}}'}, "belongs to the experiment 'circles'"),
        ({"config.json": "{}"}, "holds a run of main.py"),
    ],
)
def test_folder_of_something_else_is_refused_before_any_work(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(digits, "run_all", lambda *arguments, **options: pytest.fail("work was started"))
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        run(tmp_path)
    assert contents(tmp_path) == before
