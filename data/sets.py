"""Data sets: by name, in memory or in files, and the order in which training sees them.

*Sets* are pairs of splits, train and test. A split hands out batches of levels k ∈ {0, …, L−1}, as images have
them, or of floating-point numbers (``data.arrays``).

*Order.* Training concatenates one permutation per epoch into an endless sequence; step n takes the entries
n·B, …, (n+1)·B − 1. A batch is therefore a function of (seed, step) alone: resuming needs no replay, no image is
dropped at the end of an epoch, and processes divide the same batch.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps
from torch import Tensor

from data import published
from data.folders import find_halves
from experiment.files import first_line, read_arrays
from experiment.randomness import seed_from
from experiment.registry import resolve

__all__ = [
    "SETS",
    "FileSplit",
    "Split",
    "TensorSplit",
    "TrainingBatches",
    "UnreadableImage",
    "batch_indices",
    "conditions_of",
    "describe",
    "evenly_spaced",
    "load_dataset",
]

logger = logging.getLogger(__name__)

_GREY_16 = ("I;16", "I;16B", "I;16L", "I;16N")
"""What Pillow calls grey of unsigned 16 bits in a file."""
_DARK = 16
"""The largest level of images that were meant for fewer than 256 levels; 15 is what 12 bits give in place of 16."""


# ----------------------------------------------------------------------------------------------------------- splits


class UnreadableImage(ValueError):
    """An image file whose header can be read and whose pixels cannot."""


class Split(Protocol):
    """One half, train or test, of a data set.

    Attributes:
        name: the set and the half, e.g. ``"digits-train"``.
        shape: of an item, with the channels first: (C, H, W) of images, (C, L), (C, D, H, W) or (D,).
        num_levels: number L of levels, integers 0 … L−1; None for floating-point numbers.
        num_classes: number of classes, or None for a set without labels.
        fingerprint: a short string that changes with the contents; a cache key.

    What a network is told of each item is a split, too, ``conditions``, which a split may have or not.
    """

    name: str
    shape: tuple[int, ...]
    num_levels: int | None
    num_classes: int | None
    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Items (B, ...) and labels, int64 (B,), at the given positions; without labels all are 0. Levels are uint8, or
        int32 where there are more than 256; numbers float32 or float64."""
        ...


class TensorSplit:
    """A split held in memory; attributes as in ``Split``, the fingerprint is a hash of all pixels and labels.

    Args:
        name: the set and the half.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), or None.
        num_levels: number L of grey levels.
        num_classes: number of classes, None if and only if ``labels`` is.
        conditions: a split of what a network is told of each image.

    Raises:
        ValueError: images or labels of another type or shape.
    """

    def __init__(
        self,
        name: str,
        images: Tensor,
        labels: Tensor | None,
        *,
        num_levels: int = 256,
        num_classes: int | None = None,
        conditions: Split | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"{name}: images must be uint8 (N, C, H, W), not {images.dtype} {tuple(images.shape)}")
        self.name = name
        self.images = images.contiguous()
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        if self.labels.shape != (len(images),):
            raise ValueError(f"{name}: {len(images)} images but labels of shape {tuple(self.labels.shape)}")
        if (labels is None) != (num_classes is None):
            raise ValueError(f"{name}: labels and num_classes={num_classes} go together")
        if len(images) and not 0 <= self.labels.min() <= self.labels.max() < (num_classes or 1):
            raise ValueError(
                f"{name}: labels go from {self.labels.min()} to {self.labels.max()}, not 0 to {num_classes - 1}"
            )
        self.shape = tuple(images.shape[1:])
        self.num_levels = num_levels
        self.num_classes = num_classes
        self.conditions = conditions
        description = (tuple(images.shape), num_levels, num_classes)
        description += () if conditions is None else (conditions.fingerprint,)
        self.fingerprint = _hash(description, self.images.numpy().reshape(-1), self.labels.numpy())

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], self.labels[chosen]


class FileSplit:
    """A split of image files, decoded when asked for; attributes as in ``Split``.

    Every image is cut to its largest central part of the wanted proportions and brought to the size of ``shape``. The
    fingerprint is a hash of the sorted names, file sizes and modification times.

    Args:
        name: the set and the half.
        folder: where the files are.
        files: N names relative to ``folder``.
        labels: int64 (N,), or None.
        shape: (C, H, W) with C = 1 (grey) or 3 (RGB).
        num_classes: number of classes, None if and only if ``labels`` is.
        crop: side in pixels of a central square; None: as much as there is. The filter is that of
            score_sde_pytorch, in the first case bilinear (CelebA), in the second bicubic (LSUN).
        num_levels: 256, or those of grey images of 16 bits.
        background: the colour under transparent pixels, as Pillow names it.
        about: what else is to be said of the set that it is a half of.

    Raises:
        FileNotFoundError: a file is missing.
        UnreadableImage: from ``batch`` and ``read_all``.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        files: Sequence[str],
        labels: Tensor | None,
        *,
        shape: tuple[int, int, int],
        num_classes: int | None = None,
        crop: int | None = None,
        num_levels: int = 256,
        background: str = "white",
        about: str = "",
    ) -> None:
        self.name = name
        self.about = about
        self.folder = folder
        self.num_levels, self.background = num_levels, background
        self.files = list(files)
        self.labels = torch.zeros(len(files), dtype=torch.int64) if labels is None else labels
        self.shape = shape
        self.num_classes = num_classes
        self.crop = crop
        self.filter = Image.Resampling.BICUBIC if crop is None else Image.Resampling.BILINEAR
        try:
            stats = [(file, os.stat(folder / file)) for file in self.files]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: the image {error.filename} is missing") from error
        listing = sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        taken = () if (num_levels, background) == (256, "white") else (num_levels, background)
        self.fingerprint = _hash((shape, num_classes, crop, self.filter, listing, *taken), self.labels.numpy())

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        channels, *size = self.shape
        images = np.empty((len(chosen), *size, channels), dtype=np.uint8 if self.num_levels <= 256 else np.int32)
        for image, i in zip(images, chosen.tolist(), strict=True):
            decoded = np.asarray(self._decode(self.folder / self.files[i])).reshape(*size, channels)
            image[:] = decoded if decoded.dtype == np.uint8 else decoded.clip(0, 2**16 - 1)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), self.labels[chosen]

    def read_all(self, progress: Callable[[int], object] = lambda count: None) -> None:
        """Decode every file, before there is work that one could stop; ``progress`` is told how many more are done.

        Raises:
            UnreadableImage: one cannot be read, or all are nearly black.
        """

        def largest(i: int) -> int | UnreadableImage:
            try:
                return int(self.batch([i])[0].max())
            except UnreadableImage as error:
                return error

        levels = []
        with ThreadPoolExecutor() as threads:
            for start in range(0, len(self), 1024):
                levels += threads.map(largest, range(start, min(start + 1024, len(self))))
                progress(len(levels) - start)
        if errors := [level for level in levels if isinstance(level, UnreadableImage)]:
            more = f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
            raise UnreadableImage(f"{errors[0]}{more}")
        _check_range(self.name, max(levels, default=self.num_levels - 1), self.num_levels)

    def _decode(self, file: Path) -> Image.Image:
        channels, *size = self.shape
        try:
            with Image.open(file) as image:
                # Cameras store the orientation apart from the pixels.
                upright = ImageOps.exif_transpose(image)
                if self.num_levels > 256:
                    return _crop_and_resize(upright.convert("I"), size, self.filter, self.crop)
                if upright.has_transparency_data:  # which may have any colour; a page shows white there
                    page = Image.new("RGBA", upright.size, self.background)
                    upright = Image.alpha_composite(page, upright.convert("RGBA"))
                upright = upright.convert("L" if channels == 1 else "RGB")
        except Exception as error:  # Pillow raises unrelated types on damaged files
            raise UnreadableImage(f"{self.name}: cannot read the image {file}: {first_line(error)}") from error
        return _crop_and_resize(upright, size, self.filter, self.crop)


def conditions_of(split: Split) -> Split | None:
    """What a network is told of each item of a split; None: nothing."""
    return getattr(split, "conditions", None)


def _hash(description: object, *arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(repr(description).encode(), digest_size=8)
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def _check_range(name: str, largest: int, num_levels: int = 256) -> None:
    """Refuse images whose levels are not 0 to L − 1: most would be black to a model."""
    highest = num_levels - 1
    if largest > highest:
        raise UnreadableImage(f"{name}: a pixel has level {largest}, not 0 to {highest}, data.num_levels={num_levels}")
    if largest <= _DARK * num_levels // 256:
        other = ", or say with data.num_levels how many there are" if num_levels > 256 else ""
        raise UnreadableImage(
            f"{name}: no pixel is above level {largest} of {highest}; bring the images to levels 0 to {highest}{other}"
        )


def _crop_and_resize(
    image: Image.Image, size: Sequence[int], resampling: Image.Resampling, crop: int | None = None
) -> Image.Image:
    """The central square of side ``crop``, or the largest central part of the wanted proportions, brought to the
    ``size`` (height, width).

    Pillow's filters widen with the reduction, so they do not alias; they are those of ``tf.image.resize`` with
    ``antialias=True``, except that ours round to 8 bits, which dequantisation needs.
    """
    height, width = size
    unit = min(image.width / width, image.height / height)
    across, down = (crop, crop) if crop else (round(unit * width), round(unit * height))
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.crop((left, top, left + across, top + down)).resize((width, height), resampling)


# ------------------------------------------------------------------------------------------------------------ order


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_from("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def evenly_spaced(positions: Sequence[int], count: int, size: int) -> list[int]:
    """Indices of items number ``positions`` of ``count`` that are evenly spaced over ``size``: data sets are often
    sorted by class."""
    return [position * size // count for position in positions]


def batch_indices(seed: int, step: int, batch_size: int, size: int) -> Tensor:
    """Which of ``size`` images, int64 (batch_size,), step number ``step`` takes, counted from 0.

    Epochs are permutations keyed by (seed, epoch), laid end to end; every image occurs once in each.
    """
    if size < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch of training.batch_size={batch_size} of {size} images at step {step}")
    position, remaining, pieces = step * batch_size, batch_size, []
    while remaining:
        epoch, start = divmod(position, size)
        pieces.append(_permutation(seed, epoch, size)[start : start + remaining])
        position += len(pieces[-1])
        remaining -= len(pieces[-1])
    return torch.cat(pieces)  # always a copy, never a view of the cached permutation


class TrainingBatches:
    """Images and labels for every step of training, in the order of ``batch_indices``.

    Images that are not in memory are read one step ahead, in a thread; batches of tensors are not, since a thread would
    bring OpenMP workers with it, which cost more than they save.

    Args:
        split: the training images.
        seed: of their order.
        batch_size: images per step over all processes.
    """

    def __init__(self, split: Split, *, seed: int, batch_size: int) -> None:
        self.split, self.seed, self.batch_size = split, seed, batch_size
        self.reader = None if isinstance(split, TensorSplit) else ThreadPoolExecutor(1)
        self.batches: dict[tuple[int, range], Future] = {}

    def __call__(self, step: int, positions: range) -> tuple[Tensor, Tensor]:
        """Items (b, ...) and labels, int64 (b,), at the b ``positions`` in the batch of all processes."""
        if self.reader is None:
            return self._read(step, positions)
        self.batches = {key: batch for key, batch in self.batches.items() if key[0] in (step, step + 1)}
        for key in ((step, positions), (step + 1, positions)):
            if key not in self.batches:
                self.batches[key] = self.reader.submit(self._read, *key)
        return self.batches[step, positions].result()

    def _read(self, step: int, positions: range) -> tuple[Tensor, Tensor]:
        return self.split.batch(batch_indices(self.seed, step, self.batch_size, len(self.split))[list(positions)])


# ---------------------------------------------------------------------------------------------------- sets by name


def load_dataset(
    dataset: str,
    *,
    shape: Sequence[int] = (),
    image_size: int = 0,
    num_channels: int = 0,
    num_levels: int = 0,
    path: str | os.PathLike[str] = "",
    root: str | os.PathLike[str] = "",
    download: bool = False,
    resize: bool = False,
    background: str = "white",
) -> tuple[Split, Split]:
    """The training and the test half of a set.

    Args:
        dataset: a name in ``SETS``, in upper or lower case, or the import path ``module:function`` of your own
            function. It is called with those of the other arguments, as keywords, that it has, and returns two splits,
            train and test: ``ArraySplit`` and its relatives make one of whatever can be indexed, ``TensorSplit`` of
            images in memory, ``FileSplit`` of image files, and ``Split`` says what any has.
        shape: of one item, with the channels first, such as (C, H, W).
        image_size, num_channels: short for the shape of square images. Image files are converted to 1 (grey) or 3 (RGB)
            channels; others must have as many. A function of yours is given the image size (H, W), or whatever the
            axes are, where they are no square.
        num_levels: of integers in ``array`` and of 16 bits in ``folder``, if they are fewer than their type has.
        path: the file or folder of ``npz``, ``folder`` or ``array``.
        root: where published sets are, or torchvision's are to be put.
        download: whether torchvision may fetch a set that is not in ``root``.
        resize: whether images of another size are cut to the wanted proportions and resized. CelebA always is.
        background: the colour under transparent pixels of ``folder``.

    Raises:
        ValueError: an argument is wrong, or the images do not fit it.
        FileNotFoundError: there is no such set in ``root``, or an image is missing.
    """
    name = dataset.lower() if dataset.lower() in SETS else dataset
    load = resolve(name, SETS, "data.dataset")
    if str(path) and name in SETS and name not in ("npz", "folder", "array"):
        # Otherwise somebody's own images would silently be replaced by the default set.
        raise ValueError(f"data.path={path} is read by data.dataset='npz', 'folder' or 'array', not by {dataset!r}")
    if num_levels and name in SETS and name not in ("array", "folder"):
        raise ValueError(
            f"data.num_levels={num_levels}: is read by data.dataset='array' and 'folder', not by {dataset!r}"
        )
    if background != "white" and name in SETS and name != "folder":
        raise ValueError(f"data.background={background!r}: is read by data.dataset='folder', not by {dataset!r}")
    shape = tuple(shape) or (num_channels, image_size, image_size)
    num_channels, *size = shape
    if name in SETS and name != "array" and len(size) != 2:
        raise ValueError(f"data.shape={shape}: data.dataset={dataset!r} has images, of shape (C, H, W)")
    if name in ("folder", "celeba") and num_channels not in (1, 3):
        raise ValueError(f"data.num_channels={num_channels}: of image files 1 (grey) or 3 (colour)")
    square = len(size) == 2 and size[0] == size[1]
    options = dict(shape=shape, image_size=size[0] if square else tuple(size), num_channels=num_channels)
    options |= dict(num_levels=num_levels, path=path, root=root, download=download, resize=resize)
    options["background"] = background
    taken = inspect.signature(load).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
        options = {parameter.name: options[parameter.name] for parameter in taken if parameter.name in options}
    halves = load(**options)
    if not isinstance(halves, tuple | list) or len(halves) != 2 or not all(map(_is_split, halves)):
        raise ValueError(f"data.dataset={dataset!r}: returns no two splits, train and test (data.sets.Split)")
    train, test = halves
    items = "images" if len(size) == 2 else "items"
    for split in halves:
        if not len(split):
            raise ValueError(f"data.dataset={dataset!r}: {split.name} holds no {items}")
        if len(size) == len(split.shape) - 1 == 2:
            channels, height, width = split.shape
            if channels != num_channels:
                raise ValueError(f"data.num_channels={num_channels}, but {split.name} has {channels}-channel images")
            if [height, width] != size:
                raise ValueError(_wrong_size(split.name, width, height, size))
        if tuple(split.shape) != shape:
            raise ValueError(f"data.shape={shape}, but {split.name} has items of shape {tuple(split.shape)}")
    if name not in SETS:
        for split in halves:
            _check_batch(split)
    if train.num_levels != test.num_levels:
        kinds = [f"{split.num_levels or 'no'} levels" for split in halves]
        raise ValueError(f"data.dataset={dataset!r}: {train.name} has {kinds[0]}, {test.name} {kinds[1]}")
    _check_conditions(train, test)
    if name not in published.SETS and type(train) is type(test) and isinstance(train, TensorSplit | FileSplit):
        present = set(train.labels.tolist())
        if train.num_classes not in (None, len(present)):
            first = next(number for number in range(train.num_classes) if number not in present)
            raise ValueError(
                f"{train.name}: no image is of class {first}; {len(present)} of {train.num_classes} classes have any, "
                "but labels are to count from 0 without gaps"
            )
        if both := _in_both(train, test):
            logger.warning("%d of %d test images are training images, too: %s …", len(both), len(test), both[0])
    return train, test


def describe(train: Split, test: Split) -> str:
    """How many items each half has, of how many classes; of a folder what was left out."""
    items = "images" if len(train.shape) == 3 else "items"
    classes = "without classes" if train.num_classes is None else f"of {train.num_classes} classes"
    about = getattr(train, "about", "")
    return f"{len(train)} training and {len(test)} test {items} {classes}" + (f"; {about}" if about else "")


def _check_batch(split: Split) -> None:
    """Whether a split of the user's own has items as it says, by the first."""
    batch = split.batch([0])
    wanted = (
        f"({'integers' if split.num_levels else 'floating-point numbers'} of shape {(1, *split.shape)}, labels (1,))"
    )
    found = f"a {type(batch).__name__}"
    if isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        items, labels = batch
        found = f"({items.dtype} of shape {tuple(items.shape)}, {labels.dtype} of shape {tuple(labels.shape)})"
        right = items.is_floating_point() == (split.num_levels is None) and not labels.is_floating_point()
        if right and items.shape == (1, *split.shape) and labels.shape == (1,):
            return
    raise ValueError(f"{split.name}: batch([0]) gives {found}, not tensors {wanted}")


def _check_conditions(train: Split, test: Split) -> None:
    """Whether both halves have conditions of one shape, one for each item, or neither has any."""
    conditions = [conditions_of(split) for split in (train, test)]
    if all(given is None for given in conditions):
        return
    for split, given in zip((train, test), conditions, strict=True):
        if not _is_split(given):
            raise ValueError(f"{split.name}: its conditions are {given!r:.60}, not a split as those of the other half")
        _check_batch(given)
        if len(given) != len(split):
            raise ValueError(f"{given.name}: {len(given)} conditions for {len(split)} items")
        shape, wanted = tuple(given.shape), tuple(split.shape)
        if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
            raise ValueError(f"{given.name}: of shape {shape}; allowed is data.shape={wanted}, with any channels")
    first, second = (tuple(given.shape) for given in conditions)
    if first != second:
        raise ValueError(f"{train.name} has conditions of shape {first}, {test.name} of shape {second}")


def _in_both(train: TensorSplit | FileSplit, test: TensorSplit | FileSplit) -> list[object]:
    """Which test images are training images, too, byte by byte: their files, or their numbers in memory."""
    if isinstance(train, TensorSplit):
        known = {hash(image.tobytes()) for image in train.images.numpy()}
        return [i for i, image in enumerate(test.images.numpy()) if hash(image.tobytes()) in known]

    halves = [[split.folder / file for file in split.files] for split in (train, test)]
    for key in (lambda file: file.stat().st_size, lambda file: _hash("", np.fromfile(file, np.uint8))):
        keys = [{file: key(file) for file in half} for half in halves]
        common = set(keys[0].values()) & set(keys[1].values())
        halves = [[file for file in half if half[file] in common] for half in keys]
    return halves[1]


def _is_split(given: object) -> bool:
    return all(hasattr(given, name) for name in (*Split.__annotations__, "__len__", "batch"))


def _wrong_size(name: object, width: int, height: int, size: Sequence[int]) -> str:
    wanted = f"data.image_size={size[0]}" if size[0] == size[1] else f"data.shape=(…, {size[0]}, {size[1]})"
    return (
        f"{wanted}, but {name} is of {width}x{height} pixels; change it, or set --config.data.resize=True to crop and "
        "resize"
    )


def _in_memory(
    name: str,
    halves: Sequence[tuple[np.ndarray, np.ndarray | None]],
    *,
    num_classes: int | None,
    num_levels: int = 256,
    shape: tuple[int, int, int],
    resize: bool,
    conditions: Mapping[str, Split] = {},
) -> tuple[Split, ...]:
    """Splits from two pairs, train and test, of images uint8 (N, H, W, C) and labels (N,) or None, and their conditions
    by half."""
    splits = []
    for half, (images, labels) in zip(("train", "test"), halves, strict=True):
        channels, size = images.shape[-1], shape[1:]
        if resize and images.shape[1:3] != size:
            pictures = images[..., 0] if channels == 1 else images  # Pillow wants grey images as (H, W)
            bilinear = Image.Resampling.BILINEAR
            resized = [_crop_and_resize(Image.fromarray(picture), size, bilinear) for picture in pictures]
            images = np.stack(resized).reshape(-1, *size, channels)
        levels = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        classes = None if labels is None else torch.from_numpy(labels.astype(np.int64))
        options = dict(num_levels=num_levels, num_classes=num_classes, conditions=conditions.get(half))
        splits.append(TensorSplit(f"{name}-{half}", levels, classes, **options))
    return tuple(splits)


def _digits(*, shape: tuple[int, int, int], resize: bool, **_) -> tuple[Split, ...]:
    """The 1797 8×8 digits bundled with scikit-learn, 17 levels; 360 of them, stratified by class, are the test set.

    They are themselves the test part of the UCI set "Optical Recognition of Handwritten Digits", so there is no
    customary split: ``random_state=0`` defines ours. Within each half the images keep scikit-learn's order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images, labels = digits.images.astype(np.uint8)[..., None], digits.target
    halves = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    arrays = [(images[chosen], labels[chosen]) for chosen in map(np.sort, halves)]
    return _in_memory("digits", arrays, num_classes=10, num_levels=17, shape=shape, resize=resize)


def _npz(*, path: str | os.PathLike[str], shape: tuple[int, int, int], resize: bool, **_) -> tuple[Split, ...]:
    """A NumPy archive with ``train_images`` and ``test_images``, uint8 (N, H, W) or (N, H, W, C), and optionally
    ``train_labels`` and ``test_labels``, integers (N,) or (N, 1) counted from 0, and ``train_conditions`` and
    ``test_conditions``, numbers (N, H, W) or (N, H, W, C')."""
    from data.arrays import ConditionSplit

    file = _given("path", path, "npz", "a file with train_images, test_images and, if any, train_labels, test_labels")
    try:
        arrays = read_arrays(file)
    except ValueError as error:
        raise ValueError(f"data.path: {first_line(error)}") from error
    labels = {key: arrays[key] for key in ("train_labels", "test_labels") if key in arrays}
    labels = {key: array[:, 0] if array.shape[1:] == (1,) else array for key, array in labels.items()}
    # Labels for one half only are a mistake, not a set without labels.
    wanted = ["train_images", "test_images", *(["train_labels", "test_labels"] if labels else [])]
    wanted += ["train_conditions", "test_conditions"] if {"train_conditions", "test_conditions"} & {*arrays} else []
    if missing := [key for key in wanted if key not in arrays]:
        raise ValueError(f"data.path={file} lacks {', '.join(missing)} (it has {', '.join(arrays) or 'nothing'})")
    for key in ("train_images", "test_images"):
        images = arrays[key] = arrays[key][..., None] if arrays[key].ndim == 3 else arrays[key]
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"data.path={file}: {key} must be uint8 (levels 0 to 255) of shape (N, H, W) or (N, H, W, C), not "
                f"{images.dtype} of shape {images.shape}"
            )
    _check_range(f"data.path={file}", max(int(arrays[f"{half}_images"].max(initial=0)) for half in ("train", "test")))
    for key, array in labels.items():
        largest = f" up to {array.max(initial=0)}" if array.dtype.kind in "ui" else ""
        if not largest or array.max(initial=0) >= 2**31:
            raise ValueError(f"data.path={file}: {key} must be integers from 0, not {array.dtype}{largest}")
    num_classes = max(int(array.max(initial=0)) for array in labels.values()) + 1 if labels else None
    halves = [(arrays[f"{half}_images"], labels.get(f"{half}_labels")) for half in ("train", "test")]
    conditions = {}
    for half in ("train", "test") if "train_conditions" in arrays else ():
        array = arrays[f"{half}_conditions"]
        array = np.moveaxis(array, -1, 1) if array.ndim == 4 else array
        conditions[half] = ConditionSplit(f"{file.stem}-{half}-conditions", array, len(shape))
    if conditions and resize:
        raise ValueError(f"data.resize=True: conditions, which data.path={file} has, are not resized")
    return _in_memory(file.stem, halves, num_classes=num_classes, shape=shape, resize=resize, conditions=conditions)


def _folder(
    *,
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    num_levels: int,
    resize: bool,
    background: str,
    **_,
) -> tuple[Split, ...]:
    """A folder of images, in the halves that ``folders.find_halves`` finds. If every image lies in a subfolder of its
    half, and there are at least two of these, the names of the subfolders in alphabetical order are the classes. Images
    have 256 levels, or all of them, being grey of 16 bits, 65,536 or ``num_levels``."""
    try:
        ImageColor.getrgb(background)
    except ValueError:
        raise ValueError(f"data.background={background!r}: allowed are colours such as white or #808080") from None
    folder = _given("path", path, "folder", "a folder of images")
    if not folder.is_dir():
        raise ValueError(f"data.path={folder} is not a folder")
    roots, files, about = find_halves(folder)
    # Before training, not in the middle of it; the headers are enough.
    size = None if resize else shape[1:]
    deep = {root / file: _check_header(root / file, size) for half, root in roots.items() for file in files[half]}
    if any(deep.values()):
        if shape[0] != 1:
            raise ValueError(f"data.num_channels={shape[0]}: {max(deep, key=deep.get)} is grey, of 16 bits")
        if not all(deep.values()):
            raise ValueError(f"data.path: {max(deep, key=deep.get)} has 16 bits, {min(deep, key=deep.get)} has 8")
        num_levels = num_levels or 2**16
    elif num_levels not in (0, 256):
        raise ValueError(f"data.num_levels={num_levels}: the images of data.path={folder} have 8 bits, 256 levels")
    in_subfolders = all("/" in file for half in files.values() for file in half)
    classes = sorted({file.split("/")[0] for half in files.values() for file in half}) if in_subfolders else []
    number = {name: k for k, name in enumerate(classes)} if len(classes) > 1 else None
    return tuple(
        FileSplit(
            f"{folder.resolve().name}-{half}",
            root,
            files[half],
            None if number is None else torch.tensor([number[file.split("/")[0]] for file in files[half]]),
            shape=shape,
            num_classes=None if number is None else len(number),
            num_levels=num_levels or 256,
            background=background,
            about=about,
        )
        for half, root in roots.items()
    )


def _check_header(file: Path, size: tuple[int, int] | None) -> bool:
    """Whether an image is grey, of 16 bits; a ValueError unless it is of this size, and of these or 8 bits."""
    if file.exists() and not file.is_file():  # a pipe would be waited for
        raise ValueError(f"data.path: {file} is no regular file")
    try:
        with Image.open(file) as image:
            width, height, mode = image.width, image.height, image.mode
            # Of colour of 16 bits Pillow reads the first 8. What is stored is, in PPM, (mode, largest level).
            deep = any(
                ";16" in str(stored) or (codec[:3] == "ppm" and mode != "1" and stored[1] > 255)
                for codec, _, _, stored in image.tile
            )
            grey = mode in ("I", "I;16") and not image.has_transparency_data
            grey = grey and all(
                codec[:3] == "ppm" or (stored if isinstance(stored, str) else stored[0]) in _GREY_16
                for codec, _, _, stored in image.tile
            )
    except Exception as error:
        raise ValueError(f"data.path: cannot read the image {file}: {first_line(error)}") from error
    if (mode[0] in "IF" or deep) and not grey:  # other modes than these Pillow clips to 255
        raise ValueError(
            f"data.path: {file} has more than 8 bits per channel ({mode}) and is not grey of 16; convert it to 8 bits"
        )
    if size is not None and (height, width) != size:
        raise ValueError(_wrong_size(file, width, height, size))
    return grey


def _array(*, path: str | os.PathLike[str], resize: bool, **options) -> tuple[Split, ...]:
    """Arrays in a file or folder of the user's, see ``data.arrays.read_halves``."""
    from data.arrays import read_halves

    if resize:
        raise ValueError("data.resize=True: images are resized, data.dataset='array' is not")
    return read_halves(_given("path", path, "array", "an .npz or .h5 file, or a folder of .npy files"), **options)


def _given(field: str, value: str | os.PathLike[str], dataset: str, wanted: str) -> Path:
    if not str(value):
        raise ValueError(f"data.{field} is not set; {dataset!r} wants {wanted}")
    return Path(value).expanduser()


def _published(
    name: str, *, root: str | os.PathLike[str], download: bool, shape: tuple[int, int, int], resize: bool, **_
):
    """A set whose images ``data.published`` reads into memory."""
    read, num_classes = published.SETS[name]
    arrays = read(_given("root", root, name, published.ROOT), download)
    return _in_memory(name, arrays, num_classes=num_classes, shape=shape, resize=resize)


def _celeba(*, root: str | os.PathLike[str], download: bool, shape: tuple[int, int, int], **_):
    """The aligned faces of CelebA: the central 140×140 of 178×218 pixels, resized, as in score_sde_pytorch.

    The test half is CelebA's own test split, where score_sde_pytorch evaluates on the validation split. The 40
    attributes are no classes, so there are no labels.
    """
    folder, halves = published.celeba(_given("root", root, "celeba", published.ROOT), download)
    return tuple(
        FileSplit(f"celeba-{half}", folder, files, None, shape=shape, crop=140) for half, files in halves.items()
    )


SETS: dict[str, Callable[..., Sequence[Split]]] = {
    "digits": _digits,
    "npz": _npz,
    "folder": _folder,
    "array": _array,
    **{name: functools.partial(_published, name) for name in published.SETS},
    "celeba": _celeba,
}
