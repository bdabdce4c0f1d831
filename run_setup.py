"""What training, evaluation and sampling share: a run, built from a config and checked before any work starts."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
)
from ml_collections import ConfigDict
from torch import Tensor
from tqdm import tqdm

from checkpoints import CheckpointStore, load_state_dict_strictly
from configs.defaults import base_config
from conservativeness import EXACT_MAX_DIMENSION
from data import pixels, sets
from experiment.files import write_atomically
from experiment.randomness import Generator, uniform
from experiment.workdir import check_at_least, differences, flatten, take_lock
from guidance.classifier import NoiseConditionalClassifier
from guidance.conditions import CLASS_CONDITIONS, ClassifierFreeGuidance, ClassifierGuidance, check_condition
from likelihood import get_likelihood
from losses import Objective, get_objective
from models import EMA, create_score_model
from models.score import ScoreModel
from sampling import get_sampler
from sde_lib import SDE, ScoreFunction, get_sde

__all__ = [
    "COLLECTIVE_TIMEOUT",
    "FREE_IN_EVALUATION",
    "FREE_IN_TRAINING",
    "GRID_IMAGES",
    "Interrupted",
    "InvalidRun",
    "Run",
    "Runtime",
    "check_compile",
    "checked",
    "code_version",
    "save_image_grid",
    "write_arrays",
    "write_text",
]

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
DEVICES = ("auto", "cpu", "cuda", "mps")
GRID_IMAGES = 64
COLLECTIVE_TIMEOUT = timedelta(hours=12)
"""How long processes wait for each other: while one trains the feature classifier, or ends a long batch of samples."""

# A run may be continued with other values of these; any other difference makes it another experiment.
FREE_IN_TRAINING = (
    "label",
    "eval.",
    "sampling.",
    "likelihood.",
    "classifier.",
    "data.path",
    "data.root",
    "data.download",
    "training.n_iters",
    "training.log_freq",
    "training.eval_freq",
    "training.snapshot_",
    "training.keep_checkpoints",
    "training.qc_probe_chunk",
    "training.activation_checkpointing",
)
# An evaluation need not repeat how the model was trained.
FREE_IN_EVALUATION = (
    *FREE_IN_TRAINING,
    "seed",
    "optim.",
    *(f"training.{name}" for name in ("batch_size", "init_from", "likelihood_weighting", "qc_", "reduce_mean")),
)


class InvalidRun(ValueError):
    """The config, data, checkpoint or working directory cannot be used; raised before any work."""


class Interrupted(Exception):
    """A signal asked the run to stop; a checkpoint has been written, unless it came amid compiling."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command resumes")
        self.signal_number = signal_number


@dataclass(frozen=True)
class Runtime:
    """Where and how to compute; none of it changes what is computed beyond rounding.

    Raises:
        InvalidRun: unknown or unavailable device or precision, or a number outside its range.
    """

    device: str = "auto"
    precision: str = "fp32"
    accumulation_steps: int = 1
    compile: bool = False
    """Have training and samplers run a compiled network; what else differentiates it, likelihood and Asym, does not."""
    cache_dir: str = ""
    """Where the feature classifier and the data's features are kept; empty: W/eval/cache."""
    on_progress: Callable[[int], None] | None = None
    """Told how many more training steps or evaluated items are done, in place of progress bars."""

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
        accelerator = Accelerator(
            cpu=self.device == "cpu" or not accelerated,
            mixed_precision=PRECISIONS[self.precision],
            # As a plugin, because a number would give way to the one in the user's settings of accelerate.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=self.accumulation_steps),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
                # All buffers are constants, and all parameters take part in every step.
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
            ],
        )
        if accelerator.distributed_type.value in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
            raise InvalidRun(
                f"the launcher asks for {accelerator.distributed_type.value}: allowed are one process, or several that "
                "each hold the whole model"
            )
        return accelerator


@contextlib.contextmanager
def checked() -> Iterator[None]:
    """Errors of preparation become InvalidRun, so that a caller can tell bad input from a defect."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise InvalidRun(str(error)) from error


def check_compile(device: torch.device, parameterization: str) -> None:
    """Whether a score of this ``model.parameterization`` can be compiled, on this machine and ``device``.

    Raises:
        ValueError: no.
    """
    if parameterization == "conservative":
        raise ValueError(
            "--compile: not with model.parameterization='conservative', whose every score is a derivative; "
            "torch.compile cannot differentiate twice"
        )
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of whatever kind its backend raises, which without a compiler are several
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--compile: torch.compile does not work on this machine: {reason}") from error


class Run:
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
        classes = dict(num_classes=config.model.get("num_classes", 0), label_dropout=config.training.label_dropout)
        check_condition(config.sampling, **classes)
        self.sde: SDE = get_sde(config)
        torch.manual_seed(config.seed)
        self.score_model: ScoreModel = create_score_model(config, self.sde)
        self.objective: Objective = get_objective(config, self.score_model)
        self.ema = EMA(self.score_model, config.model.ema_rate)
        self.sampler = get_sampler(config, self.sde)
        self.likelihood = get_likelihood(config, self.sde)
        self.accelerator = runtime.accelerator()
        if runtime.compile:
            check_compile(self.device, config.model.parameterization)
            self.score_model.compile_network()
            self.ema.model.compile_network()
            if config.training.qc_weight:
                self.objective.compile_products()
        self._check_batch_size()
        with self.main_process_first():
            self.train_data, self.test_data = sets.get_dataset(config)
            self._check_classes()
            self._check_workdir(free_fields)
        self.classifier: NoiseConditionalClassifier | None = None  # loaded where sampling is guided by it
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

    @property
    def num_classes(self) -> int:
        """Of the network, which in its place among the labels has one that stands for no class; 0: it knows none."""
        return self.config.model.get("num_classes", 0)

    def main_process_first(self) -> contextlib.AbstractContextManager:
        return self.accelerator.main_process_first()

    @property
    def shows_progress(self) -> bool:
        return self.accelerator.is_main_process and self.runtime.on_progress is None

    def check_agreement(self, what: str, value: object) -> None:
        """Refuse to work if processes see different things, as they would if hosts did not share the folder.

        Raises:
            ValueError: in all of them.
        """
        values = gather_object([value])
        if any(other != values[0] for other in values):
            raise ValueError(
                f"--workdir={self.workdir}: the processes disagree on {what} ({', '.join(map(str, values))}); it must "
                "be one folder that all hosts share"
            )

    @contextlib.contextmanager
    def alone(self, work: str) -> Iterator[None]:
        """No other run does the same ``work``, a name, in this working directory meanwhile.

        Raises:
            ValueError: in all processes, if another one does.
        """
        lock, error = None, None
        if self.accelerator.is_main_process:
            try:
                lock = take_lock(self.workdir / f".{work}.lock")
            except ValueError as reason:
                error = str(reason)
        if error := next((e for e in gather_object([error]) if e), None):
            raise ValueError(f"--workdir: {error}")
        try:
            yield
        finally:
            if lock is not None:
                lock.release()

    def progress(self, **options) -> tqdm:
        return tqdm(disable=not self.shows_progress, dynamic_ncols=True, **options)

    def report_progress(self, count: int) -> None:
        if self.runtime.on_progress is not None:
            self.runtime.on_progress(count)

    def to_model(self, images: Tensor, generator: Generator, *, dequantize: bool) -> Tensor:
        """Pixel levels (B, C, H, W), uint8, as the model sees them."""
        noise = uniform(images.shape, generator) if dequantize else None
        x = pixels.to_unit_interval(images, self.train_data.num_levels, dequantization=noise)
        return pixels.scale(x, self.config.data.centered)

    def to_pixels(self, x: Tensor) -> Tensor:
        x = pixels.unscale(x.float(), self.config.data.centered)
        return pixels.to_pixels(x, self.train_data.num_levels, self.config.data.uniform_dequantization)

    def score(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The score of the moving average, float32 in and out. From a network that knows classes it is the
        unconditional one unless labels (B,) are given.

        Computed in the precision asked for, but in float32 where it is differentiated, for likelihood and asymmetry
        (docs/mixed_precision.md).
        """
        if class_labels is None and self.num_classes:
            class_labels = torch.full((len(x),), self.num_classes, device=x.device)
        with contextlib.nullcontext() if x.requires_grad else self.accelerator.autocast():
            return self.ema.model(x, t, class_labels).to(x.dtype)

    def score_of_class(self, class_labels: Tensor) -> ScoreFunction:
        """The score that a network which knows classes has for these (B,), of data; of one which does not, its own."""
        return ClassifierFreeGuidance(self.score, class_labels, self.num_classes) if self.num_classes else self.score

    def wanted_labels(self, indices: Sequence[int]) -> Tensor:
        """The classes (B,) that ``sampling.condition`` wants of samples number ``indices``."""
        label, numbers = self.config.sampling.class_label, torch.tensor(indices, device=self.device)
        return numbers % self.train_data.num_classes if label == -1 else torch.full_like(numbers, label)

    def sampling_score(self, indices: Sequence[int]) -> ScoreFunction:
        """The score for samples number ``indices``: of their class, or unconditional."""
        sampling = self.config.sampling
        if sampling.condition == "class_free":
            labels = self.wanted_labels(indices)
            return ClassifierFreeGuidance(self.score, labels, self.num_classes, weight=sampling.guidance_weight)
        if sampling.condition == "class":
            labels = self.wanted_labels(indices)
            return ClassifierGuidance(self.score, self.classifier.log_probs, labels, weight=sampling.guidance_weight)
        return self.score

    def _check_classes(self) -> None:
        sampling, own, available = self.config.sampling, self.num_classes, self.train_data.num_classes
        dataset = f"data.dataset={self.config.data.dataset!r}"
        if own and own != available:
            raise ValueError(f"model.num_classes={own}: {dataset} has {available or 'no'} classes")
        if sampling.condition in CLASS_CONDITIONS and available is None:
            raise ValueError(f"sampling.condition={sampling.condition!r}: {dataset} has no classes")
        if sampling.condition in CLASS_CONDITIONS and not -1 <= sampling.class_label < available:
            raise ValueError(
                f"sampling.class_label={sampling.class_label}: allowed are 0 to {available - 1}, or -1 for all in turn"
            )

    def _check_batch_size(self) -> None:
        batch_size = self.config.training.batch_size
        parts = self.accelerator.num_processes * self.runtime.accumulation_steps
        if batch_size < 1 or batch_size % parts:
            raise ValueError(
                f"training.batch_size={batch_size}: must be a positive multiple of {self.accelerator.num_processes} "
                f"process(es) × {self.runtime.accumulation_steps} accumulation step(s)"
            )
        stride, share = self.config.training.qc_stride, batch_size // parts
        if share % stride:
            raise ValueError(f"training.qc_stride={stride}: must divide the {share} samples that a process takes")

    def _check_workdir(self, free_fields: tuple[str, ...]) -> None:
        if self.workdir.exists() and not self.workdir.is_dir():
            raise ValueError(f"--workdir={self.workdir}: is a file, not a folder")
        if (self.workdir / "experiment.json").exists():
            raise ValueError(f"--workdir={self.workdir}: belongs to one of the examples; choose another folder")
        path = self.workdir / "config.json"
        if not path.exists():
            return
        try:
            stored = json.loads(path.read_bytes())
            if not isinstance(stored, dict):
                raise ValueError("it holds no object")
        except ValueError as error:  # of which not being JSON, or not text, are kinds
            raise ValueError(f"{path} is damaged: {error}") from None
        # A field that the run was stored without did not exist then, and had what is now its default, or its network
        # does not read it.
        default = flatten(json.loads(base_config().to_json()))
        given = {**default, **flatten(json.loads(self.config.to_json()))}
        if different := differences({**default, **flatten(stored)}, given, free_fields):
            raise ValueError(f"--workdir={self.workdir} holds another run: {different}")

    def write_config(self) -> None:
        if self.accelerator.is_main_process:
            write_text(self.workdir / "config.json", self.config.to_json(indent=1, sort_keys=True) + "\n")

    def restore_weights(self, state: dict, source: object) -> None:
        """Weights and moving average from one of our checkpoints."""
        load_state_dict_strictly(self.score_model, state["model"], source)
        self.ema.load_state_dict(state["ema"])


def _check_numbers(config: ConfigDict) -> None:
    """Fields that no module of its own checks."""
    at_least = {
        "seed": -(2**63),
        "model.num_scales": 1,
        "training.n_iters": 1,
        "training.log_freq": 1,
        "training.eval_freq": 1,
        "training.snapshot_freq_for_preemption": 1,
        "optim.warmup": 0,
        "eval.batch_size": 1,
        "eval.num_samples": 1,
        "eval.nll_images": 0,
        "eval.num_reference": 0,
        "eval.asym_levels": 1,
        "eval.asym_images": 0,
        "eval.asym_probes": 0,
    }
    check_at_least(config.to_dict(), at_least)
    optim, infinity = config.optim, math.inf
    for name, value, allowed, words in (
        ("seed", config.seed, config.seed < 2**63, "integers of 64 bits"),
        ("optim.lr", optim.lr, 0 < optim.lr < infinity, "positive numbers"),
        ("optim.beta1", optim.beta1, 0 <= optim.beta1 < 1, "numbers in [0, 1)"),
        ("optim.eps", optim.eps, 0 < optim.eps < infinity, "positive numbers"),
        ("optim.weight_decay", optim.weight_decay, 0 <= optim.weight_decay < infinity, "numbers from 0 on"),
        ("optim.grad_clip", optim.grad_clip, optim.grad_clip > 0 or optim.grad_clip < 0, "positive, or -1: none"),
        ("training.qc_weight", config.training.qc_weight, config.training.qc_weight < infinity, "finite numbers"),
    ):
        if not allowed:
            raise ValueError(f"{name}={value}: allowed are {words}")
    if config.optim.optimizer != "Adam":
        raise ValueError(f"optim.optimizer={config.optim.optimizer!r}: allowed is Adam")
    if not 0 <= config.training.label_dropout < 1:
        raise ValueError(f"training.label_dropout={config.training.label_dropout}: a probability in [0, 1)")
    if config.training.label_dropout and not config.model.get("num_classes", 0):
        raise ValueError(f"training.label_dropout={config.training.label_dropout}: needs model.num_classes > 0")
    dimension = config.data.num_channels * config.data.image_size**2
    if config.eval.asym_probes == 0 and dimension > EXACT_MAX_DIMENSION:
        raise ValueError(
            f"eval.asym_probes=0: the exact Jacobian is for at most {EXACT_MAX_DIMENSION} dimensions, "
            f"these images have {dimension}"
        )


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def write_arrays(path: Path, **arrays) -> None:
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def code_version() -> str:
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
