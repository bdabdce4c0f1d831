"""NCSN++ and DDPM++: one noise-conditional U-Net.

    x ─ stem ─ encoder ─ middle ─ decoder ─ head ─ output          label ─ embedding ─ temb, given to every block

The encoder is a list of stages, each of which pushes its output on one stack of skips; the decoder is a list of
stages, of which the residual ones pop from it. Beside the features h both carry a *pyramid*: in the encoder the
input image at decreasing resolution (``progressive_input``), in the decoder the output image at increasing
resolution (``progressive``). An option selects a module when the network is built; the forward pass never asks.

The output is the raw network: time labels, division by σ and sign belong to the score (``models.score``).

Source: Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations" (ICLR 2021),
Section 4.4 and Appendix H. Option names and values are those of its public configs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from models.layers import (
    Attention,
    BigGANBlock,
    Combine,
    DDPMBlock,
    Downsample,
    FIRConvDown,
    FIRConvUp,
    FIRDown,
    FIRUp,
    FourierEmbedding,
    PositionalEmbedding,
    Upsample,
    conv3x3,
    dense,
    group_norm,
)
from models.second_order.normalisation import norm_act
from models.second_order.operations import concatenate, differentiated_twice, higher_order

__all__ = ["ACTIVATIONS", "UNet"]

ACTIVATIONS = {
    "elu": nn.ELU,
    "relu": nn.ReLU,
    "lrelu": partial(nn.LeakyReLU, negative_slope=0.2),
    "swish": nn.SiLU,
}

_CHOICES = {
    "nonlinearity": tuple(ACTIVATIONS),
    "resblock_type": ("ddpm", "biggan"),
    "progressive": ("none", "output_skip", "residual"),
    "progressive_input": ("none", "input_skip", "residual"),
    "progressive_combine": ("sum", "cat"),
    "embedding_type": ("fourier", "positional"),
}


# ---------------------------------------------------------------------------------------------------------------
# Encoder stages: (h, temb, pyramid) → (h, pyramid)


class _EncoderBlock(nn.Module):
    def __init__(self, block: nn.Module, attention: nn.Module) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return self.attention(self.block(h, temb)), pyramid


class _Down(nn.Module):
    """Halve the resolution of the features alone."""

    def __init__(self, down: nn.Module) -> None:
        super().__init__()
        self.down = down

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return self.down(h, temb), pyramid


class _DownInputSkip(nn.Module):
    """Halve features and image; merge the image into the features."""

    def __init__(self, down: nn.Module, pyramid_down: nn.Module, combine: Combine) -> None:
        super().__init__()
        self.down, self.pyramid_down, self.combine = down, pyramid_down, combine

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        pyramid = self.pyramid_down(pyramid)
        return self.combine(pyramid, self.down(h, temb)), pyramid


class _DownResidual(nn.Module):
    """Halve features and (learned) image features; their sum goes on as both."""

    def __init__(self, down: nn.Module, pyramid_down: nn.Module, rescale: float) -> None:
        super().__init__()
        self.down, self.pyramid_down, self.rescale = down, pyramid_down, rescale

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rescale * (self.pyramid_down(pyramid) + self.down(h, temb))
        return h, h


# ---------------------------------------------------------------------------------------------------------------
# Decoder stages: (h, temb, pyramid, skips) → (h, pyramid)


class _DecoderBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        return self.block(concatenate(h, skips.pop()), temb), pyramid


class _LevelEnd(nn.Module):
    """After the blocks of one resolution: attention, the output pyramid, then twice the resolution."""

    def __init__(self, attention: nn.Module, output: nn.Module, up: nn.Module | None) -> None:
        super().__init__()
        self.attention, self.output, self.up = attention, output, up

    def forward(self, h: Tensor, temb: Tensor | None, pyramid: Tensor, skips: list[Tensor]) -> tuple[Tensor, Tensor]:
        h, pyramid = self.output(self.attention(h), pyramid)
        return (h if self.up is None else self.up(h, temb)), pyramid


class _NoOutput(nn.Module):
    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, pyramid


class _OutputSkip(nn.Module):
    """pyramid ← up(pyramid) + conv(act(norm(h))); ``up`` is the identity at the lowest resolution."""

    def __init__(self, projection: nn.Module, up: nn.Module) -> None:
        super().__init__()
        self.projection, self.up = projection, up

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, self.up(pyramid) + self.projection(h)


class _OutputResidualStart(nn.Module):
    """The lowest resolution of a residual pyramid: pyramid ← conv(act(norm(h))), h unchanged."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        return h, self.projection(h)


class _OutputResidual(nn.Module):
    """pyramid ← upconv(pyramid) + h, which goes on as both."""

    def __init__(self, up: nn.Module, rescale: float) -> None:
        super().__init__()
        self.up, self.rescale = up, rescale

    def forward(self, h: Tensor, pyramid: Tensor) -> tuple[Tensor, Tensor]:
        h = self.rescale * (self.up(pyramid) + h)
        return h, h


# ---------------------------------------------------------------------------------------------------------------


class _Projection(nn.Sequential):
    """conv(act(norm(h)))."""

    def forward(self, h: Tensor) -> Tensor:
        norm, activation, conv = self
        return conv(norm_act(norm, activation, h))


def _projection(in_channels: int, out_channels: int, activation: nn.Module, scale: float = 1.0) -> nn.Sequential:
    return _Projection(group_norm(in_channels), activation, conv3x3(in_channels, out_channels, scale))


class UNet(nn.Module):
    """The noise-conditional U-Net of NCSN++ and DDPM++.

    Args:
        image_size: height and width of the images, divisible by 2^(levels − 1).
        num_channels: channels of the images.
        centered: images are in [−1, 1]; otherwise in [0, 1], and the network sees 2x − 1.
        nf: base width; level i has nf·ch_mult[i] channels.
        ch_mult, num_res_blocks: width multiplier and number of residual blocks per level.
        attn_resolutions: resolutions that get self-attention (the middle always does).
        dropout: probability, in every residual block.
        nonlinearity: 'swish', 'relu', 'lrelu' or 'elu'.
        conditional: give the noise level to the blocks.
        embedding_type: 'fourier' (of ln label; the label is σ) or 'positional' (of the label).
        fourier_scale: standard deviation of the Fourier frequencies.
        resblock_type: 'ddpm' or 'biggan'.
        resamp_with_conv: learned convolution in DDPM-type resampling.
        fir, fir_kernel: blur when resampling, with these taps.
        skip_rescale: divide sums of branches by √2.
        progressive: output pyramid 'none', 'output_skip' or 'residual'.
        progressive_input, progressive_combine: input pyramid 'none', 'input_skip' (merged by 'sum' or 'cat') or
            'residual'.
        init_scale: initial scale of the last layer of every branch.
        num_classes: 0, or the number of class labels the network is conditioned on.

    Raises:
        ValueError: an option outside its choices, or sizes that do not fit, naming the config field.
    """

    def __init__(
        self,
        *,
        image_size: int,
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
        fir_kernel: Sequence[int],
        skip_rescale: bool,
        progressive: str,
        progressive_input: str,
        progressive_combine: str,
        init_scale: float,
        num_classes: int = 0,
    ) -> None:
        super().__init__()
        given = locals()
        chosen = {field: str(given[field]).lower() for field in _CHOICES}
        for field, allowed in _CHOICES.items():
            if chosen[field] not in allowed:
                raise ValueError(f"model.{field}={given[field]!r}: allowed are {', '.join(allowed)}")
        widths = (nf, *ch_mult)
        if not all(isinstance(width, int) and width > 0 for width in widths):
            raise ValueError(f"model.nf={nf!r}, model.ch_mult={ch_mult!r}: allowed are positive integers")
        levels = len(ch_mult)
        if levels == 0 or image_size % 2 ** (levels - 1):
            raise ValueError(
                f"data.image_size={image_size} with {levels} levels (model.ch_mult={tuple(ch_mult)}): "
                f"the size must be divisible by {2 ** max(levels - 1, 0)}"
            )
        if num_res_blocks < 1:
            raise ValueError(f"model.num_res_blocks={num_res_blocks}: at least 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"model.dropout={dropout}: a probability in [0, 1)")
        if not init_scale >= 0:
            raise ValueError(f"model.init_scale={init_scale}: at least 0")
        if num_classes and not conditional:
            raise ValueError(f"model.num_classes={num_classes}: class labels need model.conditional=True")

        self.image_shape = (num_channels, image_size, image_size)
        # Both are for comparisons alone: torch's own second derivatives are slower and otherwise the same.
        self.memory_format, self.own_derivatives = torch.channels_last, True
        self.input_scale, self.input_shift = (1.0, 0.0) if centered else (2.0, -1.0)
        self.num_classes = num_classes
        act = ACTIVATIONS[chosen["nonlinearity"]]()
        rescale = 1 / math.sqrt(2) if skip_rescale else 1.0

        # Embedding of the noise level and, if asked, of the class.
        if chosen["embedding_type"] == "fourier":
            self.embedding = FourierEmbedding(nf, fourier_scale)
        else:
            self.embedding = PositionalEmbedding(nf)
        temb_features = 4 * nf if conditional else None
        self.time_mlp = None
        if conditional:
            self.time_mlp = nn.Sequential(dense(self.embedding.out_features, 4 * nf), act, dense(4 * nf, 4 * nf))
        self.class_embedding = nn.Embedding(num_classes, 4 * nf) if num_classes else None

        options = dict(
            activation=act,
            temb_features=temb_features,
            dropout=dropout,
            init_scale=init_scale,
            skip_rescale=skip_rescale,
        )
        biggan = chosen["resblock_type"] == "biggan"
        block = partial(BigGANBlock if biggan else DDPMBlock, **options)
        attention = partial(Attention, init_scale=init_scale, skip_rescale=skip_rescale)

        def attention_at(resolution: int, channels: int) -> nn.Module:
            return attention(channels) if resolution in attn_resolutions else nn.Identity()

        def plain_down(in_channels: int, out_channels: int, with_conv: bool) -> nn.Module:
            if fir:
                return FIRConvDown(in_channels, out_channels, fir_kernel) if with_conv else FIRDown(fir_kernel)
            return Downsample(in_channels, out_channels, with_conv=with_conv)

        def plain_up(in_channels: int, out_channels: int, with_conv: bool) -> nn.Module:
            if fir:
                return FIRConvUp(in_channels, out_channels, fir_kernel) if with_conv else FIRUp(fir_kernel)
            return Upsample(in_channels, out_channels, with_conv=with_conv)

        def down(channels: int) -> nn.Module:
            if biggan:
                return block(channels, channels, resample=plain_down(channels, channels, with_conv=False))
            return _IgnoreTime(plain_down(channels, channels, resamp_with_conv))

        def up(channels: int) -> nn.Module:
            if biggan:
                return block(channels, channels, resample=plain_up(channels, channels, with_conv=False))
            return _IgnoreTime(plain_up(channels, channels, resamp_with_conv))

        # Encoder.
        self.stem = conv3x3(num_channels, nf)
        self.encoder = nn.ModuleList()
        channels, skip_channels, pyramid_channels = nf, [nf], num_channels
        for level, multiplier in enumerate(ch_mult):
            resolution = image_size // 2**level
            for _ in range(num_res_blocks):
                width = nf * multiplier
                self.encoder.append(_EncoderBlock(block(channels, width), attention_at(resolution, width)))
                channels = width
                skip_channels.append(channels)
            if level == levels - 1:
                break
            if chosen["progressive_input"] == "input_skip":
                combine = Combine(pyramid_channels, channels, concatenate=chosen["progressive_combine"] == "cat")
                self.encoder.append(
                    _DownInputSkip(down(channels), plain_down(pyramid_channels, pyramid_channels, False), combine)
                )
                channels = combine.out_channels
            elif chosen["progressive_input"] == "residual":
                pyramid_down = plain_down(pyramid_channels, channels, with_conv=True)
                self.encoder.append(_DownResidual(down(channels), pyramid_down, rescale))
                pyramid_channels = channels
            else:
                self.encoder.append(_Down(down(channels)))
            skip_channels.append(channels)

        # Middle.
        self.middle = nn.ModuleList([block(channels, channels), attention(channels), block(channels, channels)])

        # Decoder.
        self.decoder = nn.ModuleList()
        pyramid_channels = 0
        for level in reversed(range(levels)):
            width = nf * ch_mult[level]
            for _ in range(num_res_blocks + 1):
                self.decoder.append(_DecoderBlock(block(channels + skip_channels.pop(), width)))
                channels = width
            lowest = level == levels - 1
            if chosen["progressive"] == "output_skip":
                output = _OutputSkip(
                    _projection(channels, num_channels, act, init_scale),
                    nn.Identity() if lowest else plain_up(num_channels, num_channels, False),
                )
            elif chosen["progressive"] == "residual":
                if lowest:
                    output = _OutputResidualStart(_projection(channels, channels, act))
                else:
                    output = _OutputResidual(plain_up(pyramid_channels, channels, with_conv=True), rescale)
                pyramid_channels = channels
            else:
                output = _NoOutput()
            self.decoder.append(
                _LevelEnd(attention_at(image_size // 2**level, channels), output, up(channels) if level else None)
            )
        self.head = (
            None if chosen["progressive"] == "output_skip" else _projection(channels, num_channels, act, init_scale)
        )
        # CPU and tensor-core convolutions are fastest on channels-last memory.
        self.to(memory_format=self.memory_format)

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """The raw network output.

        Args:
            x: images (B, C, H, W).
            label: time labels (B,): σ, 999·t or an index, as the score model decides.
            class_labels: integers (B,), required exactly when the network has classes.

        Returns:
            (B, C, H, W), the dtype of ``x``.

        Raises:
            ValueError: images of another shape, or class labels missing or unexpected.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given to a network built for {self.image_shape}")
        if (class_labels is None) == bool(self.num_classes):
            raise ValueError(
                f"class labels {'missing' if class_labels is None else 'given'}: the network has "
                f"model.num_classes={self.num_classes}"
            )
        if self.own_derivatives and differentiated_twice(x):
            with higher_order():
                return self._evaluate(x, label, class_labels)
        return self._evaluate(x, label, class_labels)

    def _evaluate(self, x: Tensor, label: Tensor, class_labels: Tensor | None) -> Tensor:
        temb = None
        if self.time_mlp is not None:
            temb = self.time_mlp(self.embedding(label.to(x.dtype)))
            if self.class_embedding is not None:
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

        pyramid = h.new_zeros(())
        for stage in self.decoder:
            h, pyramid = stage(h, temb, pyramid, skips)
        return pyramid if self.head is None else self.head(h)

    def official_modules(self) -> Iterator[tuple[str, nn.Module]]:
        """The parametrised modules with their names in score_sde_pytorch, entries of one flat list.

        A positional embedding has no entry there; everything else has one, in the order of computation, except
        that a residual or attention module precedes the pyramid module of its stage.
        """
        for index, module in enumerate(self._official_list()):
            yield f"all_modules.{index}", module

    def _official_list(self) -> Iterator[nn.Module]:
        if isinstance(self.embedding, FourierEmbedding):
            yield self.embedding
        if self.time_mlp is not None:
            yield from (self.time_mlp[0], self.time_mlp[2])
        yield self.stem
        for stage in self.encoder:
            for child in stage.children():
                yield from _listed(child)
        yield from self.middle
        for stage in self.decoder:
            for child in stage.children():
                yield from _listed(child)
        if self.head is not None:
            yield from (self.head[0], self.head[2])


class _IgnoreTime(nn.Module):
    """A plain resampling where the encoder or decoder expects a module that is given the noise level."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        return self.module(x)


def _listed(module: nn.Module) -> Iterator[nn.Module]:
    """What one part of a stage contributes to score_sde_pytorch's module list."""
    if isinstance(module, nn.Sequential):  # norm, activation, conv of an output pyramid: two entries
        yield from (module[0], module[2])
    elif isinstance(module, (_OutputSkip, _OutputResidualStart, _OutputResidual)):
        # The public code resamples the pyramid by a shared, parameter-free module outside the list.
        for child in module.children():
            yield from _listed(child)
    elif isinstance(module, _IgnoreTime):
        yield module.module
    elif any(True for _ in module.parameters()):
        yield module
