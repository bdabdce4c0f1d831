"""The U-Net's layers against other implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import random
from scipy.signal import convolve2d
from torch import Tensor, nn

from models.layers import (
    Attention,
    BigGANBlock,
    DDPMBlock,
    Downsample,
    FIRConvDown,
    FIRConvUp,
    FIRDown,
    FIRUp,
    FourierEmbedding,
    PositionalEmbedding,
    Upsample,
    group_norm,
    initialise,
)

# ----------------------------------------------------------------------------------------------------------- resampling


def upfirdn(image: np.ndarray, taps: tuple[int, ...], *, up: int, down: int, pad: tuple[int, int], gain: float):
    """Zero-insertion, padding (or cropping) and convolution with taps ⊗ taps / sum², then every ``down``-th pixel."""
    stuffed = np.zeros([side * up for side in image.shape])
    stuffed[::up, ::up] = image
    before, after = pad
    padded = np.pad(stuffed, [(max(before, 0), max(after, 0))] * 2)
    padded = padded[max(-before, 0) :, max(-before, 0) :]
    padded = padded[: len(padded) - max(-after, 0), : padded.shape[1] - max(-after, 0)]
    kernel = np.outer(taps, taps) * gain / np.sum(taps) ** 2
    return convolve2d(padded, kernel, mode="valid")[::down, ::down]


def each_image(x: Tensor, function) -> Tensor:
    rows = [[torch.from_numpy(np.ascontiguousarray(function(channel.numpy()))) for channel in sample] for sample in x]
    return torch.stack([torch.stack(row) for row in rows])


TAPS = [(1, 3, 3, 1), (1, 2, 1), (1, 1), (1, 2, 3, 5), (1, 4, 6, 4, 1), (3, 1, 2, 1, 1, 2)]
every_kernel = pytest.mark.parametrize("taps", TAPS, ids=str)


@every_kernel
def test_fir_down(taps):
    x, p = random(2, 3, 8, 6), len(taps) - 2
    expected = each_image(x, lambda a: upfirdn(a, taps, up=1, down=2, pad=((p + 1) // 2, p // 2), gain=1))
    output = FIRDown(taps)(x)
    assert output.shape == (2, 3, 4, 3)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@every_kernel
def test_fir_up(taps):
    x, p = random(2, 3, 4, 6), len(taps) - 2
    expected = each_image(x, lambda a: upfirdn(a, taps, up=2, down=1, pad=((p + 1) // 2 + 1, p // 2), gain=4))
    output = FIRUp(taps)(x)
    assert output.shape == (2, 3, 8, 12)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


@every_kernel
def test_fir_down_with_convolution(taps):
    # Blur with two pixels more of padding, then a 3×3 convolution of stride 2 without padding.
    layer = FIRConvDown(2, 3, taps).double()
    x, p = random(2, 2, 8, 6), len(taps)
    blurred = each_image(x, lambda a: upfirdn(a, taps, up=1, down=1, pad=((p + 1) // 2, p // 2), gain=1))
    expected = F.conv2d(blurred, layer.conv.weight, layer.conv.bias, stride=2)
    assert layer(x).shape == (2, 3, 4, 3)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


@every_kernel
def test_fir_up_with_convolution(taps):
    # The other order: insert zeros, correlate with the 3×3 weights, then blur.
    layer = FIRConvUp(2, 3, taps).double()
    nn.init.normal_(layer.conv.bias)
    x, p = random(2, 2, 4, 6), len(taps) - 4
    stuffed = x.new_zeros(2, 2, 7, 11)
    stuffed[:, :, ::2, ::2] = x
    convolved = F.conv2d(stuffed, layer.conv.weight, padding=2)
    blurred = each_image(
        convolved.detach(), lambda a: upfirdn(a, taps, up=1, down=1, pad=((p + 1) // 2 + 1, p // 2 + 1), gain=4)
    )
    expected = blurred + layer.conv.bias[None, :, None, None]
    assert layer(x).shape == (2, 3, 8, 12)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)


def test_fir_keeps_a_constant_image_away_from_the_border():
    x = torch.ones(1, 1, 16, 16)
    for layer in (FIRDown((1, 3, 3, 1)), FIRUp((1, 3, 3, 1))):
        torch.testing.assert_close(layer(x)[:, :, 2:-2, 2:-2], torch.ones_like(layer(x)[:, :, 2:-2, 2:-2]))


def test_naive_resampling():
    x = random(2, 3, 8, 6)
    plain_down, plain_up = Downsample(3, 3, with_conv=False), Upsample(3, 3, with_conv=False)
    blocks = x.reshape(2, 3, 4, 2, 3, 2)
    torch.testing.assert_close(plain_down(x), blocks.mean((3, 5)), rtol=1e-12, atol=1e-14)
    assert torch.equal(plain_up(x), x.repeat_interleave(2, 2).repeat_interleave(2, 3))
    down, up = Downsample(3, 5, with_conv=True).double(), Upsample(3, 5, with_conv=True).double()
    # DDPM pads at the far border alone, as TensorFlow's "same" does for stride 2.
    padded = torch.zeros(2, 3, 9, 7, dtype=torch.float64)
    padded[:, :, :8, :6] = x
    torch.testing.assert_close(down(x), F.conv2d(padded, down.conv.weight, down.conv.bias, stride=2))
    torch.testing.assert_close(up(x), F.conv2d(plain_up(x), up.conv.weight, up.conv.bias, padding=1))


# --------------------------------------------------------------------------------------------------------- other layers


def test_fourier_embedding():
    layer = FourierEmbedding(2000, 16.0)
    label = torch.tensor([0.01, 1.0, 50.0])
    angle = 2 * math.pi * label.log()[:, None].double() * layer.frequencies.double()
    expected = torch.cat([angle.sin(), angle.cos()], 1).float()
    torch.testing.assert_close(layer(label), expected, rtol=0, atol=1e-3)  # angles of thousands, in single precision
    # Frequencies ~ N(0, 16²), never trained; standard errors of mean and variance.
    scaled = layer.frequencies / 16
    assert abs(scaled.mean()) < 4 / 2000**0.5 and abs(scaled.var() - 1) < 4 * (2 / 2000) ** 0.5
    assert not layer.frequencies.requires_grad


def test_positional_embedding():
    layer = PositionalEmbedding(8)
    label = torch.tensor([0.0, 1.0, 617.0])
    wavelengths = 2 * math.pi * 10_000 ** (torch.arange(4) / 3)
    angle = 2 * math.pi * label[:, None] / wavelengths
    torch.testing.assert_close(layer(label), torch.cat([angle.sin(), angle.cos()], 1), rtol=0, atol=1e-4)


def test_attention_against_torch():
    layer = Attention(8, init_scale=1.0, skip_rescale=True).double()
    for convolution in (layer.query, layer.key, layer.value, layer.out):
        nn.init.normal_(convolution.weight)
        nn.init.normal_(convolution.bias)
    x = random(2, 8, 4, 3)
    h = F.group_norm(x, 2, layer.norm.weight, layer.norm.bias, eps=1e-6)
    query, key, value = (
        torch.einsum("oi,bihw->bhwo", c.weight[:, :, 0, 0], h).flatten(1, 2) + c.bias
        for c in (layer.query, layer.key, layer.value)
    )
    attended = F.scaled_dot_product_attention(query, key, value)
    out = torch.einsum("oi,bpi->bop", layer.out.weight[:, :, 0, 0], attended) + layer.out.bias[:, None]
    torch.testing.assert_close(layer(x), (x + out.view_as(x)) / math.sqrt(2), rtol=1e-10, atol=1e-10)
    layer.rescale = 1.0
    torch.testing.assert_close(layer(x), x + out.view_as(x), rtol=1e-10, atol=1e-10)
    # Large logits do not overflow.
    assert torch.isfinite(layer(x * 0 + 1e4 * random(2, 8, 4, 3))).all()


@pytest.mark.parametrize("skip_rescale", [False, True])
@pytest.mark.parametrize("kind", ["ddpm", "ddpm, wider", "biggan", "biggan, wider", "biggan, down"])
def test_residual_blocks(kind, skip_rescale):
    out_channels = 12 if "wider" in kind else 8
    options = dict(activation=nn.SiLU(), temb_features=6, dropout=0.0, init_scale=1.0, skip_rescale=skip_rescale)
    if kind.startswith("ddpm"):
        block = DDPMBlock(8, out_channels, **options).double()
    else:
        resample = Downsample(8, 8, with_conv=False) if "down" in kind else None
        block = BigGANBlock(8, out_channels, resample=resample, **options).double()
    x, temb = random(2, 8, 4, 4), random(2, 6, seed=1)

    def resampled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 2) if "down" in kind else x

    h = F.silu(F.group_norm(x, 2, block.norm1.weight, block.norm1.bias, eps=1e-6))
    h = F.conv2d(resampled(h), block.conv1.weight, block.conv1.bias, padding=1)
    h = h + F.linear(F.silu(temb), block.time.weight, block.time.bias)[:, :, None, None]
    h = F.silu(F.group_norm(h, out_channels // 4, block.norm2.weight, block.norm2.bias, eps=1e-6))
    h = F.conv2d(h, block.conv2.weight, block.conv2.bias, padding=1)
    shortcut = resampled(x)
    if kind in ("ddpm", "biggan"):
        assert isinstance(block.shortcut, nn.Identity)
    else:
        shortcut = F.conv2d(shortcut, block.shortcut.weight, block.shortcut.bias)
    expected = (shortcut + h) / (math.sqrt(2) if skip_rescale else 1)
    torch.testing.assert_close(block(x, temb), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("channels", "groups"), [(2, 1), (8, 2), (16, 4), (128, 32), (256, 32)])
def test_number_of_groups(channels, groups):
    assert group_norm(channels).num_groups == groups


def test_initialisation():
    # Variance scale / fan_avg, uniform: 3×3 from 64 to 128 channels has fan_avg 9·96.
    layer = initialise(nn.Conv2d(64, 128, 3), 0.5)
    n, variance = layer.weight.numel(), 0.5 / (9 * 96)
    # The sample variance of n uniform numbers has relative standard error √(0.8/n).
    assert abs(layer.weight.var() / variance - 1) < 4 * (0.8 / n) ** 0.5
    assert layer.weight.abs().max() <= (3 * variance) ** 0.5 * 1.0001
    assert layer.bias.abs().max() == 0
    nearly_zero = initialise(nn.Conv2d(4, 4, 3), 0.0).weight
    assert 0 < nearly_zero.abs().max() < 1e-5
