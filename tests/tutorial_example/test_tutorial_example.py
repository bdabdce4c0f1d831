"""The tutorial's figures in small: closed forms they rest on, claims that hold at any size, files and resumption."""

from __future__ import annotations

import importlib
import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import gaussian_2d

from exact.distributions import GaussianMixture
from experiment.randomness import normal_like
from tutorial_example import configs, epsilon_and_score, main, scarce_data
from tutorial_example.annealed_langevin import exact_share
from tutorial_example.common import SDES, Result, constant, generator, standard_error, three_modes, two_modes
from tutorial_example.conditional import class_density, class_log_probs, histogram_divergence, labelled_mixture
from tutorial_example.ddpm import moment_errors
from tutorial_example.discretisation import chain_steps, path_error, simulate
from tutorial_example.epsilon_and_score import expected_noise
from tutorial_example.probability_flow import follow_flow, interpolate_latents
from tutorial_example.sdes import euler_maruyama_marginal


def small_digits():
    config = configs.get_config()
    config.update_from_flattened_dict({"model.nf": 8, "likelihood.num_steps": 20})
    return config


# Arguments of run and attributes of the module; the steps that are then reported.
SMALL = {
    "score_matching": (dict(n_iters=20, seeds=2, test_points=2000), 200),
    "langevin": (dict(n_iters=20, duration=8.0, particles=2000, STEP_SIZES=(0.2, 0.1, 0.05)), 20 + 3 * 280),
    "scarce_data": (dict(n_iters=40, num_train=2000), 120),
    "annealed_langevin": (dict(n_iters=10, particles=500, seeds=(1, 2), STEPS=25), 2 * 10 + 6 * 250),
    "ddpm": (dict(n_iters=40, samples=400, LEVELS=200, SHOWN=(0, 50, 199)), 40 + 599),
    "sdes": (dict(num_steps=100, samples=2000), 3 * (100 + 101 + 201)),
    "discretisation": (dict(fine_steps=2048), 14),
    "probability_flow": (dict(n_iters=20, points=10, BETWEEN=3, TOLERANCE=1e-5, PIECES=8), 20 + 4),
    "epsilon_and_score": (dict(points=500, TIMES=4), 12),
    "conditional": (dict(n_iters=10, num_steps=80, samples=2000), 30 + 6 * 81),
    "posterior": (dict(samples=200, num_steps=60), 24 * 61),
    "digits": (dict(n_iters=2, num_steps=3, test_images=2, SAMPLES=4, PAIRS=1, BETWEEN=2, get_config=small_digits), 2),
}
# A model trained for so little has not learned what is claimed of it, nor are so few steps and samples as good.
NEEDS_TRAINING = ("error of the score", "learned", "classifier-free", "ε beyond the least", "bits/dim", "σ = 10")
NEEDS_SIZE = ("VE ", "VP ", "β_", "samples, true score", "true score, ε = 0.05")


class Small:
    """Every figure in small, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, tuple[Result, int]] = {}

    def __getitem__(self, name: str) -> Result:
        return self.compute(name)[0]

    def compute(self, name: str) -> tuple[Result, int]:
        """The result, and how many steps were reported."""
        if name not in self.results:
            module, updates = importlib.import_module(f"tutorial_example.{name}"), []
            with pytest.MonkeyPatch.context() as patch:
                options = dict(SMALL[name][0])
                for attribute in (option for option in SMALL[name][0] if hasattr(module, option)):
                    patch.setattr(module, attribute, options.pop(attribute))
                result = module.run(self.folder / name, updates.append, **options)
            self.results[name] = result, sum(updates)
        return self.results[name]


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Small:
    return Small(tmp_path_factory.mktemp("tutorial"))


# ---------------------------------------------------------------------------------------------------------- all figures


@pytest.mark.parametrize("name", main.FIGURES)
def test_every_figure_in_small(name, computed):
    """Whatever does not rest on training or size holds; numbers are JSON; all axes with data are labelled."""
    result, steps = computed.compute(name)
    assert steps == SMALL[name][1]
    for text, (measured, relation, bound) in result.claims.items():
        if not any(word in text for word in NEEDS_TRAINING + NEEDS_SIZE):
            assert (measured <= bound) if relation == "<=" else (measured >= bound), text
    json.dumps(result.numbers, allow_nan=False)
    plots = [axes for axes in result.picture.axes if axes.lines and not axes.images]
    assert all(axes.get_xlabel() and axes.get_ylabel() for axes in plots) or name == "posterior"


def test_small_models_learn(computed):
    """All losses bring the error below 90 %, from 100 %, and nothing that is learned is the true score."""
    assert all(0 < row["relative_error"] < 0.9 for row in computed["score_matching"].numbers["rows"])
    assert computed["ddpm"].numbers["epsilon_error"] < 0.2
    learned = [r["minor_weight"] for r in computed["annealed_langevin"].numbers["rows"] if r["score"] == "learned"]
    assert len(set(learned)) > 2


# ------------------------------------------------------------------------------------------------------------ sampling


def test_annealed_langevin_recovers_the_weights_and_plain_langevin_does_not(computed):
    # 500 samples know a weight of 0.2 to a standard error of 0.018.
    plain, annealed = (row for row in computed["annealed_langevin"].numbers["rows"] if row["score"] == "true")
    assert abs(annealed["minor_weight"] - 0.2) < 0.05 and abs(plain["minor_weight"] - 0.2) > 0.2
    for std in (0.5, 3.0, 20.0):
        x = two_modes(SDES["VE"]).sample(200_000, generator("shares"))
        x = x + std * normal_like(x, generator("noise of shares"))
        share = float((x.sum(1) < 0).double().mean())
        assert abs(share - exact_share(std)) < 4 * math.sqrt(0.25 / 200_000)


def test_sdes_forwards_and_backwards(computed):
    """2000 samples, 100 steps: standard errors of a mean 0.022, of a variance 3.2 %, of a weight at most 0.011."""
    numbers = computed["sdes"].numbers
    for row in numbers["forward"]:
        assert row["mean_deviation"] < 4 and row["variance_deviation"] < 4
        assert row["chain_bias"] < 0.1
    assert len(numbers["forward"]) == 12 and len(numbers["reverse"]) == 6
    for row in numbers["reverse"]:
        assert row["mean_error"] < 0.12 and row["covariance_error"] < 0.16 and row["weight_error"] < 0.05
    ddpm = computed["ddpm"].numbers  # 400 samples, 200 steps, whose β is larger than that of 1000
    assert (ddpm["beta_first"], ddpm["beta_last"]) == pytest.approx((0.1 / 200, 20 / 200), rel=1e-9)
    row = ddpm["rows"][0]
    assert row["mean_error"] < 0.2 and row["covariance_error"] < 0.3 and row["weight_error"] < 0.1


def test_moment_errors():
    mixture = three_modes(SDES["VP"])
    x = mixture.sample(100_000, generator("moments"))
    errors = moment_errors(x, mixture)
    assert errors["mean_error"] < 4 / math.sqrt(100_000)
    assert errors["covariance_error"] < 4 * math.sqrt(2 / 100_000)
    assert errors["weight_error"] < 4 * math.sqrt(0.25 / 100_000)
    std = mixture.moments(0.0)[1].diagonal().sqrt()
    assert moment_errors(x + 0.1 * std, mixture)["mean_error"] == pytest.approx(0.1, abs=0.015)
    assert moment_errors(1.1 * x, mixture)["covariance_error"] == pytest.approx(0.21, abs=0.02)


@pytest.mark.parametrize("name", SDES)
def test_chain_of_euler_maruyama(name):
    sde = SDES[name]
    alpha, std = euler_maruyama_marginal(sde, 1)
    zero = torch.zeros(1, dtype=torch.float64)
    f, g, start = sde.drift_rate(zero), sde.diffusion(zero), sde.std(zero)
    torch.testing.assert_close(alpha[1:], 1 - f)
    torch.testing.assert_close(std[1:] ** 2, (1 - f) ** 2 * start**2 + g**2)
    errors = []
    for steps in (1000, 2000):
        alpha, std = euler_maruyama_marginal(sde, steps)
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        exact = torch.stack([sde.mean_coefficient(times), sde.std(times)])
        errors.append((torch.stack([alpha, std]) - exact).abs().max())
    assert errors[0] / errors[1] == pytest.approx(2, abs=0.1)


def test_chains_are_those_of_the_papers():
    a, b = chain_steps("DDPM", 1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(a**2, 1 - beta, rtol=1e-12, atol=0)
    torch.testing.assert_close(b**2, beta, rtol=1e-9, atol=0)
    a, b = chain_steps("SMLD", 4)
    sigma = 0.01 * 1000 ** (torch.arange(5, dtype=torch.float64) / 4)
    torch.testing.assert_close(b**2, sigma[1:] ** 2 - sigma[:-1] ** 2)
    assert (a == 1).all()


@pytest.mark.parametrize("name", ["SMLD", "DDPM"])
def test_error_of_a_path_by_simulation(name):
    path, chain = simulate(name, 32, 1000, 2048)
    square = (chain[-1] - path[:, -1]) ** 2
    assert abs(float(square.mean()) - path_error(name, 32) ** 2) < 4 * standard_error(square)


@pytest.mark.parametrize("name", SDES)
def test_expected_noise_by_sampling(name):
    """E[ε|x] by importance: draws of x_0, weighted by p(x | x_0)."""
    sde = SDES[name]
    mixture, t = three_modes(sde), 0.6
    x0 = mixture.sample(200_000, generator("prior of x0"))
    alpha, sigma = (float(c(torch.tensor(t, dtype=torch.float64))) for c in (sde.mean_coefficient, sde.std))
    for x in torch.tensor([[0.3, -0.2], [1.0, 0.5]], dtype=torch.float64):
        noise = (x - alpha * x0) / sigma
        weights = (-0.5 * (noise**2).sum(1)).softmax(0)
        estimate = weights @ noise
        error = ((weights[:, None] * (noise - estimate)) ** 2).sum(0).sqrt()
        assert ((expected_noise(mixture, x[None], t)[0] - estimate).abs() < 4 * error).all()


def test_flow_keeps_the_quantile_of_a_gaussian():
    gaussian = gaussian_2d(SDES["VP"])
    x = gaussian.sample(20, generator("flow"))
    latent = follow_flow(SDES["VP"], gaussian.score, x, 1e-3, 1.0, 1e-9)
    torch.testing.assert_close(latent, gaussian.flow(x, constant(x, 1e-3), constant(x, 1.0)), rtol=1e-6, atol=1e-6)
    back = follow_flow(SDES["VP"], gaussian.score, latent, 1.0, 1e-3, 1e-9)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


def test_interpolated_latents_are_as_likely_as_their_ends():
    a, b = torch.randn(2, 20_000, 3, dtype=torch.float64)
    between = interpolate_latents(a, b, 5)
    assert between.shape == (5, 20_000, 3)
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[-1], b, rtol=1e-12, atol=1e-12)
    assert ((between.var(1) - 1).abs() < 4 * math.sqrt(2 / 20_000)).all()


# --------------------------------------------------------------------------------------------------------- conditioning


def test_labelled_mixture_is_the_sum_of_its_classes():
    mixture = labelled_mixture(SDES["VP"])
    x = mixture.sample(100, generator("labelled"))
    t = constant(x, 0.2)
    log_probs = class_log_probs(mixture, x, t)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(100, dtype=torch.float64))
    for c in (0, 1):
        joint = class_density(mixture, c).log_prob(x, t) + math.log(0.5)
        torch.testing.assert_close(log_probs[:, c], joint - mixture.log_prob(x, t), rtol=1e-9, atol=1e-9)


def test_divergence_of_histograms():
    """KL(N(δ, s²) ‖ N(0, s²)) = ‖δ‖²/2s²; of draws of the density itself (cells − 1)/2n, cells that are ever hit."""
    density = GaussianMixture(SDES["VP"], torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2)[None])
    x = density.sample(200_000, generator("histogram"))
    assert 0 < histogram_divergence(x, density, bins=24) < 24**2 / (2 * 200_000)
    shifted = histogram_divergence(x + torch.tensor([0.3, -0.2], dtype=torch.float64), density, bins=24)
    assert shifted == pytest.approx(0.13 / 0.6, rel=0.05)
    assert histogram_divergence(x + 10, density) > 5  # all outside, where next to nothing should be


def test_guidance_with_the_exact_classifier_samples_the_class(computed):
    rows = computed["conditional"].numbers["rows"]
    exact, strong, truth = rows[0], rows[3], rows[-1]
    # 257 cells and 2000 draws: the KL of draws themselves is about 0.03.
    assert exact["divergence"] - truth["divergence"] < 0.02
    assert exact["mean_error"] < 4 / math.sqrt(2000) + 0.02
    assert strong["divergence"] > 5 * truth["divergence"] and strong["wanted"] > truth["wanted"]


# ------------------------------------------------------------------------------------------------------------- command


@pytest.fixture
def small_command(monkeypatch):
    """Two figures in small: one whose claims hold, one with models trained for twelve steps."""
    monkeypatch.setattr(main, "FIGURES", {"epsilon_and_score": 36, "scarce_data": 36})
    monkeypatch.setattr(epsilon_and_score, "run", partial(epsilon_and_score.run, points=50))
    monkeypatch.setattr(scarce_data, "run", partial(scarce_data.run, n_iters=12, num_train=1000))


def test_run_stops_resumes_and_keeps(small_command, tmp_path, monkeypatch, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main.run(whole, figure="epsilon_and_score", jobs=1)
    assert "| yes " in capsys.readouterr().out and "**no**" not in (whole / "table.md").read_text()
    with pytest.raises(SystemExit, match="not everything that must hold does"):
        main.run(whole, jobs=1)
    assert "**no**" in capsys.readouterr().out
    for name in main.FIGURES:
        assert (whole / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    # Killed in the middle of the second model, and continued to the very same numbers.
    class Killed(Exception):
        pass

    steps = 0

    def update_or_die(count: int) -> None:
        nonlocal steps
        steps += count
        if steps == 18:
            raise Killed

    with pytest.raises(Killed):
        main.work(parts, "scarce_data", update_or_die)
    assert not (parts / "runs" / "scarce_data" / "result.json").exists()
    with pytest.raises(SystemExit):
        main.run(parts, figure="scarce_data,epsilon_and_score", jobs=1)
    for name in ("results.json", "table.md"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes()
    assert list(json.loads((parts / "results.json").read_text())["figures"]) == list(main.FIGURES)

    # Finished figures are kept; one whose record is damaged, or whose picture is gone, is not finished.
    before = (whole / "table.md").read_bytes()
    monkeypatch.setattr(scarce_data, "run", None)
    (whole / "runs" / "epsilon_and_score" / "result.json").write_text("{")
    (whole / "epsilon_and_score.png").unlink()
    with pytest.raises(SystemExit):
        main.run(whole, jobs=1)
    assert (whole / "table.md").read_bytes() == before and (whole / "epsilon_and_score.png").exists()


def test_a_claim_that_is_not_a_number_does_not_hold(small_command, tmp_path, monkeypatch):
    result = Result({"a": 1.5}, {"b": (np.nan, "<=", 1.0)}, None)
    monkeypatch.setattr(epsilon_and_score, "run", lambda folder, update: result)
    monkeypatch.setattr(main, "save_figure", lambda picture, path: None)
    with pytest.raises(FloatingPointError, match="claims is not finite"):
        main.run(tmp_path / "run", figure="epsilon_and_score", jobs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(figure="ncsn"), "--figure=ncsn: allowed are score_matching, langevin, .*digits, all"),
        (dict(figure="langevin,"), "--figure=: allowed are"),
        (dict(jobs=0), "--jobs=0: at least 1"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main.run(tmp_path / "run", **options)
    assert list(tmp_path.iterdir()) == []
