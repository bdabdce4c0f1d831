"""NCSN++, DDPM++ and DDPM: one noise-conditional U-Net.

    x ─ stem ─ encoder ─ middle ─ decoder ─ head ─ output          label ─ embedding ─ temb, given to every block

The encoder is a list of stages, each of which pushes its output on one stack of skips; the decoder is a list of
stages, of which the residual ones pop from it. In addition to the features h both carry a *pyramid*: in the encoder
the input image at decreasing resolution (``progressive_input``), in the decoder the output image at increasing
resolution (``progressive``). An option selects a module when the network is built; the forward pass never asks.

The output is the raw network: time labels, division by σ and sign belong to the score (``models.score``).

Sources: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (ICLR 2021),
Section 4.4 and Appendix H; Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020), Appendix B, as
score_sde_pytorch has it: in the decoder with attention once per resolution, not after every block. Option names and
values are those of the public configs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from experiment.registry import resolve
from models.layers import (
    ADMBlock,
    Attention,
    BigGANBlock,
    DDPMBlock,
    FourierEmbedding,
    PositionalEmbedding,
    conv1x1,
    conv3x3,
    dense,
    group_norm,
    resampling,
)
from models.second_order.normalisation import norm_act
from models.second_order.operations import concatenate, differentiated_twice, higher_order

ACTIVATIONS = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "lrelu": partial(nn.LeakyReLU, negative_slope=0.2),
    "swish": nn.SiLU,
}

_CHOICES = {
    "resblock_type": ("ddpm", "biggan", "adm"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("fourier", "positional"),
}


# ---------------------------------------------------------------------------------------------------------------
# How features and pyramid meet: (h, pyramid) → (h, pyramid)


class _Apart(nn.Module):
    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, pyramid


class Combine(nn.Module):
    """A 1×1 convolution of the image is added to the features, or concatenated with them."""

    def __init__(self, pyramid_channels: int, channels: int, *, concatenate: bool, dims: int = 2) -> None:
        super().__init__()
        self.conv = conv1x1(pyramid_channels, channels, dims=dims)
        self.concatenate = concatenate
        self.out_channels = 2 * channels if concatenate else channels

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        projected = self.conv(pyramid)
        return concatenate(projected, h) if self.concatenate else projected + h, pyramid


class _Sum(nn.Module):
    """The sum of (learned) image features and features goes on as both."""

    def __init__(self, rescale: float) -> None:
        super().__init__()
        self.rescale = rescale

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rescale * (pyramid + h)
        return h, h


class _Project(nn.Module):
    """pyramid ← conv(act(norm(h))), to which at all but the lowest resolution of images the pyramid is added."""

    def __init__(self, projection: nn.Module, *, add: bool) -> None:
        super().__init__()
        self.projection, self.add = projection, add

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, pyramid + self.projection(h) if self.add else self.projection(h)


class _Projection(nn.Sequential):
    """conv(act(norm(h)))."""

    def __init__(
        self, in_channels: int, out_channels: int, activation: nn.Module, scale: float = 1.0, *, dims: int = 2
    ) -> None:
        super().__init__(group_norm(in_channels), activation, conv3x3(in_channels, out_channels, scale, dims=dims))

    def forward(self, h: Tensor) -> Tensor:
        norm, activation, conv = self
        return conv(norm_act(norm, activation, h))


# ---------------------------------------------------------------------------------------------------------------
# Stages: of the encoder (h, temb, pyramid) → (h, pyramid), of the decoder with the skips as fourth argument


class _EncoderBlock(nn.Module):
    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(self.block(h, temb)), pyramid


class _Down(nn.Module):
    """Half the resolution."""

    def __init__(self, down: nn.Module, pyramid_down: nn.Module, merge: nn.Module) -> None:
        super().__init__()
        self.down, self.pyramid_down, self.merge = down, pyramid_down, merge

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        pyramid = self.pyramid_down(pyramid)
        return self.merge(self.down(h, temb), pyramid)


class _DecoderBlock(nn.Module):
    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.attention(self.block(concatenate(h, skips.pop()), temb)), pyramid


class _LevelEnd(nn.Module):
    """After the blocks of one resolution: attention, the output pyramid, then twice the resolution."""

    def __init__(self, attention: nn.Module, pyramid_up: nn.Module, merge: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.attention, self.pyramid_up, self.merge, self.up = attention, pyramid_up, merge, up

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        h = self.attention(h)
        h, pyramid = self.merge(h, self.pyramid_up(pyramid))
        return self.up(h, temb), pyramid


class _WithoutTime(nn.Module):
    """A module of h where one of h and temb is expected."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, h: Tensor, temb: Tensor | None) -> Tensor:
        return self.module(h)


# ---------------------------------------------------------------------------------------------------------------


class UNet(nn.Module):
    """The noise-conditional U-Net.

    The arguments are the fields of ``config.model`` (configs/defaults.py), and besides

    Args:
        image_size: the lengths of one to three axes, (L,) of signals, (H, W) of images, (D, H, W) of volumes, each
            divisible by 2^(levels − 1); or the height and width of square images. The first is the *resolution*, which
            ``attn_resolutions`` speak of.
        num_channels: channels of the images.
        condition_channels: of a condition, which follow those of the images in x.
        centered: images are in [−1, 1]; otherwise in [0, 1], and the network sees 2x − 1.
        num_levels: the number of noise levels whose index is the label; None: the label is a positive number.
        groups: of every group norm, if nf and so all widths are multiples of it; otherwise see ``layers.group_norm``.
        classes_with_noise: what is learned of a class is added to the embedding of the noise level itself, instead of
            to what a network makes of that.

    Level i has nf·ch_mult[i] channels, the middle always attention. Of K classes the label K stands for none. With
    ``resblock_type`` adm there is attention after every block of the decoder, too, with a head for every 64 channels,
    and so none where there are fewer.

    Raises:
        ValueError: an option outside its choices, or sizes that do not fit, naming the config field.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int],
        num_channels: int,
        centered: bool,
        nf: int,
        ch_mult: Sequence[int],
        num_res_blocks: int,
        attn_resolutions: Sequence[int],
        dropout: float,
        nonlinearity: str,
        conditional: bool,
        embedding_type: str,
        fourier_scale: float,
        resblock_type: str,
        resamp_with_conv: bool,
        fir: bool,
        fir_kernel: Sequence[float],
        skip_rescale: bool,
        progressive: str,
        progressive_input: str,
        progressive_combine: str,
        init_scale: float,
        num_classes: int = 0,
        num_levels: int | None = None,
        condition_channels: int = 0,
        groups: int | None = None,
        classes_with_noise: bool = False,
    ) -> None:
        super().__init__()
        given = locals()
        for field, allowed in _CHOICES.items():
            if given[field] not in allowed:
                raise ValueError(f"model.{field}={given[field]!r}: allowed are {', '.join(allowed)}")
        levels = len(ch_mult)
        sizes = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        dims = len(sizes)
        if not 1 <= dims <= 3:
            raise ValueError(
                f"data.shape={(num_channels, *sizes)}: model.name='ncsnpp' and 'ddpm' are for one to three axes beside "
                "that of channels; 'vector_mlp' is for vectors"
            )
        if levels == 0 or any(size % 2 ** (levels - 1) for size in sizes):
            raise ValueError(
                f"data.image_size={image_size} with {levels} levels (model.ch_mult={tuple(ch_mult)}): "
                f"the size must be divisible by {2 ** max(levels - 1, 0)}"
            )
        resolutions = [sizes[0] // 2**level for level in range(levels)]
        if missing := set(attn_resolutions) - set(resolutions):
            raise ValueError(
                f"model.attn_resolutions={tuple(attn_resolutions)}: there is no resolution {min(missing)}; with "
                f"data.image_size={image_size} and {levels} levels (model.ch_mult) they are {resolutions}"
            )
        if num_classes and not conditional:
            raise ValueError(f"model.num_classes={num_classes}: class labels need model.conditional=True")
        if embedding_type == "fourier" and num_levels is not None:
            raise ValueError(
                "training.continuous=False: a discrete-time model has the label 0, of which there is no logarithm; it "
                "needs model.embedding_type='positional'"
            )

        in_channels = num_channels + condition_channels
        self.image_shape, self.condition_channels = (num_channels, *sizes), condition_channels
        # Both are for comparisons alone: torch's own second derivatives are slower and otherwise the same.
        self.memory_format = torch.channels_last if dims == 2 else torch.contiguous_format
        self.own_derivatives = True
        self.compile_passes = False
        self.input_scale, self.input_shift = (1.0, 0.0) if centered else (2.0, -1.0)
        self.num_classes = num_classes
        act = resolve(nonlinearity, ACTIVATIONS, "model.nonlinearity", nn.Module)()
        rescale = 1 / math.sqrt(2) if skip_rescale else 1.0

        # Embedding of the noise level and, if asked, of the class.
        fourier = embedding_type == "fourier"
        self.embedding = FourierEmbedding(nf, fourier_scale) if fourier else PositionalEmbedding(nf)
        temb_features = 4 * nf if conditional else None
        self.time_mlp = None
        if conditional:
            self.time_mlp = nn.Sequential(dense(self.embedding.out_features, 4 * nf), act, dense(4 * nf, 4 * nf))
        self.classes_with_noise = classes_with_noise and num_classes > 0
        width = self.embedding.out_features if classes_with_noise else 4 * nf
        self.class_embedding = nn.Embedding(num_classes + 1, width) if num_classes else None

        convolution, projection = partial(conv3x3, dims=dims), partial(_Projection, dims=dims)
        resample = partial(resampling, taps=fir_kernel if fir else None, dims=dims)
        adm = resblock_type == "adm"
        block = partial(
            {"ddpm": DDPMBlock, "biggan": BigGANBlock, "adm": ADMBlock}[resblock_type],
            activation=act,
            temb_features=temb_features,
            dropout=dropout,
            init_scale=init_scale,
            skip_rescale=skip_rescale,
            dims=dims,
        )

        def attention(channels: int) -> nn.Module:
            heads = channels // 64 if adm else 1
            options = dict(init_scale=init_scale, skip_rescale=skip_rescale, dims=dims, heads=heads)
            return Attention(channels, **options) if heads else nn.Identity()

        def attention_at(level: int, channels: int) -> nn.Module:
            return attention(channels) if resolutions[level] in attn_resolutions else nn.Identity()

        def resample_features(channels: int, *, up: bool) -> nn.Module:
            if resblock_type != "ddpm":
                return block(channels, channels, resample=resample(channels, channels, up=up, with_conv=False))
            return _WithoutTime(resample(channels, channels, up=up, with_conv=resamp_with_conv))

        # Encoder.
        self.stem = convolution(in_channels, nf)
        self.encoder = nn.ModuleList()
        channels, skip_channels, pyramid_channels = nf, [nf], in_channels
        for level, multiplier in enumerate(ch_mult):
            if level:
                width = channels
                pyramid_down, merge = nn.Identity(), _Apart()
                if progressive_input == "input_skip":
                    pyramid_down = resample(in_channels, in_channels, up=False, with_conv=False)
                    merge = Combine(in_channels, width, concatenate=progressive_combine == "cat", dims=dims)
                    channels = merge.out_channels
                elif progressive_input == "residual":
                    pyramid_down, merge = resample(pyramid_channels, width, up=False, with_conv=True), _Sum(rescale)
                    pyramid_channels = width
                self.encoder.append(_Down(resample_features(width, up=False), pyramid_down, merge))
                skip_channels.append(channels)
            width = nf * multiplier
            for _ in range(num_res_blocks):
                self.encoder.append(_EncoderBlock(block(channels, width), attention_at(level, width)))
                channels = width
                skip_channels.append(channels)

        # Middle.
        self.middle = nn.ModuleList([block(channels, channels), attention(channels), block(channels, channels)])

        # Decoder.
        self.decoder = nn.ModuleList()
        for level in reversed(range(levels)):
            width, lowest = nf * ch_mult[level], level == levels - 1
            for _ in range(num_res_blocks + 1):
                attend = attention_at(level, width) if adm else nn.Identity()
                self.decoder.append(_DecoderBlock(block(channels + skip_channels.pop(), width), attend))
                channels = width
            pyramid_up, merge = nn.Identity(), _Apart()
            if progressive == "output_skip":
                if not lowest:
                    pyramid_up = resample(num_channels, num_channels, up=True, with_conv=False)
                merge = _Project(projection(width, num_channels, act, init_scale), add=not lowest)
            elif progressive == "residual" and lowest:
                merge = _Project(projection(width, width, act), add=False)
            elif progressive == "residual":
                pyramid_up, merge = resample(pyramid_channels, width, up=True, with_conv=True), _Sum(rescale)
            pyramid_channels = width
            attend = nn.Identity() if adm else attention_at(level, width)
            up = resample_features(width, up=True) if level else _WithoutTime(nn.Identity())
            self.decoder.append(_LevelEnd(attend, pyramid_up, merge, up))
        self.head = None if progressive == "output_skip" else projection(channels, num_channels, act, init_scale)
        if groups and nf % groups == 0:
            for norm in filter(lambda module: isinstance(module, nn.GroupNorm), self.modules()):
                norm.num_groups = groups
        # CPU and tensor-core convolutions are fastest on channels-last memory.
        self.to(memory_format=self.memory_format)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The raw network output.

        Args:
            x: images (B, C, H, W), signals (B, C, L) or volumes (B, C, D, H, W), then the channels of their condition.
            label: time labels (B,): σ, 999·t or an index, as the score model decides.
            class_labels: integers (B,), required exactly when the network has classes.

        Returns:
            The shape of the images and the dtype of ``x``.

        Raises:
            ValueError: images of another shape, or class labels missing or unexpected.
        """
        channels, *sizes = self.image_shape
        if tuple(x.shape[1:]) != (wanted := (channels + self.condition_channels, *sizes)):
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given to a network built for {wanted}")
        if (class_labels is None) == bool(self.num_classes):
            raise ValueError(
                f"class labels {'missing' if class_labels is None else 'given'}: the network has "
                f"model.num_classes={self.num_classes}"
            )
        if self.own_derivatives and differentiated_twice(x):
            with higher_order(self.compile_passes):
                return self._evaluate(x, label, class_labels)
        return self._evaluate(x, label, class_labels)

    def _evaluate(self, x: Tensor, label: Tensor, class_labels: Tensor | None) -> Tensor:
        temb = None
        if self.time_mlp is not None:
            temb = self.embedding(label.to(x.dtype))
            if self.classes_with_noise:
                temb = temb + self.class_embedding(class_labels)
            temb = self.time_mlp(temb)
            if self.class_embedding is not None and not self.classes_with_noise:
                temb = temb + self.class_embedding(class_labels)

        pyramid = self.input_scale * x + self.input_shift
        pyramid = pyramid.contiguous(memory_format=self.memory_format)
        h = self.stem(pyramid)
        skips = [h]
        for stage in self.encoder:
            h, pyramid = stage(h, temb, pyramid)
            skips.append(h)

        first, attention, second = self.middle
        h = second(attention(first(h, temb)), temb)

        for stage in self.decoder:
            h, pyramid = stage(h, temb, pyramid, skips)
        return pyramid if self.head is None else self.head(h)


# DDPM, the ancestor: branches are added without rescaling, convolutions of stride 2 and repeated pixels in place of
# blurs, a positional embedding, no pyramids, last layers that start at zero, and 32 groups in every norm.
DDPM = partial(
    UNet,
    embedding_type="positional",
    fourier_scale=0.0,
    resblock_type="ddpm",
    fir=False,
    fir_kernel=(),
    skip_rescale=False,
    progressive="none",
    progressive_input="none",
    progressive_combine="sum",
    init_scale=0.0,
    groups=32,
)
