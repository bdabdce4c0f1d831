"""The study of QC: its statistics, its arms and their steps, the placebo, and the whole of it in small."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from small_settings import small_part, small_study

from configs.defaults import base_config
from conservativeness import jacobian
from experiment.runtime import Runtime
from qc_study import analysis, arms, main, measures, plane
from qc_study.arms import PARTS, Arm, Placebo
from sde_lib import make_sde

COSTS = {"qc": 3.7, "lazy": 1.675, "placebo": 4.8}
STAGES = ("600", "1800", "6000")
README = (Path(__file__).resolve().parents[2] / "qc_study" / "README.md").read_text()

# ---------------------------------------------------------------------------------------------------------- statistics


def simulated(effect: float, studies: int, deviation: float = 0.01) -> list[list[dict]]:
    """The primary analysis of studies of eight seeds with this effect at all three stages."""
    draws = effect + deviation * np.random.default_rng(0).standard_normal((studies, len(STAGES), 8))
    return [analysis.primary(dict(zip(STAGES, draw, strict=True))) for draw in draws]


def share(flags: list[bool]) -> tuple[float, float]:
    """How often something is the case, and the standard error of that, at least of one case in all."""
    p = float(np.mean(flags))
    return p, math.sqrt(max(p * (1 - p), 1 / len(flags)) / len(flags))


def test_coverage_errors_and_power_are_those_of_the_plan():
    """Intervals hold the effect in 95 % of cases; with no effect any of three stages differs in at most 5 % of studies;
    with 0.02 bits/dim nearly every stage does. Deviation between seeds 0.01, shares within three standard errors."""
    none, some = simulated(0.0, 250), simulated(0.02, 100)
    for effect, found in ((0.0, none), (0.02, some)):
        covered, error = share([row["low"] < effect < row["high"] for study in found for row in study])
        assert abs(covered - 0.95) < 3 * error < 0.05
    wrong, error = share([any("QC" in row["verdict"] for row in study) for study in none])
    assert wrong < 0.05 + 3 * error < 0.1
    wrong, error = share([any("no difference" in row["verdict"] for row in study) for study in some])
    assert wrong < 3 * error
    power, error = share([row["verdict"] == "QC higher" for study in some for row in study])
    assert power > 0.99 - 3 * error and "| 0.01 | 0.99 | 0.41 |" in README


def test_equivalence_is_two_one_sided_tests():
    d = np.random.default_rng(1).normal(0.004, 0.01, 8)
    [row] = analysis.primary({"600": d})
    margin = analysis.MARGIN
    expected = max(
        stats.ttest_1samp(d, -margin, alternative="greater").pvalue,
        stats.ttest_1samp(d, margin, alternative="less").pvalue,
    )
    assert row["p_equivalent"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("p", "equivalent", "mean", "verdict"),
    [
        (0.2, 0.2, 0.1, "undecided"),
        (0.2, 0.01, 0.1, "no difference of 0.01 or more"),
        (0.01, 0.2, 0.1, "QC higher"),
        (0.01, 0.01, -0.1, "QC lower, by less than 0.01"),
        (None, None, 0.1, "undecided"),
    ],
)
def test_verdicts(p, equivalent, mean, verdict):
    assert analysis.verdict({"p_holm": p, "p_equivalent_holm": equivalent, "mean": mean}) == verdict


def test_primary_difference_is_qc_of_the_larger_weight_minus_u_at_equal_compute():
    part = PARTS["digits"]()
    levels = {name: 10 * k for k, name in enumerate(arms.arms(part, COSTS, 0.1))}
    rows = [{"model": name, "seed": s, "nll": level + s} for s in range(3) for name, level in levels.items()]
    found = analysis.primary_differences(rows, part)
    assert [*found] == [*STAGES]
    for fork, d in found.items():
        assert d.tolist() == [levels[f"qc-{fork}-0.02"] - levels[f"u-{fork}-compute"]] * 3


def test_one_seed_gives_no_test():
    assert [row["verdict"] for row in analysis.primary({"600": np.array([0.1]), "1800": np.array([0.2])})] == [
        "undecided"
    ] * 2


# ---------------------------------------------------------------------------------------------------------------- arms


def test_steps_follow_from_the_measured_costs():
    """Every comparison at equal compute is one: after the fork the arms have done the same in steps of U."""
    part = PARTS["digits"]()
    found = arms.arms(part, COSTS, 0.3)
    for fork in (600, 1800, 6000):
        assert found[f"qc-{fork}-0.02"] == Arm(fork + 700, fork, "qc", 0.02)
        assert found[f"u-{fork}-steps"] == Arm(fork + 700)
        assert found[f"u-{fork}-compute"] == Arm(fork + 2590)  # 700 × 3.7
    assert found["placebo"] == Arm(2500, 1800, "placebo", 0.3) and found["u-placebo-compute"] == Arm(1800 + 3360)
    assert found["lazy"] == Arm(1800 + 1546, 1800, "lazy", 0.02)  # 2590 / 1.675
    assert found["decay"] == Arm(1800 + 2590, 1800, "decay", 0.0)
    assert found["scratch"] == Arm(1186, 0, "qc", 0.02)  # (1800 + 2590) / 3.7
    assert {name for pair in analysis.comparisons(part).values() for name in pair} | {
        f"u-{fork}" for fork in part.forks
    } == set(found)


def test_parts_have_the_weights_of_the_plan_and_compare_models_that_exist():
    for name, make in PARTS.items():
        part = make()
        assert part.weights == ((0.005, 0.02) if name == "digits" else (5e-4,))
        models = arms.arms(part, COSTS, 0.1)
        assert {model for pair in analysis.comparisons(part).values() for model in pair} <= set(models)
        # The average has forgotten the fork at the end of QC's phase.
        assert part.config.model.ema_rate**part.phase < 0.05


class Field(torch.nn.Module):
    """s(x) = tanh(Wx), whose Jacobian is not symmetric."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(
            torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        )

    def forward(self, x, t):
        return torch.tanh(x @ self.weight.T)


def test_placebo_is_the_exact_formula_and_has_no_gradient_where_model_and_teacher_agree():
    """In two dimensions (1, 1) and (1, −1), up to sign, are all probes: their mean is ½‖J + Jᵀ − J̄ − J̄ᵀ‖²."""
    model, teacher = Field(0), Field(1)
    x, t = torch.randn(1, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    own, fixed = (jacobian(field, x, t)[1][0].detach() for field in (model, teacher))
    difference = own + own.T - fixed - fixed.T
    exact = 0.5 * ((difference @ torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double()) ** 2).sum(0)
    assert torch.isclose(exact.mean(), 0.5 * (difference**2).sum())
    seen = set()
    for seed in range(12):
        value, penalty, _ = Placebo(teacher)(model, x, t, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(value, model(x, t).detach())
        seen.add(int((exact - penalty).abs().argmin()))
        assert (exact - penalty).abs().min() < 1e-12
    assert seen == {0, 1}

    _, penalty, _ = Placebo(teacher)(model, x, t, create_graph=True)
    assert torch.autograd.grad(penalty.sum(), model.weight)[0].norm() > 0.1
    _, penalty, _ = Placebo(Field(0))(model, x, t, create_graph=True)
    assert penalty.abs().max() == 0 and torch.autograd.grad(penalty.sum(), model.weight)[0].norm() == 0


def test_placebo_takes_the_place_of_the_qc_term(tmp_path):
    """Its value is in the loss with its weight; and the trainer's teacher is the moving average."""
    loop = arms.trainer(small_part(), Arm(9, None, "placebo", 0.3), 0, tmp_path, tmp_path / "run", Runtime("cpu"))
    assert loop.objective.penalty.teacher is loop.ema.model
    terms = loop.loss(loop.objective, 0, range(8))
    assert terms["qc"] == 0 and terms["loss"] == terms["dsm"]  # before the first step the average is the model
    loop.train_step()
    terms = loop.loss(loop.objective, 1, range(8))
    assert terms["qc"] > 0 and torch.isclose(terms["loss"], terms["dsm"] + 0.3 * terms["qc"])


def test_decay_ends_at_rate_0(tmp_path):
    arms.train_u(small_part(), 0, [2], tmp_path, "cpu", lambda _: None)
    loop = arms.trainer(small_part(), Arm(6, 2, "decay"), 0, tmp_path, tmp_path / "decay", Runtime("cpu"))
    rates = []
    while loop.step < 6:
        before = {name: value.clone() for name, value in loop.model.state_dict().items()}
        loop.train_step()
        rates.append(loop.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0])
    assert all(torch.equal(value, before[name]) for name, value in loop.model.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ measures


class GaussianScore:
    """What is asked of a trained score, of Gaussian data whose score is exact."""

    shape, device, config = (1, 1, 2), torch.device("cpu"), SimpleNamespace(seed=0)

    def __init__(self, deviations: tuple[float, float]) -> None:
        self.sde = make_sde("vesde", "", base_config({"model.sigma_max": 10.0}).model)
        self.variance = torch.tensor(deviations).square().view(1, 1, 2)
        self.images = SimpleNamespace(log2_unit=0.0, to_model=lambda x, *_, **__: x)

    def __call__(self, x, t):
        return -x / (self.variance + self.sde.std(t).view(-1, 1, 1, 1) ** 2)


def test_bound_of_the_exact_score_is_the_entropy():
    score = GaussianScore((0.5, 0.1))
    x0 = torch.randn(2000, 1, 1, 2) * score.variance.sqrt()
    found = measures.denoising_measures(score, x0, 800)
    variance = score.variance + 0.01**2  # at the least noise
    entropy = float(0.5 * torch.log(2 * math.pi * math.e * variance).sum())
    assert found["bound"] == pytest.approx(entropy / (2 * math.log(2)), abs=0.1)  # three standard errors
    # ½E‖σs + z‖² of the exact score, by noise.
    sigma = torch.tensor(found["sigma"])[:, None]
    exact = 0.5 * (score.variance.view(1, 2) / (score.variance.view(1, 2) + sigma**2)).sum(1)
    assert np.abs(np.array(found["dsm_by_sigma"]) - exact.numpy()).max() < 0.08
    # A score that is wrong has a larger bound.
    score.variance = 2 * score.variance
    assert measures.denoising_measures(score, x0, 800)["bound"] > found["bound"] + 0.1


def test_paths_of_isotropic_data_are_straight():
    assert measures.path_excess(GaussianScore((0.5, 0.5))) == pytest.approx(0, abs=1e-5)
    assert measures.path_excess(GaussianScore((5.0, 0.1))) > 1e-3


def test_an_exact_score_has_no_circulation_and_is_consistent():
    """Of linear scores both are known: a rotation ω adds 2ω times a triangle's area, and c times the exact score leads
    the mean to that of a product over Euler's steps, which is x's own factor for c = 1."""
    points = torch.randn(64, 1, 1, 2)
    found = measures.curve_measures(GaussianScore((0.5, 0.5)), points)
    assert max(found["circulation_nats"], found["circulation"]) < 1e-3
    assert np.abs(found["inconsistency_by_sigma"]).max() < 1e-6

    class Rotated(GaussianScore):
        def __call__(self, x, t):
            return super().__call__(x, t) + 0.3 * x.flip(-1) * torch.tensor([1.0, -1.0])

    rotated = measures.curve_measures(Rotated((0.5, 0.5)), points)
    generator = measures.SampleGenerators((0, "curves"), range(64))
    for sigma, nats in zip(rotated["curve_sigma"], rotated["circulation_nats_by_sigma"], strict=True):
        a = (points + sigma * measures.normal_like(points, generator)).view(64, 2)
        sides = torch.stack((a.roll(-1, 0) - a, a.roll(-2, 0) - a), dim=1)
        assert nats == pytest.approx(float(0.3 * torch.linalg.det(sides).abs().mean()), rel=1e-3)
        for _ in range(measures.DRAWS * measures.DRAW_STEPS):  # the reverse process's
            measures.normal_like(points, generator)

    class Scaled(GaussianScore):
        def __call__(self, x, t):
            return 1.5 * super().__call__(x, t)

    scaled = measures.curve_measures(Scaled((0.5, 0.5)), points)
    for sigma, error in zip(scaled["curve_sigma"], scaled["inconsistency_by_sigma"], strict=True):
        s2 = (sigma * 2.0 ** -np.linspace(0, 1, measures.DRAW_STEPS + 1)) ** 2
        mean = np.prod(1 - 1.5 * (s2[:-1] - s2[1:]) / (0.25 + s2[:-1])) * (1 - 1.5 * s2[-1] / (0.25 + s2[-1]))
        exact = (mean - (1 - 1.5 * s2[0] / (0.25 + s2[0]))) ** 2 * (1 + sigma**2) / sigma**2
        assert error == pytest.approx(exact, rel=0.4)
    assert scaled["inconsistency"] > 10 * abs(found["inconsistency"])


class Perturbed(torch.nn.Module):
    """The exact score of 8-Gaussian and an error that is added to it."""

    def __init__(self, config, error) -> None:
        super().__init__()
        self.truth, self.error = plane.experiment.noised_distribution(config), error
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t):
        return self.truth.score(x, t) + self.error(x)


def test_error_of_the_score_is_split_into_gradient_and_rotation():
    """Errors ∇φ and (∂ψ/∂x₂, −∂ψ/∂x₁), of the same φ = ψ, which is 0 on the border: one part of each is 0."""
    config = plane.configs.get_config("gaussian_8-u")
    config.data.num_test = 50
    a, b = math.pi / 16, 3 * math.pi / 16

    def gradient(x):
        first, second = a * x[:, 0], b * x[:, 1]
        return torch.stack((-a * first.sin() * second.cos(), -b * first.cos() * second.sin()), dim=1)

    def rotation(x):
        return gradient(x).flip(1) * torch.tensor([1.0, -1.0])

    size = 0.5 * (a**2 + b**2) / 4  # of both: the mean of sin² cos² is ¼
    found = plane.split_error(config, Perturbed(config, rotation))
    assert found["error_rotational"] == pytest.approx(size, rel=0.05) and found["error_gradient"] < 1e-3 * size
    assert found["error_nasym"] > 0.1
    found = plane.split_error(config, Perturbed(config, gradient))
    assert found["error_gradient"] == pytest.approx(size, rel=0.05) and found["error_rotational"] < 1e-3 * size
    assert found["error_nasym"] < 1e-6


# ------------------------------------------------------------------------------------------------- the whole, in small


@pytest.fixture
def small(monkeypatch):
    small_study(monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["digits", "plane"])
def test_the_whole_in_small_and_what_is_lost_is_made_again(small, tmp_path, part):
    """One seed, then the second; with half of what was made removed, the same command ends with the same bytes."""
    main.run(str(tmp_path), part=part, seeds=1, jobs=1)
    folder = tmp_path / part
    first = json.loads((folder / "results.json").read_text())
    table = main.run(str(tmp_path), part=part, jobs=1)
    second = json.loads((folder / "results.json").read_text())
    assert [row for row in second["rows"] if row["seed"] == 0] == first["rows"]
    assert {row["seed"] for row in second["rows"]} == {0, 1} and second["costs"] == first["costs"]
    assert all(math.isfinite(value) for row in second["rows"] for value in row.values() if isinstance(value, float))

    before = {name: (folder / name).read_bytes() for name in ("results.json", "table.md")}
    for path in sorted(folder.rglob("*")):
        gone = path.name in (*before, "measures.json", "lazy", "qc-4-0.02", "qc", "qc.json")
        if gone and path.exists():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main.run(str(tmp_path), part=part, jobs=1) == table
    assert {name: (folder / name).read_bytes() for name in before} == before
    # What was measured once is never measured again unseen.
    (folder / "costs.json").write_text("{}")
    with pytest.raises(ValueError, match=r"costs\.json is damaged"):
        main.run(str(tmp_path), part=part, jobs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(part="svhn"), "--part=svhn: allowed are digits, mnist, cifar10, gpu, plane"),
        (dict(part="mnist"), "--data=: give a file for --part=mnist"),
        (dict(data="x.npz"), "--data=x.npz: not with --part=digits"),
        (dict(part="mnist", data="missing.npz"), "missing.npz"),
        (dict(seeds=9), "--seeds=9: allowed are 0 to 8"),
        (dict(jobs=0), "--jobs=0: at least 1"),
        (dict(device="gpu"), "--device=gpu: allowed are"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main.run(str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()
