"""The parts of the U-Net: embeddings of the noise level, resampling, residual blocks, attention.

Sources: Ho, Jain, Abbeel, "Denoising Diffusion Probabilistic Models" (NeurIPS 2020); Song et al., "Score-Based
Generative Modeling through Stochastic Differential Equations" (ICLR 2021), Appendix H; Brock, Donahue, Simonyan,
"Large Scale GAN Training" (BigGAN, ICLR 2019); Dhariwal, Nichol, "Diffusion Models Beat GANs on Image Synthesis"
(NeurIPS 2021) for ADM; Zhang, "Making Convolutional Networks Shift-Invariant Again"
(ICML 2019) for the FIR resampling; Tancik et al. (NeurIPS 2020) for the Fourier features.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.second_order.normalisation import Dropout, GroupNorm, norm_act
from models.second_order.operations import Conv1d, Conv2d, Conv3d, blur, blur_transposed

# ---------------------------------------------------------------------------------------------------------------
# Elementary layers with DDPM's initialisation


def initialise(layer: nn.Module, scale: float = 1.0) -> nn.Module:
    """Uniform weights of variance scale / fan_avg and zero bias; scale 0 means 1e-10 (nearly, not exactly, zero)."""
    nn.init.xavier_uniform_(layer.weight, gain=math.sqrt(scale or 1e-10))
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


CONVOLUTIONS = {1: Conv1d, 2: Conv2d, 3: Conv3d}
"""By the number of axes, ``dims``, along which the layers of this file look at neighbours."""


def conv3x3(in_channels: int, out_channels: int, scale: float = 1.0, *, dims: int = 2) -> nn.Module:
    return initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3, padding=1), scale)


def conv1x1(in_channels: int, out_channels: int, scale: float = 1.0, *, dims: int = 2) -> nn.Module:
    return initialise(CONVOLUTIONS[dims](in_channels, out_channels, 1), scale)


def dense(in_features: int, out_features: int) -> nn.Linear:
    return initialise(nn.Linear(in_features, out_features))


def group_norm(channels: int) -> nn.GroupNorm:
    """In groups of 4 channels, or in 32.

    Raises:
        ValueError: a number of channels that does not divide into them.
    """
    groups = min(max(channels // 4, 1), 32)
    if channels % groups:
        raise ValueError(
            f"nf, ch_mult: a layer has {channels} channels, which cannot be normalised in {groups} groups; widths "
            "nf·ch_mult that are multiples of 4 up to 64, or all of 32, always can"
        )
    return GroupNorm(groups, channels, eps=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# Embeddings of the time label


class FourierEmbedding(nn.Module):
    """Label σ (B,) → [sin 2πw ln σ, cos 2πw ln σ] (B, 2·size), with fixed random frequencies w ~ N(0, scale²)."""

    def __init__(self, size: int, scale: float) -> None:
        super().__init__()
        self.out_features = 2 * size
        self.frequencies = nn.Parameter(scale * torch.randn(size), requires_grad=False)

    def forward(self, label: Tensor) -> Tensor:
        angle = 2 * math.pi * torch.log(label)[:, None] * self.frequencies[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class PositionalEmbedding(nn.Module):
    """Label (B,) → sinusoids (B, size) with wavelengths from 2π to 10 000·2π (Transformer positions)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        if size < 4 or size % 2:
            raise ValueError(f"model.nf={size}: a positional embedding needs an even width of at least 4")
        self.out_features = size
        half = size // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, dtype=torch.float32) / (half - 1))
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, label: Tensor) -> Tensor:
        angle = label[:, None] * self.frequencies[None, :]
        return torch.cat([angle.sin(), angle.cos()], dim=1)


# ---------------------------------------------------------------------------------------------------------------
# Resampling, of images (B, C, H, W) and likewise along one or three axes


def _fir_kernel(taps: Sequence[float], dims: int, gain: float = 1.0) -> Tensor:
    """The separable kernel taps ⊗ taps, normalised to sum ``gain``, flipped so that a correlation convolves."""
    kernel = taps_1d = torch.tensor(taps, dtype=torch.float32)
    for _ in range(dims - 1):
        kernel = kernel[..., None] * taps_1d
    return (gain * kernel / kernel.sum()).flip(*range(dims))


class FIRDown(nn.Module):
    """Blur with a small binomial kernel, then keep every second pixel: (B, C, H, W) → (B, C, H/2, W/2).

    ``margin`` extra pixels of the blurred image are kept at the border for a convolution that follows.
    """

    def __init__(self, taps: Sequence[float], *, margin: int = 0, stride: int = 2, dims: int = 2) -> None:
        super().__init__()
        self.register_buffer("kernel", _fir_kernel(taps, dims), persistent=False)
        pad = len(taps) - 2 + 2 * margin
        self.padding = ((pad + 1) // 2, pad // 2)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.padding
        both = min(before, after)
        if before != after:
            x = F.pad(x, self.kernel.ndim * (before - both, after - both))
        return blur(x, self.kernel, stride=self.stride, padding=both)


class FIRUp(nn.Module):
    """Insert zeros between pixels, then blur: (B, C, H, W) → (B, C, 2H, 2W), plus ``margin`` pixels all round."""

    def __init__(self, taps: Sequence[float], *, margin: int = 0, dims: int = 2) -> None:
        super().__init__()
        # Gain 4 because three of four pixels are zeros. A strided transposed convolution is exactly
        # zero-insertion followed by a convolution; it wants the unflipped kernel.
        self.register_buffer("kernel", _fir_kernel(taps, dims, 2.0**dims).flip(*range(dims)), persistent=False)
        # Leading pixels of the full convolution that the symmetric crop leaves out.
        self.start = len(taps) - 2 - (len(taps) - 1) // 2 - margin
        self.margin = margin

    def forward(self, x: Tensor) -> Tensor:
        crop = max(self.start, 0)
        full = blur_transposed(x, self.kernel, stride=2, padding=crop)
        before = self.start - crop
        ends = [before + 2 * (n + self.margin) - m for n, m in zip(x.shape[2:], full.shape[2:], strict=True)]
        if not any((before, *ends)):
            return full
        # Negative amounts crop, positive ones pad: the margin may reach beyond the full convolution.
        return F.pad(full, [amount for end in reversed(ends) for amount in (-before, end)])


class FIRConvDown(nn.Sequential):
    """Blur, then a learned 3×3 convolution of stride 2."""

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float], *, dims: int = 2) -> None:
        conv = initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3, stride=2))
        super().__init__(OrderedDict(blur=FIRDown(taps, margin=1, stride=1, dims=dims), conv=conv))


class FIRConvUp(nn.Sequential):
    """Upsample with a blur, then a learned 3×3 convolution.

    The blurred image keeps one pixel beyond its border, so that the convolution sees no zeros there and the two
    commute, as in the source, which convolves first.
    """

    def __init__(self, in_channels: int, out_channels: int, taps: Sequence[float], *, dims: int = 2) -> None:
        conv = initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3))
        super().__init__(OrderedDict(up=FIRUp(taps, margin=1, dims=dims), conv=conv))


class Downsample(nn.Module):
    """DDPM's downsampling by 2: a 3×3 convolution of stride 2 (padded at the far border), or average pooling."""

    def __init__(self, in_channels: int, out_channels: int, *, with_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.mean = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}[dims]
        self.conv = initialise(CONVOLUTIONS[dims](in_channels, out_channels, 3, stride=2)) if with_conv else None

    def forward(self, x: Tensor) -> Tensor:
        return self.mean(x, 2) if self.conv is None else self.conv(F.pad(x, (x.ndim - 2) * (0, 1)))


class Upsample(nn.Module):
    """DDPM's upsampling by 2: repeat every pixel, then an optional 3×3 convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, with_conv: bool, dims: int = 2) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels, dims=dims) if with_conv else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def resampling(
    in_channels: int, out_channels: int, *, up: bool, with_conv: bool, taps: Sequence[float] | None, dims: int = 2
) -> nn.Module:
    """Up- or downsampling by 2, with a learned convolution or without; with a blur if there are ``taps``."""
    if taps is None:
        return (Upsample if up else Downsample)(in_channels, out_channels, with_conv=with_conv, dims=dims)
    if with_conv:
        return (FIRConvUp if up else FIRConvDown)(in_channels, out_channels, taps, dims=dims)
    return (FIRUp if up else FIRDown)(taps, dims=dims)


# ---------------------------------------------------------------------------------------------------------------
# Blocks


class _ResidualBlock(nn.Module):
    """norm, activation, (resample), conv, + noise level, norm, activation, dropout, conv; plus a shortcut."""

    recomputable = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        activation: nn.Module,
        temb_features: int | None,
        dropout: float,
        init_scale: float,
        skip_rescale: bool,
        resample: nn.Module,
        shortcut: nn.Module,
        dims: int = 2,
    ) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, dims=dims)
        self.time = dense(temb_features, out_channels) if temb_features else None
        self.norm2 = group_norm(out_channels)
        self.dropout = Dropout(dropout)
        self.conv2 = conv3x3(out_channels, out_channels, init_scale, dims=dims)
        self.activation = activation
        self.resample = resample
        self.shortcut = shortcut
        self.rescale = 1 / math.sqrt(2) if skip_rescale else 1.0

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = self.conv1(self.resample(norm_act(self.norm1, self.activation, x)))
        if self.time is not None:
            h = h + self.time(self.activation(temb))[(..., *[None] * (h.ndim - 2))]
        h = self.conv2(norm_act(self.norm2, self.activation, h, self.dropout))
        return self.rescale * (self.shortcut(self.resample(x)) + h)


class DDPMBlock(_ResidualBlock):
    """The residual block of DDPM: no resampling; a 1×1 shortcut where the number of channels changes."""

    def __init__(self, in_channels: int, out_channels: int, *, dims: int = 2, **options) -> None:
        # The source initialises this shortcut, as its other channel-mixing layers, with scale 0.1.
        changes = in_channels != out_channels
        shortcut = conv1x1(in_channels, out_channels, 0.1, dims=dims) if changes else nn.Identity()
        super().__init__(in_channels, out_channels, resample=nn.Identity(), shortcut=shortcut, dims=dims, **options)


class BigGANBlock(_ResidualBlock):
    """The residual block of BigGAN: ``resample`` is None or a module applied to both branches."""

    def __init__(
        self, in_channels: int, out_channels: int, *, resample: nn.Module | None = None, dims: int = 2, **options
    ) -> None:
        changes = in_channels != out_channels or resample is not None
        options |= dict(resample=resample or nn.Identity(), dims=dims)
        shortcut = conv1x1(in_channels, out_channels, dims=dims) if changes else nn.Identity()
        super().__init__(in_channels, out_channels, shortcut=shortcut, **options)


class ADMBlock(BigGANBlock):
    """The residual block of ADM: the noise level scales and shifts what is normalised for the second time, and a
    shortcut that keeps the number of channels has no convolution."""

    def __init__(self, in_channels: int, out_channels: int, *, temb_features: int, **options) -> None:
        super().__init__(in_channels, out_channels, temb_features=temb_features, **options)
        self.time = dense(temb_features, 2 * out_channels)
        if in_channels == out_channels:
            self.shortcut = nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(self.resample(norm_act(self.norm1, self.activation, x)))
        scale, shift = self.time(self.activation(temb))[(..., *[None] * (h.ndim - 2))].chunk(2, 1)
        h = self.conv2(self.dropout(self.activation(self.norm2(h) * (1 + scale) + shift)))
        return self.rescale * (self.shortcut(self.resample(x)) + h)


class Attention(nn.Module):
    """Self-attention over all pixels with a residual connection, (B, C, H, W) → (B, C, H, W), or over all places along
    one or three axes; each of the ``heads`` has its share of the channels."""

    recomputable = True

    def __init__(self, channels: int, *, init_scale: float, skip_rescale: bool, dims: int = 2, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.norm = group_norm(channels)
        self.query = conv1x1(channels, channels, 0.1, dims=dims)
        self.key = conv1x1(channels, channels, 0.1, dims=dims)
        self.value = conv1x1(channels, channels, 0.1, dims=dims)
        self.out = conv1x1(channels, channels, init_scale, dims=dims)
        self.rescale = 1 / math.sqrt(2) if skip_rescale else 1.0

    def forward(self, x: Tensor) -> Tensor:
        channels, *places = x.shape[1:]
        h = self.norm(x)
        # (B, heads, HW, C/heads): the order of channels-last memory, so that nothing is copied.
        query, key, value = (
            layer(h).movedim(1, -1).flatten(1, -2).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        # Plain products: torch's fused kernels cannot be differentiated twice.
        scale = (channels // self.heads) ** -0.5
        weights = torch.softmax((scale * query) @ key.transpose(2, 3), dim=-1).to(value.dtype)
        h = (weights @ value).transpose(1, 2).flatten(2).unflatten(1, places).movedim(-1, 1)
        return self.rescale * (x + self.out(h))
