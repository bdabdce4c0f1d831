"""A classifier of noised images, log p(c | x_t, t), for classifier guidance (Dhariwal and Nichol, NeurIPS 2021).

The encoder half of the U-Net: BigGAN blocks that are given the noise level, with means over 2×2 pixels between levels,
then a linear layer of the whole feature map: under strong noise the class shows in where an image is bright, which a
mean over all pixels would lose. Its input is x_t/√(α² + σ²), of one size at all times, and its label σ/α, so that one
network serves every SDE. It is trained by cross-entropy at times uniform on [1e-5, 1], as the score model is (Song et
al., ICLR 2021, Appendix I.1).

    W/classifier/experiment.json                       what it was made for
    W/classifier/checkpoints/, metrics.jsonl, …        see ``training``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import CheckpointError, CheckpointStore, load_state_dict_strictly
from data import Split, TrainingBatches, evenly_spaced
from data.format import DataFormat, random_flip
from experiment.files import claim
from experiment.randomness import Generator, SampleGenerators, normal_like, seed_from, uniform
from experiment.runtime import Runtime, within_memory
from losses import TRAINING_EPS
from models.layers import BigGANBlock, Downsample, FourierEmbedding, conv3x3, dense, group_norm
from sde_lib import SDE, expand
from training import Trainer

EXPERIMENT = "classifier of noised images"
TEST_TIMES = (0.0, 0.25, 0.5, 0.75)


class NoiseConditionalClassifier(nn.Module):
    """Logits (B, K) from x_t (B, C, H, W) and t (B,).

    Level i has ``num_res_blocks`` blocks of width nf·ch_mult[i]. A ValueError if H and W are not divisible by
    2^(levels − 1).
    """

    def __init__(
        self,
        sde: SDE,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        dropout: float,
    ) -> None:
        super().__init__()
        channels, height, width = image_shape
        shrunk = 2 ** (len(ch_mult) - 1)
        if height % shrunk or width % shrunk:
            raise ValueError(
                f"classifier.ch_mult={tuple(ch_mult)}: {len(ch_mult)} levels need a size divisible by {shrunk}, the "
                f"images have {height}x{width} pixels"
            )
        self.sde = sde
        activation = nn.SiLU()
        self.embedding = FourierEmbedding(nf, scale=1.0)
        self.time_mlp = nn.Sequential(dense(self.embedding.out_features, 4 * nf), activation, dense(4 * nf, 4 * nf))
        options = dict(activation=activation, temb_features=4 * nf, dropout=dropout, init_scale=1.0, skip_rescale=True)
        self.stem = conv3x3(channels, nf)
        self.blocks = nn.ModuleList()
        channels = nf
        for level, multiplier in enumerate(ch_mult):
            if level:
                mean = Downsample(channels, channels, with_conv=False)
                self.blocks.append(BigGANBlock(channels, channels, resample=mean, **options))
            for _ in range(num_res_blocks):
                self.blocks.append(BigGANBlock(channels, nf * multiplier, **options))
                channels = nf * multiplier
        self.head = nn.Sequential(group_norm(channels), activation)
        self.logits = dense(channels * (height // shrunk) * (width // shrunk), num_classes)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, std = self.sde.mean_coefficient(t), self.sde.std(t)
        temb = self.time_mlp(self.embedding((std / alpha).to(x.dtype)))
        h = self.stem(x / expand((alpha**2 + std**2).sqrt(), x))
        for block in self.blocks:
            h = block(h, temb)
        return self.logits(self.head(h).flatten(1))

    def log_probs(self, x: Tensor, t: Tensor) -> Tensor:
        """log p(· | x_t, t), (B, K)."""
        return torch.log_softmax(self(x, t).float(), dim=1)


class ClassifierTraining:
    """A classifier being trained, or to be trained further.

    Args:
        settings: the fields of ``config.classifier``.
        identity: what decides the classifier besides: a folder keeps the one it was made with.
        flip: mirror images at random.
        test_images: how many are looked at in a test, at most.
        seed: of weights, order, times and noise.

    Raises:
        ValueError: the set has no labels, there are several processes, or the folder holds another classifier.
    """

    def __init__(
        self,
        workdir: Path,
        sde: SDE,
        settings: Mapping,
        train_data: Split,
        test_data: Split,
        images: DataFormat,
        *,
        identity: Mapping,
        flip: bool,
        test_images: int,
        seed: int,
        runtime: Runtime,
    ) -> None:
        if runtime.accelerator.num_processes > 1:
            count = runtime.accelerator.num_processes
            raise ValueError(f"--mode=train_classifier: runs in one process, not in {count}")
        if train_data.num_classes is None:
            raise ValueError(f"--mode=train_classifier: {train_data.name} has no labels")
        self.sde, self.images, self.flip, self.seed = sde, images, flip, seed
        self.device = runtime.torch_device
        self.batches = TrainingBatches(train_data, seed=seed, batch_size=settings["batch_size"])
        count = min(test_images, len(test_data))
        self.test_levels, self.test_labels = test_data.batch(evenly_spaced(range(count), count, len(test_data)))
        self.classifier = _build(sde, images, settings, seed).to(self.device)
        folder = claim(workdir / "classifier", EXPERIMENT, {**identity, "data": train_data.fingerprint})
        self.trainer = Trainer(
            self.classifier,
            torch.optim.AdamW(self.classifier.parameters(), lr=settings["lr"], weight_decay=settings["weight_decay"]),
            self.loss,
            folder,
            n_iters=settings["n_iters"],
            batch_size=settings["batch_size"],
            grad_clip=1.0,
            log_freq=settings["log_freq"],
            save_freq=settings["save_freq"],
            observe=self.test,
            runtime=runtime,
            description=f"classifier {workdir.name}",
        )

    def loss(self, classifier: NoiseConditionalClassifier, step: int, positions: range) -> dict[str, Tensor]:
        levels, labels = self.batches(step, positions)
        generator = SampleGenerators((self.seed, "classifier", step), positions)
        x0 = self.images.to_model(levels, generator)
        if self.flip:
            x0 = random_flip(x0, generator)
        t = TRAINING_EPS + uniform((len(x0),), generator) * (self.sde.end_time - TRAINING_EPS)
        # Dropout draws from the global stream: fix its seed.
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed_from(self.seed, "classifier dropout", step))
            logits, labels = self._logits(x0, t, labels, generator)
        return {"loss": F.cross_entropy(logits, labels), "accuracy": (logits.argmax(1) == labels).float().mean()}

    @torch.no_grad()
    def test(self) -> dict[str, float]:
        """Cross-entropy and accuracy at some times on the same test images, always with the same noise."""
        self.classifier.eval()
        count, row = len(self.test_levels), {}
        for time in TEST_TIMES:
            generator = SampleGenerators((self.seed, "classifier test", str(time)), range(count))
            x0 = self.images.to_model(self.test_levels, generator)
            t = torch.full((count,), max(time, TRAINING_EPS))
            logits, wanted = self._logits(x0, t, self.test_labels, generator)
            row[f"test_loss_t{time:g}"] = float(F.cross_entropy(logits, wanted))
            row[f"test_accuracy_t{time:g}"] = float((logits.argmax(1) == wanted).float().mean())
        return row

    def _logits(self, x0: Tensor, t: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        mean, std = self.sde.marginal(x0, t)
        xt = mean + expand(std, x0) * normal_like(x0, generator)
        return self.classifier(xt.to(self.device), t.to(self.device)), labels.to(self.device)


def load_classifier(
    workdir: Path, sde: SDE, settings: Mapping, images: DataFormat, *, identity: Mapping, seed: int
) -> NoiseConditionalClassifier:
    """The trained classifier of a run; arguments as for ``ClassifierTraining``.

    Raises:
        CheckpointError: there is none.
        ValueError: it was made for another SDE, other images, or with other settings.
    """
    folder = workdir / "classifier"
    store = CheckpointStore(folder / "checkpoints")
    if (state := store.load_latest()) is None:
        raise CheckpointError(
            f"sampling.condition='class': no classifier in {folder}; --mode=train_classifier trains it"
        )
    claim(folder, EXPERIMENT, identity, exclusive=False, free_fields=("data",))
    classifier = _build(sde, images, settings, seed)
    load_state_dict_strictly(classifier, state["model"], store.path(state["step"]))
    return classifier.eval().requires_grad_(False)


def _build(sde: SDE, images: DataFormat, settings: Mapping, seed: int) -> NoiseConditionalClassifier:
    # Four copies: weights, gradients, and two moments.
    with torch.random.fork_rng(devices=[]), within_memory(f"classifier.nf={settings['nf']}", copies=4):
        torch.manual_seed(seed_from(seed, "classifier weights"))
        return NoiseConditionalClassifier(
            sde,
            image_shape=images.shape,
            num_classes=images.num_classes,
            **{name: settings[name] for name in ("nf", "ch_mult", "num_res_blocks", "dropout")},
        )
