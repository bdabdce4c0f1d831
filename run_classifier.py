"""The classifier of noised images that classifier guidance needs: trained beside a run, for its SDE and its data.

    W/classifier/experiment.json     what it was made for
    W/classifier/checkpoints/        one, which training resumes from, to the very same result
    W/classifier/metrics.jsonl       cross-entropy and accuracy on noised images
    W/classifier/tensorboard/

It learns log p(c | x_t, t) by cross-entropy, at times uniform on [1e-5, 1] as the score model does (Song et al., ICLR
2021, Appendix I.1).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor

from checkpoints import CheckpointError, CheckpointStore, load_state_dict_strictly
from data.pixels import random_flip
from data.sets import batch_indices
from experiment.randomness import Generator, SampleGenerators, normal_like, seed_from, uniform
from experiment.workdir import claim
from guidance.classifier import NoiseConditionalClassifier
from losses import TRAINING_EPS
from run_setup import FREE_IN_EVALUATION, Run, Runtime, checked
from sde_lib import expand
from training import fit

__all__ = ["load_classifier", "train_classifier"]

_EXPERIMENT = "classifier of noised images"
_NOISE_FIELDS = ("schedule", "sigma_min", "sigma_max", "beta_min", "beta_max", "rho")


def train_classifier(config: ConfigDict, workdir: str | Path, runtime: Runtime = Runtime()) -> dict[str, float]:
    """Train ``config.classifier`` for ``n_iters`` steps in all; return loss and accuracy on test images at some times.

    Raises:
        InvalidRun: bad config, data or working directory, or several processes.
        FloatingPointError: the loss is not finite; the last checkpoint is good.
    """
    with checked():
        run = Run(config, workdir, runtime, free_fields=FREE_IN_EVALUATION)
        _check(run)
        classifier = _build(run)
        folder = claim(_folder(run), _EXPERIMENT, _settings(run))
    training = _Training(run, classifier.to(run.device))
    settings = config.classifier
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    with run.progress(total=settings.n_iters, unit="step", desc=f"classifier {run.workdir.name}") as bar:
        fit(
            classifier,
            training.loss,
            optimizer,
            folder,
            n_iters=settings.n_iters,
            grad_clip=1.0,
            log_freq=settings.log_freq,
            save_freq=settings.save_freq,
            observe=training.observe,
            update=bar.update,
        )
    return training.observe()


def load_classifier(run: Run) -> NoiseConditionalClassifier:
    """The trained classifier of a run, on its device.

    Raises:
        CheckpointError: there is none.
        ValueError: it was made for another SDE, other data, or with other settings than the config has.
    """
    store = CheckpointStore(_folder(run) / "checkpoints", keep=1, milestone_every=0)
    state = store.load_latest()
    if state is None:
        raise CheckpointError(
            f"sampling.condition='class': no classifier in {_folder(run)}; --mode=train_classifier trains it"
        )
    claim(_folder(run), _EXPERIMENT, _settings(run), exclusive=False)
    classifier = _build(run)
    load_state_dict_strictly(classifier, state["model"], store.path(state["step"]))
    return classifier.to(run.device).eval().requires_grad_(False)


class _Training:
    """The loss at a step, and what is logged."""

    TIMES = (0.0, 0.25, 0.5, 0.75)

    def __init__(self, run: Run, classifier: NoiseConditionalClassifier) -> None:
        self.run, self.config, self.classifier = run, run.config, classifier

    def loss(self, step: int) -> dict[str, Tensor]:
        config, data = self.config, self.run.train_data
        self.classifier.train()
        size = config.classifier.batch_size
        images, labels = data.batch(batch_indices(config.seed, step, size, len(data)))
        generator = SampleGenerators((config.seed, "classifier", step), range(size))
        x0 = self.run.to_model(images, generator, dequantize=config.data.uniform_dequantization)
        if config.data.random_flip:
            x0 = random_flip(x0, generator)
        t = TRAINING_EPS + uniform((size,), generator) * (self.run.sde.end_time - TRAINING_EPS)
        # Of dropout, which draws from the global stream.
        with torch.random.fork_rng(devices=[self.run.device] if self.run.device.type == "cuda" else []):
            torch.manual_seed(seed_from(config.seed, "classifier dropout", step))
            logits, labels = self._logits(x0, t, labels, generator)
        return {
            "loss": F.cross_entropy(logits, labels),
            "accuracy": (logits.argmax(1) == labels).float().mean(),
        }

    @torch.no_grad()
    def observe(self) -> dict[str, float]:
        """Cross-entropy and accuracy at fixed times on (up to eval.batch_size) test images, always with the same
        noise."""
        self.classifier.eval()
        data, config = self.run.test_data, self.config
        count = min(config.eval.batch_size, len(data))
        images, labels = data.batch(torch.arange(count) * len(data) // count)
        row = {}
        for time in self.TIMES:
            generator = SampleGenerators((config.seed, "classifier test", str(time)), range(count))
            x0 = self.run.to_model(images, generator, dequantize=config.data.uniform_dequantization)
            logits, wanted = self._logits(x0, torch.full((count,), max(time, TRAINING_EPS)), labels, generator)
            row[f"test_loss_t{time:g}"] = float(F.cross_entropy(logits, wanted))
            row[f"test_accuracy_t{time:g}"] = float((logits.argmax(1) == wanted).float().mean())
        return row

    def _logits(self, x0: Tensor, t: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean, std = self.run.sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator)
        return self.classifier(xt.to(self.run.device), t.to(self.run.device)), labels.to(self.run.device)


def _build(run: Run) -> NoiseConditionalClassifier:
    settings = run.config.classifier
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_from(run.config.seed, "classifier weights"))
        return NoiseConditionalClassifier(
            run.sde,
            image_shape=run.train_data.image_shape,
            num_classes=run.train_data.num_classes,
            nf=settings.nf,
            ch_mult=tuple(settings.ch_mult),
            num_res_blocks=settings.num_res_blocks,
            dropout=settings.dropout,
        )


def _folder(run: Run) -> Path:
    return run.workdir / "classifier"


def _settings(run: Run) -> dict:
    """What decides the classifier, but for the number of steps and how often it is logged and saved."""
    model = json.loads(run.config.model.to_json())
    own = json.loads(run.config.classifier.to_json())
    return {
        "data": run.train_data.fingerprint,
        "centered": run.config.data.centered,
        "dequantized": run.config.data.uniform_dequantization,
        "random_flip": run.config.data.random_flip,
        "seed": run.config.seed,
        "sde": run.config.training.sde,
        "noise": {name: model[name] for name in _NOISE_FIELDS if name in model},
        "classifier": {name: own[name] for name in own if name not in ("n_iters", "log_freq", "save_freq")},
    }


def _check(run: Run) -> None:
    settings = run.config.classifier
    for name in ("n_iters", "batch_size", "log_freq", "save_freq"):
        if settings[name] < 1:
            raise ValueError(f"classifier.{name}={settings[name]}: at least 1")
    if not settings.lr > 0 or not settings.weight_decay >= 0:
        raise ValueError(
            f"classifier.lr={settings.lr}, classifier.weight_decay={settings.weight_decay}: need lr > 0 and "
            "weight_decay >= 0"
        )
    if run.train_data.num_classes is None:
        raise ValueError(f"--mode=train_classifier: data.dataset={run.config.data.dataset!r} has no labels")
    if run.accelerator.num_processes > 1:
        raise ValueError(f"--mode=train_classifier: runs in one process, not in {run.accelerator.num_processes}")
