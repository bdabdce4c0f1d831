"""Recipes: train, evaluate, sample, score a data set, statistics of the data, train a classifier; and a trained score
for a notebook.

A run lives in a working directory W:

    W/config.json            the config
    W/checkpoints/           see ``checkpoints``
    W/metrics.jsonl          one row per logged step
    W/tensorboard/           the same, for TensorBoard
    W/scores/                rows of numbers for each item of a data set
    W/samples/               grids of samples made while training; samples that were asked for
    W/classifier/            the classifier of noised images that may guide samples
    W/eval/                  metrics.json of the newest weights that were evaluated, and what a report draws of them
    W/eval/metrics/          that of all weights that were evaluated
    W/eval/stages/           the per-image results of evaluations and samples, by weights and settings

Everything random is keyed by (seed, purpose, step or index), so a run that was interrupted continues to the very same
result, and the number of processes changes nothing but rounding. Each recipe imports and builds what it uses.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import TYPE_CHECKING

import numpy as np
import torch
from ml_collections import ConfigDict
from torch import Tensor

from checkpoints import (
    CheckpointError,
    CheckpointStore,
    check_version,
    is_count,
    load_state_dict_strictly,
    read_checkpoint,
    weights_digest,
    write_checkpoint,
)
from configs.checks import check, item_shape
from configs.defaults import FIELDS
from configs.fields import flatten
from configs.stored import config_of
from data.format import GRID_IMAGES, DataFormat, is_picture, save_grid, unscale
from data.sets import conditions_of, describe, evenly_spaced
from experiment.files import check_folder, differences, parse_json, read_json, write_arrays, write_json, write_text
from experiment.randomness import SampleGenerators, normal_like, uniform
from experiment.runtime import (
    Interrupted,
    InvalidRun,
    Runtime,
    checked,
    code_version,
    hardware,
    to_device,
    to_host,
    within_memory,
)
from models import make_network, make_score_model
from models.score import ScoreModel, UnconstrainedScore
from sde_lib import SDE, expand, make_sde

if TYPE_CHECKING:
    from conservativeness import Asymmetry
    from data import Split
    from features.quality import SampleQuality
    from losses import Objective
    from training import Trainer

__all__ = [
    "Interrupted",
    "InvalidRun",
    "Runtime",
    "TrainedScore",
    "build_score_model",
    "build_sde",
    "check_compile",
    "dry_run",
    "evaluate",
    "export",
    "load",
    "load_data",
    "read_once",
    "sample",
    "score",
    "statistics",
    "train",
    "train_classifier",
    "trainer",
]

logger = logging.getLogger(__name__)

Source = str | Path | tuple[dict, Path]
"""Where weights come from: a run's folder or a file; or a checkpoint that has been read, and where it was."""

OUTSIDE = (-0.5, 1.5)
"""Half the range of grey levels beyond black and white: no digit, photograph or their noise is there."""

EVALUATION_VERSION = 4
"""To be raised when a fix changes what sampling, likelihood or asymmetry compute, which is then computed again."""

# A run may be continued with other values of these; any other difference makes it another experiment.
FREE_IN_TRAINING = (
    *("label", "eval.", "sampling.", "likelihood.", "classifier.", "data.path", "data.root", "data.download"),
    *(f"training.{name}" for name in ("n_iters", "log_freq", "eval_freq", "snapshot_", "keep_checkpoints")),
    *("training.qc_probe_chunk", "training.activation_checkpointing"),
)
# An evaluation need not repeat how the model was trained.
FREE_IN_EVALUATION = (
    *(*FREE_IN_TRAINING, "seed", "optim."),
    *(f"training.{name}" for name in ("batch_size", "init_from", "likelihood_weighting", "qc_", "reduce_mean")),
)


def in_all_processes(recipe: Callable) -> Callable:
    """Of a recipe: every process is given the same, and when one ends, all do."""

    @functools.wraps(recipe)
    def run(
        config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
    ) -> object:
        given = {"mode": recipe.__name__, "workdir": str(workdir), "checkpoint": str(checkpoint)}
        with runtime.together(given | {"config": json.loads(config.to_json())}):
            return recipe(config, workdir, runtime, *([] if checkpoint is None else [checkpoint]))

    return run


# ---------------------------------------------------------------------------------------------------------------
# Training


@in_all_processes
def train(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> None:
    """Train until ``config.training.n_iters`` steps are done, resuming from the newest checkpoint in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: the loss, or what training comes to, is not finite; that is not saved.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    with checked():
        begin_with, config = _begin_with(config)
    with contextlib.ExitStack() as stack:

        def claim() -> None:
            stack.enter_context(runtime.exclusive(Path(workdir) / ".training.lock"))
            _check_workdir(config, Path(workdir), FREE_IN_TRAINING)  # it may have changed until now

        with checked():
            loop = trainer(config, workdir, runtime, claim, begin_with, announced="train")
        _write_config(config, loop.workdir, runtime)
        loop.run()
    if "architecture" in config.model:  # back in the form that it came in
        _export(config, Path(workdir), runtime)


@in_all_processes
def dry_run(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> dict[str, float | str]:
    """Build what ``train`` would, do the steps from one QC term to the next twice, and say what they take; nothing is
    written.

    Returns:
        The number of parameters; seconds of a step, the mean of the second time; hours for all steps that are left;
        the most memory taken, in GiB, of a GPU by tensors, else by the process; and where it was measured.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
    """
    with checked():
        begin_with, config = _begin_with(config)
        loop = trainer(config, workdir, runtime, begin_with=begin_with, announced="try")
    device, steps = runtime.torch_device, config.training.qc_interval if config.training.qc_weight else 1
    first, seconds = loop.step, 0.0
    for _ in range(2):
        started = time.perf_counter()
        for _ in range(steps):
            loop.train_step()
        to_host(loop.sums["loss"][0])  # by when all has been done
        seconds = (time.perf_counter() - started) / steps
    on_gpu = device.type == "cuda"
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    return {
        "parameters": sum(p.numel() for p in loop.model.parameters()),
        "seconds_per_step": seconds,
        "hours_for_the_rest": seconds * max(config.training.n_iters - first, 0) / 3600,
        "memory_gib": memory / 2**30,
        "device": runtime.where,
    }


def _announce(loop: Trainer, config: ConfigDict, what: str, data: tuple[Split, Split], runtime: Runtime) -> None:
    parameters = sum(p.numel() for p in loop.model.parameters())
    steps = f"step {loop.step} to {loop.n_iters} of {loop.batch_size} items of {_named_data(config)}"
    runtime.announce(f"{what} a network of {parameters:,} parameters, {steps}", loop.workdir, _about(config, *data))


def _named_data(config: ConfigDict) -> str:
    return f"{config.data.dataset}, {'×'.join(map(str, item_shape(config.data)))}"


def _about(config: ConfigDict, train_data: Split, test_data: Split) -> str:
    return f"{config.data.dataset} {config.data.path}".strip() + f": {describe(train_data, test_data)}"


def trainer(
    config: ConfigDict,
    workdir: str | Path,
    runtime: Runtime = Runtime(),
    claim: Callable[[], object] | None = None,
    begin_with: Source | None = None,
    announced: str = "",
) -> Trainer:
    """The training loop of a config, at the step to go on from; nothing has been written. ``claim`` is called before
    the state in ``workdir`` is read, which nobody else may change from then on. ``begin_with``: what has been found at
    ``training.init_from``, see ``_begin_with``. ``announced`` is what will be done with the loop, in a word, if that is
    to be said.

    Raises:
        ValueError, OSError: bad config, data, checkpoint or working directory.
    """
    from data import TrainingBatches
    from data.format import random_flip
    from models import EMA, recompute_activations
    from training import Hook, Trainer

    check(config)
    training, workdir, device = config.training, Path(workdir), runtime.torch_device
    _check_workdir(config, workdir, FREE_IN_TRAINING)
    if config.sampling.condition not in ("", "class_free"):
        raise ValueError(f"sampling.condition={config.sampling.condition!r}: not while training")
    train_data, test_data = load_data(config, runtime)
    images = _data_format(config, train_data, workdir)
    sde = build_sde(config)
    # Weights, their average, gradients and Adam's two moments.
    model = build_score_model(config, sde, images, copies=5).to(device)
    if training.activation_checkpointing:
        recompute_activations(model.network)
    ema = EMA(model, config.model.ema_rate)
    ema.model.to(device)
    objective = build_objective(config, model)
    test_objective = build_objective(config, ema.model, qc_weight=0.0)
    if runtime.compile:
        check_compile(config, device, training=True)
        model.compile_network()
        ema.model.compile_network()
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad],
        lr=config.optim.lr,
        betas=(config.optim.beta1, 0.999),
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
        fused=True,
    )
    order = dict(seed=config.seed, batch_size=training.batch_size)
    batches = TrainingBatches(train_data, **order)
    conditions = TrainingBatches(train_data.conditions, **order) if images.condition else None
    count = min(config.eval.batch_size, len(test_data))
    test_items = evenly_spaced(range(count), count, len(test_data))
    test_levels, test_labels = test_data.batch(test_items)
    test_condition = to_device(images.condition_of(test_data, test_items), device)
    _check_stride(config, runtime)

    @functools.cache
    def begin() -> dict | None:
        read_once(train_data, runtime)
        read_once(test_data, runtime)
        return _state_to_begin_with(config, begin_with or training.init_from, model, optimizer, images)

    if not (workdir / "checkpoints").exists():
        begin()  # what is wrong with it is said before anything is written

    def class_labels(labels: Tensor, generator: SampleGenerators | None) -> Tensor | None:
        """What a network that knows classes is told of them (b,): with a generator, now and then, none."""
        num_classes = config.model.get("num_classes", 0)
        if not num_classes:
            return None
        if training.label_dropout and generator is not None:
            dropped = uniform((len(labels),), generator) < training.label_dropout
            labels = torch.where(dropped, num_classes, labels)
        return to_device(labels, device)

    def loss(objective: Objective, step: int, positions: range) -> dict[str, Tensor]:
        levels, labels = batches(step, positions)
        generator = SampleGenerators((config.seed, "train", step), positions)
        x0, condition = images.to_model(levels, generator), None
        if conditions is not None:
            x0 = torch.cat([x0, images.condition.to_model(conditions(step, positions)[0])], dim=1)
        if config.data.random_flip:
            x0 = random_flip(x0, generator)  # with its condition
        if conditions is not None:
            x0, condition = x0.split([images.shape[0], images.condition.shape[0]], dim=1)
        told = dict(class_labels=class_labels(labels, generator), condition=to_device(condition, device))
        return objective(to_device(x0, device), generator, step=step, **told)

    def warmup(step: int) -> float:
        # step + 1: the source's step/warmup makes the first step one of size zero.
        return config.optim.lr * (min((step + 1) / config.optim.warmup, 1.0) if config.optim.warmup else 1.0)

    @torch.no_grad()
    def test_loss(step: int) -> dict[str, float]:
        """The score-matching loss of the moving average on (up to eval.batch_size) test images, always with
        the same times and noise."""
        generator = SampleGenerators((config.seed, "test loss"), range(count))
        x0 = images.to_model(test_levels, generator).to(device)
        told = dict(class_labels=class_labels(test_labels, None), condition=test_condition)
        terms = test_objective(x0, generator, **told)
        return {"eval_loss": float(terms["dsm"])}

    def sample_grid(step: int) -> dict[str, bytes]:
        score = TrainedScore(config, ema.model, images, step, runtime=runtime, workdir=workdir)
        share = runtime.share(GRID_IMAGES)
        score.conditions = conditions_of(test_data)
        options = dict(count=GRID_IMAGES, progress=runtime.shows_progress)
        drawn = runtime.gather([score.draw(share, sampler, **options)[0]] if share else [])
        if runtime.is_main:
            path, arrays = workdir / "samples" / f"step_{step:08d}.png", np.concatenate(drawn)
            save_grid(path, arrays, images)
            if not images.is_picture:
                write_arrays(path.with_suffix(".npz"), **_as_file(arrays, images))
            return {"samples": path.read_bytes()}
        return {}

    hooks = [Hook(training.eval_freq, test_loss)]
    if training.snapshot_sampling:
        sampler = build_sampler(config, sde)
        hooks.append(Hook(training.snapshot_freq or training.n_iters, sample_grid))
    loop = Trainer(
        model,
        optimizer,
        loss,
        workdir,
        n_iters=training.n_iters,
        batch_size=training.batch_size,
        objective=objective,
        ema=ema,
        learning_rate=warmup,
        grad_clip=config.optim.grad_clip if config.optim.grad_clip >= 0 else math.inf,
        log_freq=training.log_freq,
        save_freq=training.snapshot_freq_for_preemption,
        milestone_freq=training.snapshot_freq,
        keep=training.keep_checkpoints,
        claim=claim,
        begin=begin,
        record=_record(config, images, train_data),
        check_record=lambda record: _check_data(record, train_data, workdir, runtime),
        hooks=hooks,
        runtime=runtime,
        description=f"train {workdir.name}",
    )
    if announced:
        _announce(loop, config, announced, (train_data, test_data), runtime)
    return loop


def _begin_with(config: ConfigDict) -> tuple[Source, ConfigDict]:
    """What is at ``training.init_from``, and the config with what it says of itself; a run that has begun has that in
    its config, and goes on without the other's files."""
    init_from = config.training.init_from
    return (init_from, config) if "architecture" in config.model else _opened(init_from, config)


def _state_to_begin_with(
    config: ConfigDict, source: Source, model: ScoreModel, optimizer: torch.optim.Optimizer, images: DataFormat
) -> dict | None:
    """Weights, averages, optimiser and step of another run, as the paper starts QC from U."""
    if not source:
        return None
    state, path = _read(source, "training.init_from=", config=config)
    if not _is_own(state, path):
        state = _convert(state, path, model, optimizer)
        if state["optimizer"] is None:
            logger.warning("training.init_from=%s has no optimiser state: Adam's moments start from zero", path)
    else:
        _check_same_score(state["record"], config, path)
        if state["record"]["data"] is not None:  # that of a model from elsewhere is unknown
            theirs = DataFormat.from_dict(state["record"]["images"])
            for what, given, own in (("data", images, theirs), ("conditions", images.condition, theirs.condition)):
                if (now := _model_values(given)) != (then := _model_values(own)):
                    raise ValueError(f"training.init_from={path}: its model sees {what} as {then}, here they are {now}")
    if state["step"] >= (n_iters := config.training.n_iters):
        raise ValueError(
            f"training.n_iters={n_iters}: training.init_from={path} has done {state['step']} steps already"
        )
    return {**state, "source": f"training.init_from={path}"}


def _model_values(images: DataFormat | None) -> str:
    """How a model sees data, in words."""
    if images is None:
        return "none"
    if images.num_levels is not None:
        return "levels in [−1, 1]" if images.centered else "levels in [0, 1]"
    return ", ".join(f"(x − {o:.6g})/{s:.6g}" for o, s in zip(images.offset, images.scale, strict=True))


def _record(config: ConfigDict, images: DataFormat, train_data: Split) -> dict:
    """What a checkpoint says besides weights: enough to sample from it without the data."""
    return {
        "config": config.to_json(),
        "images": images.as_dict(),
        "data": train_data.fingerprint,
        "code_version": code_version(),
    }


def read_once(data: Split, runtime: Runtime) -> None:
    """Read all files and arrays, conditions included, before there is work with them, so that a damaged one does not
    stop it later. They are then known by the fingerprint that the run keeps."""
    for split in (data, conditions_of(data)):
        if hasattr(split, "read_all"):
            with runtime.progress(total=len(split), unit="item", desc=f"read {split.name}") as bar:
                runtime.in_main_process(functools.partial(split.read_all, bar.update))


def _check_data(record: dict, train_data: Split, workdir: Path, runtime: Runtime) -> None:
    """A run goes on with the data that it began with. Of image files, dates are all that is compared."""
    from data import FileSplit

    _check_program(record, workdir)
    if record["data"] == train_data.fingerprint:
        return
    if isinstance(train_data, FileSplit):
        logger.warning("the training data are not, or not known to be, those of %s", workdir)
        return read_once(train_data, runtime)
    raise ValueError(
        f"data.path: other training data than those of --workdir={workdir}; to go on with these take a new workdir and "
        "training.init_from"
    )


# ---------------------------------------------------------------------------------------------------------------
# Evaluation


@in_all_processes
def evaluate(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> dict:
    """Evaluate the moving average of a checkpoint; return the metrics and write them to ``W/eval/metrics.json``, unless
    what is there is of newer weights, and to ``W/eval/metrics/``, whose files are by weights. What is not evaluated now
    stays as an earlier evaluation of the same weights measured it.

    Finished stages are kept under a key that names weights, settings and data; within a stage every finished batch is
    kept until the stage is done.

    Args:
        config, workdir, runtime: the run.
        checkpoint: one of ours or a public one; None: the newest in ``workdir``.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: something of what is measured is not finite.
    """
    workdir, enabled = Path(workdir), config.eval
    with contextlib.ExitStack() as stack:
        with checked():
            checkpoint, config = _opened(checkpoint, config)
            if config.sampling.condition not in ("", "class", "class_free"):
                raise ValueError(f"sampling.condition={config.sampling.condition!r}: only with --mode=sample")
            if runtime.compile and not enabled.enable_sampling and runtime.torch_device.type == "cpu":
                raise ValueError(
                    "--compile: on a CPU not with eval.enable_sampling=False, for all else that is evaluated "
                    "differentiates the score, which a compiled network is not used for"
                )
            _check_request(config, workdir, checkpoint)
            train_data, test_data = load_data(config, runtime)
            sampler, quality = build_sampler(config, build_sde(config)), None
            if enabled.enable_sampling and is_picture(train_data):
                from features.quality import SampleQuality

                cache_dir = _cache_dir(workdir, runtime)
                quality = SampleQuality(enabled, train_data, test_data, cache_dir, runtime, seed=config.seed)
            elif enabled.enable_sampling:
                from evaluation import LEAST_ITEMS

                if (count := min(enabled.num_samples, len(test_data))) < LEAST_ITEMS:
                    raise ValueError(
                        f"eval.num_samples={enabled.num_samples}: to compare distributions takes {LEAST_ITEMS} samples "
                        f"and test items, not {count}"
                    )
            stack.enter_context(runtime.exclusive(workdir / ".evaluation.lock"))
            score = _trained_score(config, workdir, checkpoint, runtime)
            score.take_levels_of(test_data)
            score.conditions = _conditions(score, runtime, test_data)
            if score.trained_on not in (None, train_data.fingerprint):
                logger.warning("data.path=%s: other data than those that the model was trained on", config.data.path)
                read_once(train_data, runtime)
            read_once(test_data, runtime)
        if not (workdir / "config.json").exists():  # a checkpoint from elsewhere
            _write_config(config, workdir, runtime)
        folder = workdir / "eval"
        identity = {**score.identity(), "data": [train_data.fingerprint, test_data.fingerprint]}
        path = folder / "metrics" / f"step_{score.step:08d}-{_digest(identity)[:8]}.json"
        metrics: dict = dict.fromkeys(name for names in METRICS.values() for name in names)
        metrics["sampler"] = str(sampler)
        if condition := config.sampling.condition:
            metrics["sampler"] += f"; {condition}, weight {config.sampling.guidance_weight:g}"
        metrics |= _kept_metrics(path, enabled)
        metrics |= {"checkpoint_step": score.step, "test_images": len(test_data)}
        metrics |= {"parameters": score.num_parameters, "code_version": code_version(), "hardware": hardware()}
        files: dict[str, dict] = {}
        of = {
            "bits/dim of {} test images": enabled.enable_bpd and (enabled.nll_images or len(test_data)),
            "asymmetry of {} of them": enabled.enable_asymmetry and (enabled.asym_images or len(test_data)),
            f"{{}} samples by {sampler}": enabled.enable_sampling and enabled.num_samples,
        }
        wanted = ", ".join(text.format(count) for text, count in of.items() if count)
        data = _about(config, train_data, test_data)
        runtime.announce(f"evaluate {score.description}: {wanted or 'nothing'}", workdir, data)
        if enabled.enable_bpd:
            measured, files["nll.npz"] = evaluate_nll(score, test_data)
            metrics |= measured
        if enabled.enable_asymmetry:
            measured, files["asymmetry.npz"] = _evaluate_asymmetry(score, test_data)
            metrics |= measured
        if enabled.enable_sampling:
            measured, of_samples = evaluate_samples(score, sampler, quality, (train_data, test_data))
            metrics, files = metrics | measured, files | of_samples
        if runtime.is_main:
            write_json(path, metrics, checksum=True)
            _write_newest(folder, metrics, files, score.images)
    return metrics


METRICS = {
    "enable_bpd": (
        *("nll_bits_per_dim", "nll_bits_per_dim_se", "nll_nats_per_dim", "nll_nats_per_dim_se"),
        *("nfe_likelihood", "nll_images", "likelihood"),
    ),
    "enable_asymmetry": (
        *("asym", "asym_se", "nasym", "nasym_se", "asym_images", "asym_levels", "asym_first_level", "asym_probes"),
    ),
    "enable_sampling": (
        *("sampler", "sampling_steps", "nfe_sampling", "num_samples", "outside_range", "fid", "kid", "kid_se"),
        *("inception_score", "inception_score_std", "precision", "recall", "density", "coverage"),
        *("features", "feature_test_accuracy", "reference", "num_reference", "backend"),
        *("sliced_w2", "sliced_w2_se", "sliced_w2_training_data", "marginal_w1", "marginal_w1_se"),
        *("spectrum_error", "spectrum_error_se"),
    ),
}
"""What metrics.json always has, by the field of ``config.eval`` that has it measured; None where it never was."""


def _stored_metrics(path: Path, *, checksum: bool = False) -> dict:
    """What a file of metrics has; nothing if it is missing or damaged."""
    try:
        return dict(read_json(path, checksum=checksum))
    except (OSError, ValueError, TypeError):
        return {}


def _kept_metrics(path: Path, enabled: ConfigDict) -> dict:
    """What a file of metrics of the same weights has of what is not measured again now."""
    fields = {name: field for field, names in METRICS.items() for name in names}
    stored = _stored_metrics(path, checksum=True).items()
    return {name: value for name, value in stored if not enabled[fields.get(name, "enable_sampling")]}


def _write_newest(folder: Path, metrics: dict, files: dict[str, dict], images: DataFormat) -> None:
    """Write what a report reads of a run: metrics.json, and arrays by file; not if those there are of newer weights."""
    step, newest = metrics["checkpoint_step"], _stored_metrics(folder / "metrics.json").get("checkpoint_step", 0)
    if newest > step:
        logger.warning("%s/metrics.json is of step %d, and stays; that of step %d: metrics/", folder, newest, step)
        return
    for name, arrays in files.items():
        write_arrays(folder / name, **arrays)
    if "samples.npz" in files:
        save_grid(folder / "samples.png", files["samples.npz"]["images" if images.is_picture else "samples"], images)
    stale = {"nll": "nfe_likelihood", "asymmetry": "asym", "samples": "nfe_sampling", "distributions": "sliced_w2"}
    for name, measured in stale.items():
        if metrics[measured] is None:  # then those are of other weights
            (folder / f"{name}.npz").unlink(missing_ok=True)
    write_json(folder / "metrics.json", metrics)


def evaluate_nll(score: TrainedScore, data: Split) -> tuple[dict, dict[str, np.ndarray]]:
    """Nats per dimension of the test set, the whole or ``nll_images`` of it; of levels, uniformly dequantised, also
    bits: metrics, and by item.

    An image has the same noise in both cases, so that a part of the test set is a part of the result.
    """
    from experiment.results import mean_and_error

    config = score.config
    count = min(config.eval.nll_images or len(data), len(data))
    likelihood = score.likelihood
    # Of numbers in bits there is no use.
    name, unit = ("nll_bits_per_dim", 1.0) if score.images.num_levels else ("nll_nats_per_dim", math.log(2))

    def compute(positions: range) -> dict[str, np.ndarray]:
        indices = evenly_spaced(positions, count, len(data))
        generator = SampleGenerators((config.seed, "likelihood"), indices)
        levels, labels = data.batch(indices)
        told = dict(class_labels=labels, conditions=score.images.condition_of(data, indices))
        bits, nfe = score.bits_and_nfe(levels, generator, **told)
        return {name: unit * bits.cpu().numpy(), "nfe": np.full(len(bits), nfe)}

    identity = {"data": data.fingerprint, "likelihood": config.likelihood.to_dict()}
    arrays = score.stage("nll", count, identity, compute)
    mean, error = mean_and_error(arrays[name])
    nats = math.log(2) / unit
    metrics = {
        name: mean,
        f"{name}_se": error,
        "nll_nats_per_dim": nats * mean,
        "nll_nats_per_dim_se": None if error is None else nats * error,
        "nll_images": count,
        "nfe_likelihood": float(arrays["nfe"].mean()),
        "likelihood": str(likelihood),
    }
    return metrics, arrays


def _evaluate_asymmetry(score: TrainedScore, data: Split) -> tuple[dict, dict[str, np.ndarray]]:
    """Asym and NAsym at T times over test images perturbed with their own noise: metrics, and by time.

    The times are i/T, i = 1 … T; or i = 0 … T − 1 of [1e-5, 1] instead of [0, 1], where VP's score is finite.
    """
    from experiment.results import mean_and_error

    settings, sde = score.config.eval, score.sde
    count = min(settings.asym_images or len(data), len(data))
    arrays, times = _asymmetry_of_items(score, data, count)
    levels, first = len(times), settings.asym_first_level
    metrics: dict = {"asym_images": count, "asym_probes": settings.asym_probes}
    metrics |= {"asym_levels": levels, "asym_first_level": first}
    curves = {"t": times.numpy(), "sigma": sde.std(times).numpy()}
    for name, values in arrays.items():
        # One image gives values at all levels, so images are what is independent.
        metrics[name], metrics[f"{name}_se"] = mean_and_error(values.mean(1))
        curves[name] = values.mean(0)
        curves[f"{name}_se"] = values.std(0, ddof=1) / math.sqrt(count) if count > 1 else np.full(levels, math.nan)
    return metrics, curves


def _asymmetry_of_items(score: TrainedScore, data: Split, count: int) -> tuple[dict[str, np.ndarray], Tensor]:
    """Asym and NAsym (count, T) of items at T times, and these (T,)."""
    from losses import TRAINING_EPS

    settings, sde, levels = score.config.eval, score.sde, score.config.eval.asym_levels
    first = settings.asym_first_level
    start = 0.0 if first else TRAINING_EPS
    times = start + torch.arange(first, first + levels) / levels * (sde.end_time - start)

    def compute(items: range) -> dict[str, np.ndarray]:
        indices = evenly_spaced([i // levels for i in items], count, len(data))
        generator = SampleGenerators((score.config.seed, "asymmetry"), items)
        images, labels = data.batch(indices)
        x0 = score.images.to_model(images, generator).to(score.device)
        t = times[[i % levels for i in items]].to(score.device)
        mean, std = sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator)
        told = dict(class_labels=labels, conditions=score.images.condition_of(data, indices))
        result = score.asymmetry(xt, t, probes=settings.asym_probes, generator=generator, **told)
        return {"asym": result.asym.cpu().numpy(), "nasym": result.nasym.cpu().numpy()}

    identity = {"data": data.fingerprint, "levels": levels, "first": first, "probes": settings.asym_probes}
    arrays = score.stage("asymmetry_items", count * levels, identity, compute)
    return {name: arrays[name].astype(np.float64).reshape(count, levels) for name in ("asym", "nasym")}, times


def evaluate_samples(
    score: TrainedScore, sampler, quality: SampleQuality | None, data: tuple[Split, Split] = ()
) -> tuple[dict, dict[str, dict]]:
    """How good ``eval.num_samples`` samples are: ``quality`` measures FID and its relatives of images; of other data,
    given in their two halves, it is how far the samples' distribution is from that of the second; metrics, and what is
    kept of them, by file."""
    runtime, arrays = score.runtime, _draw_samples(score, sampler, score.config.eval.num_samples)
    metrics, files = _of_samples(arrays), {}
    count, images = metrics["num_samples"], arrays.get("images")  # in other processes those of their share, if any
    if score.config.sampling.method == "pc":
        metrics["sampling_steps"] = sampler.num_steps
    if quality is not None:
        key = score.stage_key("sample_features", count, _sampling_identity(score))
        labels = score.wanted_labels(range(count)).cpu().numpy() if score.config.sampling.condition else None
        metrics |= quality.measure(images, count, score.workdir / "eval" / "stages", key, labels)
    elif runtime.is_main:
        measured, files["distributions.npz"] = _compare_distributions(score, images, *data)
        metrics |= measured
    if runtime.is_main:
        files["samples.npz"] = _as_file(images, score.images)
    return metrics, files


def _draw_samples(score: TrainedScore, sampler, count: int) -> dict[str, np.ndarray]:
    def compute(indices: range) -> dict[str, np.ndarray]:
        images, nfe, outside = score.draw(indices, sampler, count=count, progress=score._shows_progress)
        of_levels = {} if score.images.num_levels is None else {"outside": outside}
        return {"images": images, "nfe": np.full(len(images), nfe), **of_levels}

    settings = {**_sampling_identity(score), "range": OUTSIDE}
    return score.stage("sample_items", count, settings, compute, large=("images",))


def _of_samples(arrays: dict[str, np.ndarray]) -> dict[str, float | int | None]:
    outside = float(arrays["outside"].mean()) if "outside" in arrays else None
    return {"nfe_sampling": float(arrays["nfe"].mean()), "num_samples": len(arrays["nfe"]), "outside_range": outside}


def _as_file(arrays: np.ndarray, images: DataFormat) -> dict[str, object]:
    """Samples under the names that they have in files."""
    levels = {} if images.num_levels is None else {"num_levels": images.num_levels}
    return {"images" if images.is_picture else "samples": arrays, **levels}


def _compare_distributions(
    score: TrainedScore, samples: np.ndarray, train_data: Split, test_data: Split
) -> tuple[dict, dict[str, np.ndarray]]:
    """How far the distribution of samples is from that of held-out data, in model values: metrics, and curves."""
    from evaluation import compare_distributions, sliced_wasserstein

    def values(data: Split, count: int) -> np.ndarray:
        count = min(count, len(data))
        batches = range(0, count, 256)
        indices = [evenly_spaced(range(start, min(start + 256, count)), count, len(data)) for start in batches]
        return np.concatenate([score.images.to_model(data.batch(part)[0]).numpy() for part in indices])

    generated = score.images.to_model(torch.from_numpy(samples.astype(np.int64 if score.images.num_levels else float)))
    real, seed = values(test_data, len(samples)), score.config.seed
    metrics, curves = compare_distributions(real, generated.numpy(), seed=seed)
    metrics["sliced_w2_training_data"] = sliced_wasserstein(real, values(train_data, len(real)), seed=seed)
    return metrics, curves


def _sampling_identity(score: TrainedScore) -> dict:
    """What decides samples, beside weights and model."""
    settings = json.loads(score.config.sampling.to_json())
    del settings["num_samples"], settings["conditions_path"]
    if not settings["condition"]:
        from guidance.conditions import CONDITION_FIELDS

        settings = {name: value for name, value in settings.items() if name not in CONDITION_FIELDS}
    identity = {"sampling": settings, "images": score.images.as_dict()}
    if score.conditions is not None:
        identity["conditions"] = score.conditions.fingerprint
    return identity if score.classifier is None else {**identity, "classifier": weights_digest(score.classifier)}


@in_all_processes
def statistics(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> Path:
    """Compute the features of the training images that samples are compared with; return the file that keeps them.

    An evaluation with the same cache finds them there, whatever the model; another one takes the file by
    ``config.eval.stats_path``.

    Raises:
        InvalidRun: bad config, data or working directory, or features that are not to be had.
    """
    from features.quality import SampleQuality

    with checked():
        check(config)
        if config.eval.stats_path:
            raise ValueError(f"eval.stats_path={config.eval.stats_path}: there is nothing to compute; leave it empty")
        train_data, test_data = load_data(config, runtime)
        if not is_picture(train_data):
            raise ValueError(f"--mode=stats: features are of grey and colour images, not of {_named_data(config)}")
        cache_dir = _cache_dir(Path(workdir), runtime)
        quality = SampleQuality(config.eval, train_data, test_data, cache_dir, runtime, seed=config.seed)
    what = f"features of {len(train_data)} training images of {_named_data(config)}"
    runtime.announce(what, cache_dir, _about(config, train_data, test_data))
    return quality.reference()[0]


@in_all_processes
def score(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> Path:
    """Write one CSV row for each test item, or each of ``eval.nll_images`` evenly spaced ones: W/scores/NAME.csv.

    Columns: ``index`` in the test half; ``label``; the NLL as in an evaluation; ``score_norm_t…``, σ‖s(αx, t)‖/√D at
    ten times, for outliers show at various scales (Mahmood et al., ICLR 2021); with ``eval.enable_asymmetry`` ``asym``
    and ``nasym``, means over ``eval.asym_levels`` times. The data may be others than the model's, of the same shape.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: something of what is measured is not finite.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        with checked():
            checkpoint, config = _opened(checkpoint, config)
            _check_request(config, workdir, checkpoint, free=("data.",))
            train_data, data = load_data(config, runtime)
            stack.enter_context(runtime.exclusive(workdir / ".scores.lock"))
            trained = _trained_score(config, workdir, checkpoint, runtime, free=("data.",))
            trained.take_levels_of(data)
            read_once(data, runtime)
        count = min(config.eval.nll_images or len(data), len(data))
        what = f"scores of {count} test items of {_named_data(config)} by {trained.description}"
        runtime.announce(what, workdir, _about(config, train_data, data))
        times = torch.arange(1, 11) / 10 * trained.sde.end_time

        def norms(positions: range) -> dict[str, np.ndarray]:
            indices = evenly_spaced(positions, count, len(data))
            items, labels = data.batch(indices)
            x, found = trained.images.to_model(items).to(trained.device), []
            given = trained._given(labels, trained.images.condition_of(data, indices))
            for time in times:
                t = torch.full((len(x),), float(time), device=x.device)
                std = expand(trained.sde.std(t), x)
                value = std * given(expand(trained.sde.mean_coefficient(t), x) * x, t)
                found.append(value.detach().flatten(1).norm(dim=1) / trained.images.dimension**0.5)
            return {"norms": torch.stack(found, 1).cpu().numpy(), "label": labels.numpy()}

        with torch.no_grad():
            arrays = trained.stage("score_norms", count, {"data": data.fingerprint}, norms)
        columns: dict[str, np.ndarray] = {"index": np.array(evenly_spaced(range(count), count, len(data)))}
        if data.num_classes is not None:
            columns["label"] = arrays["label"]
        if config.eval.enable_bpd:
            nll = evaluate_nll(trained, data)[1]
            columns |= {name: values for name, values in nll.items() if name != "nfe"}
        columns |= {f"score_norm_t{time:.1f}": arrays["norms"][:, i] for i, time in enumerate(times)}
        if config.eval.enable_asymmetry:
            columns |= {name: values.mean(1) for name, values in _asymmetry_of_items(trained, data, count)[0].items()}
        identity = {"data": data.fingerprint, "columns": [*columns], **trained.identity()}
        path = workdir / "scores" / f"step_{trained.step:08d}-{data.name.replace('/', '_')}-{_digest(identity)[:8]}.csv"
        if runtime.is_main:
            rows = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
            write_text(path, "\n".join(rows) + "\n")
        runtime.accelerator.wait_for_everyone()
    return path


# ---------------------------------------------------------------------------------------------------------------
# Sampling


@in_all_processes
def sample(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> Path:
    """Draw samples from a checkpoint under ``config.sampling.condition``; return their folder.

    A condition on a class, or none, gives ``sampling.num_samples`` samples and needs no data set; a network that is
    told an array of each sample takes those of ``sampling.conditions_path``, or of test items, evenly spaced:

        W/samples/NAME/samples.npz       images (N, H, W, C), num_levels, nfe and, if they are of classes, labels (N,);
                                         of data that are no grey or colour images, samples (N, ...) in their own units;
                                         conditions (N, C', ...), of a network that is told them
        W/samples/NAME/grid.png, metrics.json, settings.json

    A condition that measures test images: see ``guidance.measured``. NAME says with which sampler and under which
    condition, and ends with a digest of all settings: samples under other settings go to another folder.

    Raises:
        InvalidRun: bad config, data, checkpoint or working directory.
        FloatingPointError: samples are not finite.
    """
    workdir = Path(workdir)
    with contextlib.ExitStack() as stack:
        with checked():
            checkpoint, config = _opened(checkpoint, config)
            sampling = config.sampling
            _check_request(config, workdir, checkpoint)
            sampler = build_sampler(config, build_sde(config))
            name, data, measured, identity = sampler.slug, None, None, {"num_samples": sampling.num_samples}
            if sampling.condition:
                name += f"-{sampling.condition.rpartition(':')[2]}"
            if sampling.condition not in ("", "class", "class_free"):
                name, data = f"{name}-{sampling.conditioning}", load_data(config, runtime)
            stack.enter_context(runtime.exclusive(workdir / f".samples-{name}.lock"))
            score = _trained_score(config, workdir, checkpoint, runtime)
            score.conditions = _conditions(score, runtime)
            if data is not None:
                from guidance.measured import MeasuredImages

                measured = MeasuredImages(score, sampler, *data)
                identity = measured.identity()
        settings = {**score.identity(), **_sampling_identity(score), **identity}
        folder = workdir / "samples" / f"step_{score.step:08d}-{name}-{_digest(settings)[:8]}"
        count = sampling.num_samples if measured is None else sampling.num_images * sampling.samples_per_image
        what = f"{count} samples by {sampler}, of {score.description}"
        runtime.announce(what, folder, "" if data is None else _about(config, *data))
        if measured is not None:
            measured.sample(folder, _sampling_identity(score))
        else:
            arrays = _draw_samples(score, sampler, count)
            if runtime.is_main:
                metrics = {"sampler": str(sampler), **_of_samples(arrays)}
                told = {"labels": score.wanted_labels(range(count)).cpu().numpy()} if sampling.condition else {}
                if score.conditions is not None:
                    given = evenly_spaced(range(count), count, len(score.conditions))
                    told["conditions"] = score.conditions.batch(given)[0].numpy()
                nfe, drawn = metrics["nfe_sampling"], arrays["images"]
                write_arrays(folder / "samples.npz", **_as_file(drawn, score.images), nfe=nfe, **told)
                save_grid(folder / "grid.png", drawn, score.images)
                write_json(folder / "metrics.json", metrics)
        if runtime.is_main:
            write_json(folder / "settings.json", settings)
        runtime.accelerator.wait_for_everyone()
    return folder


# ---------------------------------------------------------------------------------------------------------------
# Export


@in_all_processes
def export(
    config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime(), checkpoint: str | Path | None = None
) -> Path:
    """Write the moving average of a checkpoint to W/export/, which ``load`` reads without trusting it; return the
    folder. Further files are for other programs:

        W/export/model.safetensors, config.json, README.md
        W/export/checkpoint_N.pth                              of a model that score_sde_pytorch has, for that
        W/export/diffusers/                                    of a network of diffusers, for its pipelines

    Raises:
        InvalidRun: bad config, checkpoint or working directory.
    """
    return _export(config, Path(workdir), runtime, checkpoint)


def _export(config: ConfigDict, workdir: Path, runtime: Runtime, checkpoint: str | Path | None = None) -> Path:
    from models.published import model_card, public_checkpoint, write_exported
    from models.published.diffusers import UNet2D, write

    folder = workdir / "export"
    with checked():
        checkpoint, config = _opened(checkpoint, config)
        _check_request(config, workdir, checkpoint)
        state, path = _read(checkpoint or workdir, "--checkpoint=" if checkpoint else "--workdir=", config=config)
        if not _is_own(state, path):
            raise ValueError(f"--checkpoint={path}: is a public checkpoint already; exported are runs of ours")
        _check_same_run(state, path, workdir)
        model = build_score_model(config, build_sde(config), DataFormat.from_dict(state["record"]["images"]))
        load_state_dict_strictly(model, state["ema"]["model"], path)
        metrics = _stored_metrics(workdir / "eval" / "metrics.json")
        if metrics.get("checkpoint_step") != state["step"]:
            metrics = {}

        def write_all() -> None:
            write_exported(folder, state, model_card(config.label or workdir.name, state, metrics))
            if isinstance(model.network, UNet2D):
                write(folder / "diffusers", model.network, config.model.scheduler)
            with contextlib.suppress(CheckpointError):  # no such model there
                write_checkpoint(folder / f"checkpoint_{state['step']}.pth", public_checkpoint(state, model))

        runtime.in_main_process(write_all)
    return folder


# ---------------------------------------------------------------------------------------------------------------
# A trained score


class TrainedScore:
    """The score s(x, t) = ∇ log p_t(x) of a run's moving average, and what can be asked of it.

    Called with x (B, C, ...) as the model sees it, ``images.to_model``, and t (B,) in [0, 1], it gives (B, C, ...). Of
    a network that knows classes it is the unconditional score unless labels (B,) are given. A network that takes
    conditions (B, C', ...) is to be given them, as the model sees them, ``images.condition.to_model``.

    Attributes:
        sde: the forward process.
        images: shape, levels or normalisation, and classes of the data.
        shape: of an item, such as (C, H, W).
        step: of the optimiser, at which the weights were saved.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: ScoreModel,
        images: DataFormat,
        step: int,
        *,
        runtime: Runtime | None = None,
        workdir: Path | None = None,
    ) -> None:
        self.config, self.model, self.images, self.step = config, model, images, step
        self.runtime, self.workdir = runtime, workdir
        self.trained_on: str | None = None  # the fingerprint of the training data, if it is known
        self.classifier: torch.nn.Module | None = None  # where sampling is guided by it
        self.conditions: Split | None = None  # what samples are given, of a network that takes conditions

    @property
    def description(self) -> str:
        """In words: of how many parameters, at which step."""
        return f"a network of {self.num_parameters:,} parameters, step {self.step}"

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def take_levels_of(self, data: Split) -> None:
        """Let what is asked be about these data. They may have another number of levels than those of training, which
        is not even known of a model from elsewhere: model values and their densities are the same for all.

        Raises:
            ValueError: items of another shape, numbers where the model has levels, or the reverse, or other classes.
        """
        levels = {False: "levels", True: "floating-point numbers"}
        given, own = ((tuple(of.shape), levels[of.num_levels is None]) for of in (data, self.images))
        if given != own:
            raise ValueError(
                f"data.dataset: {data.name} has {given[1]} of shape {given[0]}, the model is of {own[1]} of {own[0]}"
            )
        _check_classes(self.config, data)
        _check_conditions(data, self.images)
        self.images = dataclasses.replace(self.images, num_levels=data.num_levels)

    @property
    def sde(self) -> SDE:
        return self.model.sde

    @property
    def shape(self) -> tuple[int, ...]:
        return self.images.shape

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def num_classes(self) -> int:
        """Of the network, which in its place among the labels has one that stands for no class; 0: it knows none."""
        return self.config.model.get("num_classes", 0)

    def __call__(
        self, x: Tensor, t: Tensor, class_labels: Tensor | None = None, conditions: Tensor | None = None
    ) -> Tensor:
        self._check_condition(conditions, len(x))
        # In the precision asked for, but in float32 where it is differentiated (docs/mixed_precision.md).
        if class_labels is None and self.num_classes:
            if not self.config.training.label_dropout:
                raise ValueError(
                    f"a network of model.num_classes={self.num_classes} trained with training.label_dropout=0 has no "
                    "unconditional score: it needs class labels"
                )
            class_labels = torch.full((len(x),), self.num_classes, device=x.device)
        plain = self.runtime is None or x.requires_grad
        with contextlib.nullcontext() if plain else self.runtime.accelerator.autocast():
            return self.model(x, t, class_labels, conditions).to(x.dtype)

    def _check_condition(self, conditions: Tensor | None, count: int) -> None:
        given, own = None if conditions is None else tuple(conditions.shape), self.images.condition
        if given != (wanted := None if own is None else (count, *own.shape)):
            raise ValueError(f"conditions: of shape {given}, but the network is to be given {wanted}")

    # -- samples

    def sample(
        self, n: int, *, conditions: Tensor | None = None, seed: int = 0, progress: bool = False, **options
    ) -> Tensor:
        """``n`` samples (n, C, ...) in model values; ``images.to_data`` gives levels, or numbers in the data's units.

        Args:
            n: how many.
            conditions: (n, C', ...), of a network that takes conditions.
            seed: sample i is a function of (seed, i).
            progress: show a progress bar.
            options: fields of ``config.sampling`` to be used instead of those of the run, e.g. ``num_steps=100``,
                ``method="few_step"``, ``solver="dpmpp_2m_sde"``, ``num_steps=19``.

        Raises:
            ValueError: a bad option.
        """
        score = copy.copy(self)
        score.config = config = self.config.copy_and_resolve_references()
        if unknown := options.keys() - config.sampling.keys() | options.keys() & {"num_samples"}:
            raise ValueError(f"sampling.{min(unknown)}: no such field")
        config.sampling.update(options)
        check(config)
        _check_classes(config, self.images)
        if config.sampling.condition not in ("", "class_free"):
            raise ValueError(f"sampling.condition={config.sampling.condition!r}: only with --mode=sample")
        generator = SampleGenerators((seed, "samples"), range(n))
        like = torch.zeros((n, *self.shape), device=self.device)
        sampler = build_sampler(config, self.sde)
        self._check_condition(conditions, n)
        return sampler(score._sampling_score(range(n), conditions), like, generator, progress=progress).x

    def draw(
        self, indices: Sequence[int], sampler, *, count: int, progress: bool = False
    ) -> tuple[np.ndarray, float, np.ndarray]:
        """Samples number ``indices`` of ``count`` as files have them; network evaluations per sample; and of levels in
        which of them (B,) a value was outside of ``OUTSIDE`` before it was clipped, the lowest level being 0 and the
        highest 1."""
        generator = SampleGenerators((self.config.seed, "samples"), indices)
        like = torch.zeros((len(indices), *self.shape), device=self.device)
        conditions = None
        if self.conditions is not None:
            chosen = evenly_spaced(indices, count, len(self.conditions))
            conditions = self.images.condition.to_model(self.conditions.batch(chosen)[0])
        samples = sampler(self._sampling_score(indices, conditions), like, generator, progress=progress)
        values, (low, high) = unscale(samples.x.flatten(1), self.images.centered), OUTSIDE
        outside = ((values < low) | (values > high)).any(1).cpu().numpy()
        return self.images.to_arrays(self.images.to_data(samples.x)), samples.nfe, outside

    def wanted_labels(self, indices: Sequence[int]) -> Tensor:
        """The classes (B,) that ``sampling.condition`` wants of samples number ``indices``."""
        label, numbers = self.config.sampling.class_label, torch.tensor(list(indices), device=self.device)
        return numbers % self.images.num_classes if label == -1 else torch.full_like(numbers, label)

    def _sampling_score(self, indices: Sequence[int], conditions: Tensor | None):
        """The score for samples number ``indices``: of their class, or unconditional; with their conditions, if any."""
        sampling = self.config.sampling
        if sampling.condition not in ("class", "class_free"):
            return self._given(None, conditions)
        from guidance.conditions import ClassifierFreeGuidance, ClassifierGuidance

        labels, weight = self.wanted_labels(indices), sampling.guidance_weight
        if sampling.condition == "class_free":
            conditions = to_device(conditions, self.device)
            return ClassifierFreeGuidance(self, labels, self.num_classes, weight, conditions)
        return ClassifierGuidance(self, self.classifier.log_probs, labels, weight=weight)

    # -- likelihood and asymmetry

    @property
    def likelihood(self):
        """The evaluator of ``config.likelihood``."""
        from likelihood import LikelihoodEvaluator

        return LikelihoodEvaluator(self.sde, **self.config.likelihood)

    def log_prob(self, x: Tensor, *, conditions: Tensor | None = None, seed: int = 0) -> Tensor:
        """log p(x) (B,) in nats at points (B, C, ...) as the model sees them, by the probability flow."""
        generator = SampleGenerators((seed, "likelihood"), range(len(x)))
        return self.likelihood(self._given(None, conditions), x.to(self.device), generator).log_prob

    def bits_per_dim(self, levels: Tensor, *, conditions: Tensor | None = None, seed: int = 0) -> Tensor:
        """Bits per dimension (B,) of levels (B, C, ...), uniformly dequantised, or of numbers in their own units; ln 2
        times as many nats."""
        generator = SampleGenerators((seed, "likelihood"), range(len(levels)))
        return self.bits_and_nfe(levels, generator, conditions=conditions)[0]

    def bits_and_nfe(
        self,
        levels: Tensor,
        generator: SampleGenerators,
        class_labels: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> tuple[Tensor, float]:
        """The same, of images of classes (B,), with given noise, and network evaluations per image."""
        from likelihood import bits_per_dim

        x = self.images.to_model(levels, generator, dequantize=True).to(self.device)
        result = self.likelihood(self._given(class_labels, conditions), x, generator, progress=self._shows_progress)
        return bits_per_dim(result.log_prob, self.images.dimension, self.images.log2_unit), result.nfe

    def asymmetry(
        self,
        x: Tensor,
        t: Tensor,
        *,
        probes: int | None = None,
        generator: SampleGenerators | None = None,
        class_labels: Tensor | None = None,
        conditions: Tensor | None = None,
    ) -> Asymmetry:
        """Asym and NAsym (B,) at x (B, C, ...) and t (B,), from so many probes, or exact with ``probes=0``.

        By default they are exact for up to 256 dimensions, and else from 16 probes.
        """
        from conservativeness import EXACT_MAX_DIMENSION, asymmetry

        if probes is None:
            probes = 0 if math.prod(self.shape) <= EXACT_MAX_DIMENSION else 16
        x, t = x.to(self.device), t.to(self.device)
        options = dict(probes=probes or None, generator=generator, progress=self._shows_progress)
        return asymmetry(self._given(class_labels, conditions), x, t, **options)

    @property
    def _shows_progress(self) -> bool:
        return self.runtime is not None and self.runtime.shows_progress

    def _given(self, class_labels: Tensor | None, conditions: Tensor | None):
        """The score that a network has for what it is told of items (B, ...): for their classes, if it knows classes,
        and their conditions."""
        class_labels = class_labels if self.num_classes else None
        if class_labels is None and conditions is None:
            return self
        from guidance.conditions import GivenScore

        return GivenScore(self, to_device(class_labels, self.device), to_device(conditions, self.device))

    # -- stages of an evaluation

    def identity(self) -> dict:
        """What decides whatever is computed with this score."""
        config = self.config
        return {
            "seed": config.seed,
            "weights": weights_digest(self.model),
            "training": {name: config.training[name] for name in ("sde", "continuous")},
            "model": json.loads(config.model.to_json()),
            "images": self.images.as_dict(),
            "precision": self.runtime.numbers,
        }

    def stage_key(self, name: str, size: int, settings: dict) -> str:
        return _digest({"version": EVALUATION_VERSION, "stage": name, "size": size, **self.identity(), **settings})

    def stage(self, name: str, size: int, settings: dict, compute, **options: object) -> dict[str, np.ndarray]:
        """Arrays with one row per item, kept in W/eval/stages/NAME-KEY.npz; ``settings`` decide the result beside the
        weights. Options are those of ``Runtime.compute``."""
        key = self.stage_key(name, size, settings)
        return self.runtime.compute(
            self.workdir / "eval" / "stages" / f"{name}-{key[:16]}.npz",
            key,
            size,
            self.config.eval.batch_size,
            compute,
            description=f"{name.removesuffix('_items')} {self.workdir.name}, step {self.step}",
            **options,
        )


def load(
    path: str | Path, *, step: int | None = None, device: str = "cpu", config: ConfigDict | None = None
) -> TrainedScore:
    """A trained score for notebooks and scripts.

    Nothing is written or locked, and no data set is read.

    Args:
        path: a run's folder, one of its checkpoint files, a public ``.pth``, or another published model
            (docs/published_models.md).
        step: which checkpoint of the folder; the newest by default.
        device: where to compute.
        config: of a public ``.pth``, which does not say how its network is built; of one of ours, in place of its own;
            of another model, for what that does not say itself.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be read.
        ValueError: a public checkpoint without its config.
    """
    source, config = _opened(path, config)
    state, path = _read(source, "", step, config)
    if config is None:
        if not _is_own(state, path):
            raise ValueError(f"{path} is a public checkpoint: give load(…, config=…) the config it was trained with")
        config = config_of(parse_json(state["record"]["config"], path), path)
    check(config)
    return _score_from_state(state, path, config, torch.device(device))


def _trained_score(
    config: ConfigDict, workdir: Path, checkpoint: Source | None, runtime: Runtime, free: tuple[str, ...] = ()
) -> TrainedScore:
    """The score of a checkpoint, for evaluation and sampling; with the classifier that guides it, if one does."""
    _check_request(config, workdir, checkpoint, free)
    state, path = _read(checkpoint or workdir, "--checkpoint=" if checkpoint else "--workdir=", config=config)
    _check_same_run(state, path, workdir)
    score = _score_from_state(state, path, config, runtime.torch_device)
    score.runtime, score.workdir = runtime, workdir
    runtime.check_agreement("the checkpoint's step", score.step, workdir)
    _check_classes(config, score.images)
    if runtime.compile:
        check_compile(config, runtime.torch_device)
        score.model.compile_network()
    if config.sampling.condition == "class":
        from guidance.classifier import load_classifier

        identity = _classifier_identity(config, score.images)
        classifier = load_classifier(
            workdir, score.sde, config.classifier, score.images, identity=identity, seed=config.seed
        )
        score.classifier = classifier.to(score.device)
    return score


def _check_request(config: ConfigDict, workdir: Path, checkpoint: Source | None, free: tuple[str, ...] = ()) -> None:
    """Refuse what is known to be wrong before anything of a run but its config is read; other values of ``free`` fields
    are not."""
    check(config)
    _check_workdir(config, workdir, (*FREE_IN_EVALUATION, *free))
    source, flag = checkpoint or workdir, "--checkpoint=" if checkpoint else "--workdir="
    if not isinstance(source, tuple) and not (Path(source).is_file() or (Path(source) / "checkpoints").is_dir()):
        raise CheckpointError(f"{flag}{source}: no checkpoint there; train first")


def _read(
    source: Source, flag: str, step: int | None = None, config: ConfigDict | None = None
) -> tuple[dict | list, Path]:
    """The checkpoint in a file, or the one in a run's folder of a step, by default the newest, which in a folder of the
    public codes is the one of the highest number; or the model of another project, with its config; and its file.

    Raises:
        CheckpointError: there is none, which ``flag`` named, or it cannot be read.
    """
    if isinstance(source := _opened(source, config)[0], tuple):
        return source
    path = Path(source)
    if path.is_file():
        return read_checkpoint(path), path
    store = CheckpointStore(path / "checkpoints")
    if step is not None:
        check_version(state := read_checkpoint(store.path(step)), store.path(step))
    elif (state := store.load_latest()) is None:
        public = [file for file in store.directory.glob("checkpoint_*.pth") if file.stem[11:].isdecimal()]
        if not public:
            raise CheckpointError(f"{flag}{path}: no checkpoint there; train first")
        newest = max(public, key=lambda file: int(file.stem[11:]))
        return read_checkpoint(newest), newest
    return state, store.path(state["step"])


def _opened(source: Source | None, config: ConfigDict | None) -> tuple[Source | None, ConfigDict | None]:
    """What a model of another project at a path is as a checkpoint, and the config with what it says of itself. Where
    there is none, but a run of ours, a checkpoint file or nothing, or where it has been read, both as they are."""
    if not source or isinstance(source, tuple) or (Path(source) / "checkpoints").is_dir():
        return source, config
    if Path(source).is_file() and Path(source).suffix != ".pkl":
        return source, config
    from models.published import read_published

    return read_published(source, config) or (source, config)


def _score_from_state(state: dict | list, path: Path, config: ConfigDict, device: torch.device) -> TrainedScore:
    sde, trained_on = build_sde(config), None
    if _is_own(state, path):
        _check_same_score(state["record"], config, path)
        images, trained_on = DataFormat.from_dict(state["record"]["images"]), state["record"]["data"]
        model = build_score_model(config, sde, images)
    else:
        data = config.data
        images = DataFormat(
            item_shape(data),
            num_levels=256,
            num_classes=config.model.get("num_classes", 0) or None,
            centered=data.centered,
            dequantized=data.uniform_dequantization,
        )
        model = build_score_model(config, sde, images)
        state = _convert(state, path, model)
    load_state_dict_strictly(model, state["ema"]["model"], path)
    score = TrainedScore(config, model.eval().requires_grad_(False).to(device), images, state["step"])
    score.trained_on = trained_on
    return score


# ---------------------------------------------------------------------------------------------------------------
# The classifier of noised images


@in_all_processes
def train_classifier(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> dict[str, float]:
    """Train ``config.classifier`` for ``n_iters`` steps in all; return loss and accuracy on test images at some times.

    Raises:
        InvalidRun: bad config, data or working directory, or several processes.
        FloatingPointError: the loss, or what training comes to, is not finite; that is not saved.
        Interrupted: SIGINT or SIGTERM arrived; a checkpoint has been written.
    """
    from guidance.classifier import ClassifierTraining

    workdir = Path(workdir)
    with checked():
        check(config)
        _check_workdir(config, workdir, FREE_IN_EVALUATION)
        train_data, test_data = load_data(config, runtime)
        images = _data_format(config, train_data)
        if len(images.shape) != 3:
            raise ValueError(f"--mode=train_classifier: of images, data.shape=(C, H, W), not of {_named_data(config)}")
        if images.condition is not None:
            raise ValueError(f"--mode=train_classifier: {train_data.name} has conditions, which no classifier is told")
        if not (workdir / "classifier" / "experiment.json").exists():
            read_once(train_data, runtime)
        training = ClassifierTraining(
            workdir,
            build_sde(config),
            config.classifier,
            train_data,
            test_data,
            images,
            identity=_classifier_identity(config, images),
            flip=config.data.random_flip,
            test_images=config.eval.batch_size,
            seed=config.seed,
            runtime=runtime,
        )
    _announce(training.trainer, config, "train a classifier:", (train_data, test_data), runtime)
    training.trainer.run()
    return training.test()


def _classifier_identity(config: ConfigDict, images: DataFormat) -> dict:
    """What decides the classifier, but for the number of steps and how often it is logged and saved."""
    model, own = json.loads(config.model.to_json()), json.loads(config.classifier.to_json())
    noise = ("schedule", "sigma_min", "sigma_max", "beta_min", "beta_max", "rho")
    return {
        "images": images.as_dict(),
        "random_flip": config.data.random_flip,
        "seed": config.seed,
        "sde": config.training.sde,
        "noise": {name: model[name] for name in noise if name in model},
        "classifier": {name: own[name] for name in own if name not in ("n_iters", "log_freq", "save_freq")},
    }


# ---------------------------------------------------------------------------------------------------------------
# From a config to what it describes, and checks of what only a run as a whole can get wrong


def build_sde(config: ConfigDict) -> SDE:
    return make_sde(config.training.sde, config.model.get("schedule", ""), config.model)


def _data_format(config: ConfigDict, data: Split, workdir: Path | None = None) -> DataFormat:
    """That of a run; the normalisation of numbers is computed when it begins, and kept in its checkpoints."""
    settings = config.data
    if workdir is not None and (data.num_levels is None or conditions_of(data) is not None):
        store = CheckpointStore(workdir / "checkpoints")
        if (state := store.load_latest()) is not None:
            _check_program(state["record"], store.path(state["step"]))
            images = DataFormat.from_dict(state["record"]["images"])
            _check_conditions(data, images)
            return images
    options = dict(centered=settings.centered, dequantized=settings.uniform_dequantization)
    return DataFormat.of(data, **options, normalization=settings.normalization)


def build_score_model(config: ConfigDict, sde: SDE, images: DataFormat, copies: int = 2) -> ScoreModel:
    """A new score model; its initial weights are keyed by the seed. ``copies``: how many there must be memory for."""
    model, num_scales = config.model, None if config.training.continuous else config.model.num_scales
    torch.manual_seed(config.seed)
    with within_memory(f"model.nf={model.nf}", copies):
        options = dict(shape=images.shape, centered=images.centered, num_levels=num_scales)
        options["condition_channels"] = images.condition.shape[0] if images.condition else 0
        network = make_network(model.name, model, **options)
    return make_score_model(
        sde,
        network,
        parameterization=model.parameterization,
        num_scales=num_scales,
        scale_by_sigma=model.scale_by_sigma,
        prediction=model.get("prediction", ""),
    )


def build_objective(config: ConfigDict, model: ScoreModel, **changes) -> Objective:
    from losses import make_objective

    return make_objective(model, {**config.training, **changes})


def build_sampler(config: ConfigDict, sde: SDE):
    from sampling import make_sampler

    return make_sampler(sde, config.sampling, num_scales=config.model.num_scales, continuous=config.training.continuous)


def load_data(config: ConfigDict, runtime: Runtime | None = None) -> tuple[Split, Split]:
    from data import load_dataset

    data = config.data
    names = ("num_levels", "path", "root", "download", "resize", "background")
    with runtime.accelerator.main_process_first() if runtime else contextlib.nullcontext():
        train_data, test_data = load_dataset(
            data.dataset, shape=item_shape(data), **{name: data[name] for name in names}
        )
    _check_classes(config, train_data)
    return train_data, test_data


def _conditions(score: TrainedScore, runtime: Runtime, test_data: Split | None = None) -> Split | None:
    """What samples are given: the conditions of ``sampling.conditions_path``, or those of test data, which are loaded
    if need be; None if the network takes none."""
    config, own = score.config, score.images.condition
    path = config.sampling.conditions_path
    if own is None:
        if path:
            raise ValueError(f"sampling.conditions_path={path}: this network takes no conditions")
        return None
    if config.sampling.condition not in ("", "class_free"):
        raise ValueError(f"sampling.condition={config.sampling.condition!r}: not of a network that takes conditions")
    if not path:
        data = load_data(config, runtime)[1] if test_data is None else test_data
        if test_data is None:
            score.take_levels_of(data)
        given = data.conditions
    else:
        from data.arrays import read_conditions

        given = read_conditions(Path(path).expanduser(), len(own.shape))
        if given.shape != own.shape:
            raise ValueError(f"sampling.conditions_path={path}: conditions of shape {given.shape}, not {own.shape}")
    read_once(given, runtime)
    return given


def _check_conditions(data: Split, images: DataFormat) -> None:
    given, own = (
        "none" if of is None else f"some of shape {tuple(of.shape)}" for of in (conditions_of(data), images.condition)
    )
    if given != own:
        raise ValueError(f"data.dataset: of conditions {data.name} has {given}, the model takes {own}")


def _cache_dir(workdir: Path, runtime: Runtime) -> Path:
    return Path(runtime.cache_dir or workdir / "eval" / "cache")


def _check_classes(config: ConfigDict, images: DataFormat | Split) -> None:
    sampling, own, available = config.sampling, config.model.get("num_classes", 0), images.num_classes
    dataset = f"data.dataset={config.data.dataset!r}"
    if own and own != available:
        raise ValueError(f"model.num_classes={own}: {dataset} has {available or 'no'} classes")
    if sampling.condition in ("class", "class_free"):
        if available is None:
            raise ValueError(f"sampling.condition={sampling.condition!r}: {dataset} has no classes")
        if not -1 <= sampling.class_label < available:
            raise ValueError(
                f"sampling.class_label={sampling.class_label}: allowed are 0 to {available - 1}, or -1 for all in turn"
            )


def _check_stride(config: ConfigDict, runtime: Runtime) -> None:
    stride, passes = config.training.qc_stride, runtime.accelerator.num_processes * runtime.accumulation_steps
    if (samples := config.training.batch_size // passes) % stride:
        raise ValueError(f"training.qc_stride={stride}: must divide the {samples} samples of one pass")


def check_compile(config: ConfigDict, device: torch.device, *, training: bool = False) -> None:
    """Raise a ValueError unless this score can be compiled, on this machine."""
    # What is differentiated twice is compiled on GPUs alone (``ScoreModel.compile_network``).
    on_cpu, conditioning = device.type == "cpu", config.sampling.conditioning
    if on_cpu and config.model.parameterization == "conservative":
        raise ValueError(
            "--compile: on a CPU not with model.parameterization='conservative', whose every score is a derivative; "
            "torch.compile cannot differentiate twice"
        )
    guided = config.sampling.condition not in ("", "class", "class_free") and conditioning != "projection"
    if on_cpu and not training and guided:
        raise ValueError(
            f"--compile: on a CPU not with sampling.conditioning={conditioning!r}, which differentiates the score; a "
            "compiled network is not used for that"
        )
    if training and config.training.activation_checkpointing:
        raise ValueError(
            "--compile: not while training with training.activation_checkpointing=True, which leaves torch.compile "
            "next to nothing to join"
        )
    if on_cpu and training and config.training.qc_weight and config.training.qc_interval == 1:
        raise ValueError(
            "--compile: on a CPU not while training with training.qc_weight > 0 in every step, which differentiates "
            "the score twice; a compiled network is for the steps between, training.qc_interval > 1"
        )
    try:
        torch.compile(torch.neg)(torch.zeros(1, device=device))
    except Exception as error:  # of whatever kind its backend raises, which without a compiler are several
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"--compile: torch.compile does not work on this machine: {reason}") from error


def _check_workdir(config: ConfigDict, workdir: Path, free_fields: tuple[str, ...]) -> None:
    """Refuse a folder that is another experiment's, or holds a run with other values of fields that matter."""
    check_folder(workdir)
    if (workdir / "experiment.json").exists():
        raise ValueError(f"--workdir={workdir}: belongs to one of the examples; choose another folder")
    path = workdir / "config.json"
    if not path.exists():
        return
    if not isinstance(stored := read_json(path), dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    if different := _differences(stored, config, free_fields):
        raise ValueError(f"--workdir={workdir} holds another run: {different}")


def _differences(stored: dict, config: ConfigDict, free_fields: tuple[str, ...]) -> str:
    """In words, where a config differs from one that a file holds, but in fields that are free."""
    stored, given = flatten(stored), flatten(json.loads(config.to_json()))
    # A field that is newer than a config has its default, of which JSON has lists in place of tuples.
    defaults = {name: FIELDS[name].default for name in stored.keys() | given.keys() if name in FIELDS}
    defaults = json.loads(json.dumps(defaults))
    return differences(defaults | stored, defaults | given, free_fields)


def _check_same_score(record: dict, config: ConfigDict, source: Path) -> None:
    """Refuse weights of ours that are not of the score that the config describes: with most other settings they fit
    the network all the same, and the score would be another one."""
    decisive = {"training": ("sde", "continuous"), "data": ("centered", "normalization")}
    free = ("label", "seed", "model.dropout", "model.ema_rate")
    free += tuple(f"{name}." for name in config if name not in ("model", *decisive))
    free += tuple(f"{part}.{name}" for part in decisive for name in config[part] if name not in decisive[part])
    if different := _differences(json.loads(record["config"]), config, free):
        raise ValueError(f"{source} is of another model: {different}")


def _check_same_run(state: dict | list, path: Path, workdir: Path) -> None:
    """Refuse weights of another run in the folder of one: what is measured would be taken for that run's."""
    stored, own = workdir / "config.json", path.absolute().parent == (workdir / "checkpoints").absolute()
    if own or not (stored.exists() and CheckpointStore(workdir / "checkpoints").steps()):
        return
    if _is_own(state, path):
        different = _differences(
            read_json(stored), config_of(parse_json(state["record"]["config"], path), path), FREE_IN_TRAINING
        )
    else:
        different = "it is a public checkpoint"
    if different:
        raise ValueError(f"{path} is not of the run in --workdir={workdir}; take another folder: {different}")


def _is_own(state: dict | list, path: Path) -> bool:
    """Whether a checkpoint is one of ours, which must be of this version, rather than a public one."""
    if isinstance(state, list) or "record" not in state:
        return False
    check_version(state, path)
    _check_program(state["record"], path)
    return True


def _check_program(record: dict, source: Path) -> None:
    if "images" not in record:  # a bridge, a classifier, an example
        raise CheckpointError(f"{source}: a checkpoint of another program than main.py")
    try:
        shape, config = DataFormat.from_dict(record["images"]).shape, json.loads(record["config"])
        whole = shape and all(map(is_count, shape)) and isinstance(config, dict) and "data" in record
    except (AttributeError, KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise CheckpointError(f"{source}: not a whole checkpoint; missing, or of another form: parts of its record")


def _convert(state: dict | list, path: Path, model: ScoreModel, optimizer: torch.optim.Optimizer | None = None) -> dict:
    """A public checkpoint as one of ours."""
    from models.published import convert_public_checkpoint

    if not isinstance(model, UnconstrainedScore):
        raise CheckpointError(
            f"{path} is in the public format, whose conservative models are ∇(−‖h/σ‖²/(2σ)) and not Eq. 10, and which "
            "knows no others: model.parameterization must be unconstrained"
        )
    return convert_public_checkpoint(state, path, model, optimizer)


def _digest(identity: dict) -> str:
    return hashlib.blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def _write_config(config: ConfigDict, workdir: Path, runtime: Runtime) -> None:
    path, text = workdir / "config.json", config.to_json(indent=1, sort_keys=True) + "\n"
    if runtime.is_main and not (path.exists() and path.read_text() == text):
        write_text(path, text)
