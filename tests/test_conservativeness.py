"""Asymmetry of Jacobians: definitions on linear fields, estimators averaged over all signs, networks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from oracles import SDES, gaussian_2d, mixture_2d
from torch import Tensor, nn

import conservativeness
from conservativeness import asymmetry, jacobian, jvp_and_vjp, vjp
from models.score import ConservativeScore, NoiseLevel, UnconstrainedScore

HALF = torch.tensor([0.5], dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(matrix: Tensor):
    """s(x, t) = t A x on samples of any shape; its Jacobian is tA."""

    def score(x: Tensor, t: Tensor) -> Tensor:
        return (t[:, None] * (x.flatten(1) @ matrix.T)).view_as(x)

    return score


def all_signs(dimension: int) -> Tensor:
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dimension)), dtype=torch.float64)


@pytest.fixture
def every_sign(monkeypatch):
    """Makes the probes of a batch of 2^D equal samples run once through all sign vectors."""

    def probes(x: Tensor, generator) -> Tensor:
        return all_signs(x[0].numel()).view_as(x)

    monkeypatch.setattr(conservativeness, "rademacher_like", probes)


class MLP(nn.Module):
    """A small network of the label that is smooth in x (B, 1, 2, 3)."""

    def __init__(self, dimension: int = 6) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layers = nn.Sequential(
            nn.Linear(dimension + 1, 10), nn.Tanh(), nn.Linear(10, 10), nn.SiLU(), nn.Linear(10, dimension)
        ).double()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.layers(torch.cat([x.flatten(1), label[:, None].to(x.dtype).log()], dim=1)).view_as(x)


@pytest.fixture
def networks(small_unet):
    """Networks of at most eight dimensions, with the shape of their samples."""
    return {
        "mlp": (lambda: MLP(), (1, 2, 3)),
        "unet": (lambda: small_unet(image_size=2, num_channels=2, attn_resolutions=(2,)), (2, 2, 2)),
    }


# -------------------------------------------------------------------------------------------------------- definitions


def test_definitions_on_linear_fields():
    a = random(6, 6)
    x, t = random(3, 1, 2, 3, seed=1), torch.tensor([0.2, 0.5, 1.0], dtype=torch.float64)

    def measured(matrix: Tensor):
        return asymmetry(linear(matrix), x, t)

    general = measured(a)
    expected = t**2 * (torch.trace(a @ a.T) - torch.trace(a @ a))
    torch.testing.assert_close(general.asym, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(general.asym, t**2 * 0.5 * torch.linalg.norm(a - a.T) ** 2, rtol=1e-12, atol=0)
    torch.testing.assert_close(general.jacobian_norm_squared, t**2 * torch.linalg.norm(a) ** 2, rtol=1e-12, atol=0)
    nasym = torch.linalg.norm(a - a.T) ** 2 / (4 * torch.linalg.norm(a) ** 2)
    torch.testing.assert_close(general.nasym, nasym.expand(3), rtol=1e-12, atol=0)
    torch.testing.assert_close(general.score, linear(a)(x, t), rtol=1e-12, atol=0)

    symmetric, antisymmetric = measured(a + a.T), measured(a - a.T)
    assert symmetric.asym.max() < 1e-28 and symmetric.nasym.max() < 1e-28
    torch.testing.assert_close(antisymmetric.nasym, torch.ones(3).double(), rtol=1e-12, atol=0)


def test_nasym_of_a_random_matrix_is_one_half():
    # NAsym = ½(1 − tr(AA)/tr(AAᵀ)), and tr(AA)/tr(AAᵀ) has mean 1/D and standard deviation about √2/D.
    dimension = 200
    result = asymmetry(linear(random(dimension, dimension)), random(1, dimension), 2 * HALF)
    assert result.nasym.item() == pytest.approx(0.5 - 0.5 / dimension, abs=4 * 0.5 * 2**0.5 / dimension)


def test_jacobian_of_a_nonlinear_field():
    x, t = random(2, 1, 2, 3), torch.tensor([0.3, 0.8], dtype=torch.float64)

    def score(x: Tensor, t: Tensor) -> Tensor:
        y = x.flatten(1)
        return (t[:, None] * torch.sin(y) * y.roll(1, 1) ** 2).view_as(x)

    value, j = jacobian(score, x, t)
    y = x.flatten(1)
    diagonal = t[:, None] * torch.cos(y) * y.roll(1, 1) ** 2
    below = t[:, None] * torch.sin(y) * 2 * y.roll(1, 1)
    expected = torch.diag_embed(diagonal)
    for i in range(6):
        expected[:, i, i - 1] = below[:, i]
    torch.testing.assert_close(value, score(x, t), rtol=1e-14, atol=0)
    torch.testing.assert_close(j, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("oracle", [gaussian_2d, mixture_2d])
def test_a_true_score_is_conservative(oracle):
    x, t = random(5, 2), torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    oracle = oracle(SDES["vp"])
    result = asymmetry(oracle.score, x, t)
    assert result.nasym.max() < 1e-25
    # Its Jacobian is the Hessian of the log-density, with the divergence as trace.
    torch.testing.assert_close(
        jacobian(oracle.score, x, t)[1].diagonal(dim1=1, dim2=2).sum(1), oracle.divergence(x, t), rtol=1e-9, atol=1e-9
    )


# --------------------------------------------------------------------------------------------------------- estimators


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace"])
@pytest.mark.parametrize("dimension", [2, 5, 8])
def test_estimators_are_exactly_unbiased(estimator, dimension, every_sign):
    # The mean over all 2^D sign vectors is the expectation.
    a = random(dimension, dimension)
    x = random(1, dimension).expand(2**dimension, dimension)
    t = HALF.expand(len(x))
    estimate = asymmetry(linear(a), x, t, probes=1, estimator=estimator)
    exact = asymmetry(linear(a), x[:1], t[:1])
    torch.testing.assert_close(estimate.asym.mean(), exact.asym[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(
        estimate.jacobian_norm_squared.mean(), exact.jacobian_norm_squared[0], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(estimate.score[0], exact.score[0], rtol=1e-12, atol=0)
    if estimator == "antisymmetric":
        assert estimate.asym.min() >= 0
    # Per probe: vᵀ(AAᵀ − AA)v, or ½‖(A − Aᵀ)v‖², here with A scaled by t = ½.
    v = all_signs(dimension)
    if estimator == "trace":
        form = ((v @ (a @ a.T - a @ a)) * v).sum(1)
    else:
        form = 0.5 * ((v @ (a - a.T).T) ** 2).sum(1)
    torch.testing.assert_close(estimate.asym, form / 4, rtol=1e-10, atol=1e-12)


def test_variance_of_the_estimators_near_conservativeness():
    # S + rN with NAsym near 1e-3, as the paper's image models have: S symmetric, N antisymmetric.
    dimension, probes = 128, 4000
    s, n = random(dimension, dimension), random(dimension, dimension, seed=1)
    a = (s + s.T) / 2 + 0.032 * (n - n.T) / 2
    exact = asymmetry(linear(a), random(1, dimension), 2 * HALF)
    assert exact.nasym.item() == pytest.approx(1e-3, rel=0.1)
    x, t = random(1, dimension).expand(probes, dimension), torch.ones(probes, dtype=torch.float64)
    variances = {}
    for estimator, matrix in (("trace", a @ a.T - a @ a), ("antisymmetric", 0.5 * (a - a.T).T @ (a - a.T))):
        generator = torch.Generator().manual_seed(0)
        estimates = asymmetry(linear(a), x, t, probes=1, estimator=estimator, generator=generator).asym
        assert abs(estimates.mean() - exact.asym) < 4 * estimates.std() / probes**0.5
        # The variance of vᵀMv over signs is 2 Σ_{i≠j} M_ij² for symmetric M; measured from 4000 within 4·√(2/4000).
        m = (matrix + matrix.T) / 2
        variances[estimator] = 2 * ((m**2).sum() - (m.diagonal() ** 2).sum())
        assert estimates.var() / variances[estimator] == pytest.approx(1, abs=4 * (2 / probes) ** 0.5)
    assert variances["antisymmetric"] < variances["trace"] / 100


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace"])
def test_several_probes_are_averaged(estimator):
    a, x = random(6, 6), random(4, 1, 2, 3)
    t = HALF.expand(4)
    together = asymmetry(linear(a), x, t, probes=3, estimator=estimator, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(0)
    each = [asymmetry(linear(a), x, t, probes=1, estimator=estimator, generator=generator) for _ in range(3)]
    torch.testing.assert_close(together.asym, sum(e.asym for e in each) / 3, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(
        together.jacobian_norm_squared, sum(e.jacobian_norm_squared for e in each) / 3, rtol=1e-12, atol=0
    )
    assert not torch.equal(each[0].asym, each[1].asym)


def test_results_carry_a_graph_only_when_asked():
    matrix = random(4, 4).requires_grad_()
    x, t = random(2, 4), HALF.expand(2)
    for settings in (dict(), dict(probes=2), dict(estimator="exact", probes=1)):
        assert not any(part.requires_grad for part in asymmetry(linear(matrix), x, t, **settings))
        with torch.no_grad():
            asymmetry(linear(matrix), x, t, **settings)
        assert all(part.requires_grad for part in asymmetry(linear(matrix), x, t, create_graph=True, **settings))
    assert not x.requires_grad


# ------------------------------------------------------------------------------------------------ products on networks


def unconstrained(network: nn.Module) -> UnconstrainedScore:
    return UnconstrainedScore(network, NoiseLevel(SDES["ve"]))


def test_products_on_a_unet_against_the_exact_jacobian(small_unet):
    model = unconstrained(small_unet())
    x, v = random(2, 1, 8, 8), random(2, 1, 8, 8, seed=1)
    t = torch.tensor([0.2, 0.7], dtype=torch.float64)
    value, j = jacobian(model, x, t)
    torch.testing.assert_close(value, model(x, t), rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    value = model(leaf, t)
    jv, jtv = jvp_and_vjp(value, leaf, v)
    torch.testing.assert_close(jv.flatten(1), (j @ v.flatten(1)[:, :, None])[:, :, 0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(jtv.flatten(1), (v.flatten(1)[:, None, :] @ j)[:, 0, :], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(vjp(value, leaf, v), jtv, rtol=1e-12, atol=1e-12)
    # Two witnesses: dual numbers, and a central difference, whose error is of order h².
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(x, v), t)).tangent
    torch.testing.assert_close(jv, tangent, rtol=1e-9, atol=1e-9)
    h = 1e-5
    with torch.no_grad():
        difference = (model(x + h * v, t) - model(x - h * v, t)) / (2 * h)
    torch.testing.assert_close(jv, difference, rtol=1e-6, atol=1e-6 * jv.abs().max().item())


@pytest.mark.parametrize("settings", [dict(probes=2), dict(estimator="exact")])
def test_a_field_that_does_not_depend_on_its_point(settings):
    bias = random(4).requires_grad_()
    result = asymmetry(lambda x, t: bias.expand(3, 4), random(3, 4), HALF.expand(3), create_graph=True, **settings)
    assert torch.equal(result.asym, torch.zeros(3).double())
    assert torch.equal(result.jacobian_norm_squared, torch.zeros(3).double())
    assert result.score.requires_grad


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace", "exact"])
def test_a_conservative_network_has_no_asymmetry(estimator, small_unet):
    # At rounding level: NAsym is of the order of (1e-16)², the trace form's of 1e-16.
    model = ConservativeScore(small_unet(), NoiseLevel(SDES["ve"]))
    x, t = random(2, 1, 8, 8), torch.tensor([0.2, 0.7], dtype=torch.float64)
    result = asymmetry(model, x, t, probes=2, estimator=estimator, generator=torch.Generator().manual_seed(0))
    assert result.jacobian_norm_squared.min() > 1e-3
    assert result.nasym.abs().max() < 1e-12
    # The same network, unconstrained, has much of it.
    assert asymmetry(unconstrained(model.network), x, t).nasym.min() > 1e-3


# ------------------------------------------------------------------------------------------- gradients of the QC loss


@pytest.mark.parametrize("name", ["mlp", "unet"])
@pytest.mark.parametrize("estimator", ["antisymmetric", "trace"])
def test_gradient_of_the_qc_loss_is_unbiased(name, estimator, networks, every_sign):
    build, shape = networks[name]
    model = unconstrained(build())
    dimension = math.prod(shape)
    x, t = random(1, *shape), HALF
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient(loss: Tensor) -> list[Tensor]:
        return torch.autograd.grad(loss, parameters, materialize_grads=True)

    exact_loss = asymmetry(model, x, t, estimator="exact", create_graph=True).asym.mean()
    exact = gradient(exact_loss)
    copies = 2**dimension
    estimates = asymmetry(
        model, x.expand(copies, *shape), t.expand(copies), probes=1, estimator=estimator, create_graph=True
    )
    estimated = gradient(estimates.asym.mean())
    torch.testing.assert_close(estimates.asym.mean(), exact_loss, rtol=1e-10, atol=0)
    scale = max(g.abs().max() for g in exact)
    assert scale > 1e-3
    for ours, truth in zip(estimated, exact, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8 * scale.item())
    # The comparison means something: the loss reaches nearly every weight, in the U-Net those of the attention too.
    reached = {id(p) for p, g in zip(parameters, exact, strict=True) if g.abs().max() > 1e-6 * scale}
    assert len(reached) > 0.8 * len(parameters)
    if name == "unet":
        attention = model.network.encoder[0].attention
        assert {id(attention.query.weight), id(attention.key.weight), id(attention.value.weight)} <= reached


def test_gradient_of_the_exact_loss_against_a_finite_difference():
    model = unconstrained(MLP())
    x, t = random(2, 1, 2, 3), torch.tensor([0.3, 0.6], dtype=torch.float64)
    weight = model.network.layers[0].weight
    (gradient,) = torch.autograd.grad(asymmetry(model, x, t, create_graph=True).asym.sum(), weight)
    direction, h = torch.randn_like(weight), 1e-5
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * h * direction
        values.append(asymmetry(model, x, t).asym.sum())
        with torch.no_grad():
            weight -= sign * h * direction
    torch.testing.assert_close((values[0] - values[1]) / (2 * h), (gradient * direction).sum(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("estimator", ["antisymmetric", "trace", "exact"])
def test_gradient_of_a_conservative_models_qc_loss_vanishes(estimator):
    model = ConservativeScore(MLP(), NoiseLevel(SDES["ve"]))
    x, t = random(2, 1, 2, 3), torch.tensor([0.3, 0.6], dtype=torch.float64)
    result = asymmetry(
        model, x, t, probes=1, estimator=estimator, generator=torch.Generator().manual_seed(0), create_graph=True
    )
    gradients = torch.autograd.grad(result.asym.sum(), list(model.parameters()), materialize_grads=True)
    scale = result.jacobian_norm_squared.sum()
    assert max(g.abs().max() for g in gradients) < 1e-12 * scale


# -------------------------------------------------------------------------------------------------------------- errors


def test_settings_that_make_no_sense():
    x, t = random(2, 4), HALF.expand(2)
    score = linear(random(4, 4))
    with pytest.raises(ValueError, match="estimator='hutchinson': allowed are antisymmetric, trace, exact"):
        asymmetry(score, x, t, estimator="hutchinson")
    with pytest.raises(ValueError, match="probes=0: at least 1"):
        asymmetry(score, x, t, probes=0)
    with pytest.raises(ValueError, match=r"probes=None in 257 dimensions: .* 256"):
        asymmetry(score, random(1, 257), HALF)


def test_exact_by_default_up_to_256_dimensions():
    result = asymmetry(lambda x, t: 2 * x, random(1, 256), HALF)
    torch.testing.assert_close(result.jacobian_norm_squared, torch.tensor([4.0 * 256], dtype=torch.float64))
    exact = asymmetry(lambda x, t: 2 * x, random(1, 257), HALF, estimator="exact", probes=5)
    torch.testing.assert_close(exact.jacobian_norm_squared, torch.tensor([4.0 * 257], dtype=torch.float64))
