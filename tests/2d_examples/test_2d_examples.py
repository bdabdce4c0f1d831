"""The 2-D examples: configs, network, one run, the table over seeds."""

from __future__ import annotations

import importlib
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist

from models.mlp import NoiseConditionalMLP
from sde_lib import VE, GeometricSigma

configs = importlib.import_module("2d_examples.configs")
experiment = importlib.import_module("2d_examples.experiment")
figures = importlib.import_module("2d_examples.figures")
table = importlib.import_module("2d_examples.table")

PAIRS = [f"{dataset}-{model}" for dataset in configs.DATASETS for model in configs.MODELS]
TINY = {
    "data.num_train": 200,
    "data.num_test": 60,
    "training.batch_size": 50,
    "training.n_iters": 6,
    "training.log_freq": 2,
    "training.save_freq": 3,
}


def tiny_run(tmp_path, name="gaussian_8-u", **overrides):
    config = configs.get_config(name)
    config.update_from_flattened_dict({**TINY, **overrides})
    return experiment.Run(config, tmp_path / name)


# ------------------------------------------------------------------------------------------------------------- network


def test_network_is_the_one_of_the_paper():
    """Written out from the specification, with every β away from its initial 1."""
    network = NoiseConditionalMLP(2, output_activation="elu").double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    x = torch.randn(7, 2, generator=generator, dtype=torch.float64)
    sigma = torch.rand(7, generator=generator, dtype=torch.float64)
    p = {name: value.numpy() for name, value in network.state_dict().items()}

    def swish(z, beta):
        return z / (1 + np.exp(-beta * z))

    def branch(values, name):
        for i in (0, 2, 4):
            values = values @ p[f"{name}.{i}.weight"].T + p[f"{name}.{i}.bias"]
            if i < 4:
                values = swish(values, p[f"{name}.{i + 1}.beta"])
        return values

    features = np.concatenate([branch(x.numpy(), "point"), branch(sigma.numpy()[:, None], "noise")], axis=1)
    o = swish(features, p["joint_activation.beta"]) @ p["joint.weight"].T + p["joint.bias"]
    expected = x.numpy() - np.where(o > 0, o, np.expm1(o))
    np.testing.assert_allclose(network(x, sigma).detach().numpy(), expected, rtol=1e-12)


def test_network_sizes():
    count = sum(p.numel() for p in NoiseConditionalMLP(2).parameters())
    linear = (2 * 64 + 64) + (64 * 128 + 128) + (128 * 256 + 256) + 3 * 2 + (257 * 2 + 2)
    assert count == linear + (64 + 128) + 2 + 257  # and a β for every unit that a Swish follows


def test_hutchinson_in_the_plane_is_seeded(tmp_path):
    run = tiny_run(tmp_path, **{"likelihood.divergence": "rademacher"})
    first, second = (experiment.evaluate_score(run, run.model).metrics["nll"] for _ in range(2))
    assert first == second


def test_unknown_activation():
    with pytest.raises(ValueError, match=r"model\.output_activation='relu'.*leaky_relu"):
        NoiseConditionalMLP(2, output_activation="relu")


# ------------------------------------------------------------------------------------------------------- configs, runs


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_resolves_and_trains(name, tmp_path):
    run = tiny_run(tmp_path, name)
    before = [p.detach().clone() for p in run.model.parameters()]
    experiment.train(run)
    assert any(not torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))
    rows = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6]
    assert all(("qc" in row) == name.endswith("-qc") for row in rows)


@pytest.mark.parametrize("name", ["gaussian_8", "gaussian_8-x", "moons-u", "-u", ""])
def test_unknown_pairs(name):
    with pytest.raises(ValueError, match=r"config argument .*gaussian_8, checkerboard, spiral_2.*u, c, qc"):
        configs.get_config(name)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.dataset": "moons"}, r"data\.dataset='moons'.*gaussian_8"),
        ({"training.batch_size": 0}, r"training\.batch_size=0"),
        ({"training.batch_size": 201}, r"training\.batch_size=201.*data\.num_train=200"),
        ({"training.n_iters": 0}, r"training\.n_iters=0"),
        ({"data.num_test": 3}, r"data\.num_test=3"),
        ({"optim.lr": 0.0}, r"optim\.lr=0"),
        ({"optim.grad_clip": -1.0}, r"optim\.grad_clip=-1"),
        ({"seed": -1}, r"seed=-1"),
        ({"model.sigma_min": 4.0}, r"sigma_min=4"),
        ({"training.qc_weight": -0.1}, r"qc_weight=-0\.1"),
        ({"training.qc_estimator": "spherical"}, r"qc_estimator='spherical'"),
        ({"likelihood.solver": "euler"}, r"likelihood\.solver='euler'"),
        ({"sampling.method": "pc"}, r"sampling\.method='pc'.*'ode'"),
        ({"sampling.solver": "heun", "sampling.num_steps": 0}, r"sampling\.num_steps=0"),
        ({"training.continuous": False}, r"training\.continuous=False"),
        ({"model.name": "ncsnpp"}, r"model\.name='ncsnpp'"),
        ({"optim.beta1": 1.5}, r"optim\.beta1=1\.5"),
        ({"optim.lr": math.inf}, r"optim\.lr=inf"),
        ({"data.dataset": "spiral_2", "model.sigma_min": 0.05}, r"model\.sigma_min=0\.05.*smallest_noise=0\.1"),
    ],
)
def test_bad_fields_are_named(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        tiny_run(tmp_path, **overrides)
    assert not any(tmp_path.iterdir())


def test_models_of_a_seed_share_weights_points_and_noise(tmp_path):
    u, qc = tiny_run(tmp_path), tiny_run(tmp_path, "gaussian_8-qc")
    for a, b in zip(u.model.parameters(), qc.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(u.test_points, qc.test_points)
    assert not torch.equal(u.test_points, u.points("training points", len(u.test_points)))
    x0 = u.test_points
    terms_u, terms_qc = (run.objective(x0, run.generator("train", 0)) for run in (u, qc))
    torch.testing.assert_close(terms_u["dsm"], terms_qc["dsm"])


def test_one_antisymmetric_probe_is_exact_in_the_plane(tmp_path):
    values = {}
    for estimator in ("exact", "antisymmetric", "trace"):
        run = tiny_run(tmp_path, "spiral_2-qc", **{"training.qc_estimator": estimator})
        values[estimator] = run.objective(run.test_points, run.generator("train", 0))["qc"].item()
    assert values["antisymmetric"] == pytest.approx(values["exact"], rel=1e-5)
    assert values["trace"] != pytest.approx(values["exact"], rel=1e-3)


def test_an_interrupted_run_continues_to_the_same_weights(tmp_path):
    whole, broken = tiny_run(tmp_path / "a", "gaussian_8-qc"), tiny_run(tmp_path / "b", "gaussian_8-qc")
    experiment.train(whole)

    class Killed(Exception):
        pass

    steps = []

    def kill(done: int) -> None:
        steps.append(done)
        if len(steps) == 5:
            raise Killed

    with pytest.raises(Killed):
        experiment.train(broken, kill)
    resumed = tiny_run(tmp_path / "b", "gaussian_8-qc")
    experiment.train(resumed)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (whole.workdir / "metrics.jsonl").read_text() == (resumed.workdir / "metrics.jsonl").read_text()


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_the_exact_score_is_measured_as_exact(tmp_path):
    run = tiny_run(tmp_path, "gaussian_8-u", **{"data.num_test": 400, "likelihood.rtol": 1e-6, "likelihood.atol": 1e-8})
    evaluation = experiment.evaluate_score(run, run.distribution.score)
    metrics = evaluation.metrics
    eps = torch.full((400,), run.likelihood.eps, dtype=torch.float64)
    log_prob = run.distribution.log_prob(run.test_points.double(), eps)
    # Change of variables with the exact prior is exact up to the solver and the score's float32.
    assert metrics["nll_matched_prior"] == pytest.approx(-float(log_prob.mean()), abs=1e-5)
    # With N(0, 9I) instead, the difference of the priors at the latents: narrower than x_1, so it costs likelihood.
    assert metrics["nll"] > metrics["nll_matched_prior"] + 0.5
    assert metrics["score_error"] < 1e-10
    assert metrics["asym"] < 1e-10
    assert metrics["nasym"] < 1e-10
    # Precision is about the samples, recall about the data: not the other way round.
    real, generated = run.test_points.numpy(), evaluation.samples
    near = {
        name: np.mean((cdist(a, b) <= np.sort(cdist(b, b), axis=1)[:, 3]).any(1))
        for name, a, b in (("precision", generated, real), ("recall", real, generated))
    }
    assert metrics["precision"] == pytest.approx(near["precision"], abs=1e-9)
    assert metrics["recall"] == pytest.approx(near["recall"], abs=1e-9)
    assert near["precision"] != near["recall"]
    assert set(metrics) == set(experiment.METRICS)
    assert evaluation.samples.shape == (400, 2)
    np.testing.assert_allclose(evaluation.curves["t"], np.arange(1, 11) / 10)


def test_a_perturbed_score_is_measured_as_constructed(tmp_path):
    """s* + r (−x₂, x₁): score error ½ r² E‖x_t‖², Asym (2r)² = 4 r²."""
    run = tiny_run(tmp_path, "gaussian_8-u", **{"data.num_test": 300})
    r = 0.01

    def score(x, t):
        return run.distribution.score(x, t) + r * torch.stack([-x[:, 1], x[:, 0]], 1)

    evaluation = experiment.evaluate_score(run, score)
    assert evaluation.metrics["asym"] == pytest.approx(4 * r**2, rel=1e-4)
    sigma = 0.1 * 30.0 ** (np.arange(1, 11) / 10)
    mean_square = float((run.test_points**2).sum(1).mean()) + 2 * sigma**2
    # ‖x_t‖² of 300 points: relative standard error about 2σ‖x₀‖√300⁻¹/‖x₀‖² < 0.06 at every level.
    np.testing.assert_allclose(evaluation.curves["score_error"], 0.5 * r**2 * mean_square, rtol=0.24)


def test_entropy_of_a_gaussian_in_closed_form():
    distributions = importlib.import_module("distributions")
    sde = VE(GeometricSigma(0.1, 3.0))
    covariance = torch.tensor([[1.0, 0.3], [0.3, 0.5]])
    gaussian = distributions.Gaussian(sde, torch.tensor([0.5, -1.0]), covariance)
    for t in (0.0, 0.5):
        noised = covariance.double() + float(sde.std(torch.tensor(t, dtype=torch.float64))) ** 2 * torch.eye(2)
        expected = 1 + math.log(2 * math.pi) + 0.5 * math.log(float(torch.linalg.det(noised)))
        assert experiment.exact_entropy(gaussian, t) == pytest.approx(expected, abs=1e-7)


# --------------------------------------------------------------------------------------------------------------- table


def test_paired_difference_is_the_paired_t_interval():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 7))
    result = table.paired_difference(a, b)
    interval = stats.ttest_rel(a, b).confidence_interval(0.95)
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high))
    assert result["mean"] == pytest.approx((a - b).mean())
    assert result["lower_in_seeds"] == (a < b).sum()
    single = table.paired_difference(a[:1], b[:1])
    assert single["low"] is None
    assert single["high"] is None


def test_table_end_to_end(tmp_path, monkeypatch):
    for module in (configs, table, figures):
        monkeypatch.setattr(module, "DATASETS", {"gaussian_8": configs.DATASETS["gaussian_8"]})
    tasks = table.make_tasks(tmp_path, seeds=2, overrides=TINY)
    assert len(tasks) == 3 * 2 + 1
    results = table.make_table(tmp_path, tasks, jobs=1)
    assert json.loads((tmp_path / "results.json").read_text()) == results
    rows = results["rows"]
    assert {(row["model"], row["seed"]) for row in rows} == {
        *((model, seed) for model in configs.MODELS for seed in (0, 1)),
        (table.EXACT, 0),
    }
    assert all(math.isfinite(row[metric]) for row in rows for metric in experiment.METRICS)
    assert all(row["asym"] < 1e-6 for row in rows if row["model"] == "c")
    text = (tmp_path / "table.md").read_text()
    for expected in ("| U |", "| C |", "| QC |", "| exact score |", "5.034, 5.063, 5.087", "QC − U", "±"):
        assert expected in text

    # A second call does nothing again: finished runs are read, not computed.
    def stamps():
        files = [*tmp_path.glob("runs/**/*.pt"), *tmp_path.glob("runs/**/metrics.json")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    assert len(before) == 6 + 7
    assert table.make_table(tmp_path, tasks, jobs=1) == results
    assert stamps() == before

    # An evaluation that is damaged, or of other weights than the last, is made again.
    damaged, early = (tmp_path / "runs" / "gaussian_8-u" / f"seed_{seed}" / "eval" / "metrics.json" for seed in (0, 1))
    damaged.write_text(damaged.read_text()[:40])
    early.write_text(json.dumps({**json.loads(early.read_text()), "step": 3, "nll": 99.0}))
    assert table.make_table(tmp_path, tasks, jobs=1) == results
    with pytest.raises(ValueError, match=r"other settings: training\.n_iters was 6, is 7"):
        other = table.make_tasks(tmp_path, seeds=2, overrides={**TINY, "training.n_iters": 7})
        table.make_table(tmp_path, other, jobs=1)

    paths = figures.draw_table(tmp_path, results, tasks)
    assert {path.name for path in paths} == {
        "densities.png", "samples.png", "fields.png", "curves.png", "nll_by_seed.png"
    }  # fmt: skip
    assert all(path.stat().st_size > 5_000 for path in paths)


@pytest.mark.parametrize(("seeds", "jobs", "flag"), [(0, 1, "--seeds=0"), (1, 0, "--jobs=0")])
def test_table_refuses_bad_numbers(tmp_path, seeds, jobs, flag):
    with pytest.raises(ValueError, match=flag):
        table.make_table(tmp_path, table.make_tasks(tmp_path, seeds=seeds, overrides=TINY), jobs=jobs)
    assert not any(tmp_path.iterdir())


def test_table_refuses_a_workdir_of_another_experiment(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"--workdir=.*main\.py"):
        table.make_table(tmp_path, table.make_tasks(tmp_path, seeds=1, overrides=TINY), jobs=1)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
