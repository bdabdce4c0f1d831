"""What runs on a GPU runs on torch's meta device, where a tensor that stayed on the CPU is refused and no number can be
read: only ``to_host`` may ask for one."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from from_config import create_network
from torch import Tensor

import ode
import run_lib
import sampling
from benchmarks.training_step import IMAGES
from configs.defaults import base_config
from experiment.randomness import SampleGenerators, normal_like
from guidance.conditions import ClassifierFreeGuidance, ClassifierGuidance, condition_on_measurement
from guidance.measurements import MEASUREMENTS
from likelihood import LikelihoodEvaluator
from losses import make_objective
from models import recompute_activations
from sampling import CORRECTORS, FEW_STEP_SOLVERS, PREDICTORS, make_sampler

META = torch.device("meta")
SMALL = {"model.nf": 8, "model.num_res_blocks": 1, "model.ch_mult": (1, 2)}
C = {"model.parameterization": "conservative"}
QC = {"training.qc_weight": 1e-4}
CHUNKS = {"training.qc_probes": 3, "training.qc_probe_chunk": 2}
DISCRETE = {
    "training.continuous": False,
    "model.embedding_type": "positional",
    "model.num_scales": 50,
}
SUB_VP = {"training.sde": "subvpsde", "model.scale_by_sigma": False}
STEPS = {
    "U": {},
    "SMLD": DISCRETE,
    "DDPM": DISCRETE | {"training.sde": "vpsde", "model.scale_by_sigma": False},
    "sub-VP, likelihood weighting": SUB_VP | {"training.likelihood_weighting": True},
    "classes": {"model.num_classes": 10},
    "C": C,
    "QC": QC,
    "QC, trace, of some": QC | {"training.qc_estimator": "trace", "training.qc_interval": 2, "training.qc_stride": 2},
    "QC, in chunks, recomputed": QC | CHUNKS | {"training.activation_checkpointing": True},
}


@pytest.fixture(autouse=True)
def nothing_is_wrong(monkeypatch):
    """What the host asks about is finite and in order."""

    def answer(x: Tensor) -> Tensor:
        return torch.full(x.shape, {torch.bool: True, torch.int64: 0}.get(x.dtype, math.nan), dtype=x.dtype)

    for module in (ode, sampling):
        monkeypatch.setattr(module, "to_host", answer)


def score_of(overrides: dict | None = None) -> run_lib.TrainedScore:
    config = base_config(SMALL | (overrides or {}))
    model = run_lib.build_score_model(config, run_lib.build_sde(config), IMAGES).to(META)
    return run_lib.TrainedScore(config, model, IMAGES, 0)


def batch(n: int = 4) -> Tensor:
    return torch.empty((n, *IMAGES.shape), device=META)


@pytest.mark.parametrize("name", STEPS)
def test_training_step(name):
    score = score_of(STEPS[name])
    if score.config.training.activation_checkpointing:
        recompute_activations(score.model.network)
    labels = torch.zeros(4, dtype=torch.int64, device=META) if score.num_classes else None
    objective = make_objective(score.model.train(), score.config.training)
    terms = objective(batch(), SampleGenerators((0,), range(4)), class_labels=labels)
    terms["loss"].backward()
    assert ("qc" in terms) == ("QC" in name)
    assert all(p.grad.device == META for p in score.model.parameters() if p.requires_grad)


@pytest.mark.parametrize("generator", [None, torch.Generator(), SampleGenerators((0,), range(4))], ids=type)
def test_noise(generator):
    assert normal_like(batch(), generator).device == META


def test_operand_on_the_cpu_is_refused():
    score = score_of()
    score.model.network.embedding.to_empty(device="cpu")
    with pytest.raises(RuntimeError, match="meta"):
        score(batch(), torch.empty(4, device=META))


@pytest.mark.parametrize(
    "path", ["vp/ddpm/cifar10", "ve/ncsn/cifar10", "ve/ncsnv2/cifar10", "ve/ncsnv2/bedroom", "ve/cifar10_ncsnpp"]
)
def test_network(path):
    config = importlib.import_module(f"configs.{path.replace('/', '.')}").get_config()
    config.model.nf = 8
    if "num_res_blocks" in config.model:
        config.model.num_res_blocks = 1
    if path.endswith("bedroom"):
        config.data.image_size = 128
    network = create_network(config).to(META)
    size = config.data.image_size
    x = torch.empty(2, 3, size, size, device=META, requires_grad=True)
    network(x, torch.zeros(2, dtype=torch.int64, device=META)).sum().backward()
    assert x.grad.device == META


PAIRS = [(predictor, "none") for predictor in PREDICTORS] + [("none", corrector) for corrector in CORRECTORS]
PC = [{"method": "pc", "predictor": a, "corrector": b, "num_steps": 2} for a, b in PAIRS if a != b]
FEW = [{"method": "few_step", "solver": solver, "num_steps": 3} for solver in FEW_STEP_SOLVERS]
ODE = [{"method": "ode", "solver": solver, "num_steps": 1} for solver in ("heun", "adams")]


@pytest.mark.parametrize("sde", ["vesde", "vpsde"])
def test_samplers(sde):
    score = score_of({"training.sde": sde, "model.scale_by_sigma": sde == "vesde"})
    score.model.network.forward = lambda x, label: 0.5 * x  # which has a test of its own
    for options in PC + FEW + ODE:
        check_sampler(score, options)


def check_sampler(score: run_lib.TrainedScore, options: dict) -> None:
    sampler = make_sampler(score.sde, {**score.config.sampling, **options}, num_scales=1000, continuous=True)
    found = sampler(score, batch(2), SampleGenerators((0,), range(2))).x
    assert found.device == META and found.shape == batch(2).shape


CONDITIONED = {"inpaint": {"mask": "left"}, "colorize": {}, "super_resolution": {"factor": 4}}


@pytest.mark.parametrize("conditioning", ["projection", "dps", "pigdm"])
@pytest.mark.parametrize("condition", CONDITIONED)
def test_measurement(condition, conditioning):
    score, given = score_of(), CONDITIONED[condition]
    score.model.network.forward = lambda x, label: 0.5 * x
    options = {**score.config.sampling, **given, "conditioning": conditioning, "measurement_noise": 0.1}
    operator = MEASUREMENTS[condition](options, IMAGES.shape, META)
    conditioned, projection = condition_on_measurement(
        options, score.sde, score, operator, operator(batch(2)), prior_variance=0.1
    )
    sampler = make_sampler(score.sde, options | PC[0], num_scales=1000, continuous=True)
    found = sampler(conditioned, batch(2), SampleGenerators((0,), range(2)), projection=projection).x
    assert found.device == META


def test_guidance_by_classes():
    score = score_of({"model.num_classes": 10, "training.label_dropout": 0.1})
    labels = torch.zeros(2, dtype=torch.int64, device=META)
    t = torch.empty(2, device=META)
    free = ClassifierFreeGuidance(score, labels, 10, weight=2.0)
    guided = ClassifierGuidance(score, lambda x, t: x.flatten(1)[:, :10].log_softmax(1), labels)
    assert free(batch(2), t).device == guided(batch(2), t).device == META


@pytest.mark.parametrize("overrides", [{}, C], ids=["U", "C"])
@pytest.mark.parametrize("time", ["t", "log_ratio"])
def test_likelihood(overrides, time):
    score = score_of(overrides)
    evaluator = LikelihoodEvaluator(score.sde, time=time, solver="heun", num_steps=1)
    assert evaluator(score, batch(2), SampleGenerators((0,), range(2))).log_prob.device == META


@pytest.mark.parametrize("overrides", [{}, C], ids=["U", "C"])
def test_asymmetry(overrides):
    score = score_of(overrides)
    generator = SampleGenerators((0,), range(2))
    found = score.asymmetry(batch(2), torch.empty(2, device=META), probes=1, generator=generator)
    assert found.asym.device == META
