"""ImageNet-32x32 from the files in which it is published (Chrabaszcz, Loshchilov & Hutter, 2017, arXiv:1707.08819).

Ten batches of training images and one of validation images, either pickles, ``train_data_batch_1`` … ``_10`` and
``val_data``, or the same with ``.npz``: ``data``, uint8 (N, 3072), each row the red, green and blue plane of an image,
and ``labels``, from 1 to 1000. They are on image-net.org, to be fetched by hand after signing in there. The pickles are
read as plain data, nothing in them is executed.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from data.plain_pickle import load_plain_pickle
from data.splits import first_line

__all__ = ["NUM_CLASSES", "read_imagenet32"]

NUM_CLASSES = 1000
_SHAPE = (3, 32, 32)
_FILES = {"train": [f"train_data_batch_{k}" for k in range(1, 11)], "val": ["val_data"]}


def read_imagenet32(root: Path) -> list[tuple[np.ndarray, np.ndarray]]:
    """Images, uint8 (N, 32, 32, 3), and labels, int64 (N,) from 0, of the training and the validation half.

    A file is looked for in ``root/Imagenet32_train`` (``_val``), or ``Imagenet32_train_npz`` (``_val_npz``) with
    ``.npz``, as the archives are called, and in ``root`` itself.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is not of the published format.
    """
    found = {half: {name: _find(root, half, name) for name in names} for half, names in _FILES.items()}
    missing = [name for paths in found.values() for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"config.data.root={root} holds no imagenet32: {', '.join(missing)} missing; expected are "
            "Imagenet32_train/train_data_batch_1 … 10 and Imagenet32_val/val_data, or Imagenet32_train_npz/"
            "train_data_batch_1.npz … 10.npz and Imagenet32_val_npz/val_data.npz, from https://image-net.org/download"
        )
    return [_read_half(list(paths.values())) for paths in found.values()]


def _find(root: Path, half: str, name: str) -> Path | None:
    folder = f"Imagenet32_{half}"
    candidates = (root / folder / name, root / f"{folder}_npz" / f"{name}.npz", root / name, root / f"{name}.npz")
    return next((path for path in candidates if path.is_file()), None)


def _read_half(paths: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    batches = [_read_batch(path) for path in paths]
    # The planes stay together in memory, as a model wants them: the training half is 3.9 GB, twice that while read.
    planes = np.concatenate([data.reshape(-1, *_SHAPE) for data, _ in batches])
    return planes.transpose(0, 2, 3, 1), np.concatenate([labels for _, labels in batches])


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows, uint8 (N, 3072), and labels, int64 (N,) from 0, of one file."""
    if path.suffix == ".npz":
        batch = _read_archive(path)
    else:
        batch = load_plain_pickle(path)
        if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
            raise ValueError(f"{path} is not a batch of ImageNet-32x32: it has no data and labels")
    data = batch["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        kind = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path} is not a batch of ImageNet-32x32: data must be uint8 (N, 3072), not {kind}")
    labels = np.asarray(batch["labels"])
    if labels.dtype.kind not in "ui" or labels.shape != (len(data),):
        raise ValueError(f"{path} is not a batch of ImageNet-32x32: {len(data)} images but labels {labels.shape}")
    if len(labels) and not (labels.min() >= 1 and labels.max() <= NUM_CLASSES):
        raise ValueError(
            f"{path} is not a batch of ImageNet-32x32: labels go from {labels.min()} to {labels.max()}, not 1 to 1000"
        )
    return data, labels.astype(np.int64) - 1


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in ("data", "labels")}
    except (KeyError, AttributeError, ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a batch of ImageNet-32x32: {first_line(error)}") from error
