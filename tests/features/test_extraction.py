"""Features and their cache: the whole split once, stale or damaged files never used; published statistics."""

from __future__ import annotations

import logging
import os
import pickle

import numpy as np
import pytest
import torch
from traps import Trap

from data import TensorSplit
from features.extraction import dataset_features, extract_features, read_statistics

POOL = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
LOGITS = np.random.default_rng(1).standard_normal((6, 3))


@pytest.mark.parametrize(
    "arrays",
    [{"pool_3": POOL, "logits": LOGITS}, {"pool_3": POOL, "logit": LOGITS}, {"pool_3": POOL.astype(float)}],
    ids=["score_sde_pytorch", "QCSBM", "features alone"],
)
def test_published_statistics_are_read(arrays, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    pool = read_statistics(tmp_path / "stats.npz", 5)
    assert pool.dtype == np.float32 and np.array_equal(pool, POOL)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": POOL, "sigma": POOL}, r"no array pool_3 \(it has mu, sigma\)"),
        ({"pool_3": POOL[:, :4]}, r"shape \(N, 5\) .* not float32 of shape \(6, 4\)"),
        ({"pool_3": POOL[0]}, r"not float32 of shape \(5,\)"),
        ({"pool_3": POOL[:3]}, r"N of at least 4, not float32 of shape \(3, 5\)"),
        ({"pool_3": (255 * POOL).astype(np.uint8)}, "floating-point numbers .* not uint8"),
        ({"pool_3": POOL, "logits": LOGITS[:5]}, r"logits must have shape \(6, K\), not \(5, 3\)"),
        ({"pool_3": POOL, "logit": LOGITS[0]}, r"logit must have shape \(6, K\), not \(3,\)"),
        ({"pool_3": np.where(POOL > 1, np.nan, POOL)}, "pool_3 must be finite"),
        ({"pool_3": np.array([[None] * 5] * 6)}, "allow_pickle"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_statistics_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"eval\.stats_path=.*stats\.npz: .*{message}"):
        read_statistics(tmp_path / "stats.npz", 5)


def test_files_that_are_no_archives_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match="no such file"):
        read_statistics(path, 5)
    np.savez(path, pool_3=POOL)
    whole = path.read_bytes()
    (tmp_path / "single.npy").write_bytes(b"")
    np.save(tmp_path / "single.npy", POOL)
    trace = tmp_path / "executed"
    single = (tmp_path / "single.npy").read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing", single, pickle.dumps(Trap(trace))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"eval\.stats_path="):
            read_statistics(path, 5)
    assert not trace.exists()


# -------------------------------------------------------------------------------------------------- cached features


@pytest.fixture
def split() -> TensorSplit:
    images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorSplit("noise/train", images, None)


class MeanAndSpread:
    """Two features that are simple to check, and a count of the images seen."""

    name, dimension = "moments", 2

    def __init__(self, key: str = "moments-1") -> None:
        self.key, self.seen = key, 0

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen += len(images)
        x = images.double().flatten(1)
        return torch.stack([x.mean(1), x.std(1)], 1), x[:, :3]


def test_dataset_features_cover_the_whole_split_and_are_cached(split, tmp_path):
    extractor = MeanAndSpread()
    features = dataset_features(split, extractor, cache_dir=tmp_path, batch_size=33)
    assert extractor.seen == len(features) == 100
    assert features.pool.dtype == features.logits.dtype == np.float32
    np.testing.assert_allclose(features.pool[:, 0], split.images.double().mean((1, 2, 3)), rtol=1e-6)
    again = dataset_features(split, extractor, cache_dir=tmp_path, batch_size=7)
    assert extractor.seen == 100
    assert np.array_equal(features.pool, again.pool) and np.array_equal(features.logits, again.logits)
    # Another extractor, or other data under the same name, is another file.
    dataset_features(split, MeanAndSpread("moments-2"), cache_dir=tmp_path, batch_size=50)
    changed = TensorSplit(split.name, split.images // 2, None)
    halved = dataset_features(changed, extractor, cache_dir=tmp_path, batch_size=50)
    assert extractor.seen == 200 and halved.pool[:, 0].max() < features.pool[:, 0].max()
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["truncated", "flipped bytes", "other key", "too few", "not an archive"])
def test_damaged_statistics_are_computed_anew(damage, split, tmp_path, caplog):
    extractor = MeanAndSpread()
    features = dataset_features(split, extractor, cache_dir=tmp_path, batch_size=50)
    (path,) = tmp_path.iterdir()
    with np.load(path, allow_pickle=False) as archive:
        stored = dict(archive)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "flipped bytes":
        content = bytearray(path.read_bytes())
        where = content.find(features.pool.tobytes()) + 100
        content[where] ^= 0xFF
        path.write_bytes(content)
    elif damage == "other key":
        np.savez(path, **{**stored, "key": str(stored["key"]).replace("moments-1", "moments-2")})
    elif damage == "too few":
        np.savez(path, **{**stored, "pool_3": stored["pool_3"][:10], "logits": stored["logits"][:10]})
    else:
        path.write_text("nothing")
    with caplog.at_level(logging.WARNING):
        again = dataset_features(split, extractor, cache_dir=tmp_path, batch_size=50)
    assert "computed anew" in caplog.text and str(path) in caplog.text
    assert extractor.seen == 200
    assert np.array_equal(features.pool, again.pool)
    dataset_features(split, extractor, cache_dir=tmp_path, batch_size=50)
    assert extractor.seen == 200 and len(list(tmp_path.iterdir())) == 1


def test_extract_features_counts_the_images():
    images = torch.zeros(10, 1, 2, 2, dtype=torch.uint8)
    assert len(extract_features(MeanAndSpread(), images.split(4), 10)) == 10
    with pytest.raises(ValueError, match=r"features of 11 images were asked for .* hold 10"):
        extract_features(MeanAndSpread(), images.split(4), 11)
