"""Absurd overrides, and those of the public codes, are answered in one line that names the field, before any work."""

from __future__ import annotations

import importlib
import json
import math
import re

import pytest
import torch
from documents import run_program
from from_config import create_score_model, get_likelihood, get_objective, get_sampler, get_sde

from configs import FIELDS, check
from configs.digits import get_config
from configs.dsb import common as bridges
from configs.fields import Field, apply, flatten, make_config
from configs.public import PUBLIC
from experiment import runtime
from guidance.classifier import NoiseConditionalClassifier

points = importlib.import_module("2d_examples.configs")
ABSURD = (0, -1, 10**20, -(10**20), 0.0, -1.0, 1e300, 1e-320, math.nan, math.inf, -math.inf)
ABSURD += (None, "", "x", "a b", ":", (), (0,), (-1,), (1.5,), (math.nan,), (10**20,), ("a",), (True,), [1], b"x")
SMALL = {"model.nf": 8, "model.ch_mult": (1, 1), "classifier.nf": 8, "classifier.ch_mult": (1,)}
START = ["main.py", "--config=configs/digits.py:u", "--workdir=w", "--mode=train"]
START_2D = ["-m", "2d_examples.main", "--config=2d_examples/configs.py", "--workdir=w", "--mode=train"]
# Of ml_collections.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

# All fields that the public configs set and that ours have not, with a value there.
SCORE_SDE = {"device": "cpu", "data.category": "bedroom", "data.tfrecords_path": "ffhq-r10.tfrecords"}
SCORE_SDE |= {"eval.begin_ckpt": 1, "eval.bpd_dataset": "test", "eval.enable_loss": True, "eval.end_ckpt": 26}
SCORE_SDE |= {"model.attention_type": "ddpm", "model.conv_size": 3, "model.interpolation": "bilinear"}
SCORE_SDE |= {"model.normalization": "GroupNorm", "model.sigma_begin": 90, "optim.amsgrad": False}
SCORE_SDE |= {"sampling.probability_flow": False, "training.continuouse": False, "training.loss": "vesde"}
QCSBM = {"eval.division_idx": 0, "eval.encoding_rounds": 50, "eval.nearest_k": 3, "eval.noise_levels": 100}
QCSBM |= {"eval.num_divisions": 10, "eval.repeat": 0, "eval.total_repeat": 5, "loss.balancing_fac": 0.001}
QCSBM |= {"loss.slices": 1, "model.energy": False, "sampling.batch_size": 9, "sampling.last_step_snr": 0.036}
QCSBM |= {"sampling.score_restore_path": "", "training.deterministic": False, "training.init_step": 600000}
QCSBM |= {"training.restore_path": None}
PLANE = {"data.dataset_size": 50000, "data.dtype": "torch.float32", "data.shuffle_files": True, "eval.nearest_k": 3}
PLANE |= {"eval.restore_path": "", "eval.type": "sampling", "loss.balancing_fac": 0.0, "loss.loss_type": "dsm"}
PLANE |= {"loss.reg_type": "none", "loss.slices": 1, "loss.std_max": 3.0, "loss.std_min": 0.1, "model.act_": "swish"}
PLANE |= {"model.act__": "elu", "model.n_scales": 10, "model.type": "score_model", "sampling.density": 40}
PLANE |= {"sampling.height": 10, "sampling.shape": (1000, 2), "sampling.width": 10, "training.plot_freq": 1000}
PLANE |= {"training.snapshot_freq": 500, "device": "cpu"}


def answer(arguments: list[str]) -> str:
    """The one line with which a program refuses its arguments, or nothing."""
    try:
        run_program(arguments, only_parse=True)
    except SystemExit as end:
        assert isinstance(end.code, str) and "\n" not in end.code
        return end.code
    return ""


def bounds(field: Field) -> tuple:
    """The smallest and the largest number that a field takes, and the next beyond."""
    found, contains = [], field.allowed.contains
    for sign in (-1, 1):
        if type(field.default) is not int or contains(sign * 10**20):
            continue
        inside, outside = field.default, sign * 10**20
        while abs(outside - inside) > 1:
            middle = (inside + outside) // 2
            inside, outside = (middle, outside) if contains(middle) else (inside, middle)
        found += [inside, outside]
    return tuple(found)


def test_every_number_has_an_upper_end():
    """No field takes a number of 20 digits, or one whose square overflows single precision."""
    for table in (FIELDS, bridges.FIELDS, points.FIELDS):
        for name, (default, _, allowed) in table.items():
            beyond = {int: (10**20,), float: (1e20, 1e300)}.get(type(default), ())
            assert not any(map(allowed.contains, beyond)), name
            if isinstance(default, tuple):
                assert not any(map(allowed.contains, ((10**20,) * 3, (1.5, 1.5), (math.nan,), ("a",)))), name


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.faults) for name in FIELDS])
def test_an_absurd_value_is_refused_in_one_line_or_builds(name, monkeypatch):
    """Of each field: the first number outside its range, NaN, infinities, other types, and others, given in Python. The
    line names the field; what is taken builds, at both ends of the range, a small network and all else."""
    monkeypatch.setattr(runtime, "memory_size", lambda: 10**9)
    field, refused = FIELDS[name], 0
    for value in (*ABSURD, *bounds(field)):
        config = apply(get_config("u"), SMALL)
        section, _, key = name.rpartition(".")
        with (config[section] if section else config).ignore_type():
            (config[section] if section else config)[key] = value
        try:
            check(config)
            build(config)
        except ValueError as error:
            assert "\n" not in str(error) and key in str(error), (value, str(error))
            refused += 1
    assert refused >= 5


def build(config) -> None:
    """What a run builds before its first step."""
    with runtime.within_memory("model.nf", 5):
        model = create_score_model(config, sde := get_sde(config))
    get_objective(config, model)
    get_sampler(config, sde)
    get_likelihood(config, sde)
    classifier, names = config.classifier, ("nf", "ch_mult", "num_res_blocks", "dropout")
    options = {name: classifier[name] for name in names}
    with runtime.within_memory("classifier.nf", 4):
        NoiseConditionalClassifier(sde, image_shape=model.network.image_shape, num_classes=10, **options)


@pytest.mark.faults
@pytest.mark.parametrize("name", FIELDS)
def test_an_absurd_flag_is_refused_in_one_line_or_taken(name):
    """The same on the command line, where everything is text."""
    for text in ("", "x", "nan", "-inf", "1e400", "1" + "0" * 20, "()", "(1.5,)", "5", "(", "'", "None", "\0", "∇"):
        try:
            values = run_program([*START, f"--config.{name}={text}"], only_parse=True)
            check(values["config"])
        except (SystemExit, ValueError) as error:
            said = str(error)
            assert "\n" not in said and name.rpartition(".")[2] in said, (text, said)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.=5", "--config.: the config has no field ''"),
        ("--config.model.nff=5", "--config.model.nff: the config has no field 'model.nff'; did you mean model.nf?"),
        ("--config.model=5", "--config.model: the config has no field 'model'"),
        ("--config=README.md", "--config=README.md: is no config: SyntaxError"),
        ("--config=configs/fields.py", "--config=configs/fields.py: is no config: KeyError: 'get_config'"),
        ("--config=configs", "--config=configs: no such file"),
        ("--flagfile=nothing", "Unable to open flagfile"),
        ("--config.optim.amsgrad=True", "--config.optim.amsgrad=True: is of the public code; here there is Adam as it"),
        ("--config.eval.noise_levels=5", "here there is eval.asym_levels, which is 20"),
        ("--config.model.energy=True", "here there is model.parameterization, which is 'preconditioned'"),
        ("--config.model.normalization=InstanceNorm++", "here there is model.name, which is 'ncsnpp'"),
        ("--config.sampling.probability_flow=True", "sampling.predictor=probability_flow, or sampling.method=ode"),
    ],
)
def test_what_the_command_line_refuses(argument, message):
    assert message in answer([*START, argument])


def test_what_the_public_codes_say_and_is_done_anyway_changes_nothing():
    accepted = ("optim.amsgrad=False", "model.energy=False", "eval.noise_levels=20", "loss.slices=1")
    given = [*(f"--config.{override}" for override in accepted), "--config.model.normalization", "GroupNorm"]
    values = run_program([*START, "--config.seed=3", *given, "--config.model.nf=8"], only_parse=True)
    assert values["config"].to_dict() == apply(get_config("u"), {"seed": 3, "model.nf": 8}).to_dict()
    assert answer([*START, "--config.model.energy=True", "--config.model.parameterization=conservative"]) == ""


@pytest.mark.parametrize(
    ("start", "public", "table"),
    [(START, SCORE_SDE, FIELDS), (START, QCSBM, FIELDS), (START_2D, PLANE, points.FIELDS)],
    ids=("score_sde_pytorch", "qcsbm", "2-D"),
)
def test_public_fields_are_accepted_or_refused_with_what_takes_their_place(start, public, table):
    config = flatten(make_config(table).to_dict())
    for name, value in public.items():
        assert name in PUBLIC and name not in table
        said, replacement = answer([*start, f"--config.{name}={value}"]), PUBLIC[name].instead
        assert not said or f"--config.{name}={value}: is of the public code; here there is {replacement}" in said
        assert not re.fullmatch(r"[a-z]+\.\w+", replacement) or replacement in config, name
    assert PUBLIC.keys() == SCORE_SDE.keys() | QCSBM.keys() | PLANE.keys()


def test_overrides_may_come_from_a_file(tmp_path):
    (tmp_path / "flags").write_text("\n".join([*START[1:], "--config.seed=3", "--config.optim.amsgrad=False"]))
    assert run_program(["main.py", f"--flagfile={tmp_path / 'flags'}"], only_parse=True)["config"].seed == 3
    assert answer(["-m", "2d_examples.main", "--config.optim.amsgrad=False", "--workdir=w", "--mode=table"]) == (
        "error: --config.optim.amsgrad: needs --config=FILE"
    )


def test_overrides_may_come_before_the_config():
    """Of several configs the last counts."""
    for first in (
        ["--config", "configs/digits.py:qc"],
        ["--config=configs/digits.py:u", "--config=configs/digits.py:qc"],
    ):
        arguments = ["main.py", "--config.seed=3", "--workdir=w", *first, "--mode=train", "--config.optim.lr=1e-3"]
        config = run_program(arguments, only_parse=True)["config"]
        assert (config.seed, config.optim.lr) == (3, 1e-3) and config.training.qc_weight > 0


def test_the_config_of_a_run_is_that_of_its_workdir(tmp_path):
    config = get_config("qc")
    config.model.nf = 16
    (tmp_path / "config.json").write_text(config.to_json())
    for workdir in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        given = ["main.py", "--config.seed=3", *workdir, "--mode=eval", "--config.optim.amsgrad=False"]
        found = run_program(given, only_parse=True)["config"]
        assert found.to_dict() == config.to_dict() | {"seed": 3}
    older = json.loads(config.to_json())
    del older["sampling"]["num_samples"]  # a field that is newer than the run
    del older["model"]["fir"]  # one that a network does not read
    (tmp_path / "config.json").write_text(json.dumps(older))
    found = run_program(given, only_parse=True)["config"]
    assert found.sampling.num_samples == 64 and "fir" not in found.model
    (tmp_path / "config.json").write_text("[" * 10_000)
    assert answer(given).startswith(f"error: {tmp_path / 'config.json'} is damaged: ")
    (tmp_path / "config.json").unlink()
    missing = "error: --config=FILE is missing, and in --workdir there is no run whose config could be taken"
    assert answer(["main.py", *workdir, "--mode=eval"]) == missing
    # Other programs have configs of other kinds.
    (tmp_path / "config.json").write_text(config.to_json())
    assert answer(["-m", "schrodinger_bridge.main", *workdir]) == "error: --config=FILE is missing"


def test_a_network_larger_than_the_memory_is_refused(monkeypatch):
    config = apply(get_config("u"), SMALL)
    with runtime.within_memory("model.nf=8", 5):
        weights = sum(p.nbytes for p in create_score_model(config, get_sde(config)).parameters())
    monkeypatch.setattr(runtime, "memory_size", lambda: 5 * weights - 1)
    refused = pytest.raises(ValueError, match=r"^model\.nf=8: the network needs over 0 GB of memory, the machine")
    with refused, runtime.within_memory("model.nf=8", 5):
        create_score_model(config, get_sde(config))
    torch.nn.Linear(10**3, 10**3)  # the next network is not counted
