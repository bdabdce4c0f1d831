"""Runs whose network knows classes, the classifier of noised images, and sampling under every condition."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_run_lib import CPU, assert_identical, rows, tiny_config, weights, without_times
from user_classes import Moments

import run_lib
from checkpoints import read_checkpoint
from data import evenly_spaced
from data import format as pixels
from experiment.randomness import SampleGenerators
from features import quality
from guidance.classifier import ClassifierTraining, NoiseConditionalClassifier
from guidance.measured import MeasuredImages
from losses import Objective
from models import Dropout
from sde_lib import VE, GeometricSigma

# Two levels, so that classes make a difference after few steps.
CLASSES = {"model.num_classes": 10, "training.label_dropout": 0.3, "sampling.condition": "class_free"}
CLASSES |= {"model.ch_mult": (1, 1)}
TINY_CLASSIFIER = {
    "classifier.nf": 8,
    "classifier.n_iters": 12,
    "classifier.batch_size": 16,
    "classifier.log_freq": 3,
    "classifier.save_freq": 4,
}


def conditional_config(**overrides):
    config = tiny_config("u")
    config.update_from_flattened_dict(CLASSES | {name.replace("__", "."): v for name, v in overrides.items()})
    return config


def classifier_config(**overrides):
    config = tiny_config("u")
    config.update_from_flattened_dict(TINY_CLASSIFIER | {name.replace("__", "."): v for name, v in overrides.items()})
    return config


# ----------------------------------------------------------------------------------------- a network that knows classes


def test_label_conditional_training_resumes_to_the_very_same_weights(tmp_path):
    run_lib.train(conditional_config(), tmp_path / "whole", CPU)
    for n_iters in (5, 12):
        run_lib.train(conditional_config(training__n_iters=n_iters), tmp_path / "parts", CPU)
    assert_identical(weights(tmp_path / "whole", 12), weights(tmp_path / "parts", 12))
    # Every class and their absence have been trained: none of the eleven embeddings is what it was at first.
    images = run_lib.load(tmp_path / "whole").images
    first = run_lib.build_score_model(conditional_config(), run_lib.build_sde(conditional_config()), images)
    name = "network.class_embedding.weight"
    moved = (weights(tmp_path / "whole", 12)[f"model.{name}"] - first.state_dict()[name]).abs().amax(1)
    assert moved.shape == (11,) and (moved > 0).all()


def test_labels_belong_to_their_images(tmp_path, monkeypatch):
    """In two accumulated parts the objective is given the labels of the very images, but for those withheld."""
    seen = []
    original = Objective.forward

    def recording(self, x0, generator=None, *, step=0, class_labels=None, condition=None):
        if torch.is_grad_enabled():  # in training, not in the test loss
            seen.append((x0.clone(), class_labels.clone(), step))
        return original(self, x0, generator, step=step, class_labels=class_labels)

    monkeypatch.setattr(Objective, "forward", recording)
    config = conditional_config(data__uniform_dequantization=False, data__random_flip=False)
    run_lib.train(config, tmp_path, run_lib.Runtime(device="cpu", accumulation_steps=2))
    train, _ = run_lib.load_data(config)
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    given, withheld = 0, 0
    for x0, labels, _ in seen:
        levels = pixels.to_pixels(x0, 17, False)
        for image, label in zip(levels, labels.tolist(), strict=True):
            if label == 10:
                withheld += 1
            else:
                assert label == label_of[image.numpy().tobytes()]
                given += 1
    # 96 images, each without label with probability 0.3: 28.8 ± 4.5.
    assert given + withheld == 96 and abs(withheld - 28.8) < 4 * 4.5


# Trained a little, so that samples are not black and white alone.
TRAINED = dict(training__n_iters=30, optim__warmup=0, optim__lr=3e-3, model__dropout=0.0, training__snapshot_freq=0)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("conditional")
    run_lib.train(conditional_config(**TRAINED), workdir, CPU)
    return workdir


def copy_of(run: Path, workdir: Path) -> Path:
    """A run's folder to sample in, with its checkpoint and classifier but nothing else."""
    (workdir / "checkpoints").mkdir(parents=True)
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    (workdir / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    if (run / "classifier").exists():
        shutil.copytree(run / "classifier", workdir / "classifier")
    return workdir


def sampled(config, workdir: Path, runtime: run_lib.Runtime) -> tuple[Path, dict]:
    """The folder of samples, and what was measured of them."""
    folder = run_lib.sample(config, workdir, runtime)
    return folder, json.loads((folder / "metrics.json").read_text())


def name_of(folder: Path) -> str:
    """A folder's name without the digest of settings that ends it."""
    return folder.name.rpartition("-")[0]


def images_of(folder: Path) -> np.ndarray:
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return file["images"]


def test_classifier_free_samples(conditional, tmp_path):
    workdir = copy_of(conditional, tmp_path / "w")
    folder, metrics = sampled(conditional_config(), workdir, CPU)
    assert name_of(folder) == "step_00000030-pc-reverse_diffusion-langevin-3-class_free"
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        assert file["labels"].tolist() == [i % 10 for i in range(20)] and file["images"].shape == (20, 8, 8, 1)
    assert metrics["nfe_sampling"] == 7
    # One class; another weight, which costs two evaluations; none, which is the unconditional network.
    three = run_lib.sample(conditional_config(sampling__class_label=3), workdir, CPU)
    assert np.array_equal(images_of(three)[3::10], images_of(folder)[3::10])
    assert not np.array_equal(images_of(three), images_of(folder))
    guided, metrics = sampled(conditional_config(sampling__guidance_weight=2.5), workdir, CPU)
    assert metrics["nfe_sampling"] == 14 and not np.array_equal(images_of(guided), images_of(folder))
    zero, metrics = sampled(conditional_config(sampling__guidance_weight=0.0), workdir, CPU)
    free = run_lib.sample(conditional_config(sampling__condition=""), workdir, CPU)
    assert metrics["nfe_sampling"] == 7 and np.array_equal(images_of(zero), images_of(free))
    assert len({f.name for f in (folder, three, guided, zero, free)}) == 5
    score = run_lib.load(conditional)
    loaded = score.images.to_data(score.sample(16, seed=42, class_label=3)).permute(0, 2, 3, 1)
    assert np.array_equal(loaded, images_of(three)[:16])


def test_the_share_of_samples_that_are_of_the_class_asked_for(conditional, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "make_extractor", lambda *arguments, **options: Moments())
    settings = dict(eval__enable_bpd=False, eval__enable_asymmetry=False)
    workdir = copy_of(conditional, tmp_path / "w")
    metrics = run_lib.evaluate(conditional_config(**settings, eval__features="classifier"), workdir, CPU)
    with np.load(workdir / "eval" / "samples.npz", allow_pickle=False) as file:
        _, logits = Moments()(torch.from_numpy(file["images"]).permute(0, 3, 1, 2))
    right = logits.argmax(1) == torch.arange(20) % 10
    assert metrics["classified_as_wanted"] == float(right.double().mean())
    assert metrics["sampler"].endswith("; class_free, weight 1")
    assert "classified_as_wanted" not in run_lib.evaluate(conditional_config(**settings), workdir, CPU)


def test_likelihood_and_asymmetry_are_given_the_labels(conditional, tmp_path):
    """In batches of any size; and a class gives another score than none does."""
    values = {}
    for name, batch_size in (("in two", 3), ("in one", 4)):
        config = conditional_config(
            eval__nll_images=4,
            eval__asym_images=2,
            eval__asym_probes=2,
            eval__enable_sampling=False,
            eval__batch_size=batch_size,
        )
        values[name] = run_lib.evaluate(config, copy_of(conditional, tmp_path / name), CPU)
    for metric in ("nll_bits_per_dim", "asym"):
        assert values["in two"][metric] == pytest.approx(values["in one"][metric], rel=2e-3)
    score = run_lib.load(conditional)
    indices = [i * 360 // 4 for i in range(4)]
    levels, labels = run_lib.load_data(config)[1].batch(indices)
    bits, _ = score.bits_and_nfe(levels, SampleGenerators((42, "likelihood"), indices), labels)
    with np.load(tmp_path / "in one" / "eval" / "nll.npz", allow_pickle=False) as file:
        assert np.array_equal(file["nll_bits_per_dim"], bits)
    x, t = torch.rand(4, 1, 8, 8), torch.full((4,), 0.3)
    given = score(x, t, torch.tensor([1, 2, 3, 4]))
    assert torch.equal(score(x, t), score(x, t, torch.full((4,), 10)))
    assert (given - score(x, t)).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------------------- the classifier


def test_classifier_training_resumes_to_the_very_same_weights(tmp_path, monkeypatch):
    """From a stop at its end, and from one in the middle of a step after a checkpoint."""
    metrics = run_lib.train_classifier(classifier_config(), tmp_path / "whole", CPU)
    run_lib.train_classifier(classifier_config(classifier__n_iters=5), tmp_path / "parts", CPU)
    original = ClassifierTraining.loss

    def stopped(self, classifier, step, positions):
        if step == 9:
            raise KeyboardInterrupt
        return original(self, classifier, step, positions)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ClassifierTraining, "loss", stopped)
        run_lib.train_classifier(classifier_config(), tmp_path / "parts", CPU)
    masks, factor = [], Dropout.factor
    with monkeypatch.context() as patch:
        patch.setattr(Dropout, "factor", lambda self, x: masks.append(factor(self, x)) or masks[-1])
        assert run_lib.train_classifier(classifier_config(), tmp_path / "parts", CPU) == metrics
    # Steps 8 to 11 have a mask of their own in the first of their layers.
    masks = [mask for mask in masks if mask is not None]
    first = masks[:: len(masks) // 4]
    assert len(first) == 4 and all(not torch.equal(first[0], other) for other in first[1:])
    states = [
        read_checkpoint(tmp_path / name / "classifier" / "checkpoints" / "step_00000012.pt")
        for name in ("whole", "parts")
    ]
    assert_identical(states[0]["model"], states[1]["model"])
    logged = [without_times(rows(tmp_path / name / "classifier")) for name in ("whole", "parts")]
    assert [row["step"] for row in logged[0]] == [0, 3, 6, 9, 12] and logged[0][-1] == logged[1][-1]


def test_the_classifier_learns(tmp_path):
    """60 steps at nearly no noise: far better than one in ten, and worse the more noise there is."""
    config = classifier_config(classifier__n_iters=60, classifier__nf=16, classifier__dropout=0.0)
    metrics = run_lib.train_classifier(config, tmp_path, CPU)
    assert metrics["test_accuracy_t0"] > 0.4  # of 16 images
    assert metrics["test_loss_t0.75"] > metrics["test_loss_t0"]


def test_rows_of_a_batch_do_not_influence_one_another():
    classifier = NoiseConditionalClassifier(
        VE(GeometricSigma(0.01, 10.0)),
        image_shape=(1, 8, 8),
        num_classes=10,
        **dict(nf=8, ch_mult=(1, 2), num_res_blocks=1, dropout=0.5),
    ).eval()
    x, t = torch.rand(3, 1, 8, 8), torch.tensor([0.1, 0.5, 0.9])
    torch.testing.assert_close(classifier.log_probs(x, t)[1:2], classifier.log_probs(x[1:2], t[1:2]))
    torch.testing.assert_close(classifier.log_probs(x, t).exp().sum(1), torch.ones(3))


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("unconditional")
    run_lib.train(tiny_config("u", **TRAINED), workdir, CPU)
    run_lib.train_classifier(classifier_config(**TRAINED), workdir, CPU)
    return workdir


def test_classifier_guided_samples(unconditional, tmp_path):
    workdir = copy_of(unconditional, tmp_path / "w")
    free = run_lib.sample(classifier_config(), workdir, CPU)
    guided, metrics = sampled(classifier_config(sampling__condition="class"), workdir, CPU)
    assert name_of(guided) == name_of(free) + "-class" and metrics["nfe_sampling"] == 7
    assert not np.array_equal(images_of(guided), images_of(free))
    none = run_lib.sample(classifier_config(sampling__condition="class", sampling__guidance_weight=0.0), workdir, CPU)
    assert np.array_equal(images_of(none), images_of(free))
    # A classifier that has learned more guides to other samples: those kept are of the one before.
    before = images_of(guided)
    run_lib.train_classifier(classifier_config(classifier__n_iters=30), workdir, CPU)
    again = run_lib.sample(classifier_config(sampling__condition="class"), workdir, CPU)
    assert name_of(again) == name_of(guided) and again != guided and not np.array_equal(images_of(again), before)


def test_a_classifier_of_something_else_is_refused(unconditional, tmp_path):
    workdir = copy_of(unconditional, tmp_path / "w")
    with pytest.raises(run_lib.InvalidRun, match=r"other settings: noise\.sigma_max was 10\.0, is 20\.0"):
        run_lib.train_classifier(classifier_config(model__sigma_max=20.0), workdir, CPU)
    with pytest.raises(run_lib.InvalidRun, match=r"other settings: classifier\.nf was 8, is 16"):
        run_lib.train_classifier(classifier_config(classifier__nf=16), workdir, CPU)
    (newest,) = (workdir / "classifier" / "checkpoints").iterdir()
    state = read_checkpoint(newest)
    for damaged in ([1], {**state, "model": [1]}, {**state, "model": {**state["model"], "logits.bias": 0}}):
        torch.save(damaged, newest)
        with pytest.raises(run_lib.InvalidRun, match=rf"{newest}.* (another version|form: model|logits\.bias is a)"):
            run_lib.sample(classifier_config(sampling__condition="class"), workdir, CPU)
    shutil.rmtree(workdir / "classifier")
    with pytest.raises(run_lib.InvalidRun, match=r"no classifier in .* --mode=train_classifier trains it"):
        run_lib.sample(classifier_config(sampling__condition="class"), workdir, CPU)


# -------------------------------------------------------------------------------------------------- measured conditions


def measured(unconditional: Path, workdir: Path, **overrides) -> tuple[Path, dict, dict[str, np.ndarray]]:
    config = tiny_config("u", **({"sampling__num_images": 3, "sampling__samples_per_image": 2} | overrides))
    if not workdir.exists():
        copy_of(unconditional, workdir)
    folder, metrics = sampled(config, workdir, CPU)
    with np.load(folder / "samples.npz", allow_pickle=False) as file:
        return folder, metrics, {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (dict(sampling__condition="inpaint"), "-inpaint-projection"),
        (dict(sampling__condition="inpaint", sampling__mask="1,2,5,4"), "-inpaint-projection"),
        (dict(sampling__condition="super_resolution"), "-super_resolution-projection"),
        (dict(sampling__condition="ct", sampling__num_views=3), "-ct-projection"),
        (
            dict(sampling__condition="inpaint", sampling__method="ode", sampling__solver="heun"),
            "-inpaint-projection",
        ),
    ],
    ids=str,
)
def test_samples_by_projection_are_consistent_with_the_measurement(unconditional, tmp_path, overrides, name):
    folder, metrics, arrays = measured(unconditional, tmp_path / "w", **overrides)
    assert name_of(folder).endswith(name)
    assert arrays["images"].shape == (3, 2, 8, 8, 1) and arrays["truth"].shape == arrays["input"].shape == (3, 8, 8, 1)
    assert metrics["misfit_relative"] < 1e-4 < metrics["misfit_rms"] + 1e-3 and metrics["num_images"] == 3
    assert not np.array_equal(arrays["images"][:, 0], arrays["images"][:, 1])  # samples of one image differ
    if overrides["sampling__condition"] == "inpaint":
        known = np.ones((8, 8), dtype=bool)
        if "sampling__mask" in overrides:
            known[1:6, 2:6] = False
        else:
            known[4:] = False
        kept = arrays["images"][..., 0][:, :, known]
        assert np.array_equal(kept, np.broadcast_to(arrays["truth"][..., 0][:, None, known], kept.shape))
        assert (arrays["input"][..., 0][:, ~known] == 0).all()
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > grid.height > 200


def test_prior_variance_is_that_of_training_images(unconditional, tmp_path):
    settings = dict(sampling__condition="super_resolution", sampling__conditioning="pigdm")
    folder, _, _ = measured(unconditional, tmp_path / "w", **settings)
    train, _ = run_lib.load_data(tiny_config("u"))
    levels, _ = train.batch(evenly_spaced(range(1000), 1000, len(train)))
    expected = run_lib.load(unconditional).images.to_model(levels).var(dim=0, unbiased=False).mean()
    found = json.loads((folder / "settings.json").read_text())["prior_variance"]
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


@pytest.fixture
def gaussian_score(monkeypatch) -> None:
    """The exact score of pixels N(½, ⅑), as a network trained for an hour might know it; the tests' own does not."""

    def score(self, x: torch.Tensor, t: torch.Tensor, class_labels: None = None) -> torch.Tensor:
        return (0.5 - x) / (1 / 9 + self.sde.std(t)[:, None, None, None] ** 2)

    monkeypatch.setattr(run_lib.TrainedScore, "__call__", score)


@pytest.mark.parametrize("method", [dict(sampling__method="ode", sampling__solver="heun"), {}])
def test_pseudoinverse_guidance_of_images(unconditional, tmp_path, gaussian_score, method):
    settings = dict(sampling__condition="super_resolution", sampling__conditioning="pigdm") | method
    settings |= dict(sampling__num_steps=50, sampling__corrector="none")
    _, near, _ = measured(unconditional, tmp_path / "w", **settings)
    _, far, _ = measured(unconditional, tmp_path / "w", sampling__guidance_weight=0.0, **settings)
    assert near["misfit_rms"] < 0.05 < 0.1 < far["misfit_rms"]


def test_diffusion_posterior_sampling_of_images(unconditional, tmp_path, gaussian_score):
    settings = dict(sampling__condition="inpaint", sampling__conditioning="dps")
    settings |= dict(sampling__num_steps=50, sampling__corrector="none")
    _, near, _ = measured(unconditional, tmp_path / "w", sampling__guidance_weight=0.2, **settings)
    folder, far, _ = measured(unconditional, tmp_path / "w", sampling__guidance_weight=0.0, **settings)
    assert name_of(folder).endswith("-inpaint-dps") and near["misfit_rms"] < 0.2 * far["misfit_rms"]


def test_guidance_that_diverges_is_said_so(unconditional, tmp_path):
    """The tests' network believes what it is given at every noise level, so guidance moves it far too far."""
    settings = dict(sampling__condition="super_resolution", sampling__conditioning="pigdm")
    settings |= dict(sampling__num_steps=30, sampling__corrector="none", sampling__guidance_weight=50.0)
    with pytest.raises(FloatingPointError, match=r"samples are not finite .*a smaller sampling\.guidance_weight=50"):
        measured(unconditional, tmp_path / "w", **settings)
    assert not (tmp_path / "w" / "samples").exists()


def test_colourisation_and_own_operators(tmp_path):
    """Coloured images from an archive of one's own; a mask from a file, a matrix from a file, both of the user's."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", train_images=images, test_images=images[:4])
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:4, 5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    np.save(tmp_path / "matrix.npy", random.normal(size=(5, 192)))
    own = dict(
        data__dataset="npz",
        data__path=str(tmp_path / "own.npz"),
        data__num_channels=3,
        data__uniform_dequantization=False,
        eval__asym_probes=1,
    )
    run_lib.train(tiny_config("u", **own), tmp_path / "run", CPU)
    workdir = tmp_path / "w"
    own |= dict(sampling__condition="colorize")
    _, metrics, arrays = measured(tmp_path / "run", workdir, **own)
    assert metrics["misfit_relative"] < 1e-3
    grey = arrays["truth"].astype(float).mean(-1)
    assert np.abs(arrays["input"].astype(float) - grey[..., None]).max() <= 0.5 + 1e-3
    own |= dict(sampling__condition="inpaint", sampling__mask=str(tmp_path / "mask.png"))
    folder, _, arrays = measured(tmp_path / "run", workdir, **own)
    assert name_of(folder).endswith("-inpaint-projection")
    assert np.array_equal(arrays["images"][:, 0][:, mask == 0], arrays["truth"][:, mask == 0])
    own |= dict(sampling__condition="linear", sampling__operator=str(tmp_path / "matrix.npy"))
    own |= dict(sampling__corrector="none")
    folder, metrics, _ = measured(tmp_path / "run", workdir, **own, sampling__measurement_noise=0.1)
    assert name_of(folder).endswith("-linear-projection")
    assert 0.02 < metrics["misfit_rms"] < 1 and metrics["measurement_noise"] == 0.1


def test_measured_samples_do_not_depend_on_the_batch_size(unconditional, tmp_path):
    """Five samples of two images in batches of 1, 3 and all, noise in the measurement: the same images."""
    results = []
    for batch_size in (1, 3, 16):
        _, metrics, arrays = measured(
            unconditional,
            tmp_path / str(batch_size),
            sampling__condition="inpaint",
            sampling__measurement_noise=0.1,
            sampling__corrector="none",
            sampling__num_images=2,
            sampling__samples_per_image=2,
            eval__batch_size=batch_size,
        )
        results.append((metrics, arrays))
    for metrics, arrays in results[1:]:
        assert np.abs(arrays["images"].astype(int) - results[0][1]["images"].astype(int)).max() <= 1
        assert metrics["misfit_rms"] == pytest.approx(results[0][0]["misfit_rms"], rel=1e-3)


def test_measured_samples_are_kept_and_belong_to_their_measurement(unconditional, tmp_path, monkeypatch):
    settings = dict(sampling__condition="ct", sampling__num_views=2)
    first = measured(unconditional, tmp_path / "w", **settings)
    other = measured(unconditional, tmp_path / "w", sampling__condition="ct", sampling__num_views=3)
    calls = []
    monkeypatch.setattr(run_lib.TrainedScore, "__call__", lambda self, x, t: calls.append(1))
    again = measured(unconditional, tmp_path / "w", **settings)
    assert not calls and again[1] == first[1] and np.array_equal(again[2]["images"], first[2]["images"])
    assert other[0] != first[0]
    with pytest.raises(Exception):  # noqa: B017 -- the score is broken on purpose
        measured(unconditional, tmp_path / "w", **settings, sampling__corrector="none")
    assert calls


def test_the_noise_of_a_measurement_is_the_same_for_all_samples_of_an_image(unconditional):
    """At the noise's own level, and drawn per image: what is measured does not depend on how many images there are."""
    settings = dict(sampling__condition="inpaint", sampling__mask="0,0,1,1", sampling__measurement_noise=0.1)
    settings |= dict(sampling__corrector="none")
    score = run_lib.load(unconditional)
    few, many = (
        MeasuredImages(score, None, *run_lib.load_data(score.config))
        for score.config in (tiny_config("u", sampling__num_images=n, **settings) for n in (180, 360))
    )
    noise = many.y - many.operator(many.images)
    # 360·63 numbers: the standard error of their standard deviation is 0.1/√(2·22680).
    assert abs(float(noise.std()) - 0.1) < 4 * 0.1 / (2 * noise.numel()) ** 0.5
    torch.testing.assert_close(few.y - few.operator(few.images), noise[:180], rtol=0, atol=1e-6)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(sampling__condition="paint"), r"sampling\.condition='paint': allowed are inpaint, colorize,"),
        (dict(sampling__condition="paint:brush"), r"sampling\.condition='paint:brush': No module named 'paint'"),
        (dict(sampling__condition="inpaint", sampling__mask="4,4,5,2"), r"mask='4,4,5,2': the box .* 8x8 image"),
        (dict(sampling__condition="inpaint", sampling__mask="0,0,8,8"), "everything is unknown"),
        (dict(sampling__condition="inpaint", sampling__mask="middle"), r"mask='middle': allowed are top, bottom"),
        (dict(sampling__condition="inpaint", sampling__mask="gone.png"), r"mask='gone\.png': no such file"),
        (dict(sampling__condition="colorize"), "at least 2 channels"),
        (dict(sampling__condition="super_resolution", sampling__factor=3), "factor=3: need a divisor"),
        (dict(sampling__condition="linear"), r"sampling\.operator is not set"),
        (dict(sampling__condition="linear", sampling__operator="gone.npy"), r"operator: gone\.npy is missing"),
        (dict(sampling__condition="inpaint", sampling__num_images=361), "num_images=361: the test set has only 360"),
        (dict(sampling__condition="class", sampling__class_label=10), r"class_label=10: allowed are 0 to 9"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_bad_conditions_are_refused_before_any_work(unconditional, tmp_path, overrides, message):
    workdir = copy_of(unconditional, tmp_path / "w")
    before = sorted(workdir.rglob("*"))
    with pytest.raises(run_lib.InvalidRun, match=message) as caught:
        run_lib.sample(tiny_config("u", **overrides), workdir, CPU)
    after = sorted(path for path in workdir.rglob("*") if path.suffix != ".lock" or path in before)
    assert "\n" not in str(caught.value) and after == before


def test_what_does_not_suit_the_images_or_the_mode_is_refused(tmp_path):
    for work, overrides, message in (
        (run_lib.train_classifier, {"classifier.ch_mult": (1,) * 5}, "5 levels need a size divisible by 16"),
        (run_lib.train, CLASSES | {"model.num_classes": 7}, r"num_classes=7: .*'digits' has 10 classes"),
        (run_lib.train, {"sampling.condition": "inpaint"}, r"sampling\.condition='inpaint': not while training"),
        (run_lib.train, {"sampling.condition": "class"}, r"sampling\.condition='class': not while training"),
    ):
        config = tiny_config("u")
        config.update_from_flattened_dict(overrides)
        with pytest.raises(run_lib.InvalidRun, match=message):
            work(config, tmp_path / "w", CPU)
        assert not (tmp_path / "w").exists()


def test_measured_conditions_are_not_evaluated(unconditional, tmp_path):
    workdir = copy_of(unconditional, tmp_path / "w")
    with pytest.raises(run_lib.InvalidRun, match=r"sampling\.condition='ct': only with --mode=sample"):
        run_lib.evaluate(tiny_config("u", sampling__condition="ct", sampling__num_views=3), workdir, CPU)


def test_samples_do_not_depend_on_fields_of_a_condition_that_they_do_not_have(unconditional, tmp_path, monkeypatch):
    workdir, config = copy_of(unconditional, tmp_path / "w"), tiny_config("u")
    folder = run_lib.sample(config, workdir, CPU)
    calls = []
    monkeypatch.setattr(run_lib.TrainedScore, "__call__", lambda self, x, t: calls.append(1))
    config.sampling.num_images, config.sampling.mask = 5, "top"
    assert run_lib.sample(config, workdir, CPU) == folder and not calls
