"""docs/extending.md: what it adds to the project from outside works, in every place that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from documents import ROOT, blocks, commands, problems, run_program

from conservativeness import asymmetry
from exact.distributions import Gaussian
from models import make_network, make_score_model
from run_lib import load
from sampling import make_sampler
from sde_lib import make_sde

pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # of ml_collections

TEXT = (ROOT / "docs" / "extending.md").read_text()
# Of every command, appended to it.
SMALL = ("model.nf=8", "training.n_iters=2", "training.batch_size=8", "training.snapshot_sampling=False")
SMALL += ("sampling.num_steps=3", "sampling.num_images=2", "sampling.samples_per_image=1", "likelihood.num_steps=4")
SMALL += ("eval.num_reference=16",)
SMALL += ("eval.num_samples=8", "eval.batch_size=8", "eval.nll_images=2", "eval.asym_images=2", "eval.asym_levels=1")
CONSTANTS = {"sigma_min": 0.02, "sigma_max": 7.0}


@pytest.fixture(autouse=True)
def extensions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the document, each of which begins with a comment that is its name, on Python's path."""
    folder = tmp_path / "extensions"
    folder.mkdir()
    for block in blocks(TEXT, "python"):
        (folder / block.split()[1]).write_text(block)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_commands_run(tmp_path: Path, forget_accelerator: Callable[[], None]) -> None:
    """Training, evaluation and sampling by a network, a schedule, a data set, samplers, a measurement, features and a
    metric from outside the repository; and a checkpoint is enough to find them again."""
    assert problems(TEXT, ROOT / "docs") == []
    forget_accelerator()
    for command in commands(TEXT):
        run_program([*command[1:], *(f"--config.{override}" for override in SMALL)], only_parse=False)
    run = tmp_path / "runs" / "ramps"
    metrics = json.loads((run / "eval" / "metrics.json").read_text())
    assert metrics["features"] == "4×4 thumbnails" and metrics["my_metrics:mean_distance"] > 0
    assert metrics["sampler"].startswith("PC, my_samplers:HalfNoise + my_samplers:RelativeStep")
    few_step, measured = (json.loads(path.read_text()) for path in sorted(run.glob("samples/*/metrics.json")))
    assert few_step["nfe_sampling"] == 4 and measured["misfit_relative"] < 1e-6
    score = load(run)
    assert type(score.model.network).__module__ == "my_networks" and score.sample(2).shape == (2, 1, 8, 8)


def test_schedule_and_samplers_are_right() -> None:
    """1/σ is linear in time; the samplers draw from the exact score of a Gaussian what is its law."""
    sde = make_sde("vesde", "my_schedules:HarmonicSigma", CONSTANTS)
    t = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64, requires_grad=True)
    sigma = sde.std(t)
    torch.testing.assert_close(1 / sigma, 1 / 0.02 + t * (1 / 7.0 - 1 / 0.02), rtol=1e-12, atol=0)
    (rate,) = torch.autograd.grad((sigma**2).sum(), t)
    torch.testing.assert_close(sde.diffusion(t) ** 2, rate)
    torch.testing.assert_close(sde.time_at_noise_ratio(sigma), t)

    sde = make_sde("vpsde", "", dict(beta_min=0.1, beta_max=20.0))
    mean, covariance = torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 0.5], [0.5, 0.5]])
    score = Gaussian(sde, mean, covariance).score
    like = torch.zeros(4000, 2, dtype=torch.float64)
    pc = dict(method="pc", predictor="my_samplers:HalfNoise", corrector="none", num_steps=300, snr=0.1)
    for options in (
        pc,
        pc | dict(corrector="my_samplers:RelativeStep"),
        dict(method="few_step", solver="my_samplers:DDIM", num_steps=100),
    ):
        sampler = make_sampler(sde, options, num_scales=0, continuous=True)
        x = sampler(score, like, torch.Generator().manual_seed(0)).x
        torch.testing.assert_close(x.mean(0), mean.double(), rtol=0, atol=0.06)
        torch.testing.assert_close(x.T.cov(), covariance.double(), rtol=0, atol=0.06)


def test_network_is_twice_differentiable() -> None:
    """As QC and C need it: C's score is conservative, U's has a penalty with a gradient."""
    network = make_network("my_networks:Convolutions", {"nf": 4}, num_channels=1, image_size=4)
    sde = make_sde("vesde", "", CONSTANTS)
    x, t = torch.randn(2, 1, 4, 4), torch.tensor([0.2, 0.8])
    for name, conservative in (("unconstrained", False), ("conservative", True)):
        model = make_score_model(sde, network, parameterization=name)
        assert (asymmetry(model, x, t).nasym < 1e-10).all() == conservative
    torch.autograd.gradgradcheck(network.double(), (x.double().requires_grad_(), 1 + t.double()))
