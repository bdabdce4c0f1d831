"""The benchmarks, in small: they measure what they say."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch

import run_lib
from benchmarks import data_pipeline, gpu, large_file, likelihood, qc_precision, qc_variance, sampling, training_step
from benchmarks.measure import in_turn, operations_of
from configs.defaults import base_config
from configs.digits import get_config
from conservativeness import asymmetry
from data import DataFormat
from experiment.randomness import SampleGenerators, rademacher_like
from losses import make_objective
from models import EMA

CPU = torch.device("cpu")


def small_config():
    config = get_config("u")
    config.model.update(nf=8, num_res_blocks=1)
    config.training.update(n_iters=2, batch_size=4, snapshot_sampling=False)
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("run")
    run_lib.train(small_config(), path, run_lib.Runtime("cpu"))
    return path


@pytest.fixture
def small(monkeypatch) -> dict:
    size = {"model.nf": 8, "model.num_res_blocks": 1, "model.ch_mult": (1, 1), "training.batch_size": 2}
    monkeypatch.setattr(training_step, "SIZE", size)
    return size


@pytest.fixture
def compiled(monkeypatch) -> list[str]:
    """Names of what is compiled; torch.compile itself does nothing."""
    found = []
    monkeypatch.setattr(torch, "compile", lambda work: found.append(type(work).__name__) or work)
    return found


def table(text: str) -> list[dict[str, str]]:
    """The rows of the one Markdown table in a text, by the titles of its columns."""
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    header, _, *rows = [[cell.strip() for cell in line.split("|")] for line in lines]
    return [dict(zip(header, row, strict=True)) for row in rows]


# ----------------------------------------------------------------------------------------------------------- the tools


def test_variants_are_called_in_turn_and_the_first_rounds_do_not_count():
    calls = []
    variants = {name: lambda number, name=name: calls.append((name, number)) or number for name in "ab"}
    timed = in_turn(variants, 2, CPU, warm_up=1)
    assert calls == [(name, number) for number in range(3) for name in "ab"]
    assert timed["a"].results == [1, 2] and len(timed["b"].seconds) == 2 and timed["b"].median >= 0
    with pytest.raises(ValueError, match="--rounds=0: at least 1"):
        in_turn(variants, 0, CPU)


def test_operations_are_those_of_a_convolution():
    layer = torch.nn.Conv2d(3, 5, 3, padding=1)
    x = torch.rand(2, 3, 8, 8)
    forward = 2 * 9 * 3 * 5 * 64 * 2
    assert operations_of(lambda: layer(x)) == forward
    assert operations_of(lambda: layer(x).sum().backward()) == 2 * forward  # no gradient of x


# ------------------------------------------------------------------------------------------------------- training steps


def test_what_is_timed_is_the_training_step(small):
    """Gradient, clipping, Adam, moving average, of the same batch and noise."""
    overrides = small | training_step.QC | {"optim.grad_clip": 0.1}
    config, loop = base_config(overrides), training_step.make_trainer("QC", overrides, run_lib.Runtime("cpu"))
    model = copy.deepcopy(loop.model)
    average, objective = EMA(model, config.model.ema_rate), make_objective(model, config.training).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=config.optim.lr, fused=True)
    x0 = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    training_step.take(loop, 1)
    objective(x0, SampleGenerators(("train", 0), range(2)), step=0)["loss"].backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    average.update(model)
    for found, expected in ((loop.model, model), (loop.ema.model, average.model)):
        for p, q in zip(found.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


@pytest.mark.slow
def test_benchmark_of_the_training_step(small):
    variants = "U, paper; QC, K = 1; QC, K = 1, paper; QC, K = 1, every 4th step"
    text = training_step.run(variants=variants, rounds=1, threads=1)
    cells = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")][2:]
    names, *numbers = zip(*((row[1], *map(float, (row[3], row[5], row[8]))) for row in cells), strict=True)
    times, operations, memory = numbers
    assert "; ".join(names) == f"U; {variants}" and times[0] == operations[0] == memory[0] == 1
    # 3F, 9F, 3F + 13F, and a quarter of the difference; more in attention, which is much of so small a network.
    _, paper, qc, paper_qc, lazy = operations
    assert paper == pytest.approx(1, rel=0.05)  # the paper's blurs multiply by the zeros they insert
    assert 2.9 < qc < 3.8 < 5 < paper_qc < 7 and memory[2] > 2
    assert lazy == pytest.approx(1 + (qc - 1) / 4, rel=0.01)
    with pytest.raises(ValueError, match=r"--variants=V: allowed are time, memory, compiled, or U; U, paper; "):
        training_step.run(variants="V")


def test_a_compiled_step_is_that_of_a_compiled_network(small, compiled):
    rows = table(training_step.run(variants="U, compiled; QC, K = 1, every 4th step, compiled", rounds=1, threads=1))
    assert [row["step"] for row in rows] == ["U", "U, compiled", "QC, K = 1, every 4th step, compiled"]
    assert compiled.count("UNet") == 2


# ------------------------------------------------------------------------------------------------------ variance of QC


@pytest.mark.slow
def test_benchmark_of_the_variance(workdir, monkeypatch):
    """The trace of the public code and ours are one estimator; a linear field of NAsym 1e-3 is where it is worst."""
    monkeypatch.setattr(qc_variance, "LINEAR_DIMENSION", 32)
    monkeypatch.setattr(qc_variance, "TIMES", (0.1,))
    rows = table(qc_variance.run(str(workdir), batch_size=2, probes=10))
    assert [row["field"] for row in rows[::3]] == ["linear, 32 dimensions", "digits, t = 0.1"]
    for paper, trace, default in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert paper["paper's variance over it"] == "1"
        assert float(trace["paper's variance over it"].split(" ± ")[0]) == pytest.approx(1, abs=0.01)
        assert float(default["paper's variance over it"].split(" ± ")[0]) > 0
    assert float(rows[0]["NAsym"]) == pytest.approx(1e-3, rel=0.15)
    assert float(rows[2]["paper's variance over it"].split(" ± ")[0]) > 100
    for size, probes, message in (
        (2, 9, "--probes=9: at least 10"),
        (0, 10, "--batch_size=0: allowed are 1 to 360"),
    ):
        with pytest.raises(ValueError, match=message):
            qc_variance.run(str(workdir), batch_size=size, probes=probes)


def test_what_the_trace_has_more_is_the_commutator():
    """With J = S + A the two estimates differ by vᵀ(SA − AS)v, of mean zero: by nothing where S is a multiple of 1."""
    matrix = torch.randn(6, 6, dtype=torch.float64)
    symmetric, rest = 0.5 * (matrix + matrix.T), 0.5 * (matrix - matrix.T)
    x, t = torch.randn(5, 6, dtype=torch.float64), torch.ones(5, dtype=torch.float64)
    v = rademacher_like(x, torch.Generator().manual_seed(0))
    for s in (symmetric, 3 * torch.eye(6, dtype=torch.float64)):
        trace, antisymmetric = (
            asymmetry(
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
    squares = [(g - g.mean(0)).square().sum(1) for g in (a, b)]
    ratio, error = qc_variance.ratio_with_error(*squares)
    assert ratio == pytest.approx(variance(a) / variance(b))
    # The jackknife, by leaving each one out in fact.
    kept = [[j for j in range(40) if j != i] for i in range(40)]
    logs = torch.tensor([variance(a[rows]) / variance(b[rows]) for rows in kept], dtype=torch.float64).log()
    assert error == pytest.approx(ratio * float((39 / 40 * (logs - logs.mean()).square().sum()).sqrt()))
    # Of Gaussians the logarithm of a variance with ν degrees of freedom has the variance 2/ν.
    assert error / ratio == pytest.approx((2 * 2 / (39 * 5)) ** 0.5, rel=0.4)


def test_times_of_a_batch_are_evenly_spaced(workdir):
    score = run_lib.load(workdir)
    _, test = run_lib.load_data(score.config, run_lib.Runtime("cpu"))
    everywhere, at_one = (qc_variance.make_batch(score, test, 8, time) for time in (None, 0.25))
    assert everywhere.t.sort().values.tolist() == pytest.approx([(i + 0.5) / 8 for i in range(8)])
    assert everywhere.t.tolist() != sorted(everywhere.t.tolist())
    assert at_one.t.tolist() == [0.25] * 8 and at_one.x.shape == (8, 1, 8, 8)
    torch.testing.assert_close(at_one.weight, score.sde.std(at_one.t) ** 2)


# ---------------------------------------------------------------------------------------------- a trained model, input


def test_rounding_to_bfloat16_errs_more_than_to_tf32_and_that_more_than_float32():
    _, *errors = qc_precision.linear_row(0.02, dimension=256)
    float32, tf32, _, bf16 = (float(cell.split(",")[1]) for cell in errors)
    assert float32 < 1e-4 < tf32 < 0.02 < bf16


@pytest.mark.slow
def test_benchmark_of_likelihood(workdir, monkeypatch):
    monkeypatch.setattr(likelihood, "TIGHT", 3e-4)
    monkeypatch.setattr(likelihood, "PAPERS", {"paper": (1e-3, 1e-3)})
    monkeypatch.setattr(likelihood, "VARIANTS", dict([list(likelihood.VARIANTS.items())[-3]]))
    paper, ours = table(likelihood.run(str(workdir), images=2, rounds=1))
    assert paper["paper's time over it"] == "1.00" and ours["network runs"] == "170"
    assert float(ours["largest error, bits/dim"]) < 0.005 and ours["images within 0.005"] == "100%"
    assert float(paper["rms"]) < 0.05
    with pytest.raises(ValueError, match="--images=0: allowed are 1 to 360"):
        likelihood.run(str(workdir), images=0)


def test_benchmark_compares_samplers(workdir, monkeypatch, compiled):
    class Quality:
        """Features are the pixels: no classifier is trained."""

        def __init__(self, settings, train, test, cache_dir, runtime, *, seed):
            self.images = train.images

        def extractor(self, images):
            return (images.flatten(1).float(),) * 2

        def reference(self):
            return None, self.extractor(self.images)[0].numpy()

    monkeypatch.setattr(sampling, "SampleQuality", Quality)
    monkeypatch.setattr(sampling, "VARIANTS", dict(list(sampling.VARIANTS.items())[-3:]))
    monkeypatch.setattr(sampling, "BATCH", 30)
    sizes, draw = [], run_lib.TrainedScore.draw

    def recorded(score, indices, sampler, **given):
        sizes.append(len(indices))
        return draw(score, indices, sampler, **given)

    monkeypatch.setattr(run_lib.TrainedScore, "draw", recorded)
    text = sampling.run(str(workdir), num_samples=40, compile=True)
    assert ", compiled, cpu, " in text and "UNet" in compiled
    assert sizes == [2, 20] + 3 * [2] + 6 * [20]  # every size of batch once before any is timed
    first, second, third = table(text)
    assert [row["NFE"] for row in (first, second, third)] == ["20", "13", "10"]
    assert first["minus the paper's"] == "–" and first["paper's time over it"] == "1.0"
    with pytest.raises(ValueError, match="--num_samples=39: at least 40"):
        sampling.run(str(workdir), num_samples=39)


def test_benchmark_of_the_input():
    paper, ours = table(data_pipeline.run(small_config(), rounds=2))
    assert paper["paper's time over it"] == "1.0" and float(ours["ms per batch"]) > 0
    config = small_config()
    config.training.activation_checkpointing = True
    with pytest.raises(ValueError, match=r"--compile: .* training\.activation_checkpointing=True"):
        data_pipeline.run(config, rounds=1, compile=True)


@pytest.mark.slow
def test_benchmark_of_a_file_on_a_disk(tmp_path):
    """What is measured reads the rows of the large file, which is gone afterwards."""
    memory, disk = table(large_file.run(gib=1 / 16, rounds=2, folder=str(tmp_path)))
    assert memory["ratio"] == "1.00" and float(disk["ms per step"]) > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dequantized", [False, True])
def test_public_loader_gives_the_set(dequantized):
    """Batches of images as the model sees them, without end, each image of the set as often as chance has it."""
    split, _ = run_lib.load_data(small_config(), run_lib.Runtime("cpu"))
    images = DataFormat.of(split, centered=False, dequantized=dequantized)
    labels, levels = [], images.to_model(split.images, dequantize=False)
    for batch, found in itertools.islice(data_pipeline.public_loader(split, images, 100, False), 20):
        assert batch.shape == (100, 1, 8, 8) and batch.dtype == torch.float32
        assert batch.min() >= 0 and batch.max() <= 1
        if not dequantized:
            assert all((levels == image).flatten(1).all(1).any() for image in batch[:3])
        labels.append(found)
    assert torch.cat(labels).bincount().min() > 100


@pytest.mark.slow
def test_benchmark_of_a_gpu_on_the_cpu(tmp_path):
    """What it writes; the numbers mean nothing."""
    options = {"nf": 8, "blocks": "1", "batch": 2, "samples": 1, "rounds": 1, "device": "cpu", "output": str(tmp_path)}
    steps = "U, fp32; QC, K = 1, fp32; C, TF32, paper"
    text = gpu.run(parts="training", steps=steps, **options)
    assert text == (tmp_path / "gpu.md").read_text()
    results = json.loads((tmp_path / "gpu.json").read_text())
    u, qc, c = results["training, 1 blocks"]
    assert u["of U in the same precision"] == 1 and c["images/s"] == pytest.approx(2000 / c["ms"])
    assert u["TFLOP/s"] == pytest.approx(u["TFLOP"] / u["ms"] * 1e3) and u["TFLOP"] < c["TFLOP"] < qc["TFLOP"]
    for wrong, message in (({"parts": "cooking"}, "--parts=cooking"), ({"steps": "V"}, "--steps=V")):
        with pytest.raises(ValueError, match=message):
            gpu.run(**(options | wrong))
