"""From a network to a score: labels, the two parameterisations, and both built from a config."""

from __future__ import annotations

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from conftest import SMALL_UNET
from oracles import SDES, random
from torch import Tensor, nn

from conservativeness import jvp_and_vjp
from models import NETWORKS, ConservativeScore, PreconditionedScore, UnconstrainedScore, make_network, make_score_model
from models.layers import PositionalEmbedding
from models.score import NoiseLevel

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
    undivided = UnconstrainedScore(network, NoiseLevel(SDES[name]), prediction="score")(x, t)
    assert torch.equal(undivided, h)
    if name != "subvp":
        ladder = SDES[name].ladder(25)
        times = ladder.time[[0, 12, 24]].float()
        discrete = UnconstrainedScore(network, NoiseLevel(SDES[name], 25))(x.float(), times)
        std = ladder.std[[0, 12, 24]][:, None, None, None]
        assert discrete.dtype == torch.float32  # tables of double precision do not promote the output
        torch.testing.assert_close(discrete.double(), sign * h / std, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ve", "vp", "subvp"])
def test_preconditioned_score_of_gaussian_data(name):
    """Data N(m, ¼): x_t ~ N(αm, v), so h is constant, and the network is given x of variance 1."""
    x, t, sde = random(3, 1, 2, 2), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), SDES[name]
    alpha, std = (a[:, None, None, None] for a in (sde.mean_coefficient(t), sde.std(t)))
    v, given = alpha**2 / 4 + std**2, []

    def network(y: Tensor, label: Tensor) -> Tensor:
        given.append(y)
        return 0.3 * std / v.sqrt() / 0.5  # m = 0.3

    score = PreconditionedScore(nn.Module(), NoiseLevel(sde))
    score.network.forward = network
    torch.testing.assert_close(score(x, t), -(x - 0.3 * alpha) / v, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(given[0], x / v.sqrt(), rtol=1e-12, atol=1e-12)


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


# ------------------------------------------------------------------------------------------ networks and scores by name


def test_score_models_by_name():
    network = Linear()
    for sde, scale_by_sigma, prediction in (
        ("ve", None, "scaled_score"),
        ("ve", True, "scaled_score"),
        ("ve", False, "score"),
        ("vp", None, "epsilon"),
    ):
        model = make_score_model(SDES[sde], network, parameterization="unconstrained", scale_by_sigma=scale_by_sigma)
        assert type(model) is UnconstrainedScore and model.prediction == prediction
        assert model.sde is SDES[sde] and model.network is network and model.noise_level.num_scales is None
    model = make_score_model(SDES["vp"], network, parameterization="conservative", num_scales=30)
    assert type(model) is ConservativeScore and model.noise_level.num_scales == 30


class Own(nn.Module):
    def __init__(self, width: int, *, num_channels: int, depth: int = 3) -> None:
        super().__init__()
        self.given = (width, num_channels, depth)


def test_a_constructor_is_given_what_it_declares():
    options = dict(width=5, sigma_max=50.0, nf=8)
    assert make_network(f"{__name__}:Own", options, num_channels=3, image_size=8).given == (5, 3, 3)
    changes = dict(num_res_blocks=2, num_classes=4, progressive="residual", centered=True)
    given = make_network("ncsnpp", SMALL_UNET | changes, widths=(3,))
    assert (given.num_classes, given.input_scale) == (4, 1.0)
    assert given.class_embedding.num_embeddings == 5  # the last label stands for no class
    # What a preset fixes is not asked of the options.
    ddpm = make_network("ddpm", SMALL_UNET)
    assert SMALL_UNET["embedding_type"] == "fourier" and type(ddpm.embedding) is PositionalEmbedding


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("unet", {}, f"model.name='unet': allowed are {', '.join(NETWORKS)}, or module:attribute"),
        ("nowhere.nets:N", {}, "model.name='nowhere.nets:N': No module named 'nowhere'; is its folder in PYTHONPATH?"),
        ("mlp", {}, "model.name='mlp': this network also needs dimension"),
        ("ncsnv2", SMALL_UNET | dict(num_classes=3), "model.num_classes=3: model.name='ncsnv2' knows no classes"),
        ("mlp", dict(dimension=2, output_activation="tanh"), "model.output_activation='tanh': allowed are identity"),
    ],
)
def test_networks_that_make_no_sense(name, options, message):
    with pytest.raises(ValueError) as error:
        make_network(name, options)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("sde", "options", "message"),
    [
        (
            "ve",
            dict(parameterization="free"),
            "model.parameterization='free': allowed are unconstrained, conservative, preconditioned",
        ),
        ("vp", dict(scale_by_sigma=True), "model.scale_by_sigma=True: only for VE"),
        (
            "ve",
            dict(parameterization="conservative", scale_by_sigma=False),
            "model.scale_by_sigma=False: a conservative model",
        ),
        ("subvp", dict(num_scales=30), "training.sde='subvpsde' has no discrete-time"),
    ],
)
def test_scores_that_make_no_sense(sde, options, message):
    with pytest.raises(ValueError) as error:
        make_score_model(SDES[sde], Linear(), **(dict(parameterization="unconstrained") | options))
    assert message in str(error.value) and "\n" not in str(error.value)
