"""Folders of images: halves, classes, what is left out, pixels, and what is refused."""

from __future__ import annotations

import io
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
import torch
from image_files import refused, save
from PIL import Image

from data import UnreadableImage, load_dataset, sets


def grey(value: int, height: int = 8, width: int = 8) -> np.ndarray:
    return np.full((height, width), value, dtype=np.uint8)


def test_folder_with_halves_and_classes(tmp_path):
    """Lossless formats come back exactly; classes are the union over both halves, in alphabetical order."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    save(tmp_path / "train/owl/b.png", pixels[0])
    save(tmp_path / "train/cat/deep/er/A.BMP", pixels[1])
    save(tmp_path / "train/dog/a.png", pixels[2])
    save(tmp_path / "test/dog/c.webp", pixels[2], lossless=True)
    save(tmp_path / "test/owl/d.png", pixels[3])
    (tmp_path / "train/owl/notes.txt").write_text("not an image")
    (tmp_path / "train/owl/._b.png").write_text("what macOS leaves")
    (tmp_path / "train/.cache").mkdir()
    save(tmp_path / "train/.cache/e.png", pixels[0])
    save(tmp_path / "other/f.png", pixels[0])
    train, test = load_dataset("folder", image_size=8, num_channels=3, path=tmp_path)
    assert (train.name, test.name) == (f"{tmp_path.name}-train", f"{tmp_path.name}-test")
    assert train.shape == (3, 8, 8) and train.num_levels == 256 and train.num_classes == test.num_classes == 3
    images, labels = train.batch([2, 0])  # sorted by name: cat/deep/er/A.BMP, dog/a.png, owl/b.png
    assert labels.tolist() == [2, 0] and images.dtype == torch.uint8
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[[0, 1]])
    images, labels = test.batch(torch.arange(2))
    assert labels.tolist() == [1, 2]
    assert np.array_equal(images.permute(0, 2, 3, 1).numpy(), pixels[[2, 3]])
    assert train.batch([])[0].shape == (0, 3, 8, 8)


@pytest.mark.parametrize("names", [["train/a/1.png", "test/a/2.png"], ["train/a/1.png", "train/b/3.png", "test/2.png"]])
def test_folder_without_classes(tmp_path, names):
    """One subfolder, or images beside the subfolders, make no classes."""
    for name in names:
        save(tmp_path / name, grey(7))
    for half in load_dataset("folder", image_size=8, num_channels=1, path=tmp_path):
        assert half.num_classes is None and half.batch(range(len(half)))[1].tolist() == [0] * len(half)


@pytest.mark.parametrize(
    ("names", "halves"),
    [
        ("train test", "train test"),
        ("Train Test", "Train Test"),
        ("TRAINING TESTING", "TRAINING TESTING"),
        ("training validation", "training validation"),
        ("training testing", "training testing"),
        ("train val test", "train test"),
        ("train valid", "train valid"),
        ("trainA testA", "trainA testA"),
        ("cars_train cars_test", "cars_train cars_test"),
        ("train2017 val2017 annotations", "train2017 val2017"),
        ("train train_masks test other", "train test"),
        ("trainA trainB testA testB", None),
        ("training cats", None),
        ("Test cats", None),
        ("train Train test", None),
        ("cats/train cats/test dogs/train", None),
        ("data/training data/testing", None),
        ("trains testaments valleys", ""),
    ],
)
def test_folder_halves_under_other_names(names, halves, tmp_path):
    """Understood or refused, but never trained on as two classes; what is left out is said."""
    for name in names.split():
        for k in range(3 if halves != "" else 30):  # of which a tenth is to be held out
            save(tmp_path / name / f"{k}.png", grey(200))
    request = {"dataset": "folder", "image_size": 8, "num_channels": 1, "path": tmp_path}
    if halves is None:
        refused(ValueError, f"data.path={tmp_path}", "looks like", "train/ and test/", **request)
        return
    train, test = load_dataset(**request)
    if not halves:
        assert train.num_classes == 3 and train.folder == test.folder == tmp_path
        return
    assert [split.folder.name for split in (train, test)] == halves.split() and (len(train), len(test)) == (3, 3)
    said = sets.describe(train, test)
    assert said.startswith("3 training and 3 test images without classes; halves ")
    for name in set(names.split()) - set(halves.split()):
        assert f"{name} (neither half)" in said
    assert ("left out: nothing" in said) == (len(names.split()) == 2)


def test_folder_files_in_both_halves(tmp_path, monkeypatch, caplog):
    """Found by their bytes; only files of equal size are read."""
    for k in range(5):
        save(tmp_path / f"train/{k}.bmp", grey(10 * k, 8 + k, 8))
    save(tmp_path / "test/a.bmp", grey(20, 10, 8))
    save(tmp_path / "test/b.bmp", grey(21, 11, 8))
    save(tmp_path / "test/c.bmp", grey(21, 11, 12))
    read, fromfile = [], np.fromfile
    monkeypatch.setattr(sets.np, "fromfile", lambda file, *rest: read.append(file.name) or fromfile(file, *rest))
    load_dataset("folder", image_size=8, num_channels=1, path=tmp_path, resize=True)
    assert f"1 of 3 test images are training images, too: {tmp_path}/test/a.bmp" in caplog.text
    assert sorted(read) == ["2.bmp", "3.bmp", "a.bmp", "b.bmp"]


def test_folder_links(tmp_path):
    """A link to a folder that is read anyway multiplies nothing; a link to another one is followed."""
    save(tmp_path / "elsewhere/c.png", grey(3))
    save(tmp_path / "set/train/a.png", grey(1))
    save(tmp_path / "set/test/b.png", grey(2))
    for name, target in (("up", ".."), ("here", "."), ("far", "../../elsewhere"), ("top", "../../..")):
        (tmp_path / "set/train" / name).symlink_to(target)
    (tmp_path / "elsewhere/round").symlink_to("../set/train")
    (tmp_path / "set/train/._d.png").write_text("what macOS leaves")
    train, test = load_dataset("folder", image_size=8, num_channels=1, path=tmp_path / "set")
    assert (train.files, test.files) == (["a.png", "far/c.png"], ["b.png"])
    assert "files that are hidden or no images: 1" in train.about
    assert "links to folders that are read anyway: 4" in train.about


def test_folder_hold_out(tmp_path):
    """The held-out tenth depends on the names alone, and more images do not move the others."""
    names = [f"{k % 3}/{k:03d}.png" for k in range(400)]
    for name in names[:300]:
        save(tmp_path / "a" / name, grey(int(name[2:5]) % 256))

    def halves(folder: str) -> tuple[set[str], set[str]]:
        train, test = load_dataset("folder", image_size=8, num_channels=1, path=tmp_path / folder)
        assert train.num_classes == test.num_classes == 3
        for half in (train, test):
            images, labels = half.batch(range(len(half)))
            assert labels.tolist() == [int(file[0]) for file in half.files]
            assert images[:, 0, 0, 0].tolist() == [int(file[2:5]) % 256 for file in half.files]
        assert len(train) + len(test) == len({*train.files, *test.files})
        return set(train.files), set(test.files)

    train, test = halves("a")
    assert train | test == set(names[:300])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert halves("b") == (train, test)
    for name in names[300:]:
        save(tmp_path / "b" / name, grey(int(name[2:5]) % 256))
    more_train, more_test = halves("b")
    assert train < more_train and test < more_test
    # Binomial with n = 400, p = 0.1: 40 ± 6; four standard errors.
    assert abs(len(more_test) - 40) < 24


def test_folder_channels_are_converted(tmp_path):
    red = np.zeros((8, 8, 3), dtype=np.uint8)
    red[..., 0] = 200
    save(tmp_path / "train/red.png", red)
    save(tmp_path / "test/grey.png", grey(90))
    train, test = load_dataset("folder", image_size=8, num_channels=1, path=tmp_path)
    assert train.batch([0])[0].unique().tolist() == [round(0.299 * 200)]  # ITU-R 601 luma
    assert test.batch([0])[0].unique().tolist() == [90]
    train, test = load_dataset("folder", image_size=8, num_channels=3, path=tmp_path)
    assert train.batch([0])[0][0, :, 0, 0].tolist() == [200, 0, 0]
    assert test.batch([0])[0][0, :, 0, 0].tolist() == [90, 90, 90]


def test_folder_resize(tmp_path):
    """Cut to the central square, without aliasing, after turning as the camera says."""
    wide = np.zeros((10, 20, 3), dtype=np.uint8)
    wide[..., 2] = 255
    wide[:, 5:15] = [255, 0, 0]
    save(tmp_path / "train/a.png", wide)
    save(tmp_path / "train/b.png", wide.transpose(1, 0, 2).copy())
    checks = np.indices((32, 32)).sum(0).astype(np.uint8) % 2 * 255
    save(tmp_path / "train/c.png", checks)
    turned = grey(0, 16, 16)
    turned[:, :8] = 255  # white on the left as stored; orientation 6 means a quarter turn clockwise: white on top
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / "test/d.png", turned, exif=exif)
    refused(
        ValueError,
        str(tmp_path / "train/a.png"),
        "data.image_size=8",
        "20x10",
        "--config.data.resize=True",
        dataset="folder",
        image_size=8,
        num_channels=3,
        path=tmp_path,
    )
    train, test = load_dataset("folder", image_size=8, num_channels=3, path=tmp_path, resize=True)
    images, _ = train.batch([0, 1, 2])
    red = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None].expand(3, 8, 8)
    assert torch.equal(images[0], red) and torch.equal(images[1], red)
    assert (images[2].double() - 127.5).abs().max() < 10
    upright = test.batch([0])[0][0, 0]
    assert upright[0].eq(255).all() and upright[7].eq(0).all()


def test_grey_images_of_16_bits(tmp_path):
    """Keep their levels in every format, are resized as others are, and may have fewer levels."""
    pixels = np.random.default_rng(0).integers(0, 4096, (8, 8), dtype=np.uint16)
    save(tmp_path / "train/a.png", pixels)
    save(tmp_path / "train/b.tif", 16 * pixels)
    (tmp_path / "train/c.pgm").write_bytes(b"P5 8 8 65535\n" + pixels.astype(">u2").tobytes())
    save(tmp_path / "test/d.png", np.full((32, 16), 50000, dtype=np.uint16))
    request = {"dataset": "folder", "image_size": 8, "path": tmp_path}
    refused(ValueError, "d.png is of 16x32 pixels", **request, num_channels=1)
    refused(ValueError, "data.num_channels=3", "a.png is grey, of 16 bits", **request, num_channels=3, resize=True)
    train, test = load_dataset(**request, num_channels=1, resize=True)
    levels, _ = train.batch([0, 1, 2])
    assert train.num_levels == 2**16 and levels.dtype == torch.int32
    assert np.array_equal(levels[:, 0].numpy(), np.stack([pixels, 16 * pixels, pixels]))
    assert test.batch([0])[0].unique().tolist() == [50000]
    train.read_all()
    twelve, _ = load_dataset(**request, num_channels=1, resize=True, num_levels=4096)
    assert twelve.num_levels == 4096 and twelve.fingerprint != train.fingerprint
    with pytest.raises(UnreadableImage, match=r"a pixel has level \d+, not 0 to 4095, data.num_levels=4096"):
        twelve.read_all()
    (tmp_path / "train/b.tif").unlink()
    twelve, _ = load_dataset(**request, num_channels=1, resize=True, num_levels=4096)
    twelve.read_all()
    Image.fromarray(np.full((8, 8), -1, dtype=np.int32)).save(tmp_path / "train/e.tif")
    refused(ValueError, "e.tif has more than 8 bits", **request, num_channels=1, resize=True)


def test_the_colour_under_transparent_pixels(tmp_path):
    pixels = np.full((8, 8, 4), 255, dtype=np.uint8)
    pixels[:, :4, 3] = 0
    for half in ("train", "test"):
        save(tmp_path / half / "a.png", pixels)
    request = {"dataset": "folder", "image_size": 8, "num_channels": 3, "path": tmp_path}
    seen = {colour: load_dataset(**request, background=colour)[0] for colour in ("white", "#ff8000")}
    assert seen["white"].batch([0])[0].unique().tolist() == [255]
    assert seen["#ff8000"].batch([0])[0][0, :, 0, 0].tolist() == [255, 128, 0]
    assert seen["white"].fingerprint == load_dataset(**request)[0].fingerprint != seen["#ff8000"].fingerprint
    refused(ValueError, "data.background='wite'", "#808080", **request, background="wite")


def test_folder_unreadable_images(tmp_path):
    request = {"dataset": "folder", "image_size": 8, "num_channels": 1, "path": tmp_path}
    save(tmp_path / "train/a.png", grey(1))
    save(tmp_path / "test/b.png", grey(1))
    bad = tmp_path / "test/c.jpg"
    bad.write_text("not an image")
    refused(ValueError, str(bad), "cannot read", **request)
    bad.unlink()
    save(tmp_path / "test/d.png", np.full((8, 8), 1000, dtype=np.uint16))
    refused(ValueError, "d.png has 16 bits", "a.png has 8", **request)
    (tmp_path / "test/d.png").unlink()
    (tmp_path / "test/f.ppm").write_bytes(b"P6 8 8 4095\n" + bytes(8 * 8 * 6))
    refused(ValueError, "f.ppm", "8 bits", **request)
    (tmp_path / "test/f.ppm").write_bytes(b"P1 8 8" + b" 1" * 64)
    load_dataset(**request)
    (tmp_path / "test/f.ppm").unlink()
    (tmp_path / "test/g.png").write_bytes(deep_png())
    with Image.open(tmp_path / "test/g.png") as image:
        assert image.mode == "RGB"  # which is what Pillow makes of 16 bits
    refused(ValueError, "g.png", "8 bits", **request)
    (tmp_path / "test/g.png").unlink()
    os.mkfifo(tmp_path / "test/h.png")
    refused(ValueError, "h.png", "no regular file", **request)
    (tmp_path / "test/h.png").unlink()
    (tmp_path / "test/i.png").symlink_to("gone.png")
    refused(ValueError, "i.png", "No such file", **request)
    (tmp_path / "test/i.png").unlink()
    # The header of this one is whole, so that only decoding can tell.
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8), dtype=np.uint8)).save(buffer, "png")
    (tmp_path / "test/e.png").write_bytes(buffer.getvalue()[:-40])
    _, test = load_dataset(**request)
    assert test.batch([0])[0].shape == (1, 1, 8, 8)
    with pytest.raises(ValueError, match=r"cannot read the image .*e\.png"):
        test.batch([0, 1])
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*e\.png: [^;]*$"):
        test.read_all()
    (tmp_path / "test/f.png").write_bytes(buffer.getvalue()[:-40])
    seen = []
    with pytest.raises(UnreadableImage, match=r"cannot read the image .*e\.png: .*; and 1 more"):
        load_dataset(**request)[1].read_all(seen.append)
    assert seen == [3]


def deep_png() -> bytes:
    """8×8 pixels in colour of 16 bits, which Pillow cannot write."""

    def chunk(content: bytes) -> bytes:
        return struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    pixels = zlib.compress((b"\0" + struct.pack(">H", 4095) * 24) * 8)
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(chunk, (b"IHDR" + header, b"IDAT" + pixels, b"IEND")))


def test_folder_pixels_that_show_through_or_are_dark(tmp_path):
    """Transparent pixels are white, whatever their colour, or between. 0 and 1 are not grey levels."""
    ghost = np.zeros((8, 8, 4), dtype=np.uint8)
    ghost[..., 0] = 200
    ghost[4:, :, 3] = 255
    ghost[6:, :, 3] = 51
    save(tmp_path / "train/a.png", ghost)
    grey_ghost = Image.fromarray(ghost).convert("LA")
    grey_ghost.save(tmp_path / "train/b.png")
    palette = Image.fromarray(np.indices((8, 8)).sum(0).astype(np.uint8) % 2, "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.save(tmp_path / "train/c.gif", transparency=0)
    save(tmp_path / "test/d.png", np.eye(8, dtype=np.uint8))
    train, test = load_dataset("folder", image_size=8, num_channels=3, path=tmp_path)
    (colour, grey_image, indexed), _ = train.batch([0, 1, 2])
    assert colour[:, :4].eq(255).all() and colour[:, 4:6, 0].T.tolist() == [[200, 0, 0]] * 2
    assert colour[:, 7, 0].tolist() == [round(0.2 * c + 0.8 * 255) for c in (200, 0, 0)]
    assert grey_image[:, :4].eq(255).all() and grey_image[:, 4:6].eq(round(0.299 * 200)).all()
    assert indexed[:, 0, 0].tolist() == [255] * 3 and indexed[:, 0, 1].tolist() == [40, 50, 60]
    train.read_all()
    with pytest.raises(ValueError, match="no pixel is above level 1 of 255"):
        test.read_all()


def test_folder_layouts_that_are_refused(tmp_path):
    request = {"dataset": "folder", "image_size": 8, "num_channels": 1, "path": tmp_path}
    refused(ValueError, "absent", "not a folder", **{**request, "path": tmp_path / "absent"})
    refused(ValueError, str(tmp_path), ".png", **request)
    save(tmp_path / "train/a.png", grey(1))
    refused(ValueError, "train/", "test/", **request)
    (tmp_path / "test").mkdir()
    refused(ValueError, str(tmp_path / "test"), "no image", **request)
    refused(ValueError, "holds 1 images", "train/ and test/", **{**request, "path": tmp_path / "train"})


def test_folder_fingerprint(tmp_path):
    save(tmp_path / "train/a.png", grey(1))
    save(tmp_path / "test/b.png", grey(1))

    def fingerprint(size: int = 8) -> str:
        return load_dataset("folder", image_size=size, num_channels=1, path=tmp_path, resize=True)[0].fingerprint

    seen = [fingerprint()]
    assert fingerprint() == seen[0]
    seen.append(fingerprint(4))
    os.utime(tmp_path / "train/a.png", ns=(0, 10**9))
    seen.append(fingerprint())
    (tmp_path / "train/a.png").rename(tmp_path / "train/c.png")
    seen.append(fingerprint())
    assert len(set(seen)) == 4
