"""Sets that torchvision reads, from small files in their formats: what must be delivered and refused."""

from __future__ import annotations

import hashlib
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from image_files import refused, save
from traps import Trap

from data import load_dataset

# ------------------------------------------------------------------------------------------------------- torchvision


NATIVE = {"mnist": (28, 1), "cifar10": (32, 3), "cifar100": (32, 3), "svhn": (32, 3), "celeba": (64, 3)}


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", NATIVE)
def test_missing_torchvision_set(tmp_path, name):
    size, channels = NATIVE[name]
    refused(
        FileNotFoundError,
        f"data.root={tmp_path}",
        name,
        "--config.data.download=True",
        dataset=name.upper(),
        image_size=size,
        num_channels=channels,
        root=tmp_path,
    )
    assert not list(tmp_path.iterdir())  # nothing is fetched unasked
    refused(ValueError, "data.root is not set", name, dataset=name, image_size=size, num_channels=channels, root="")


def test_download_is_passed_on_and_its_failure_reported(tmp_path, monkeypatch):
    import torchvision

    def offline(self):
        raise RuntimeError("no network\nat all")

    monkeypatch.setattr(torchvision.datasets.SVHN, "download", offline)
    refused(
        FileNotFoundError,
        f"data.root={tmp_path}",
        "could not be fetched",
        "no network",
        dataset="svhn",
        image_size=32,
        num_channels=3,
        root=tmp_path,
        download=True,
    )


def test_mnist_from_idx_files(tmp_path):
    """Files in the published format: magic number, sizes as big-endian integers, bytes."""
    random = np.random.default_rng(0)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    written = {}
    for half, prefix, count in (("train", "train", 20), ("test", "t10k", 7)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = random.integers(0, 10, count, dtype=np.uint8)
        header = struct.pack(">IIII", 0x803, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, count) + labels.tobytes())
        written[half] = images, labels
    halves = load_dataset("MNIST", image_size=28, num_channels=1, root=tmp_path)
    for split, (images, labels) in zip(halves, written.values(), strict=True):
        got, got_labels = split.batch(torch.arange(len(split)))
        assert np.array_equal(got[:, 0].numpy(), images) and got_labels.tolist() == labels.tolist()
        assert split.num_classes == 10 and split.num_levels == 256
    refused(
        ValueError,
        "data.image_size=32",
        "28x28",
        "resize=True",
        dataset="mnist",
        image_size=32,
        num_channels=1,
        root=tmp_path,
    )
    refused(ValueError, "data.num_channels=3", dataset="mnist", image_size=28, num_channels=3, root=tmp_path)
    train, _ = load_dataset("mnist", image_size=32, num_channels=1, root=tmp_path, resize=True)
    assert train.batch([3])[0].shape == (1, 1, 32, 32)
    (raw / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes()[:-1])
    refused(FileNotFoundError, "mnist (test)", dataset="mnist", image_size=28, num_channels=1, root=tmp_path)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_from_batches_with_the_right_checksum_only(tmp_path, monkeypatch, num_classes):
    import torchvision

    cls = {10: torchvision.datasets.CIFAR10, 100: torchvision.datasets.CIFAR100}[num_classes]
    folder = tmp_path / cls.base_folder
    folder.mkdir()
    random = np.random.default_rng(0)
    expected = {}
    for half in ("train_list", "test_list"):
        published = getattr(cls, half)
        expected[half] = [], []
        for file, _ in published:
            pixels = random.integers(0, 256, (4, 3, 32, 32), dtype=np.uint8)
            labels = random.integers(0, num_classes, 4).tolist()
            batch = {"data": pixels.reshape(4, -1), "labels" if num_classes == 10 else "fine_labels": labels}
            (folder / file).write_bytes(pickle.dumps(batch))
            expected[half][0].append(pixels)
            expected[half][1].extend(labels)
        monkeypatch.setattr(cls, half, [[file, md5(folder / file)] for file, _ in published])
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({cls.meta["key"]: ["name"]}))
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(meta)})
    request = {"dataset": f"CIFAR{num_classes}", "image_size": 32, "num_channels": 3, "root": tmp_path}
    for split, (pixels, labels) in zip(load_dataset(**request), expected.values(), strict=True):
        got, got_labels = split.batch(torch.arange(len(split)))
        assert np.array_equal(got.numpy(), np.concatenate(pixels)) and got_labels.tolist() == labels
        assert split.num_classes == num_classes

    # A file of another content is not unpickled: the trap must not spring.
    trace = tmp_path / "executed"
    for file in (cls.train_list[0][0], cls.meta["filename"]):
        original = (folder / file).read_bytes()
        (folder / file).write_bytes(pickle.dumps(Trap(trace)))
        refused(FileNotFoundError, f"data.root={tmp_path}", f"cifar{num_classes}", **request)
        (folder / file).write_bytes(original)
    assert not trace.exists()


def test_svhn_from_mat_files(tmp_path, monkeypatch):
    import torchvision

    random = np.random.default_rng(0)
    written = {}
    published = dict(torchvision.datasets.SVHN.split_list)
    for half, count in (("train", 6), ("test", 3)):
        images = random.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8)
        labels = np.array([10, 1, 9, 2, 10, 3])[:count]  # the files call the digit 0 "10"
        path = tmp_path / f"{half}_32x32.mat"
        scipy.io.savemat(path, {"X": images.transpose(2, 3, 1, 0), "y": labels[:, None]})
        published[half] = [published[half][0], path.name, md5(path)]
        written[half] = images, labels % 10
    request = {"dataset": "svhn", "image_size": 32, "num_channels": 3, "root": tmp_path}
    refused(FileNotFoundError, "svhn", **request)  # not the published files
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", published)
    for split, (images, labels) in zip(load_dataset(**request), written.values(), strict=True):
        got, got_labels = split.batch(torch.arange(len(split)))
        assert np.array_equal(got.numpy(), images) and got_labels.tolist() == labels.tolist()


def test_celeba_is_cropped_to_the_central_140_pixels(tmp_path, monkeypatch):
    import torchvision

    base = tmp_path / "celeba"
    names = [f"{k:06d}.jpg" for k in range(1, 7)]
    halves = [0, 0, 0, 1, 2, 2]  # train, validation, test
    lists = {
        "list_eval_partition.txt": [f"{n} {h}" for n, h in zip(names, halves, strict=True)],
        "identity_CelebA.txt": [f"{n} 1" for n in names],
        "list_attr_celeba.txt": ["6", "Smiling Young", *(f"{n}  1 -1" for n in names)],
        "list_bbox_celeba.txt": ["6", "image_id x_1 y_1 width height", *(f"{n} 1 2 3 4" for n in names)],
        "list_landmarks_align_celeba.txt": ["6", "lefteye_x lefteye_y", *(f"{n} 1 2" for n in names)],
    }
    base.mkdir()
    for file, lines in lists.items():
        (base / file).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(torchvision.datasets.CelebA, "file_list", [("", md5(base / file), file) for file in lists])
    for k, name in enumerate(names):
        face = np.full((218, 178, 3), 255, dtype=np.uint8)
        face[39 : 39 + 140, 19 : 19 + 140] = 20 * k  # ⌊(218 − 140)/2⌋ = 39, ⌊(178 − 140)/2⌋ = 19
        # Stored without loss under the published names, so that the border of the crop is sharp.
        save(base / "img_align_celeba" / name, face, format="png")
    train, test = load_dataset("CELEBA", image_size=64, num_channels=3, root=tmp_path)
    assert (len(train), len(test)) == (3, 2)
    assert train.num_classes is None and train.shape == (3, 64, 64)
    for split, values in ((train, [0, 20, 40]), (test, [80, 100])):
        images, labels = split.batch(torch.arange(len(split)))
        assert torch.equal(images, torch.tensor(values, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 64, 64))
        assert not labels.any()
    (base / "img_align_celeba" / names[4]).unlink()
    refused(FileNotFoundError, names[4], dataset="celeba", image_size=64, num_channels=3, root=tmp_path)
