"""A set of images is a pair of splits (train, test), held in memory or decoded batch by batch.

A split knows its length, image shape and number of grey levels L, and hands out batches of integer levels
k ∈ {0, …, L−1}. Sets held in memory are tensors; folders of images and CelebA are decoded when asked for.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

__all__ = [
    "UNREADABLE_IMAGE",
    "FileSplit",
    "Split",
    "TensorSplit",
    "content_hash",
    "crop_and_resize",
    "first_line",
]

UNREADABLE_IMAGE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
"""What Pillow raises on bad files."""


class UnreadableImage(ValueError):
    """A file of a folder of images whose header is one's, and the rest is not."""


class Split(Protocol):
    """One half, train or test, of a set of images.

    Attributes:
        name: the set and the half, e.g. ``"digits-train"``.
        image_shape: (C, H, W).
        num_levels: number L of grey levels; pixels are integers 0 … L−1.
        num_classes: number of classes, or None for a set without labels.
        fingerprint: 16 hexadecimal digits that change with the contents; a cache key.
    """

    name: str
    image_shape: tuple[int, int, int]
    num_levels: int
    num_classes: int | None
    fingerprint: str

    def __len__(self) -> int: ...

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images, uint8 (B, C, H, W), and labels, int64 (B,), at the given positions; without labels all are 0."""
        ...


class TensorSplit:
    """A split held in memory; attributes as in ``Split``, the fingerprint is a hash of all pixels and labels.

    Args:
        name: the set and the half.
        images: uint8 (N, C, H, W).
        labels: int64 (N,), or None.
        num_levels: number L of grey levels.
        num_classes: number of classes, None if and only if ``labels`` is.
    """

    def __init__(
        self, name: str, images: Tensor, labels: Tensor | None, *, num_levels: int = 256, num_classes: int | None = None
    ) -> None:
        self.name = name
        self.images = images.contiguous()
        self.labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        self.image_shape = tuple(images.shape[1:])
        self.num_levels = num_levels
        self.num_classes = num_classes
        self.fingerprint = content_hash(
            (tuple(images.shape), num_levels, num_classes), self.images.numpy().reshape(-1), self.labels.numpy()
        )

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[chosen], self.labels[chosen]


class FileSplit:
    """A split of image files, decoded when asked for; attributes as in ``Split``.

    Every image is cut to its central square and brought to the size of ``image_shape``. The fingerprint is a hash
    of the sorted names, file sizes and modification times.

    Args:
        name: the set and the half.
        folder: where the files are.
        files: names relative to ``folder``, N of them.
        labels: int64 (N,), or None.
        image_shape: (C, S, S) with C = 1 (grey) or 3 (RGB).
        num_classes: number of classes, None if and only if ``labels`` is.
        crop: side in pixels of the central square; the shorter side of each image when None.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: from ``batch``, an image cannot be decoded.
    """

    num_levels = 256

    def __init__(
        self,
        name: str,
        folder: Path,
        files: Sequence[str],
        labels: Tensor | None,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int | None = None,
        crop: int | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.files = list(files)
        self.labels = torch.zeros(len(files), dtype=torch.int64) if labels is None else labels
        self.image_shape = image_shape
        self.num_classes = num_classes
        self.crop = crop
        try:
            stats = [(file, os.stat(folder / file)) for file in self.files]
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{name}: the image {error.filename} is missing") from error
        listing = sorted((file, stat.st_size, stat.st_mtime_ns) for file, stat in stats)
        self.fingerprint = content_hash((image_shape, num_classes, crop, listing), self.labels.numpy())

    def __len__(self) -> int:
        return len(self.files)

    def batch(self, indices: Tensor | Sequence[int]) -> tuple[Tensor, Tensor]:
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        channels, size, _ = self.image_shape
        images = np.empty((len(chosen), size, size, channels), dtype=np.uint8)
        for image, i in zip(images, chosen.tolist(), strict=True):
            image[:] = np.asarray(self._decode(self.folder / self.files[i])).reshape(size, size, channels)
        return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), self.labels[chosen]

    def _decode(self, file: Path) -> Image.Image:
        channels, size, _ = self.image_shape
        try:
            with Image.open(file) as image:
                # Cameras store the orientation beside the pixels.
                upright = ImageOps.exif_transpose(image).convert("L" if channels == 1 else "RGB")
        except UNREADABLE_IMAGE as error:
            raise UnreadableImage(f"{self.name}: cannot read the image {file}: {first_line(error)}") from error
        return crop_and_resize(upright, self.crop or min(upright.size), size)


def content_hash(description: object, *arrays: np.ndarray) -> str:
    """16 hexadecimal digits from a plain description and the bytes of one-dimensional arrays."""
    digest = hashlib.blake2b(repr(description).encode(), digest_size=8)
    for array in arrays:
        digest.update(array)
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """What an error says, cut to one line; its type if it says nothing."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def crop_and_resize(image: Image.Image, crop: int, size: int) -> Image.Image:
    """The central square of side ``crop``, brought to side ``size``.

    Pillow's bilinear filter widens with the reduction, so it does not alias; it is the filter of score_sde_pytorch
    (``tf.image.resize`` with ``antialias=True``), except that ours rounds to 8 bits, which dequantisation needs.
    """
    left, top = (image.width - crop) // 2, (image.height - crop) // 2
    return image.crop((left, top, left + crop, top + crop)).resize((size, size), Image.Resampling.BILINEAR)
