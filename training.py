"""The one training loop: resumable, over one or several processes, used by every experiment here.

Step n computes a loss that is a function of the parameters and of n: whatever is random in it is keyed by the step.
The state of a run is therefore its weights, their moving average, the optimiser and the step; a checkpoint holds these,
and a run that was killed at any moment continues from the newest one to the very same weights and log.

One step (``Trainer.train_step``), of ``accumulation_steps`` passes on each process:

    learning rate; in every pass the loss (which draws its batch) → gradient, summed over passes;
    clip the gradient's norm → optimiser → moving average

The loss of image models is in ``run_lib.trainer``, its terms in ``losses.Objective``.

Files in W: ``checkpoints/``, ``metrics.jsonl``, ``tensorboard/``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.types_pb2 import DataType
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import Tensor, distributed, nn

from checkpoints import (
    CHECKPOINT_VERSION,
    CheckpointError,
    CheckpointStore,
    check_optimizer_state,
    is_count,
    load_state_dict_strictly,
    not_finite,
)
from experiment.files import writing
from experiment.runtime import COLLECTIVE_TIMEOUT, Interrupted, Runtime, check_finite, named, to_host
from models import EMA

__all__ = ["Hook", "MetricsLog", "Trainer", "fit"]

Loss = Callable[[nn.Module, int, range], Mapping[str, Tensor]]
"""(module, step, positions) → scalars: ``loss`` to minimise, and others to be logged. ``positions`` are those that the
samples of this pass have in the batch of all processes."""


class Hook(NamedTuple):
    """What is done every so many steps, and at the end: ``call(step)`` gives quantities to be logged, or nothing; the
    bytes of a PNG go to TensorBoard."""

    every: int
    call: Callable[[int], Mapping[str, float | bytes] | None]


class Trainer:
    """A training run, restored from its newest checkpoint, or from ``begin`` if it has none.

    Args:
        model: what is trained, with its weights at step 0.
        optimizer: of those parameters of the model that have gradients.
        loss: see ``Loss``.
        workdir: W.
        n_iters: steps in all.
        batch_size: samples of a step, in all processes together.
        objective: the module that ``loss`` is given, around the model and with its loss in one forward pass, as
            several processes need it; None: the model itself.
        ema: the moving average of the model's weights.
        learning_rate: of every step, if it is not constant.
        grad_clip: largest norm of the gradient; a larger one is scaled down to it.
        log_freq: steps between rows of the log; a row holds the means over the steps since the row before.
        save_freq: steps between checkpoints.
        milestone_freq: checkpoints at multiples of this are kept for ever; 0 keeps none.
        keep: how many of the newest checkpoints are kept.
        claim: called before the state in W is read, which nobody else may change from then on.
        begin: gives a state to start from where there is no checkpoint: ``step``, ``model``, ``ema``, ``optimizer`` and
            ``source``, which errors name it by.
        record: what every checkpoint says about the run besides; plain values.
        check_record: told the record of a checkpoint that the run resumes from; raises a ValueError to refuse it.
        observe: further quantities of the present weights, logged with every row, and at step 0 before the first.
        hooks: done after the checkpoint of a step, if there is one.
        runtime: device, precision, processes.
        description: of the progress bar.

    Attributes:
        step: how many steps are done.

    Raises:
        CheckpointError: no checkpoint can be read, or they belong to another model.
        ValueError: the batch cannot be divided among processes and passes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss,
        workdir: Path,
        *,
        n_iters: int,
        batch_size: int = 1,
        objective: nn.Module | None = None,
        ema: EMA | None = None,
        learning_rate: Callable[[int], float] | None = None,
        grad_clip: float = math.inf,
        log_freq: int = 100,
        save_freq: int = 500,
        milestone_freq: int = 0,
        keep: int = 1,
        claim: Callable[[], object] | None = None,
        begin: Callable[[], Mapping | None] | None = None,
        record: Mapping[str, object] | None = None,
        check_record: Callable[[Mapping], None] | None = None,
        observe: Callable[[], Mapping[str, float]] | None = None,
        hooks: Sequence[Hook] = (),
        runtime: Runtime | None = None,
        description: str = "train",
    ) -> None:
        self.model, self.loss, self.workdir, self.ema = model, loss, workdir, ema
        self.n_iters, self.batch_size = n_iters, batch_size
        self.learning_rate, self.grad_clip = learning_rate, grad_clip
        self.log_freq, self.save_freq, self.milestone_freq = log_freq, save_freq, milestone_freq
        self.record, self.observe, self.hooks, self.description = dict(record or {}), observe, hooks, description
        self.runtime = runtime or Runtime("cpu")
        self.accelerator = self.runtime.accelerator
        self.store = CheckpointStore(workdir / "checkpoints", keep=keep, milestone_every=milestone_freq)
        self.parts = self._parts()
        self.step, self.log_size, self.hooks_done = 0, 0, True
        self.sums: dict[str, list] = {}  # of each logged quantity since the last row: total, count
        self.optimizer = optimizer
        if claim is not None:
            claim()
        self._restore(begin, check_record)
        self.runtime.check_agreement("the step to go on from", self.step, workdir)
        self.objective, self.optimizer = self.accelerator.prepare(objective or model, optimizer)
        if ema is not None:
            ema.model.to(self.accelerator.device)
        self.signal_number = 0
        self.signals = _SharedMaximum() if self.accelerator.num_processes > 1 else None

    def _parts(self) -> list[range]:
        """Positions in the batch of all processes, pass by pass of this one."""
        processes, passes = self.accelerator.num_processes, self.runtime.accumulation_steps
        if self.batch_size % (processes * passes) and (processes > 1 or passes > 1):
            raise ValueError(
                f"training.batch_size={self.batch_size}: must be a positive multiple of {processes} process(es) × "
                f"{passes} accumulation step(s)"
            )
        share = self.batch_size // processes
        first = self.accelerator.process_index * share
        size = share // passes
        return [range(first + k * size, first + (k + 1) * size) for k in range(passes)]

    # -- checkpoints

    def _restore(
        self, begin: Callable[[], Mapping | None] | None, check_record: Callable[[Mapping], None] | None
    ) -> None:
        state = self.store.load_latest()
        if state is None:
            if begin is None or (state := begin()) is None:
                return
            self._load(state, state["source"])
            return
        source = self.store.path(state["step"])
        if check_record is not None:
            check_record(state["record"])
        if is_count(threads := state["record"].get("threads")) and threads:
            self.runtime.keep_threads(threads)
        self._load(state, source)
        self.sums, self.log_size, self.hooks_done = state["sums"], state["log_size"], state["hooks_done"]
        if state["scaler"] is not None and (scaler := self.accelerator.scaler) is not None:
            if any(type(state["scaler"].get(name)) not in (float, int) for name in scaler.state_dict()):
                raise CheckpointError(f"{source}: not a whole checkpoint; of another form: scaler")
            scaler.load_state_dict(state["scaler"])

    def _load(self, state: Mapping, source: object) -> None:
        load_state_dict_strictly(self.model, state["model"], source)
        if self.ema is not None:
            if state["ema"] is None:
                raise CheckpointError(f"{source}: it has no moving average")
            load_state_dict_strictly(self.ema.model, state["ema"]["model"], source)
            self.ema.load_state_dict(state["ema"])
        self.step = state["step"]
        if state["optimizer"] is None:
            return
        check_optimizer_state(self.optimizer, state["optimizer"], source)
        # A loaded state has the settings of the run that it came from; those given here hold.
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state["optimizer"]["state"]})
        self._set_learning_rate(self.step - 1)  # of the step that was done last
        # The fused Adam walks through memory without regard to strides: another format would pair wrong numbers.
        for parameter, moments in self.optimizer.state.items():
            for name, moment in moments.items():
                if torch.is_tensor(moment) and moment.shape == parameter.shape:
                    moments[name] = torch.empty_like(parameter).copy_(moment)

    def _save(self, log: MetricsLog | None, *, hooks_done: bool) -> None:
        self._average_sums()
        averages = {} if self.ema is None else self.ema.model.state_dict()
        if bad := not_finite(self.model.state_dict()) or not_finite(averages):  # a step may be too long to come back
            raise self._diverged(bad)
        if self.runtime.is_main:
            scaler = self.accelerator.scaler
            state = {
                "version": CHECKPOINT_VERSION,
                "step": self.step,
                "model": self.model.state_dict(),
                "ema": None if self.ema is None else self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "sums": self.sums,
                "log_size": log.sync(),
                "hooks_done": hooks_done,
                "record": self.record | {"threads": torch.get_num_threads()},
            }
            self.store.save(state, self.step)
        self.accelerator.wait_for_everyone()

    # -- the loop

    def run(self) -> None:
        """Do the steps that are left, if any.

        Raises:
            FloatingPointError: the loss, its gradient, the weights, or what hooks give is not finite, and not saved.
            Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
        """
        if self.runtime.is_main:
            self.store.delete_old()  # a run that was killed may have left it
        progress = self.runtime.progress(total=self.n_iters, initial=self.step, unit="step", desc=self.description)
        if self.step >= self.n_iters and self.hooks_done:
            progress.close()
            return
        log = MetricsLog(self.workdir, self.step, self.log_size) if self.runtime.is_main else None
        self.started = time.monotonic()
        self.last_row = (self.started, self.step)
        with self._signals(), progress, log or contextlib.nullcontext():
            if log is not None and "config" in self.record:
                log.write_text("config", self.record["config"])
            if self.step == 0 and self.observe is not None:
                self._write(log, self.observe())
            if not self.hooks_done:
                self._call_hooks(log)
            while self.step < self.n_iters:
                self.train_step()
                progress.update()
                stopping = self._should_stop()
                at_end = self.step == self.n_iters
                if self.step % self.log_freq == 0 or at_end:
                    row = self._means()
                    progress.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
                    self._write(log, row)
                milestone = self.milestone_freq and self.step % self.milestone_freq == 0
                if at_end or stopping or milestone or self.step % self.save_freq == 0:
                    self._save(log, hooks_done=not self._due_hooks())
                if stopping:
                    raise Interrupted(stopping)
                self._call_hooks(log)
            # One that came while hooks were called, or that other processes have not heard of.
            if stopping := self.signal_number if self.signals is None else self.signals.finish():
                raise Interrupted(stopping)

    def train_step(self) -> None:
        """One step of the optimiser."""
        accelerator = self.accelerator
        self.objective.train()
        self._set_learning_rate(self.step)
        # accelerate keeps the number of passes for a whole process, and counts on after a step that was broken off.
        accelerator.gradient_accumulation_steps, accelerator.step = len(self.parts), 0
        for positions in self.parts:
            with accelerator.accumulate(self.objective):
                terms = dict(self.loss(self.objective, self.step, positions))
                accelerator.backward(terms["loss"])
                if accelerator.sync_gradients:
                    terms["grad_norm"] = accelerator.clip_grad_norm_(self.model.parameters(), self.grad_clip)
                # accelerate divides the loss by the number of passes, and does these two in the last one only.
                self.optimizer.step()
                self.optimizer.zero_grad()
            for name, value in terms.items():
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = [total + value.detach(), count + 1]
        if self.ema is not None:
            self.ema.update(self.model)
        self.step += 1

    def _set_learning_rate(self, step: int) -> None:
        if self.learning_rate is not None:
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate(step)

    def _due_hooks(self) -> list[Hook]:
        return [hook for hook in self.hooks if self.step == self.n_iters or self.step % hook.every == 0]

    def _call_hooks(self, log: MetricsLog | None) -> None:
        due = self._due_hooks()
        for hook in due:
            with named(f"{self.description}, step {self.step}"):
                if row := hook.call(self.step):
                    self._write(log, row)
        if due and self.step == self.n_iters:  # so that a finished run does nothing
            self._save(log, hooks_done=True)

    def _write(self, log: MetricsLog | None, row: Mapping[str, float | bytes]) -> None:
        images = {name: value for name, value in row.items() if isinstance(value, bytes)}
        row = {name: value for name, value in row.items() if name not in images}
        check_finite(row)
        if log is not None:
            log.write(self.step, row, images)

    def _average_sums(self) -> None:
        """Let all processes hold the same sums, their mean: what a checkpoint keeps, and a resumed run goes on from,
        with however many processes.

        Raises:
            FloatingPointError: in all of them, one was not finite in any step since the last row.
        """
        if not self.sums:
            return
        names = sorted(self.sums)
        device = self.accelerator.device
        dtype = torch.float32 if device.type == "mps" else torch.float64
        totals = torch.stack([torch.as_tensor(self.sums[name][0], dtype=dtype, device=device) for name in names])
        totals = to_host(self.accelerator.reduce(totals, reduction="mean")).tolist()
        self.sums = {name: [total, self.sums[name][1]] for name, total in zip(names, totals, strict=True)}
        for name in names:
            # With a gradient scaler (fp16) infinite gradients are part of the search for the scale, and skipped.
            scaled = name == "grad_norm" and self.accelerator.scaler is not None
            if not scaled and not math.isfinite(self.sums[name][0]):
                raise self._diverged(name)

    def _diverged(self, name: str) -> FloatingPointError:
        return FloatingPointError(
            f"{self.description}: {name} is not finite at or before step {self.step}; that step is not saved. "
            "Try --precision=fp32, or in a new workdir a smaller learning rate (optim.lr) or training.qc_weight"
        )

    def _means(self) -> dict[str, float]:
        """A row: means over processes and steps since the last one, the learning rate, time and speed."""
        self._average_sums()
        row = {name: total / count for name, (total, count) in self.sums.items() if math.isfinite(total)}
        self.sums = {}
        now = time.monotonic()
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["seconds"] = round(now - self.started, 3)
        row["steps_per_second"] = (self.step - self.last_row[1]) / max(now - self.last_row[0], 1e-9)
        self.last_row = (now, self.step)
        return row | dict(self.observe() if self.observe is not None else {})

    # -- signals

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM are remembered and acted on at the end of a step; a second one acts at once."""
        if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
            yield
            return

        def remember(number: int, frame: object) -> None:
            self.signal_number = number
            signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)

        previous = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        except RuntimeError as error:
            if self.runtime.compile and self.signal_number:  # Ctrl-C is meant for the compiler, too, and ends it
                raise Interrupted(self.signal_number) from error
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _should_stop(self) -> int:
        """The signal that any process has received, or 0; all processes agree."""
        return self.signal_number if self.signals is None else self.signals.exchange(self.signal_number)


def fit(*arguments, **options) -> None:
    """Train to the last step, or go on from where an earlier call was stopped; arguments and errors: ``Trainer``'s."""
    Trainer(*arguments, **options).run()


class MetricsLog:
    """Writes rows of a run to ``DIRECTORY/metrics.jsonl`` and ``DIRECTORY/tensorboard/``.

    Args:
        directory: of the run.
        step: where the run resumes; TensorBoard drops what it has of later steps.
        size: bytes of ``metrics.jsonl`` at that moment (``sync``); the rest, which is computed again, is cut off.
    """

    def __init__(self, directory: Path, step: int = 0, size: int = 0) -> None:
        name = f"events.out.tfevents.{time.time_ns():020d}.{socket.gethostname()}.{os.getpid()}"
        self.path, self.board_path = directory / "metrics.jsonl", directory / "tensorboard" / name
        with writing(self.board_path):
            self.board_path.parent.mkdir(parents=True, exist_ok=True)
            # Not torch's SummaryWriter, whose thread ends in a traceback where the disk is full.
            self.board = RecordWriter(open(self.board_path, "wb", buffering=0))  # noqa: SIM115
        with writing(self.path):
            self.file = open(self.path, "a+b")  # noqa: SIM115
            self.file.truncate(min(size, self.file.seek(0, os.SEEK_END)))
        first, start = step + 1 if size else 0, SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._add(Event(wall_time=time.time(), step=first, session_log=start))

    def _add(self, event: Event) -> None:
        with writing(self.board_path):
            self.board.write(event.SerializeToString())

    def write(self, step: int, row: Mapping[str, float], images: Mapping[str, bytes] | None = None) -> None:
        """A row of numbers, if there are any, and PNGs for TensorBoard."""
        if row:
            with writing(self.path):
                self.file.write((json.dumps({"step": step, **row}, allow_nan=False) + "\n").encode())
                self.file.flush()
        values = [Summary.Value(tag=name, simple_value=value) for name, value in row.items()]
        for name, png in (images or {}).items():
            width, height = struct.unpack(">II", png[16:24])  # of the header
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=png)
            values.append(Summary.Value(tag=name, image=image))
        self._add(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def write_text(self, name: str, text: str) -> None:
        """Text for TensorBoard, shown as it is."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        tensor = TensorProto(dtype=DataType.DT_STRING, string_val=[indented.encode()])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = Summary.Value(tag=f"{name}/text_summary", tensor=tensor, metadata=metadata)
        self._add(Event(wall_time=time.time(), summary=Summary(value=[value])))

    def sync(self) -> int:
        """Bring every row to the disk; the size of the file, which a checkpoint remembers."""
        with writing(self.path):
            os.stat(self.path)  # it has not been removed
            os.fsync(self.file.fileno())
            return self.file.seek(0, os.SEEK_END)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception) -> None:
        self.board.close()
        with writing(self.path):  # what could not be written is tried once more
            self.file.close()


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
