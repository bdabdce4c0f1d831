"""The benchmarks, in small: what they compare is right, and so is the form of their tables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from oracles import SDES, gaussian_2d

import run_lib
from benchmarks import likelihood as likelihood_benchmark
from configs.digits import get_config
from likelihood import LIKELIHOOD_EPS
from randomness import rademacher_like


def small_config():
    config = get_config("u")
    config.model.update(nf=8, num_res_blocks=1)
    config.training.update(n_iters=2, batch_size=4, snapshot_sampling=False)
    return config


CPU = run_lib.Runtime(device="cpu")


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
    monkeypatch.setattr(likelihood_benchmark, "TIGHT", 1e-5)
    monkeypatch.setattr(likelihood_benchmark, "PAPERS", {likelihood_benchmark.PAPER: (1e-3, 1e-3)})
    few = dict(list(likelihood_benchmark.VARIANTS.items())[-1:])
    monkeypatch.setattr(likelihood_benchmark, "VARIANTS", few)
    paper, ours = table(likelihood_benchmark.compare(small_config(), str(workdir), CPU, 3, 1))
    assert paper["paper's time over it"] == "1.00" and ours["network runs"] == "330"
    assert float(ours["largest error, bits/dim"]) < 0.005 and ours["images within 0.005"] == "100%"
    assert float(paper["rms"]) < 0.05
    for count, rounds, message in ((0, 1, "--images=0: allowed are 1 to 360"), (3, 0, "--rounds=0: at least 1")):
        with pytest.raises(run_lib.InvalidRun, match=message):
            likelihood_benchmark.compare(small_config(), str(workdir), CPU, count, rounds)
