"""Activation checkpointing and dropout: what is computed again is the same, to all orders of differentiation."""

from __future__ import annotations

import copy

import pytest
import torch
from from_config import create_score_model, get_objective, get_sde
from oracles import SDES
from torch import nn

from benchmarks.measure import peak_memory
from configs.defaults import base_config
from experiment.randomness import SampleGenerators, random_bits
from losses import Objective
from models.score import ConservativeScore, NoiseLevel, UnconstrainedScore
from models.second_order.normalisation import Dropout
from models.second_order.recompute import recompute_activations, recomputed

MODELS = {"u": (UnconstrainedScore, {}), "c": (ConservativeScore, {}), "qc": (UnconstrainedScore, {"qc_weight": 0.1})}


def gradients_and_loss(objective: Objective, x0: torch.Tensor) -> list[torch.Tensor]:
    objective.zero_grad()
    loss = objective(x0, SampleGenerators((0, "train"), range(len(x0))))["loss"]
    loss.backward()
    return [loss.detach(), *(p.grad for p in objective.parameters() if p.requires_grad)]


def assert_close(found: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float) -> None:
    """Relative to the largest of all: some gradients, such as that of attention's key bias, vanish identically."""
    scale = max(value.abs().max().item() for value in expected)
    for value, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance * scale)


def objective_of(small_unet, model: str, *, recompute: bool, dtype=torch.float64, **settings) -> Objective:
    score, weight = MODELS[model]
    network = small_unet(dropout=0.3, dtype=dtype, **settings.pop("network", {})).train()
    if recompute:
        recompute_activations(network)
    return Objective(score(network, NoiseLevel(SDES["ve"])), **weight, **settings)


@pytest.mark.parametrize("model", MODELS)
def test_same_loss_and_gradients(model, small_unet):
    """Dropout, a stride, and probes in chunks: all that evaluates a part of the batch or evaluates it again."""
    x0 = torch.rand(2, 1, 8, 8, dtype=torch.float64)
    settings = dict(qc_probes=3, qc_stride=2)
    expected = gradients_and_loss(objective_of(small_unet, model, recompute=False, qc_probe_chunk=3, **settings), x0)
    found = gradients_and_loss(objective_of(small_unet, model, recompute=True, qc_probe_chunk=2, **settings), x0)
    assert_close(found, expected, 1e-10)


@pytest.mark.parametrize("name", ["ddpm", "ncsn", "ncsnv2"])
def test_other_networks(name):
    results = []
    for recompute in (False, True):
        config = base_config()
        config.model.update(name=name, nf=8, num_res_blocks=1, scale_by_sigma=name != "ddpm")
        config.data.image_size = 16
        config.training.update(qc_weight=0.1, activation_checkpointing=recompute)
        if name == "ncsn":
            config.training.continuous, config.model.num_scales, config.model.embedding_type = False, 10, "positional"
        config.training.sde = "vpsde" if name == "ddpm" else "vesde"
        torch.manual_seed(0)
        objective = get_objective(config, create_score_model(config, get_sde(config))).double()
        results.append(gradients_and_loss(objective, torch.rand(2, 3, 16, 16, dtype=torch.float64)))
    assert_close(results[1], results[0], 1e-10)


def test_a_network_without_blocks_is_refused():
    config = base_config()
    config.model.update(name="mlp", widths=(4,), output_activation="identity")
    config.training.activation_checkpointing = True
    with pytest.raises(ValueError, match=r"training\.activation_checkpointing=True: the network has no blocks"):
        create_score_model(config, get_sde(config))


@pytest.mark.parametrize("model", MODELS)
def test_memory_falls(model, small_unet):
    x0, peaks = torch.rand(4, 1, 16, 16), []
    options = dict(network=dict(image_size=16, attn_resolutions=(), nf=16, num_res_blocks=3))
    for recompute in (False, True):
        objective = objective_of(small_unet, model, recompute=recompute, dtype=torch.float32, **options)
        peaks.append(peak_memory(lambda o=objective: gradients_and_loss(o, x0), torch.device("cpu")))
    assert peaks[1] < 0.6 * peaks[0]


def test_many_probes_take_the_memory_of_one(small_unet):
    x0 = torch.rand(4, 1, 8, 8)
    peaks = []
    for probes in (1, 4):
        objective = objective_of(small_unet, "qc", recompute=False, dtype=torch.float32, qc_probes=probes)
        peaks.append(peak_memory(lambda o=objective: gradients_and_loss(o, x0), torch.device("cpu")))
    assert peaks[1] < 1.2 * peaks[0]


def test_autocast_of_the_forward_pass_holds_in_the_second_one(small_unet):
    """bfloat16 adds the gradients that meet at a block in another order; it errs ten times as much by itself."""
    x0, gradients = torch.rand(2, 1, 8, 8), {}
    for recompute, bf16 in ((False, False), (False, True), (True, True)):
        objective = objective_of(small_unet, "u", recompute=recompute, dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = objective(x0, SampleGenerators((0, "train"), range(2)))["loss"]
        loss.backward()
        found = [p.grad.flatten() for p in objective.parameters() if p.requires_grad]
        gradients[recompute, bf16] = torch.cat(found)
    full, plain, again = gradients.values()
    assert 0 < (again - plain).norm() < 0.3 * (plain - full).norm() < 0.03 * full.norm()


def test_third_derivatives_of_a_function_of_several_inputs():
    weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    x, y = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def plain(x: torch.Tensor, absent: None, y: torch.Tensor) -> torch.Tensor:
        assert absent is None
        return torch.tanh(x @ weight) * torch.sin(y) + x**2

    def again(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return recomputed(plain, (x, None, y), (weight,))

    assert torch.autograd.gradcheck(again, (x, y)) and torch.autograd.gradgradcheck(again, (x, y))

    def third(function) -> list[torch.Tensor]:
        (first,) = torch.autograd.grad((function(x, y) ** 2).sum(), x, create_graph=True)
        second = torch.autograd.grad((first**2).sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum((s**2).sum() for s in second), (x, y, weight))

    for found, expected in zip(third(again), third(lambda x, y: plain(x, None, y)), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_training_recomputes_and_evaluation_does_not(small_unet):
    """A copy of the network, as the moving average has one, recomputes with its own weights."""
    network = small_unet()
    recompute_activations(network)
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.9)
    x, label = torch.rand(1, 1, 8, 8, dtype=torch.float64, requires_grad=True), torch.ones(1, dtype=torch.float64)
    plain = network(x, label)
    for training in (False, True):
        evaluated = []
        hook = network.encoder[0].block.conv1.register_forward_hook(lambda *_, e=evaluated: e.append(1))
        value = network.train(training)(x, label)
        torch.autograd.grad(value.sum(), x)
        hook.remove()
        assert len(evaluated) == 1 + training
        torch.testing.assert_close(value, plain, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(copied.train()(x, label), plain)


# ------------------------------------------------------------------------------------------------------------- dropout


def masks(keys: torch.Tensor, p: float, shape: tuple[int, ...]) -> torch.Tensor:
    layer = Dropout(p)
    layer.keys = keys
    return layer(torch.ones(len(keys), *shape))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_dropout_keeps_the_mean_and_drops_independently(p):
    keys = random_bits((1000, 2), torch.Generator().manual_seed(0))
    kept = masks(keys, p, (4, 6, 6))
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / (1 - p)).item()}
    gone = (kept == 0).flatten(1).double()
    n, d = gone.shape
    assert gone.mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / (n * d)) ** 0.5)
    # Correlations between positions, over samples, and between samples, over positions: mean 0, variance 1/n and 1/d.
    for matrix, count in ((gone.T, n), (gone, d)):
        off_diagonal = torch.corrcoef(matrix).fill_diagonal_(0)
        pairs = len(matrix) * (len(matrix) - 1)
        assert off_diagonal.square().sum().item() / pairs * count == pytest.approx(1, abs=0.05)
        assert off_diagonal.abs().max() * count**0.5 < 6.5  # of at most 10⁶ pairs
    # Triples of neighbours are as often gone together as independence has it.
    triples = (gone[:, :-2] * gone[:, 1:-1] * gone[:, 2:]).mean().item()
    assert triples == pytest.approx(p**3, abs=5 * (p**3 / (n * d)) ** 0.5)
    # The number of gone positions is binomial: a hash in which rows were all alike would show in its variance.
    assert gone.sum(1).var().item() == pytest.approx(d * p * (1 - p), rel=4 * (2 / n) ** 0.5)


def test_dropout_of_a_sample_belongs_to_its_key():
    keys = random_bits((5, 2), torch.Generator().manual_seed(0))
    together = masks(keys, 0.4, (3, 4, 4))
    alone = torch.cat([masks(keys[i : i + 1], 0.4, (3, 4, 4)) for i in range(5)])
    assert torch.equal(together, alone) and not torch.equal(together[0], together[1])
    x = torch.randn(5, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    layer = Dropout(0.4)
    layer.keys = keys
    assert torch.equal(layer(x), x * together) and layer(x).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.eval()(x), x)
    layer.train().keys = None  # the global stream
    assert not torch.equal(layer(x), layer(x))


def test_loss_with_dropout_does_not_depend_on_the_batch(small_unet):
    x0 = torch.rand(4, 1, 8, 8, dtype=torch.float64)
    objective = objective_of(small_unet, "qc", recompute=False, qc_probes=2)
    together = objective(x0, SampleGenerators((0, "loss"), range(4)))["loss"]
    alone = [objective(x0[i : i + 1], SampleGenerators((0, "loss"), [i]))["loss"] for i in range(4)]
    torch.testing.assert_close(together, sum(alone) / 4, rtol=1e-11, atol=0)
    other = objective(x0, SampleGenerators((1, "loss"), range(4)))["loss"]
    evaluated = objective.eval()(x0, SampleGenerators((0, "loss"), range(4)))["loss"]
    assert len({round(value.item(), 6) for value in (together, other, evaluated)}) == 3
