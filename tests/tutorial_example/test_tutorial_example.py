"""The tutorial's figures in small: closed forms they rest on, claims that hold at any size, files and resumption."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from conservativeness import jacobian
from exact.distributions import GaussianMixture
from experiment.randomness import normal_like
from models.mlp import TimeConditionalMLP
from tutorial_example import main as tutorial
from tutorial_example.conditional import (
    NUM_CLASSES,
    class_density,
    class_log_probs,
    histogram_divergence,
    labelled_mixture,
)
from tutorial_example.diffusion import expected_noise, moment_errors
from tutorial_example.discretisation import CHAINS, marginal_error
from tutorial_example.flow import follow_flow, interpolate_latents
from tutorial_example.sdes import euler_maruyama_marginal
from tutorial_example.tutorial_figure import (
    SDES,
    Claim,
    Result,
    TutorialFigure,
    constant,
    generator,
    read_result,
    three_modes,
    two_modes,
    write_result,
)

ROOT = Path(__file__).resolve().parents[2]
SMALL = {
    "score_matching": dict(n_iters=120, seeds=1, test_points=4000, batch_size=128, largest_relative_error=0.3),
    "langevin": dict(step_sizes=(0.2, 0.1, 0.05), duration=8.0, particles=2000, n_iters=30),
    "scarce_data": dict(n_iters=80, batch_size=256, num_train=2000),
    "annealed_langevin": dict(particles=500, seeds=2, trainings=1, n_iters=60, steps_per_level=50),
    "ddpm": dict(levels=1000, n_iters=60, batch_size=256, samples=400),
    "sdes": dict(num_steps=200, samples=2000),
    "discretisation": dict(counts=(64, 128, 256), simulated=(64,), paths=500, fine_steps=2048),
    "probability_flow": dict(n_iters=100, points=80, probes=(1,), pairs=20, between=5, tolerance=5e-7),
    "epsilon_and_score": dict(points=500, times=4),
    "conditional": dict(n_iters=40, num_steps=100, samples=2000),
    "posterior": dict(lengths=(1.0,), measurements=4, samples=300, num_steps=60),
    "digits": dict(n_iters=3, num_steps=4, samples=10, test_images=2, pairs=1, between=3),
}
# A model trained for so little has not learned what is claimed of it, nor are so few steps and samples as good.
NEEDS_TRAINING = ("learned", "classifier-free", "ε beyond the least", "bits/dim", "image →", "σ = 10")
NEEDS_SIZE = ("VE ", "VP ", "how much larger the share", "samples, true score")


def small(name: str) -> TutorialFigure:
    return dataclasses.replace(tutorial.FIGURES[name], **SMALL[name])


class Small:
    """Every figure in small, computed once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.results: dict[str, tuple[Result, int]] = {}

    def __getitem__(self, name: str) -> tuple[Result, int]:
        if name not in self.results:
            updates: list[int] = []
            result = small(name).compute(self.folder / name, updates.append)
            self.results[name] = result, sum(updates)
        return self.results[name]


@pytest.fixture(scope="module")
def computed(tmp_path_factory) -> Small:
    return Small(tmp_path_factory.mktemp("tutorial"))


# ---------------------------------------------------------------------------------------------------------- all figures


@pytest.mark.parametrize("name", tutorial.FIGURES)
def test_every_figure_in_small(name, computed):
    """Whatever does not rest on a trained model holds; the steps reported are those announced; all of it is kept."""
    result, updates = computed[name]
    assert updates == small(name).steps
    excused = NEEDS_TRAINING + NEEDS_SIZE
    failed = [c for c in result.claims if not c.holds and not any(word in c.text for word in excused)]
    assert not failed
    folder = computed.folder / name
    write_result(folder, small(name), result)
    stored = read_result(folder, small(name))
    assert stored.numbers == json.loads(json.dumps(result.numbers)) and stored.claims == result.claims
    assert stored.arrays.keys() == result.arrays.keys()
    text = tutorial.report({name: (small(name), stored)})
    tables = [line for line in text.splitlines() if line.startswith("|")]
    widths = {line.count("|") for line in tables}
    assert len(tables) >= 6 and len(widths) <= 4  # no cell holds a bar of its own
    for claim in result.claims:
        assert claim.text in text
    assert small(name).draw(stored) is not None


def test_results_that_are_missing_damaged_or_of_other_settings(tmp_path):
    figure = small("epsilon_and_score")
    assert read_result(tmp_path, figure) is None
    result = Result({"a": 1.5}, [Claim("b", 1.0, "<=", 2.0)], {"c": np.arange(3)})
    write_result(tmp_path, figure, result)
    assert read_result(tmp_path, figure).numbers == {"a": 1.5}
    assert read_result(tmp_path, dataclasses.replace(figure, points=7)) is None
    arrays = (tmp_path / "arrays.npz").read_bytes()
    (tmp_path / "arrays.npz").write_bytes(arrays[: len(arrays) // 2])
    assert read_result(tmp_path, figure) is None
    (tmp_path / "arrays.npz").write_bytes(arrays)
    (tmp_path / "result.json").write_text("{")
    assert read_result(tmp_path, figure) is None


def test_claims():
    assert Claim("", 1.0, "<=", 1.0).holds and not Claim("", 1.1, "<=", 1.0).holds
    assert Claim("", 1.0, ">=", 1.0).holds and not Claim("", 0.9, ">=", 1.0).holds
    assert not Claim("", math.nan, "<=", 1.0).holds and not Claim("", math.nan, ">=", 1.0).holds


# -------------------------------------------------------------------------------------------------- what they rest upon


def test_small_models_learn(computed):
    """All losses bring the error below 30 %, from 100 %, and nothing that is learned is the true score."""
    rows = computed["score_matching"][0].numbers["rows"]
    assert all(0 < row["relative_error"] < 0.3 for row in rows)
    assert computed["ddpm"][0].numbers["epsilon_error"] < 0.1
    rows = computed["annealed_langevin"][0].numbers["rows"]
    learned = [row["minor_weight"] for row in rows if row["score"] == "learned"]
    assert len(set(learned)) == 2


def test_annealed_langevin_recovers_the_weights_and_plain_langevin_does_not(computed):
    # 500 samples know a weight of 0.2 to a standard error of 0.018.
    rows = [row for row in computed["annealed_langevin"][0].numbers["rows"] if row["score"] == "true"]
    weights = {
        name: np.mean([row["minor_weight"] for row in rows if row["sampler"] == name]) for name in ("plain", "annealed")
    }
    assert abs(weights["annealed"] - 0.2) < 0.05 and abs(weights["plain"] - 0.2) > 0.2
    assert all(abs(row["start"] - 0.5) < 4 * math.sqrt(0.25 / 500) for row in rows)
    figure = small("annealed_langevin")
    for std in (0.5, 3.0, 20.0):
        x = two_modes(SDES["VE"]).sample(200_000, generator("shares"))
        x = x + std * normal_like(x, generator("noise of shares"))
        share = float((x.sum(1) < 0).double().mean())
        assert abs(share - figure.exact_share(std)) < 4 * math.sqrt(0.25 / 200_000)


def test_sdes_forwards_and_backwards(computed):
    """2000 samples, 200 steps: standard errors of a mean 0.022, of a variance 3.2 %, of a weight at most 0.011."""
    numbers = computed["sdes"][0].numbers
    for row in numbers["forward"]:
        assert row["mean_deviation"] < 4 and row["variance_deviation"] < 4
        assert row["chain_bias"] < 0.05
    assert len(numbers["forward"]) == 12 and len(numbers["reverse"]) == 6
    for row in numbers["reverse"]:
        assert row["mean_error"] < 0.12 and row["covariance_error"] < 0.16 and row["weight_error"] < 0.05
    (row,) = (row for row in computed["ddpm"][0].numbers["rows"] if row["score"] == "true")
    # 400 samples, 1000 steps.
    assert row["mean_error"] < 0.2 and row["covariance_error"] < 0.3 and row["weight_error"] < 0.1


def test_moment_errors():
    mixture = three_modes(SDES["VP"])
    x = mixture.sample(100_000, generator("moments"))
    errors = moment_errors(x, mixture, 0.0)
    assert errors["mean_error"] < 4 / math.sqrt(100_000)
    assert errors["covariance_error"] < 4 * math.sqrt(2 / 100_000)
    assert errors["weight_error"] < 4 * math.sqrt(0.25 / 100_000)
    std = mixture.moments(0.0)[1].diagonal().sqrt()
    shifted = moment_errors(x + 0.1 * std, mixture, 0.0)
    assert shifted["mean_error"] == pytest.approx(0.1, abs=0.015)
    assert moment_errors(1.1 * x, mixture, 0.0)["covariance_error"] == pytest.approx(0.21, abs=0.02)


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
    a, b = CHAINS["DDPM"].steps(CHAINS["DDPM"].sde, 1000)
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(a**2, 1 - beta, rtol=1e-12, atol=0)
    torch.testing.assert_close(b**2, beta, rtol=1e-9, atol=0)
    a, b = CHAINS["SMLD"].steps(CHAINS["SMLD"].sde, 4)
    sigma = 0.01 * 1000 ** (torch.arange(5, dtype=torch.float64) / 4)
    torch.testing.assert_close(b**2, sigma[1:] ** 2 - sigma[:-1] ** 2)
    assert (a == 1).all()
    assert marginal_error(CHAINS["SMLD"], 50) < 1e-14
    assert marginal_error(CHAINS["DDPM"], 100) / marginal_error(CHAINS["DDPM"], 200) == pytest.approx(2, abs=0.2)


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
    from oracles import gaussian_2d

    gaussian = gaussian_2d(SDES["VP"])
    x = gaussian.sample(20, generator("flow"))
    latent = follow_flow(SDES["VP"], gaussian.score, x, 1e-3, 1.0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(latent, gaussian.flow(x, constant(x, 1e-3), constant(x, 1.0)), rtol=1e-6, atol=1e-6)
    back = follow_flow(SDES["VP"], gaussian.score, latent, 1.0, 1e-3, rtol=1e-9, atol=1e-9)
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
    sde = SDES["VP"]
    mixture = labelled_mixture(sde)
    x = mixture.sample(100, generator("labelled"))
    t = constant(x, 0.2)
    log_probs = class_log_probs(mixture, x, t)
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(100, dtype=torch.float64))
    for c in range(NUM_CLASSES):
        joint = class_density(mixture, c).log_prob(x, t) + math.log(0.5)
        torch.testing.assert_close(log_probs[:, c], joint - mixture.log_prob(x, t), rtol=1e-9, atol=1e-9)


def test_divergence_of_histograms():
    """KL(N(δ, s²) ‖ N(0, s²)) = ‖δ‖²/2s²; of draws of the density itself (cells − 1)/2n, cells that are ever hit."""
    covariance = 0.3 * torch.eye(2)[None]
    density = GaussianMixture(SDES["VP"], torch.ones(1), torch.zeros(1, 2), covariance)
    x = density.sample(200_000, generator("histogram"))
    assert 0 < histogram_divergence(x, density, bins=24) < 24**2 / (2 * 200_000)
    shifted = histogram_divergence(x + torch.tensor([0.3, -0.2], dtype=torch.float64), density, bins=24)
    assert shifted == pytest.approx(0.13 / 0.6, rel=0.05)
    far = histogram_divergence(x + 10, density)  # all outside, where next to nothing should be
    assert far > 5


def test_guidance_with_the_exact_classifier_samples_the_class(computed):
    rows = computed["conditional"][0].numbers["rows"]
    exact, truth = rows[0], rows[-1]
    # 257 cells and 2000 draws: the KL of draws themselves is about 0.03.
    assert exact["divergence"] - truth["divergence"] < 0.02
    assert exact["mean_error"] < 4 / math.sqrt(2000) + 0.02
    strong = [row for row in rows if row["weight"] == small("conditional").strong]
    assert strong[0]["divergence"] > 5 * truth["divergence"] and strong[0]["wanted"] > truth["wanted"]


# --------------------------------------------------------------------------------------------------------- the network


def perturbed(network: TimeConditionalMLP) -> TimeConditionalMLP:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return network.double()


def test_network_by_hand():
    network = perturbed(TimeConditionalMLP(2, width=8, depth=2, input_scale=3.0))
    x, label = torch.randn(5, 2, dtype=torch.float64), torch.tensor([0.0, 1.5, 40.0, 300.0, 999.0]).double()
    p = {name: value.numpy() for name, value in network.state_dict().items()}

    def linear(values, name):
        return values @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    def silu(values):
        return values / (1 + np.exp(-values))

    angles = label.numpy()[:, None] * np.float32(10_000.0) ** -(np.arange(16) / 15)
    features = silu(linear(np.concatenate([np.sin(angles), np.cos(angles)], 1), "label.1"))
    z = linear(x.numpy() / 3, "first")
    for k in range(2):
        scale, shift = np.split(linear(features, f"modulations.{k}"), 2, axis=1)
        z = z + linear(silu((1 + scale) * z + shift), f"layers.{k}")
    expected = linear(silu(z), "last")
    # The frequencies are in single precision, at angles of up to 999.
    np.testing.assert_allclose(network(x, label).detach().numpy(), expected, rtol=1e-3, atol=1e-3)


def test_network_starts_at_zero_and_knows_label_and_class():
    fresh = TimeConditionalMLP(2, num_classes=3)
    x, label, classes = torch.randn(4, 2), torch.full((4,), 10.0), torch.tensor([0, 1, 2, 3])
    assert torch.equal(fresh(x, label, classes), torch.zeros(4, 2))
    network = perturbed(fresh)
    x, label = x.double(), label.double()
    values = network(x[:1].expand(4, 2), label, classes)
    assert len(values.unique(dim=0)) == 4  # the last one is the class "none"
    assert not torch.allclose(network(x, label), network(x, 2 * label))
    wide = TimeConditionalMLP(2, outputs=5)
    assert wide(torch.zeros(3, 2), torch.zeros(3)).shape == (3, 5)
    _, j = jacobian(lambda x, t: network(x, t, classes), x, label)
    assert torch.isfinite(j).all() and j.abs().max() > 0


@pytest.mark.parametrize("options", [dict(width=0), dict(depth=0), dict(outputs=0), dict(num_classes=-1)])
def test_network_of_no_size(options):
    with pytest.raises(ValueError, match="need positive numbers"):
        TimeConditionalMLP(2, **options)


# ------------------------------------------------------------------------------------------------------------- command

REGISTRY = {name: small(name) for name in ("epsilon_and_score", "scarce_data")} | {
    "scarce_data": dataclasses.replace(small("scarce_data"), n_iters=12, stds=(0.3, 10.0))
}


def test_run_stops_resumes_and_keeps(tmp_path, monkeypatch):
    def run(workdir: Path, names: str = "all", jobs: int = 1) -> tuple[str, bool]:
        return tutorial.run(workdir, names, jobs=jobs, figures=REGISTRY)

    text, holds = run(tmp_path / "whole")
    assert not holds  # scores trained for twelve steps
    assert "**no**" in text and "| yes |" in text
    assert (tmp_path / "whole" / "table.md").read_text() == text
    for name in REGISTRY:
        assert (tmp_path / "whole" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"

    # Killed in the middle of the second model, and continued to the very same numbers.
    class Killed(Exception):
        pass

    calls = 0
    figure_type = type(REGISTRY["scarce_data"])
    fit_score = figure_type.fit_score

    def killed(self, sde, data, t, std, folder, update):
        def update_or_die(steps: int) -> None:
            nonlocal calls
            calls += 1
            if calls == 18:
                raise Killed
            update(steps)

        return fit_score(self, sde, data, t, std, folder, update_or_die)

    with monkeypatch.context() as patched:
        patched.setattr(figure_type, "fit_score", killed)
        with pytest.raises(Killed):
            run(tmp_path / "parts", "scarce_data")
    assert not (tmp_path / "parts" / "results.json").exists()
    run(tmp_path / "parts", "scarce_data")
    results = json.loads((tmp_path / "parts" / "results.json").read_text())
    assert list(results["figures"]) == ["scarce_data"]
    run(tmp_path / "parts", "epsilon_and_score,scarce_data")
    for name in ("results.json", "table.md"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    # Finished figures are kept.
    with monkeypatch.context() as patched:
        for figure in REGISTRY.values():
            patched.setattr(type(figure), "compute", None)
        assert run(tmp_path / "whole")[0] == text
    other = {**REGISTRY, "scarce_data": dataclasses.replace(REGISTRY["scarce_data"], n_iters=13)}
    with pytest.raises(ValueError, match=r"other settings: scarce_data\.n_iters was 12, is 13"):
        tutorial.run(tmp_path / "whole", "all", figures=other)


@pytest.mark.parametrize(
    ("names", "jobs", "message"),
    [
        ("ncsn", 1, "--figure=ncsn: allowed are score_matching, langevin, .*digits, all"),
        ("langevin,", 1, "--figure=: allowed are"),
        ("all", 0, "--jobs=0: at least 1"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path, names, jobs, message):
    with pytest.raises(ValueError, match=message):
        tutorial.run(tmp_path / "run", names, jobs=jobs)
    assert list(tmp_path.iterdir()) == []


def test_workdir_of_another_experiment(tmp_path):
    (tmp_path / "experiment.json").write_text('{"experiment": "another", "settings": {}}')
    with pytest.raises(ValueError, match="belongs to the experiment 'another'"):
        tutorial.run(tmp_path, "epsilon_and_score")


def test_command_line_answers_a_mistake_in_one_line(tmp_path):
    command = [sys.executable, "-m", "tutorial_example.main", f"--workdir={tmp_path / 'run'}", "--figure=ncsn"]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=120)
    assert result.returncode == 1
    assert result.stderr.startswith("error: --figure=ncsn: allowed are score_matching")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_the_config_of_the_digits_is_a_run_of_main():
    from tutorial_example.configs import get_config

    config = get_config()
    assert config.training.n_iters == tutorial.FIGURES["digits"].n_iters
    assert config.data.dataset == "digits" and config.training.sde == "vpsde"
