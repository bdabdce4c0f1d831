"""Networks that are told an array of each item: linear Gaussian pairs, whose law is known, and whole runs."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_UNET

import run_lib
from configs.own_arrays import get_config
from data import ArraySplit, DataFormat, load_dataset
from exact.distributions import Gaussian
from experiment.files import read_arrays
from losses import Objective
from models import make_network, make_score_model
from sde_lib import SDE, make_sde

CPU = run_lib.Runtime(device="cpu")
VP = {"training.sde": "vpsde", "model.scale_by_sigma": False, "model.beta_max": 40.0}
TINY = {
    "model.nf": 8,
    "training.n_iters": 2,
    "training.batch_size": 4,
    "training.snapshot_sampling": False,
    "sampling.num_steps": 2,
    "sampling.num_samples": 10,
    "likelihood.num_steps": 4,
    "eval.num_samples": 40,
    "eval.nll_images": 4,
    "eval.asym_images": 2,
    "eval.asym_levels": 1,
    "eval.asym_probes": 1,
}


class Pair:
    """y ~ N(m, S) and x | y ~ N(A y + b, C), in units of their own."""

    def __init__(self, shape: tuple[int, ...], condition_shape: tuple[int, ...]) -> None:
        random, self.shapes = np.random.default_rng(0), (shape, condition_shape)
        d, e = map(math.prod, self.shapes)
        self.unit, self.condition_unit = 1e3, 1e-2
        self.matrix = self.unit / self.condition_unit * random.standard_normal((d, e)) / e**0.5
        self.root = self.unit * (np.eye(d) + 0.4 * random.standard_normal((d, d)) / d**0.5)
        self.shift = 7 * self.unit * np.ones(d)

    def mean(self, y: np.ndarray) -> np.ndarray:
        return y.reshape(len(y), -1) @ self.matrix.T + self.shift

    def draw(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        random, (shape, condition_shape) = np.random.default_rng(seed), self.shapes
        y = self.condition_unit * (0.3 + random.standard_normal((count, *condition_shape)))
        x = self.mean(y) + random.standard_normal((count, len(self.root))) @ self.root.T
        return x.reshape(count, *shape), y

    def log_prob(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        law = torch.distributions.MultivariateNormal(
            torch.from_numpy(self.mean(y)), torch.from_numpy(self.root @ self.root.T)
        )
        return law.log_prob(torch.from_numpy(x).flatten(1)).numpy()


class Exact(torch.nn.Module):
    """−σ times the score of x_t given y, both in model values, as a network that is given x and y side by side."""

    def __init__(self, sde: SDE, images: DataFormat, pair: Pair) -> None:
        super().__init__()
        self.sde, self.images, self.pair = sde, images, pair
        self.parameter = torch.nn.Parameter(torch.zeros(1))
        offset, scale = (np.repeat(v, images.dimension // images.shape[0]) for v in (images.offset, images.scale))
        self.of_mean = lambda y: torch.from_numpy((pair.mean(y) - offset) / scale)
        root = torch.from_numpy(pair.root / scale[:, None])
        self.law = Gaussian(sde, torch.zeros(len(root), dtype=torch.float64), root @ root.T)

    def forward(self, given: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x, y = given.split([self.images.shape[0], self.images.condition.shape[0]], dim=1)
        t = label.double() / 999
        mean = self.of_mean(self.images.condition.to_data(y.detach()).numpy())
        centred = x.flatten(1).double() - self.sde.mean_coefficient(t)[:, None] * mean
        return (-self.sde.std(t)[:, None] * self.law.score(centred, t)).view_as(x).to(x.dtype)


def exact_score(pair: Pair, normalization: str = "standard", **overrides: object) -> run_lib.TrainedScore:
    config = get_config("vectors")
    config.update_from_flattened_dict(
        VP
        | {"model.embedding_type": "positional", "data.shape": pair.shapes[0], "likelihood.divergence": "exact"}
        | overrides
    )
    x, y = pair.draw(200, seed=0)
    split = ArraySplit("pairs", x, conditions=y)
    images = DataFormat.of(split, centered=False, dequantized=False, normalization=normalization)
    assert images == DataFormat.from_dict(images.as_dict())
    sde = run_lib.build_sde(config)
    model = make_score_model(sde, Exact(sde, images, pair), parameterization="unconstrained")
    return run_lib.TrainedScore(config, model, images, 0)


VECTORS, IMAGES = ((3,), (2,)), ((1, 2, 2), (2, 2, 2))


@pytest.mark.parametrize(
    ("shapes", "solver"),
    [(VECTORS, "adams"), (VECTORS, "rk45"), pytest.param(IMAGES, "adams", marks=pytest.mark.slow)],
)
def test_the_likelihood_given_an_array_is_that_of_the_conditional_law(shapes, solver):
    """Every item is told its own array: also where an adaptive solver has only some items left. To 1e-3 nats/dim in the
    data's units, whatever they and those of the conditions are; and the score is symmetric in x."""
    pair = Pair(*shapes)
    score = exact_score(pair, "range", **{"likelihood.solver": solver, "likelihood.rtol": 1e-5})
    x, y = (torch.from_numpy(array) for array in pair.draw(5, seed=1))
    condition = score.images.condition.to_model(y)
    found = math.log(2) * score.bits_per_dim(x, conditions=condition)
    truth = torch.from_numpy(-pair.log_prob(x.numpy(), y.numpy()) / score.images.dimension)
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-3)
    assert (score.bits_per_dim(x, conditions=condition.flip(0)) - found / math.log(2)).abs().max() > 0.1
    nasym = score.asymmetry(score.images.to_model(x), torch.full((5,), 0.3), conditions=condition).nasym
    assert nasym.max() < 1e-9


def test_samples_given_an_array_have_the_conditional_moments():
    pair, count = Pair((1, 4), (2, 4)), 1500
    score = exact_score(pair)
    y = torch.from_numpy(pair.draw(2, seed=1)[1]).repeat_interleave(count, 0)  # two conditions
    options = dict(method="ode", solver="heun", num_steps=100, noise_removal=False)
    samples = score.sample(2 * count, conditions=score.images.condition.to_model(y), **options)
    x = score.images.to_data(samples).flatten(1).numpy()
    z = np.linalg.solve(pair.root, (x - pair.mean(y.numpy())).T).T.reshape(2, count, -1)
    assert np.abs(z.mean(1)).max() * count**0.5 < 4
    second = (z.swapaxes(1, 2) @ z / count - np.eye(4)) * (count / (1 + np.eye(4))) ** 0.5
    assert np.abs(second).max() < 4.5


@pytest.mark.parametrize(
    ("size", "parameterization"),
    [
        ((), "unconstrained"),
        ((), "conservative"),
        ((4,), "unconstrained"),
        ((4,), "conservative"),
        pytest.param((2, 4), "unconstrained", marks=pytest.mark.slow),
        pytest.param((2, 4), "conservative", marks=pytest.mark.slow),
        ((2, 2, 2), "unconstrained"),
    ],
)
def test_the_penalty_of_networks_with_conditions_is_of_derivatives_by_x_alone(size, parameterization):
    """Against the Jacobian from torch, in vectors and one to three axes; C is symmetric with any condition."""
    options = SMALL_UNET | dict(nf=4, attn_resolutions=(), fourier_scale=1.0, progressive="output_skip")
    options |= dict(progressive_input="input_skip", sigma_min=0.01, sigma_max=8.0)
    shape, condition = (1 if size else 3, *size), torch.randn(2, 3, *size, dtype=torch.float64)
    name = "ncsnpp" if size else "vector_mlp"
    network = make_network(name, options, shape=shape, centered=True, condition_channels=3)
    model = make_score_model(make_sde("vesde", "", options), network, parameterization=parameterization).double()
    seen = []

    def penalty(score, x, t, **_):
        value = score(x, t)
        jacobian = torch.autograd.functional.jacobian(lambda x: score(x, t), x).flatten(1 + len(shape))
        seen.append(jacobian.view(2, value[0].numel(), 2, -1)[range(2), :, range(2)])
        return original(score, x, t, estimator="exact", create_graph=True)

    objective = Objective(model, qc_weight=0.1, qc_estimator="exact")
    original, objective.penalty = objective.penalty, penalty
    x0 = torch.randn(2, *shape, dtype=torch.float64)
    terms = objective(x0, torch.Generator().manual_seed(0), condition=condition)
    t = objective._noise_level(x0, torch.Generator().manual_seed(0))[0]
    asym = 0.5 * ((seen[0] - seen[0].mT) ** 2).sum((1, 2))
    torch.testing.assert_close(terms["qc"].detach(), (model.sde.std(t) ** 2 * asym).mean(), rtol=1e-6, atol=1e-12)
    assert (float(asym.max() / (seen[0] ** 2).sum()) < 1e-12) == (parameterization == "conservative")
    terms["loss"].backward()
    told, untold = model(x0, t, condition=condition), model(x0, t, condition=condition.flip(0))
    assert (told - untold).abs().max() > 1e-3  # the condition counts
    with pytest.raises(ValueError, match="takes no conditions, which the data have"):
        make_network("ncsnv2", options | dict(nf=4), shape=(1, 8, 8), centered=True, condition_channels=1)


def written(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def test_a_condition_belongs_to_its_item(tmp_path, monkeypatch):
    """In training, in two accumulated parts, and flipped: here the condition is the item itself, in other units."""
    random = np.random.default_rng(0)
    halves = {half: random.standard_normal((20, 2, 4, 8)) for half in ("train", "test")}
    conditions = {f"{half}_conditions": 50 + 7 * items for half, items in halves.items()}
    path, seen = written(tmp_path / "twice.npz", **halves, **conditions), []
    original = Objective.forward

    def recording(self, x0, generator=None, *, condition, **options):
        seen.append((x0, condition))
        return original(self, x0, generator, condition=condition, **options)

    monkeypatch.setattr(Objective, "forward", recording)
    config = get_config("complex")
    config.update_from_flattened_dict(
        TINY | {"data.path": str(path), "data.shape": (2, 4, 8), "data.random_flip": True}
    )
    run_lib.train(config, tmp_path / "run", run_lib.Runtime(device="cpu", accumulation_steps=2))
    assert len(seen) >= 4
    for x0, condition in seen:
        torch.testing.assert_close(x0, condition, rtol=1e-4, atol=1e-5)


def test_runs_with_conditions(tmp_path):
    """Trained, resumed, evaluated, sampled and scored; samples are of test conditions or of a file's; the normalisation
    is kept. What does not fit is refused in one line."""
    pair = Pair((3,), (2,))
    arrays: dict[str, np.ndarray] = {}
    for seed, (half, count) in enumerate({"train": 60, "test": 42}.items()):
        arrays[half], arrays[f"{half}_conditions"] = pair.draw(count, seed)
    path, workdir = written(tmp_path / "pairs.npz", **arrays), tmp_path / "run"

    def config(**overrides: object):
        settings = get_config("vectors")
        given = {name.replace("__", "."): value for name, value in overrides.items()}
        settings.update_from_flattened_dict(TINY | {"data.path": str(path), "data.shape": (3,)} | given)
        return settings

    run_lib.train(config(), workdir, CPU)
    before = run_lib.load(workdir).images
    np.testing.assert_allclose(before.condition.offset, arrays["train_conditions"].mean(0))
    np.testing.assert_allclose(before.condition.scale, arrays["train_conditions"].std(0))
    run_lib.train(config(training__n_iters=3), workdir, CPU)
    assert run_lib.load(workdir).images == before and run_lib.load(workdir).step == 3
    metrics = run_lib.evaluate(config(training__n_iters=3), workdir, CPU)
    assert metrics["nll_nats_per_dim"] and metrics["nasym"] and metrics["sliced_w2"]
    with run_lib.score(config(training__n_iters=3), workdir, CPU).open() as rows:
        assert len(rows.readlines()) == 5
    found = read_arrays(run_lib.sample(config(training__n_iters=3), workdir, CPU) / "samples.npz")
    assert np.array_equal(found["conditions"], arrays["test_conditions"][np.arange(10) * 42 // 10])
    np.save(tmp_path / "given.npy", given := arrays["test_conditions"][:5].astype("f4"))
    other = config(training__n_iters=3, sampling__conditions_path=str(tmp_path / "given.npy"))
    other.data.path = "gone"  # no data set is needed
    found = read_arrays(run_lib.sample(other, workdir, CPU) / "samples.npz")
    assert np.array_equal(found["conditions"], given.repeat(2, 0))
    exported = run_lib.load(run_lib.export(config(training__n_iters=3), workdir, CPU))
    assert "with conditions of shape 2," in (workdir / "export" / "README.md").read_text()
    x, t = torch.zeros(2, 3), torch.full((2,), 0.5)
    condition = torch.ones(2, 2)
    assert torch.equal(exported(x, t, conditions=condition), run_lib.load(workdir)(x, t, conditions=condition))
    for call in (exported, exported.asymmetry):
        with pytest.raises(ValueError, match=r"^conditions: of shape None, but the network is to be given \(2, 2\)$"):
            call(x, t)

    again = arrays | {"train": 1.1 * arrays["train"]}
    moved = arrays | {"train_conditions": arrays["train_conditions"] + 1}
    short = arrays | {"test_conditions": arrays["test_conditions"][:-1]}
    unpaired = {name: array for name, array in arrays.items() if not name.endswith("conditions")}
    not_finite = arrays | {"train_conditions": np.where(np.arange(60)[:, None] == 7, np.nan, 1.0) * np.ones((60, 2))}
    later = arrays | {"test": np.where(np.arange(42)[:, None] == 41, np.inf, arrays["test"])}
    wider = arrays | {"test_conditions": np.zeros((42, 3))}
    words = arrays | {"train_conditions": np.full((60, 2), "x")}
    single = arrays | {"train_conditions": np.float64(3)}
    half = {name: array for name, array in arrays.items() if name != "test_conditions"}
    new = "train", tmp_path / "new", {}
    started = *new[:2], dict(training__n_iters=5, training__init_from=str(workdir))
    sampled = "sample", workdir, dict(training__n_iters=3)
    for (mode, folder, more), content, message in (
        (started, again, "its model sees data as (x − "),
        (started, moved, "its model sees conditions as (x − "),
        (started, unpaired, "here they are none"),
        (new, short, "test-conditions: 41 conditions for 42 items"),
        (new, not_finite, "train-conditions: item 7 has values that are not finite"),
        (new, wider, "has conditions of shape (2,), bad-test of shape (3,)"),
        (new, words, "train-conditions is <U1: allowed are"),
        (new, single, "it holds a single number where items are to be"),
        (new, half, "lacks test_conditions"),
        (sampled, unpaired, "of conditions bad-test has none, the model takes some of shape (2,)"),
        (("evaluate", *sampled[1:]), unpaired, "of conditions bad-test has none, the model takes some of shape (2,)"),
        # Also of items that are read late or not at all.
        (("evaluate", *sampled[1:]), later, "bad-test: item 41 has values that are not finite"),
        (("score", *sampled[1:]), later, "bad-test: item 41 has values that are not finite"),
        (("train", workdir, dict(training__n_iters=4)), unpaired, "of conditions bad-train has none"),
        (
            (*sampled[:2], {**sampled[2], "sampling__condition": "linear", "sampling__operator": "m.npy"}),
            arrays,
            "takes",
        ),
        (
            (*sampled[:2], {**sampled[2], "sampling__conditions_path": "none.npy"}),
            arrays,
            "conditions_path=none.npy: there",
        ),
    ):
        bad = config(**more, data__path=str(written(tmp_path / "bad.npz", **content)))
        with pytest.raises(run_lib.InvalidRun) as caught, contextlib.suppress(KeyboardInterrupt):
            getattr(run_lib, mode)(bad, folder, CPU)
        assert message in str(caught.value) and "\n" not in str(caught.value), caught.value
    assert not (tmp_path / "new" / "config.json").exists()


def test_conditions_beside_images_in_npz(tmp_path):
    """Channels last, as the images; a truth value is a number; an axis of one channel may be left out."""
    random = np.random.default_rng(0)
    images = {f"{half}_images": random.integers(0, 256, (6, 4, 8, 3), np.uint8) for half in ("train", "test")}
    for masks, channels in ((random.random((6, 4, 8)) < 0.5, 1), (random.random((6, 4, 8, 2)), 2)):
        path = written(tmp_path / "set.npz", **images, train_conditions=masks, test_conditions=masks)
        train, test = load_dataset("npz", shape=(3, 4, 8), path=path)
        found = train.conditions.batch([4])[0].numpy()[0]
        assert np.array_equal(found, np.moveaxis(masks[4].reshape(4, 8, channels), -1, 0))
        plain, _ = load_dataset("npz", shape=(3, 4, 8), path=written(tmp_path / "set.npz", **images))
        assert plain.fingerprint != train.fingerprint and test.conditions.num_levels is None
    bad = np.where(masks > 0.99, np.nan, masks)
    path = written(tmp_path / "set.npz", **images, train_conditions=bad, test_conditions=bad)
    with pytest.raises(ValueError, match=r"set-train-conditions: item \d has values that are not finite"):
        run_lib.read_once(load_dataset("npz", shape=(3, 4, 8), path=path)[0], CPU)
    path = written(tmp_path / "set.npz", **images, train_conditions=masks[:, :2], test_conditions=masks[:, :2])
    with pytest.raises(ValueError, match=r"train-conditions: of shape \(2, 2, 8\); allowed is data.shape=\(3, 4, 8\)"):
        load_dataset("npz", shape=(3, 4, 8), path=path)


@pytest.mark.slow
@pytest.mark.parametrize("parameterization", ["unconstrained", "conservative"])
def test_a_small_network_learns_the_conditional_law(tmp_path, parameterization):
    """NLL within 0.05 nats/dim of the truth, at least 0.2 below what is possible without the condition; the regression
    of samples on conditions is that of the data."""
    pair = Pair((2,), (2,))
    pair.matrix *= 4
    arrays: dict[str, np.ndarray] = {}
    for seed, (half, count) in enumerate({"train": 4000, "test": 400}.items()):
        arrays[half], arrays[f"{half}_conditions"] = pair.draw(count, seed)
    config = get_config("vectors")
    config.update_from_flattened_dict(
        {"data.path": str(written(tmp_path / "pairs.npz", **arrays)), "training.snapshot_sampling": False}
    )
    config.update_from_flattened_dict({"model.parameterization": parameterization, "eval.nll_images": 0})
    config.update_from_flattened_dict({"training.batch_size": 128, "training.n_iters": 1500, "optim.lr": 2e-3})
    run_lib.train(config, tmp_path / "run", CPU)
    config.eval.enable_asymmetry = config.eval.enable_sampling = False
    metrics = run_lib.evaluate(config, tmp_path / "run", CPU)
    truth = -pair.log_prob(arrays["test"], arrays["test_conditions"]).mean() / 2
    marginal = np.linalg.slogdet(2 * math.pi * math.e * np.cov(arrays["test"].T))[1] / 4
    assert abs(metrics["nll_nats_per_dim"] - truth) < 0.05 and metrics["nll_nats_per_dim"] < marginal - 0.2
    score = run_lib.load(tmp_path / "run")
    y = torch.from_numpy(pair.draw(1000, 3)[1])
    x = score.images.to_data(score.sample(1000, conditions=score.images.condition.to_model(y))).numpy()
    design = np.concatenate([y.numpy() / pair.condition_unit, np.ones((1000, 1))], 1)
    slope = np.linalg.lstsq(design, x / pair.unit, rcond=None)[0][:2].T
    np.testing.assert_allclose(slope, pair.matrix * pair.condition_unit / pair.unit, atol=0.15)
