"""A training step: score matching (U), C and the quasi-conservative term, ours and the public code's.

python -m benchmarks.training_step [--variants=time] [--rounds=10] [--threads=2]

A step is that of the training loop: loss, backward pass, clipping of the gradient, Adam, moving average. The network is
NCSN++ of base width 32 with 2 blocks per level and attention at 16×16, for 8 images of 3×32×32. ``paper`` is what the
public code does (benchmarks/public_code.py).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import run_lib
from benchmarks.measure import conditions, in_turn, operations_of, peak_memory
from benchmarks.public_code import in_public_style, public_loss
from configs.defaults import base_config
from data import DataFormat
from experiment.command_line import command
from experiment.randomness import SampleGenerators
from experiment.results import markdown_table
from losses import make_objective
from models import EMA, recompute_activations
from training import Trainer

IMAGES = DataFormat((3, 32, 32), num_levels=256, num_classes=None, centered=False, dequantized=False)
SIZE = {"model.nf": 32, "model.num_res_blocks": 2, "training.batch_size": 8}
C = {"model.parameterization": "conservative"}
QC = {"training.qc_weight": 1e-4}
FOUR, SIXTEEN = (QC | {"training.qc_probes": probes} for probes in (4, 16))
LAZY = QC | {"training.qc_interval": 4}
LESS = {"training.activation_checkpointing": True}
# Groups of steps, as overrides of the config. After a comma paper, bf16, compiled and contiguous (memory, in the order
# of B, C, H, W) are done as the name says.
STEPS: dict[str, dict[str, dict]] = {
    "time": {
        "U, paper": {},
        "U, bf16": {},
        "QC, K = 1, paper": QC,
        "QC, K = 1": QC,
        "QC, K = 1, trace": QC | {"training.qc_estimator": "trace"},
        "QC, K = 4, paper": FOUR,
        "QC, K = 4, all at once": FOUR | {"training.qc_probe_chunk": 4},
        "QC, K = 4, chunks of 1": FOUR,
        "QC, K = 1, every 4th step": LAZY,
        "QC, K = 1, every 4th sample": QC | {"training.qc_stride": 4},
        "QC, K = 1, every 4th step, bf16": LAZY,
    },
    "memory": {
        "U, activation checkpointing": LESS,
        "C": C,
        "C, activation checkpointing": C | LESS,
        "QC, K = 1": QC,
        "QC, K = 1, activation checkpointing": QC | LESS,
        "QC, K = 4, all at once": FOUR | {"training.qc_probe_chunk": 4},
        "QC, K = 4, chunks of 2": FOUR | {"training.qc_probe_chunk": 2},
        "QC, K = 4, chunks of 1": FOUR,
        "QC, K = 16, chunks of 2": SIXTEEN | {"training.qc_probe_chunk": 2},
        "QC, K = 16, chunks of 1 (default)": SIXTEEN,
        "QC, K = 16, chunks of 1, activation checkpointing": SIXTEEN | LESS,
    },
    "compiled": {
        "U, compiled": {},
        "U, bf16, compiled": {},
        "QC, K = 1, every 4th step, compiled": LAZY,
    },
}


def run(*, variants: str = "time", rounds: int = 10, threads: int = 2, device: str = "cpu") -> str:
    """Time steps in turn, after U; count their operations and measure their memory.

    Args:
        variants: A group, time, memory or compiled (which takes minutes on a CPU), or steps separated by semicolons.
        rounds: The medians are printed.
        threads: Of the CPU.
        device: auto, cpu, cuda or mps.
    """
    known = {"U": {}} | {name: step for group in STEPS.values() for name, step in group.items()}
    names = ["U", *STEPS.get(variants, [name.strip() for name in variants.split(";")])]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--variants={unknown[0]}: allowed are {', '.join(STEPS)}, or {'; '.join(known)}")
    torch.set_num_threads(threads)
    runtime, chosen = run_lib.Runtime(device), {name: SIZE | known[name] for name in names}
    where = runtime.torch_device
    if any("compiled" in name for name in names):
        run_lib.check_compile(base_config(), where, training=True)
    counts = {name: overrides.get("training.qc_interval", 1) for name, overrides in chosen.items()}

    def steps(name: str, words: str) -> Callable[..., None]:
        return partial(take, make_trainer(words, chosen[name], runtime), counts[name])

    works = {name: steps(name, name) for name in chosen}
    rows, u = [], None
    for name, found in in_turn(works, rounds, where).items():
        seconds, memory = found.median / counts[name], peak_memory(works[name], where) / 2**20
        count = operations_of(steps(name, name.removesuffix(", compiled"))) / counts[name] / 1e9
        u = u or (seconds, count, memory)
        row = (name, f"{1e3 * seconds:.0f}", f"{seconds / u[0]:.2f}", f"{count:.1f}", f"{count / u[1]:.2f}")
        rows.append((*row, f"{count / seconds:.0f}", f"{memory:.0f}", f"{memory / u[2]:.2f}"))
    header = ("step", "ms", "of U", "GFLOP", "of U", "GFLOP/s", "peak memory, MiB", "of U")
    return f"{conditions(where)}\n{markdown_table(header, rows)}"


def take(loop: Trainer, count: int, _: int = 0) -> None:
    for _ in range(count):
        loop.train_step()


def make_trainer(
    name: str, overrides: Mapping[str, object], runtime: run_lib.Runtime, images: DataFormat = IMAGES
) -> Trainer:
    """The training loop of a variant, with one batch of random images."""
    words = ("paper", "bf16", "compiled", "contiguous")
    paper, bf16, compiled, contiguous = (word in name.split(", ") for word in words)
    config, device = base_config(overrides), runtime.torch_device
    training, optim = config.training, config.optim
    with device:
        model = run_lib.build_score_model(config, run_lib.build_sde(config), images)
    if training.activation_checkpointing:
        recompute_activations(model.network)
    if contiguous:
        model.network.memory_format = torch.contiguous_format
        for parameter in model.network.parameters():
            parameter.data = parameter.data.contiguous()
    model = in_public_style(model) if paper else model
    objective = make_objective(model, training)
    if compiled:
        model.compile_network()
    x0 = torch.rand(training.batch_size, *images.shape, generator=torch.Generator().manual_seed(0)).to(device)

    def loss(module: nn.Module, step: int, positions: range) -> Mapping[str, Tensor]:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            if paper:
                generator = torch.Generator(device).manual_seed(step)
                return {"loss": public_loss(module, x0, generator, training.qc_weight, training.qc_probes)}
            return module(x0, SampleGenerators(("train", step), positions), step=step)

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, optim.lr, (optim.beta1, 0.999), optim.eps, fused=not paper)
    options = {"objective": None if paper else objective, "grad_clip": optim.grad_clip, "runtime": runtime}
    with tempfile.TemporaryDirectory() as folder:  # without a checkpoint
        ema = EMA(model, config.model.ema_rate)
        sizes = {"n_iters": 1, "batch_size": training.batch_size}
        return Trainer(model, optimizer, loss, Path(folder), ema=ema, **sizes, **options)


if __name__ == "__main__":
    command(run)
