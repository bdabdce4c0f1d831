"""What an extractor of features is, and what all of them need."""

from __future__ import annotations

import hashlib
import re
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from evaluation import Features


class FeatureExtractor(Protocol):
    """Maps uint8 images (B, C, H, W) to ``(pool, logits)``, float tensors (B, F) and (B, K).

    ``name`` is for reports; ``key`` identifies the function computed, weights included; ``dimension`` is F.
    """

    name: str
    key: str
    dimension: int

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]: ...


def extract_features(
    extractor: FeatureExtractor, images: Tensor, batch_size: int | None = None, *, progress: bool = False
) -> Features:
    """Features of uint8 images (N, C, H, W), which the extractor is given in batches, by default all at once."""
    parts = images.split(batch_size or len(images))
    batches = [extractor(batch) for batch in tqdm(parts, disable=not progress, leave=False, unit="batch")]
    pool, logits = (torch.cat(parts).float().cpu().numpy() for parts in zip(*batches, strict=True))
    return Features(pool, logits)


def check_images(name: str, images: Tensor, wanted: str, fits: bool, num_levels: int) -> None:
    """Raise a ValueError unless images are uint8, their shape ``fits`` what is ``wanted``, and levels are allowed."""
    if images.dtype != torch.uint8 or not fits:
        found = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"{name}: images must be uint8 of shape {wanted}, not {found}")
    if len(images) and int(images.max()) >= num_levels:
        raise ValueError(f"{name}: pixels must be 0 … {num_levels - 1}, but one is {int(images.max())}")


def reproducible_convolutions() -> AbstractContextManager[None]:
    """On a GPU: deterministic algorithms in full float32. Without effect elsewhere."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def key_digest(key: str) -> str:
    """16 hexadecimal digits of a key."""
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()


def file_stem(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name)
