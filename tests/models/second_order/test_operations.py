"""Derivatives written out, of all orders, against torch's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from oracles import SDES
from torch import Tensor, nn

from benchmarks.measure import operations_of
from experiment.randomness import SampleGenerators, random_bits
from losses import Objective
from models.score import ConservativeScore, NoiseLevel, UnconstrainedScore
from models.second_order.normalisation import Dropout, GroupNorm, norm_act
from models.second_order.operations import (
    Conv2d,
    blur,
    blur_transposed,
    concatenate,
    differentiated_twice,
    gradients_of,
    higher_order,
)
from models.second_order.recompute import recompute_activations
from models.unet import UNet

KERNEL = torch.tensor([[1.0, 2.0, 0.5], [0.3, 1.0, 3.0], [2.0, 0.1, 0.7]], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def image(*shape: int, seed: int = 0, channels_last: bool = True) -> Tensor:
    x = random(*shape, seed=seed)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def norm(channels: int = 8) -> GroupNorm:
    layer = GroupNorm(2, channels, eps=1e-2).double()  # large, so that it is seen
    layer.weight.data, layer.bias.data = random(channels, seed=5), random(channels, seed=6)
    return layer


def conv(*args, **kwargs) -> Conv2d:
    torch.manual_seed(1)
    return Conv2d(*args, **kwargs).double()


def _activated(layer: GroupNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: norm_act(layer, nn.SiLU(), x)


def _with_dropout(layer: GroupNorm) -> Callable[[Tensor], Tensor]:
    dropout = Dropout(0.4).train()
    dropout.keys = random_bits((2, 2), torch.Generator().manual_seed(7))
    return lambda x: norm_act(layer, nn.SiLU(), x, dropout)


# Name: a function of one image with the parameters it depends on, and the image's shape.
CASES: dict[str, Callable[[], tuple[Callable[[Tensor], Tensor], Sequence[Tensor], tuple[int, ...]]]] = {
    "convolution": lambda: (layer := conv(8, 3, 3, padding=1), tuple(layer.parameters()), (2, 8, 5, 4)),
    "strided": lambda: (layer := conv(8, 4, 3, stride=2), tuple(layer.parameters()), (2, 8, 6, 5)),
    "one channel": lambda: (layer := conv(8, 1, 3, padding=1), tuple(layer.parameters()), (2, 8, 4, 4)),
    "without bias": lambda: (layer := conv(8, 3, 1, bias=False), tuple(layer.parameters()), (2, 8, 3, 3)),
    "with activation": lambda: (
        layer := norm(),
        _activated(layer),
        tuple(layer.parameters()),
        (2, 8, 3, 4),
    )[1:],
    "with dropout": lambda: (layer := norm(), _with_dropout(layer), tuple(layer.parameters()), (2, 8, 3, 4))[1:],
    "blur": lambda: (lambda x: blur(x, KERNEL, stride=2, padding=1), (), (2, 3, 6, 5)),
    "blur without remainder": lambda: (lambda x: blur(x, KERNEL, stride=2, padding=1), (), (2, 3, 7, 7)),
    "transposed blur": lambda: (lambda x: blur_transposed(x, KERNEL, stride=2, padding=1), (), (2, 3, 4, 5)),
    "concatenation": lambda: (lambda x: concatenate(x, x[:, :2] ** 2), (), (2, 3, 4, 4)),
}


def derivatives(function: Callable[[Tensor], Tensor], parameters: Sequence[Tensor], x: Tensor) -> list[Tensor]:
    """Value, and derivatives of first to fourth order of a nonlinear function of it, for the image and parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    y = function(x)
    found = [y]
    scalar = (torch.sin(y) * random(*y.shape, seed=9)).sum()
    for order in range(4):
        gradients = torch.autograd.grad(scalar, (x, *parameters), create_graph=True, materialize_grads=True)
        found += gradients
        scalar = sum(torch.sin(g + order).sum() for g in gradients)
    return [value.detach() for value in found]


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_all_orders_are_torchs(name, channels_last):
    function, parameters, shape = CASES[name]()
    x = image(*shape, channels_last=channels_last)
    expected = derivatives(function, parameters, x)
    with higher_order():
        found = derivatives(function, parameters, x)
    assert len(found) == len(expected) > 4
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9 * theirs.abs().max().item() + 1e-12)


# --------------------------------------------------------------------------------------------------- the whole network


SCORES = {"U": (UnconstrainedScore, 0.0), "C": (ConservativeScore, 0.0), "QC": (UnconstrainedScore, 0.1)}


def loss_and_gradients(objective: Objective, x0: Tensor) -> list[Tensor]:
    objective.zero_grad()
    loss = objective(x0, SampleGenerators((0, "train"), range(len(x0))))["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters() if p.requires_grad)]


def compare(
    build: Callable[..., UNet], name: str, dtype: torch.dtype, tolerance: float, recompute: bool = False, **settings
) -> None:
    score, weight = SCORES[name]
    results = []
    for own in (False, True):
        network = build(dtype=dtype, dropout=0.3, **settings.get("network", {})).train()
        network.own_derivatives = own
        if recompute:
            recompute_activations(network)
        options = {key: value for key, value in settings.items() if key != "network"}
        objective = Objective(score(network, NoiseLevel(SDES["ve"])), qc_weight=weight, **options)
        x0 = torch.rand(2, *network.image_shape, generator=torch.Generator().manual_seed(3), dtype=dtype)
        results.append(loss_and_gradients(objective, x0))
    scale = max(value.abs().max().item() for value in results[0])
    for ours, theirs in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_the_loss_and_its_gradient_are_those_of_torchs_derivatives(name, recompute, small_unet):
    compare(small_unet, name, torch.float64, 1e-10, recompute, qc_probes=3, qc_probe_chunk=2)


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace"])
def test_in_single_precision_they_differ_by_rounding(estimator, small_unet):
    options = dict(image_size=16, attn_resolutions=(8,))
    compare(small_unet, "QC", torch.float32, 1e-5, qc_estimator=estimator, network=options)


@pytest.mark.parametrize("name", ["C", "QC"])
def test_other_options_of_the_network(name, small_unet):
    options = dict(
        nonlinearity="elu", progressive="output_skip", progressive_input="input_skip", progressive_combine="cat"
    )
    compare(small_unet, name, torch.float64, 1e-10, network=options)


def test_where_the_written_out_derivatives_are_used(small_unet):
    x = torch.rand(2, 1, 8, 8)
    assert not differentiated_twice(x)  # score matching alone
    x.requires_grad_()
    assert differentiated_twice(x)
    with torch.no_grad():
        assert not differentiated_twice(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not differentiated_twice(x)
    with torch.autograd.forward_ad.dual_level():
        assert not differentiated_twice(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    assert not torch.func.vmap(lambda row: torch.tensor(differentiated_twice(row)))(x).any()


def test_products_with_the_jacobian_cost_one_evaluation_each(small_unet):
    """Without the gradients of weights. An evaluation is L operations in layers, which are linear, and A in attention,
    the products of two activations each, which take twice as many for each product with the Jacobian; backward passes
    of a loss that depends on value and products take 2L + 2A and 6L + 10A."""
    shape = dict(image_size=32, num_channels=3, nf=16, ch_mult=(1, 2, 2, 2), attn_resolutions=(16,))
    network = small_unet(dtype=torch.float32, **shape).train()
    x, label, results = torch.rand(2, 3, 32, 32, requires_grad=True), torch.ones(2), []
    u, v = torch.ones_like(x).requires_grad_(), torch.ones_like(x)

    def product(at: Tensor, cotangent: Tensor, what: str) -> Tensor:
        with gradients_of(what):
            return torch.autograd.grad(results[-1], at, cotangent, create_graph=True)[0]

    evaluation, jtu, jv, plain, both = (
        operations_of(lambda work=work: results.append(work()))
        for work in (
            lambda: network(x, label),
            lambda: product(x, u, "inputs"),
            lambda: product(u, v, "cotangents"),
            lambda: (results[0] ** 2).sum().backward(retain_graph=True),
            lambda: sum((result**2).sum() for result in results[:3]).backward(),
        )
    )
    attention = jtu - evaluation
    layers = evaluation - attention
    assert 0 < attention < 0.15 * layers
    assert jv == pytest.approx(jtu, rel=0.01)
    assert plain == pytest.approx(2 * layers + 2 * attention, rel=0.01)
    assert both == pytest.approx(6 * layers + 10 * attention, rel=0.02)
