"""Half-bridges, one after the other: simulate one direction, learn the other from it.

A run has 2·num_ipf half-bridges, backward first, of ``training.n_iters`` steps each, and is one sequence of steps: a
checkpoint holds the step, both networks with their averages, the optimiser of the half-bridge at hand and what has been
measured so far. The cache of trajectories is not stored. It is a function of the seed, the half-bridge, the number of
the refresh and the other direction's network, which does not change meanwhile, and so it is simulated again.

Of a batch of b samples number j comes from its own b-th part of the cache. With several processes each simulates and
keeps only the trajectories that its part of the batches comes from, and the numbers are those of one process.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev

import torch
from accelerate.utils import gather_object
from experiment.metrics_log import MetricsLog
from ml_collections import ConfigDict
from run_setup import Runtime
from torch import Tensor, nn
from tqdm import tqdm

from checkpoints import CheckpointError, CheckpointStore, load_state_dict_strictly
from data import TensorSplit
from experiment.randomness import seed_from
from experiment.workdir import check_at_least, claim
from models import EMA, create_network
from models.mlp import TimeConditionalMLP
from sde_lib import expand

from .marginals import ImageMarginal, Key, Marginal, get_marginals, moments
from .matching import ALGORITHMS, Regression
from .metrics import mean_squared_displacement, wasserstein
from .process import BACKWARD, FORWARD, LABEL_RANGE, MeanMap, Reference, TransitionMean, opposite, simulate, step_sizes

__all__ = ["EXPERIMENT", "BridgeRun", "Objective", "PerEdgeAffine"]

EXPERIMENT = "schrodinger_bridge"
VERSION = 3
"""To be raised when a fix changes what training or evaluation compute; a folder of another version is refused."""
REFERENCES = ("ornstein_uhlenbeck", "brownian")
COUPLINGS = ("reference", "independent")
FREE = ("bridge.num_ipf", "training.log_freq", "training.save_freq", "training.keep_half_bridges")
"""Fields that a run may be continued with other values of."""
_NOT_FINITE = "{} not finite at or before step {}; try a smaller optim.lr"


class PerEdgeAffine(nn.Module):
    """h(x, label) = x W_kᵀ + b_k for the edge k that the label stands for: x (B, D) → (B, D), 0 at first."""

    def __init__(self, dimension: int, num_edges: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_edges, dimension, dimension))
        self.bias = nn.Parameter(torch.zeros(num_edges, dimension))

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        edge = (label * ((len(self.weight) - 1) / LABEL_RANGE)).round().long()
        return torch.einsum("bij,bj->bi", self.weight[edge], x) + self.bias[edge]


class Objective(nn.Module):
    """Batch mean of ‖M_k(x) − target‖²/(4γ_k D): the KL divergence between the Gaussian steps, up to a constant, in
    nats per dimension."""

    def __init__(self, mean_map: TransitionMean) -> None:
        super().__init__()
        self.mean_map = mean_map

    def forward(self, x: Tensor, edge: Tensor, target: Tensor) -> Tensor:
        error = (self.mean_map(x, edge) - target) / expand(self.mean_map.noise_scale[edge - 1], x)
        return 0.5 * (error**2).mean()


def _network(config: ConfigDict, shape: tuple[int, ...]) -> nn.Module:
    model = config.model
    if len(shape) == 3:
        if str(model.get("embedding_type")).lower() == "fourier":
            raise ValueError("model.embedding_type='fourier': takes a logarithm, but the first edge has the label 0")
        if model.dropout:
            raise ValueError(f"model.dropout={model.dropout}: bridges are learned without, it must be 0")
        return create_network(config)
    if model.name == "affine":
        return PerEdgeAffine(*shape, config.bridge.num_steps)
    if model.name != "time_mlp":
        raise ValueError(f"model.name={model.name!r}: allowed for points are time_mlp, affine")
    return TimeConditionalMLP(*shape, width=model.width, depth=model.depth)


class BridgeRun:
    """Everything built from a config, checked before any work starts.

    Attributes:
        marginals: of x_0 and of x_N.
        reference: the reference process.
        num_half_bridges: 2·num_ipf.
        history: of the reference and of every finished half-bridge what was measured.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with config, data or working directory.
    """

    def __init__(self, config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> None:
        _check(config)
        self.config, self.workdir = config, Path(workdir)
        bridge = config.bridge
        self.gammas = step_sizes(bridge.ladder, bridge.num_steps, bridge.gamma_min, bridge.gamma_max)
        self.accelerator = runtime.accelerator()
        self._check_batches()
        with self.accelerator.main_process_first():
            self.marginals = get_marginals(config)
        mean, variance = moments(self.marginals[1], config.seed)
        brownian = bridge.reference == "brownian"
        self.reference = Reference(self.gammas, mean, math.inf if brownian else variance).to(self.device)
        self.regression = ALGORITHMS[bridge.algorithm]
        self.mean_maps = {direction: self._fresh(direction, 0) for direction in (BACKWARD, FORWARD)}
        self.averages = {name: EMA(mean_map, config.model.ema_rate) for name, mean_map in self.mean_maps.items()}
        self.store = CheckpointStore(
            self.workdir / "checkpoints",
            keep=2,
            milestone_every=config.training.n_iters if config.training.keep_half_bridges else 0,
        )
        self.step = 0
        self.history: list[dict[str, float | int | str]] = []
        self._sums: list[float] = []
        self._optimizer_state: dict | None = None

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def num_half_bridges(self) -> int:
        return 2 * self.config.bridge.num_ipf

    def start_of(self, direction: str) -> Marginal:
        """Where chains of a direction begin."""
        return self.marginals[0] if direction == FORWARD else self.marginals[1]

    def end_of(self, direction: str) -> Marginal:
        return self.start_of(opposite(direction))

    def _fresh(self, direction: str, half_bridge: int) -> TransitionMean:
        # One stream of initial weights for each direction: forward and backward do not start as twins.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_from(self.config.seed, "weights", direction, half_bridge))
            network = _network(self.config, self.marginals[0].shape)
        return TransitionMean(network, self.gammas, self.config.bridge.matching).to(self.device)

    def _check_batches(self) -> None:
        training, processes = self.config.training, self.accelerator.num_processes
        if training.batch_size % processes:
            raise ValueError(
                f"training.batch_size={training.batch_size}: must be a multiple of the {processes} process(es)"
            )
        if training.cache_size % training.batch_size:
            raise ValueError(
                f"training.cache_size={training.cache_size}: must be a multiple of "
                f"training.batch_size={training.batch_size}"
            )

    # -- files

    def claim(self) -> None:
        """Take the working directory, in the main process; refused in all if it is another's.

        Raises:
            ValueError: it belongs to something else, or to a run of other settings, or is in use.
        """
        error = None
        if self.accelerator.is_main_process:
            contents = {
                field: marginal.halves[0].fingerprint
                for field, marginal in zip(("data", "final"), self.marginals, strict=True)
                # Of files the fingerprint has dates in it, which a copy changes.
                if isinstance(marginal, ImageMarginal) and isinstance(marginal.halves[0], TensorSplit)
            }
            settings = {"version": VERSION, "contents of": contents, **self.config.to_dict()}
            for name in FREE:
                section, field = name.split(".")
                settings[section] = {key: value for key, value in settings[section].items() if key != field}
            try:
                claim(self.workdir, EXPERIMENT, settings)
            except ValueError as reason:
                error = str(reason)
        if error := next((e for e in gather_object([error]) if e), None):
            raise ValueError(error)

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one.

        Raises:
            CheckpointError: there are some, and none can be read or fits.
            ValueError: the processes see different folders.
        """
        state = self.store.load_latest()
        if state is not None:
            self._check_state(state)
        steps = gather_object([-1 if state is None else state["step"]])
        if any(step != steps[0] for step in steps):
            raise ValueError(
                f"--workdir={self.workdir}: the processes found checkpoints of different steps, {steps}; it must be "
                "one folder that all hosts share"
            )
        if state is None:
            return
        source = self.store.path(state["step"])
        for name, mean_map in self.mean_maps.items():
            load_state_dict_strictly(mean_map, state["mean_maps"][name], source)
            self.averages[name].load_state_dict(state["averages"][name])
        self.step, self.history, self._sums = state["step"], state["history"], state["sums"]
        self._optimizer_state = state["optimizer"]
        if state.get("scaler") is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _check_state(self, state: dict) -> None:
        kinds = {"step": int, "history": list, "sums": list, "mean_maps": dict, "averages": dict, "optimizer": dict}
        if wrong := [name for name, kind in kinds.items() if not isinstance(state.get(name), kind)]:
            raise CheckpointError(f"{self.store.directory}: no checkpoint of a bridge; wrong: {', '.join(wrong)}")
        if any(set(state[name]) != {BACKWARD, FORWARD} for name in ("mean_maps", "averages")):
            raise CheckpointError(f"{self.store.directory}: no checkpoint of a bridge; a direction is missing")
        begun = math.ceil(state["step"] / (2 * self.config.training.n_iters))
        if begun > self.config.bridge.num_ipf:
            raise ValueError(
                f"bridge.num_ipf={self.config.bridge.num_ipf}: this run has begun iteration {begun}; at least that"
            )

    def _save(self, optimizer: torch.optim.Optimizer, log: MetricsLog | None) -> None:
        weights = self.mean_maps[self.direction_of((self.step - 1) // self.config.training.n_iters)].parameters()
        if not all(bool(weight.isfinite().all()) for weight in weights):
            raise FloatingPointError(_NOT_FINITE.format("weights are", self.step))
        if self.accelerator.is_main_process:
            log.sync()
            state = {
                "step": self.step,
                "mean_maps": {name: mean_map.state_dict() for name, mean_map in self.mean_maps.items()},
                "averages": {name: average.state_dict() for name, average in self.averages.items()},
                "optimizer": optimizer.state_dict(),
                "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
                "sums": self._sums,
                "history": self.history,
            }
            self.store.save(state, self.step)
        self.accelerator.wait_for_everyone()

    # -- chains

    def mean_map(self, direction: str, half_bridge: int) -> MeanMap:
        """What ``direction`` moves by before half-bridge number ``half_bridge`` is learned: averaged weights, or the
        reference while the forward direction has none."""
        if half_bridge == 0 and direction == FORWARD:
            return self.reference
        average, size = self.averages[direction].model, self.config.evaluation.batch_size

        def averaged(x: Tensor, edge: Tensor) -> Tensor:
            with self.accelerator.autocast():
                parts = [average(*part) for part in zip(x.split(size), edge.split(size), strict=True)]
            return torch.cat(parts).to(x.dtype)

        return averaged

    def _noise(self, count: int, shape: tuple[int, ...], share: slice, key: Key) -> Callable[[], Tensor]:
        """Standard normal numbers for a share of ``count`` chains, again and again."""
        generator = torch.Generator().manual_seed(seed_from(self.config.seed, *key))
        return lambda: torch.randn((count, *shape), generator=generator)[share].to(self.device)

    def chains(self, direction: str, count: int, *, half_bridge: int, key: Key) -> Tensor:
        """``count`` chains (N + 1, count, …) from held-out data, on the CPU, without the last step's noise where data
        are ``sharp``.

        Args:
            direction: 'forward' or 'backward'.
            count: how many.
            half_bridge: the number that is learned next; ``num_half_bridges`` when all are.
            key: of their randomness.
        """
        start = self.start_of(direction)
        x = start.sample(count, (self.config.seed, *key, direction), test=True).to(self.device)
        noise = self._noise(count, start.shape, slice(None), (*key, direction))
        mean_map, sharp = self.mean_map(direction, half_bridge), self.end_of(direction).sharp
        return simulate(mean_map, x, self.gammas, direction, noise, noise_removal=sharp)[0].cpu()

    def _cache(self, half_bridge: int, refresh: int) -> Regression:
        """This process's part of what the half-bridge learns from until the next refresh."""
        learned = self.direction_of(half_bridge)
        simulated = opposite(learned)
        training, key = self.config.training, ("cache", half_bridge, refresh)
        count = training.cache_size
        part = count // self.accelerator.num_processes
        whole_share = range(count)[self.accelerator.process_index * part :][:part]
        share = slice(whole_share.start, whole_share.stop)
        start, other = self.start_of(simulated), None
        shape = start.shape
        if half_bridge == 0 and self.config.bridge.coupling == "independent":
            other = self.end_of(simulated).sample(count, (self.config.seed, *key, "other end"), share).to(self.device)
        x = start.sample(count, (self.config.seed, *key, "start"), share).to(self.device)
        noise = self._noise(count, shape, share, (*key, "noise"))
        return self.regression(learned, x, self.mean_map(simulated, half_bridge), self.reference, noise, other)

    @staticmethod
    def direction_of(half_bridge: int) -> str:
        return FORWARD if half_bridge % 2 else BACKWARD

    # -- learning

    def train(self, on_progress: Callable[[int], object] | None = None) -> None:
        """All half-bridges that are left, each measured when it is done.

        Args:
            on_progress: told of steps done, in place of the progress bar.

        Raises:
            FloatingPointError: the loss is not finite; the last checkpoint is good.
        """
        n_iters = self.config.training.n_iters
        total = self.num_half_bridges * n_iters
        main = self.accelerator.is_main_process
        if self.step >= total:
            if on_progress is not None:
                on_progress(total)
            return
        log = MetricsLog(self.workdir, self.step if self.step else -1) if main else None
        hidden = not main or on_progress is not None
        bar = tqdm(total=total, initial=self.step, unit="step", dynamic_ncols=True, disable=hidden)
        if on_progress is not None:
            on_progress(self.step)
        with bar, log or contextlib.nullcontext():
            if not self.history:
                self._measure(0, FORWARD, log)
            while self.step < total:
                half_bridge = self.step // n_iters
                bar.set_description(f"half-bridge {half_bridge + 1} of {self.num_half_bridges}")
                self._half_bridge(half_bridge, log, bar, on_progress)

    def _half_bridge(self, half_bridge: int, log: MetricsLog | None, bar: tqdm, on_progress: Callable | None) -> None:
        config, direction = self.config, self.direction_of(half_bridge)
        training, optim = config.training, config.optim
        first = half_bridge * training.n_iters
        if self.step == first:
            if not config.bridge.warm_start:
                self.mean_maps[direction] = self._fresh(direction, half_bridge)
            self.averages[direction] = EMA(self.mean_maps[direction], config.model.ema_rate)
            self._optimizer_state = None
        raw = Objective(self.mean_maps[direction])
        betas = (optim.beta1, optim.beta2)
        optimizer = torch.optim.Adam(raw.parameters(), lr=optim.lr, betas=betas, eps=optim.eps, fused=True)
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
        objective, prepared = self.accelerator.prepare(raw, optimizer)
        objective.train()
        cache: Regression | None = None
        while self.step < first + training.n_iters:
            refresh, position = divmod(self.step - first, training.refresh_freq)
            if cache is None or position == 0:
                cache = None  # the memory of the old one
                cache = self._cache(half_bridge, refresh)
            x, edge, target = self._batch(cache)
            loss = objective(x, edge, target)
            self.accelerator.backward(loss)
            if optim.cosine_decay:
                factor = 0.5 * (1 + math.cos(math.pi * (self.step - first) / training.n_iters))
                for group in prepared.param_groups:
                    group["lr"] = optim.lr * factor
            self.accelerator.clip_grad_norm_(objective.parameters(), optim.grad_clip)
            prepared.step()
            prepared.zero_grad()
            self.averages[direction].update(self.mean_maps[direction])
            self.step += 1
            self._sums.append(loss.detach())
            bar.update()
            if on_progress is not None:
                on_progress(1)
            at_end = self.step == first + training.n_iters
            if self.step % training.log_freq == 0 or at_end:
                self._log_loss(half_bridge, direction, log)
            if at_end:
                bar.set_description(f"half-bridge {half_bridge + 1} of {self.num_half_bridges}, measuring")
                self._measure(half_bridge + 1, direction, log)
            if self.step % training.save_freq == 0 or at_end:
                if self._sums:
                    # Of all processes, as one checkpoint is for all of them.
                    self._sums = self.accelerator.reduce(self._losses(), "mean").tolist()
                self._save(prepared, log)
        self.accelerator.free_memory()

    def _batch(self, cache: Regression) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs (b, …), edges (b,) and targets (b, …): one random edge of one random chain of each part."""
        training, count = self.config.training, cache.inputs.shape[1]
        share = training.batch_size // self.accelerator.num_processes
        mine = slice(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)
        generator = torch.Generator().manual_seed(seed_from(self.config.seed, "batch", self.step))
        part = count // share
        edge = torch.randint(len(self.gammas), (training.batch_size,), generator=generator)[mine]
        chosen = torch.randint(part, (training.batch_size,), generator=generator)[mine] + part * torch.arange(share)
        edge, chosen = edge.to(self.device), chosen.to(self.device)
        return cache.inputs[edge, chosen], edge + 1, cache.targets[edge, chosen]

    def _losses(self) -> Tensor:
        """This process's losses since the last row of the log."""
        return torch.stack([torch.as_tensor(value, device=self.device) for value in self._sums])

    def _log_loss(self, half_bridge: int, direction: str, log: MetricsLog | None) -> None:
        # Every process has its part of the batch, and the parts are of one size.
        loss = float(self.accelerator.reduce(self._losses().mean(), "mean"))
        if not math.isfinite(loss):
            raise FloatingPointError(_NOT_FINITE.format("the loss is", self.step))
        self._sums, self._last_loss = [], loss
        if log is not None:
            log.write(self.step, {"half_bridge": half_bridge + 1, f"loss_{direction}": loss})

    # -- measuring

    def _measure(self, half_bridge: int, direction: str, log: MetricsLog | None) -> None:
        """What has been learned so far, number 0 the reference: a row of the history. Every process computes it.

        Of several sets of samples the mean, and in ``…_error`` its standard error.
        """
        count, seed = self.config.evaluation.num_samples, self.config.seed
        row = {
            "half_bridge": half_bridge,
            "iteration": (half_bridge + 1) // 2,
            "direction": direction,
        }
        measured: dict[str, list[float]] = {"w2": [], "transport_cost": []}
        for number in range(self.config.evaluation.num_sets):
            states = self.chains(direction, count, half_bridge=half_bridge, key=("evaluation", number))
            first, last = (states[0], states[-1]) if direction == FORWARD else (states[-1], states[0])
            measured["w2"].append(wasserstein(last, self._true_samples(direction, "wanted", number), seed))
            measured["transport_cost"].append(mean_squared_displacement(first, last))
        for name, values in measured.items():
            row[name] = fmean(values)
            if len(values) > 1:
                row[f"{name}_error"] = stdev(values) / math.sqrt(len(values))
        if half_bridge:
            row["loss"] = self._last_loss
        self.history.append(row)
        if log is not None:
            numbers = {f"{name}_{direction}": row[name] for name in ("w2", "transport_cost")}
            log.write(self.step, {"half_bridge": half_bridge, **numbers})

    def _true_samples(self, direction: str, which: str, number: int) -> Tensor:
        count, key = self.config.evaluation.num_samples, (self.config.seed, "evaluation", which, number)
        return self.end_of(direction).sample(count, key, test=True)

    @cached_property
    def sampling_errors(self) -> dict[str, float]:
        """By direction: W₂ between two independent sets of as many samples of its end as are measured, the mean of as
        many pairs. No model can be below but by chance."""

        def distance(direction: str, number: int) -> float:
            pair = (self._true_samples(direction, which, number) for which in ("wanted", "other"))
            return wasserstein(*pair, self.config.seed)

        sets = range(self.config.evaluation.num_sets)
        return {direction: fmean(distance(direction, i) for i in sets) for direction in (BACKWARD, FORWARD)}


def _check(config: ConfigDict) -> None:
    """Fields that no module of its own checks."""
    if "bridge" not in config:
        raise ValueError("--config: no config of a bridge; those are in configs/dsb")
    for name, allowed in (("algorithm", tuple(ALGORITHMS)), ("reference", REFERENCES), ("coupling", COUPLINGS)):
        if config.bridge[name] not in allowed:
            raise ValueError(f"bridge.{name}={config.bridge[name]!r}: allowed are {', '.join(allowed)}")
    if config.bridge.coupling == "independent" and config.bridge.algorithm != "imf":
        raise ValueError("bridge.coupling='independent': IPF starts from the coupling of the reference; only imf can")
    at_least = {
        "bridge.num_ipf": 1,
        "training.n_iters": 1,
        "training.batch_size": 1,
        "training.cache_size": 1,
        "training.refresh_freq": 1,
        "training.log_freq": 1,
        "training.save_freq": 1,
        "evaluation.num_samples": 2,
        "evaluation.num_sets": 1,
        **({"model.width": 1, "model.depth": 1} if config.model.name == "time_mlp" else {}),
        "evaluation.batch_size": 1,
    }
    check_at_least(config.to_dict(), at_least)
    optim = config.optim
    for name in ("lr", "eps", "grad_clip"):
        if not 0 < optim[name] < math.inf:
            raise ValueError(f"optim.{name}={optim[name]}: allowed are positive numbers")
    for name in ("beta1", "beta2"):
        if not 0 <= optim[name] < 1:
            raise ValueError(f"optim.{name}={optim[name]}: allowed are numbers in [0, 1)")
    if config.seed < 0:
        raise ValueError(f"seed={config.seed}: at least 0")
