"""The benchmarks, in small: what they compare is right, and so is the form of their tables."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from from_config import get_dataset
from oracles import SDES, gaussian_2d

import run_lib
from benchmarks import bf16_loss, data_pipeline, qc_variance, startup
from benchmarks import likelihood as likelihood_benchmark
from configs.digits import get_config
from data.pixels import to_unit_interval
from experiment.randomness import SampleGenerators, rademacher_like
from likelihood import LIKELIHOOD_EPS
from models.score import NoiseLevel, UnconstrainedScore


def small_config():
    config = get_config("u")
    config.model.update(nf=8, num_res_blocks=1)
    config.training.update(n_iters=2, batch_size=4, snapshot_sampling=False)
    return config


CPU, COMPILED = run_lib.Runtime(device="cpu"), run_lib.Runtime(device="cpu", compile=True)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    run_lib.train(small_config(), path, CPU)
    return path


def table(text: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table in a text, by the titles of its columns."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    header, rule, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    assert set(rule) == {"---"} and {len(row) for row in rows} == {len(header)} == {len(rule)}
    return [dict(zip(header, row, strict=True)) for row in rows]


@pytest.mark.parametrize("family", SDES)
def test_likelihood_of_the_public_code(family):
    """Two runs of the network at every point, and the density of a Gaussian: two orthogonal probes give the trace."""
    sde = SDES[family]
    gaussian = gaussian_2d(sde)
    x = gaussian.sample(4, torch.Generator().manual_seed(0))
    calls = 0

    def score(position, t):
        nonlocal calls
        calls += 1
        return gaussian.score(position, t)

    probe = rademacher_like(x, torch.Generator().manual_seed(0))
    other = probe * torch.tensor([1.0, -1.0])
    values = []
    for v in (probe, other):
        before = calls
        value, runs = likelihood_benchmark.paper_log_prob(sde, score, x, v, rtol=1e-7, atol=1e-7)
        assert runs == calls - before and runs % 2 == 0
        values.append(value)
    found = torch.stack(values).mean(0)
    exact = gaussian.log_prob(x, torch.full((4,), LIKELIHOOD_EPS, dtype=torch.float64))
    assert (found - exact).abs().max() < 0.1  # the prior is not quite the noised density at the end


def test_benchmark_of_likelihood(workdir, monkeypatch):
    monkeypatch.setattr(likelihood_benchmark, "TIGHT", 1e-4)
    monkeypatch.setattr(likelihood_benchmark, "PAPERS", {likelihood_benchmark.PAPER: (1e-3, 1e-3)})
    few = dict(list(likelihood_benchmark.VARIANTS.items())[-1:])
    monkeypatch.setattr(likelihood_benchmark, "VARIANTS", few)
    paper, ours = table(likelihood_benchmark.compare(small_config(), str(workdir), CPU, 2, 1))
    assert paper["paper's time over it"] == "1.00" and ours["network runs"] == "330"
    assert float(ours["largest error, bits/dim"]) < 0.005 and ours["images within 0.005"] == "100%"
    assert float(paper["rms"]) < 0.05
    for count, rounds, message in ((0, 1, "--images=0: allowed are 1 to 360"), (3, 0, "--rounds=0: at least 1")):
        with pytest.raises(run_lib.InvalidRun, match=message):
            likelihood_benchmark.compare(small_config(), str(workdir), CPU, count, rounds)


# --------------------------------------------------------------------------------------------- variance of the QC term


@pytest.fixture
def network(small_unet):
    """A score model and a batch."""
    model = UnconstrainedScore(small_unet(), NoiseLevel(SDES["ve"]))
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    batch = qc_variance.Batch(x, torch.tensor([0.2, 0.5, 0.9]).double(), torch.tensor([1.0, 0.5, 2.0]).double())
    return model, batch


def test_gradient_of_the_public_code_is_that_of_the_trace(network):
    model, batch = network
    parameters = [p for p in model.parameters() if p.requires_grad]
    paper, ours = (
        gradient(model, parameters, batch, SampleGenerators((0, "probe"), range(3)))
        for gradient in (qc_variance.paper_gradient, partial(qc_variance.our_gradient, estimator="trace"))
    )
    for found, expected in zip(paper, ours, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert max(part.abs().max() for part in ours) > 1e-3


def test_what_the_trace_has_more_is_the_commutator():
    """With J = S + A the two estimates differ by vᵀ(SA − AS)v, of mean zero: by nothing where S is a multiple of 1."""
    matrix = torch.randn(6, 6, dtype=torch.float64)
    symmetric, rest = 0.5 * (matrix + matrix.T), 0.5 * (matrix - matrix.T)
    x, t = torch.randn(5, 6, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    v = rademacher_like(x, torch.Generator().manual_seed(0))
    for s in (symmetric, 3 * torch.eye(6, dtype=torch.float64)):
        trace, antisymmetric = (
            qc_variance.asymmetry(
                lambda x, t, s=s: x @ (s + rest).T,
                x,
                t,
                probes=1,
                estimator=estimator,
                generator=torch.Generator().manual_seed(0),
            ).asym
            for estimator in ("trace", "antisymmetric")
        )
        commutator = s @ rest - rest @ s
        torch.testing.assert_close(antisymmetric - trace, ((v @ commutator) * v).sum(1), rtol=1e-9, atol=1e-9)


def test_ratio_of_variances_and_its_error():
    generator = torch.Generator().manual_seed(0)

    def variance(gradients):
        return float(gradients.var(0).sum())

    a, b = 3 * torch.randn(40, 5, generator=generator).double(), torch.randn(40, 5, generator=generator).double()
    ratio, error = qc_variance.ratio_with_error(qc_variance.deviations(a), qc_variance.deviations(b))
    assert ratio == pytest.approx(variance(a) / variance(b))
    # The jackknife, by leaving each one out in fact.
    kept = [[j for j in range(40) if j != i] for i in range(40)]
    logs = torch.tensor([variance(a[rows]) / variance(b[rows]) for rows in kept], dtype=torch.float64).log()
    assert error == pytest.approx(ratio * float((39 / 40 * (logs - logs.mean()).square().sum()).sqrt()))
    # Of Gaussians the logarithm of a variance with ν degrees of freedom has the variance 2/ν.
    assert error / ratio == pytest.approx((2 * 2 / (39 * 5)) ** 0.5, rel=0.4)


def test_times_of_a_batch_are_spread_over_all(workdir):
    run = qc_variance.run_for_evaluation(small_config(), workdir, CPU, None)
    everywhere, at_one = (qc_variance.make_batch(run, 8, level) for level in (None, 0.25))
    assert everywhere.t.sort().values.tolist() == pytest.approx([(i + 0.5) / 8 for i in range(8)])
    assert everywhere.t.tolist() != sorted(everywhere.t.tolist())
    assert at_one.t.tolist() == [0.25] * 8 and at_one.x.shape == (8, 1, 8, 8)
    torch.testing.assert_close(at_one.weight, run.sde.std(at_one.t) ** 2)


def test_benchmark_of_the_variance(workdir, monkeypatch):
    monkeypatch.setattr(qc_variance, "LINEAR_DIMENSION", 32)
    rows = table(qc_variance.compare(small_config(), str(workdir), CPU, 2, 10))
    assert [row["field"] for row in rows[::3]] == ["linear, 32 dimensions", "digits, all times"]
    for paper, trace, default in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert paper["paper's variance over it"] == "1"
        assert float(trace["paper's variance over it"].split(" ± ")[0]) == pytest.approx(1, abs=0.01)
        assert float(default["paper's variance over it"].split(" ± ")[0]) > 0
    assert float(rows[0]["NAsym"]) == pytest.approx(1e-3, rel=0.15)
    assert float(rows[2]["paper's variance over it"].split(" ± ")[0]) > 100
    for size, probes, times, message in (
        (2, 9, [], "--probes=9: at least 10"),
        (0, 10, [], "--batch_size=0: allowed are 1 to 360"),
        (2, 10, [1.5], "--times=1.5: allowed are times above 0, up to 1"),
    ):
        with pytest.raises(run_lib.InvalidRun, match=message):
            qc_variance.compare(small_config(), str(workdir), CPU, size, probes, times)


# -------------------------------------------------------------------------------------------------- input, and start-up


def test_benchmark_of_the_input(monkeypatch):
    monkeypatch.setattr(data_pipeline, "WARM_UP", 1)
    paper, ours, streams = table(data_pipeline.compare(small_config(), CPU, 2))
    assert paper["paper's time over it"] == "1.0"
    assert float(streams["ms per batch"]) >= float(ours["ms per batch"])
    for row in (paper, ours, streams):
        assert float(row["ms per batch"]) >= 0 and row["share of a step"].endswith("%")
    with pytest.raises(run_lib.InvalidRun, match="--rounds=0: at least 1"):
        data_pipeline.compare(small_config(), CPU, 0)
    config = small_config()
    config.training.activation_checkpointing = True
    with pytest.raises(run_lib.InvalidRun, match=r"--compile: .* training\.activation_checkpointing=True"):
        data_pipeline.compare(config, COMPILED, 1)


def test_input_compiled(monkeypatch):
    monkeypatch.setattr(data_pipeline, "WARM_UP", 0)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module: compiled.append(type(module).__name__) or module)
    assert "fp32, compiled" in data_pipeline.compare(small_config(), COMPILED, 1)
    assert compiled.count("UNet") == 2  # the network and its average


@pytest.mark.parametrize("dequantized", [False, True])
def test_public_loader_gives_the_set(dequantized):
    """Batches of images as the model sees them, without end, each image of the set as often as chance has it."""
    config = small_config()
    config.data.uniform_dequantization = dequantized
    split, _ = get_dataset(config)
    batches = itertools.islice(data_pipeline.public_loader(split, config, 100), 20)
    labels = []
    levels = to_unit_interval(split.images, 17)
    for images, found in batches:
        assert images.shape == (100, 1, 8, 8) and images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        if not dequantized:
            assert all((levels == image).flatten(1).all(1).any() for image in images[:3])
        labels.append(found)
    assert torch.cat(labels).bincount().min() > 100


def test_benchmark_of_the_start(monkeypatch, tmp_path):
    commands = startup.commands("configs/digits.py:u", ["--device=cpu", "--precision=bf16"], tmp_path)
    train = commands[startup.TRAIN][0]
    assert {"--device=cpu", "--precision=bf16", "--config.training.n_iters=1"} <= set(train)
    # What its help says is what main.py says.
    for name in (startup.HELP, "a mistyped field"):
        assert startup.measure(*commands[name]) > 0
    with pytest.raises(startup.Failed, match="--precision=fp31"):
        startup.measure([*train, "--precision=fp31"], "1/1")
    monkeypatch.setattr(startup, "measure", lambda arguments, expected: 3.0 if "-c" in arguments else 1.5)
    rows = table(startup.compare("configs/digits.py:u", ["--device=cpu"], 2))
    assert [row["paper's time over it"] for row in rows] == ["1.0", "2.0", "2.0", "–"]
    with pytest.raises(startup.Failed, match="--rounds=0: at least 1"):
        startup.compare("configs/digits.py:u", ["--device=cpu"], 0)


def test_losses_of_both_precisions(tmp_path):
    """A run's losses, one per step; first weights, data and noise are the same in bf16, seeds differ."""
    options = ("configs/digits.py:u", 2)
    runs = [
        bf16_loss.losses(*options, seed, precision, "cpu", tmp_path / f"{precision}_{seed}")
        for seed, precision in ((0, "fp32"), (0, "bf16"), (1, "fp32"))
    ]
    exact, half, other = (run[0] for run in runs)
    assert all(len(run) == 2 for run in runs)
    assert 0 < abs(half / exact - 1) < 1e-2 < abs(other / exact - 1)
    with pytest.raises(bf16_loss.Failed, match="--precision=fp31"):
        bf16_loss.losses(*options, 0, "fp31", "cpu", tmp_path / "bad")


def test_comparison_of_losses(tmp_path):
    fp32 = np.repeat([[3.0], [5.0]], 130, axis=1)
    fp32[:, :30] = 1e3
    curves = {"fp32": fp32, "bf16": fp32 + np.array([[0.25], [0.75]])}
    assert bf16_loss.smooth(curves["fp32"]).shape == (2, 6)
    assert [tuple(row.values()) for row in table(bf16_loss.table(curves))] == [
        ("float32, mean of the last 100 steps", "4.000", "1.414"),
        ("bf16", "4.500", "1.768"),
        ("bf16 − float32, same seed", "0.500", "0.354"),
    ]
    bf16_loss.draw(curves, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
