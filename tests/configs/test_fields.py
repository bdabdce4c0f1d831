"""Every field has one default, meaning and range; what is outside is refused in one line that names it."""

from __future__ import annotations

import ast
import importlib
import json
import math
import re
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import ode
import sampling
from configs import FIELDS, base_config, check, defaults, digits, options
from configs.checks import EXACT_MAX_DIMENSION
from configs.dsb import common as bridges
from configs.fields import apply
from configs.stored import config_of
from conservativeness import ESTIMATORS
from conservativeness import EXACT_MAX_DIMENSION as MEASURED_EXACTLY
from data.sets import load_dataset
from exact.distributions import TWO_DIMENSIONAL
from guidance.measurements import MEASUREMENTS
from likelihood import DIVERGENCES, TIMES
from models import NETWORKS
from schrodinger_bridge.marginals import POINT_SETS

ROOT = Path(__file__).parents[2]
points = importlib.import_module("2d_examples.configs")
plane = importlib.import_module("configs.dsb.2d")
TABLES = {"images": FIELDS, "bridges": bridges.FIELDS, "2-D examples": points.FIELDS}
every_table = pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)


def refusal(check_config, config: ConfigDict) -> str:
    with pytest.raises(ValueError) as caught:
        check_config(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_config_passes():
    for path in sorted((ROOT / "configs").rglob("*.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if hasattr(module, "get_config") and path.name != "stored.py":
            for argument in getattr(module, "MODELS", {"": ()}):
                config = module.get_config(*[argument] if argument else [])
                (bridges.check if path.parent.name == "dsb" else check)(config)
    for pair in ("gaussian", "moons-8gaussians"):
        bridges.check(plane.get_config(pair))
    bridges.check(importlib.import_module("configs.dsb.digits").get_config("3-8"))
    for dataset in points.DATASETS:
        for model in points.MODELS:
            points.check(points.get_config(f"{dataset}-{model}"))


@every_table
def test_a_field_is_a_name_a_default_a_range_and_a_meaning(table):
    rows = options(table)
    assert [row[0] for row in rows] == list(table)
    for name, default, text, meaning in rows:
        assert text and meaning and "\n" not in text + meaning
        assert table[name].allowed.contains(default), name


@every_table
def test_no_field_takes_another_type_nan_or_an_infinity(table):
    for name, (default, _, allowed) in table.items():
        if isinstance(default, float):
            assert not any(map(allowed.contains, (math.nan, math.inf, -math.inf))), name
    checks = {id(FIELDS): (check, base_config), id(points.FIELDS): (points.check, points.get_config)}
    check_config, get_config = checks.get(id(table), (bridges.check, plane.get_config))
    for name, (default, _, _) in table.items():
        config = get_config()
        section, _, key = name.rpartition(".")
        part = config[section] if section else config
        if key in part:
            part.update({key: None})
            assert f"{name}=None: allowed are " in refusal(check_config, config)
            if type(default) is int:
                part.update({key: True})
                assert f"{name}=True: allowed are integers" == refusal(check_config, config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"training.n_iters": 0}, "training.n_iters=0: at least 1"),
        ({"eval.asym_probes": -1}, "eval.asym_probes=-1: at least 0"),
        ({"eval.num_reference": 3}, "eval.num_reference=3: allowed are 0 for all, or 4 to 1,000,000"),
        ({"optim.lr": 0.0}, "optim.lr=0.0: allowed are numbers from 1e-12 to 1e12"),
        ({"optim.weight_decay": -1.0}, "optim.weight_decay=-1.0: allowed are 0, and numbers from 1e-12 to 1e12"),
        ({"optim.grad_clip": 0.0}, "optim.grad_clip=0.0: allowed are numbers from 1e-12 to 1e12, or -1 for no limit"),
        ({"optim.grad_clip": -2.0}, "optim.grad_clip=-2.0: allowed are"),
        ({"model.fir_kernel": (1,)}, "model.fir_kernel=(1,): allowed are positive integers up to 8192, 2 or more"),
        ({"data.image_size": 2}, "sampling.corrector='langevin': its step size needs at least 16 dimensions, items"),
        ({"model.dropout": 1.0}, "model.dropout=1.0: allowed are numbers in [0, 1)"),
        ({"seed": 2**63}, "seed=9223372036854775808: allowed are integers of 64 bits"),
        ({"optim.optimizer": "SGD"}, "optim.optimizer='SGD': allowed is Adam"),
        ({"data.num_channels": 0}, "data.num_channels=0: at least 1, at most 8,192"),
        ({"model.progressive_combine": "mean"}, "model.progressive_combine='mean': allowed are sum, cat"),
        ({"training.sde": "foo"}, "training.sde='foo': allowed are flow, subvpsde, vesde, vpsde, or module:attribute"),
        ({"model.schedule": "x"}, "polynomial, linear, power, exponential, cosine, or module:attribute, or empty"),
        (
            {"sampling.condition": "paint"},
            "sampling.condition='paint': allowed are inpaint, colorize, super_resolution",
        ),
        ({"sampling.conditioning": "a:b"}, "sampling.conditioning='a:b': allowed are projection, dps, pigdm"),
        ({"model.ch_mult": ()}, "model.ch_mult=(): allowed are positive integers"),
        ({"classifier.ch_mult": (1, True)}, "classifier.ch_mult=(1, True): allowed are positive integers"),
        ({"model.attn_resolutions": (0,)}, "model.attn_resolutions=(0,): allowed are positive integers up to 8192, or"),
        ({"eval.metrics": ("fid",)}, "eval.metrics=('fid',): allowed are tuples of module:attribute"),
        # Combinations.
        ({"training.label_dropout": 0.1}, "training.label_dropout=0.1: needs model.num_classes > 0"),
        ({"eval.asym_probes": 0}, "eval.asym_probes=0: the exact Jacobian is for at most 256 dimensions, items of"),
        ({"eval.tfhub_inception": "x"}, "eval.tfhub_inception=x: needs --config.eval.backend=tfgan"),
        (
            {"eval": dict(tfhub_inception="x", backend="tfgan", inception_sha256="y")},
            "eval.tfhub_inception=x: takes the place of eval.inception_path and eval.inception_sha256",
        ),
        (
            {"eval": dict(features="classifier", stats_path="x.npz")},
            "eval.stats_path=x.npz: is of Inception, but eval.features='classifier'",
        ),
        ({"sampling.guidance_weight": 2.0}, "sampling.guidance_weight=2.0: unconditional sampling has no guidance"),
        (
            {"sampling": dict(condition="ct", guidance_weight=2.0)},
            "sampling.guidance_weight=2.0: sampling.condition='ct' by projection has no guidance",
        ),
        (
            {"sampling": dict(condition="ct", class_label=1)},
            "sampling.class_label=1: only for sampling.condition class or class_free",
        ),
        ({"sampling.condition": "class_free"}, "'class_free': needs a network that knows classes, model.num_classes"),
        ({"model.num_classes": 10}, "a network of model.num_classes=10 trained with training.label_dropout=0"),
        (
            {"sampling": dict(condition="my.operators:Blur", method="ode")},
            "sampling.solver='rk45': a projection follows every step, so needs 'heun'",
        ),
        (
            {"sampling": dict(condition="inpaint", measurement_noise=0.1)},
            "sampling.measurement_noise=0.1: a projection leaves out what is noisier than the state",
        ),
        (
            {"sampling": dict(condition="inpaint", conditioning="dps")},
            "sampling.conditioning='dps': its move follows a predictor's step, so needs sampling.method=pc",
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_image_models_refuse(overrides, message):
    assert message in refusal(check, base_config(overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        {"optim.grad_clip": -1.0},
        {"data.dataset": "cifar10"},
        {"model.num_classes": 10, "sampling.condition": "class_free"},
        {"model.num_classes": 10, "training.label_dropout": 0.1, "sampling": dict(condition="class", class_label=3)},
        {"sampling": dict(condition="inpaint", conditioning="pigdm", guidance_weight=2.0, measurement_noise=0.1)},
        {"sampling": dict(condition="inpaint", conditioning="dps", corrector="none")},
        {"eval.metrics": ("my_package.metrics:sharpness", "more:m")},
        {"training.sde": "my.sdes:Mine"},
        {"model": dict(name="my.nets:MyUNet", schedule="my:Schedule"), "data.dataset": "my_package.sets:load"},
        {"sampling": dict(predictor="a:P", corrector="a:C", solver="a.b:solve", condition="a:Operator")},
        {"eval": dict(features="a:Extractor", backend="a:Backend")},
    ],
    ids=str,
)
def test_what_image_models_accept(overrides):
    check(base_config(overrides))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"bridge.algorithm": "sinkhorn"}, "bridge.algorithm='sinkhorn': allowed are ipf, imf"),
        ({"bridge.coupling": "independent"}, "bridge.coupling='independent': IPF starts from the coupling"),
        ({"bridge.gamma_min": 1e-300}, "bridge.gamma_min=1e-300: allowed are numbers from 1e-12 to 1e12"),
        ({"training.cache_size": 33}, "training.cache_size=33: must be a multiple of training.batch_size=512"),
        ({"evaluation.num_samples": 1}, "evaluation.num_samples=1: at least 2"),
        ({"bridge.matching": "x"}, "bridge.matching='x': allowed are drift, mean"),
        ({"data.dataset": "moon"}, "data.dataset='moon': allowed are scurve, swissroll"),
        ({"seed": -1}, "seed=-1: at least 0"),
    ],
    ids=str,
)
def test_what_bridges_refuse(overrides, message):
    assert message in refusal(bridges.check, apply(plane.get_config(), overrides))


def test_what_bridges_of_images_refuse():
    config = importlib.import_module("configs.dsb.digits").get_config("3-8")
    config.final.class_label = -2
    assert refusal(bridges.check, config) == "final.class_label=-2: at least -1, at most 1,000,000"
    config.model.dropout = 0.1
    assert refusal(bridges.check, config) == "model.dropout=0.1: allowed is 0.0"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data.num_test": 3}, "data.num_test=3: at least 4"),
        ({"data.dataset": "moons"}, "data.dataset='moons': allowed are gaussian_8, checkerboard, spiral_2"),
        ({"sampling.method": "pc"}, "sampling.method='pc': allowed is ode"),
        ({"training.continuous": False}, "training.continuous=False: allowed is True"),
        ({"model.widths": (64, 0)}, "model.widths=(64, 0): allowed are positive integers"),
        ({"training.batch_size": 60_000}, "training.batch_size=60000: at most data.num_train=50000"),
        ({"training.qc_stride": 3}, "training.qc_stride=3: must divide training.batch_size=5000"),
    ],
    ids=str,
)
def test_what_the_2d_examples_refuse(overrides, message):
    assert message in refusal(points.check, apply(points.get_config(), overrides))


def test_a_config_of_another_program_is_refused():
    assert refusal(check, plane.get_config()).startswith("--config: no config of an image model")
    assert refusal(bridges.check, base_config()).startswith("--config: no config of a bridge; those are in configs/dsb")
    assert refusal(points.check, plane.get_config()).startswith("--config: no config of the 2-D examples")


def test_overrides_name_fields_that_exist():
    for name in ("model.sigma", "sigma", "sampler.snr"):
        with pytest.raises(KeyError, match=name.partition(".")[0]):
            base_config({name: 1.0})
    assert "fir" not in base_config({"model": dict(fir=None)}).model


def test_allowed_names_are_those_that_the_code_knows():
    with pytest.raises(ValueError) as caught:
        load_dataset("x", image_size=8, num_channels=1)
    known = set(re.sub(", or module:attribute", "", str(caught.value)).rpartition(" are ")[2].split(", "))
    assert known == {"array", *(name.lower() for name in defaults.IMAGE_SETS)}
    assert set(NETWORKS) >= set(defaults.NETWORKS)
    assert set(sampling.PREDICTORS) == set(defaults.PREDICTORS)
    assert set(ode.SOLVERS) == set(defaults.ODE_SOLVERS) and set(MEASUREMENTS) == set(defaults.MEASUREMENTS)
    assert set(POINT_SETS) == set(bridges.POINT_SETS) and set(TWO_DIMENSIONAL) == set(points.DATASETS)
    assert EXACT_MAX_DIMENSION == MEASURED_EXACTLY
    for name, names in {
        "sampling.corrector": sampling.CORRECTORS,
        "sampling.solver": sampling.FEW_STEP_SOLVERS,
        "training.qc_estimator": ESTIMATORS,
        "likelihood.divergence": DIVERGENCES,
        "likelihood.time": TIMES,
    }.items():
        assert all(map(FIELDS[name].allowed.contains, names))


def test_configs_import_no_code_of_the_project():
    allowed = {"configs", "ml_collections", *sys.stdlib_module_names}
    for path in (ROOT / "configs").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("", "optim", True, "it has no optim.optimizer"),
        ("", "seed", {}, "seed: is no section; allowed are"),
        ("sampling", "snr", {"a": 1}, "sampling.snr: is no section; allowed are"),
        ("model", "nf", None, "it has no model.nf"),
        ("model", "name", None, "it has no model.name"),
    ],
)
def test_a_stored_config_of_another_form_is_refused_in_one_line(section, key, value, message):
    """It may come with somebody's checkpoint. Without the seed, which is newer than no config, it has the default."""
    config = json.loads(digits.get_config("u").to_json())
    del config["seed"]
    assert config_of(config, "x").seed == FIELDS["seed"].default
    part = config[section] if section else config
    if value is None:
        del part[key]
    else:
        part[key] = value
    with pytest.raises(ValueError, match=f"^[^\n]*{message}[^\n]*$"):
        check(config_of(config, "x"))
