"""Linear operators against their own matrices, and the Radon transform against what it is defined by."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from guidance.measurements import BlockMean, ChannelMean, LinearOperator, Mask, MatrixOperator, radon_transform


def known_pixels() -> Tensor:
    known = torch.ones(2, 4, 4, dtype=torch.bool)
    known[:, 1:3, 0:3] = False
    known[1, 0, 3] = False
    return known


def random_matrix(rows: int, columns: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return left @ right.T


OPERATORS = {
    "mask": (lambda: Mask(known_pixels()), (2, 4, 4)),
    "channel mean": (lambda: ChannelMean((3, 4, 5)), (3, 4, 5)),
    "block mean": (lambda: BlockMean((2, 6, 9), 3), (2, 6, 9)),
    "wide matrix": (lambda: MatrixOperator(random_matrix(5, 12, 4), (12,)), (12,)),
    "tall matrix": (lambda: MatrixOperator(random_matrix(12, 5, 3), (5,)), (5,)),
    "matrix per channel": (lambda: MatrixOperator(random_matrix(5, 12, 5), (2, 3, 4)), (2, 3, 4)),
    "radon, 8x8, 3 views": (lambda: radon_transform((1, 8, 8), 3), (1, 8, 8)),
    "radon, 8x8, 23 views": (lambda: radon_transform((1, 8, 8), 23), (1, 8, 8)),
    "radon, colour": (lambda: radon_transform((3, 5, 5), 2), (3, 5, 5)),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def build(name: str) -> tuple[LinearOperator, tuple[int, ...], Tensor]:
    """An operator, the shape of what it measures, and its matrix (m, D), float64."""
    make, shape = OPERATORS[name]
    operator = make()
    identity = torch.eye(math.prod(shape), dtype=torch.float64).view(-1, *shape)
    return operator, shape, operator(identity).T


@every_operator
def test_singular_value_decomposition(name):
    operator, _, matrix = build(name)
    values = torch.linalg.svdvals(matrix)
    rank = int((values > 1e-4 * values[0]).sum())
    torch.testing.assert_close(operator.singular_values.double().sort(descending=True).values, values[:rank])
    # V has orthonormal columns, U S Vᵀ is the matrix, and lift is V.
    identity = torch.eye(len(operator.singular_values), dtype=torch.float64)
    lifted = operator.lift(identity)
    torch.testing.assert_close(operator.coordinates(lifted), identity, rtol=0, atol=1e-6)
    torch.testing.assert_close(lifted.flatten(1) @ lifted.flatten(1).T, identity, rtol=0, atol=1e-6)
    u = operator.spectrum_adjoint(identity)
    torch.testing.assert_close(operator.spectrum(u), identity, rtol=0, atol=1e-6)
    rebuilt = (u.T * operator.singular_values.double()) @ lifted.flatten(1)
    torch.testing.assert_close(rebuilt, matrix, rtol=0, atol=1e-4 * values[0].item())


@every_operator
def test_pseudo_inverse(name):
    operator, _, matrix = build(name)
    y = torch.randn(3, len(matrix), dtype=torch.float64)
    expected = y @ torch.linalg.pinv(matrix, rtol=1e-4).T
    torch.testing.assert_close(operator.pseudo_inverse(y).flatten(1), expected, rtol=1e-6, atol=1e-6)


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adjoint(name, dtype):
    """⟨Ax, y⟩ = ⟨x, Aᵀy⟩ to 1e-6 of ‖Ax‖‖y‖, in the type of the images."""
    operator, shape, _ = build(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, *shape, generator=generator, dtype=dtype)
    measured = operator(x)
    y = torch.randn(measured.shape, generator=generator, dtype=dtype)
    back = operator.adjoint(y)
    assert measured.dtype == back.dtype == dtype and back.shape == x.shape
    inner = (measured.double() * y.double()).sum(1), (x.double() * back.double()).flatten(1).sum(1)
    scale = measured.double().norm(dim=1) * y.double().norm(dim=1)
    assert ((inner[0] - inner[1]).abs() < 1e-6 * scale).all()


@pytest.mark.parametrize("size", [8, 28, 32])
def test_radon_transform_of_23_views(size):
    operator = radon_transform((1, size, size), 23)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2, 1, size, size, generator=generator, dtype=torch.float64)
    sinogram = operator(x).view(2, 23, -1)
    # Every view sums to the sum of the image; the first one sums its columns.
    torch.testing.assert_close(sinogram.sum(2), x.sum((1, 2, 3))[:, None].expand(2, 23), rtol=1e-12, atol=0)
    margin = (sinogram.shape[2] - size) / 2
    assert sinogram.shape[2] == math.ceil(math.sqrt(2) * size)
    if margin == int(margin):
        torch.testing.assert_close(sinogram[:, 0, int(margin) : int(margin) + size], x.sum(2)[:, 0])
    y = torch.rand(2, operator.matrix.shape[0], generator=generator, dtype=torch.float64)
    inner = (sinogram.flatten(1) * y).sum(1), (x * operator.adjoint(y)).sum((1, 2, 3))
    torch.testing.assert_close(*inner, rtol=1e-12, atol=0)


def test_radon_transform_is_the_integral_over_strips():
    """Against pixels cut into 60×60 points, each counted in the bin it falls into."""
    size, views, parts = 6, 7, 60
    x = torch.rand(1, 1, size, size, dtype=torch.float64)
    fine = (torch.arange(size * parts, dtype=torch.float64) + 0.5) / parts - size / 2
    down, right = (axis.flatten() for axis in torch.meshgrid(fine, fine, indexing="ij"))
    weights = x[0, 0].repeat_interleave(parts, 0).repeat_interleave(parts, 1).flatten() / parts**2
    bins = math.ceil(math.sqrt(2) * size)
    sinogram = radon_transform((1, size, size), views)(x).view(views, bins)
    for view in range(views):
        angle = math.pi * view / views
        # Rows count downwards, angles upwards.
        position = right * math.cos(angle) - down * math.sin(angle) + bins / 2
        counted = torch.zeros(bins, dtype=torch.float64).index_add_(0, position.floor().long(), weights)
        torch.testing.assert_close(sinogram[view], counted, rtol=0, atol=2 / parts)


def test_radon_transform_of_a_disc():
    """The chord 2√(r² − s²), off the edge of the disc, to a fraction of a pixel, at all angles."""
    size, radius, offset = 64, 20.0, (7.0, -4.0)
    axis = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    disc = ((axis[None, :] - offset[0]) ** 2 + (-axis[:, None] - offset[1]) ** 2 < radius**2).double()
    views = 23
    sinogram = radon_transform((1, size, size), views)(disc[None, None]).view(views, -1)
    bins = sinogram.shape[1]
    centres = torch.arange(bins) - (bins - 1) / 2
    for view in range(views):
        angle = math.pi * view / views
        s = centres - (offset[0] * math.cos(angle) + offset[1] * math.sin(angle))
        inside = s.abs() < radius - 3
        torch.testing.assert_close(
            sinogram[view, inside], 2 * (radius**2 - s[inside].double() ** 2).sqrt(), rtol=0, atol=1.7
        )
        assert (sinogram[view, s.abs() > radius + 2] == 0).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Mask(torch.zeros(1, 4, 4, dtype=torch.bool)), "0 pixels known"),
        (lambda: Mask(torch.ones(1, 4, 4)), r"torch\.float32"),
        (lambda: ChannelMean((1, 4, 4)), "at least 2 channels"),
        (lambda: BlockMean((1, 8, 8), 3), r"factor=3: need a divisor, at least 2, of the images' 8x8 pixels"),
        (lambda: BlockMean((1, 8, 8), 1), "factor=1"),
        (lambda: MatrixOperator(torch.ones(2, 3), (4,)), r"matrix of shape \(2, 3\) on x of shape \(4,\)"),
        (lambda: MatrixOperator(torch.zeros(2, 3), (3,)), "the largest in"),
        (lambda: MatrixOperator(torch.full((2, 3), torch.inf), (3,)), "finite"),
    ],
)
def test_bad_operators(make, message):
    with pytest.raises(ValueError, match=message):
        make()
