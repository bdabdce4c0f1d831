"""``--compile``: what is compiled, what is refused, and that nothing but rounding changes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import SDES

import run_lib
from configs.defaults import base_config
from configs.digits import get_config
from experiment.randomness import SampleGenerators
from losses import make_objective
from models.score import NoiseLevel, UnconstrainedScore

ROOT = Path(__file__).parents[3]
COMPILED = run_lib.Runtime(device="cpu", compile=True)


def small_config(model: str = "u", **overrides):
    config = get_config(model)
    config.model.update(nf=8, num_res_blocks=1, dropout=0.2)
    config.training.update(batch_size=8, n_iters=4, log_freq=1, eval_freq=2, snapshot_sampling=False)
    config.sampling.num_steps = 3
    config.eval.update(num_samples=4, batch_size=3)
    config.sampling.num_samples = 4
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in overrides.items()})
    return config


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Names of what is compiled and then called; torch.compile itself, which takes a minute, does nothing."""
    found = []

    def compiled(function):
        name = type(function).__name__
        return lambda *args: found.append(name) or function(*args)

    monkeypatch.setattr(torch, "compile", compiled)
    return found


def test_training_and_its_evaluations_run_the_compiled_network(tmp_path, calls):
    run_lib.train(small_config(), tmp_path, COMPILED)
    # One for the check that there is a compiler; four steps, and two evaluations of the average.
    assert calls[0] == "builtin_function_or_method" and set(calls[1:]) == {"UNet"}
    steps = len(calls) - 1
    calls.clear()
    folder = run_lib.sample(small_config(), tmp_path, COMPILED)
    evaluations = json.loads((folder / "metrics.json").read_text())["nfe_sampling"]
    assert steps >= 4 + 2 and len(calls) - 1 == 2 * evaluations  # batches of 3 and 1


def test_steps_with_the_qc_term_do_not(tmp_path, calls):
    run_lib.train(small_config("qc", training__eval_freq=100, training__qc_interval=2), tmp_path, COMPILED)
    assert calls.count("UNet") == 2 + 1  # of four steps, and for the loss at the end


def test_a_conservative_model_is_refused(tmp_path):
    with pytest.raises(
        run_lib.InvalidRun, match=r"--compile: on a CPU not with model\.parameterization='conservative'"
    ):
        run_lib.train(small_config("c"), tmp_path / "w", COMPILED)
    assert not (tmp_path / "w").exists()


def test_compiled_network_is_for_single_derivatives(small_unet, calls):
    model = UnconstrainedScore(small_unet(), NoiseLevel(SDES["ve"]))
    x, t = torch.rand(2, 1, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.8], dtype=torch.float64)
    expected, names = model(x, t), set(model.state_dict())
    model.compile_network()
    torch.testing.assert_close(model(x, t), expected, rtol=1e-12, atol=1e-12)
    assert calls == ["UNet"] and set(model.state_dict()) == names
    torch.testing.assert_close(model(x.requires_grad_(), t), expected, rtol=1e-12, atol=1e-12)
    assert calls == ["UNet"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            dict(training__activation_checkpointing=True),
            r"not while training with training\.activation_checkpointing=True",
        ),
        (dict(training__qc_weight=0.1), r"on a CPU not while training with training\.qc_weight > 0 in every step"),
    ],
)
def test_training_that_gains_nothing_is_refused(tmp_path, overrides, message):
    with pytest.raises(run_lib.InvalidRun, match=rf"--compile: {message}"):
        run_lib.train(small_config(**overrides), tmp_path / "w", COMPILED)
    assert not (tmp_path / "w").exists()


def test_work_that_runs_no_compiled_network_refuses_it(tmp_path):
    run_lib.train(small_config(), tmp_path, run_lib.Runtime(device="cpu"))
    with pytest.raises(run_lib.InvalidRun, match=r"--compile: on a CPU not with eval\.enable_sampling=False"):
        run_lib.evaluate(small_config(eval__enable_sampling=False), tmp_path, COMPILED)
    guided = small_config(sampling__condition="inpaint", sampling__conditioning="dps", sampling__corrector="none")
    with pytest.raises(run_lib.InvalidRun, match=r"--compile: on a CPU not with sampling\.conditioning='dps'"):
        run_lib.sample(guided, tmp_path, COMPILED)


def test_a_signal_that_ends_the_compiler_ends_the_run(tmp_path, monkeypatch):
    """As Ctrl-C does, which the compiler, a process of its own, is sent as well."""

    def interrupted(function):
        def call(*args):
            if isinstance(function, torch.nn.Module):
                os.kill(os.getpid(), signal.SIGINT)
                raise RuntimeError("C++ compile error")

        return call

    monkeypatch.setattr(torch, "compile", interrupted)
    with pytest.raises(run_lib.Interrupted, match="stopped by SIGINT; the same command resumes"):
        run_lib.train(small_config(), tmp_path, COMPILED)


def test_a_machine_that_cannot_compile_is_told_before_any_work(tmp_path, monkeypatch):
    def broken(function):
        def call(*args):
            raise RuntimeError("no C++ compiler\nand a long explanation")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(run_lib.InvalidRun, match=r"--compile: .* on this machine: no C\+\+ compiler$") as caught:
        run_lib.train(small_config(), tmp_path / "w", COMPILED)
    assert "\n" not in str(caught.value) and not (tmp_path / "w").exists()


@pytest.mark.parametrize("mode", ["stats", "train_classifier"])
def test_modes_without_the_network_refuse_it(tmp_path, mode):
    arguments = ["--config=configs/digits.py:u", f"--workdir={tmp_path / 'w'}", f"--mode={mode}", "--compile"]
    answer = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode != 0 and f"--compile: not for --mode={mode}" in answer.stderr


@pytest.mark.slow
@pytest.mark.parametrize(("name", "precision"), [("u", "fp32"), ("u", "bf16")])
def test_compiled_results_are_the_same(tmp_path, name, precision, forget_accelerator):
    """In float32 to 1e-5; in bf16 a compiled network rounds less often, where operations are joined."""
    losses, samples = {}, {}
    for compile in (False, True):
        forget_accelerator()
        runtime = run_lib.Runtime(device="cpu", precision=precision, compile=compile)
        run_lib.train(small_config(name), tmp_path / str(compile), runtime)
        rows = [json.loads(line) for line in (tmp_path / str(compile) / "metrics.jsonl").read_text().splitlines()]
        losses[compile] = [row[field] for row in rows for field in ("loss", "grad_norm", "eval_loss") if field in row]
        # Of the same weights.
        (tmp_path / f"samples{compile}").mkdir()
        checkpoint = tmp_path / "False" / "checkpoints" / "step_00000004.pt"
        folder = run_lib.sample(small_config(name), tmp_path / f"samples{compile}", runtime, checkpoint)
        with np.load(folder / "samples.npz", allow_pickle=False) as arrays:
            samples[compile] = arrays["images"].astype(int)
    assert len(losses[False]) == 4 * 2 + 2
    assert losses[True] == pytest.approx(losses[False], rel=1e-5 if precision == "fp32" else 5e-3)
    # Levels of 0 to 16; the last digit decides where a value lies between two.
    assert abs(samples[True] - samples[False]).max() <= 1 and (samples[True] != samples[False]).mean() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_passes_of_second_derivatives_are_the_same(small_unet, dropout):
    """As on a GPU, of the QC term's gradient and of a conservative score."""
    network = small_unet(dtype=torch.float32, dropout=dropout).train()
    config = base_config({"training.qc_weight": 0.1})
    model = UnconstrainedScore(network, NoiseLevel(SDES["ve"]))
    objective = make_objective(model, config.training)
    x = torch.rand(3, 1, 8, 8)
    found = []
    for network.compile_passes in (False, True):
        model.zero_grad()
        objective(x, SampleGenerators((0,), range(3)))["loss"].backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()
