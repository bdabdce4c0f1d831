"""The U-Net option by option, and the moving average of its weights."""

from __future__ import annotations

import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from oracles import random
from torch import Tensor, nn

from conservativeness import jvp_and_vjp
from models import EMA
from models.unet import ACTIVATIONS, Combine, UNet

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
    "ch_mult=one level": (dict(ch_mult=(2,), attn_resolutions=()), {}),
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


def test_combine():
    pyramid, h = random(2, 3, 4, 4), random(2, 5, 4, 4, seed=1)
    for concatenate in (False, True):
        layer = Combine(3, 5, concatenate=concatenate).double()
        projected = F.conv2d(pyramid, layer.conv.weight, layer.conv.bias)
        expected = torch.cat([projected, h], 1) if concatenate else projected + h
        assert torch.equal(layer(h, pyramid)[0], expected) and layer.out_channels == expected.shape[1]


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
    for level, ((h, pyramid), (output, _)) in enumerate(seen, start=1):
        torch.testing.assert_close(pyramid, F.avg_pool2d(2 * x - 1, 2**level), rtol=1e-12, atol=1e-12)
        assert output.shape[1] == (2 if combine == "cat" else 1) * h.shape[1]


def test_output_skip_adds_the_images_of_every_resolution(small_unet):
    # With constant images as projections their upsampled sum is the sum of the constants.
    network = small_unet(ch_mult=(1, 1, 1), fir=False, progressive="output_skip")
    total = 0.0
    for stage in network.decoder:
        if hasattr(stage, "merge"):
            nn.init.zeros_(stage.merge.projection[2].weight)
            nn.init.normal_(stage.merge.projection[2].bias)
            total += stage.merge.projection[2].bias.item()
    x, label = images(network)
    torch.testing.assert_close(network(x, label), torch.full_like(x, total), rtol=1e-12, atol=1e-12)
    assert network.head is None


@pytest.mark.parametrize("skip_rescale", [False, True])
def test_output_residual_goes_on_as_features(skip_rescale, small_unet):
    # At each finer resolution: h ← (up(pyramid) + h)/√2, which is the next pyramid and the input of the head.
    network = small_unet(progressive="residual", skip_rescale=skip_rescale)
    lowest, finer = (stage for stage in network.decoder if hasattr(stage, "merge"))
    start, up, features, head = [], [], [], []
    for module, seen in (
        (lowest.merge.projection, start),
        (finer.pyramid_up, up),
        (finer.attention, features),
        (network.head, head),
    ):
        capture(module, seen)
    network(*images(network))
    assert torch.equal(up[0][0][0], start[0][1])
    expected = (up[0][1] + features[0][1]) / (math.sqrt(2) if skip_rescale else 1)
    torch.testing.assert_close(head[0][0][0], expected, rtol=1e-12, atol=1e-12)


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
        (dict(attn_resolutions=(8, 2)), "model.attn_resolutions=(8, 2): there is no resolution 2; with data."),
        (dict(nf=10), "nf, ch_mult: a layer has 30 channels, which cannot be normalised in 7 groups"),
        (dict(num_classes=3, conditional=False), "model.num_classes=3: class labels need model.conditional=True"),
        (dict(num_levels=10), "training.continuous=False: a discrete-time model has the label 0"),
    ],
)
def test_options_that_make_no_sense(options, message, small_unet):
    with pytest.raises(ValueError) as error:
        small_unet(**options)
    assert message in str(error.value) and "\n" not in str(error.value)


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
