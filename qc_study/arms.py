"""Which models the study compares: what each is trained with, from which step and to which.

Every arm is a run of ``run_lib.trainer``. All of one seed begin with the same weights, and at the same step see the
same batch, times and noise.
"""

from __future__ import annotations

import json
import math
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

import run_lib
from benchmarks.measure import in_turn
from benchmarks.training_step import take
from configs import digits, own_images
from configs.fields import apply
from conservativeness import jvp_and_vjp
from experiment.files import write_atomically
from experiment.jobs import Update
from experiment.randomness import Generator, rademacher_like
from experiment.runtime import Runtime
from models.second_order.operations import without_autocast
from sde_lib import ScoreFunction
from training import Trainer

LAZY = 4
"""Steps from one QC term to the next of the lazy arm."""
ROUNDS = 12
"""In which the cost of a step is measured."""
PILOT_SEEDS = (1000, 1001)
"""On which the placebo's weight is found, and nothing else."""
PILOT_STEPS = 200
PLACEBO_WEIGHTS = tuple(0.02 * 2.0**k for k in range(-6, 7))


class Part(NamedTuple):
    """A part of the study on images. Steps are those of the optimiser.

    Attributes:
        config: of U, and of the measurements; ``training.n_iters`` is the arms'.
        forks: steps of U from which QC goes on.
        phase: for how many steps.
        weights: of QC; the last one is the primary.
        seeds: how many.
        controls_at: the fork at which all other arms are, or none.
    """

    config: ConfigDict
    forks: tuple[int, ...]
    phase: int
    weights: tuple[float, ...]
    seeds: int
    controls_at: int | None = None


COMMON = {
    "seed": 0,  # of all that is random in a measurement, for every model; a run's own is set in ``trainer``
    "training": dict(log_freq=50, eval_freq=10**9, snapshot_freq=0, snapshot_freq_for_preemption=200),
    "training.keep_checkpoints": 1,
    "training.snapshot_sampling": False,
}
IMAGES = {"eval": dict(num_samples=500, nll_images=100), "likelihood.probes": 4}
PARTS: dict[str, Callable[[], Part]] = {
    # With the demo's average (0.999) half of QC's weights would still be those of the fork after 700 steps.
    "digits": lambda: Part(
        apply(
            digits.get_config("u"),
            COMMON,
            {"model.ema_rate": 0.995, "eval.num_samples": 5000, "likelihood": dict(num_steps=320, probes=4)},
        ),
        forks=(600, 1800, 6000),
        phase=700,
        weights=(0.005, 0.02),
        seeds=8,
        controls_at=1800,
    ),
    "mnist": lambda: Part(apply(own_images.get_config("grey28_u"), COMMON, IMAGES), (1200,), 300, (5e-4,), 3),
    "cifar10": lambda: Part(apply(own_images.get_config("rgb32_u"), COMMON, IMAGES), (1200,), 300, (5e-4,), 3),
    "gpu": lambda: Part(
        apply(
            own_images.get_config("rgb32_u"),
            COMMON,
            IMAGES,
            {"model": dict(nf=32, num_res_blocks=2), "training.batch_size": 64},
        ),
        forks=(3000,),
        phase=750,
        weights=(5e-4,),
        seeds=4,
    ),
}


class Arm(NamedTuple):
    """A model: from ``fork`` (None: the run of U itself; 0: from scratch) to ``step``."""

    step: int
    fork: int | None = None
    kind: str = "u"
    weight: float = 0.0


def arms(part: Part, costs: Mapping[str, float], placebo_weight: float) -> dict[str, Arm]:
    """All models of one seed, by name; ``costs`` are those of a step in steps of U (``measure_costs``).

    At equal compute U has done as much after the fork as QC's phase costs; the model from scratch as much in all.
    """
    found, compute = {}, part.phase * costs["qc"]
    for fork in part.forks:
        found[f"u-{fork}"] = Arm(fork)
        found[f"u-{fork}-steps"] = Arm(fork + part.phase)
        found[f"u-{fork}-compute"] = Arm(fork + round(compute))
        for weight in part.weights:
            found[f"qc-{fork}-{weight:g}"] = Arm(fork + part.phase, fork, "qc", weight)
    if (fork := part.controls_at) is not None:
        weight = part.weights[-1]
        found["placebo"] = Arm(fork + part.phase, fork, "placebo", placebo_weight)
        found["u-placebo-compute"] = Arm(fork + round(part.phase * costs["placebo"]))
        found["lazy"] = Arm(fork + round(compute / costs["lazy"]), fork, "lazy", weight)
        found["decay"] = Arm(fork + round(compute), fork, "decay")
        found["scratch"] = Arm(round((fork + compute) / costs["qc"]), 0, "qc", weight)
    return found


class Placebo:
    """½‖(J + Jᵀ)v − (J̄ + J̄ᵀ)v‖² with the Jacobian J̄ of a teacher, which is held fixed: a penalty that costs two more
    products than QC's, and restrains the symmetric part of the Jacobian, which is not what QC restrains. Called as
    ``conservativeness.asymmetry`` is."""

    def __init__(self, teacher: ScoreFunction) -> None:
        self.teacher = teacher

    def __call__(
        self,
        score: ScoreFunction,
        x: Tensor,
        t: Tensor,
        *,
        probes: int = 1,
        generator: Generator = None,
        create_graph: bool = False,
        estimator: str = "",
    ) -> tuple[Tensor, Tensor, None]:
        x, total = x.detach().requires_grad_(), torch.zeros(len(x), device=x.device, dtype=x.dtype)
        with without_autocast(x), torch.enable_grad():
            value, wanted = score(x, t), self.teacher(x, t)
            for _ in range(probes):
                v = rademacher_like(x, generator)
                own = sum(jvp_and_vjp(value, x, v, create_graph=create_graph))
                fixed = sum(jvp_and_vjp(wanted, x, v)).detach()
                total = total + 0.5 * ((own - fixed) ** 2).flatten(1).sum(1) / probes
        return (value, total, None) if create_graph else (value.detach(), total.detach(), None)


def trainer(part: Part, arm: Arm, seed: int, seed_folder: Path, workdir: Path, runtime: Runtime) -> Trainer:
    """The training loop of an arm. What it forks from is the checkpoint that ``train_u`` has kept."""
    config = part.config.copy_and_resolve_references()
    config.seed = seed
    config.training.update(n_iters=arm.step, qc_weight=arm.weight, qc_interval=LAZY if arm.kind == "lazy" else 1)
    if arm.fork:
        config.training.init_from = str(weights_path(seed_folder, arm.fork))
    loop = run_lib.trainer(config, workdir, runtime)
    if arm.kind == "placebo":
        loop.objective.penalty = Placebo(loop.ema.model)
    if arm.kind == "decay":  # linearly, to 0 in the last step
        rate, steps = config.optim.lr, arm.step - arm.fork
        loop.learning_rate = lambda step: rate * (arm.step - 1 - step) / steps
    return loop


def weights_path(seed_folder: Path, step: int) -> Path:
    """Where the checkpoint of U of a step is kept."""
    return seed_folder / "weights" / f"step_{step:08d}.pt"


def train_u(part: Part, seed: int, steps: list[int], seed_folder: Path, device: str, update: Update) -> None:
    """U to the last of ``steps``, ascending; the checkpoint of each of them is kept."""
    for before, step in zip([0, *steps], steps, strict=False):
        if not (kept := weights_path(seed_folder, step)).exists():
            workdir = seed_folder / "u"
            loop = trainer(part, Arm(step), seed, seed_folder, workdir, Runtime(device, on_progress=silent))
            loop.run()
            content = loop.store.path(step).read_bytes()
            write_atomically(kept, lambda file, content=content: file.write(content))
        update(step - before)


def measure_costs(part: Part, runtime: Runtime) -> dict[str, float]:
    """What a step costs in steps of U, by kind: medians, in turn, of processor time, or by the clock on a GPU."""
    weight = part.weights[-1]
    kinds = {"u": Arm(1)} | {kind: Arm(1, None, kind, weight) for kind in ("qc", "lazy", "placebo")}
    with tempfile.TemporaryDirectory() as folder:
        loops = {kind: trainer(part, arm, 0, Path(), Path(folder) / kind, runtime) for kind, arm in kinds.items()}
        timed = in_turn({kind: partial(take, loop, LAZY) for kind, loop in loops.items()}, ROUNDS, runtime.torch_device)
    return {kind: found.median / timed["u"].median for kind, found in timed.items() if kind != "u"}


def pilot(part: Part, seed: int, seed_folder: Path, device: str, update: Update) -> dict[str, float]:
    """The largest weight of a grid with which the placebo costs no more of the score-matching loss than QC does.

    The cost is the relative increase of ``dsm`` over that of U, mean over the last half of ``PILOT_STEPS`` after the
    fork, on the same batches and noise. It is taken to rise with the weight.
    """
    fork = part.controls_at
    train_u(part, seed, [fork, fork + PILOT_STEPS], seed_folder, device, silent)
    update(1)
    u = _dsm(seed_folder / "u", fork)

    def cost(kind: str, weight: float) -> float:
        workdir = seed_folder / f"{kind}-{weight:g}"
        arm = Arm(fork + PILOT_STEPS, fork, kind, weight)
        trainer(part, arm, seed, seed_folder, workdir, Runtime(device, on_progress=silent)).run()
        return _dsm(workdir, fork) / u - 1

    wanted = cost("qc", part.weights[-1])
    update(1)
    found = bisect_right(PLACEBO_WEIGHTS, wanted, key=partial(cost, "placebo"))
    weight = PLACEBO_WEIGHTS[max(found - 1, 0)]
    result = {"qc_cost": wanted, "weight": weight, "cost": cost("placebo", weight)}
    update(1)
    return result


def placebo_weight(pilots: list[dict[str, float]]) -> float:
    """The geometric mean of what the pilot's seeds found."""
    return math.exp(float(np.mean([math.log(found["weight"]) for found in pilots])))


def _dsm(workdir: Path, fork: int) -> float:
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    first, last = fork + PILOT_STEPS // 2, fork + PILOT_STEPS
    return float(np.mean([row["dsm"] for row in rows if first < row["step"] <= last and "dsm" in row]))


def silent(_: int) -> None:
    """Progress that is not shown."""
