"""Datasets: what each loader must deliver and refuse."""

from __future__ import annotations

import pickle
import zipfile

import ml_collections
import numpy as np
import pytest
import torch
from from_config import get_dataset
from image_files import refused
from traps import Trap

from data import TensorSplit, load_dataset, sets

# ------------------------------------------------------------------------------------------------------------ digits


def test_digits_split_is_fixed_stratified_and_complete():
    from sklearn.datasets import load_digits

    train, test = load_dataset("digits", image_size=8, num_channels=1)
    assert (len(train), len(test)) == (1437, 360)
    assert train.shape == test.shape == (1, 8, 8)
    assert (train.num_levels, train.num_classes) == (17, 10)
    assert (train.name, test.name) == ("digits-train", "digits-test")
    # Pinned: any change of the split, of scikit-learn's data or of the hash shows here.
    assert (train.fingerprint, test.fingerprint) == ("a0c4ba40d611c9a0", "bb1914cf3e6617c9")
    # Stratified: within one image of a fifth of each class (360 of 1797).
    counts = np.bincount(load_digits().target)
    assert np.abs(torch.bincount(test.labels).numpy() - counts * 360 / 1797).max() < 1
    # Disjoint and covering: together the halves are scikit-learn's rows, each once (all 1797 rows differ).
    original = {
        row.tobytes() + bytes([label])
        for row, label in zip(load_digits().images.astype(np.uint8), load_digits().target, strict=True)
    }
    rows = []
    for half in (train, test):
        images, labels = half.batch(torch.arange(len(half)))
        assert images.dtype == torch.uint8 and labels.dtype == torch.int64
        rows += [i.numpy().tobytes() + bytes([k]) for i, k in zip(images, labels.tolist(), strict=True)]
    assert len(rows) == len(set(rows)) == len(original) == 1797
    assert set(rows) == original


def test_batch_returns_the_requested_images_in_order():
    train, _ = load_dataset("digits", image_size=8, num_channels=1)
    images, labels = train.batch([5, 2, 5])
    assert images.shape == (3, 1, 8, 8)
    assert torch.equal(images[0], images[2]) and torch.equal(images[1], train.batch(torch.tensor([2]))[0][0])
    assert labels.tolist() == [train.labels[5], train.labels[2], train.labels[5]]


def test_factory_reads_the_config_and_ignores_case():
    config = ml_collections.ConfigDict()
    config.data = ml_collections.ConfigDict(
        {"dataset": "DIGITS", "image_size": 8, "num_channels": 1, "path": "", "root": "", "download": False}
    )
    config.data.resize = False
    assert get_dataset(config)[0].fingerprint == "a0c4ba40d611c9a0"
    config.data.image_size = 16
    with pytest.raises(ValueError, match=r"data.image_size=16.*8x8.*--config.data.resize=True"):
        get_dataset(config)
    config.data.resize = True
    train, _ = get_dataset(config)
    assert train.shape == (1, 16, 16) and train.images.max() <= 16


def test_wrong_requests_are_refused():
    known = "data.dataset='cifar11': allowed are digits, npz, folder, array, mnist, cifar10, cifar100, svhn, "
    refused(ValueError, known, dataset="cifar11", image_size=8, num_channels=1)
    refused(ValueError, "data.num_channels=3", "1-channel", dataset="digits", image_size=8, num_channels=3)
    refused(ValueError, "data.path=a.npz", "digits", dataset="digits", image_size=8, num_channels=1, path="a.npz")
    refused(ValueError, "data.path is not set", dataset="npz", image_size=8, num_channels=1, path="")
    refused(ValueError, "data.path is not set", dataset="folder", image_size=8, num_channels=1)


def pictures(size: int = 4, count: int = 3) -> TensorSplit:
    return TensorSplit("mine", torch.arange(count * size**2, dtype=torch.uint8).reshape(count, 1, size, size), None)


def test_a_set_of_ones_own_by_its_import_path(monkeypatch):
    """It is given the fields of the config, path included, and its images must be those that they describe."""
    requests = []

    def load(**request):
        requests.append(request)
        return pictures(request["image_size"]), pictures(count=0 if request["root"] else 2)

    monkeypatch.setattr(sets, "of_a_test", load, raising=False)
    request = {"image_size": 4, "num_channels": 1, "path": "x.dat", "root": "", "download": False, "resize": True}
    train, test = load_dataset("data.sets:of_a_test", **request)
    assert (len(train), len(test)) == (3, 2) and requests == [
        request | {"shape": (1, 4, 4), "num_levels": 0, "background": "white"}
    ]
    request["dataset"] = "data.sets:of_a_test"
    refused(ValueError, "data.image_size=5", "mine", "4x4", **request | {"image_size": 5})
    refused(ValueError, "data.num_channels=3", "1-channel", **request | {"num_channels": 3})
    refused(ValueError, "data.dataset='data.sets:of_a_test'", "no images", **request | {"root": "y"})


def test_tensors_that_are_no_images_are_refused():
    images = pictures().images
    for wrong in (images.float(), images[0]):
        with pytest.raises(ValueError, match=r"mine: images must be uint8 \(N, C, H, W\), not torch\."):
            TensorSplit("mine", wrong, None)
    with pytest.raises(ValueError, match=r"mine: 3 images but labels of shape \(3, 1\)"):
        TensorSplit("mine", images, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="mine: labels go from 0 to 255, not 0 to 9"):  # as of a damaged file of MNIST
        TensorSplit("mine", images, torch.tensor([0, 255, 3]), num_classes=10)


# --------------------------------------------------------------------------------------------------------------- npz


def arrays(channels: int | None = None, size: int = 6) -> dict[str, np.ndarray]:
    """Genuinely random images: 12 for training, 5 for testing, classes 0 … 2."""
    random = np.random.default_rng(0)
    shape = (size, size) if channels is None else (size, size, channels)
    return {
        "train_images": random.integers(0, 256, (12, *shape), dtype=np.uint8),
        "train_labels": np.arange(12, dtype=np.uint8) % 3,
        "test_images": random.integers(0, 256, (5, *shape), dtype=np.uint8),
        "test_labels": np.array([0, 1, 2, 0, 1], dtype=np.int32),
    }


@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_round_trip(tmp_path, channels, labelled, save):
    data = {k: v for k, v in arrays(channels).items() if labelled or k.endswith("images")}
    save(tmp_path / "mine.npz", **data)
    halves = load_dataset("npz", image_size=6, num_channels=channels or 1, path=tmp_path / "mine.npz")
    for half, split in zip(("train", "test"), halves, strict=True):
        images, labels = split.batch(torch.arange(len(split)))
        assert np.array_equal(
            images.permute(0, 2, 3, 1).numpy(), data[f"{half}_images"].reshape(-1, 6, 6, channels or 1)
        )
        assert labels.dtype == torch.int64
        assert labels.tolist() == (data[f"{half}_labels"].tolist() if labelled else [0] * len(split))
        assert split.num_classes == (3 if labelled else None)
        assert split.num_levels == 256 and split.name == f"mine-{half}"


def test_npz_fingerprint_follows_contents_not_name(tmp_path):
    data = arrays()

    def fingerprint(name: str) -> str:
        np.savez(tmp_path / name, **data)
        return load_dataset("npz", image_size=6, num_channels=1, path=tmp_path / name)[0].fingerprint

    first = fingerprint("a.npz")
    assert fingerprint("b.npz") == first
    data["train_images"][7, 2, 3] ^= 1
    second = fingerprint("a.npz")
    data["train_labels"][0] = 2
    assert len({first, second, fingerprint("a.npz")}) == 3


def test_npz_resize_crops_to_the_centre_and_averages(tmp_path):
    data = arrays()
    stripes = np.zeros((5, 16, 20), dtype=np.uint8)
    stripes[:, :, 2:18:2] = 255  # in the central square alternate columns are white
    stripes[:, :, [0, 1, 18, 19]] = 255
    data["test_images"] = stripes
    np.savez(tmp_path / "a.npz", **data)
    _, test = load_dataset("npz", image_size=4, num_channels=1, path=tmp_path / "a.npz", resize=True)
    images, _ = test.batch([0, 4])
    # An aliasing filter would return 0 or 255; the widened one sees the mean, 127.5, up to the edges of the square.
    assert images.shape == (2, 1, 4, 4)
    assert (images.double() - 127.5).abs().max() < 20


def corrupted(**changes) -> dict[str, np.ndarray]:
    return {k: v for k, v in {**arrays(), **changes}.items() if v is not None}


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"test_images": None}, ["lacks test_images", "train_images"]),
        ({"train_images": None, "test_images": None}, ["lacks train_images, test_images"]),
        ({"test_labels": None}, ["lacks test_labels"]),
        ({"train_images": arrays()["train_images"] / np.float32(255)}, ["train_images", "float32", "uint8"]),
        (
            {"train_images": arrays(size=7)["train_images"]},
            ["data.image_size=6", "a-train", "7x7", "resize=True"],
        ),
        ({"test_images": arrays(channels=3)["test_images"]}, ["data.num_channels=1", "a-test", "3-channel"]),
        ({"train_images": np.zeros((12, 3, 6, 6), np.uint8)}, ["data.num_channels=1", "a-train", "6-channel"]),
        ({"train_images": np.zeros((12, 36), np.uint8)}, ["train_images", "(12, 36)"]),
        ({"train_images": np.zeros((0, 6, 6), np.uint8), "train_labels": np.zeros(0, int)}, ["a-train", "no images"]),
        ({"train_labels": np.zeros(11, int)}, ["a-train", "12 images", "(11,)"]),
        ({"train_labels": np.zeros((12, 2), int)}, ["a-train", "(12, 2)"]),
        ({"train_labels": np.zeros(12)}, ["train_labels", "float64", "integers"]),
        ({"train_labels": np.arange(-1, 11)}, ["a-train", "labels go from -1 to 10, not 0 to 10"]),
        ({"train_labels": np.full(12, 100_000)}, ["a-train", "no image is of class 0; 1 of 100001 classes have any"]),
        ({"train_labels": np.full(12, 2**63, np.uint64)}, ["data.path", "train_labels", "9223372036854775808"]),
    ],
)
def test_npz_contents_that_do_not_fit(tmp_path, changes, fragments):
    np.savez(tmp_path / "a.npz", **corrupted(**changes))
    refused(ValueError, *fragments, dataset="npz", image_size=6, num_channels=1, path=tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(train_labels=1 + np.arange(12) % 3),
            r"a-train: no image is of class 0; 3 of 4 classes .* from 0 without gaps",
        ),
        (dict(train_labels=np.arange(12) % 3 * 2), r"a-train: no image is of class 1; 3 of 5 "),
        (dict(test_labels=np.full(5, 70_000)), r"a-train: no image is of class 3; 3 of 70001 "),
        (dict(train_images=arrays()["train_images"] % 2, test_images=arrays()["test_images"] % 2), r"level 1 of 255"),
        (dict(train_images=arrays()["train_images"] // 16, test_images=arrays()["test_images"] // 16), r"level 15 of"),
    ],
)
def test_npz_without_images_of_a_class_or_of_few_levels(changes, message, tmp_path):
    np.savez(tmp_path / "a.npz", **corrupted(**changes))
    with pytest.raises(ValueError, match=message):
        load_dataset("npz", image_size=6, num_channels=1, path=tmp_path / "a.npz")


def test_labels_in_a_column_and_images_in_both_halves(tmp_path, caplog):
    """Labels of shape (N, 1) are those of shape (N,). What each half holds is said, and what they share."""
    data = arrays()
    data["test_images"][3] = data["train_images"][7]
    np.savez(tmp_path / "a.npz", **data | {key: data[key][:, None] for key in ("train_labels", "test_labels")})
    train, test = load_dataset("npz", image_size=6, num_channels=1, path=tmp_path / "a.npz")
    assert train.labels.tolist() == data["train_labels"].tolist()
    assert sets.describe(train, test) == "12 training and 5 test images of 3 classes"
    assert "1 of 5 test images are training images, too: 3 …" in caplog.text


def test_labels_that_are_no_classes_are_refused(monkeypatch):
    def load(**_):
        labels = torch.tensor([0, 1, 255])  # as in a damaged file of MNIST
        return [TensorSplit("mine", pictures().images, labels, num_classes=10) for _ in range(2)]

    monkeypatch.setattr(sets, "of_a_test", load, raising=False)
    refused(
        ValueError, "labels go from 0 to 255, not 0 to 9", dataset="data.sets:of_a_test", image_size=4, num_channels=1
    )


def test_npz_never_unpickles(tmp_path):
    """An array of objects is a pickle; one that would leave a trace when loaded must not be."""
    trace = tmp_path / "executed"
    trap = np.empty((12,), dtype=object)
    trap[:] = Trap(trace)
    np.savez(tmp_path / "a.npz", **corrupted(train_images=trap))
    refused(ValueError, "a.npz", "allow_pickle", dataset="npz", image_size=6, num_channels=1, path=tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes(pickle.dumps(Trap(trace)))
    refused(ValueError, "b.npz", dataset="npz", image_size=6, num_channels=1, path=tmp_path / "b.npz")
    assert not trace.exists()
    function, arguments = Trap(trace).__reduce__()
    function(*arguments)  # what unpickling would do
    assert trace.exists()  # the trap works


def test_npz_files_that_are_damaged_or_absent(tmp_path):
    def wants(error, name, *fragments):
        path = tmp_path / name
        refused(error, str(path), *fragments, dataset="npz", image_size=6, num_channels=1, path=path)

    np.savez(tmp_path / "whole.npz", **arrays())
    whole = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole[: len(whole) // 2])
    wants(ValueError, "short.npz", "data.path")
    with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
        start = archive.getinfo("test_images.npy").header_offset
    flipped = bytearray(whole)
    flipped[start + 250] ^= 255  # one pixel: only the checksum of the archive can tell
    (tmp_path / "flipped.npz").write_bytes(flipped)
    wants(ValueError, "flipped.npz", "CRC")
    (tmp_path / "empty.npz").write_bytes(b"")
    wants(ValueError, "empty.npz")
    (tmp_path / "text.npz").write_text("not an archive")
    wants(ValueError, "text.npz")
    with (tmp_path / "single.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    wants(ValueError, "single.npz")
    wants(ValueError, "absent.npz", "No such file")
    with zipfile.ZipFile(tmp_path / "member.npz", "w") as archive:
        archive.writestr("train_images.npy", b"hello")
        archive.writestr("test_images.npy", b"hello")
    wants(ValueError, "member.npz")
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        for half in ("train", "test"):
            with archive.open(f"{half}_images.npy", "w") as file:
                np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (10**15,)})
    wants(ValueError, "huge.npz")
    encrypted = bytearray(whole)
    for start in (i for i in range(len(encrypted)) if encrypted[i : i + 4] == b"PK\x01\x02"):
        encrypted[start + 8] |= 1  # the flag in the central directory, and below in the member's own header
    for start in (i for i in range(len(encrypted)) if encrypted[i : i + 4] == b"PK\x03\x04"):
        encrypted[start + 6] |= 1
    (tmp_path / "encrypted.npz").write_bytes(encrypted)
    wants(ValueError, "encrypted.npz", "encrypted")
    wants(ValueError, "", "no regular file")
