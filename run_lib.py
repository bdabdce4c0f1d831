"""Training, evaluation and sampling: the only place that knows configs, files, devices and processes.

A run lives in a working directory W:

    W/config.json            the config
    W/checkpoints/           see ``checkpoints``
    W/metrics.jsonl          one row per logged step
    W/tensorboard/           the same, for TensorBoard
    W/samples/               grids of samples made while training, or asked for
    W/eval/                  metrics.json, and the per-image results it was computed from

Everything random but dropout is keyed by (seed, purpose, step or index), and dropout's streams are in the checkpoint,
so a run that was interrupted continues to the very same result. An evaluation depends neither on the number of
processes nor, unless a solver that treats the batch as one system is chosen (scipy, dopri5), on the batch size.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object, set_seed
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

import datasets
import evaluation
from atomic_write import write_atomically
from checkpoints import (
    CheckpointError,
    CheckpointStore,
    capture_rng_state,
    load_score_sde_checkpoint,
    load_state_dict_strictly,
    read_checkpoint,
    restore_rng_state,
)
from configs.defaults import base_config
from conservativeness import EXACT_MAX_DIMENSION, asymmetry
from experiment_dir import differences, flatten
from likelihood import bits_per_dim, get_likelihood
from losses import Objective, get_objective
from metrics_log import MetricsLog
from models import EMA, create_score_model
from models.score import ScoreModel
from randomness import Generator, SampleGenerators, normal_like, seed_from, uniform
from sampling import get_sampler
from sde_lib import SDE, expand, get_sde

__all__ = ["Interrupted", "InvalidRun", "Runtime", "evaluate", "sample", "train"]

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DEVICES = ("auto", "cpu", "cuda", "mps")
GRID_IMAGES = 64
# Part of the key of every stored evaluation: to be raised when a fix changes what sampling, likelihood or asymmetry
# compute.
_EVALUATION_VERSION = 1

# A run may be continued with other values of these; any other difference makes it another experiment.
_FREE_IN_TRAINING = (
    "label",
    "eval.",
    "sampling.",
    "likelihood.",
    "data.path",
    "data.root",
    "data.download",
    "training.n_iters",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_",
    "training.keep_checkpoints",
)
# An evaluation need not repeat how the model was trained.
_FREE_IN_EVALUATION = (
    *_FREE_IN_TRAINING,
    "optim.",
    *(f"training.{name}" for name in ("batch_size", "init_from", "likelihood_weighting", "qc_", "reduce_mean")),
)


class InvalidRun(ValueError):
    """The config, data, checkpoint or working directory cannot be used; raised before any work."""


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been written."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command resumes")
        self.signal_number = signal_number


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute; without dropout none of it changes what is computed beyond rounding.

    Raises:
        InvalidRun: unknown or unavailable device or precision, or a number outside its range.
    """

    device: str = "auto"
    precision: str = "fp32"
    accumulation_steps: int = 1
    cache_dir: str = ""
    """Where evaluation keeps the feature classifier and the data's features; empty: W/eval/cache."""

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise InvalidRun(f"--device={self.device}: allowed are {', '.join(DEVICES)}")
        available = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
        if not available.get(self.device, lambda: True)():
            raise InvalidRun(f"--device={self.device}: no such device on this machine")
        if self.precision not in PRECISIONS:
            raise InvalidRun(f"--precision={self.precision}: allowed are {', '.join(PRECISIONS)}")
        if self.accumulation_steps < 1:
            raise InvalidRun(f"--accumulation_steps={self.accumulation_steps}: at least 1")

    def accelerator(self) -> Accelerator:
        # Left to itself accelerate takes CUDA, or else MPS. That there is neither it must be told, or several
        # processes on CPUs would not find each other.
        accelerated = torch.cuda.is_available() or torch.backends.mps.is_available()
        return Accelerator(
            cpu=self.device == "cpu" or not accelerated,
            mixed_precision=PRECISIONS[self.precision],
            gradient_accumulation_steps=self.accumulation_steps,
            # While the main process trains the feature classifier or draws samples the others wait.
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=12))],
        )


@contextlib.contextmanager
def _checked() -> Iterator[None]:
    """Errors of preparation become InvalidRun, so that a caller can tell bad input from a defect."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidRun(str(error)) from error


# ---------------------------------------------------------------------------------------------------------------
# What training and evaluation share


class _Run:
    """Everything built from a config, checked before any work starts.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with config, data or working directory.
    """

    def __init__(
        self, config: ConfigDict, workdir: str | Path, runtime: Runtime, *, free_fields: tuple[str, ...]
    ) -> None:
        self.config = config
        self.workdir = Path(workdir)
        self.runtime = runtime
        _check_numbers(config)
        self.sde: SDE = get_sde(config)
        torch.manual_seed(config.seed)
        self.score_model: ScoreModel = create_score_model(config, self.sde)
        self.objective: Objective = get_objective(config, self.score_model)
        self.ema = EMA(self.score_model, config.model.ema_rate)
        self.sampler = get_sampler(config, self.sde)
        self.likelihood = get_likelihood(config, self.sde)
        self.accelerator = runtime.accelerator()
        self._check_batch_size()
        with self.main_process_first():
            self.train_data, self.test_data = datasets.get_dataset(config)
            self._check_workdir(free_fields)
        self.store = CheckpointStore(
            self.workdir / "checkpoints",
            keep=config.training.keep_checkpoints,
            milestone_every=config.training.snapshot_freq,
        )

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dimension(self) -> int:
        return math.prod(self.train_data.image_shape)

    def main_process_first(self) -> contextlib.AbstractContextManager:
        return self.accelerator.main_process_first()

    def progress(self, **options) -> tqdm:
        return tqdm(disable=not self.accelerator.is_main_process, dynamic_ncols=True, **options)

    def to_model(self, images: Tensor, generator: Generator, *, dequantize: bool) -> Tensor:
        """Pixel levels (B, C, H, W), uint8, as the model sees them."""
        noise = uniform(images.shape, generator) if dequantize else None
        x = datasets.to_unit_interval(images, self.train_data.num_levels, dequantization=noise)
        return datasets.scale(x, self.config.data.centered)

    def to_pixels(self, x: Tensor) -> Tensor:
        x = datasets.unscale(x.float(), self.config.data.centered)
        return datasets.to_pixels(x, self.train_data.num_levels, self.config.data.uniform_dequantization)

    def score(self, x: Tensor, t: Tensor) -> Tensor:
        """The score of the moving average, in the precision asked for; float32 in and out."""
        with self.accelerator.autocast():
            return self.ema.model(x, t).to(x.dtype)

    def _check_batch_size(self) -> None:
        batch_size = self.config.training.batch_size
        parts = self.accelerator.num_processes * self.runtime.accumulation_steps
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"training.batch_size={batch_size}: must be a positive multiple of {self.accelerator.num_processes} "
                f"process(es) × {self.runtime.accumulation_steps} accumulation step(s)"
            )

    def _check_workdir(self, free_fields: tuple[str, ...]) -> None:
        if self.workdir.exists() and not self.workdir.is_dir():
            raise ValueError(f"--workdir={self.workdir}: is a file, not a folder")
        if (self.workdir / "experiment.json").exists():
            raise ValueError(f"--workdir={self.workdir}: belongs to one of the examples; choose another folder")
        path = self.workdir / "config.json"
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        # A field that the run was stored without did not exist then; it had what is now its default.
        stored = {**flatten(json.loads(base_config().to_json())), **flatten(stored)}
        if different := differences(stored, json.loads(self.config.to_json()), free_fields):
            raise ValueError(f"--workdir={self.workdir} holds another run: {different}")

    def write_config(self) -> None:
        if self.accelerator.is_main_process:
            _write_text(self.workdir / "config.json", self.config.to_json(indent=1, sort_keys=True) + "\n")

    def restore_weights(self, state: dict, source: object) -> None:
        """Weights and moving average from one of our checkpoints."""
        load_state_dict_strictly(self.score_model, state["model"], source)
        self.ema.load_state_dict(state["ema"])


def _check_numbers(config: ConfigDict) -> None:
    """Fields that no module of its own checks."""
    at_least = {
        "training.n_iters": 1,
        "training.log_freq": 1,
        "training.eval_freq": 1,
        "training.snapshot_freq_for_preemption": 1,
        "optim.warmup": 0,
        "eval.batch_size": 1,
        "eval.num_samples": 1,
        "eval.asym_levels": 1,
        "eval.asym_images": 0,
        "eval.asym_probes": 0,
    }
    flat = flatten(config.to_dict())
    for name, bound in at_least.items():
        if flat[name] < bound:
            raise ValueError(f"{name}={flat[name]}: at least {bound}")
    if not config.optim.lr > 0:
        raise ValueError(f"optim.lr={config.optim.lr}: allowed are positive numbers")
    if config.optim.optimizer != "Adam":
        raise ValueError(f"optim.optimizer={config.optim.optimizer!r}: allowed is Adam")
    if config.model.get("num_classes", 0):
        raise ValueError(f"model.num_classes={config.model.num_classes}: runs are unconditional, leave it out")
    dimension = config.data.num_channels * config.data.image_size**2
    if config.eval.asym_probes == 0 and dimension > EXACT_MAX_DIMENSION:
        raise ValueError(
            f"eval.asym_probes=0: the exact Jacobian is for at most {EXACT_MAX_DIMENSION} dimensions, "
            f"these images have {dimension}"
        )


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _write_arrays(path: Path, **arrays) -> None:
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def _code_version() -> str:
    """The commit the code is at, with a mark if files differ from it; 'unknown' outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def save_image_grid(path: Path, images: np.ndarray, num_levels: int) -> None:
    """Write up to 64 images, uint8 levels (N, H, W, C), as one PNG in rows of eight."""
    from PIL import Image

    images = images[:GRID_IMAGES].astype(np.float32) * (255 / (num_levels - 1))
    columns = min(8, len(images))
    rows = math.ceil(len(images) / columns)
    _, height, width, channels = images.shape
    gap = 1
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255.0, np.float32)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.round().astype(np.uint8).squeeze())
    enlarge = max(1, 64 // height)  # tiny images would be unreadable pixel for pixel
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    write_atomically(path, lambda file: picture.save(file, format="png"))


# ---------------------------------------------------------------------------------------------------------------
# Training


def train(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> None:
    """Train until ``config.training.n_iters`` steps are done, resuming from the newest checkpoint in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: the loss is not finite; the last checkpoint is good.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    with _checked():
        training = _Training(_Run(config, workdir, runtime, free_fields=_FREE_IN_TRAINING))
    training.loop()


class _Training:
    """The state of a training run: what a checkpoint holds."""

    def __init__(self, run: _Run) -> None:
        self.run, self.config, self.accelerator = run, run.config, run.accelerator
        self.step = 0
        self.sums: dict[str, list[float]] = {}  # of each logged quantity since the last row: total, count
        optim = self.config.optim
        run.ema.model.to(run.device)
        objective = run.objective.to(run.device)
        optimizer = torch.optim.Adam(
            [p for p in run.score_model.parameters() if p.requires_grad],
            lr=optim.lr,
            betas=(optim.beta1, 0.999),
            eps=optim.eps,
            weight_decay=optim.weight_decay,
            fused=True,
        )
        # Streams of dropout; everything else is keyed by step and sample.
        set_seed(seed_from(self.config.seed, "dropout", self.accelerator.process_index))
        self.optimizer = optimizer
        settings = [{**group, "params": None} for group in optimizer.param_groups]
        self._restore()
        # A loaded state brings the settings of the run it came from; those of this config hold.
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update({name: value for name, value in own.items() if name != "params"})
        self.objective, self.optimizer = self.accelerator.prepare(objective, optimizer)
        self.test_objective = Objective(
            run.ema.model,
            likelihood_weighting=self.config.training.likelihood_weighting,
            reduce_mean=self.config.training.reduce_mean,
        )
        self.signal_number = 0

    # -- checkpoints

    def _restore(self) -> None:
        state = self.run.store.load_latest()
        if state is not None:
            self.run.restore_weights(state, self.run.store.path(state["step"]))
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.sums = state["step"], state["sums"]
            if state["data"] != self.run.train_data.fingerprint:
                logger.warning("the training data are not, or not known to be, those of %s", self.run.workdir)
            states = state["rng"]
            if self.accelerator.process_index < len(states):
                restore_rng_state(states[self.accelerator.process_index])
            if state["scaler"] is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        elif self.config.training.init_from:
            self._start_from(Path(self.config.training.init_from))

    def _start_from(self, path: Path) -> None:
        """Weights, averages, optimiser and step of another run, as the paper starts QC from U."""
        if path.is_dir():
            state = CheckpointStore(path / "checkpoints", keep=1, milestone_every=0).load_latest()
            if state is None:
                raise CheckpointError(f"training.init_from={path}: no checkpoint in {path / 'checkpoints'}")
        else:
            state = read_checkpoint(path)
        if "sums" in state:  # one of ours
            self.run.restore_weights(state, path)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]
        else:
            _refuse_public_conservative(self.config, path)
            network, average = self.run.score_model.network, self.run.ema.model.network
            self.step = load_score_sde_checkpoint(path, network, ema=False)
            load_score_sde_checkpoint(path, average, ema=True)
            self.run.ema.num_updates = int(state["ema"]["num_updates"])
        if self.step >= self.config.training.n_iters:
            raise ValueError(
                f"training.n_iters={self.config.training.n_iters}: training.init_from={path} has done "
                f"{self.step} steps already"
            )

    def _save(self) -> None:
        rng = gather_object([capture_rng_state()])
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            state = {
                "step": self.step,
                "model": self.accelerator.unwrap_model(self.objective).score_model.state_dict(),
                "ema": self.run.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "sums": self.sums,
                "data": self.run.train_data.fingerprint,
                "rng": rng,
                "config": self.config.to_json(),
                "code_version": _code_version(),
            }
            self.run.store.save(state, self.step)
        self.accelerator.wait_for_everyone()

    # -- data

    def _positions(self) -> range:
        """Where this process's share lies in the batch of all processes."""
        share = self.config.training.batch_size // self.accelerator.num_processes
        return range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def _images(self, step: int) -> Tensor:
        indices = datasets.batch_indices(
            self.config.seed,
            step,
            self.config.training.batch_size,
            len(self.run.train_data),
            process_index=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        return self.run.train_data.batch(indices)[0]

    def _batches(self) -> Iterator[Tensor]:
        """The images of this and all later steps; files are decoded one step ahead in a thread."""
        steps = range(self.step, self.config.training.n_iters)
        if isinstance(self.run.train_data, datasets.TensorSplit):
            # Already in memory: a thread would bring OpenMP workers of its own, which cost more than they save.
            yield from map(self._images, steps)
            return
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self._images, steps[0])
            for step in steps:
                images = upcoming.result()
                if step < steps[-1]:
                    upcoming = reader.submit(self._images, step + 1)
                yield images

    # -- the loop

    def loop(self) -> None:
        config, accelerator = self.config, self.accelerator
        n_iters = config.training.n_iters
        if self.step >= n_iters:
            logger.info("%s: trained for %d steps already", self.run.workdir, self.step)
            return
        self.run.write_config()
        log = MetricsLog(self.run.workdir, self.step) if accelerator.is_main_process else None
        started = time.monotonic()
        last_row = (started, self.step)
        bar = self.run.progress(total=n_iters, initial=self.step, unit="step", desc=f"train {self.run.workdir.name}")
        with self._signals(), bar, log or contextlib.nullcontext():
            for images in self._batches():
                self._train_step(images)
                bar.update()
                stopping = self._should_stop()
                every = config.training
                at_end = self.step == n_iters
                if self.step % every.log_freq == 0 or at_end:
                    row = self._means()
                    now = time.monotonic()
                    row["seconds"] = round(now - started, 3)
                    row["images_per_second"] = every.batch_size * (self.step - last_row[1]) / (now - last_row[0])
                    last_row = (now, self.step)
                    bar.set_postfix(loss=f"{row['loss']:.4g}")
                    if log is not None:
                        log.write(self.step, row)
                if self.step % every.eval_freq == 0 or at_end:
                    value = self._test_loss()
                    if log is not None:
                        log.write(self.step, {"eval_loss": value})
                snapshot = bool(every.snapshot_freq) and self.step % every.snapshot_freq == 0
                if snapshot or at_end or stopping or self.step % every.snapshot_freq_for_preemption == 0:
                    self._check_finite()
                    self._save()
                if stopping:
                    raise Interrupted(stopping)
                if (snapshot or at_end) and every.snapshot_sampling:
                    self._sample_grid()

    def _train_step(self, images: Tensor) -> None:
        config, accelerator = self.config, self.accelerator
        self.objective.train()
        # step + 1: the source's step/warmup makes the first step one of size zero.
        warmup = min((self.step + 1) / config.optim.warmup, 1.0) if config.optim.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * warmup
        micro_batches = zip(
            images.chunk(self.run.runtime.accumulation_steps),
            np.array_split(np.array(self._positions()), self.run.runtime.accumulation_steps),
            strict=True,
        )
        for micro, positions in micro_batches:
            with accelerator.accumulate(self.objective):
                generator = SampleGenerators((config.seed, "train", self.step), positions)
                x0 = self.run.to_model(micro, generator, dequantize=config.data.uniform_dequantization)
                if config.data.random_flip:
                    x0 = datasets.random_flip(x0, generator)
                terms = self.objective(x0.to(self.run.device), generator, step=self.step)
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients:
                    limit = config.optim.grad_clip if config.optim.grad_clip >= 0 else math.inf
                    terms["grad_norm"] = accelerator.clip_grad_norm_(self.objective.parameters(), limit)
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in terms.items():
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value.detach(), count + 1]
        self.run.ema.update(accelerator.unwrap_model(self.objective).score_model)
        self.step += 1

    def _check_finite(self) -> None:
        """A loss or gradient that was not finite in any step since the last row leaves its mark in the sum."""
        self.sums = {name: [float(total), count] for name, (total, count) in self.sums.items()}
        # With a gradient scaler (fp16) infinite gradients are part of the search for the scale, and skipped.
        checked = ("loss",) if self.accelerator.scaler is not None else ("loss", "grad_norm")
        for name in checked:
            if name in self.sums and not math.isfinite(self.sums[name][0]):
                raise FloatingPointError(
                    f"{name} is not finite at or before step {self.step}; the last checkpoint in "
                    f"{self.run.store.directory} is good. Try a smaller optim.lr or training.qc_weight, or "
                    "--precision=fp32"
                )

    def _means(self) -> dict[str, float]:
        """The mean over processes and over the steps since the last row of every logged quantity."""
        self._check_finite()
        names = sorted(self.sums)
        means = torch.tensor([self.sums[n][0] / self.sums[n][1] for n in names], dtype=torch.float32)
        means = self.accelerator.reduce(means.to(self.run.device), reduction="mean").tolist()
        self.sums = {}
        row = dict(zip(names, means, strict=True))
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        return row

    @torch.no_grad()
    def _test_loss(self) -> float:
        """The score-matching loss of the moving average on (up to eval.batch_size) test images, always with the
        same times and noise."""
        count = min(self.config.eval.batch_size, len(self.run.test_data))
        generator = SampleGenerators((self.config.seed, "test loss"), range(count))
        images, _ = self.run.test_data.batch(_spread(torch.arange(count), count, len(self.run.test_data)))
        x0 = self.run.to_model(images, generator, dequantize=self.config.data.uniform_dequantization)
        return float(self.test_objective(x0.to(self.run.device), generator)["dsm"])

    def _sample_grid(self) -> None:
        if self.accelerator.is_main_process:
            indices = range(GRID_IMAGES)
            images = _draw(self.run, indices, progress=True)[0]
            path = self.run.workdir / "samples" / f"step_{self.step:08d}.png"
            save_image_grid(path, images, self.run.train_data.num_levels)
        self.accelerator.wait_for_everyone()

    # -- signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are remembered and acted on at the end of a step; a second one acts at once."""

        def remember(number: int, frame: object) -> None:
            self.signal_number = number
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _should_stop(self) -> int:
        """The signal that any process has received, or 0; all processes agree."""
        if self.accelerator.num_processes == 1:
            return self.signal_number
        # Asking every process costs a synchronisation, so it is not done at every step.
        return 0 if self.step % 10 else max(gather_object([self.signal_number]))


# ---------------------------------------------------------------------------------------------------------------
# Evaluation and sampling


def evaluate(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> dict:
    """Evaluate the moving average of a checkpoint; write and return ``W/eval/metrics.json``.

    Finished stages are kept with a key that names weights, settings and data, and reused only under that key;
    within a stage every finished batch is kept until the stage is done.

    Args:
        config, workdir, runtime: the run.
        checkpoint: one of ours or of score_sde_pytorch; None: the newest in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
    """
    with _checked():
        run = _run_for_evaluation(config, workdir, runtime, checkpoint)
        step = _load_for_evaluation(run, checkpoint)
        _check_evaluation(run)
    enabled = config.eval
    metrics: dict = {"checkpoint_step": step, "sampler": _sampler_name(config)}
    names = "nll_bits_per_dim nll_bits_per_dim_se nfe_likelihood asym asym_se nasym nasym_se fid kid kid_se "
    names += "inception_score inception_score_std precision recall density coverage nfe_sampling num_samples "
    names += "features feature_test_accuracy"
    metrics.update(dict.fromkeys(names.split()))
    if not (run.workdir / "config.json").exists():  # a checkpoint from elsewhere
        run.write_config()
    if enabled.enable_bpd:
        metrics.update(_evaluate_nll(run))
    if enabled.enable_asymmetry:
        metrics.update(_evaluate_asymmetry(run))
    if enabled.enable_sampling:
        metrics.update(_evaluate_samples(run))
    if run.accelerator.is_main_process:
        _write_text(run.workdir / "eval" / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
    return metrics


def sample(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> Path:
    """Draw ``config.eval.num_samples`` samples from a checkpoint; return the folder with samples.npz and grid.png.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
    """
    with _checked():
        run = _run_for_evaluation(config, workdir, runtime, checkpoint)
        step = _load_for_evaluation(run, checkpoint)
    arrays = _sample_stage(run)
    sampling = config.sampling
    how = f"pc-{sampling.predictor}-{sampling.corrector}" if sampling.method == "pc" else f"ode-{sampling.solver}"
    if sampling.method == "pc" or sampling.solver == "heun":
        how += f"-{sampling.num_steps or config.model.num_scales}"
    folder = run.workdir / "samples" / f"step_{step:08d}-{how}"
    if run.accelerator.is_main_process:
        _write_arrays(folder / "samples.npz", images=arrays["images"], num_levels=run.train_data.num_levels)
        save_image_grid(folder / "grid.png", arrays["images"], run.train_data.num_levels)
    return folder


def _run_for_evaluation(
    config: ConfigDict, workdir: str | Path, runtime: Runtime, checkpoint: str | Path | None
) -> _Run:
    if checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(f"--checkpoint={checkpoint}: no such file")
    return _Run(config, workdir, runtime, free_fields=_FREE_IN_EVALUATION)


def _check_evaluation(run: _Run) -> None:
    """What would otherwise fail only after hours of sampling."""
    settings = run.config.eval
    if settings.enable_sampling and run.train_data.num_classes is None:
        raise ValueError(
            f"data.dataset={run.config.data.dataset!r}: it has no labels to train the feature classifier of FID on; "
            "use --config.eval.enable_sampling=False, and --mode=sample for samples"
        )
    if settings.enable_sampling and settings.num_samples < 4:
        raise ValueError(f"eval.num_samples={settings.num_samples}: FID and its relatives need at least 4")


def _load_for_evaluation(run: _Run, checkpoint: str | Path | None) -> int:
    """Put the averaged weights of a checkpoint into ``run.ema``; return its step."""
    if checkpoint is None:
        state = run.store.load_latest()
        if state is None:
            raise CheckpointError(f"no checkpoint in {run.store.directory}: train first, or give --checkpoint")
        source: object = run.store.path(state["step"])
    else:
        state, source = read_checkpoint(checkpoint), checkpoint
    if "sums" in state:
        load_state_dict_strictly(run.ema.model, state["ema"]["model"], source)
        step = state["step"]
    else:
        _refuse_public_conservative(run.config, source)
        step = load_score_sde_checkpoint(source, run.ema.model.network, ema=True)
    run.ema.model.to(run.device)
    return step


def _refuse_public_conservative(config: ConfigDict, source: object) -> None:
    if config.model.parameterization == "conservative":
        raise CheckpointError(
            f"{source} is in the public format, whose conservative models are ∇(−‖h/σ‖²/(2σ)) and not Eq. 10: "
            "model.parameterization must be unconstrained"
        )


def _sampler_name(config: ConfigDict) -> str:
    sampling = config.sampling
    steps = sampling.num_steps or config.model.num_scales
    if sampling.method == "pc":
        return f"PC, {sampling.predictor} + {sampling.corrector}, {steps} steps"
    if sampling.solver == "heun":
        return f"ODE, heun, {steps} steps"
    return f"ODE, {sampling.solver}, rtol {sampling.rtol:g}, atol {sampling.atol:g}"


def _stage(
    run: _Run, name: str, size: int, settings: dict, compute: Callable[[Tensor], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Compute per-item arrays for items 0 … size−1 in batches over all processes, keeping finished work.

    ``compute`` maps indices (b,) to arrays of b rows. The result is kept in W/eval/NAME.npz; the batches on the
    way there in W/eval/parts/.
    """
    weights = hashlib.blake2b(digest_size=16)
    for parameter_name, tensor in sorted(run.ema.model.state_dict().items()):
        weights.update(parameter_name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    identity = {
        "version": _EVALUATION_VERSION,
        "stage": name,
        "size": size,
        "seed": run.config.seed,
        "weights": weights.hexdigest(),
        "training": {name: run.config.training[name] for name in ("sde", "continuous")},
        "model": json.loads(run.config.model.to_json()),
        "precision": run.runtime.precision,
        **settings,
    }
    if {"scipy", "dopri5"} & {run.config.sampling.solver, run.config.likelihood.solver}:
        identity["batch_size"] = run.config.eval.batch_size  # these integrate a batch as one system
    key = hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    folder = run.workdir / "eval"
    result = _read_arrays(folder / f"{name}.npz", key)
    # All processes must take the same branch even if one cannot read the file.
    if all(gather_object([result is not None])):
        return result

    parts = folder / "parts" / f"{name}-{key}"
    batches = datasets.epoch_batches(
        size, run.config.eval.batch_size, run.accelerator.process_index, run.accelerator.num_processes
    )
    collected = []
    for indices in run.progress(iterable=batches, desc=f"{name} {run.workdir.name}", unit="batch"):
        path = parts / f"{int(indices[0])}-{int(indices[-1])}.npz"
        arrays = _read_arrays(path, key)
        if arrays is None:
            arrays = compute(indices)
            _write_arrays(path, key=key, **arrays)
        collected.append(arrays)
    collected = gather_object(collected)
    result = {field: np.concatenate([part[field] for part in collected]) for field in collected[0]}
    if run.accelerator.is_main_process:
        _write_arrays(folder / f"{name}.npz", key=key, **result)
        shutil.rmtree(parts)
    run.accelerator.wait_for_everyone()
    return result


def _read_arrays(path: Path, key: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file, or None if it is missing, damaged, or stored under another key."""
    if not path.exists():
        return None
    try:
        # Opened here because numpy leaves a damaged file open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {field: file[field] for field in file.files}
    except Exception as error:  # numpy and zipfile raise half a dozen unrelated types on damaged files
        logger.warning("%s is damaged (%s) and is computed again", path, error)
        return None
    return arrays if str(arrays.pop("key", "")) == key else None


def _spread(positions: Tensor, count: int, size: int) -> Tensor:
    """Indices of ``count`` evenly spaced items of ``size``: data sets are often sorted by class."""
    return positions * size // count


def _mean_and_se(values: np.ndarray) -> tuple[float, float]:
    se = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), se


def _evaluate_nll(run: _Run) -> dict:
    """Bits per dimension of the whole, uniformly dequantised test set."""
    data, centered = run.test_data, run.config.data.centered

    def compute(indices: Tensor) -> dict[str, np.ndarray]:
        generator = SampleGenerators((run.config.seed, "likelihood"), indices.tolist())
        x = run.to_model(data.batch(indices)[0], generator, dequantize=True).to(run.device)
        result = run.likelihood(run.score, x, generator)
        bits = bits_per_dim(result.log_prob, run.dimension, num_levels=data.num_levels, centered=centered)
        return {"nll_bits_per_dim": bits.cpu().numpy(), "nfe": np.full(len(x), result.nfe)}

    settings = {"data": data.fingerprint, "centered": centered, "likelihood": run.config.likelihood.to_dict()}
    arrays = _stage(run, "nll", len(data), settings, compute)
    mean, se = _mean_and_se(arrays["nll_bits_per_dim"])
    return {
        "nll_bits_per_dim": mean,
        "nll_bits_per_dim_se": se,
        "nfe_likelihood": float(arrays["nfe"].mean()),
    }


def _evaluate_asymmetry(run: _Run) -> dict:
    """Asym and NAsym at times i/T, i = 1 … T, over test images perturbed with their own noise."""
    settings, data = run.config.eval, run.test_data
    levels = settings.asym_levels
    images_per_level = min(settings.asym_images or len(data), len(data))
    times = torch.arange(1, levels + 1) / levels * run.sde.end_time

    def compute(items: Tensor) -> dict[str, np.ndarray]:
        indices, level = _spread(items // levels, images_per_level, len(data)), items % levels
        generator = SampleGenerators((run.config.seed, "asymmetry"), items.tolist())
        images = data.batch(indices)[0]
        x0 = run.to_model(images, generator, dequantize=run.config.data.uniform_dequantization).to(run.device)
        t = times[level].to(run.device)
        mean, std = run.sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator)
        result = asymmetry(run.score, xt, t, probes=settings.asym_probes or None, generator=generator)
        return {"asym": result.asym.cpu().numpy(), "nasym": result.nasym.cpu().numpy()}

    identity = {
        "data": data.fingerprint,
        "centered": run.config.data.centered,
        "dequantized": run.config.data.uniform_dequantization,
        "levels": levels,
        "probes": settings.asym_probes,
    }
    arrays = _stage(run, "asymmetry_items", images_per_level * levels, identity, compute)
    metrics, curves = {}, {"t": times.numpy(), "sigma": run.sde.std(times).numpy()}
    for name in ("asym", "nasym"):
        values = arrays[name].astype(np.float64).reshape(images_per_level, levels)
        # One image gives values at all levels, so images are what is independent.
        metrics[name], metrics[f"{name}_se"] = _mean_and_se(values.mean(1))
        curves[name] = values.mean(0)
        curves[f"{name}_se"] = values.std(0, ddof=1) / math.sqrt(images_per_level)
    if run.accelerator.is_main_process:
        _write_arrays(run.workdir / "eval" / "asymmetry.npz", **curves)
    return metrics


def _draw(run: _Run, indices: Sequence[int], *, progress: bool = False) -> tuple[np.ndarray, float]:
    """Samples number ``indices`` as uint8 levels (B, H, W, C), and network evaluations per sample."""
    generator = SampleGenerators((run.config.seed, "samples"), indices)
    like = torch.zeros((len(indices), *run.train_data.image_shape), device=run.device)
    samples = run.sampler(run.score, like, generator, progress=progress)
    return run.to_pixels(samples.x).permute(0, 2, 3, 1).cpu().numpy(), samples.nfe


def _sample_stage(run: _Run) -> dict[str, np.ndarray]:
    def compute(indices: Tensor) -> dict[str, np.ndarray]:
        images, nfe = _draw(run, indices.tolist(), progress=run.accelerator.is_main_process)
        return {"images": images, "nfe": np.full(len(images), nfe)}

    settings = {
        "sampling": run.config.sampling.to_dict(),
        "centered": run.config.data.centered,
        "dequantized": run.config.data.uniform_dequantization,
        "num_levels": run.train_data.num_levels,
        "image_shape": run.train_data.image_shape,
    }
    return _stage(run, "sample_items", run.config.eval.num_samples, settings, compute)


def _evaluate_samples(run: _Run) -> dict:
    """FID, KID, IS, precision and recall of samples against the training set."""
    config = run.config
    arrays = _sample_stage(run)
    metrics: dict = {"nfe_sampling": float(arrays["nfe"].mean()), "num_samples": len(arrays["images"])}
    if run.accelerator.is_main_process:
        num_levels = run.train_data.num_levels
        _write_arrays(run.workdir / "eval" / "samples.npz", images=arrays["images"], num_levels=num_levels)
        save_image_grid(run.workdir / "eval" / "samples.png", arrays["images"], num_levels)
        cache = Path(run.runtime.cache_dir or run.workdir / "eval" / "cache")
        extractor = evaluation.train_classifier(
            run.train_data, run.test_data, seed=config.seed, cache_dir=cache, device=run.device
        )
        batch_size = config.eval.batch_size
        real = evaluation.dataset_features(run.train_data, extractor, cache_dir=cache, batch_size=batch_size)
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        generated = evaluation.extract_features(extractor, images.split(batch_size), len(images))
        # The distances between features are in double precision, which MPS does not have.
        device = "cpu" if run.device.type == "mps" else run.device
        metrics.update(evaluation.sample_quality(real, generated, seed=config.seed, device=device))
        metrics.update(features=extractor.name, feature_test_accuracy=extractor.test_accuracy)
    run.accelerator.wait_for_everyone()
    return metrics
