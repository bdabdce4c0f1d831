"""The Helmholtz–Hodge decomposition against fields whose parts are known, and against a least-squares solver."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from conservativeness import HelmholtzHodge, helmholtz_hodge

PI = math.pi


def grid(height: int, width: int, spacing: float) -> tuple[Tensor, Tensor]:
    axes = (spacing * torch.arange(n, dtype=torch.float64) for n in (height, width))
    x, y = torch.meshgrid(*axes, indexing="ij")
    return x, y


def trapezoidal(height: int, width: int) -> Tensor:
    weights = torch.ones(height, width, dtype=torch.float64)
    weights[[0, -1]] *= 0.5
    weights[:, [0, -1]] *= 0.5
    return weights[:, :, None]


def inner(a: Tensor, b: Tensor) -> float:
    return (trapezoidal(*a.shape[:2]) * a * b).sum().item()


def random_field(height: int = 13, width: int = 8) -> Tensor:
    return torch.randn(height, width, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def smooth_gradient(x: Tensor, y: Tensor) -> Tensor:
    """∇(eˣ cos 2y)."""
    return torch.stack([x.exp() * (2 * y).cos(), -2 * x.exp() * (2 * y).sin()], dim=-1)


def smooth_rotation(x: Tensor, y: Tensor) -> Tensor:
    """(∂ψ/∂y, −∂ψ/∂x) with ψ = eˣ sin πx sin πy: free of divergence, tangential at the border of the unit square."""
    along_x = PI * x.exp() * (PI * x).sin() * (PI * y).cos()
    along_y = -x.exp() * ((PI * x).sin() + PI * (PI * x).cos()) * (PI * y).sin()
    return torch.stack([along_x, along_y], dim=-1)


@pytest.mark.parametrize(("height", "width"), [(20, 20), (3, 3), (5, 12), (40, 7)])
def test_gradient_of_a_quadratic_has_no_rotational_part(height, width):
    spacing = 0.3
    x, y = grid(height, width, spacing)
    potential = 0.7 - 2 * x + y + 1.5 * x**2 - 3 * x * y + 0.4 * y**2
    field = torch.stack([-2 + 3 * x - 3 * y, 1 - 3 * x + 0.8 * y], dim=-1)
    parts = helmholtz_hodge(field, spacing)
    assert parts.rotational.abs().max() < 1e-10
    # The potential is found as well, up to its (trapezoidal) mean.
    weights = trapezoidal(height, width)[:, :, 0]
    torch.testing.assert_close(
        parts.potential, potential - (weights * potential).sum() / weights.sum(), rtol=0, atol=1e-10
    )


def test_parts_are_orthogonal_and_add_up():
    field = random_field()
    parts = helmholtz_hodge(field, 0.1)
    torch.testing.assert_close(parts.gradient + parts.rotational, field, rtol=0, atol=1e-14)
    assert abs(inner(parts.gradient, parts.rotational)) < 1e-12 * inner(field, field)
    # Both are there, so that neither statement is empty.
    assert min(inner(parts.gradient, parts.gradient), inner(parts.rotational, parts.rotational)) > 0.1


def test_another_decomposition_changes_nothing():
    parts = helmholtz_hodge(random_field(), 0.1)
    of_gradient, of_rotational = helmholtz_hodge(parts.gradient, 0.1), helmholtz_hodge(parts.rotational, 0.1)
    assert of_gradient.rotational.abs().max() < 1e-12
    assert of_rotational.gradient.abs().max() < 1e-12


def test_it_is_the_least_squares_fit():
    """The gradient is that of numpy, and no other potential comes closer: a dense solver finds the same one."""
    height, width, spacing = 6, 9, 0.25
    field = random_field(height, width)
    parts = helmholtz_hodge(field, spacing)
    of_potential = np.gradient(parts.potential.numpy(), spacing, edge_order=2)
    np.testing.assert_allclose(parts.gradient.numpy(), np.stack(of_potential, axis=-1), rtol=0, atol=1e-12)

    columns = [
        np.stack(np.gradient(unit.reshape(height, width), spacing, edge_order=2), axis=-1).ravel()
        for unit in np.eye(height * width)
    ]
    design = np.stack(columns, axis=1)
    root = np.sqrt(trapezoidal(height, width).expand(-1, -1, 2).numpy().ravel())
    solution, _, rank, _ = np.linalg.lstsq(root[:, None] * design, root * field.numpy().ravel(), rcond=None)
    assert rank == height * width - 1  # the constants, and no checkerboard
    np.testing.assert_allclose(parts.gradient.numpy().ravel(), design @ solution, rtol=0, atol=1e-10)


def orders(error) -> list[float]:
    """Observed orders of convergence from h = 1/16 to 1/128."""
    errors = [error(n + 1, 1 / n) for n in (16, 32, 64, 128)]
    return [math.log2(coarse / fine) for coarse, fine in itertools.pairwise(errors)]


def rms(field: Tensor) -> float:
    return (field**2).mean().sqrt().item()


def on_unit_square(points: int, spacing: float, *fields) -> tuple[HelmholtzHodge, list[Tensor]]:
    x, y = grid(points, points, spacing)
    values = [field(x, y) for field in fields]
    return helmholtz_hodge(sum(values), spacing), values


def test_solenoidal_field_loses_its_gradient_part_at_second_order():
    def error(points: int, spacing: float) -> float:
        parts, _ = on_unit_square(points, spacing, smooth_rotation)
        return rms(parts.gradient)

    assert error(129, 1 / 128) < 1e-3
    assert all(1.9 < order < 2.2 for order in orders(error))


@pytest.mark.parametrize("norm", [rms, lambda field: field.abs().max().item()], ids=["rms", "maximum"])
def test_both_parts_of_a_mixed_field_are_found_at_second_order(norm):
    def error(points: int, spacing: float, part: int) -> float:
        parts, exact = on_unit_square(points, spacing, smooth_gradient, smooth_rotation)
        return norm(parts[1 + part] - exact[part])

    for part in (0, 1):
        assert error(129, 1 / 128, part) < 2e-3
        assert all(1.7 < order < 2.2 for order in orders(lambda n, h, part=part: error(n, h, part)))


def test_units_and_axes():
    """φ has the field's units times length; transposing the plane transposes the parts."""
    field = random_field()
    parts, stretched = helmholtz_hodge(field, 0.1), helmholtz_hodge(field, 0.3)
    torch.testing.assert_close(stretched.potential, 3 * parts.potential)
    torch.testing.assert_close(stretched.rotational, parts.rotational)
    transposed = helmholtz_hodge(field.transpose(0, 1).flip(-1), 0.1)
    torch.testing.assert_close(transposed.gradient.transpose(0, 1).flip(-1), parts.gradient)


def test_single_precision_and_graphs_are_left_behind():
    field = random_field().float().requires_grad_()
    parts = helmholtz_hodge(field, 0.1)
    assert all(part.dtype == torch.float64 and not part.requires_grad for part in parts)


@pytest.mark.parametrize(
    ("field", "spacing", "message"),
    [
        (torch.zeros(5, 5), 0.1, "field of shape (5, 5): need (H, W, 2)"),
        (torch.zeros(5, 5, 3), 0.1, "field of shape (5, 5, 3): need (H, W, 2)"),
        (torch.zeros(4, 2, 2), 0.1, "field of shape (4, 2, 2): need (H, W, 2) with H and W at least 3"),
        (torch.zeros(5, 5, 2), 0.0, "spacing=0.0: allowed are positive numbers"),
        (torch.zeros(5, 5, 2), -0.1, "spacing=-0.1"),
        (torch.zeros(5, 5, 2), math.nan, "spacing=nan"),
        (torch.zeros(5, 5, 2), math.inf, "spacing=inf"),
        (torch.full((5, 5, 2), math.nan), 0.1, "field has values that are not finite"),
    ],
)
def test_bad_input_is_refused(field, spacing, message):
    with pytest.raises(ValueError) as error:
        helmholtz_hodge(field, spacing)
    assert message in str(error.value)
