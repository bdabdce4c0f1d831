"""Learning Schrödinger bridges: what a run is built from, that it goes on where it was stopped, what it writes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_settings import BRIDGE
from test_run_lib import ROOT, environment, rows

from checkpoints import CheckpointError, read_checkpoint
from configs.dsb import celeba, digits, mnist
from experiment.runtime import Runtime
from models import EMA
from schrodinger_bridge import compare, figures, half_bridges, main
from schrodinger_bridge.gaussian import Normal, wasserstein_gaussian
from schrodinger_bridge.half_bridges import BridgeRun, PerEdgeAffine
from schrodinger_bridge.marginals import POINT_SETS, GaussianMarginal, ImageMarginal, PointMarginal, get_marginals
from schrodinger_bridge.metrics import mean_squared_displacement, wasserstein
from schrodinger_bridge.process import BACKWARD, FORWARD, LABEL_RANGE, TransitionMean

plane = importlib.import_module("configs.dsb.2d")


TINY_IMAGES = {name: value for name, value in BRIDGE.items() if name not in ("model.width", "model.depth")}
TINY_IMAGES |= {"model.nf": 8, "model.ch_mult": (1,), "bridge.num_ipf": 1}


def config_of(pair: str = "moons", module=plane, **overrides):
    config = module.get_config(pair)
    config.update_from_flattened_dict(BRIDGE if module is plane else TINY_IMAGES)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


def learn(config, folder: Path, on_progress=lambda steps: None) -> BridgeRun:
    run = BridgeRun(config, folder, Runtime("cpu", on_progress=on_progress))
    run.train()
    return run


def flat(tree: object, prefix: str = "") -> dict[str, object]:
    if isinstance(tree, dict | list):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}{key}.").items()}
    return {prefix: tree}


def assert_same_run(a: Path, b: Path, count: int = 4) -> None:
    """Weights, averages, moments of the last two of ``count`` half-bridges; losses of all, and what was measured."""
    folders = [sorted((workdir / "half_bridges").iterdir()) for workdir in (a, b)]
    assert [len(found) for found in folders] == [count, count]
    for number, (ours, theirs) in enumerate(zip(*folders, strict=True)):
        assert ours.name == theirs.name
        logged = [
            [{k: v for k, v in row.items() if "second" not in k} for row in rows(folder)] for folder in (ours, theirs)
        ]
        assert logged[0] == logged[1]
        checkpoints = [sorted(folder.glob("checkpoints/*.pt")) for folder in (ours, theirs)]
        assert [bool(found) for found in checkpoints] == [number >= count - 2] * 2
        if checkpoints[0]:
            states = [flat(read_checkpoint(found[-1])) for found in checkpoints]
            assert states[0].keys() == states[1].keys()
            for name, value in states[0].items():
                if name != "log_size.":  # rows have times in them
                    other = states[1][name]
                    assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    assert (a / "history.json").read_bytes() == (b / "history.json").read_bytes()


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("algorithm", "warm_start"), [("ipf", True), ("imf", False)])
def test_a_stopped_run_ends_the_same(algorithm, warm_start, tmp_path, monkeypatch):
    """Stopped in the middle of half-bridges, at their ends, before the first checkpoint, while they are measured, and
    before and after that is written: weights, averages, moments, measurements, log are those of an unstopped run."""
    overrides = {"bridge__algorithm": algorithm, "bridge__warm_start": warm_start}
    whole = learn(config_of(**overrides), tmp_path / "whole")

    def stop(*arguments, **options) -> None:
        raise Stopped

    for place in (2, 10, (half_bridges, "wasserstein"), 17, (half_bridges, "write_json"), (shutil, "rmtree"), 31):

        def stop_there(steps, place=place, seen=[0]) -> None:  # noqa: B006 -- counts over its own calls
            seen[0] += steps
            if seen[0] == place:
                raise Stopped

        with pytest.raises(Stopped), monkeypatch.context() as patch:
            if isinstance(place, tuple):
                patch.setattr(*place, stop)
            learn(config_of(**overrides), tmp_path / "stopped", stop_there)
    again = learn(config_of(**overrides), tmp_path / "stopped")
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    assert again.history == whole.history
    assert [(row["iteration"], row["direction"]) for row in whole.history] == [
        (0, FORWARD), (1, BACKWARD), (1, FORWARD), (2, BACKWARD), (2, FORWARD)
    ]  # fmt: skip
    assert [row["step"] for row in rows(tmp_path / "whole/half_bridges/03_backward")] == [5, 10]
    # Nothing is left to do, and the chains are those of the run that was not stopped.
    steps = []
    finished = learn(config_of(**overrides), tmp_path / "stopped", steps.append)
    assert sum(steps) == 40 and len(steps) <= 3
    for direction in (FORWARD, BACKWARD):
        assert torch.equal(*(run.chains(direction, 5, ("x",)) for run in (whole, finished)))


def test_more_iterations_go_on_from_fewer(tmp_path):
    learn(config_of(bridge__num_ipf=1), tmp_path / "a")
    learn(config_of(bridge__num_ipf=2), tmp_path / "a")
    learn(config_of(), tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_all_half_bridges_are_kept_on_demand(tmp_path):
    learn(config_of(training__keep_half_bridges=True, training__n_iters=1), tmp_path)
    assert len(list(tmp_path.glob("half_bridges/*/checkpoints/step_00000001.pt"))) == 4


def test_the_learning_rate_falls_to_zero_in_every_half_bridge(tmp_path):
    """ε_n = ½ ε (1 + cos πn/N) at step n of N."""
    learn(config_of(training__log_freq=1, training__n_iters=4, bridge__num_ipf=1, optim__lr=0.1), tmp_path)
    for folder in (tmp_path / "half_bridges").iterdir():
        assert [row["lr"] for row in rows(folder)] == pytest.approx([0.1, 0.0853553, 0.05, 0.0146447], rel=1e-5)


def test_measured_on_several_sets(tmp_path):
    """The reference takes points at the mean m to N(m, 0.1) and Gaussian data to a Gaussian, whose cost is known: the
    mean over sets is that within their standard error, and of one set there is none."""
    options = dict(training__n_iters=1, bridge__num_ipf=1, evaluation__num_samples=500)
    run = learn(config_of("gaussian", training__batch_size=8, **options, evaluation__num_sets=8), tmp_path / "8")
    row = run.history[0]
    exact = main.results_of(run)["gaussian"][0]["transport_cost"]
    # Of the error 8 sets give their own estimate: Student's t with 7 degrees of freedom is beyond 4 in 0.5 %.
    assert abs(row["transport_cost"] - exact) < 4 * row["transport_cost_error"] < 0.2 * exact
    reference = BridgeRun(run.config, tmp_path, Runtime("cpu"))  # nothing learned
    chains = (reference.chains(FORWARD, 500, ("evaluation", i)) for i in range(8))
    costs = torch.tensor([mean_squared_displacement(states[0], states[-1]) for states in chains])
    assert row["transport_cost"] == pytest.approx(costs.mean().item(), rel=1e-6)
    assert row["transport_cost_error"] == pytest.approx(costs.std().item() / 8**0.5, rel=1e-4)
    assert row["w2_error"] > 0
    # Two sets of true samples are nearer to each other than the reference's end to the truth.
    assert 0 < run.sampling_errors[FORWARD] < row["w2"]
    single = learn(config_of("gaussian", training__batch_size=8, **options, evaluation__num_sets=1), tmp_path / "1")
    assert "w2_error" not in single.history[0]


def test_the_global_stream_is_left_alone(tmp_path):
    """No reseeding: torch's and NumPy's own generators are where they were."""
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    learn(config_of(), tmp_path)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_noise_of_the_directions_is_independent(tmp_path):
    """Chains of both directions, of successive refreshes and half-bridges: correlations of 64 × 2 × 5 numbers have a
    standard deviation of 0.040."""
    run = BridgeRun(config_of(training__cache_size=64), tmp_path, Runtime("cpu"))
    drawn, starts = [], []

    def record(learned, start, mean_map, reference, noise) -> None:
        drawn.append(torch.stack([noise() for _ in range(5)]).flatten())
        starts.append(start)

    run.regression = record
    run.averages = {direction: EMA(mean_map, 0.9) for direction, mean_map in run.mean_maps.items()}
    for half_bridge in (0, 1, 2, 3):
        for refresh in (0, 1):
            run._cache(half_bridge, refresh)
    correlations = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert len(drawn) == 8 and float(correlations.abs().max()) < 4.5 / np.sqrt(len(drawn[0]))
    assert len({start.sum().item() for start in starts}) == 8  # nor are the points they begin at the same
    # What is drawn once for all processes is handed out in parts.
    whole = run._noise(64, slice(None), ("x",))()
    parts = [run._noise(64, slice(i, i + 16), ("x",))() for i in range(0, 64, 16)]
    assert torch.equal(torch.cat(parts), whole)


def test_warm_and_fresh_networks(tmp_path):
    """A new network of a half-bridge is another draw than the first one's; backward and forward are no twins."""
    run = BridgeRun(config_of(), tmp_path, Runtime("cpu"))
    first, second = (run._new_mean_map(BACKWARD, n).network.first.weight for n in (0, 2))
    assert not torch.equal(first, second) and torch.equal(first, run.mean_maps[BACKWARD].network.first.weight)
    assert not torch.equal(run.mean_maps[FORWARD].network.first.weight, first)


def test_objective_is_the_divergence_of_the_steps():
    """KL of N(M_k(x), 2γ_k) from N(target, 2γ_k), per dimension, with each edge's own γ_k."""
    gammas = torch.tensor([0.02, 0.1, 0.5], dtype=torch.float64)
    mean_map = TransitionMean(PerEdgeAffine(2, 3), gammas, drift=False)
    x, target, edge = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([3, 1, 2])
    steps = [
        torch.distributions.MultivariateNormal(mean.double(), 2 * gamma * torch.eye(2).double())
        for mean, gamma in zip((*mean_map(x, edge).detach(), *target), gammas[edge - 1].repeat(2), strict=True)
    ]
    expected = torch.stack([torch.distributions.kl_divergence(steps[i], steps[3 + i]) for i in range(3)]).mean() / 2
    assert half_bridges.Objective(mean_map)(x, edge, target).item() == pytest.approx(expected.item(), rel=1e-5)


def test_affine_networks_learn_the_exact_iterates(tmp_path):
    """Three iterations learned by Adam through the same code as every run, against linear algebra: both ends' laws.

    A half-bridge of 100 steps of 2048 chains fits its coefficients to about 0.01, and hands its errors on: W₂ of the
    fitted Gaussians within 0.05, where the first iteration is 0.2 away from the third. 20 000 chains measure it.
    """
    overrides = {"bridge__num_ipf": 3, "bridge__num_steps": 6, "bridge__gamma_min": 0.04, "bridge__gamma_max": 0.04}
    sizes = {"training__n_iters": 100, "training__batch_size": 2048, "training__cache_size": 4096}
    often = {"training__refresh_freq": 50, "training__log_freq": 100, "training__save_freq": 100}
    run = learn(config_of("gaussian", **overrides, **sizes, **often, evaluation__batch_size=20_000), tmp_path)
    exact = main.results_of(run)["gaussian"]
    assert [row["half_bridge"] for row in run.history] == [row["half_bridge"] for row in exact]
    first, last = run.marginals
    for direction, wanted, begun, row in ((BACKWARD, first, exact[1], exact[5]), (FORWARD, last, exact[2], exact[6])):
        states = run.chains(direction, 20_000, ("test",)).double()
        end = states[-1 if direction == FORWARD else 0]
        found, true = Normal(end.mean(0), torch.cov(end.T)), Normal(wanted.mean.double(), wanted.covariance)
        assert wasserstein_gaussian(found, true) == pytest.approx(row["w2"], abs=0.05)
        assert begun["w2"] > row["w2"] + 0.2
        cost = mean_squared_displacement(states[0], states[-1])
        assert cost == pytest.approx(row["transport_cost"], rel=0.04)


def test_learned_from_training_data_and_measured_on_held_out_data(tmp_path, monkeypatch):
    """And every refresh, half-bridge and step has draws of its own, the two ends of an independent coupling too."""
    drawn, steps, sample, batch = [], [], PointMarginal.sample, BridgeRun._batch

    def recording(self, count, key, share=slice(None), *, test=False):
        drawn.append((key, test))
        return sample(self, count, key, share, test=test)

    monkeypatch.setattr(PointMarginal, "sample", recording)
    monkeypatch.setattr(BridgeRun, "_batch", lambda self, c, step, p: steps.append(step) or batch(self, c, step, p))
    overrides = {"bridge__algorithm": "imf", "bridge__coupling": "independent", "bridge__num_ipf": 1}
    run = learn(config_of("moons-moons", **overrides, model__ema_rate=0.5), tmp_path)
    learned = [key for key, test in drawn if key[1] != "moments" and not test]  # those standardise the points
    assert {key[1] for key in learned} == {"cache"} and len(set(learned)) == len(learned) == 2 * 3 + 3
    assert {key[1] for key, test in drawn if test} == {"evaluation"}
    assert {average.decay for average in run.averages.values()} == {0.5} and steps == list(range(20))


def test_labels_of_edges_come_back_as_edges():
    network = PerEdgeAffine(2, 7)
    with torch.no_grad():
        network.bias[:] = torch.arange(7.0)[:, None]
    labels = LABEL_RANGE * torch.arange(7) / 6
    assert network(torch.zeros(7, 2), labels)[:, 0].tolist() == list(range(7))


# ----------------------------------------------------------------------------------------------------------- marginals


@pytest.mark.parametrize("name", POINT_SETS)
def test_point_sets_are_standardised(name):
    """Mean 0, mean standard deviation 1 of 50 000 points (standard errors 0.005); keys decide the draw."""
    marginal = PointMarginal(name)
    x = marginal.sample(50_000, (0, "a"))
    assert (
        x.shape == (50_000, 2) and x.mean(0).abs().max() < 0.03 and float(x.std(0).mean()) == pytest.approx(1, abs=0.02)
    )
    assert torch.equal(marginal.sample(20, (1,)), marginal.sample(20, (1,)))
    assert not torch.equal(marginal.sample(20, (1,)), marginal.sample(20, (2,)))
    assert not torch.equal(marginal.sample(20, (1,)), marginal.sample(20, (1,), test=True))
    assert torch.equal(marginal.sample(20, (1,))[5:9], marginal.sample(20, (1,), slice(5, 9)))
    # In random order: the means of the two halves differ by their standard errors, 0.009, alone.
    assert (x[:25_000].mean(0) - x[25_000:].mean(0)).abs().max() < 0.05


@pytest.mark.parametrize("name", POINT_SETS)
def test_points_are_independent_draws(name):
    """The means of 200 sets of 100 vary as those of independent points do, to a standard error of 10 %; those of evenly
    spaced ones vary by a twentieth of it."""
    marginal = PointMarginal(name)
    means = torch.stack([marginal.sample(100, (number,)).mean(0) for number in range(200)])
    torch.testing.assert_close(100 * means.var(0), marginal.sample(50_000, (0, "a")).var(0), rtol=0.5, atol=0)


def test_points_of_a_users_own():
    """'module:function' is a set like those by name."""
    own = PointMarginal("schrodinger_bridge.marginals:_moons")
    assert torch.equal(own.sample(9, (1,)), PointMarginal("moons").sample(9, (1,)))


def test_images_of_one_class():
    config = digits.get_config("3-8")
    first, last = get_marginals(config.data, config.final)
    assert (first.name, last.name) == ("digits, class 3", "digits, class 8") and first.sharp
    for marginal, label in ((first, 3), (last, 8)):
        for test in (False, True):
            half = marginal.halves[test]
            allowed = {bytes(image.numpy()) for image in half.images[half.labels == label]}
            x = marginal.sample(40, (0,), test=test)
            assert x.shape == (40, 1, 8, 8) and -1 < x.min() < -0.9 and 0.7 < x.max() < 1
            assert all(bytes(image.numpy()) in allowed for image in marginal.images.to_data(x))
    assert torch.equal(first.sample(9, (0,))[2:5], first.sample(9, (0,), slice(2, 5)))


def test_gaussian_of_any_covariance():
    root = torch.tensor([[1.0, 0.0], [0.8, 0.6]])
    x = GaussianMarginal(torch.tensor([1.0, 2.0]), root).sample(100_000, (0,))
    torch.testing.assert_close(torch.cov(x.T), root @ root.T, atol=0.02, rtol=0)
    torch.testing.assert_close(x.mean(0), torch.tensor([1.0, 2.0]), atol=0.015, rtol=0)


# -------------------------------------------------------------------------------------------------- configs, bad input


@pytest.mark.parametrize("pair", ["gaussian", *POINT_SETS, "scurve-circles", "moons-8gaussians"])
def test_configs_of_the_plane_step(pair, tmp_path):
    run = learn(config_of(pair, bridge__num_ipf=1, training__n_iters=2), tmp_path)
    assert len(run.history) == 3 and all(np.isfinite(row["w2"]) for row in run.history)


@pytest.mark.parametrize(("module", "arguments"), [(digits, ("3-8",)), (mnist, ("all",)), (celeba, ())])
def test_networks_of_images_fit_their_images(module, arguments):
    """At full width: the mean map of the configured size has the images' shape, and is the identity at first."""
    from from_config import create_network

    config = module.get_config(*arguments)
    network = create_network(config)
    x = torch.rand(1, config.data.num_channels, config.data.image_size, config.data.image_size)
    with torch.no_grad():
        assert network(x, torch.zeros(1)).shape == x.shape


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bridge__algorithm": "sinkhorn"}, "bridge.algorithm='sinkhorn': allowed are ipf, imf"),
        ({"bridge__coupling": "independent"}, "bridge.coupling='independent': IPF starts"),
        ({"bridge__matching": "x"}, "bridge.matching='x': allowed are drift, mean"),
        ({"bridge__gamma_min": 2.0, "bridge__gamma_max": 2.0}, "bridge.gamma_max=2.0: must be below the variance"),
        ({"training__cache_size": 33}, "training.cache_size=33: must be a multiple of training.batch_size"),
        ({"bridge__gamma_min": 1e-300}, "bridge.gamma_min=1e-300"),
        ({"bridge__gamma_min": 0.02}, "bridge.gamma_min=0.02, bridge.gamma_max=0.005: need γ_min ≤ γ_max"),
        (
            {"bridge__num_steps": 1100, "bridge__gamma_min": 0.5, "bridge__gamma_max": 0.5},
            "bridge.num_steps=1100 with step sizes of 550 in all: the reference keeps",
        ),
        ({"model__name": "ncsnpp"}, "model.name='ncsnpp': allowed are time_mlp, affine, or module:attribute"),
        ({"data__dataset": "gaussian"}, "data.dataset='gaussian': allowed are scurve"),
        ({"data__dataset": "moon"}, "data.dataset='moon': allowed are scurve"),
        ({"final__dataset": "moon"}, "final.dataset='moon': allowed are gaussian, scurve"),
    ],
)
def test_bad_fields(fields, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        BridgeRun(config_of(**fields), tmp_path / "w", Runtime("cpu"))
    assert message in str(caught.value) and not (tmp_path / "w").exists()


@pytest.mark.parametrize("module", [plane, digits, mnist])
@pytest.mark.parametrize("pair", ["3", "3-", "33-8", "a-b", "moons-x", "-moons", "moons-", ""])
def test_bad_pairs(module, pair):
    with pytest.raises(ValueError, match=r"config argument .*: allowed are"):
        module.get_config(pair)


def test_bad_classes_and_images():
    config = digits.get_config("3-8")
    config.final.class_label = 10
    with pytest.raises(ValueError, match=r"final\.class_label=10: allowed are -1 \(all\) and the classes of digits"):
        get_marginals(config.data, config.final)
    config = digits.get_config("all")
    config.model.dropout = 0.1
    with pytest.raises(ValueError, match=r"model\.dropout=0\.1"):
        BridgeRun(config, "w", Runtime("cpu"))


@pytest.mark.parametrize(
    ("pair", "fields", "message"),
    [
        ("all", {"final.dataset": "correlated_gaussian"}, "samples (2,), but those of data (1, 8, 8)"),
        ("all", {"data.dataset": "scurve"}, "model.name='ncsnpp': allowed are time_mlp, affine"),
        ("all", {"model.embedding_type": "fourier"}, "model.embedding_type='fourier': allowed is positional"),
    ],
)
def test_what_does_not_go_with_images(pair, fields, message, tmp_path):
    config = digits.get_config(pair)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError) as caught:
        BridgeRun(config, tmp_path / "w", Runtime("cpu"))
    assert message in str(caught.value) and not (tmp_path / "w").exists()


def test_a_config_without_a_bridge(tmp_path):
    with pytest.raises(ValueError, match="--config: no config of a bridge"):
        BridgeRun(importlib.import_module("configs.digits").get_config("u"), tmp_path, Runtime("cpu"))


def test_a_large_seed(tmp_path):
    config = config_of("all", digits, seed=2**40, bridge__num_steps=2, training__n_iters=1)
    config.bridge.update(gamma_min=0.1, gamma_max=0.1)
    assert len(learn(config, tmp_path).history) == 3


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    """The checkpoint before stays the newest, though no loss has been looked at since."""
    with pytest.raises(FloatingPointError, match=r"not finite at or before step 3"):
        learn(config_of(optim__lr=1e12, training__log_freq=10), tmp_path)
    assert not list(tmp_path.rglob("*.pt"))


def test_samples_that_are_not_finite_are_no_perfect_ones(tmp_path):
    """Also of weights that are still finite: after one step of this size chains leave the range of float32."""
    x = PointMarginal("moons").sample(20, (0,))
    for bad in (float("inf"), float("nan")):
        with pytest.raises(FloatingPointError, match="samples are not finite"):
            wasserstein(x, torch.where(torch.arange(20)[:, None] == 3, bad, x), 0)
    with pytest.raises(FloatingPointError, match="not finite"):
        learn(config_of(optim__lr=1e12, training__n_iters=1), tmp_path)
    assert len(json.loads((tmp_path / "history.json").read_text())["half_bridges"]) == 1  # the reference


def test_fewer_iterations_than_done_are_refused(tmp_path):
    learn(config_of(), tmp_path)
    with pytest.raises(ValueError, match=r"bridge\.num_ipf=1: at least 2, already begun"):
        learn(config_of(bridge__num_ipf=1), tmp_path)


@pytest.mark.parametrize("missing", [True, False])
def test_nothing_goes_on_without_what_it_was_learned_from(missing, tmp_path):
    """A checkpoint of a finished half-bridge that is gone or damaged is not replaced by another training, from other
    chains."""
    learn(config_of(bridge__num_ipf=1), tmp_path)
    path = tmp_path / "half_bridges/01_backward/checkpoints/step_00000010.pt"
    path.unlink() if missing else path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"01_backward/checkpoints/step_00000010\.pt: missing or damaged"):
        learn(config_of(), tmp_path)


def test_another_runs_folder_is_refused(tmp_path):
    learn(config_of(bridge__num_ipf=1, training__n_iters=2), tmp_path)
    for other in (config_of("circles", bridge__num_ipf=1, training__n_iters=2), config_of(training__n_iters=3)):
        with pytest.raises(ValueError, match="holds results of other settings"):
            learn(other, tmp_path)


def test_images_that_have_changed_are_refused(tmp_path):
    """A folder belongs to its data, too: those of another fingerprint have another bridge."""
    config = config_of("3-8", digits, training__n_iters=2)
    learn(config, tmp_path)
    run = BridgeRun(config, tmp_path, Runtime("cpu"))
    run.marginals[1].halves[0].fingerprint = "0" * 16
    with pytest.raises(ValueError, match=r"holds results of other settings: contents of\.final was"):
        run.train()


# ------------------------------------------------------------------------------------------------------ what is written


def test_figures_of_points(tmp_path):
    run = learn(config_of("scurve-circles", bridge__num_ipf=1, training__n_iters=2), tmp_path)
    results = main.results_of(run)
    text = main.table(results)
    assert "# scurve – circles, IPF" in text and "| 0 (reference) |  " in text and len(text.splitlines()) == 8
    assert list(figures.draw(run)) == ["errors", "marginals"]


def test_figures_of_images(tmp_path):
    """Two classes of digits: both directions lead to images; to a Gaussian only one does."""
    run = learn(config_of("3-8", digits, training__n_iters=2), tmp_path / "a")
    names = sorted(f"{direction}_{kind}.png" for direction in (BACKWARD, FORWARD) for kind in ("images", "transitions"))
    figures.save_images(run)
    assert list(figures.draw(run)) == ["errors"] and sorted(path.name for path in run.workdir.glob("*.png")) == names
    run = learn(config_of("all", digits, training__n_iters=2), tmp_path / "b")
    figures.save_images(run)
    assert sorted(path.name for path in run.workdir.glob("*.png")) == names[:2]
    assert isinstance(run.marginals[0], ImageMarginal) and "sliced" in main.table(main.results_of(run))


def test_gaussian_results_have_what_linear_algebra_gives(tmp_path):
    run = learn(config_of("gaussian", bridge__num_ipf=1, training__n_iters=2, training__batch_size=8), tmp_path)
    results = main.results_of(run)
    # The reference is exact before anything is learned: 20 chains against its law.
    assert results["gaussian"][0]["transport_cost"] == pytest.approx(run.history[0]["transport_cost"], rel=0.6)
    assert "(exact " in main.table(results)
    assert "gaussian" not in main.results_of(BridgeRun(config_of(), tmp_path, Runtime("cpu")))


@pytest.mark.slow
def test_comparison_of_algorithms(tmp_path, monkeypatch):
    options = dict(bridge__num_ipf=1, training__n_iters=2, evaluation__num_sets=1)
    monkeypatch.setattr(compare, "get_config", lambda pair: config_of(pair, **options))
    text = compare.run(str(tmp_path), ("moons", "scurve-circles"), jobs=1)
    results = (tmp_path / "results.json").read_bytes()
    assert [(row["pair"], row["algorithm"]) for row in json.loads(results)["rows"]] == [
        ("moons", "ipf"), ("moons", "imf"), ("scurve-circles", "ipf"), ("scurve-circles", "imf")
    ]  # fmt: skip
    assert len(text.splitlines()) == 8 and (tmp_path / "comparison.png").stat().st_size > 10_000
    # Everything is found done.
    assert text == compare.run(str(tmp_path), ("moons", "scurve-circles"), jobs=1)
    assert results == (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="--pairs is empty"):
        compare.run(str(tmp_path), (), jobs=1)
    with pytest.raises(ValueError, match="config argument 'x'"):
        compare.run(str(tmp_path), ("x",), jobs=1)


def test_command(tmp_path):
    """The program as a whole: it learns, writes what it says, resumes, and says what is wrong in a line."""
    workdir, odd = tmp_path / "w", config_of(bridge__matching="odd")
    with pytest.raises(ValueError, match=r"^bridge\.matching='odd': allowed are drift, mean$"):
        main.run(odd, str(workdir), "cpu")
    assert not workdir.exists()
    flags = [f"--config.{name}={value}" for name, value in (BRIDGE | {"bridge.num_ipf": 1}).items()]
    program = [sys.executable, "-m", "schrodinger_bridge.main", "--config=configs/dsb/2d.py:moons"]
    program += [f"--workdir={workdir}", "--device=cpu", *flags]
    done = subprocess.run(program, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    table = (workdir / "table.md").read_text()
    assert table in done.stdout and "# moons – gaussian, IPF" in table
    written = sorted(path.name for path in workdir.glob("*.*"))
    assert written == [
        ".lock",
        "errors.pdf",
        "errors.png",
        "experiment.json",
        "history.json",
        "marginals.pdf",
        "marginals.png",
        "results.json",
        "table.md",
    ]
    results = (workdir / "results.json").read_bytes()
    assert main.run(config_of("moons", bridge__num_ipf=1), str(workdir), "cpu") == table
    assert (workdir / "results.json").read_bytes() == results


@pytest.mark.slow
def test_learned_coupling_is_the_static_bridge(tmp_path):
    """As configured, both algorithms on two pairs: the coupling's cost within 5 % of Sinkhorn's."""
    compare.run(str(tmp_path), jobs=2)
    for row in json.loads((tmp_path / "results.json").read_text())["rows"]:
        for last in row["history"][-2:]:
            assert last["iteration"] == 20
            assert last["transport_cost"] == pytest.approx(row["static_cost"], rel=0.05), (row["pair"], last)
        assert row["static_violation"] < 1e-3
