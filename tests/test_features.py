"""Features and their cache: the whole split once, stale or damaged files never used."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import torch

from features import dataset_features, extract_features
from splits import TensorSplit


@pytest.fixture
def split() -> TensorSplit:
    images = torch.randint(0, 256, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorSplit("noise/train", images, None)



class MeanAndSpread:
    """Two features that are simple to check, and a count of the images seen."""

    name = "moments"

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
        np.savez(path, **{**stored, "pool": stored["pool"][:10], "logits": stored["logits"][:10]})
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
