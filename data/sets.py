"""Images by name, and the order in which training sees them.

*Sets* are pairs of splits, train and test (see ``splits``): of a user's own, in an archive or a folder, or published.

*Order.* Training concatenates one permutation per epoch into an endless sequence; step n takes the entries
n·B, …, (n+1)·B − 1. A batch is therefore a function of (seed, step) alone: resuming needs no replay, no image is
dropped at the end of an epoch, and processes cut the same batch into shares.
"""

from __future__ import annotations

import functools
import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import imagenet32
from data.splits import UNREADABLE_IMAGE, FileSplit, Split, TensorSplit, crop_and_resize, first_line
from experiment.randomness import seed_from

if TYPE_CHECKING:
    from ml_collections import ConfigDict

__all__ = ["batch_indices", "epoch_batches", "get_dataset", "load_dataset"]

_MAX_CLASSES = 100_000
"""Labels beyond are not labels: networks have an output for every class."""

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


# ---------------------------------------------------------------------------------------------------- sets by name


@dataclass(frozen=True)
class _Request:
    """What ``load_dataset`` was asked for; the fields are those of ``config.data``."""

    dataset: str
    image_size: int
    num_channels: int
    path: str
    root: str
    download: bool
    resize: bool

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.num_channels, self.image_size, self.image_size


def _in_memory(
    request: _Request,
    name: str,
    halves: Sequence[tuple[np.ndarray, np.ndarray | None]],
    *,
    num_classes: int | None,
    num_levels: int = 256,
) -> tuple[Split, Split]:
    """Splits from two pairs, train and test, of images uint8 (N, H, W, C) and labels (N,) or None, after checking
    them against the config."""
    train, test = (
        _tensor_split(request, f"{name}-{half}", images, labels, num_classes, num_levels)
        for half, (images, labels) in zip(("train", "test"), halves, strict=True)
    )
    return train, test


def _tensor_split(
    request: _Request,
    name: str,
    images: np.ndarray,
    labels: np.ndarray | None,
    num_classes: int | None,
    num_levels: int,
) -> TensorSplit:
    size = request.image_size
    height, width, channels = images.shape[1:]
    if not len(images):
        raise ValueError(f"{name} of config.data.dataset={request.dataset} holds no images")
    if labels is not None and labels.shape != (len(images),):
        raise ValueError(f"{name} holds {len(images)} images but labels of shape {labels.shape}")
    if channels != request.num_channels:
        raise ValueError(f"config.data.num_channels={request.num_channels}, but {name} has {channels}-channel images")
    if (height, width) != (size, size):
        if not request.resize:
            raise ValueError(
                f"config.data.image_size={size}, but {name} has {width}x{height} images; change it, or set "
                "--config.data.resize=True to crop to a square and resize"
            )
        pictures = images[..., 0] if channels == 1 else images  # Pillow wants grey images as (H, W)
        resized = [crop_and_resize(Image.fromarray(picture), min(height, width), size) for picture in pictures]
        images = np.stack([np.asarray(picture) for picture in resized]).reshape(-1, size, size, channels)
    return TensorSplit(
        name,
        torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))),
        None if labels is None else torch.from_numpy(labels.astype(np.int64)),
        num_levels=num_levels,
        num_classes=num_classes,
    )


def _load_digits(request: _Request) -> tuple[Split, Split]:
    """The 1797 8×8 digits bundled with scikit-learn, 17 levels; 360 of them, stratified by class, are the test set.

    They are themselves the test part of the UCI set "Optical Recognition of Handwritten Digits", so there is no
    customary split: ``random_state=0`` defines ours. Within each half the images keep scikit-learn's order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target
    halves = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    chosen = [np.sort(half) for half in halves]
    return _in_memory(request, "digits", [(images[i], labels[i]) for i in chosen], num_classes=10, num_levels=17)


def _load_npz(request: _Request) -> tuple[Split, Split]:
    """A NumPy archive with ``train_images`` and ``test_images``, uint8 (N, H, W) or (N, H, W, C), and optionally
    ``train_labels`` and ``test_labels``, integers (N,) counted from 0."""
    path = _given_path(request, "an .npz file with train_images, test_images and, if any, train_labels, test_labels")
    if not path.is_file():
        raise FileNotFoundError(f"config.data.path={path} is not a file; 'npz' wants a NumPy archive")
    arrays = _read_npz(path)
    for key in ("train_images", "test_images"):
        images = arrays[key]
        if images.dtype != np.uint8:
            raise ValueError(f"{key} in config.data.path={path} is {images.dtype}; uint8 (levels 0 to 255) is expected")
        if images.ndim == 3:
            arrays[key] = images = images[..., None]
        if images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"{key} in config.data.path={path} has shape {images.shape}; (N, H, W) or (N, H, W, C) with C = 1 or 3 "
                "is expected"
            )
    labels = {key: array for key, array in arrays.items() if key.endswith("labels")}
    for key, array in labels.items():
        if array.dtype.kind not in "ui":
            raise ValueError(f"{key} in config.data.path={path} is {array.dtype}; integers are expected")
        if array.min(initial=0) < 0:
            raise ValueError(f"{key} in config.data.path={path} goes down to {array.min()}; classes count from 0")
        if array.max(initial=0) >= _MAX_CLASSES:
            raise ValueError(
                f"{key} in config.data.path={path} goes up to {array.max()}; classes count from 0, below {_MAX_CLASSES}"
            )
    num_classes = max(int(array.max(initial=0)) for array in labels.values()) + 1 if labels else None
    halves = [(arrays[f"{half}_images"], arrays.get(f"{half}_labels")) for half in ("train", "test")]
    return _in_memory(request, path.stem, halves, num_classes=num_classes)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is a single array, not an .npz archive")
            wanted = ["train_images", "test_images"]
            # Labels for one half only are a mistake, not a set without labels.
            if {"train_labels", "test_labels"} & set(archive.files):
                wanted += ["train_labels", "test_labels"]
            missing = [key for key in wanted if key not in archive.files]
            if missing:
                raise ValueError(f"it lacks {', '.join(missing)} (it has {', '.join(archive.files) or 'nothing'})")
            arrays = {key: archive[key] for key in wanted}
            for key, array in arrays.items():
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{key} is not an array")
            return arrays
    except (ValueError, OSError, EOFError, RuntimeError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        # NumPy refuses arrays of objects, which would have to be unpickled, with a ValueError; zipfile encrypted
        # members with a RuntimeError. A header that promises more than there is memory need not be true.
        raise ValueError(f"config.data.path={path} is not a usable .npz: {first_line(error)}") from error


def _load_folder(request: _Request) -> tuple[Split, Split]:
    """A folder of one's own images, at any depth, hidden files excepted.

    With subfolders ``train`` and ``test`` those are the halves. Otherwise an image is held out for testing when a
    hash of its relative name falls in one tenth of all values: the choice is the same on every machine, and images
    added later move none of the others between the halves. If every image lies in a subfolder of its half, and there
    are at least two of these, the names of the subfolders in alphabetical order are the classes.
    """
    folder = _given_path(request, "a folder of images")
    if not folder.is_dir():
        raise FileNotFoundError(f"config.data.path={folder} is not a folder; 'folder' wants a folder of images")
    halves = [half for half in ("train", "test") if (folder / half).is_dir()]
    if len(halves) == 1:
        raise ValueError(
            f"config.data.path={folder} has {halves[0]}/ without its counterpart; a folder has both train/ and test/, "
            "or neither to hold out 10 % by name"
        )
    if halves:
        files = {half: _image_files(folder / half) for half in halves}
        roots = {half: folder / half for half in halves}
    else:
        everything = _image_files(folder)
        held_out = {file for file in everything if seed_from("hold-out", file) % 10 == 0}
        files = {"train": [f for f in everything if f not in held_out], "test": sorted(held_out)}
        roots = {"train": folder, "test": folder}
        if everything and not all(files.values()):
            raise ValueError(
                f"config.data.path={folder} holds {len(everything)} images, too few to hold out 10 % for testing by "
                "name; sort them into train/ and test/"
            )
    for half in ("train", "test"):
        if not files[half]:
            raise ValueError(f"no image in config.data.path={roots[half]}; read are {', '.join(IMAGE_SUFFIXES)}")
        # Before training, not in the middle of it; the headers are enough.
        for file in files[half]:
            _check_header(roots[half] / file, request)
    in_subfolders = all("/" in file for half in files.values() for file in half)
    classes = sorted({file.split("/")[0] for half in files.values() for file in half}) if in_subfolders else []
    number = {name: k for k, name in enumerate(classes)} if len(classes) > 1 else None
    train, test = (
        FileSplit(
            f"{folder.resolve().name}-{half}",
            roots[half],
            files[half],
            None if number is None else torch.tensor([number[file.split("/")[0]] for file in files[half]]),
            image_shape=request.image_shape,
            num_classes=None if number is None else len(number),
        )
        for half in ("train", "test")
    )
    return train, test


def _image_files(folder: Path) -> list[str]:
    """Names of all images below a folder, relative to it, with forward slashes, sorted."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not read

    found = []
    for parent, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Hidden files are not pictures: macOS leaves "._name.jpg" beside each file on foreign disks.
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        relative = Path(parent).relative_to(folder)
        found += [
            (relative / name).as_posix()
            for name in files
            if not name.startswith(".") and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(found)


def _check_header(file: Path, request: _Request) -> None:
    try:
        with Image.open(file) as image:
            width, height, mode = image.width, image.height, image.mode
    except UNREADABLE_IMAGE as error:
        raise ValueError(f"config.data.path: cannot read the image {file}: {first_line(error)}") from error
    if mode[0] in "IF":
        # Pillow would clip such pixels to 255 rather than rescale them.
        raise ValueError(f"config.data.path: {file} has more than 8 bits per channel ({mode}); convert it to 8 bits")
    if (width, height) != (request.image_size, request.image_size) and not request.resize:
        raise ValueError(
            f"config.data.path: {file} is {width}x{height}, expected {request.image_size}x{request.image_size} "
            "(config.data.image_size); --config.data.resize=True crops to a square and resizes"
        )


def _given_path(request: _Request, wanted: str) -> Path:
    if not request.path:
        raise ValueError(f"config.data.path is not set; dataset '{request.dataset}' wants the path of {wanted}")
    return Path(request.path).expanduser()


def _given_root(request: _Request) -> Path:
    if not request.root:
        raise ValueError(
            f"config.data.root is not set; '{request.dataset}' wants the folder that holds it, or (torchvision's sets) "
            "into which --config.data.download=True puts it"
        )
    return Path(request.root).expanduser()


def _from_torchvision(request: _Request, torchvision_class: str, half: str, **options: object) -> Any:
    """The object of torchvision for one half, read from ``config.data.root``.

    The CIFAR files are pickles. torchvision compares their MD5 sums with the published ones in the constructor,
    whether or not it downloads, before it unpickles anything (likewise SVHN's .mat files, which are no pickles), so
    only the published bytes are ever unpickled. It does not check MNIST's files, which are plain arrays.
    """
    import torchvision.datasets  # slow to import, and not needed for other sets

    root, cls = _given_root(request), getattr(torchvision.datasets, torchvision_class)
    try:
        return cls(root, download=request.download, **options)
    except (RuntimeError, OSError, ImportError, AssertionError, KeyError, TypeError, ValueError) as error:
        # Whatever torchvision stumbles over in these files means that the set is not there in full.
        remedy = "it could not be fetched" if request.download else "--config.data.download=True fetches it"
        raise FileNotFoundError(
            f"config.data.root={root} holds no intact {request.dataset} ({half}): expected in it are "
            f"{', '.join(_expected_files(cls))}; {remedy} ({first_line(error)})"
        ) from error


def _expected_files(cls: type) -> list[str]:
    """The files of a set of torchvision below its root, unpacked; read off what torchvision itself looks for."""
    name = cls.__name__
    if name.startswith("CIFAR"):
        files = [file for file, _ in (*cls.train_list, *cls.test_list)]
        return [f"{cls.base_folder}/{file}" for file in (*files, cls.meta["filename"])]
    if name == "SVHN":
        return [cls.split_list[half][1] for half in ("train", "test")]
    if name == "CelebA":
        labels = [file for _, _, file in cls.file_list if file.endswith(".txt")]
        return [f"{cls.base_folder}/{file}" for file in (*labels, "img_align_celeba/*.jpg")]
    return [f"{name}/raw/{Path(file).stem}" for file, _ in cls.resources]


def _load_mnist(request: _Request) -> tuple[Split, Split]:
    halves = [_from_torchvision(request, "MNIST", half, train=half == "train") for half in ("train", "test")]
    arrays = [(half.data.numpy()[..., None], half.targets.numpy()) for half in halves]
    return _in_memory(request, "mnist", arrays, num_classes=10)


def _load_cifar(request: _Request) -> tuple[Split, Split]:
    num_classes = int(request.dataset.removeprefix("cifar"))
    name = f"CIFAR{num_classes}"
    halves = [_from_torchvision(request, name, half, train=half == "train") for half in ("train", "test")]
    arrays = [(half.data, np.asarray(half.targets)) for half in halves]
    return _in_memory(request, request.dataset, arrays, num_classes=num_classes)


def _load_svhn(request: _Request) -> tuple[Split, Split]:
    halves = [_from_torchvision(request, "SVHN", half, split=half) for half in ("train", "test")]
    arrays = [(half.data.transpose(0, 2, 3, 1), half.labels) for half in halves]
    return _in_memory(request, "svhn", arrays, num_classes=10)


def _load_imagenet32(request: _Request) -> tuple[Split, Split]:
    """The official validation images are the test half."""
    halves = imagenet32.read_imagenet32(_given_root(request))
    return _in_memory(request, "imagenet32", halves, num_classes=imagenet32.NUM_CLASSES)


def _load_celeba(request: _Request) -> tuple[Split, Split]:
    """The aligned faces of CelebA: the central 140×140 of 178×218 pixels, resized, as in score_sde_pytorch.

    The test half is CelebA's own test split, where score_sde_pytorch evaluates on the validation split. The 40
    attributes are no classes, so there are no labels.
    """
    if request.num_channels != 3:
        raise ValueError(f"config.data.num_channels={request.num_channels}, but celeba has 3-channel images")

    def split(half: str) -> FileSplit:
        celeba = _from_torchvision(request, "CelebA", half, split=half)
        folder = Path(celeba.root) / celeba.base_folder / "img_align_celeba"
        return FileSplit(f"celeba-{half}", folder, celeba.filename, None, image_shape=request.image_shape, crop=140)

    return split("train"), split("test")


_LOADERS: dict[str, Callable[[_Request], tuple[Split, Split]]] = {
    "digits": _load_digits,
    "npz": _load_npz,
    "folder": _load_folder,
    "mnist": _load_mnist,
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
    "svhn": _load_svhn,
    "imagenet32": _load_imagenet32,
    "celeba": _load_celeba,
}


def load_dataset(
    name: str,
    *,
    image_size: int,
    num_channels: int,
    path: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = False,
    resize: bool = False,
) -> tuple[Split, Split]:
    """The training and the test half of a set.

    Args:
        name: ``digits``, ``npz``, ``folder``, ``mnist``, ``cifar10``, ``cifar100``, ``svhn``, ``imagenet32`` or
            ``celeba``, in upper or lower case.
        image_size: height and width in pixels.
        num_channels: 1 (grey) or 3 (RGB). Images in a folder are converted; other sets must have as many.
        path: the file of ``npz`` or the folder of ``folder``.
        root: where published sets are, or torchvision's are to be put.
        download: whether torchvision may fetch a set that is not in ``root``.
        resize: whether images of another size are cut to a central square and resized. CelebA always is.

    Raises:
        ValueError: an argument is wrong, or the images do not fit it.
        FileNotFoundError: there is nothing at ``path``, or no such set in ``root``.
    """
    request = _Request(name.lower(), image_size, num_channels, str(path or ""), str(root or ""), download, resize)
    if request.dataset not in _LOADERS:
        raise ValueError(f"config.data.dataset={name!r} is unknown; known are {', '.join(_LOADERS)}")
    if image_size < 1:
        raise ValueError(f"config.data.image_size={image_size} must be at least 1")
    if num_channels not in (1, 3):
        raise ValueError(f"config.data.num_channels={num_channels} must be 1 or 3")
    if request.path and request.dataset not in ("npz", "folder"):
        # Otherwise somebody's own images would silently be replaced by the default set.
        raise ValueError(f"config.data.path={path} is read by dataset 'npz' or 'folder', not by {request.dataset!r}")
    return _LOADERS[request.dataset](request)


# ------------------------------------------------------------------------------------------------------------ order


@functools.lru_cache(maxsize=2)  # a batch may reach into the next epoch
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed_from("order", seed, epoch))
    return torch.randperm(size, generator=generator)


def batch_indices(
    seed: int, step: int, batch_size: int, size: int, *, process_index: int = 0, num_processes: int = 1
) -> Tensor:
    """Positions, int64 (batch_size / num_processes,), of the training images of one optimiser step.

    Epochs are permutations keyed by (seed, epoch), laid end to end; every image occurs once in each. The shares of
    the processes, one after the other, are the batch that a single process would see.

    Args:
        seed: of the run.
        step: number of the step, from 0.
        batch_size: images per step over all processes; may exceed ``size``.
        size: number of images in the set.
        process_index: which process this is, from 0.
        num_processes: number of processes; must divide ``batch_size``.
    """
    if size < 1 or batch_size < 1 or step < 0:
        raise ValueError(f"no batch of config.training.batch_size={batch_size} of {size} images at step {step}")
    _check_process(process_index, num_processes)
    if batch_size % num_processes:
        raise ValueError(f"config.training.batch_size={batch_size} must be a multiple of the {num_processes} processes")
    remaining = batch_size // num_processes
    position = step * batch_size + process_index * remaining
    pieces = []
    while remaining:
        epoch, start = divmod(position, size)
        pieces.append(_permutation(seed, epoch, size)[start : start + remaining])
        position += len(pieces[-1])
        remaining -= len(pieces[-1])
    return torch.cat(pieces)  # always a copy, never a view of the cached permutation


def epoch_batches(size: int, batch_size: int, process_index: int = 0, num_processes: int = 1) -> list[Tensor]:
    """Positions, int64 (≤ batch_size,) each, of one pass over a whole set for evaluation, in order.

    Process r gets a contiguous block, cut into batches of ``batch_size`` of which the last may be smaller; the blocks
    of all processes, one after the other, are 0, …, size − 1. They differ by one image at most, so the processes may
    differ by one batch: gather results after the pass, not within.

    Args:
        size: number of images in the set.
        batch_size: images per batch and process.
        process_index: which process this is, from 0.
        num_processes: number of processes.
    """
    if size < 0 or batch_size < 1:
        raise ValueError(f"no batches of config.eval.batch_size={batch_size} from {size} images")
    _check_process(process_index, num_processes)
    start, stop = (size * r // num_processes for r in (process_index, process_index + 1))
    return [torch.arange(i, min(i + batch_size, stop)) for i in range(start, stop, batch_size)]


def _check_process(process_index: int, num_processes: int) -> None:
    if not 0 <= process_index < num_processes:
        raise ValueError(f"process {process_index} is not one of {num_processes} processes, counted from 0")


# ---------------------------------------------------------------------------------------------------------- factory


def get_dataset(config: ConfigDict) -> tuple[Split, Split]:
    """The set that ``config.data`` names, by its fields dataset, image_size, num_channels, path, root, download and
    resize; see ``load_dataset``."""
    data = config.data
    return load_dataset(
        data.dataset,
        image_size=data.image_size,
        num_channels=data.num_channels,
        path=data.path,
        root=data.root,
        download=data.download,
        resize=data.resize,
    )
