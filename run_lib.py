"""Training, evaluation and sampling: the only place that knows configs, files, devices and processes.

A run lives in a working directory W:

    W/config.json            the config
    W/checkpoints/           see ``checkpoints``
    W/metrics.jsonl          one row per logged step
    W/tensorboard/           the same, for TensorBoard
    W/samples/               grids of samples made while training; samples that were asked for
    W/classifier/            see ``run_classifier``
    W/eval/                  metrics.json, and the per-image results it was computed from

Everything random is keyed by (seed, purpose, step or index), so a run that was interrupted continues to the very same
result, and the number of processes changes nothing but rounding.

This file is training, and the door to the rest: ``run_setup`` builds and checks a run, ``run_evaluation`` measures it,
``run_sampling`` draws samples from it, ``run_classifier`` trains the classifier that may guide them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from ml_collections import ConfigDict
from torch import Tensor, distributed

from checkpoints import (
    CheckpointError,
    CheckpointStore,
    check_whole,
    read_checkpoint,
)
from data import FileSplit, TensorSplit, random_flip, sets
from experiment.metrics_log import MetricsLog
from experiment.randomness import SampleGenerators, uniform
from experiment.runtime import keep_freed_memory
from losses import Objective
from models.published import convert_public_checkpoint
from run_classifier import train_classifier
from run_evaluation import draw, evaluate, refuse_public_conservative, spread, statistics
from run_sampling import sample
from run_setup import (
    COLLECTIVE_TIMEOUT,
    FREE_IN_TRAINING,
    GRID_IMAGES,
    Interrupted,
    InvalidRun,
    Run,
    Runtime,
    checked,
    code_version,
    save_image_grid,
)

__all__ = ["Interrupted", "InvalidRun", "Runtime", "evaluate", "sample", "statistics", "train", "train_classifier"]

logger = logging.getLogger(__name__)


def train(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> None:
    """Train until ``config.training.n_iters`` steps are done, resuming from the newest checkpoint in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: the loss is not finite; the last checkpoint is good.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    with contextlib.ExitStack() as stack:
        with checked():
            if config.sampling.condition not in ("", "class_free"):
                raise ValueError(f"sampling.condition={config.sampling.condition!r}: not while training")
            training = Training(Run(config, workdir, runtime, free_fields=FREE_IN_TRAINING))
            stack.enter_context(training.run.alone("training"))
        training.loop()


def _check_compiled_training(config: ConfigDict) -> None:
    if config.training.activation_checkpointing:
        raise ValueError(
            "--compile: not while training with training.activation_checkpointing=True, which leaves torch.compile "
            "next to nothing to join"
        )
    if config.training.qc_weight and config.training.qc_estimator == "exact":
        raise ValueError("--compile: not while training with training.qc_estimator='exact'")


class Training:
    """The state of a training run: what a checkpoint holds."""

    def __init__(self, run: Run) -> None:
        if run.runtime.compile:
            _check_compiled_training(run.config)
        self.run, self.config, self.accelerator = run, run.config, run.accelerator
        self.step = 0
        self.sums: dict[str, list[float]] = {}  # of each logged quantity since the last row: total, count
        optim = self.config.optim
        if run.device.type == "cpu":
            keep_freed_memory()
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
        self.optimizer = optimizer
        settings = [{**group, "params": None} for group in optimizer.param_groups]
        self._restore()
        run.check_agreement("the step to go on from", self.step)
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
        self.signals: _SharedMaximum | None = None
        if self.accelerator.num_processes > 1:
            self.signals = _SharedMaximum()

    # -- checkpoints

    def _restore(self) -> None:
        state = self.run.store.load_latest()
        if state is not None:
            check_whole(state, self.run.store.directory)
            self._check_data(state.get("data"))
            self.run.restore_weights(state, self.run.store.path(state["step"]))
            self._load_optimizer(state["optimizer"])
            self.step, self.sums = state["step"], state["sums"]
            if state.get("scaler") is not None and self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(state["scaler"])
        elif self.config.training.init_from:
            self._start_from(Path(self.config.training.init_from))

    def _check_data(self, fingerprint: str | None) -> None:
        """A run goes on with the data that it began with. Of image files, dates are all that is compared."""
        data = self.run.train_data
        if fingerprint == data.fingerprint:
            return
        if fingerprint is None or isinstance(data, FileSplit):
            logger.warning("the training data are not, or not known to be, those of %s", self.run.workdir)
            return
        raise ValueError(
            f"data.path={self.config.data.path!r}: other training data than those of --workdir={self.run.workdir}; to "
            "go on with these take a new workdir and training.init_from"
        )

    def _start_from(self, path: Path) -> None:
        """Weights, averages, optimiser and step of another run, as the paper starts QC from U."""
        if path.is_dir():
            state = CheckpointStore(path / "checkpoints", keep=1, milestone_every=0).load_latest()
            if state is None:
                raise CheckpointError(f"training.init_from={path}: no checkpoint in {path / 'checkpoints'}")
        else:
            state = read_checkpoint(path)
        if "sums" in state:
            check_whole(state, path)
        else:  # not one of ours
            refuse_public_conservative(self.config, path)
            state = convert_public_checkpoint(path, self.run.score_model, self.optimizer)
        self.run.restore_weights(state, path)
        if state["optimizer"] is None:
            logger.warning("training.init_from=%s has no optimiser state: Adam's moments start from zero", path)
        else:
            self._load_optimizer(state["optimizer"])
        self.step = state["step"]
        if self.step >= self.config.training.n_iters:
            raise ValueError(
                f"training.n_iters={self.config.training.n_iters}: training.init_from={path} has done "
                f"{self.step} steps already"
            )

    def _load_optimizer(self, state: dict) -> None:
        try:
            self.optimizer.load_state_dict(state)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise CheckpointError(f"the optimiser state of the checkpoint does not fit: {error}") from None
        # The fused Adam walks through memory without regard to strides: another format would pair wrong numbers.
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)

    def _save(self) -> None:
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
                "config": self.config.to_json(),
                "code_version": code_version(),
            }
            self.run.store.save(state, self.step)
        self.accelerator.wait_for_everyone()

    # -- data

    def positions(self) -> range:
        """Where this process's share lies in the batch of all processes."""
        share = self.config.training.batch_size // self.accelerator.num_processes
        return range(self.accelerator.process_index * share, (self.accelerator.process_index + 1) * share)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Images, pixel levels uint8 (b, C, H, W), and labels (b,): this process's share of a step's batch."""
        indices = sets.batch_indices(
            self.config.seed,
            step,
            self.config.training.batch_size,
            len(self.run.train_data),
        )
        return self.run.train_data.batch(indices[list(self.positions())])

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of this and all later steps; files are decoded one step ahead in a thread."""
        steps = range(self.step, self.config.training.n_iters)
        if isinstance(self.run.train_data, TensorSplit):
            # Already in memory: a thread would bring OpenMP workers of its own, which cost more than they save.
            yield from map(self.batch, steps)
            return
        with ThreadPoolExecutor(1) as reader:
            upcoming = reader.submit(self.batch, steps[0])
            for step in steps:
                batch = upcoming.result()
                if step < steps[-1]:
                    upcoming = reader.submit(self.batch, step + 1)
                yield batch

    def streams(self, positions: Sequence[int]) -> SampleGenerators:
        """All random numbers of this step, for samples at ``positions`` in the batch of all processes."""
        return SampleGenerators((self.config.seed, "train", self.step), positions)

    def inputs(self, images: Tensor, generator: SampleGenerators) -> Tensor:
        """Pixel levels (b, C, H, W) as the model sees them, on its device."""
        x0 = self.run.to_model(images, generator, dequantize=self.config.data.uniform_dequantization)
        if self.config.data.random_flip:
            x0 = random_flip(x0, generator)
        return x0.to(self.run.device)

    # -- the loop

    def loop(self) -> None:
        config, accelerator = self.config, self.accelerator
        n_iters = config.training.n_iters
        self.run.report_progress(self.step)
        if self.step >= n_iters:
            logger.info("%s: trained for %d steps already", self.run.workdir, self.step)
            return
        self.run.write_config()
        log = MetricsLog(self.run.workdir, self.step) if accelerator.is_main_process else None
        started = time.monotonic()
        last_row = (started, self.step)
        bar = self.run.progress(total=n_iters, initial=self.step, unit="step", desc=f"train {self.run.workdir.name}")
        with self._signals(), bar, log or contextlib.nullcontext():
            for batch in self._batches():
                self.train_step(batch)
                bar.update()
                self.run.report_progress(1)
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
                    self._average_sums()
                    self._save()
                if stopping:
                    raise Interrupted(stopping)
                if (snapshot or at_end) and every.snapshot_sampling:
                    self._sample_grid()
            if self.signals is not None:
                self.signals.finish()

    def train_step(self, batch: tuple[Tensor, Tensor]) -> None:
        config, accelerator = self.config, self.accelerator
        self.objective.train()
        # step + 1: the source's step/warmup makes the first step one of size zero.
        warmup = min((self.step + 1) / config.optim.warmup, 1.0) if config.optim.warmup else 1.0
        for group in self.optimizer.param_groups:
            group["lr"] = config.optim.lr * warmup
        micro_batches = zip(
            *(part.chunk(self.run.runtime.accumulation_steps) for part in batch),
            np.array_split(np.array(self.positions()), self.run.runtime.accumulation_steps),
            strict=True,
        )
        for images, labels, positions in micro_batches:
            with accelerator.accumulate(self.objective):
                generator = self.streams(positions)
                x0 = self.inputs(images, generator)
                labels = self._class_labels(labels, generator)
                terms = self.objective(x0, generator, step=self.step, class_labels=labels)
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

    def _class_labels(self, labels: Tensor, generator: SampleGenerators | None) -> Tensor | None:
        """What a network that knows classes is told of them (b,): with a generator, now and then, none."""
        num_classes, dropout = self.run.num_classes, self.config.training.label_dropout
        if not num_classes:
            return None
        if dropout and generator is not None:
            labels = torch.where(uniform((len(labels),), generator) < dropout, num_classes, labels)
        return labels.to(self.run.device)

    def _average_sums(self) -> None:
        """Let all processes hold the same sums, their mean: what a checkpoint keeps, and a resumed run goes on from,
        with however many processes.

        Raises:
            FloatingPointError: in all of them, a loss or gradient was not finite in any step since the last row.
        """
        names = sorted(self.sums)
        totals = torch.tensor([float(self.sums[name][0]) for name in names], dtype=torch.float32)
        totals = self.accelerator.reduce(totals.to(self.run.device), reduction="mean").tolist()
        self.sums = {name: [total, self.sums[name][1]] for name, total in zip(names, totals, strict=True)}
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
        self._average_sums()
        row = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        return row

    @torch.no_grad()
    def _test_loss(self) -> float:
        """The score-matching loss of the moving average on (up to eval.batch_size) test images, always with the
        same times and noise."""
        count = min(self.config.eval.batch_size, len(self.run.test_data))
        generator = SampleGenerators((self.config.seed, "test loss"), range(count))
        images, labels = self.run.test_data.batch(spread(torch.arange(count), count, len(self.run.test_data)))
        x0 = self.run.to_model(images, generator, dequantize=self.config.data.uniform_dequantization)
        labels = self._class_labels(labels, None)
        return float(self.test_objective(x0.to(self.run.device), generator, class_labels=labels)["dsm"])

    def _sample_grid(self) -> None:
        accelerator = self.accelerator
        shares = sets.epoch_batches(GRID_IMAGES, GRID_IMAGES, accelerator.process_index, accelerator.num_processes)
        images = [draw(self.run, share.tolist(), progress=self.run.shows_progress)[0] for share in shares]
        images = gather_object(images)
        if accelerator.is_main_process:
            path = self.run.workdir / "samples" / f"step_{self.step:08d}.png"
            save_image_grid(path, np.concatenate(images), self.run.train_data.num_levels)
        accelerator.wait_for_everyone()

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
        except RuntimeError as error:
            if self.run.runtime.compile and self.signal_number:  # Ctrl-C is meant for the compiler, too, and ends it
                raise Interrupted(self.signal_number) from error
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _should_stop(self) -> int:
        """The signal that any process has received, or 0; all processes agree."""
        return self.signal_number if self.signals is None else self.signals.exchange(self.signal_number)


class _SharedMaximum:
    """A number that all processes agree on, the maximum of what each of them said at the call before.

    One call late, so that none waits for another, nor for its accelerator: the exchange is between CPUs.
    """

    def __init__(self) -> None:
        self.group = distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
        self.value = torch.zeros(1, dtype=torch.int64)
        self.work: distributed.Work | None = None

    def exchange(self, value: int) -> int:
        agreed = self.finish()
        self.value = torch.tensor([value])
        self.work = distributed.all_reduce(self.value, distributed.ReduceOp.MAX, group=self.group, async_op=True)
        return agreed

    def finish(self) -> int:
        """What was agreed on, once all processes have said their number."""
        if self.work is not None:
            self.work.wait()
        return int(self.value)
