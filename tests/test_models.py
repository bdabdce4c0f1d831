"""The U-Net option by option, its layers against other implementations, EMA, and the two parameterisations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from conftest import SMALL_UNET
from ml_collections import ConfigDict
from oracles import SDES
from scipy.signal import convolve2d
from torch import Tensor, nn

from conservativeness import jvp_and_vjp
from models import EMA, ConservativeScore, UnconstrainedScore, create_network, create_score_model
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
    group_norm,
    initialise,
)
from models.score import NoiseLevel
from models.unet import ACTIVATIONS, UNet


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


DDPM = dict(resblock_type="ddpm", progressive_input="none", embedding_type="positional")

# Every value of every option, beside the base it is compared with.
OPTIONS: dict[str, tuple[dict, dict]] = {
    **{f"nonlinearity={v}": (dict(nonlinearity=v), {}) for v in ACTIVATIONS if v != "swish"},
    "nonlinearity=swish": (dict(nonlinearity="swish"), dict(nonlinearity="relu")),
    "resblock_type=ddpm": (dict(resblock_type="ddpm"), {}),
    "resblock_type=biggan": ({}, dict(resblock_type="ddpm")),
    "ddpm, fir=True": (DDPM | dict(fir=True), DDPM | dict(fir=False)),
    "ddpm, fir=False": (DDPM | dict(fir=False), DDPM | dict(fir=True)),
    "ddpm, resamp_with_conv=False": (DDPM | dict(resamp_with_conv=False), DDPM),
    "ddpm, fir=False, resamp_with_conv=False": (DDPM | dict(fir=False, resamp_with_conv=False), DDPM | dict(fir=False)),
    "biggan, fir=False": (dict(fir=False), {}),
    "fir_kernel": (dict(fir_kernel=(1, 2, 1)), {}),
    "skip_rescale=False": (dict(skip_rescale=False), {}),
    "progressive=output_skip": (dict(progressive="output_skip"), {}),
    "progressive=residual": (dict(progressive="residual"), {}),
    "progressive=output_skip, fir=False": (dict(progressive="output_skip", fir=False), dict(fir=False)),
    "progressive=residual, fir=False": (dict(progressive="residual", fir=False), dict(fir=False)),
    "progressive_input=none": (dict(progressive_input="none"), {}),
    "progressive_input=input_skip, sum": (dict(progressive_input="input_skip"), {}),
    "progressive_input=input_skip, cat": (
        dict(progressive_input="input_skip", progressive_combine="cat"),
        dict(progressive_input="input_skip"),
    ),
    "progressive_input=residual, fir=False": (dict(fir=False), {}),
    "embedding_type=positional": (dict(embedding_type="positional"), {}),
    "fourier_scale": (dict(fourier_scale=1.0), {}),
    "conditional=False": (dict(conditional=False), {}),
    "attn_resolutions=none": (dict(attn_resolutions=()), {}),
    "attn_resolutions=all": (dict(attn_resolutions=(8, 4)), {}),
    "num_res_blocks": (dict(num_res_blocks=2), {}),
    "ch_mult=one level": (dict(ch_mult=(2,)), {}),
    "ch_mult=three levels": (dict(ch_mult=(1, 1, 2)), {}),
    "centered": (dict(centered=True), {}),
    "init_scale": (dict(init_scale=0.0), {}),
    "num_channels": (dict(num_channels=3), {}),
    "everything": (
        dict(progressive="residual", progressive_input="input_skip", progressive_combine="cat", ch_mult=(1, 1, 2)),
        {},
    ),
}
every_option = pytest.mark.parametrize(("options", "base"), OPTIONS.values(), ids=OPTIONS)


def images(network: UNet, count: int = 2, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return random(count, *network.image_shape).to(dtype), torch.linspace(0.3, 5, count, dtype=dtype)


# ------------------------------------------------------------------------------------------------------ the whole U-Net


@every_option
def test_option_builds_runs_and_learns(options, base, small_unet):
    network = small_unet(dtype=torch.float32, **options).train()
    x, label = images(network, dtype=torch.float32)
    output = network(x, label)
    assert output.shape == x.shape and output.dtype == x.dtype and torch.isfinite(output).all()
    (output**2).sum().backward()
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    # The option is not ignored: the same seed gives another output without it.
    if options.get("num_channels", 1) == 1:
        other = small_unet(dtype=torch.float32, **base)
        assert not torch.allclose(other(x, label), network.eval()(x, label), rtol=1e-3, atol=1e-4)


def capture(module: nn.Module, seen: list) -> None:
    """Append (inputs, output) of every later call of a module."""
    module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))


@pytest.mark.parametrize("combine", ["sum", "cat"])
def test_input_skip_merges_the_image_at_every_resolution(combine, small_unet):
    network = small_unet(
        image_size=16, ch_mult=(1, 1, 1), fir=False, progressive_input="input_skip", progressive_combine=combine
    )
    seen = []
    for module in network.modules():
        if isinstance(module, Combine):
            capture(module, seen)
    x, label = images(network)
    network(x, label)
    assert len(seen) == 2
    for level, ((pyramid, h), output) in enumerate(seen, start=1):
        torch.testing.assert_close(pyramid, F.avg_pool2d(2 * x - 1, 2**level), rtol=1e-12, atol=1e-12)
        assert output.shape[1] == (2 if combine == "cat" else 1) * h.shape[1]


def test_output_skip_adds_the_images_of_every_resolution(small_unet):
    # With constant images as projections their upsampled sum is the sum of the constants.
    network = small_unet(ch_mult=(1, 1, 1), fir=False, progressive="output_skip")
    total = 0.0
    for stage in network.decoder:
        if hasattr(stage, "output"):
            nn.init.zeros_(stage.output.projection[2].weight)
            nn.init.normal_(stage.output.projection[2].bias)
            total += stage.output.projection[2].bias.item()
    x, label = images(network)
    torch.testing.assert_close(network(x, label), torch.full_like(x, total), rtol=1e-12, atol=1e-12)
    assert network.head is None


@pytest.mark.parametrize("skip_rescale", [False, True])
def test_output_residual_goes_on_as_features(skip_rescale, small_unet):
    # At each finer resolution: h ← (up(pyramid) + h)/√2, which is the next pyramid and the input of the head.
    network = small_unet(progressive="residual", skip_rescale=skip_rescale)
    lowest, finer = (stage for stage in network.decoder if hasattr(stage, "output"))
    start, up, features, head = [], [], [], []
    for module, seen in (
        (lowest.output.projection, start),
        (finer.output.up, up),
        (finer.attention, features),
        (network.head, head),
    ):
        capture(module, seen)
    network(*images(network))
    assert torch.equal(up[0][0][0], start[0][1])
    expected = (up[0][1] + features[0][1]) / (math.sqrt(2) if skip_rescale else 1)
    torch.testing.assert_close(head[0][0][0], expected, rtol=1e-12, atol=1e-12)


@every_option
def test_every_parameter_is_listed_once_for_official_checkpoints(options, base, small_unet):
    network = small_unet(**options)
    listed = [id(p) for _, module in network.official_modules() for p in module.parameters()]
    assert len(listed) == len(set(listed))
    assert set(listed) == {id(p) for p in network.parameters()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        DDPM | dict(attn_resolutions=(8, 4)),
        dict(fir=False, progressive="residual", nonlinearity="elu"),
        dict(progressive="output_skip", progressive_input="input_skip", progressive_combine="cat", skip_rescale=False),
        dict(fir_kernel=(1, 2, 1), nonlinearity="lrelu", embedding_type="positional", conditional=True),
        dict(nonlinearity="relu", resblock_type="ddpm", fir=False),
        dict(num_classes=3, progressive_input="none"),
    ],
    ids=lambda options: ",".join(map(str, options)) or "default",
)
def test_unet_can_be_differentiated_three_times(options, small_unet):
    # The QC loss ½‖Jv − Jᵀv‖² needs derivatives for J, for the second product, and for the parameters.
    network = small_unet(**options)
    x, label = images(network)
    labels = torch.tensor([0, 2]) if network.num_classes else None
    v = random(*x.shape, seed=1)

    def products(x: Tensor, create_graph: bool = False) -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        return jvp_and_vjp(network(leaf, label, labels), leaf, v, create_graph=create_graph)

    def loss(create_graph: bool = False) -> Tensor:
        jv, jtv = products(x, create_graph)
        return 0.5 * ((jv - jtv) ** 2).sum()

    jv, jtv = products(x)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(network(forward_ad.make_dual(x, v), label, labels)).tangent
    torch.testing.assert_close(jv, tangent, rtol=1e-9, atol=1e-9 * tangent.abs().max().item())
    torch.testing.assert_close((jv * v).sum(), (jtv * v).sum(), rtol=1e-9, atol=1e-10)

    # The third derivative against a central difference along a random direction of all parameters at once.
    parameters = [p for p in network.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(create_graph=True), parameters, materialize_grads=True)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    h, values = 1e-7, []
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * h * direction
        values.append(loss().detach())
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope.detach(), rtol=1e-6, atol=0)


def test_samples_of_a_batch_do_not_meet(small_unet):
    network = small_unet(num_classes=2)
    x, label = images(network, 3)
    classes = torch.tensor([0, 1, 1])
    together = network(x, label, classes)
    for i in range(3):
        alone = network(x[i : i + 1], label[i : i + 1], classes[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-11, atol=1e-11)


def test_the_label_matters_exactly_when_conditional(small_unet):
    for conditional in (True, False):
        network = small_unet(conditional=conditional)
        x, label = images(network)
        changed = network(x, 2 * label)
        assert torch.equal(changed, network(x, label)) != conditional


def test_images_in_the_unit_interval_are_centred(small_unet):
    # The network sees 2x − 1 unless the data are centred already.
    raw, centred = small_unet(centered=False), small_unet(centered=True)
    x, label = images(raw)
    torch.testing.assert_close(raw(x, label), centred(2 * x - 1, label), rtol=1e-12, atol=1e-12)


def test_dropout_acts_in_training_alone(small_unet):
    network = small_unet(dropout=0.5)
    x, label = images(network)
    assert torch.equal(network(x, label), network(x, label))
    assert torch.equal(network(x, label), small_unet(dropout=0.0)(x, label))
    network.train()
    assert not torch.equal(network(x, label), network(x, label))


def test_class_labels(small_unet):
    network = small_unet(num_classes=3)
    x, label = images(network)
    zero, one = (network(x, label, torch.full((2,), c)) for c in (0, 1))
    mixed = network(x, label, torch.tensor([0, 1]))
    assert not torch.allclose(zero, one)
    torch.testing.assert_close(mixed, torch.stack([zero[0], one[1]]), rtol=1e-11, atol=1e-11)
    mixed.sum().backward()
    assert network.class_embedding.weight.grad[:2].abs().min() > 0
    assert network.class_embedding.weight.grad[2].abs().max() == 0
    with pytest.raises(ValueError, match=r"class labels missing: the network has model\.num_classes=3"):
        network(x, label)
    with pytest.raises(ValueError, match=r"class labels given: the network has model\.num_classes=0"):
        small_unet()(x, label, torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(2, 8, 8), (1, 4, 4), (1, 8, 16), (8, 8)])
def test_images_of_another_shape(shape, small_unet):
    network = small_unet(dtype=torch.float32)
    with pytest.raises(ValueError, match=r"images of shape .* given to a network built for \(1, 8, 8\)"):
        network(torch.zeros(2, *shape), torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(nonlinearity="gelu"), "model.nonlinearity='gelu': allowed are elu, relu, lrelu, swish"),
        (dict(resblock_type="resnet"), "model.resblock_type='resnet': allowed are ddpm, biggan"),
        (dict(progressive="skip"), "model.progressive='skip': allowed are none, output_skip, residual"),
        (dict(progressive_input="skip"), "model.progressive_input='skip': allowed are none, input_skip, residual"),
        (dict(progressive_combine="mean"), "model.progressive_combine='mean': allowed are sum, cat"),
        (dict(embedding_type="learned"), "model.embedding_type='learned': allowed are fourier, positional"),
        (dict(embedding_type="positional", nf=2), "model.nf=2"),
        (dict(image_size=6, ch_mult=(1, 1, 1)), "data.image_size=6 with 3 levels"),
        (dict(ch_mult=()), "model.ch_mult=()"),
        (dict(num_res_blocks=0), "model.num_res_blocks=0: at least 1"),
        (dict(dropout=1.0), "model.dropout=1.0"),
        (dict(dropout=-0.1), "model.dropout=-0.1"),
        (dict(num_classes=3, conditional=False), "model.num_classes=3: class labels need model.conditional=True"),
    ],
)
def test_options_that_make_no_sense(options, message, small_unet):
    with pytest.raises(ValueError) as error:
        small_unet(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


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


def test_combine():
    pyramid, h = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    for concatenate in (False, True):
        layer = Combine(3, 5, concatenate=concatenate).double()
        projected = F.conv2d(pyramid, layer.conv.weight, layer.conv.bias)
        expected = torch.cat([projected, h], 1) if concatenate else projected + h
        assert torch.equal(layer(pyramid, h), expected) and layer.out_channels == expected.shape[1]


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


# ----------------------------------------------------------------------------------------------------------------- EMA


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.register_buffer("count", torch.zeros(()))


@pytest.mark.parametrize("decay", [0.9, 0.2, 0.0])
def test_ema_against_a_loop_by_hand(decay):
    model = Small()
    ema = EMA(model, decay)
    expected = {name: p.detach().clone().double() for name, p in model.named_parameters()}
    for n in range(1, 31):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += torch.randn_like(parameter)
            model.count += 1
        ema.update(model)
        d = min(decay, (1 + n) / (10 + n))
        for name, parameter in model.named_parameters():
            expected[name] = d * expected[name] + (1 - d) * parameter.detach().double()
    for name, average in ema.model.named_parameters():
        torch.testing.assert_close(average.double(), expected[name], rtol=1e-5, atol=1e-5)
        assert not average.requires_grad
    assert ema.model.count == 30 and ema.num_updates == 30


def test_ema_is_a_separate_model_for_evaluation():
    model = Small().train()
    ema = EMA(model, 0.9)
    assert model.training and not ema.model.training and model.layer.weight.requires_grad
    before = ema.model.layer.weight.clone()
    with torch.no_grad():
        model.layer.weight += 1
    assert torch.equal(ema.model.layer.weight, before)


def test_ema_continues_from_its_state():
    model = Small()
    first = EMA(model, 0.9)
    for _ in range(5):
        first.update(model)
    second = EMA(Small(), 0.5)
    second.load_state_dict(first.state_dict())
    assert second.decay == 0.5 and second.num_updates == 5
    second.decay = 0.9
    changed = Small()
    first.update(changed), second.update(changed)
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_ema_errors():
    for decay in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match=f"model.ema_rate={decay}: allowed are values in"):
            EMA(Small(), decay)
    ema = EMA(nn.Linear(3, 2), 0.9)
    with pytest.raises(KeyError, match="a model of 3 parameters averaged into one of 2"):
        ema.update(Small())
    other = nn.Module()
    other.weights, other.bias = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(2))
    with pytest.raises(KeyError, match="weight"):
        ema.update(other)


# ------------------------------------------------------------------------------------------------ from network to score


class Linear(nn.Module):
    """h(x, label, class) = W x, recording the labels it is given; samples (B, 1, 2, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(random(4, 4))
        self.labels: list[Tensor] = []
        self.classes: list[Tensor] = []

    def forward(self, x: Tensor, label: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.labels.append(label)
        if class_labels is not None:
            self.classes.append(class_labels)
        return (x.flatten(1) @ self.weight.T.to(x.dtype)).view_as(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [10, 999, 1000])
def test_every_discrete_label(levels, dtype):
    index = torch.arange(levels).to(dtype)
    for t in ((index.double() / (levels - 1)).to(dtype), index / (levels - 1), torch.linspace(0, 1, levels).to(dtype)):
        label, std = NoiseLevel(SDES["ve"], levels)(t)
        assert torch.equal(label, levels - 1 - index) and label.dtype == dtype
        torch.testing.assert_close(std.double(), SDES["ve"].ladder(levels).std, rtol=3e-6, atol=0)
    if levels > 20:  # fewer make no DDPM chain for β_max = 20
        ladder = SDES["vp"].ladder(levels)
        label, std = NoiseLevel(SDES["vp"], levels)(ladder.time.to(dtype))
        assert torch.equal(label, index)
        torch.testing.assert_close(std.double(), ladder.std, rtol=1e-6, atol=0)
    # Times beyond the ladder, and sampling's last time, belong to its ends.
    label, _ = NoiseLevel(SDES["ve"], levels)(torch.tensor([-1e-3, 1e-7, 1.001], dtype=dtype))
    assert label.tolist() == [levels - 1, levels - 1, 0]


@pytest.mark.parametrize("name", ["ve", "vp"])
def test_discrete_labels_between_two_levels(name):
    # The index is that of the noise: linear in time between two levels, with the continuous process's own σ.
    ladder = SDES[name].ladder(50)
    part = torch.linspace(0.1, 0.9, 49, dtype=torch.float64)
    t = torch.lerp(ladder.time[:-1], ladder.time[1:], part)
    label, std = NoiseLevel(SDES[name], 50)(t)
    index = torch.arange(49) + part
    torch.testing.assert_close(label, 49 - index if name == "ve" else index, rtol=0, atol=2e-5)
    assert (ladder.std[:-1] < std).all() and (std < ladder.std[1:]).all()
    assert torch.equal(std, SDES[name].std(t))


def test_continuous_labels():
    t = torch.tensor([1e-5, 0.3, 1.0], dtype=torch.float64)
    for name, expected in (("ve", SDES["ve"].std(t)), ("vp", 999 * t), ("subvp", 999 * t)):
        label, std = NoiseLevel(SDES[name])(t)
        torch.testing.assert_close(label, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(std, SDES[name].std(t), rtol=1e-12, atol=0)


def test_too_few_levels():
    with pytest.raises(ValueError, match=r"model\.num_scales=1: a discrete-time model needs at least 2 levels"):
        NoiseLevel(SDES["ve"], 1)
    with pytest.raises(ValueError, match=r"training\.sde='subvpsde' has no discrete-time model"):
        NoiseLevel(SDES["subvp"], 100)


@pytest.mark.parametrize(("name", "sign"), [("ve", 1), ("vp", -1), ("subvp", -1)])
def test_unconstrained_score(name, sign):
    network, x = Linear(), random(3, 1, 2, 2)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    h, std = network(x, t), SDES[name].std(t)[:, None, None, None]
    score = UnconstrainedScore(network, NoiseLevel(SDES[name]))(x, t)
    torch.testing.assert_close(score, sign * h / std, rtol=1e-12, atol=1e-14)
    undivided = UnconstrainedScore(network, NoiseLevel(SDES[name]), divide_by_sigma=False)(x, t)
    assert torch.equal(undivided, sign * h)
    if name != "subvp":
        ladder = SDES[name].ladder(25)
        times = ladder.time[[0, 12, 24]].float()
        discrete = UnconstrainedScore(network, NoiseLevel(SDES[name], 25))(x.float(), times)
        std = ladder.std[[0, 12, 24]][:, None, None, None]
        assert discrete.dtype == torch.float32  # tables of double precision do not promote the output
        torch.testing.assert_close(discrete.double(), sign * h / std, rtol=1e-5, atol=1e-6)


def test_conservative_score_of_a_linear_network():
    # h = W x: s = ∇(−‖Wx‖²/2σ) = −WᵀW x/σ, for every family.
    network, x = Linear(), random(3, 1, 2, 2)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for sde in SDES.values():
        model = ConservativeScore(network, NoiseLevel(sde))
        h = x.flatten(1) @ network.weight.T
        torch.testing.assert_close(model.log_density(x, t), -(h**2).sum(1) / (2 * sde.std(t)), rtol=1e-12, atol=0)
        expected = -(h @ network.weight) / sde.std(t)[:, None]
        torch.testing.assert_close(model(x, t), expected.view_as(x), rtol=1e-12, atol=1e-14)


@pytest.fixture
def conservative(small_unet):
    return ConservativeScore(small_unet(num_classes=2), NoiseLevel(SDES["ve"]))


POINTS = (random(2, 1, 8, 8), torch.tensor([0.2, 0.7], dtype=torch.float64), torch.tensor([0, 1]))


def test_conservative_score_is_the_gradient_of_its_log_density(conservative):
    x, t, labels = POINTS
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(conservative.log_density(leaf, t, labels).sum(), leaf)
    torch.testing.assert_close(conservative(x, t, labels), expected, rtol=1e-12, atol=1e-12)
    assert not x.requires_grad
    # A witness: the central difference of the log-density along a direction.
    direction, h = random(*x.shape, seed=1), 1e-6
    with torch.no_grad():
        ahead, behind = (conservative.log_density(x + s * h * direction, t, labels) for s in (1, -1))
    torch.testing.assert_close((ahead - behind) / (2 * h), (expected * direction).sum((1, 2, 3)), rtol=1e-6, atol=1e-6)
    unconstrained = UnconstrainedScore(conservative.network, conservative.noise_level)
    assert [p.shape for p in unconstrained.parameters()] == [p.shape for p in conservative.parameters()]


def test_conservative_score_with_and_without_gradients(conservative):
    x, t, labels = POINTS
    expected = conservative(x, t, labels)
    assert expected.requires_grad
    gradients = torch.autograd.grad((expected**2).sum(), conservative.network.stem.weight)
    assert gradients[0].abs().max() > 0
    with torch.no_grad():
        evaluated = conservative(x, t, labels)
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, expected, rtol=1e-12, atol=1e-12)
    conservative.requires_grad_(False)
    torch.testing.assert_close(conservative(x, t, labels), expected, rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(conservative(x, t, labels), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
def test_conservative_score_inside_other_derivatives(frozen, conservative):
    x, t, labels = POINTS
    conservative.requires_grad_(not frozen)
    v, h = random(*x.shape, seed=1), 1e-6
    with torch.no_grad():
        difference = (conservative(x + h * v, t, labels) - conservative(x - h * v, t, labels)) / (2 * h)
    leaf = x.clone().requires_grad_()
    jv, jtv = jvp_and_vjp(conservative(leaf, t, labels), leaf, v)
    torch.testing.assert_close(jv, jtv, rtol=1e-9, atol=1e-9 * difference.abs().max().item())
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(conservative(forward_ad.make_dual(x, v), t, labels)).tangent
    for derivative in (jv, tangent):
        torch.testing.assert_close(derivative, difference, rtol=1e-5, atol=1e-5 * difference.abs().max().item())


@pytest.mark.parametrize("grad_mode", [False, True])
def test_conservative_score_does_not_lose_a_tangent(grad_mode):
    # s = −WᵀW x/σ, whose derivative along v is −WᵀW v/σ.
    network, x, v = Linear(), random(2, 1, 2, 2), random(2, 1, 2, 2, seed=1)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    model = ConservativeScore(network, NoiseLevel(SDES["ve"]))
    with torch.set_grad_enabled(grad_mode), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v), t)).tangent
    expected = -(v.flatten(1) @ network.weight.T @ network.weight) / SDES["ve"].std(t)[:, None]
    torch.testing.assert_close(tangent, expected.view_as(x), rtol=1e-12, atol=1e-14)


# ------------------------------------------------------------------------------------------------------------- configs


def model_config(parameterization: str = "unconstrained", *, continuous: bool = True, **fields) -> ConfigDict:
    options = dict(name="ncsnpp", parameterization=parameterization, scale_by_sigma=True, num_scales=30)
    model = SMALL_UNET | options | fields
    data = {key: model.pop(key) for key in ("image_size", "num_channels", "centered")}
    return ConfigDict(dict(model=model, data=data, training=dict(continuous=continuous)))


def test_score_models_from_a_config():
    x, t = random(2, 1, 8, 8).float(), torch.tensor([0.2, 0.7])
    torch.manual_seed(3)
    network = create_network(model_config()).eval()
    outputs = {}
    for name, scale_by_sigma in (("ve", True), ("ve", False), ("vp", False), ("subvp", False)):
        torch.manual_seed(3)
        model = create_score_model(model_config(scale_by_sigma=scale_by_sigma), SDES[name]).eval()
        assert type(model) is UnconstrainedScore and model.sde is SDES[name]
        outputs[name, scale_by_sigma] = model(x, t)
        label = SDES[name].std(t) if name == "ve" else 999 * t
        h = network(x, label)
        std = SDES[name].std(t)[:, None, None, None]
        expected = {("ve", True): h / std, ("ve", False): h}.get((name, scale_by_sigma), -h / std)
        torch.testing.assert_close(outputs[name, scale_by_sigma], expected, rtol=1e-5, atol=1e-5)
    for sde, scale_by_sigma in (("ve", True), ("vp", False)):
        model = create_score_model(model_config("conservative", scale_by_sigma=scale_by_sigma), SDES[sde])
        assert type(model) is ConservativeScore
    discrete = create_score_model(model_config(continuous=False, embedding_type="positional"), SDES["ve"])
    assert discrete.noise_level.num_scales == 30


def test_network_options_from_a_config():
    changes = dict(nf=16, ch_mult=[1, 1], num_res_blocks=2, num_classes=4, progressive="residual", centered=True)
    given = create_network(model_config(name="NCSNpp", **changes))
    torch.manual_seed(0)
    expected = UNet(**(SMALL_UNET | changes | dict(num_classes=5)))  # the last label stands for no class
    assert {n: p.shape for n, p in given.named_parameters()} == {n: p.shape for n, p in expected.named_parameters()}
    assert given.input_scale == 1.0


@pytest.mark.parametrize(
    ("sde", "config", "message"),
    [
        ("ve", model_config(name="unet"), "model.name='unet': allowed are ddpm, mlp, ncsn, ncsnpp, ncsnv2"),
        ("ve", model_config("free"), "model.parameterization='free': allowed are unconstrained, conservative"),
        ("vp", model_config(), "model.scale_by_sigma=True: only for VE"),
        ("ve", model_config("conservative", scale_by_sigma=False), "model.scale_by_sigma=False: a conservative model"),
        ("subvp", model_config(scale_by_sigma=False, continuous=False), "training.sde='subvpsde' has no discrete-time"),
    ],
)
def test_models_that_make_no_sense(sde, config, message):
    with pytest.raises(ValueError) as error:
        create_score_model(config, SDES[sde])
    assert message in str(error.value) and "\n" not in str(error.value)
