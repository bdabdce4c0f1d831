"""Published sets as arrays: those of torchvision, and ImageNet-32x32 from the files in which it is published.

ImageNet-32x32 (Chrabaszcz, Loshchilov & Hutter, 2017, arXiv:1707.08819) is ten batches of training images and one of
validation images, either pickles, ``train_data_batch_1`` … ``_10`` and ``val_data``, or the same with ``.npz``:
``data``, uint8 (N, 3072), each row the red, green and blue plane of an image, and ``labels``, from 1 to 1000. They are
on image-net.org, to be fetched by hand after signing in there. The pickles are read as plain data, nothing in them is
executed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.plain_pickle import load_plain_pickle
from experiment.files import first_line, read_arrays

__all__ = ["ROOT", "SETS", "celeba"]

ROOT = "the folder that holds it, or (torchvision's sets) into which --config.data.download=True puts it"
Arrays = list[tuple[np.ndarray, np.ndarray]]
"""Of train and test: images, uint8 (N, H, W, C), and labels (N,) from 0."""


# ------------------------------------------------------------------------------------------------------- torchvision


def _from_torchvision(name: str, half: str, root: Path, download: bool, **options: object) -> Any:
    """The object of torchvision for one half.

    The CIFAR files are pickles. torchvision compares their MD5 sums with the published ones in the constructor,
    whether or not it downloads, before it unpickles anything (likewise SVHN's .mat files, which are no pickles), so
    only the published bytes are ever unpickled. It does not check MNIST's files, which are plain arrays.
    """
    import torchvision.datasets  # slow to import, and not needed for other sets

    cls = getattr(torchvision.datasets, name)
    try:
        return cls(root, download=download, **options)
    except (RuntimeError, OSError, ImportError, AssertionError, KeyError, TypeError, ValueError) as error:
        # Whatever torchvision stumbles over in these files means that the set is not there in full.
        remedy = "it could not be fetched" if download else "--config.data.download=True fetches it"
        raise FileNotFoundError(
            f"data.root={root} holds no intact {name.lower()} ({half}); {remedy} ({first_line(error)})"
        ) from error


def _mnist(root: Path, download: bool) -> Arrays:
    halves = [_from_torchvision("MNIST", half, root, download, train=half == "train") for half in ("train", "test")]
    return [(half.data.numpy()[..., None], half.targets.numpy()) for half in halves]


def _cifar(name: str, root: Path, download: bool) -> Arrays:
    halves = [_from_torchvision(name, half, root, download, train=half == "train") for half in ("train", "test")]
    return [(half.data, np.asarray(half.targets)) for half in halves]


def _svhn(root: Path, download: bool) -> Arrays:
    halves = [_from_torchvision("SVHN", half, root, download, split=half) for half in ("train", "test")]
    return [(half.data.transpose(0, 2, 3, 1), half.labels) for half in halves]


def celeba(root: Path, download: bool) -> tuple[Path, dict[str, list[str]]]:
    """The folder of all aligned faces, and the names of those of train and test."""
    halves = {half: _from_torchvision("CelebA", half, root, download, split=half) for half in ("train", "test")}
    train = halves["train"]
    folder = Path(train.root) / train.base_folder / "img_align_celeba"
    return folder, {name: list(half.filename) for name, half in halves.items()}


# ---------------------------------------------------------------------------------------------------- ImageNet-32x32

_FILES = {"train": [f"train_data_batch_{k}" for k in range(1, 11)], "val": ["val_data"]}


def _imagenet32(root: Path, download: bool) -> Arrays:
    """A file is looked for in ``root/Imagenet32_train`` (``_val``), or ``Imagenet32_train_npz`` (``_val_npz``) with
    ``.npz``, as the archives are called, and in ``root`` itself. The official validation images are the test half."""
    found = {half: {name: _find(root, half, name) for name in names} for half, names in _FILES.items()}
    missing = [name for paths in found.values() for name, path in paths.items() if path is None]
    if missing:
        raise FileNotFoundError(
            f"data.root={root} holds no imagenet32: {', '.join(missing)} missing; expected are "
            "Imagenet32_train/train_data_batch_1 … 10 and Imagenet32_val/val_data, or Imagenet32_train_npz/"
            "train_data_batch_1.npz … 10.npz and Imagenet32_val_npz/val_data.npz, from https://image-net.org/download"
        )
    halves = []
    for paths in found.values():
        batches = [_read_batch(path) for path in paths.values()]
        # The planes stay together in memory, as a model wants them: the training half is 3.9 GB, twice that while read.
        planes = np.concatenate([data.reshape(-1, 3, 32, 32) for data, _ in batches])
        halves.append((planes.transpose(0, 2, 3, 1), np.concatenate([labels for _, labels in batches])))
    return halves


def _find(root: Path, half: str, name: str) -> Path | None:
    folder = f"Imagenet32_{half}"
    candidates = (root / folder / name, root / f"{folder}_npz" / f"{name}.npz", root / name, root / f"{name}.npz")
    return next((path for path in candidates if path.is_file()), None)


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Rows, uint8 (N, 3072), and labels, int64 (N,) from 0, of one file.

    Raises:
        ValueError: the file is not of the published format.
    """
    batch = read_arrays(path) if path.suffix == ".npz" else load_plain_pickle(path)
    wrong = f"{path} is not a batch of ImageNet-32x32"
    if not isinstance(batch, dict) or not {"data", "labels"} <= batch.keys():
        raise ValueError(f"{wrong}: it has no data and labels")
    # Of a list of strings NumPy would make each as long as the longest.
    if isinstance(batch["labels"], list) and not all(isinstance(label, int | float) for label in batch["labels"]):
        raise ValueError(f"{wrong}: labels are not numbers")
    if not isinstance(batch["data"], np.ndarray):
        raise ValueError(f"{wrong}: data is a {type(batch['data']).__name__}, not an array")
    data, labels = batch["data"], np.asarray(batch["labels"])
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
        raise ValueError(f"{wrong}: data must be uint8 (N, 3072), not {data.dtype} {data.shape}")
    if labels.dtype.kind not in "ui" or labels.shape != (len(data),):
        raise ValueError(f"{wrong}: {len(data)} images but labels {labels.dtype} {labels.shape}")
    if labels.min(initial=1) < 1 or labels.max(initial=1) > 1000:
        raise ValueError(f"{wrong}: labels go from {labels.min()} to {labels.max()}, not 1 to 1000")
    return data, labels.astype(np.int64) - 1


SETS: dict[str, tuple[Callable[[Path, bool], Arrays], int]] = {
    "mnist": (_mnist, 10),
    "cifar10": (partial(_cifar, "CIFAR10"), 10),
    "cifar100": (partial(_cifar, "CIFAR100"), 100),
    "svhn": (_svhn, 10),
    "imagenet32": (_imagenet32, 1000),
}
"""What reads a set from its root, fetching it if it may, and the number of classes."""
