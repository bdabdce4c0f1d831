"""NCSN and NCSNv2: RefineNets, which refine a coarse answer with the features of ever finer resolutions.

    x ─ stem ─ res₁ ─ res₂ ─ … ─ resₙ          each: two residual blocks, the deeper ones at half the resolution
                │      │           │            or, as in a dilated network, with wider convolutions instead
      output ─ ref ─  ref  ─ … ─  ref           each: fuse both inputs at the finer resolution, pool, convolve

Both normalise by instance norm++: h and its channel means m, each standardised, the latter over the channels,

    γ (h + α m) + β.

NCSN is conditioned on the noise level: its (γ, α, β) are a table with one row for each of the N levels, so it exists in
discrete time only. NCSNv2 never learns the noise level; its output over σ is the score at every σ.

Sources: Song and Ermon, "Generative Modeling by Estimating Gradients of the Data Distribution" (NeurIPS 2019), Appendix
A, and "Improved Techniques for Training Score-Based Generative Models" (NeurIPS 2020), Appendix B; Lin, Milan, Shen,
Reid, "RefineNet" (CVPR 2017). The public code of Song et al. (ICLR 2021) cannot build or run either network; where it
contradicts the codes of the two papers, theirs is followed (docs/deviations.md).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiment.registry import resolve
from models.unet import ACTIVATIONS

# ---------------------------------------------------------------------------------------------------------------
# Instance norm++. All layers take the label, (B,) or None, which only the conditional norm reads.


def _instance_norm_plus(x: Tensor, gamma: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """γ (h + α m) + β of x (B, C, H, W); the vectors are (C, 1, 1) or (B, C, 1, 1)."""
    variance, mean = torch.var_mean(x, dim=(2, 3), correction=0, keepdim=True)
    mean_variance, mean_mean = torch.var_mean(mean, dim=1, keepdim=True)  # over C − 1, as in the source
    h, m = (x - mean) * (variance + 1e-5).rsqrt(), (mean - mean_mean) * (mean_variance + 1e-5).rsqrt()
    return gamma * (h + alpha * m) + beta


class InstanceNormPlus(nn.Module):
    """Learned vectors of one entry per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.gamma = nn.Parameter(1 + 0.02 * torch.randn(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return _instance_norm_plus(x, *(vector[:, None, None] for vector in (self.gamma, self.alpha, self.beta)))


class ConditionalInstanceNormPlus(nn.Module):
    """Vectors that depend on the noise level; a row of the table is (γ, α, β)."""

    def __init__(self, channels: int, num_levels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(num_levels, 3 * channels)
        nn.init.normal_(self.embed.weight[:, : 2 * channels], 1, 0.02)
        nn.init.zeros_(self.embed.weight[:, 2 * channels :])

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return _instance_norm_plus(x, *self.embed(label)[:, :, None, None].chunk(3, dim=1))


class _NoNorm(nn.Module):
    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return x


Norm = Callable[[int], nn.Module]  # of so many channels


# ---------------------------------------------------------------------------------------------------------------
# Blocks


def _conv(in_channels: int, out_channels: int, *, kernel: int = 3, dilation: int = 1, bias: bool = True) -> nn.Conv2d:
    """A convolution that keeps the resolution. PyTorch's initialisation is that of the source."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(in_channels, out_channels, kernel, padding=padding, dilation=dilation, bias=bias)


def _conv_mean_pool(in_channels: int, out_channels: int, kernel: int = 3) -> nn.Sequential:
    """A convolution, then the mean of every 2×2 pixels."""
    return nn.Sequential(OrderedDict(conv=_conv(in_channels, out_channels, kernel=kernel), pool=nn.AvgPool2d(2)))


class ResidualBlock(nn.Module):
    """norm, activation, conv, norm, activation, conv; plus a shortcut, a convolution where a stage ``begins``."""

    recomputable = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        begins: bool,
        pool: bool,
        dilation: int,
        norm: Norm,
        activation: nn.Module,
    ) -> None:
        super().__init__()
        convolution = partial(_conv, dilation=dilation)
        self.norm1 = norm(in_channels)
        self.conv1 = convolution(in_channels, in_channels)
        self.norm2 = norm(in_channels)
        self.conv2 = (_conv_mean_pool if pool else convolution)(in_channels, out_channels)
        self.activation = activation
        if pool:
            self.shortcut = _conv_mean_pool(in_channels, out_channels, kernel=1)
        else:
            self.shortcut = convolution(in_channels, out_channels) if begins else nn.Identity()

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        h = self.conv1(self.activation(self.norm1(x, label)))
        h = self.conv2(self.activation(self.norm2(h, label)))
        return self.shortcut(x) + h


class _NormActConv(nn.Module):
    """norm, activation, 3×3 convolution without bias."""

    def __init__(self, channels: int, norm: Norm, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation, self.conv = norm(channels), activation, _conv(channels, channels, bias=False)

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        return self.conv(self.activation(self.norm(x, label)))


class _ResidualConvUnits(nn.Module):
    """``count`` times x ← x + f(f(x)), with f norm, activation and convolution."""

    recomputable = True

    def __init__(self, channels: int, count: int, norm: Norm, activation: nn.Module) -> None:
        super().__init__()
        self.units = nn.ModuleList(
            nn.ModuleList(_NormActConv(channels, norm, activation) for _ in range(2)) for _ in range(count)
        )

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        for first, second in self.units:
            x = x + second(first(x, label), label)
        return x


class _Fusion(nn.Module):
    """Σ upsample(conv(norm(xᵢ))) at the resolution of the first input, the finest."""

    def __init__(self, in_channels: Sequence[int], out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(channels) for channels in in_channels)
        self.convs = nn.ModuleList(_conv(channels, out_channels) for channels in in_channels)

    def forward(self, inputs: Sequence[Tensor], label: Tensor | None) -> Tensor:
        size = inputs[0].shape[2:]
        features = (conv(norm(x, label)) for x, norm, conv in zip(inputs, self.norms, self.convs, strict=True))
        return sum(F.interpolate(h, size=size, mode="bilinear", align_corners=True) for h in features)


class _ChainedPooling(nn.Module):
    """x ← act(x), then twice p ← conv(pool(norm(p))), starting from x: the sum of x and both p.

    The pooling, over 5×5 pixels at stride 1, is by maximum, or in the conditional network by mean.
    """

    recomputable = True

    def __init__(self, channels: int, norm: Norm, activation: nn.Module, pool: nn.Module) -> None:
        super().__init__()
        self.activation, self.pool = activation, pool
        self.norms = nn.ModuleList(norm(channels) for _ in range(2))
        self.convs = nn.ModuleList(_conv(channels, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor, label: Tensor | None) -> Tensor:
        total = path = self.activation(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            path = conv(self.pool(norm(path, label)))
            total = total + path
        return total


class _RefineBlock(nn.Module):
    """Adapt each input, fuse them, pool, and convolve ``output_units`` times."""

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        *,
        output_units: int,
        norm: Norm,
        activation: nn.Module,
        pool: nn.Module,
    ) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(_ResidualConvUnits(channels, 2, norm, activation) for channels in in_channels)
        self.fusion = _Fusion(in_channels, out_channels, norm) if len(in_channels) > 1 else None
        self.pooling = _ChainedPooling(out_channels, norm, activation, pool)
        self.output = _ResidualConvUnits(out_channels, output_units, norm, activation)

    def forward(self, inputs: Sequence[Tensor], label: Tensor | None) -> Tensor:
        inputs = [adapt(x, label) for adapt, x in zip(self.adapt, inputs, strict=True)]
        h = inputs[0] if self.fusion is None else self.fusion(inputs, label)
        return self.output(self.pooling(h, label), label)


# ---------------------------------------------------------------------------------------------------------------
# Networks


class _Stage(NamedTuple):
    """Two residual blocks: width in units of nf, whether the first halves the resolution, dilation."""

    width: int
    pool: bool = False
    dilation: int = 1


_STAGES: dict[int, tuple[_Stage, ...]] = {
    64: (_Stage(1), _Stage(2, pool=True), _Stage(2, dilation=2), _Stage(2, dilation=4)),
    128: (_Stage(1), _Stage(2, pool=True), _Stage(2, pool=True), _Stage(4, dilation=2), _Stage(4, dilation=4)),
    256: (_Stage(1), *3 * (_Stage(2, pool=True),), _Stage(4, dilation=2), _Stage(4, dilation=4)),
}


class RefineNet(nn.Module):
    """The RefineNet of NCSNv2 or NCSN.

    Args:
        image_size: height and width of the images, divisible by 2, 4 or 8 for the three architectures.
        num_channels: channels of the images.
        centered: images are in [−1, 1]; otherwise in [0, 1], and the network sees 2x − 1.
        nf, nonlinearity: fields of ``config.model`` (configs/defaults.py); nf at least 2.
        conditional: NCSN, whose norms depend on the noise level. NCSNv2 has no use for it: divide its output by σ.
        num_levels: the number of noise levels; None in continuous time.
        architecture: 64, 128 or 256, the image size that it was designed for; None: by ``image_size``, below 96, up to
            128 or up to 256.

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
        nonlinearity: str,
        conditional: bool,
        num_levels: int | None = None,
        architecture: int | None = None,
    ) -> None:
        super().__init__()
        if nf < 2:
            raise ValueError(f"model.nf={nf}: NCSN and NCSNv2 standardise over channels and need at least 2")
        if not isinstance(image_size, int):
            raise ValueError(
                f"data.shape={(num_channels, *image_size)}: NCSN and NCSNv2 are for square images; 'ncsnpp' and 'ddpm' "
                "are for others"
            )
        if conditional and num_levels is None:
            raise ValueError(
                "training.continuous=True: model.name='ncsn' is conditioned on one of model.num_scales noise levels; "
                "set training.continuous=False"
            )
        if architecture is None:
            if image_size > 256:
                raise ValueError(f"data.image_size={image_size}: model.name='ncsnv2' is for images of up to 256 pixels")
            architecture = 64 if image_size < 96 else 128 if image_size <= 128 else 256
        stages = _STAGES[architecture]
        divisor = 2 ** sum(stage.pool for stage in stages)
        if image_size % divisor:
            raise ValueError(f"data.image_size={image_size}: this network needs a multiple of {divisor}")
        self.image_shape = (num_channels, image_size, image_size)
        self.input_scale, self.input_shift = (1.0, 0.0) if centered else (2.0, -1.0)
        activation = resolve(nonlinearity, ACTIVATIONS, "model.nonlinearity", nn.Module)()
        self.conditional = conditional
        if conditional:
            norm = refine_norm = partial(ConditionalInstanceNormPlus, num_levels=num_levels)
            pool = nn.AvgPool2d(5, stride=1, padding=2)
        else:
            norm, refine_norm = InstanceNormPlus, lambda channels: _NoNorm()
            pool = nn.MaxPool2d(5, stride=1, padding=2)

        self.stem = _conv(num_channels, nf)
        self.encoder = nn.ModuleList()
        widths = [nf, *(nf * stage.width for stage in stages)]  # before and after every stage
        for number, stage in enumerate(stages):
            before, width = widths[number : number + 2]
            block = partial(ResidualBlock, dilation=stage.dilation, norm=norm, activation=activation)
            first = block(before, width, begins=number > 0, pool=stage.pool)
            self.encoder.append(nn.ModuleList([first, block(width, width, begins=False, pool=False)]))

        self.decoder = nn.ModuleList()
        refine_block = partial(_RefineBlock, norm=refine_norm, activation=activation, pool=pool)
        for number in reversed(range(len(stages))):
            before, width = widths[number : number + 2]
            inputs = [width] if number == len(stages) - 1 else [width, width]
            self.decoder.append(refine_block(inputs, before, output_units=1 if number else 3))
        self.norm, self.activation, self.head = norm(nf), activation, _conv(nf, num_channels)
        self.to(memory_format=torch.channels_last)  # as the U-Net: faster convolutions

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """The raw network output.

        Args:
            x: images (B, C, H, W).
            label: time labels (B,); NCSN: indices of noise levels, rounded to the nearest.

        Returns:
            (B, C, H, W), the dtype of ``x``.

        Raises:
            ValueError: images of another shape.
        """
        if tuple(x.shape[1:]) != self.image_shape:
            raise ValueError(f"images of shape {tuple(x.shape[1:])} given to a network built for {self.image_shape}")
        level = label.round().long() if self.conditional else None
        x = (self.input_scale * x + self.input_shift).contiguous(memory_format=torch.channels_last)
        h = self.stem(x)
        features = []
        for first, second in self.encoder:
            h = second(first(h, level), level)
            features.append(h)
        deepest, *finer = self.decoder
        h = deepest([features.pop()], level)
        for refine in finer:
            h = refine([features.pop(), h], level)
        return self.head(self.activation(self.norm(h, level)))


NCSN = partial(RefineNet, conditional=True, architecture=64)
NCSNv2 = partial(RefineNet, conditional=False, num_levels=None)
