"""Data of every shape and unit: Gaussian random fields, of which score, likelihood and spectrum are known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import SMALL_UNET

from conservativeness import asymmetry
from data import ArraySplit, DataFormat
from evaluation import compare_distributions
from exact.distributions import Gaussian
from likelihood import LikelihoodEvaluator, bits_per_dim
from losses import Objective
from models import make_network, make_score_model
from models.layers import resampling
from sampling import make_sampler
from sde_lib import make_sde

SHAPES = [(3,), (2, 8), (1, 4, 6), (2, 4, 2, 2)]
SLOW = [(3,), *(pytest.param(shape, marks=pytest.mark.slow) for shape in SHAPES[1:3]), SHAPES[3]]
OPTIONS = SMALL_UNET | dict(num_res_blocks=1, attn_resolutions=(4,), num_scales=10, beta_min=0.1, beta_max=40.0)
OPTIONS |= dict(sigma_min=0.01, sigma_max=8.0, fourier_scale=1.0)
SDE, VP = (make_sde(name, "", OPTIONS) for name in ("vesde", "vpsde"))  # the latter ends at its prior


def random_field(shape: tuple[int, ...], count: int, seed: int = 0) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
    """Draws (count, ...), mean and covariance of correlated channels in units of their own, far from 0 and 1."""
    random, dimension = np.random.default_rng(seed), math.prod(shape)
    root = 0.3 * random.standard_normal((dimension, dimension)) / dimension**0.5 + np.eye(dimension)
    unit = 10.0 ** random.uniform(-3, 3, shape[0]).repeat(dimension // shape[0])
    root, mean = unit[:, None] * root, unit * (10 + random.standard_normal(dimension))
    draws = mean + random.standard_normal((count, dimension)) @ root.T
    return draws.reshape(count, *shape), torch.from_numpy(mean), torch.from_numpy(root @ root.T)


def seen_by_the_model(data: DataFormat, mean: torch.Tensor, covariance: torch.Tensor) -> Gaussian:
    """The law of model values, as ``Gaussian.score`` knows it."""
    each = data.dimension // data.shape[0]
    offset, unit = (torch.tensor(v).double().repeat_interleave(each) for v in (data.offset, data.scale))
    return Gaussian(VP, (mean - offset) / unit, covariance / unit / unit[:, None])


def score_of(law: Gaussian):
    return lambda x, t: law.score(x.flatten(1), t).view_as(x)


def network(shape: tuple[int, ...], **options: object) -> torch.nn.Module:
    name = "vector_mlp" if len(shape) == 1 else "ncsnpp"
    torch.manual_seed(0)
    return make_network(name, OPTIONS | options, shape=shape, centered=True)


@pytest.mark.parametrize("shape", SLOW)
def test_the_likelihood_is_that_of_the_data_in_their_own_units(shape):
    """To 1e-3 nats/dim with the exact score, whatever the normalisation; in other units by the log-Jacobian another."""
    draws, mean, covariance = random_field(shape, 200)
    law = torch.distributions.MultivariateNormal(mean, covariance)
    x = torch.from_numpy(draws[:4])
    truth = -law.log_prob(x.flatten(1)) / math.prod(shape)
    evaluator = LikelihoodEvaluator(VP, divergence="exact", time="log_ratio", solver="adams", num_steps=160)
    found = {}
    for normalization in ("standard", "range"):
        data = DataFormat.of(ArraySplit("field", draws), centered=False, dequantized=False, normalization=normalization)
        score = score_of(seen_by_the_model(data, mean, covariance))
        log_prob = evaluator(score, data.to_model(x).double()).log_prob
        found[normalization] = math.log(2) * bits_per_dim(log_prob, data.dimension, data.log2_unit)
        torch.testing.assert_close(found[normalization], truth, rtol=0, atol=1e-3)
    factors = np.array([0.1, 37.0, 4.0])[: shape[0]].reshape(-1, *[1] * (len(shape) - 1))
    other = DataFormat.of(ArraySplit("rescaled", draws * factors), centered=False, dequantized=False)
    same = DataFormat.of(ArraySplit("field", draws), centered=False, dequantized=False)
    torch.testing.assert_close(other.to_model(x * torch.from_numpy(factors)), same.to_model(x), rtol=1e-5, atol=1e-5)
    jacobian = np.log2(factors).mean()
    assert other.log2_unit == pytest.approx(same.log2_unit - jacobian, abs=1e-12)


@pytest.mark.parametrize("shape", SLOW)
def test_samples_of_the_exact_score_have_the_moments_of_the_data(shape):
    """Mean, covariance and power spectrum within four standard errors, in the data's own units."""
    draws, mean, covariance = random_field(shape, 100)
    data = DataFormat.of(ArraySplit("field", draws), centered=False, dequantized=False)
    settings = dict(method="ode", solver="heun", num_steps=100, rtol=0.0, atol=0.0, noise_removal=False)
    settings |= dict(predictor="none", corrector="none", n_steps_each=1, snr=0.1)
    sampler = make_sampler(VP, settings, num_scales=10, continuous=True)
    count = 2000
    law = seen_by_the_model(data, mean, covariance)
    drawn = sampler(score_of(law), torch.zeros(count, *shape, dtype=torch.float64), torch.Generator().manual_seed(0)).x
    x = data.to_data(drawn)
    assert x.dtype == torch.float64 and tuple(x.shape) == (count, *shape)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (x.flatten(1) - mean).T, upper=False).T
    errors = z.mean(0) * count**0.5
    second = (z.T @ z / count - torch.eye(z.shape[1])) * (count / (1 + torch.eye(z.shape[1]))) ** 0.5
    assert errors.abs().max() < 4 and second.abs().max() < 4.5
    if len(shape) > 1:
        axes = tuple(range(2, len(shape) + 1))
        power = np.abs(np.fft.fftn((x - mean.view(shape)).numpy(), axes=axes)) ** 2
        root = torch.linalg.cholesky(covariance).numpy().T.reshape(-1, *shape)
        truth = (np.abs(np.fft.fftn(root, axes=axes)) ** 2).sum(0)
        assert (np.abs(power.mean(0) - truth) < 4.5 * power.std(0) / count**0.5).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parameterization", ["unconstrained", pytest.param("conservative", marks=pytest.mark.slow)])
def test_u_c_and_qc_train_and_asym_is_estimated_without_bias(shape, parameterization):
    """In every shape: the loss of QC falls, and the mean of 100 estimates is Asym within four standard errors."""
    model = make_score_model(SDE, network(shape), parameterization=parameterization)
    x0 = torch.randn(8, *shape)
    objective = Objective(model, qc_weight=0.1)
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(5):
        terms = objective(x0, torch.Generator().manual_seed(0))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
        losses.append(float(terms["loss"].detach()))
    assert np.isfinite(losses).all() and losses[-1] < 0.99 * losses[0]
    x, t = torch.randn(1, *shape), torch.full((1,), 0.7)
    exact = asymmetry(model, x, t)
    many = x.expand(100, *shape), t.expand(100)
    estimates = asymmetry(model, *many, probes=1, generator=torch.Generator().manual_seed(1)).asym.double()
    error = float(estimates.std() / len(estimates) ** 0.5)
    assert abs(float(estimates.mean()) - float(exact.asym)) < 4 * error + 1e-6 * float(exact.jacobian_norm_squared)
    assert (float(exact.nasym) < 1e-8) == (parameterization == "conservative")


@pytest.mark.parametrize(("up", "taps"), list(itertools.product([False, True], [None, (1, 3, 3, 1), (1, 2, 1)])))
def test_resampling_along_several_axes_is_that_along_each(up, taps):
    """Of a product of functions of one coordinate: the product of what it makes of each."""
    a, b, c = (torch.randn(1, 1, n, dtype=torch.float64) for n in (8, 6, 4))
    one, two, three = (resampling(1, 1, up=up, with_conv=False, taps=taps, dims=dims) for dims in (1, 2, 3))
    torch.testing.assert_close(two(a[..., None] * b[:, :, None]), one(a)[..., None] * one(b)[:, :, None])
    whole = a[..., None, None] * b[:, :, None, :, None] * c[:, :, None, None]
    apart = one(a)[..., None, None] * one(b)[:, :, None, :, None] * one(c)[:, :, None, None]
    torch.testing.assert_close(three(whole), apart)


@pytest.mark.parametrize(
    ("size", "pyramids"),
    [((8,), ("output_skip", "input_skip")), ((4, 6), ("none", "residual")), ((4, 2, 2), ("residual", "none"))],
)
def test_own_second_derivatives_are_those_of_torch_in_one_to_three_dimensions(size, pyramids):
    options = dict(zip(("progressive", "progressive_input"), pyramids, strict=True))
    model = make_score_model(
        SDE, network((2, *size), dropout=0.1, **options), parameterization="unconstrained"
    ).double()
    objective, gradients = Objective(model, qc_weight=0.1), []
    for own in (True, False):
        model.network.own_derivatives = own
        model.zero_grad()
        x0 = torch.randn(3, 2, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        objective(x0, torch.Generator().manual_seed(1))["loss"].backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9 * float(gradients[1].abs().max()))


def test_networks_name_shapes_that_they_are_not_for():
    for name, size, message in [
        ("ncsnpp", (), r"data.shape=\(2,\): .* 'vector_mlp' is for vectors"),
        ("ncsnpp", (2, 2, 2, 2), r"data.shape=\(2, 2, 2, 2, 2\): .* one to three axes"),
        ("ncsnpp", (8, 5), r"data.image_size=\(8, 5\) with 2 levels .* must be divisible by 2"),
        ("ncsnv2", (8, 4), r"data.shape=\(2, 8, 4\): NCSN and NCSNv2 are for square images"),
        ("vector_mlp", (8,), r"data.shape=\(D,\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_network(name, OPTIONS, shape=(2, *size), centered=True)


def test_normalisation_of_data_without_variation_is_refused():
    values = np.stack([np.random.default_rng(0).standard_normal((9, 4)), np.full((9, 4), 0.1)], axis=1)
    for normalization in ("standard", "range"):
        with pytest.raises(ValueError, match=r"channel 1 of x is 0\.1 everywhere"):
            DataFormat.of(ArraySplit("x", values), centered=True, dequantized=False, normalization=normalization)
    with pytest.raises(ValueError, match=r"data.uniform_dequantization=True: x has floating-point numbers"):
        DataFormat.of(ArraySplit("x", values), centered=True, dequantized=True)
    plain = DataFormat.of(ArraySplit("x", values), centered=True, dequantized=False, normalization="none")
    assert torch.equal(plain.to_model(torch.from_numpy(values)).double(), torch.from_numpy(values).float().double())


@pytest.mark.parametrize("shape", [(3,), (2, 8), (1, 4, 4)])
def test_distributions_are_compared_with_their_errors(shape):
    """Of two sets from one law, and from one of twice the width, whose W₁, W₂ and power are known."""
    random = np.random.default_rng(1)
    first, second, wide = (k * random.standard_normal((400, *shape)) for k in (1, 1, 2))
    same, curves = compare_distributions(first, second, seed=0)
    other, _ = compare_distributions(first, wide, seed=0)
    # A slice of N(0, 4 I) is N(0, 4), at W₂ = 1 from N(0, 1); W₁ is E|z|, and power is four times as large.
    assert abs(other["sliced_w2"] - 1) < 4 * other["sliced_w2_se"] + 0.02
    assert abs(other["marginal_w1"] - (2 / math.pi) ** 0.5) < 4 * other["marginal_w1_se"] + 0.01
    assert same["sliced_w2"] < 0.2 and same["marginal_w1"] < 0.2
    np.testing.assert_allclose(curves["histogram_real"].sum(-1), 1)
    if len(shape) > 1:
        assert abs(other["spectrum_error"] - 3) < 0.5 and same["spectrum_error"] < 0.2
        power, error = curves["spectrum_real"], curves["spectrum_real_se"]
        assert (np.abs(power - 1) < 4 * error).all()  # white noise of variance 1
    else:
        assert "spectrum_error" not in same
