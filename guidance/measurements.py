"""Linear measurements of images, y = A x + n with n ~ N(0, σ_y² I), by their singular value decomposition.

With A = U S Vᵀ, U (m, r) and V (D, r) of orthonormal columns, r the rank, the measured part of an image is its
coordinates Vᵀx. Coordinate i is known from y as (Uᵀy)_i/s_i, up to noise of standard deviation σ_y/s_i. All
conditioning on a measurement is written in these coordinates (``conditions``).

Colourisation in the decoupled basis: Song et al., "Score-Based Generative Modeling through Stochastic Differential
Equations" (ICLR 2021), Appendix I.3.
"""

from __future__ import annotations

import abc
import math
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from experiment.files import read_array
from experiment.registry import resolve

_RANK_TOLERANCE = 1e-4
"""Singular values below this part of the largest count as zero: float32 states know no more of them."""


class LinearOperator(abc.ABC):
    """A: images x (B, ...) → measurements y (B, m)."""

    singular_values: Tensor
    """s (r,), positive."""

    @abc.abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """A x (B, m)."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Aᵀ y, (B, m) → (B, ...)."""

    # Where the rows of A are orthogonal and of one length, U is the identity.

    def spectrum(self, y: Tensor) -> Tensor:
        """Uᵀ y, (B, m) → (B, r)."""
        return y

    def spectrum_adjoint(self, c: Tensor) -> Tensor:
        """U c, (B, r) → (B, m)."""
        return c

    def coordinates(self, x: Tensor) -> Tensor:
        """Vᵀ x = S⁻¹ Uᵀ A x, (B, ...) → (B, r)."""
        return self.spectrum(self(x)) / self.singular_values.to(x)

    def lift(self, c: Tensor) -> Tensor:
        """V c = Aᵀ U S⁻¹ c, (B, r) → (B, ...)."""
        return self.adjoint(self.spectrum_adjoint(c / self.singular_values.to(c)))

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """The shortest image that fits y best, V S⁻¹ Uᵀ y, (B, m) → (B, ...)."""
        return self.lift(self.spectrum(y) / self.singular_values.to(y))


class Mask(LinearOperator):
    """The pixels where ``known``, of the images' shape without the batch, is true; the adjoint puts zeros elsewhere."""

    def __init__(self, known: Tensor, device: torch.device | str = "cpu") -> None:
        if known.dtype != torch.bool or not known.any():
            raise ValueError(
                f"mask of type {known.dtype}, {int(known.sum())} pixels known: need booleans, one of them true"
            )
        self.shape, self.pixels = known.shape, known.flatten().nonzero()[:, 0].to(device)
        self.singular_values = torch.ones(len(self.pixels), device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, self.pixels]

    def adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(len(y), math.prod(self.shape))
        return x.index_copy(1, self.pixels, y).unflatten(1, self.shape)


class ChannelMean(LinearOperator):
    """The mean over the channels of images (C, H, W), C ≥ 2."""

    def __init__(self, image_shape: tuple[int, int, int], device: torch.device | str = "cpu") -> None:
        self.channels, height, width = image_shape
        self.grey_shape = (1, height, width)
        if self.channels < 2:
            raise ValueError(f"mean over channels of images of shape {tuple(image_shape)}: need at least 2 channels")
        self.singular_values = torch.full((height * width,), self.channels**-0.5, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return x.mean(1).flatten(1)

    def adjoint(self, y: Tensor) -> Tensor:
        grey = y.reshape(len(y), *self.grey_shape) / self.channels
        return grey.expand(-1, self.channels, -1, -1).contiguous()


class BlockMean(LinearOperator):
    """Means over blocks of f×f pixels of images (C, H, W), f ≥ 2 a divisor of H and W."""

    def __init__(self, image_shape: tuple[int, int, int], factor: int, device: torch.device | str = "cpu") -> None:
        channels, height, width = image_shape
        if factor < 2 or height % factor or width % factor:
            raise ValueError(f"factor={factor}: need a divisor, at least 2, of the images' {height}x{width} pixels")
        self.factor = factor
        self.small_shape = (channels, height // factor, width // factor)
        self.singular_values = torch.full((math.prod(self.small_shape),), 1 / factor, device=device)

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(x, self.factor).flatten(1)

    def adjoint(self, y: Tensor) -> Tensor:
        small = y.reshape(len(y), *self.small_shape) / self.factor**2
        return small.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)


class MatrixOperator(LinearOperator):
    """Any matrix (m, D), dense or sparse, float64; it is applied in double precision whatever the type of the images.

    Args:
        matrix: on the device where it is to be applied.
        shape: of x without the batch, of D numbers, or of n·D: the matrix then acts on each of n channels.

    Raises:
        ValueError: shapes that do not fit, or a matrix that is zero or not finite.
    """

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        if matrix.ndim != 2 or not matrix.numel() or not shape or math.prod(shape) % matrix.shape[1]:
            raise ValueError(f"matrix of shape {tuple(matrix.shape)} on x of shape {tuple(shape)}: need (m, D) and D")
        values = matrix.coalesce().values() if matrix.is_sparse else matrix
        if not 1e-100 < values.abs().max() < 1e100:  # the decomposition squares them
            raise ValueError(
                f"matrix of shape {tuple(matrix.shape)}: its numbers must be finite, the largest in 1e-100 … 1e100"
            )
        self.matrix = matrix.double()
        self.shape = tuple(shape)
        self.parts = math.prod(shape) // matrix.shape[1]

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(self.matrix, x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._apply(self.matrix.T, y).reshape(len(y), *self.shape)

    def spectrum(self, y: Tensor) -> Tensor:
        return self._apply(self._decomposition[0].T, y)

    def spectrum_adjoint(self, c: Tensor) -> Tensor:
        return self._apply(self._decomposition[0], c)

    @property
    def singular_values(self) -> Tensor:
        return self._decomposition[1].repeat(self.parts)

    def _apply(self, matrix: Tensor, x: Tensor) -> Tensor:
        """M x for every part of every row, (B, n·columns) → (B, n·rows)."""
        parts = x.reshape(len(x) * self.parts, matrix.shape[1]).to(matrix)
        return (matrix @ parts.T).T.reshape(len(x), -1).to(x)

    @cached_property
    def _decomposition(self) -> tuple[Tensor, Tensor]:
        """U (m, r) and s (r,), from the smaller of AAᵀ and AᵀA."""
        wide = self.matrix.shape[0] <= self.matrix.shape[1]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR")  # what torch makes the product of two sparse matrices in
            gram = self.matrix @ self.matrix.T if wide else self.matrix.T @ self.matrix
        squares, vectors = torch.linalg.eigh(gram.to_dense() if gram.is_sparse else gram)
        kept = squares > _RANK_TOLERANCE**2 * squares[-1]
        values, vectors = squares[kept].sqrt(), vectors[:, kept]
        return vectors if wide else self.matrix @ vectors / values, values


def radon_transform(
    image_shape: tuple[int, int, int], num_views: int, device: torch.device | str = "cpu"
) -> MatrixOperator:
    """Parallel-beam projections of every channel of images (C, H, W) at angles kπ/V, k = 0 … V − 1.

    The detector has ⌈√(H² + W²)⌉ bins as wide as a pixel, so that nothing is missed. A bin's value is the integral over
    the strip in front of it, exact for an image that is constant on pixels: at the angle θ the shadow of a pixel is the
    convolution of two boxes of widths |cos θ| and |sin θ|. Every view sums to the sum of the image.
    """
    _, height, width = image_shape
    bins = math.ceil(math.hypot(height, width))
    down, across = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (height, width))
    rows, columns, weights = [], [], []
    for view in range(num_views):
        angle = math.pi * view / num_views
        position = (across * math.cos(angle) - down[:, None] * math.sin(angle)).flatten() + bins / 2
        widths = abs(math.cos(angle)), abs(math.sin(angle))
        # A shadow is at most √2 wide: it falls on three bins.
        first = (position - sum(widths) / 2).floor()
        for offset in range(3):
            edge = first + offset
            weight = _shadow(edge + 1 - position, *widths) - _shadow(edge - position, *widths)
            hit = weight > 1e-12
            rows.append(view * bins + edge[hit].long())
            columns.append(hit.nonzero()[:, 0])
            weights.append(weight[hit])
    indices = torch.stack([torch.cat(rows), torch.cat(columns)])
    shape = (num_views * bins, height * width)
    matrix = torch.sparse_coo_tensor(indices, torch.cat(weights), shape, check_invariants=True).coalesce()
    return MatrixOperator(matrix.to(device), image_shape)


def _shadow(s: Tensor, a: float, b: float) -> Tensor:
    """The part of a pixel's shadow left of s: the distribution function of U(−a/2, a/2) + U(−b/2, b/2)."""
    if min(a, b) < 1e-9:
        return (s / max(a, b) + 0.5).clamp(0, 1)

    def ramp(shift: float) -> Tensor:
        return 0.5 * (s + shift).clamp(min=0) ** 2

    return (ramp((a + b) / 2) - ramp((a - b) / 2) - ramp((b - a) / 2) + ramp(-(a + b) / 2)) / (a * b)


# ---------------------------------------------------------------------------------------------------------------
# From the options of sampling, such as ``config.sampling``

_HALVES = {
    **{"top": (0, 0, 0.5, 1), "bottom": (0.5, 0, 1, 1), "left": (0, 0, 1, 0.5), "right": (0, 0.5, 1, 1)},
    **{"center": (0.25, 0.25, 0.75, 0.75)},
}
"""Unknown parts by name: top, left, bottom and right edge, as fractions of height and width."""


def known_pixels(mask: str, image_shape: tuple[int, int, int]) -> Tensor:
    """Booleans (C, H, W) from a description of what is unknown: left, right, top or bottom half; center, half as high
    and wide; a box 'top,left,height,width' in pixels; or the file of an image of this size, white where unknown."""
    _, height, width = image_shape
    known = torch.ones(height, width, dtype=torch.bool)
    parts = mask.split(",")
    if mask in _HALVES:
        sizes = (height, width, height, width)
        top, left, bottom, right = (round(part * size) for part, size in zip(_HALVES[mask], sizes, strict=True))
        known[top:bottom, left:right] = False
    elif len(parts) == 4 and all(part.strip().isdecimal() for part in parts):
        top, left, rows, columns = map(int, parts)
        if min(rows, columns) < 1 or top + rows > height or left + columns > width:
            raise ValueError(
                f"sampling.mask={mask!r}: the box top,left,height,width is not within the {height}x{width} image"
            )
        known[top : top + rows, left : left + columns] = False
    else:
        known = _read_mask(mask, height, width)
    if known.all() or not known.any():
        raise ValueError(f"sampling.mask={mask!r}: {'nothing' if known.all() else 'everything'} is unknown")
    return known.expand(image_shape).contiguous()


def _read_mask(mask: str, height: int, width: int) -> Tensor:
    from PIL import Image

    allowed = f"{', '.join(_HALVES)}, top,left,height,width, or the file of an image"
    if not Path(mask).suffix:
        raise ValueError(f"sampling.mask={mask!r}: allowed are {allowed}")
    if not Path(mask).is_file():
        raise FileNotFoundError(f"sampling.mask={mask!r}: no such file; allowed are {allowed}")
    try:
        with Image.open(mask) as image:
            pixels = np.asarray(image.convert("L"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"sampling.mask={mask!r}: not an image that can be read: {error}") from None
    if pixels.shape != (height, width):
        raise ValueError(
            f"sampling.mask={mask!r}: is {pixels.shape[1]}x{pixels.shape[0]}, the images are {width}x{height}"
        )
    return torch.from_numpy(pixels < 128)


def _read_matrix(path: str) -> Tensor:
    """A matrix (m, D) from a .npy file."""
    if not path:
        raise ValueError("sampling.operator is not set: give a .npy file with a matrix (m, channels·height·width)")
    try:
        array = read_array(Path(path))
    except ValueError as error:
        raise ValueError(f"sampling.operator: {error}") from None
    if array.dtype.kind not in "fiu":
        raise ValueError(f"sampling.operator={path!r}: holds no matrix of numbers")
    return torch.from_numpy(array.astype(np.float64))


MEASUREMENTS: dict[str, Callable[..., LinearOperator]] = {
    "inpaint": lambda options, shape, device: Mask(known_pixels(options["mask"], shape), device),
    "colorize": lambda options, shape, device: ChannelMean(shape, device),
    "super_resolution": lambda options, shape, device: BlockMean(shape, options["factor"], device),
    "ct": lambda options, shape, device: radon_transform(shape, options["num_views"], device),
    "linear": lambda options, shape, device: MatrixOperator(_read_matrix(options["operator"]).to(device), shape),
}
"""Values of ``sampling.condition``. An import path can name any other ``operator(options, image_shape, device)``."""


def make_operator(
    options: Mapping[str, object], image_shape: tuple[int, int, int], device: torch.device | str = "cpu"
) -> LinearOperator:
    """What ``options['condition']`` measures of images (C, H, W); ValueError or FileNotFoundError if it cannot."""
    condition = options["condition"]
    make = resolve(condition, MEASUREMENTS, "sampling.condition")
    try:
        return make(options, image_shape, device)
    except ValueError as error:
        raise ValueError(f"sampling.condition={condition!r}: {error}") from None
