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
from PIL import Image

from checkpoints import read_checkpoint
from configs.wasserstein import cifar10
from configs.wasserstein.digits import MODELS, get_config
from data import sets
from data.pixels import scale, to_unit_interval, unscale
from evaluation import fid, fid_with_error, frechet_distance
from exact.distributions import Gaussian
from sampling import ODESampler, PCSampler
from sde_lib import get_sde
from wasserstein_example import digits, theory

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "training.n_iters": 8,
    "training.batch_size": 4,
    "training.snapshot_freq_for_preemption": 1,
    "eval.num_samples": 40,
    "eval.batch_size": 20,
}
PROCESSES = ("ve_v1", "vp_v2")
STEPS = {"exponential_integrator": (2, 20), "ancestral_sampling": (3,), "heun": (2,)}


def make_tasks(workdir: Path, **options) -> list[digits.Task]:
    options = dict(processes=PROCESSES, seeds=1, steps=STEPS, overrides=TINY) | options
    return digits.make_tasks(workdir, **options)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, digits.Results]:
    """The whole experiment in small, uninterrupted."""
    folder = tmp_path_factory.mktemp("digits")
    return folder, digits.run(folder, make_tasks(folder), jobs=1)


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
def test_gaussian_prediction_agrees_with_monte_carlo(tmp_path, process, sampler, steps):
    """Samples of ``sampling`` with the exact score of digits dequantised by drawing. Few steps, at which W₂ is far
    above what 4000 samples of 64 dimensions add to it."""
    tasks = make_tasks(tmp_path, processes=[process], steps={sampler: [steps]})
    [row] = digits.gaussian_rows(tasks)
    config = tasks[0].config
    data, _ = sets.get_dataset(config)
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
    folder, results = finished
    for row in results.rows:
        assert row["nfe"] == digits.evaluations(row["sampler"], row["K"])
    samples = folder / "runs" / "vp_v2" / "seed_0" / "samples"
    names = {path.name.rpartition("-")[0] for path in samples.iterdir()}
    pc = ("exponential_integrator-none-2", "exponential_integrator-none-20", "ancestral_sampling-none-3")
    assert names == {"step_00000008-ode-heun-2", *(f"step_00000008-pc-{name}" for name in pc)}


# -------------------------------------------------------------------------------------------------------------- errors


def test_fewer_results_do_not_replace_more(finished, tmp_path):
    folder, _ = finished
    before = contents(folder)
    for fewer in (dict(processes=PROCESSES[:1]), dict(steps=STEPS | {"heun": ()})):
        with pytest.raises(ValueError, match=r"results\.json holds \d rows that are not asked for now, e\.g\. "):
            digits.run(folder, make_tasks(folder, **fewer), jobs=1)
    assert contents(folder) == before


def test_row_without_its_numbers_is_made_again(tmp_path):
    key = {"process": "ve", "K": 5}
    whole = {**key, "fid": 1.0, "fid_se": 0.1, "nfe": 5}
    for row, expected in ((whole, whole), (key, None), ({**whole, "K": 6}, None)):
        (tmp_path / "row.json").write_text(json.dumps(row))
        assert digits._read_row(tmp_path / "row.json", key) == expected


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
    assert results.seed_deviation("heun", 5) == pytest.approx(np.sqrt(0.5))
    assert results.rank_correlation("heun", 5) == pytest.approx(0.5)
    assert results.sampling_error("heun", 5) == pytest.approx(0.1)
    text = digits.table(results)
    assert "| VE constant             | 3.72 (2–5.44) |" in text and "exponential integrator" not in text
    one = results_of([[1.5], [2.5]], [0.1, 0.2])
    assert one.seed_deviation("heun", 5) is None and one.rank_correlation("heun", 5) is None
    assert "| VE geometric            | 1.5   |" in digits.table(one)


# --------------------------------------------------------------------------------------------------- the whole command


def test_whole_experiment(finished):
    folder, results = finished
    stored = json.loads((folder / "results.json").read_text())
    keys = {(row["process"], row["seed"], row["sampler"], row["K"]) for row in stored["rows"]}
    plan = {(sampler, k) for sampler, steps in STEPS.items() for k in steps}
    assert keys == {(p, 0, *pair) for p in PROCESSES for pair in plan} and len(stored["rows"]) == 8
    assert len(stored["gaussian"]) == 8 and stored["feature_test_accuracy"] > 0.97
    # 8 steps of training are next to none.
    assert all(row["fid"] > 5 and row["fid_se"] > 0 for row in stored["rows"])
    assert (folder / "table.md").read_text() == digits.table(results)
    with Image.open(folder / "fid.png") as image:
        assert image.format == "PNG" and image.width > 1000 and len(np.unique(np.asarray(image))) > 20


def test_work_that_is_done_is_reported_and_not_done_again(finished, tmp_path, monkeypatch):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "copy")
    [task, *_] = make_tasks(tmp_path / "copy")
    done: list[int] = []
    digits.train(task, done.append)
    assert sum(done) == 8
    monkeypatch.setattr(digits, "measure", lambda *arguments: pytest.fail("sampled again"))
    done.clear()
    rows = digits.sample(task, done.append)
    assert rows == results.rows[:4] and sum(done) == 40 * (3 + 21 + 4 + 5)


def test_more_steps_are_added_and_what_is_damaged_or_of_other_settings_is_made_again(finished, tmp_path, caplog):
    folder, results = finished
    shutil.copytree(folder, tmp_path / "copy")
    [task] = make_tasks(tmp_path / "copy", processes=["vp_v2"], steps={"exponential_integrator": (2, 3, 20)})
    stored = Path(task.directory) / "fid"
    (stored / "exponential_integrator-2.json").write_text("{")
    other = json.loads((stored / "exponential_integrator-20.json").read_text()) | {"num_samples": 50, "fid": 0.1}
    (stored / "exponential_integrator-20.json").write_text(json.dumps(other))
    done: list[int] = []
    rows = digits.sample(task, done.append)
    assert "exponential_integrator-2.json is damaged" in caplog.text
    assert [row["K"] for row in rows] == [2, 3, 20] and sum(done) == 40 * (3 + 4 + 21)
    assert rows[0] in results.rows and rows[2] in results.rows


SCRIPT = """
import sys
from pathlib import Path
from test_wasserstein_digits import digits, make_tasks
digits.run(sys.argv[1], make_tasks(Path(sys.argv[1])), jobs=1)
"""


def test_killed_at_any_moment_and_resumed_ends_with_identical_results(finished, tmp_path):
    """SIGKILL while training and while sampling, against the uninterrupted run."""
    folder, results = finished
    broken = tmp_path / "broken"
    shutil.copytree(folder / "cache", broken / "cache")
    path = os.pathsep.join((str(ROOT), str(ROOT / "tests")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    for trace in ("runs/ve_v1/seed_0/checkpoints/*.pt", "runs/*/seed_0/fid/*.json"):
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(broken)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline and not list(broken.glob(trace)):
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert not (broken / "results.json").exists()
    assert digits.run(broken, make_tasks(broken), jobs=1) == results
    for name in ("results.json", "table.md"):
        assert (broken / name).read_bytes() == (folder / name).read_bytes()
    for task in make_tasks(broken):
        whole, resumed = (
            read_checkpoint(root / "runs" / task.process / "seed_0" / "checkpoints" / "step_00000008.pt")
            for root in (folder, broken)
        )
        for name, tensor in whole["ema"]["model"].items():
            assert torch.equal(tensor, resumed["ema"]["model"][name])


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(processes=["ve", "ve_v4"]), "--processes=ve_v4: allowed are ve, ve_v1, "),
        (dict(processes=[]), "--processes is empty"),
        (dict(seeds=0), "--seeds=0: at least 1"),
        (dict(steps={"heun": ()}), "--steps, --ancestral_steps, --heun_steps are all empty"),
        (dict(overrides={"training.n_iters": 0}), "training.n_iters=0: at least 1"),
        (dict(overrides={"eval.num_samples": 39}), "eval.num_samples=39: .* at least 40"),
    ],
)
def test_bad_input(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        make_tasks(tmp_path / "new", **changes)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"experiment.json": '{"experiment": "circles", "settings": {}}'}, "belongs to the experiment 'circles'"),
        ({"config.json": "{}"}, "holds a run of main.py"),
        ({"runs/ve_v1/seed_0/config.json": "{}"}, "holds another run: data.dataset was 'CIFAR10', is 'digits'"),
        ({"runs/ve_v1/seed_0/experiment.json": "{}"}, "belongs to one of the examples"),
    ],
)
def test_folder_of_something_else_is_refused_before_any_work(tmp_path, monkeypatch, files, message):
    monkeypatch.setattr(digits, "run_all", lambda *arguments, **options: pytest.fail("work was started"))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        digits.run(tmp_path, make_tasks(tmp_path), jobs=1)
    assert contents(tmp_path) == before


def test_no_jobs(tmp_path):
    with pytest.raises(ValueError, match="--jobs=0: at least 1"):
        digits.run(tmp_path / "new", make_tasks(tmp_path / "new"), jobs=0)
    assert not (tmp_path / "new").exists()


def test_mistake_is_answered_in_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "wasserstein_example.digits", f"--workdir={tmp_path / 'w'}", "--heun_steps=5,0"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1 and done.stderr == "error: --heun_steps=0: allowed are integers from 1 on\n"
    assert not (tmp_path / "w").exists()
