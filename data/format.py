"""The map between data and the values that a model sees.

*Levels* k ∈ {0, …, L−1} become model values in [0, 1] either as k/(L−1), or uniformly dequantised as (k + u)/L with
u ~ U[0, 1). The density p of the dequantised values bounds the probability of the levels from below,
log P(k) ≥ E_u[log p((k + u)/L)] − D log L for D dimensions, which is what makes bits/dim comparable between models
(Theis, van den Oord & Bethge, 2016, arXiv:1511.01844, Sec. 3.1).

*Floating-point numbers* x become (x − offset)/scale, channel by channel, and samples the inverse of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.sets import Split, conditions_of
from experiment.files import write_atomically
from experiment.randomness import Generator, uniform

__all__ = [
    "GRID_IMAGES",
    "DataFormat",
    "is_picture",
    "random_flip",
    "save_grid",
    "scale",
    "to_pixels",
    "to_unit_interval",
    "unscale",
]

GRID_IMAGES = 64
MAX_LEVELS = 2**16
"""Those of 16 bits. Of many more, single precision would not keep the noise of dequantisation apart."""
_LEVEL_FIELDS = ("num_levels", "num_classes", "centered", "dequantized")


@dataclass(frozen=True)
class DataFormat:
    """What data are, and how a model sees them: all that sampling needs to know of the data.

    A checkpoint keeps ``as_dict()``, of which ``from_dict`` makes the same again.

    Args:
        shape: of one item, (C, H, W) of images, (C, L) of signals, (C, D, H, W) of volumes, (D,) of vectors; the first
            axis is that of channels.
        num_levels: number L of levels; None of floating-point numbers.
        num_classes: of the set; None without labels.
        centered: whether model values are centred at 0, as levels in [−1, 1] are, rather than in [0, 1].
        dequantized: whether the model learns uniformly dequantised levels.
        offset, scale: of floating-point numbers, for each channel: model values are (x − offset)/scale.
        condition: the same of what a network is told of each item, of whose shape only the number of channels may be
            another; None: nothing.
    """

    shape: tuple[int, ...]
    num_levels: int | None
    num_classes: int | None
    centered: bool
    dequantized: bool
    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    condition: DataFormat | None = None

    def __post_init__(self) -> None:
        for name in ("shape", "offset", "scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.num_levels is None:
            if not all(len(values) == self.shape[0] for values in (self.offset, self.scale)):
                raise ValueError(f"floating-point data of {self.shape[0]} channels: an offset and a scale for each")
        elif not 2 <= self.num_levels <= MAX_LEVELS:
            raise ValueError(f"data of {self.num_levels} levels: allowed are 2 to {MAX_LEVELS}")

    @classmethod
    def of(cls, split: Split, *, centered: bool, dequantized: bool, normalization: str = "standard") -> DataFormat:
        """That of a data set.

        Args:
            split: its training half.
            centered, dequantized: of levels.
            normalization: of floating-point numbers, also of conditions. 'standard': each channel has mean 0 and
                standard deviation 1; 'range': it lies between −1 and 1; 'none': as they are.

        Raises:
            ValueError: data without variation, or that cannot be dequantised.
        """
        condition = None
        if (given := conditions_of(split)) is not None:
            condition = cls.of(given, centered=True, dequantized=False, normalization=normalization)
        if split.num_levels is not None:
            levels = split.num_levels, split.num_classes, centered, dequantized
            return cls(split.shape, *levels, condition=condition)
        if dequantized:
            raise ValueError(f"data.uniform_dequantization=True: {split.name} has floating-point numbers, not levels")
        if normalization == "none":
            zeros = (0.0,) * split.shape[0]
            return cls(split.shape, None, split.num_classes, True, False, zeros, (1.0,) * len(zeros), condition)
        mean, std, low, high = _channel_statistics(split)
        if normalization == "range":
            offset, scale = (low + high) / 2, (high - low) / 2
        else:
            offset, scale = mean, std
        if not (high > low).all():
            channel = int((high > low).argmin())
            raise ValueError(
                f"data.normalization={normalization!r}: channel {channel} of {split.name} is {low[channel]:g} "
                "everywhere; leave it out, or use 'none'"
            )
        return cls(split.shape, None, split.num_classes, True, False, offset.tolist(), scale.tolist(), condition)

    @classmethod
    def from_dict(cls, stored: Mapping[str, object]) -> DataFormat:
        """The inverse of ``as_dict``; a TypeError or KeyError of anything else."""
        fields = {name: value for name, value in stored.items() if name not in ("image_shape", "condition")}
        condition = cls.from_dict(stored["condition"]) if "condition" in stored else None
        return cls(stored["image_shape"], **fields, condition=condition)

    def as_dict(self) -> dict[str, object]:
        """Plain values; the shape under the name that it has in files since there were only images."""
        fields = asdict(self)
        normalisation = {} if self.num_levels else {"offset": self.offset, "scale": self.scale}
        condition = {} if self.condition is None else {"condition": self.condition.as_dict()}
        return {"image_shape": self.shape} | {name: fields[name] for name in _LEVEL_FIELDS} | normalisation | condition

    @property
    def dimension(self) -> int:
        """Number of values of an item, such as C·H·W."""
        return math.prod(self.shape)

    @property
    def is_picture(self) -> bool:
        return is_picture(self)

    @property
    def log2_unit(self) -> float:
        """The log₂-determinant of the map to model values, over D: densities are 2^(D·log2_unit) times as large in the
        data's own units, which of levels are cells, 1/L of [0, 1] or 2/L of [−1, 1], and of numbers those of the file.
        """
        if self.num_levels is None:
            return -sum(map(math.log2, self.scale)) / len(self.scale)
        return math.log2((2.0 if self.centered else 1.0) / self.num_levels)

    def to_model(self, data: Tensor, generator: Generator = None, *, dequantize: bool | None = None) -> Tensor:
        """Model values, float32, of levels or floating-point numbers (B, ...), on the CPU.

        ``dequantize``, by default as the model learns: levels with u from ``generator``, or without one with u = ½, the
        middle of a level's cell.

        Raises:
            ValueError: other numbers in place of levels, such as samples, whose likelihood would be of another image.
        """
        if self.num_levels is None:
            offset, unit = self._per_channel(data)
            return ((data.double() - offset) / unit).float()
        whole = not data.is_floating_point() or bool((data % 1 == 0).all())
        low, high = map(float, data.aminmax()) if data.numel() else (0, 0)  # uint8 holds no 256 to compare with
        if not (whole and low >= 0 and high < self.num_levels):
            raise ValueError(
                f"numbers from {low:g} to {high:g} in place of levels, integers from 0 to {self.num_levels - 1}; "
                "images.to_data makes levels of samples"
            )
        noise = None
        if self.dequantized if dequantize is None else dequantize:
            noise = torch.full(data.shape, 0.5) if generator is None else uniform(data.shape, generator)
        return scale(to_unit_interval(data, self.num_levels, dequantization=noise), self.centered)

    def condition_of(self, split: Split, indices: Sequence[int]) -> Tensor | None:
        """What a network is told of these items (B, ...), on the CPU; None if it is told nothing."""
        return None if self.condition is None else self.condition.to_model(split.conditions.batch(indices)[0])

    def to_data(self, x: Tensor) -> Tensor:
        """The levels, uint8 or, of more than 256, int32; or the numbers, float64, of model values (B, ...)."""
        if self.num_levels is None:
            x = x.cpu()  # MPS has no double precision
            offset, unit = self._per_channel(x)
            return x.double() * unit + offset
        return to_pixels(unscale(x.float(), self.centered), self.num_levels, self.dequantized)

    def to_arrays(self, data: Tensor) -> np.ndarray:
        """Data (B, ...) as files have them: pictures (B, H, W, C); levels uint8 or uint16."""
        arrays = (data.permute(0, 2, 3, 1) if self.is_picture else data).cpu().numpy()
        return arrays.astype(np.uint16) if arrays.dtype == np.int32 else arrays

    def _per_channel(self, x: Tensor) -> Tensor:
        """Offset and scale, to be added to and multiplied by ``x`` (B, C, ...)."""
        return torch.tensor([self.offset, self.scale], dtype=torch.float64).view(2, -1, *[1] * (x.ndim - 2))


def is_picture(data: DataFormat | Split) -> bool:
    """Whether items are grey or colour images: arrays of them have the channels last, and features can be taken."""
    return data.num_levels is not None and len(data.shape) == 3 and data.shape[0] in (1, 3)


def _channel_statistics(split: Split, block: int = 256) -> tuple[np.ndarray, ...]:
    """Mean, standard deviation, smallest and largest value of each channel (C,), in one pass over the data."""
    count, mean, squares = 0, 0.0, 0.0
    low, high = math.inf, -math.inf
    for start in range(0, len(split), block):
        x, _ = split.batch(range(start, min(start + block, len(split))))
        x = x.double().transpose(0, 1).flatten(1).numpy()
        own, number = x.mean(1), x.shape[1]
        squares = squares + ((x - own[:, None]) ** 2).sum(1) + (own - mean) ** 2 * count * number / (count + number)
        mean, count = mean + (own - mean) * number / (count + number), count + number
        low, high = np.minimum(low, x.min(1)), np.maximum(high, x.max(1))
    return mean, np.sqrt(squares / count), low, high


def to_unit_interval(images: Tensor, num_levels: int, *, dequantization: Tensor | None = None) -> Tensor:
    """Model values in [0, 1] of pixel levels k: k/(L−1), or (k + u)/L when given uniform noise u.

    u is kept 2 L ε away from 0 and 1, with ε the precision of its type (6e-5 for 256 levels in float32): the value
    stays clear of its neighbours, so that rounding errors cannot carry it into another level.

    Args:
        images: integer levels, any shape.
        num_levels: number L of levels.
        dequantization: u ∈ [0, 1) in the shape of ``images``; the result has its dtype, else the default one.
    """
    if dequantization is None:
        return images.to(torch.get_default_dtype()) / (num_levels - 1)
    margin = 2 * num_levels * torch.finfo(dequantization.dtype).eps
    return (images + dequantization.clamp(margin, 1 - margin)) / num_levels


def scale(x: Tensor, centered: bool) -> Tensor:
    """Values in [0, 1] to the model's range: [−1, 1] if centred, else unchanged."""
    return 2 * x - 1 if centered else x


def unscale(x: Tensor, centered: bool) -> Tensor:
    """The inverse of ``scale``."""
    return (x + 1) / 2 if centered else x


def to_pixels(x01: Tensor, num_levels: int, dequantized: bool) -> Tensor:
    """The levels that values in [0, 1] stand for, uint8 or, of more than 256, int32; values outside are clipped first.

    Args:
        x01: values, any shape.
        num_levels: number L of levels.
        dequantized: whether the values are (k + u)/L, whose level is ⌊L x⌋, rather than k/(L−1), whose level is the
            integer nearest to (L−1) x.
    """
    x = x01.clamp(0, 1)
    levels = (num_levels * x).floor().clamp(max=num_levels - 1) if dequantized else ((num_levels - 1) * x).round()
    return levels.to(torch.uint8 if num_levels <= 256 else torch.int32)


def random_flip(images: Tensor, generator: Generator = None) -> Tensor:
    """Images (B, C, H, W), each mirrored left to right with probability ½."""
    mirrored = uniform((len(images),), generator, device=images.device) < 0.5
    return torch.where(mirrored[:, None, None, None], images.flip(-1), images)


def save_grid(path: Path, arrays: np.ndarray, data: DataFormat) -> None:
    """Write a PNG of up to 64 items, as ``DataFormat.to_arrays`` gives them: pictures in rows of eight; of others the
    first 16, signals as curves, of images and the middle slices of volumes the first channel; vectors as points."""
    if not data.is_picture:
        from experiment.figures import COLOURS, new_figure, save_figure

        figure = new_figure(5, 4)
        if len(data.shape) == 1:
            axes = figure.subplots()
            axes.plot(*np.atleast_2d(arrays.T)[[0, -1]], ".", markersize=3, color=COLOURS[0])
            axes.set(xlabel="first component", ylabel="last component")
        else:
            for axes, item in zip(figure.subplots(4, 4, sharex=True, sharey=True).flat, arrays[:16], strict=False):
                if item.ndim == 2:
                    axes.plot(item.T, linewidth=0.8, **({"color": COLOURS[0]} if len(item) == 1 else {}))
                else:
                    axes.imshow(item[0] if item.ndim == 3 else item[0, item.shape[1] // 2])
                    axes.set_axis_off()
        return save_figure(figure, path)
    pixels = arrays[:GRID_IMAGES].astype(np.float32) * (255 / (data.num_levels - 1))
    columns = min(8, len(pixels))
    rows = math.ceil(len(pixels) / columns)
    _, height, width, channels = pixels.shape
    gap = 1
    canvas = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255.0, np.float32)
    for i, image in enumerate(pixels):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = image
    picture = Image.fromarray(canvas.round().astype(np.uint8).squeeze())
    enlarge = max(1, 64 // height)  # tiny images would be unreadable pixel for pixel
    picture = picture.resize((picture.width * enlarge, picture.height * enlarge), Image.Resampling.NEAREST)
    write_atomically(path, lambda file: picture.save(file, format="png"))
