"""DDPM, NCSN and NCSNv2: the public networks' names, what they compute, and that all three kinds of score train."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from from_config import create_network, create_score_model, get_objective, get_sde
from ml_collections import ConfigDict
from public_checkpoints import load_score_sde_checkpoint
from reference_networks import ddpm, ddpm_shapes, random_state, refinenet, refinenet_shapes
from torch import Tensor, nn

from checkpoints import CheckpointError
from models.published import official_names


def small(path: str, **fields) -> ConfigDict:
    """The config of a file for images of 16×16 and a narrow network."""
    config = importlib.import_module(f"configs.{path.replace('/', '.')}").get_config()
    config.data.image_size = 16
    config.model.nf = 8
    if config.model.name == "ddpm":
        config.model.update(ch_mult=(1, 2), num_res_blocks=2, attn_resolutions=(8,), dropout=0.0)
    else:
        config.model.update(num_scales=10)
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return config


SMALL_DDPM = dict(nf=8, ch_mult=(1, 2), num_res_blocks=2, attention_levels=(1,))
# config, the names and shapes of the public state dict, and what it computes.
NETWORKS: dict[str, tuple[ConfigDict, dict, Callable[..., Tensor]]] = {
    "ddpm": (small("vp/ddpm/cifar10"), ddpm_shapes(**SMALL_DDPM), partial(ddpm, **SMALL_DDPM)),
    "ncsn": (small("ve/ncsn/cifar10"), refinenet_shapes(64, 8, 10), partial(refinenet, architecture=64)),
    **{
        f"ncsnv2_{size}": (
            small("ve/ncsnv2/cifar10", model__name=f"ncsnv2_{size}"),
            refinenet_shapes(size, 8),
            partial(refinenet, architecture=size),
        )
        for size in (64, 128, 256)
    },
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def public_checkpoint(shapes: dict, *, step: int = 77) -> dict:
    """A file of score_sde_pytorch as its training writes it: all parameters in order, a buffer before them."""
    weights, averages = random_state(shapes, seed=1), random_state(shapes, seed=2)
    model = {"module.sigmas": torch.linspace(1, 0.01, 10, dtype=torch.float64)}
    model |= {f"module.{name}": tensor for name, tensor in weights.items()}
    ema = {"decay": 0.999, "num_updates": step, "shadow_params": list(averages.values())}
    return {"optimizer": {}, "model": model, "ema": ema, "step": step}


# ------------------------------------------------------------------------------------------------ names and functions


@pytest.mark.parametrize(
    ("path", "shapes"),
    [
        ("vp/ddpm/cifar10", ddpm_shapes(128, (1, 2, 2, 2), 2, (1,))),
        ("vp/ddpm/church", ddpm_shapes(128, (1, 1, 2, 2, 4, 4), 2, (4,))),
        ("ve/ncsn/cifar10", refinenet_shapes(64, 128, 10)),
        ("ve/ncsn/celeba_124", refinenet_shapes(64, 128, 500)),
        ("ve/ncsnv2/celeba", refinenet_shapes(64, 128)),
        ("ve/ncsnv2/bedroom", refinenet_shapes(128, 128)),
    ],
)
def test_names_and_shapes_of_the_public_networks(path, shapes):
    with torch.device("meta"):
        network = create_network(importlib.import_module(f"configs.{path.replace('/', '.')}").get_config())
    parameters, names = dict(network.named_parameters()), official_names(network)
    assert sorted(names.values()) == sorted(shapes)
    for own, official in names.items():
        shape = shapes[official]
        assert tuple(parameters[own].shape) == ((*shape[::-1], 1, 1) if official.endswith(".W") else shape), official


def test_number_of_parameters_of_ddpm():
    """Ho et al.'s for CIFAR-10 has 35 746 307. In the decoder score_sde_pytorch has one attention block of 256 channels
    where they have three: a norm and four 1×1 convolutions each."""
    with torch.device("meta"):
        network = create_network(importlib.import_module("configs.vp.ddpm.cifar10").get_config())
    assert sum(p.numel() for p in network.parameters()) == 35_746_307 - 2 * (2 * 256 + 4 * (256 * 256 + 256))


@every_network
@pytest.mark.parametrize("ema", [False, True])
def test_public_checkpoint_computes_what_it_did(name, ema, tmp_path):
    config, shapes, reference = NETWORKS[name]
    torch.save(public_checkpoint(shapes), tmp_path / "checkpoint_1.pth")
    network = create_network(config).eval()
    assert load_score_sde_checkpoint(tmp_path / "checkpoint_1.pth", network, ema=ema) == 77
    x, label = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0.0, 4.0, 9.0])
    with torch.no_grad():
        output = network(x, label)
    expected = reference(random_state(shapes, seed=2 if ema else 1, dtype=torch.float64), x.double(), label.double())
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("nf", [32, 96])
def test_ddpm_has_32_groups_whatever_its_width(nf, tmp_path):
    """With other numbers of groups the same weights compute something else, and no name or shape says so."""
    config = small(
        "vp/ddpm/cifar10", model__nf=nf, model__num_res_blocks=1, model__ch_mult=(1,), model__attn_resolutions=()
    )
    options = dict(nf=nf, ch_mult=(1,), num_res_blocks=1, attention_levels=())
    torch.save(public_checkpoint(ddpm_shapes(**options)), tmp_path / "public.pth")
    network = create_network(config).eval()
    load_score_sde_checkpoint(tmp_path / "public.pth", network, ema=False)
    assert {norm.num_groups for norm in network.modules() if isinstance(norm, nn.GroupNorm)} == {32}
    x, label = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([4.0])
    with torch.no_grad():
        output = network(x, label)
    state = random_state(ddpm_shapes(**options), seed=1, dtype=torch.float64)
    expected = ddpm(state, x.double(), label.double(), **options)
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


@every_network
def test_public_checkpoint_of_another_network_is_refused(name, tmp_path):
    config, shapes, _ = NETWORKS[name]
    network = create_network(config)
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    checkpoint = public_checkpoint(shapes)
    del checkpoint["model"][f"module.{list(shapes)[5]}"], checkpoint["ema"]["shadow_params"][5]
    torch.save(checkpoint, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"another architecture: \S+ is missing$"):
        load_score_sde_checkpoint(tmp_path / "short.pth", network, ema=True)
    other = NETWORKS["ncsn" if name.startswith("ncsnv2") else "ncsnv2_64"][1]
    torch.save(public_checkpoint(other), tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="another architecture"):
        load_score_sde_checkpoint(tmp_path / "other.pth", network, ema=False)
    assert all(torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())


# ------------------------------------------------------------------------------------------------------------ training


@every_network
@pytest.mark.parametrize("kind", ["u", "c", "qc"])
def test_gradients_of_every_objective(name, kind):
    """Along a random direction of all parameters the loss changes as its gradient says: three derivatives for QC."""
    config = NETWORKS[name][0].copy_and_resolve_references()
    config.data.image_size = 8
    config.model.nf = 4
    if config.training.sde == "vesde":
        config.model.scale_by_sigma = True
    config.model.parameterization = "conservative" if kind == "c" else "unconstrained"
    config.training.qc_weight = 0.1 if kind == "qc" else 0.0
    torch.manual_seed(0)
    score_model = create_score_model(config, get_sde(config)).double()
    objective = get_objective(config, score_model)
    # The last layers of DDPM start at almost zero, where finite differences of a conservative score see nothing.
    with torch.no_grad():
        for parameter in score_model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    x0 = torch.rand(2, 3, 8, 8, dtype=torch.float64)

    def loss() -> Tensor:
        return objective(x0, torch.Generator().manual_seed(1))["loss"]

    parameters = list(score_model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    h, values = 1e-8, []  # short, so as not to cross where another pixel becomes the maximum of a pooling
    for sign in (1, -2):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * h * direction
        values.append(loss().detach())
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), slope, rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------------------------- labels and options


def test_ncsn_looks_its_level_up():
    network = create_network(NETWORKS["ncsn"][0]).eval()
    x = torch.rand(4, 3, 16, 16)
    output = network(x[:1].expand(4, -1, -1, -1), torch.tensor([2.0, 2.4, 1.6, 3.0]))
    assert torch.allclose(output[0], output[1]) and torch.allclose(output[0], output[2])
    assert not torch.allclose(output[0], output[3], atol=1e-3)
    with pytest.raises(IndexError):
        network(x[:1], torch.tensor([10.0]))


def test_ncsnv2_has_no_use_for_the_level():
    network = create_network(NETWORKS["ncsnv2_64"][0]).eval()
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(network(x, torch.tensor([0.0, 1.0])), network(x, torch.tensor([9.0, 3.0])))
    # So its continuous-time score is h/σ(t) at every t.
    config = small("ve/ncsnv2/cifar10", training__continuous=True)
    model = create_score_model(config, get_sde(config)).eval()
    t = torch.tensor([0.2, 0.7])
    torch.testing.assert_close(model(x, t), model.network(x, t) / model.sde.std(t)[:, None, None, None])


@pytest.mark.parametrize(("size", "architecture"), [(32, 64), (94, 64), (96, 128), (128, 128), (136, 256), (256, 256)])
def test_ncsnv2_is_chosen_by_the_size_of_the_images(size, architecture):
    with torch.device("meta"):
        chosen, named = (
            create_network(small("ve/ncsnv2/cifar10", data__image_size=size, model__name=name))
            for name in ("ncsnv2", f"ncsnv2_{architecture}")
        )
    assert [p.shape for p in chosen.parameters()] == [p.shape for p in named.parameters()]


def test_standardisation_of_instance_norm():
    """With γ = 1, β = 0 the mean of a channel is α times the standardised channel mean, its variance 1."""
    network = create_network(NETWORKS["ncsnv2_64"][0])
    norm = network.norm.double()
    nn.init.ones_(norm.gamma)
    nn.init.constant_(norm.alpha, 0.5)
    x = 3 * torch.randn(2, 8, 40, 40, dtype=torch.float64) + 5 * torch.randn(2, 8, 1, 1, dtype=torch.float64)
    y = norm(x, None)
    means = x.mean((2, 3))
    expected = 0.5 * (means - means.mean(1, keepdim=True)) / means.std(1, keepdim=True)
    torch.testing.assert_close(y.mean((2, 3)), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(y.var((2, 3), correction=0), torch.ones(2, 8).double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small("ve/ncsn/cifar10", training__continuous=True), "training.continuous=True: model.name='ncsn'"),
        (small("ve/ncsn/cifar10", model__parameterization="conservative"), "model.scale_by_sigma=False"),
        (small("ve/ncsn/cifar10", model__nf=1), "model.nf=1: NCSN and NCSNv2 standardise over channels"),
        (small("ve/ncsn/cifar10", model__nonlinearity="gelu"), "model.nonlinearity='gelu': allowed are elu, relu"),
        (small("ve/ncsn/cifar10", data__image_size=15), "data.image_size=15: this network needs a multiple of 2"),
        (small("ve/ncsnv2/bedroom", data__image_size=30), "data.image_size=30: this network needs a multiple of 4"),
        (small("ve/ncsnv2/cifar10", model__name="ncsnv2", data__image_size=512), "data.image_size=512"),
        (small("vp/ddpm/cifar10", data__image_size=15), "data.image_size=15 with 2 levels"),
    ],
)
def test_options_that_make_no_sense(config, message):
    with pytest.raises(ValueError) as error:
        create_score_model(config, get_sde(config))
    assert message in str(error.value) and "\n" not in str(error.value)


@every_network
def test_images_of_another_shape(name):
    network = create_network(NETWORKS[name][0])
    with pytest.raises(ValueError, match=r"images of shape \(1, 16, 16\) given to a network built for \(3, 16, 16\)"):
        network(torch.zeros(2, 1, 16, 16), torch.zeros(2))


def test_samples_of_a_batch_do_not_meet():
    for name in NETWORKS:
        network = create_network(NETWORKS[name][0]).double().eval()
        x, label = torch.rand(3, 3, 16, 16, dtype=torch.float64), torch.tensor([1.0, 5.0, 9.0]).double()
        alone = torch.cat([network(x[i : i + 1], label[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(network(x, label), alone, rtol=1e-9, atol=1e-9 * math.sqrt(x[0].numel()), msg=name)
