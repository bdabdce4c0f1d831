"""ImageNet-32x32 from files in its published formats."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from traps import Trap

from data import load_dataset

REQUEST = {"dataset": "IMAGENET32", "image_size": 32, "num_channels": 3}


def write(path: Path, batch: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npz":
        np.savez(path, **batch)
    else:
        path.write_bytes(pickle.dumps(batch, 3))


@pytest.fixture(params=["pickles", "pickles, flat", "archives", "archives, flat"])
def published(request, tmp_path):
    """Eleven small batches of distinct sizes, the images and labels that they hold, and how to replace one file."""
    random = np.random.default_rng(0)
    suffix = ".npz" if request.param.startswith("archives") else ""
    suffix_of_folder = "_npz" if suffix else ""
    halves = {"train": [f"train_data_batch_{k}" for k in range(1, 11)], "val": ["val_data"]}
    contents, paths = {}, {}
    for half, names in halves.items():
        folder = tmp_path if request.param.endswith("flat") else tmp_path / f"Imagenet32_{half}{suffix_of_folder}"
        contents[half] = []
        for k, name in enumerate(names, start=1):
            images = random.integers(0, 256, (k + 1, 3, 32, 32), dtype=np.uint8)
            labels = random.integers(1, 1001, k + 1).tolist()
            batch = {"data": images.reshape(-1, 3072), "labels": labels, "mean": images.mean(0).reshape(-1)}
            paths[name] = folder / f"{name}{suffix}"
            write(paths[name], batch)
            contents[half].append((images, labels))
    return tmp_path, contents, paths


def test_published_batches(published):
    root, contents, _ = published
    halves = load_dataset(**REQUEST, root=root)
    for split, name, batches in zip(halves, ("train", "test"), contents.values(), strict=True):
        images, labels = split.batch(torch.arange(len(split)))
        assert np.array_equal(images.numpy(), np.concatenate([images for images, _ in batches]))
        assert labels.tolist() == [label - 1 for _, labels in batches for label in labels]
        assert (split.num_classes, split.num_levels, split.name) == (1000, 256, f"imagenet32-{name}")
        assert split.images.is_contiguous()


def test_missing_batches_are_named(published):
    root, _, paths = published
    for name in ("train_data_batch_4", "val_data"):
        paths[name].unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(**REQUEST, root=root, download=True)
    message = str(caught.value)
    assert f"data.root={root} holds no imagenet32: train_data_batch_4, val_data missing" in message
    for expected in ("Imagenet32_train/", "Imagenet32_val/val_data", "Imagenet32_val_npz/val_data.npz"):
        assert expected in message
    assert "\n" not in message
    with pytest.raises(ValueError, match=r"data\.root is not set"):
        load_dataset(**REQUEST, root="")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data": np.zeros((3, 3071), np.uint8)}, r"uint8 \(N, 3072\), not uint8 \(3, 3071\)"),
        ({"data": np.zeros((3, 3072))}, r"not float64 \(3, 3072\)"),
        ({"labels": [1, 2]}, r"3 images but labels int64 \(2,\)"),
        ({"labels": [0, 1, 2]}, r"labels go from 0 to 2, not 1 to 1000"),
        ({"labels": [1.5, 1.0, 2.0]}, r"labels float64 \(3,\)"),
        ({"labels": None}, "labels"),
        ({"labels": ["1", "2", "3"]}, r"labels (are not numbers|<U1)"),
        ({"data": [b"pixels"] * 3}, r"data (is a list, not an array|must be uint8)"),
    ],
    ids=str,
)
def test_batches_of_another_kind(published, change, message):
    root, _, paths = published
    batch = {"data": np.zeros((3, 3072), np.uint8), "labels": [1, 2, 3]} | change
    write(paths["train_data_batch_7"], {name: value for name, value in batch.items() if value is not None})
    with pytest.raises(ValueError, match=rf"train_data_batch_7\S* is not a batch of ImageNet-32x32: .*{message}"):
        load_dataset(**REQUEST, root=root)


def test_nothing_in_a_batch_is_executed(published):
    root, _, paths = published
    trace = root / "executed"
    path = paths["train_data_batch_2"]
    original = path.read_bytes()
    path.write_bytes(pickle.dumps({"data": Trap(trace), "labels": []}))
    with pytest.raises(
        ValueError, match=r"train_data_batch_2.* is (not a pickle of plain data|not a batch|missing or damaged)"
    ):
        load_dataset(**REQUEST, root=root)
    path.write_bytes(original[: len(original) // 2])
    with pytest.raises(
        ValueError, match=r"train_data_batch_2.* is (not a pickle of plain data|not a batch|missing or damaged)"
    ):
        load_dataset(**REQUEST, root=root)
    assert not trace.exists()
