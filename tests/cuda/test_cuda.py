"""A GPU computes what the CPU does, without waiting for it; python -m pytest tests/cuda where there is one.

Bounds are for products that round to 24 (fp32), 11 (TF32), 8 (bf16) and 11 bits (fp16), with a margin of ten over a few
dozen of them in a row.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from gpu import NEEDS_CUDA

import run_lib
from benchmarks.training_step import IMAGES, make_trainer
from checkpoints import read_checkpoint
from configs.defaults import base_config
from experiment.randomness import SampleGenerators
from experiment.runtime import allow_tf32
from likelihood import LikelihoodEvaluator
from sampling import make_sampler

pytestmark = NEEDS_CUDA
ROOT = Path(__file__).resolve().parents[2]
SMALL = {"model.nf": 16, "model.num_res_blocks": 1, "model.init_scale": 1.0, "training.batch_size": 8}
C = {"model.parameterization": "conservative"}
QC = {"training.qc_weight": 1e-4}
LAZY = QC | {"training.qc_interval": 2}
KINDS = {
    "U": {},
    "C": C,
    "QC": QC,
    "QC, trace": QC | {"training.qc_estimator": "trace"},
    "QC, chunks": QC | {"training.qc_probes": 3, "training.qc_probe_chunk": 2},
    "QC, every 2nd step": LAZY,
    "QC, every 2nd sample": QC | {"training.qc_stride": 2},
    "QC, activation checkpointing": QC | {"training.activation_checkpointing": True},
    "DDPM": {
        "training.sde": "vpsde",
        "training.continuous": False,
        "model.embedding_type": "positional",
        "model.scale_by_sigma": False,
    },
}
BOUNDS = {"fp32": 1e-3, "TF32": 3e-2, "bf16": 0.2}


@pytest.fixture(autouse=True, scope="module")
def threads():
    """All of the CPU, for what a GPU is compared with."""
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, os.cpu_count() // 2))
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def float32_products():
    allow_tf32(False)
    yield
    allow_tf32(False)


def gradients(name: str, overrides: dict, device: str, precision: str = "fp32") -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of the first step."""
    found = []
    runtime = run_lib.Runtime(device)
    allow_tf32(precision == "TF32")
    loop = make_trainer(name, SMALL | overrides, runtime)
    reference = run_lib.build_score_model(base_config(SMALL | overrides), loop.model.sde, IMAGES)
    loop.model.load_state_dict(reference.state_dict())  # drawn on the CPU, which draws other numbers
    loop.optimizer.zero_grad = lambda: found.append([p.grad.cpu() for p in loop.model.parameters() if p.requires_grad])
    loop.optimizer.step = lambda: None
    loop.grad_clip = 1e10
    loop.train_step()
    return torch.as_tensor(loop.sums["loss"][0]).cpu(), torch.cat([g.flatten() for g in found[0]])


@pytest.fixture(autouse=True)
def a_device_of_its_own(forget_accelerator):
    """For each test: accelerate would keep that of the first."""
    forget_accelerator()


ON_CPU: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}


CASES = [(kind, precision, "") for kind in KINDS for precision in BOUNDS]
CASES += [(kind, precision, ", compiled") for kind in ("U", "C", "QC") for precision in ("fp32", "bf16")]


@pytest.mark.parametrize(("kind", "precision", "compiled"), CASES)
def test_gradient_is_the_cpus(kind, precision, compiled, forget_accelerator):
    if kind not in ON_CPU:
        ON_CPU[kind] = gradients("U", KINDS[kind], "cpu")
        forget_accelerator()
    loss, gradient = ON_CPU[kind]
    found_loss, found = gradients(f"{precision}{compiled}", KINDS[kind], "cuda", precision)
    error = (found - gradient).norm() / gradient.norm()
    print(f"{kind}, {precision}{compiled}: loss {found_loss / loss - 1:.1e}, gradient {error:.1e}")
    torch.testing.assert_close(found_loss, loss, rtol=BOUNDS[precision], atol=0)
    assert error < BOUNDS[precision]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["TF32", "bf16"])
def test_step_does_not_wait_for_the_gpu(kind, precision):
    loop = make_trainer(precision, SMALL | KINDS[kind], run_lib.Runtime("cuda"))
    loop.train_step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2):
            loop.train_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


SAMPLERS = {
    "pc": {"method": "pc", "num_steps": 5, "predictor": "reverse_diffusion", "corrector": "langevin"},
    "ancestral": {"method": "pc", "num_steps": 5, "predictor": "ancestral_sampling", "corrector": "none"},
    "heun": {"method": "few_step", "num_steps": 5, "solver": "heun"},
    "dpmpp_2m_sde": {"method": "few_step", "num_steps": 5, "solver": "dpmpp_2m_sde"},
    "ode": {"method": "ode", "solver": "heun", "num_steps": 5},
    "rk45": {"method": "ode", "solver": "rk45", "rtol": 1e-2, "atol": 1e-2},
}


def score_on(device: str, overrides: dict | None = None) -> run_lib.TrainedScore:
    config = base_config(SMALL | (overrides or {}))
    model = run_lib.build_score_model(config, run_lib.build_sde(config), IMAGES).eval().requires_grad_(False)
    return run_lib.TrainedScore(config, model.to(device), IMAGES, 0)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_are_the_cpus(name):
    found = {}
    for device in ("cpu", "cuda"):
        score = score_on(device)
        sampler = make_sampler(score.sde, {**score.config.sampling, **SAMPLERS[name]}, num_scales=1000, continuous=True)
        like = torch.zeros((4, *score.shape), device=device)
        found[device] = sampler(score, like, SampleGenerators((0,), range(4))).x.cpu()
    assert found["cpu"].std() > 0.1
    torch.testing.assert_close(found["cuda"], found["cpu"], rtol=1e-3, atol=1e-3 * found["cpu"].abs().max().item())


@pytest.mark.parametrize(("overrides", "solver"), [({}, "adams"), (C, "adams"), ({}, "rk45")])
def test_likelihood_and_asymmetry_are_the_cpus(overrides, solver):
    found = {}
    for device in ("cpu", "cuda"):
        score = score_on(device, overrides)
        evaluator = LikelihoodEvaluator(score.sde, time="log_ratio", solver=solver, num_steps=5, rtol=1e-2, atol=1e-2)
        x = torch.rand((4, *score.shape), generator=torch.Generator().manual_seed(0)).to(device)
        t = torch.linspace(0.2, 0.9, 4, device=device)
        draw = partial(SampleGenerators, indices=range(4))
        asym = score.asymmetry(x, t, probes=2, generator=draw((1,)))
        found[device] = (
            evaluator(score, x, draw((2,))).log_prob.cpu(),
            asym.asym.cpu(),
            asym.jacobian_norm_squared.cpu(),
        )
    (log_p, asym, norm), (log_p_cpu, asym_cpu, norm_cpu) = found["cuda"], found["cpu"]
    torch.testing.assert_close(log_p, log_p_cpu, rtol=1e-4, atol=0.3)  # nats, of 3072 dimensions
    torch.testing.assert_close(norm, norm_cpu, rtol=1e-3, atol=0)
    torch.testing.assert_close(asym, asym_cpu, rtol=1e-3, atol=float(1e-6 * norm_cpu.max()))


TRAINING = {
    "model.nf": 16,
    "training.batch_size": 16,
    "training.n_iters": 6,
    "training.log_freq": 2,
    "training.snapshot_freq_for_preemption": 3,
    "training.snapshot_sampling": False,
    "optim.eps": 1e-4,
    "eval.batch_size": 16,
}


def train(workdir: Path, *flags: str, steps: int = 6, launcher: tuple[str, ...] = ("main.py",)) -> dict:
    """By ``main.py``; the newest checkpoint."""
    overrides = [f"--config.{name}={value}" for name, value in (TRAINING | {"training.n_iters": steps}).items()]
    command = [sys.executable, *launcher, "--config=configs/digits.py:qc", f"--workdir={workdir}", "--mode=train"]
    finished = subprocess.run([*command, *flags, *overrides], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr[-5000:]
    return read_checkpoint(workdir / "checkpoints" / f"step_{steps:08d}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("trained")
    return folder, train(folder, "--precision=fp32")


def weights(state: dict) -> torch.Tensor:
    return torch.cat([value.flatten().double() for value in state["model"].values()])


def test_run_that_is_resumed_ends_as_one_that_was_not(trained, tmp_path):
    train(tmp_path, "--precision=fp32", steps=3)
    state = train(tmp_path, "--precision=fp32")
    torch.testing.assert_close(weights(state), weights(trained[1]), rtol=0, atol=1e-6)


def test_training_is_the_cpus(trained, tmp_path):
    state = train(tmp_path, "--precision=fp32", "--device=cpu")
    moved = (weights(state) - weights(train(tmp_path / "start", "--device=cpu", steps=1))).abs().max()
    assert (weights(state) - weights(trained[1])).abs().max() < 0.02 * moved


def test_scaler_of_fp16_is_saved(tmp_path):
    scaler = train(tmp_path, "--precision=fp16")["scaler"]
    assert scaler["scale"] > 0 and scaler["_growth_tracker"] >= 0


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
TWO_GPUS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl wants a GPU for each process")


@pytest.mark.parametrize("program", ["tests/cuda/on_one_gpu.py", pytest.param("main.py", marks=TWO_GPUS)])
def test_two_processes_train_as_one(trained, tmp_path, program):
    """On one GPU by gloo, on two by nccl."""
    state = train(tmp_path, "--precision=fp32", launcher=(*LAUNCHER, program))
    torch.testing.assert_close(weights(state), weights(trained[1]), rtol=0, atol=1e-4)


def test_samples_of_a_run_are_the_cpus(trained):
    found = []
    for device in ("cpu", "cuda"):
        score = run_lib.load(trained[0], device=device)
        found.append(score.images.to_data(score.sample(8, num_steps=10).cpu()).int())
    assert found[0].float().std() > 1
    assert (found[0] - found[1]).abs().max() <= 1
