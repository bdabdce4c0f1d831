"""Arrays as splits: values, labels and splits as the files have them, larger than memory; and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import refused
from PIL import Image
from torch.utils.data import TensorDataset

from data import ArraySplit, DatasetSplit, HuggingFaceSplit, load_dataset

ROOT = Path(__file__).parents[2]


def arrays(shape: tuple[int, ...], dtype: str = "f4", seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    halves = {"train": 12, "test": 5}
    if np.dtype(dtype).kind == "u":
        return {half: random.integers(0, np.iinfo(dtype).max, (n, *shape), dtype, True) for half, n in halves.items()}
    return {half: random.standard_normal((n, *shape)).astype(dtype) for half, n in halves.items()}


def written(folder: Path, kind: str, content: dict[str, np.ndarray]) -> Path:
    if kind == "folder":
        for name, array in content.items():
            np.save(folder / f"{name}.npy", array)
        return folder
    path = folder / f"set.{'h5' if kind == 'h5' else 'npz'}"
    if kind == "h5":
        with pytest.importorskip("h5py").File(path, "w") as file:
            file.update(content)
    else:
        {"npz": np.savez, "compressed": np.savez_compressed}[kind](path, **content)
    return path


@pytest.mark.parametrize("kind", ["folder", "npz", "compressed", "h5"])
@pytest.mark.parametrize(("shape", "dtype"), [((3,), "f8"), ((2, 5), "f4"), ((1, 2, 3, 4), "u2"), ((5, 4, 6), "u1")])
def test_a_file_is_read_as_it_was_written(tmp_path, kind, shape, dtype):
    """Values, labels, levels and halves; and the fingerprint is that of the contents, not of the file."""
    content = arrays(shape, dtype)
    labels = {"train_labels": np.arange(12) % 3, "test_labels": np.arange(5) % 3}
    path = written(tmp_path, kind, content | labels)
    halves = load_dataset("array", shape=shape, path=path)
    for half, split in zip(("train", "test"), halves, strict=True):
        chosen = [4, 0, 3]
        values, classes = split.batch(chosen)
        wanted = content[half][chosen].astype(np.int32 if dtype == "u2" else dtype)
        assert values.numpy().dtype == wanted.dtype and np.array_equal(values.numpy(), wanted)
        assert classes.tolist() == [1, 0, 0] and len(split) == len(content[half])
        assert (split.shape, split.num_classes) == (shape, 3)
        assert split.num_levels == {"u1": 256, "u2": 65536}.get(dtype)
        assert split.fingerprint == ArraySplit("x", content[half], labels[f"{half}_labels"], num_classes=3).fingerprint
    assert halves[0].fingerprint != halves[1].fingerprint


@pytest.mark.parametrize(("item", "shape"), [((3, 4), (2, 3, 4)), ((3, 4), (6, 4)), ((4,), (8,))])
def test_complex_numbers_are_two_channels(item, shape):
    values = arrays(item, "c8")["train"]
    found = ArraySplit("x", values, shape=shape).batch(range(12))[0].numpy()
    real, imaginary = found.reshape(12, 2, *item).swapaxes(0, 1)
    assert found.dtype == np.float32 and np.array_equal(real + 1j * imaginary, values)


@pytest.mark.slow
def test_a_file_may_be_larger_than_the_memory_of_the_process(tmp_path):
    """Rows of a file of 4 GB, none of which takes memory on disk, with 200 MB of address space left."""
    code = """
import resource, sys
from pathlib import Path
import numpy as np
from data.arrays import _Rows
header = Path(sys.argv[1])
with open(header, "wb") as file:
    np.lib.format.write_array_header_1_0(file, {"descr": "<f8", "fortran_order": False, "shape": (1000, 1, 2**19)})
    start = file.tell()
    file.seek(start + 8 * 2**19 * 999)
    file.write(np.full(2**19, 7.0).tobytes())
size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 200 * 2**20,) * 2)
rows = _Rows(header)
assert rows[999].min() == 7 and rows[500].max() == 0
try:
    np.load(header, mmap_mode="r", allow_pickle=False)
except OSError:
    print("not to be mapped")
"""
    run = [sys.executable, "-c", code, str(tmp_path / "big.npy")]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "not to be mapped", done.stderr


def test_data_sets_of_other_libraries_are_adapted():
    values = torch.rand(6, 2, 5)
    classes = torch.arange(6) % 2
    of_torch = DatasetSplit("torch", TensorDataset(values, classes), num_classes=2)
    assert torch.equal(of_torch.batch([5, 2])[0], values[[5, 2]]) and of_torch.batch([5, 2])[1].tolist() == [1, 0]
    assert DatasetSplit("unlabelled", TensorDataset(values)).batch([3])[1].tolist() == [0]
    # A Hugging Face data set gives a dictionary for an index.
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    rows = [{"image": Image.fromarray(image), "digit": k % 2} for k, image in enumerate(pixels)]
    split = HuggingFaceSplit("hf", rows, column="image", label_column="digit", num_classes=2)
    levels, digits = split.batch([2, 1])
    assert (split.shape, split.num_levels, digits.tolist()) == ((3, 6, 5), 256, [0, 1])
    assert np.array_equal(levels.permute(0, 2, 3, 1).numpy(), pixels[[2, 1]])
    with pytest.raises(ValueError, match=r"^hf: no column 'picture'; it has image, digit$"):
        HuggingFaceSplit("hf", rows, column="picture")


class Bare(ArraySplit):
    def batch(self, indices):
        return np.stack([self.items[i] for i in indices])


def own(*, path: str, **_) -> object:
    halves = ArraySplit("a", np.zeros((3, 2, 4))), ArraySplit("b", np.zeros((3, 2, 4)))
    bare = Bare("a", np.zeros((3, 2, 4))), Bare("b", np.zeros((3, 2, 4)))
    return {"": halves, "bare": bare, "one": halves[:1], "arrays": (np.zeros(3), np.zeros(3)), "nothing": None}[path]


@pytest.mark.parametrize("path", ["one", "arrays", "nothing"])
def test_a_function_that_returns_something_else_is_refused(path):
    name = f"{__name__}:own"
    sys.modules[__name__].own = own
    assert load_dataset(name, shape=(2, 4))[0].shape == (2, 4)
    refused(ValueError, name, "two splits, train and test", dataset=name, shape=(2, 4), path=path)
    refused(ValueError, "a: batch([0]) gives a ndarray, not", dataset=name, shape=(2, 4), path="bare")
    refused(ValueError, "data.shape=(2, 5)", "a has items of shape (2, 4)", dataset=name, shape=(2, 5))


def test_files_that_do_not_fit_are_refused(tmp_path):
    """One line each, of the file and what is wrong."""
    good = arrays((2, 5))
    cases = [
        ({"train": good["train"]}, "lacks test (it has train)"),
        (good | {"test_labels": np.zeros(5, int)}, "lacks train_labels"),
        (good | {"train": np.array([{}] * 3)}, "holds objects"),
        (good | {"test": good["test"].astype("U8")}, "<U8: allowed are floating-point and complex numbers"),
        (good | {"train": (100 * good["train"]).astype(int)}, "int64: allowed are"),
        (good | {"train": np.asfortranarray(good["train"])}, "Fortran"),
        (good | {"train": good["train"][:0]}, "set-train holds no items"),
        (good | {"test": np.zeros((5, 2, 5), np.uint8)}, "set-train has no levels, set-test 256 levels"),
        (good | {"train_labels": np.zeros(3, int), "test_labels": np.zeros(5, int)}, "labels"),
        (good | {"train_labels": np.full(12, "cat"), "test_labels": np.zeros(5, int)}, "from 0, not <U3"),
    ]
    for content, message in cases:
        refused(ValueError, message, dataset="array", shape=(2, 5), path=written(tmp_path, "npz", content))
    path = written(tmp_path, "npz", good)
    refused(ValueError, "data.num_levels=8", "float32", dataset="array", shape=(2, 5), path=path, num_levels=8)
    refused(ValueError, "data.resize=True", dataset="array", shape=(2, 5), path=path, resize=True)
    refused(ValueError, "data.num_levels=9", "'digits'", dataset="digits", shape=(1, 8, 8), num_levels=9)
    refused(ValueError, "data.background='red'", "'digits'", dataset="digits", shape=(1, 8, 8), background="red")
    for name, content in {"damaged.npz": path.read_bytes()[:-200], "not.h5": b"x", "data.txt": b"x"}.items():
        (tmp_path / name).write_bytes(content)
        refused(ValueError, f"data.path={tmp_path / name}", dataset="array", shape=(2, 5), path=tmp_path / name)
    refused(ValueError, "no such file or folder", dataset="array", shape=(2, 5), path=tmp_path / "missing")
    folder = tmp_path / "folder"
    folder.mkdir()
    written(folder, "folder", good)
    (folder / "train.npy").write_bytes((folder / "train.npy").read_bytes()[:-4])
    refused(ValueError, "shorter than its header says", dataset="array", shape=(2, 5), path=folder)
    for shape in ((-5, 2, 5), (2**70, 0), (1,) * 40):  # headers only: no array has these
        with open(folder / "train.npy", "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            file.write(bytes(400))
        refused(ValueError, f"data.path={folder}: float32 of shape", dataset="array", shape=(2, 5), path=folder)
    (folder / "train.npy").unlink()
    os.mkfifo(folder / "train.npy")
    refused(ValueError, "train.npy is no regular file", dataset="array", shape=(2, 5), path=folder)
    labels = {"train_labels": np.full(12, "cat"), "test_labels": np.full(5, "dog")}
    images = {f"{half}_images": np.full((n, 4, 4), 99, np.uint8) for half, n in (("train", 12), ("test", 5))}
    path = written(tmp_path, "npz", images | labels)
    refused(ValueError, "train_labels must be integers from 0, not <U3", dataset="npz", shape=(1, 4, 4), path=path)


def test_items_that_do_not_fit_are_named():
    """With their number, whenever one is met: a run reads all of them before it begins."""
    good = arrays((2, 5))["train"]
    broken = good.copy()
    broken[7, 1, 3] = np.nan
    mixed = [*good[:4], good[4, :, :3], *good[5:]]
    levels = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)
    cases = [
        (ArraySplit("x", broken), "item 7 has values that are not finite"),
        (ArraySplit("x", mixed), "item 4 of x is (2, 3)"),
        (ArraySplit("x", [*good[:3], levels[0]]), "item 3 is uint8, others are floating-point numbers"),
        (ArraySplit("x", levels, num_levels=20), "item 5 has the level 23, not 0 to 19"),
        (ArraySplit("x", good, np.arange(12), num_classes=5), "item 5 has the label 5, not 0 to 4"),
    ]
    for split, message in cases:
        with pytest.raises(ValueError) as caught:
            split.read_all()
        assert message in str(caught.value) and "\n" not in str(caught.value)
    ArraySplit("x", levels, num_levels=24).read_all()
