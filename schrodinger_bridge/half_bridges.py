"""Half-bridges, one after the other: simulate one direction, learn the other from it.

A run has 2·num_ipf half-bridges, backward first, of ``training.n_iters`` steps each, and each is a training of its own:

    W/half_bridges/01_backward/   checkpoints (of the last one in either direction), metrics.jsonl, tensorboard/
    W/history.json                what has been measured of the reference and of every finished half-bridge

The cache of trajectories is not stored. It is a function of the seed, the half-bridge, the number of the refresh and
the other direction's network, which does not change meanwhile, and so it is simulated again.

Sample j of a batch of b comes from the j-th of b equal parts of the cache. With several processes each simulates and
keeps only the trajectories that its part of the batches comes from, and the numbers are those of one process.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import CheckpointError
from configs.dsb.common import check
from data import TensorSplit
from experiment.files import claim, flatten, read_json, write_json
from experiment.randomness import seed_from
from experiment.registry import resolve
from experiment.runtime import Runtime
from models import EMA, make_network
from models.mlp import TimeConditionalMLP
from sde_lib import expand
from training import Trainer

from .marginals import ImageMarginal, Key, get_marginals, moments
from .matching import ALGORITHMS, Regression
from .metrics import mean_squared_displacement, wasserstein
from .process import BACKWARD, FORWARD, LABEL_RANGE, MeanMap, Noise, Reference, TransitionMean, simulate, step_sizes

VERSION = 3
"""To be raised when a fix changes what training or evaluation compute; a folder of another version is refused."""
FREE = ("bridge.num_ipf", "training.log_freq", "training.save_freq", "training.keep_half_bridges")
"""Fields that a run may be continued with other values of."""
DIRECTIONS = (BACKWARD, FORWARD)


class PerEdgeAffine(nn.Module):
    """h(x, label) = x W_kᵀ + b_k for the edge k that the label stands for: x (B, D) → (B, D), 0 at first."""

    def __init__(self, dimension: int, num_edges: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_edges, dimension, dimension))
        self.bias = nn.Parameter(torch.zeros(num_edges, dimension))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        edge = (label * ((len(self.weight) - 1) / LABEL_RANGE)).round().long()
        return torch.einsum("bij,bj->bi", self.weight[edge], x) + self.bias[edge]


# Of points: (dimension, config) → h.
NETWORKS: dict[str, Callable[[int, ConfigDict], nn.Module]] = {
    "time_mlp": lambda dim, config: TimeConditionalMLP(dim, width=config.model.width, depth=config.model.depth),
    "affine": lambda dim, config: PerEdgeAffine(dim, config.bridge.num_steps),
}


class Objective(nn.Module):
    """Batch mean of ‖M_k(x) − target‖²/(4γ_k D): the KL divergence between the Gaussian steps, up to a constant, in
    nats per dimension."""

    def __init__(self, mean_map: TransitionMean) -> None:
        super().__init__()
        self.mean_map = mean_map

    def forward(self, x: Tensor, edge: Tensor, target: Tensor) -> Tensor:
        error = (self.mean_map(x, edge) - target) / expand(self.mean_map.noise_scale[edge - 1], x)
        return 0.5 * (error**2).mean()


class BridgeRun:
    """Everything built from a config, checked before any work starts.

    Attributes:
        marginals: of x_0 and of x_N.
        starts, ends: where chains of a direction begin, and what they are to end at.
        history: of the reference and of every finished half-bridge what was measured.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with config or data.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, runtime: Runtime) -> None:
        check(config)
        self.config, self.workdir, self.runtime, bridge = config, Path(workdir), runtime, config.bridge
        self.accelerator, self.device = runtime.accelerator, runtime.torch_device
        self.num_half_bridges = 2 * bridge.num_ipf
        self.regression = ALGORITHMS[bridge.algorithm]
        size, processes = config.training.batch_size, self.accelerator.num_processes
        if size % processes:
            raise ValueError(f"training.batch_size={size}: must be a multiple of the {processes} process(es)")
        self.gammas = step_sizes(bridge.num_steps, bridge.gamma_min, bridge.gamma_max)
        with self.accelerator.main_process_first():  # which may download data
            self.marginals = get_marginals(config.data, config.final)
        self.starts = dict(zip((FORWARD, BACKWARD), self.marginals, strict=True))
        self.ends = dict(zip((BACKWARD, FORWARD), self.marginals, strict=True))
        mean, variance = moments(self.marginals[1], config.seed)
        brownian = bridge.reference == "brownian"
        self.reference = Reference(self.gammas, mean, math.inf if brownian else variance).to(self.device)
        self.mean_maps = {direction: self._new_mean_map(direction, 0) for direction in DIRECTIONS}
        self.averages: dict[str, EMA] = {}  # of the directions that have been learned
        self.history: list[dict[str, float | int | str]] = []

    def _new_mean_map(self, direction: str, number: int) -> TransitionMean:
        config, model, shape = self.config, self.config.model, self.marginals[0].shape
        # One stream of initial weights for each direction: forward and backward do not start as twins.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(config.seed, "weights", direction, number))
            if len(shape) == 1:
                network = resolve(model.name, NETWORKS, "model.name")(*shape, config)
            else:
                network = make_network(model.name, model, shape=shape, centered=config.data.centered)
        return TransitionMean(network, self.gammas, drift=config.bridge.matching == "drift").to(self.device)

    def train(self, draw: Callable[[], object] = lambda: None) -> None:
        """All half-bridges that are left, each measured when it is done. ``draw`` is called after every iteration but
        the last.

        Raises:
            ValueError: the folder is that of something else, in use, or has more half-bridges than asked for.
            CheckpointError: networks that it should have are missing or damaged.
            FloatingPointError: loss or samples are not finite.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
        """
        self.runtime.in_main_process(lambda: claim(self.workdir, "schrodinger_bridge", self._settings()))
        path = self.workdir / "history.json"
        self.history = read_json(path, checksum=True)["half_bridges"] if path.exists() else []
        self.runtime.check_agreement("what has been measured", len(self.history), self.workdir)
        finished, num_ipf = max(0, len(self.history) - 1), self.config.bridge.num_ipf
        if finished > 2 * num_ipf:
            raise ValueError(f"bridge.num_ipf={num_ipf}: at least {(finished + 1) // 2}, already begun")
        if not self.history:
            self._measure(0)
        first = max(0, finished - 2)  # of the last two the networks are needed
        if self.runtime.on_progress is not None:
            self.runtime.on_progress(first * self.config.training.n_iters)
        for number in range(first, self.num_half_bridges):
            self._learn(number)
            if number >= finished:
                self._measure(number + 1)
                if number % 2 == 1 and number + 1 < self.num_half_bridges:
                    draw()
            if number > 1 and self.runtime.is_main and not self.config.training.keep_half_bridges:
                shutil.rmtree(self._folder(number - 2) / "checkpoints", ignore_errors=True)

    def _settings(self) -> dict[str, object]:
        """What decides the results."""
        contents = {
            field: marginal.halves[0].fingerprint
            for field, marginal in zip(("data", "final"), self.marginals, strict=True)
            # Of files the fingerprint has dates in it, which a copy changes.
            if isinstance(marginal, ImageMarginal) and isinstance(marginal.halves[0], TensorSplit)
        }
        fields = {name: value for name, value in flatten(self.config.to_dict()).items() if name not in FREE}
        return {"version": VERSION, "contents of": contents, **fields}

    def _folder(self, number: int) -> Path:
        return self.workdir / "half_bridges" / f"{number + 1:02d}_{DIRECTIONS[number % 2]}"

    def _learn(self, number: int) -> None:
        """Half-bridge ``number``, from 0, or what is left of it."""
        training, optim, direction = self.config.training, self.config.optim, DIRECTIONS[number % 2]
        if not self.config.bridge.warm_start:
            self.mean_maps[direction] = self._new_mean_map(direction, number)
        mean_map = self.mean_maps[direction]
        average = EMA(mean_map, self.config.model.ema_rate)

        def cosine(step: int) -> float:
            return optim.lr * (0.5 * (1 + math.cos(math.pi * step / training.n_iters)))

        trainer = Trainer(
            mean_map,
            torch.optim.Adam(mean_map.parameters(), optim.lr, (optim.beta1, optim.beta2), optim.eps, fused=True),
            self._loss(number),
            self._folder(number),
            n_iters=training.n_iters,
            batch_size=training.batch_size,
            objective=Objective(mean_map),
            ema=average,
            learning_rate=cosine if optim.cosine_decay else None,
            grad_clip=optim.grad_clip,
            log_freq=training.log_freq,
            save_freq=training.save_freq,
            keep=2,
            runtime=self.runtime,
            description=f"half-bridge {number + 1} of {self.num_half_bridges}",
        )
        if number < len(self.history) - 1 and trainer.step < training.n_iters:  # what it was learned from may be gone
            raise CheckpointError(f"{trainer.store.path(training.n_iters)}: missing or damaged, and needed to go on")
        trainer.run()
        self.averages[direction] = average
        self.accelerator.free_memory()

    def _loss(self, number: int) -> Callable[[nn.Module, int, range], dict[str, Tensor]]:
        training = self.config.training
        caches: dict[int, Regression] = {}  # the present one

        def loss(objective: nn.Module, step: int, positions: range) -> dict[str, Tensor]:
            refresh = step // training.refresh_freq
            if refresh not in caches:
                caches.clear()  # before the memory for the next is taken
                caches[refresh] = self._cache(number, refresh)
            return {"loss": objective(*self._batch(caches[refresh], number * training.n_iters + step, positions))}

        return loss

    def _cache(self, number: int, refresh: int) -> Regression:
        """This process's part of what half-bridge ``number`` learns from until the next refresh."""
        learned, simulated = DIRECTIONS[number % 2], DIRECTIONS[(number + 1) % 2]
        key, count = (self.config.seed, "cache", number, refresh), self.config.training.cache_size
        part = count // self.accelerator.num_processes
        share = slice(self.accelerator.process_index * part, (self.accelerator.process_index + 1) * part)
        options = {}
        if number == 0 and self.config.bridge.coupling == "independent":
            options["other_end"] = self.ends[simulated].sample(count, (*key, "other end"), share).to(self.device)
        x = self.starts[simulated].sample(count, (*key, "start"), share).to(self.device)
        noise = self._noise(count, share, (*key, "noise"))
        return self.regression(learned, x, self.mean_map(simulated), self.reference, noise, **options)

    def _batch(self, cache: Regression, step: int, positions: range) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (b, …), edges (b,) and targets (b, …): one random edge of one random chain of each part. The step is
        counted from the first half-bridge on, positions are those in the batch of all processes."""
        training = self.config.training
        generator = torch.Generator().manual_seed(seed_from(self.config.seed, "batch", step))
        size, part = training.batch_size, training.cache_size // training.batch_size
        edge = torch.randint(len(self.gammas), (size,), generator=generator)
        chain = torch.randint(part, (size,), generator=generator) + part * torch.arange(size)
        chain -= self.accelerator.process_index * cache.inputs.shape[1]
        mine = slice(positions.start, positions.stop)
        edge, chain = edge[mine].to(self.device), chain[mine].to(self.device)
        return cache.inputs[edge, chain], edge + 1, cache.targets[edge, chain]

    def mean_map(self, direction: str) -> MeanMap:
        """What a direction moves by: averaged weights, or the reference while the forward direction has none."""
        if direction == FORWARD and FORWARD not in self.averages:
            return self.reference
        average, size = self.averages[direction].model, self.config.evaluation.batch_size

        shown = self.runtime.shows_progress
        bar = tqdm(disable=not shown, leave=False, delay=2, unit="batch", desc=f"{direction} chains")

        def averaged(x: Tensor, edge: Tensor) -> Tensor:
            parts = []
            with self.accelerator.autocast():
                for part in zip(x.split(size), edge.split(size), strict=True):
                    parts.append(average(*part))
                    bar.update()
            return torch.cat(parts).to(x.dtype)

        return averaged

    def _noise(self, count: int, share: slice, key: Key) -> Noise:
        """Standard normal numbers for a share of ``count`` chains, again and again."""
        generator = torch.Generator().manual_seed(seed_from(*key))
        shape = (count, *self.marginals[0].shape)
        return lambda: torch.randn(shape, generator=generator)[share].to(self.device)

    def chains(self, direction: str, count: int, key: Key) -> Tensor:
        """``count`` chains (N + 1, count, …) from held-out data, on the CPU, without the last step's noise where data
        are ``sharp``; ``key`` is that of their randomness."""
        key, sharp = (self.config.seed, *key, direction), self.ends[direction].sharp
        x = self.starts[direction].sample(count, key, test=True).to(self.device)
        noise = self._noise(count, slice(None), key)
        return simulate(self.mean_map(direction), x, self.gammas, direction, noise, noise_removal=sharp)[0].cpu()

    def _measure(self, number: int) -> None:
        """A row of the history: what ``number`` half-bridges have learned, 0 the reference. Every process computes it.

        Of several sets of samples the mean, and in ``…_error`` its standard error.
        """
        direction, evaluation = DIRECTIONS[(number + 1) % 2], self.config.evaluation
        row = {"half_bridge": number, "iteration": (number + 1) // 2, "direction": direction}
        measured: dict[str, list[float]] = {"w2": [], "transport_cost": []}
        for i in range(evaluation.num_sets):
            states = self.chains(direction, evaluation.num_samples, ("evaluation", i))
            end = states[-1 if direction == FORWARD else 0]
            measured["w2"].append(wasserstein(end, self._true_samples(direction, "wanted", i), self.config.seed))
            measured["transport_cost"].append(mean_squared_displacement(states[0], states[-1]))
        for name, values in measured.items():
            row[name] = fmean(values)
            if len(values) > 1:
                row[f"{name}_error"] = stdev(values) / math.sqrt(len(values))
        self.history.append(row)
        if self.runtime.is_main:
            write_json(self.workdir / "history.json", {"half_bridges": self.history}, checksum=True)

    def _true_samples(self, direction: str, which: str, number: int) -> Tensor:
        key = (self.config.seed, "evaluation", which, number)
        return self.ends[direction].sample(self.config.evaluation.num_samples, key, test=True)

    @cached_property
    def sampling_errors(self) -> dict[str, float]:
        """By direction: W₂ between two independent sets of as many samples of its end as are measured, the mean of as
        many pairs. No model can be below but by chance."""

        def distance(direction: str, number: int) -> float:
            pair = (self._true_samples(direction, which, number) for which in ("wanted", "other"))
            return wasserstein(*pair, self.config.seed)

        sets = range(self.config.evaluation.num_sets)
        return {direction: fmean(distance(direction, i) for i in sets) for direction in DIRECTIONS}
