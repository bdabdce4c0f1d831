"""Which images a folder of a user's holds, and which of them are for training and which for testing."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

from experiment.randomness import seed_from

__all__ = ["IMAGE_SUFFIXES", "find_halves"]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_HALVES = {
    "train": ("train", "training", "trainset", "trainval"),
    "test": ("test", "testing", "testset"),
    "val": ("val", "valid", "validation", "dev", "eval", "evaluation", "holdout"),
}
"""Words in a folder's name, in whatever case, by which it looks like a half."""


def find_halves(folder: Path) -> tuple[dict[str, Path], dict[str, list[str]], str]:
    """The folder of each half, ``train`` and ``test``; the sorted names of the images in it, at any depth; and in words
    what is a half and what was left out.

    A subfolder for training and one for testing are the halves, under whatever usual names. Otherwise an image is held
    out for testing when a hash of its relative name falls in one tenth of all values: the choice is the same on every
    machine, and images added later move none of the others between the halves. Hidden files are no images.

    Raises:
        ValueError: halves that are not one for training and one for testing, at the top; or too few images.
    """
    present = _named_halves(folder)
    roots = {half: folder / name for half, name in present.items()} or dict.fromkeys(("train", "test"), folder)
    left_out: Counter[str] = Counter()
    if present:
        files = {half: _image_files(root, left_out) for half, root in roots.items()}
    else:
        everything = _image_files(folder, left_out)
        if within := next((f for f in everything if any(map(_half, Path(f).parts[:-1]))), None):
            raise ValueError(
                f"data.path={folder}: {Path(within).parent}/ looks like a half, which it can be at the top only; give "
                "the folder that has train/ and test/, or rename it"
            )
        held_out = {file for file in everything if seed_from("hold-out", file) % 10 == 0}
        files = {"train": [f for f in everything if f not in held_out], "test": sorted(held_out)}
        if everything and not all(files.values()):
            raise ValueError(
                f"data.path={folder} holds {len(everything)} images, too few to hold out 10 % for testing by name; "
                "sort them into train/ and test/"
            )
    for half, root in roots.items():
        if not files[half]:
            raise ValueError(f"no image in data.path={root}; read are {', '.join(IMAGE_SUFFIXES)}")
    halves = f"halves {' and '.join(present.values())}" if present else "about a tenth held out by name"
    without = [f"{name} (neither half)" for name in _visible(folder) if present and name not in present.values()]
    without += [f"{what}: {count}" for what, count in left_out.items() if count]
    return roots, files, f"{halves}; left out: {'; '.join(without) or 'nothing'}"


def _visible(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not entry.name.startswith("."))


def _half(name: str) -> str | None:
    """Which half a folder looks like by a word of its name: ``Training``, ``testA``, ``images_val``."""
    words = [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)]
    return next((half for half, known in _HALVES.items() if any(word in known for word in words)), None)


def _named_halves(folder: Path) -> dict[str, str]:
    """The names of the subfolders for training and for testing, or nothing."""
    found: dict[str, list[str]] = {half: [] for half in _HALVES}
    for name in _visible(folder):
        if (folder / name).is_dir() and (half := _half(name)):
            found[half].append(name)
    train, test, val = ([n for n in names if n.lower() == half] or names for half, names in found.items())
    halves = [train, test or val]
    if not any(halves):
        return {}
    if any(len(names) != 1 for names in halves):
        raise ValueError(
            f"data.path={folder}: {', '.join(train + halves[1])} looks like a half; there must be one subfolder for "
            "training and one for testing, best called train/ and test/, or none to hold out 10 % by name"
        )
    return {"train": train[0], "test": halves[1][0]}


def _image_files(folder: Path, left_out: Counter[str]) -> list[str]:
    """Names of all images below a folder, relative to it, with forward slashes, sorted; ``left_out`` counts others."""

    def refuse(error: OSError) -> None:
        raise error  # os.walk would pass over a folder that it may not read

    root = folder.resolve()
    seen = {root, *root.parents}
    found = []
    for parent, subfolders, files in os.walk(folder, onerror=refuse, followlinks=True):
        # Hidden files are not pictures: macOS leaves a "._name.jpg" for each file on foreign disks.
        visible = {name: Path(parent, name).resolve() for name in sorted(subfolders) if not name.startswith(".")}
        subfolders[:] = [name for name, place in visible.items() if not (place in seen or seen.add(place))]
        left_out["links to folders that are read anyway"] += len(visible) - len(subfolders)
        for name in files:
            if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."):
                found.append((Path(parent).relative_to(folder) / name).as_posix())
            else:
                left_out["files that are hidden or no images"] += 1
    return sorted(found)
