"""Section 3.1 against the numbers of the public code, against closed forms, and from the command line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.integrate import quad

from conservativeness import asymmetry
from gaussian_example import main as example
from gaussian_example.main import REFERENCE

ROOT = Path(__file__).parents[2]
KINDS = ("csbm", "usbm")
VARIANCE = 0.01


# ------------------------------------------------------------------------------------------------- a second derivation


def density(x: np.ndarray) -> np.ndarray:
    return np.exp(-(x**2).sum(-1) / (2 * VARIANCE)) / (2 * math.pi * VARIANCE)


def ring(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """μ(x) and ∇log μ(x)."""
    angles = 2 * math.pi * np.arange(10) / 10
    to_centres = 3 * np.stack([np.cos(angles), np.sin(angles)], axis=-1) - x[..., None, :]
    components = np.exp(-(to_centres**2).sum(-1) / 2) / (2 * math.pi)
    mean = components.mean(-1)
    return mean, (components[..., None] * to_centres).mean(-2) / mean[..., None]


def amplitude(x: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """a(x) and ∇a(x), differentiated by hand: 2∇a/a = ∇log μ − ∇log(p (‖x‖² + e) + 10⁻⁸)."""
    squared, e, p = (x**2).sum(-1), epsilon + 1e-6, density(x)
    mean, log_gradient = ring(x)
    denominator = p * (squared + e) + 1e-8
    a = np.sqrt(2 * e * mean / denominator)
    radial = p * (2 - (squared + e) / VARIANCE) / denominator
    return a, 0.5 * a[..., None] * (log_gradient - radial[..., None] * x)


def jacobian(x: np.ndarray, kind: str, epsilon: float) -> np.ndarray:
    """(..., 2, 2) of −x/σ² + a(x) d(x)."""
    a, gradient = amplitude(x, epsilon)
    rotation = {"csbm": np.eye(2), "usbm": np.array([[0.0, -1.0], [1.0, 0.0]])}[kind]
    direction = x @ rotation.T
    return -np.eye(2) / VARIANCE + a[..., None, None] * rotation + direction[..., :, None] * gradient[..., None, :]


def asym_and_nasym(x: np.ndarray, kind: str, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    j = jacobian(x, kind, epsilon)
    asym = (j[..., 1, 0] - j[..., 0, 1]) ** 2
    return asym, asym / (2 * (j**2).sum((-2, -1)))


def expectation(value) -> float:
    """∫ p value dx by adaptive quadrature along r and the mean over 60 angles."""
    angles = 2 * math.pi * np.arange(60) / 60
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=-1)

    def integrand(r: float) -> float:
        return 2 * math.pi * r * float((density(r * circle) * value(r * circle)).mean())

    return sum(quad(integrand, a, b, epsrel=1e-9)[0] for a, b in ((0, 0.1), (0.1, 0.4), (0.4, 0.8), (0.8, 2.0)))


# ---------------------------------------------------------------------------------------------------- the paper's table


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, float], dict[str, float]]:
    return {(kind, epsilon): example.measure(kind, epsilon) for kind in KINDS for epsilon in REFERENCE}


@pytest.mark.parametrize("epsilon", REFERENCE)
def test_steps_are_those_of_the_public_code(epsilon):
    steps = [example.steps_to_criterion(example.trajectory(kind, epsilon)).item() for kind in KINDS]
    assert steps == list(REFERENCE[epsilon][:2])


@pytest.mark.parametrize("epsilon", REFERENCE)
def test_asymmetries_are_those_of_the_public_code(epsilon, measured):
    asym, nasym = REFERENCE[epsilon][2:]
    assert measured["usbm", epsilon]["asym"] == pytest.approx(asym, rel=0.01)
    assert measured["usbm", epsilon]["nasym"] == pytest.approx(nasym, rel=0.01)
    assert 0 <= measured["csbm", epsilon]["asym"] < 1e-12
    assert 0 <= measured["csbm", epsilon]["nasym"] < 1e-12


def test_steps_that_are_never_enough():
    positions = torch.zeros(5, 3, 2, dtype=torch.float64)
    positions[:, 0] = 1.0  # one of three particles stays far away
    assert example.steps_to_criterion(positions) == 4
    positions[3, 0] = 0.0
    assert example.steps_to_criterion(positions) == 3
    positions[3:, 0], positions[4, 0] = 1.0, 0.0  # where the last step ends no step begins
    assert example.steps_to_criterion(positions) == 4


# ----------------------------------------------------------------------------------------- Jacobian, expectation, error


@pytest.mark.parametrize("kind", KINDS)
def test_jacobian_agrees_with_the_one_by_hand(kind):
    # 400 points from 3e-3 to 3.5 of the origin, all directions.
    r, angle = np.geomspace(3e-3, 3.5, 400), 2.4 * np.arange(400)
    x = r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    ours = asymmetry(example.perturbed_score(kind, 1e-3), torch.from_numpy(x), torch.zeros(400))
    j = jacobian(x, kind, 1e-3)
    np.testing.assert_allclose(ours.jacobian_norm_squared, (j**2).sum((1, 2)), rtol=1e-9)
    np.testing.assert_allclose(ours.asym, asym_and_nasym(x, kind, 1e-3)[0], rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize("epsilon", [5.0e-4, 2.25e-3])
def test_expectations_agree_with_adaptive_quadrature(epsilon, measured):
    ours = measured["usbm", epsilon]
    exact = [expectation(lambda x, k=k: asym_and_nasym(x, "usbm", epsilon)[k]) for k in (0, 1)]
    assert ours["asym_expectation"] == pytest.approx(exact[0], rel=1e-7)
    assert ours["nasym_expectation"] == pytest.approx(exact[1], rel=1e-7)
    # The grid's sum times the area of a cell is near, but not the integral.
    assert abs(ours["asym"] * example.CELL_AREA / exact[0] - 1) > 0.03
    assert measured["csbm", epsilon]["asym_expectation"] < 1e-12


def test_expectation_agrees_with_monte_carlo(measured):
    # Importance sampling, uniform on a disc of radius 0.9: draws from p itself would miss where p·Asym is large.
    generator = np.random.default_rng(0)
    r, angle = 0.9 * np.sqrt(generator.uniform(size=200_000)), generator.uniform(0, 2 * math.pi, 200_000)
    x = r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)
    values = math.pi * 0.9**2 * density(x) * asym_and_nasym(x, "usbm", 1e-3)[0]
    standard_error = values.std() / math.sqrt(len(values))
    assert standard_error < 0.005 * values.mean()
    assert abs(values.mean() - measured["usbm", 1e-3]["asym_expectation"]) < 4 * standard_error


@pytest.mark.parametrize("epsilon", [e for e in REFERENCE if e > 0])
def test_both_types_have_the_same_error(epsilon, measured):
    errors = [measured[kind, epsilon]["score_error"] for kind in KINDS]
    assert errors[0] == pytest.approx(errors[1], rel=1e-12)
    exact = expectation(lambda x: 0.5 * amplitude(x, epsilon)[0] ** 2 * (x**2).sum(-1))
    assert errors[0] == pytest.approx(exact, rel=1e-7)

    # The perturbations are of one length and at right angles everywhere, not only on average.
    x = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.zeros(1000)
    radial, around = (example.perturbed_score(kind, epsilon)(x, t) - example.true_score(x, t) for kind in KINDS)
    torch.testing.assert_close(radial.norm(dim=1), around.norm(dim=1), rtol=1e-9, atol=1e-9)
    assert ((radial * around).sum(1).abs() < 1e-9 * radial.norm(dim=1) ** 2 + 1e-12).all()
    # Outwards the one, anticlockwise the other.
    assert ((radial * x).sum(1) > 0).all()
    assert (x[:, 0] * around[:, 1] - x[:, 1] * around[:, 0] > 0).all()


def test_error_would_be_epsilon_without_the_guards():
    # ½ p‖u‖² = ε μ but for 10⁻⁶/ε, ε/r² and 10⁻⁸/(p r²), each at most 2 % for r from 0.25 to 0.5 and ε = 0.001.
    r, angle = np.linspace(0.25, 0.5, 50), 0.7 * np.arange(50)
    x = torch.from_numpy(r[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    u = example.perturbed_score("usbm", 1e-3)(x, torch.zeros(50)) - example.true_score(x, torch.zeros(50))
    density_of_error = 0.5 * density(x.numpy()) * (u**2).sum(1).numpy()
    np.testing.assert_allclose(density_of_error, 1e-3 * ring(x.numpy())[0], rtol=0.02)


def test_density_is_normalised_and_its_entropy_right():
    assert expectation(lambda x: np.ones(len(x))) == pytest.approx(1, abs=1e-9)
    x, weights = example.quadrature()
    log_p = example.log_density(x, torch.zeros(len(x)))
    assert weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert -(weights * log_p).sum().item() == pytest.approx(example.ENTROPY, abs=1e-12)
    np.testing.assert_allclose(log_p.exp(), density(x.numpy()), rtol=1e-12)
    np.testing.assert_allclose(example.mixture_density(x), ring(x.numpy())[0], rtol=1e-12)


# --------------------------------------------------------------------------------------- decomposition and small steps


def test_decomposition_tells_the_types_apart():
    exact = example.decomposition_lengths("usbm", 0.0)
    assert exact["perturbation_rms"] < 1e-9 and exact["rotational_rms"] < 1e-9  # a quadratic has no rotational part
    csbm, usbm = (example.decomposition_lengths(kind, 1e-3) for kind in KINDS)
    assert csbm["perturbation_rms"] == pytest.approx(usbm["perturbation_rms"], rel=1e-9)
    assert csbm["rotational_rms"] < 0.01 * csbm["perturbation_rms"]
    assert 0.8 * usbm["perturbation_rms"] < usbm["rotational_rms"] < usbm["perturbation_rms"]


def test_small_steps_have_the_bias_they_must_have():
    # x ← 0.9 x + √(0.2) σ z has variance σ²/0.95, and ½‖x‖²/σ² the mean 1/0.95, where p has 1.
    expected = {"deterministic": -1.0, "unadjusted": 1 / 0.95 - 1, "adjusted": 0.0}
    for method, bias in expected.items():
        row = example.with_small_steps("usbm", method, 0.0)
        assert abs(row["nll"] - example.ENTROPY - bias) < 4 * row["nll_se"] + 1e-9, method
        assert row["not_reached"] == 0 and (row["acceptance"] < 1) == (method == "adjusted")
        # With the true score the types are one, also in their noise.
        assert example.with_small_steps("csbm", method, 0.0) == row | {"type": "csbm"}


def test_small_steps_without_noise_ignore_what_turns_around_the_origin():
    """A tangential part drops out of d‖x‖²/dt = 2 x·s; steps of σ²/10 are near that limit. An outward one slows."""
    exact = example.with_small_steps("usbm", "deterministic", 0.0)["steps"]
    steps = {kind: example.with_small_steps(kind, "deterministic", 1.5e-3)["steps"] for kind in KINDS}
    assert abs(steps["usbm"] - exact) < 1.5
    assert steps["csbm"] > 1.5 * exact


# ------------------------------------------------------------------------------------------------ from the command line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whole_command(tmp_path, monkeypatch):
    monkeypatch.setattr(example, "REPETITIONS", 4)
    text = example.run(tmp_path, epsilons=(100.0, 1e-3))
    written = contents(tmp_path)
    figures = {"trajectories.png", "helmholtz_hodge.png"}
    printed = {name.replace(".png", ".pdf") for name in figures}
    assert set(written) == {".lock", "experiment.json", "results.json", "table.md"} | figures | printed
    for name in figures:
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG" and image.width > 450 and image.info["dpi"][0] > 149
            assert len(np.unique(np.asarray(image))) > 20

    results = json.loads(written["results.json"])
    assert results["experiment"] == "gaussian_example"
    assert results["entropy_nats"] == pytest.approx(math.log(2 * math.pi * math.e * 0.01))
    rows = {(row["type"], row["epsilon"]): row for row in results["rows"]}
    assert set(rows) == {(kind, epsilon) for kind in KINDS for epsilon in (1e-3, 100.0)}
    names = {"type", "epsilon", "steps", "asym", "nasym", "asym_expectation", "nasym_expectation", "score_error"}
    assert all(set(row) == names | {"perturbation_rms", "rotational_rms"} for row in rows.values())
    assert [rows[kind, 1e-3]["steps"] for kind in KINDS] == [3, 6]
    stochastic = results["stochastic"]
    assert stochastic["step_size"] == pytest.approx(0.001) and stochastic["repetitions"] == 4
    keys = {(row["type"], row["method"], row["epsilon"]) for row in stochastic["rows"]}
    assert keys == {(k, m, e) for k in KINDS for m in example.METHODS for e in (1e-3, 100.0)}
    names = {"steps", "steps_se", "not_reached", "nll", "nll_se", "acceptance", "late_acceptance"}
    assert all(set(row) == names | {"type", "method", "epsilon"} for row in stochastic["rows"])

    assert written["table.md"].decode() == text
    assert "| 0.001 | 3    | 3         | 6    | 6         |" in text
    assert "3.526e-02 | 3.53e-02  | 8.780e-07 | 8.78e-07" in text
    # An ε that the public code was not run with has no reference.
    cells = next(line for line in text.splitlines() if line.startswith("| 100 ")).replace(" ", "").split("|")[1:-1]
    assert cells == ["100", str(rows["csbm", 100]["steps"]), "–", str(rows["usbm", 100]["steps"]), "–"]
    assert "nan" not in written["results.json"].decode().lower()

    # The same folder again, to the same numbers.
    assert example.run(tmp_path, epsilons=(0.001, 100.0)) == text
    assert contents(tmp_path) == written


@pytest.mark.parametrize(
    ("epsilons", "message"),
    [
        ((0.0, -1e-4), "--epsilons=0.0,-0.0001: allowed are numbers from 0 to 100"),
        ((math.nan,), "--epsilons=nan"),
        ((math.inf,), "--epsilons=inf"),
        ((101.0,), "--epsilons=101"),
        ((), "--epsilons=: allowed"),
    ],
)
def test_bad_input_leaves_the_folder_alone(tmp_path, monkeypatch, epsilons, message):
    monkeypatch.setattr(example, "trajectory", lambda *arguments: pytest.fail("work was started"))
    (tmp_path / "results.json").write_text("old")
    with pytest.raises(ValueError) as error:
        example.run(tmp_path, epsilons=epsilons)
    assert message in str(error.value)
    assert contents(tmp_path) == {"results.json": b"old"}


@pytest.mark.parametrize("name", ["config.json", "experiment.json"])
def test_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, name):
    monkeypatch.setattr(example, "trajectory", lambda *arguments: pytest.fail("work was started"))
    (tmp_path / name).write_text('{"experiment": "another", "settings": {}}')
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=f"--workdir={tmp_path}"):
        example.run(tmp_path)
    assert contents(tmp_path) == before
