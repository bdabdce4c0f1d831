"""Features, by whichever extractor; where those of the data are kept; published statistics."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from traps import Trap

from configs.defaults import base_config
from data import TensorSplit
from evaluation import OWN_BACKEND, Backend
from experiment.runtime import Runtime
from features import SampleQuality, extract_features, make_extractor
from features.quality import _read_statistics

POOL = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
LOGITS = np.random.default_rng(1).standard_normal((6, 3))


@pytest.mark.parametrize(
    "arrays",
    [{"pool_3": POOL, "logits": LOGITS}, {"pool_3": POOL, "logit": LOGITS}, {"pool_3": POOL.astype(float)}],
    ids=["score_sde_pytorch", "QCSBM", "features alone"],
)
def test_published_statistics_are_read(arrays, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    pool = _read_statistics(tmp_path / "stats.npz", 5, image_size=32)
    assert pool.dtype == np.float32 and np.array_equal(pool, POOL)


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": POOL, "sigma": POOL}, r"has no array pool_3 \(it has mu, sigma\)"),
        ({"pool_3": POOL[:, :4]}, r"shape \(N, 5\) .* not float32 of shape \(6, 4\)"),
        ({"pool_3": POOL[0]}, r"not float32 of shape \(5,\)"),
        ({"pool_3": POOL[:3]}, r"N of at least 4, not float32 of shape \(3, 5\)"),
        ({"pool_3": (255 * POOL).astype(np.uint8)}, "floating-point numbers .* not uint8"),
        ({"pool_3": np.where(POOL > 1, np.nan, POOL)}, "pool_3 must be finite"),
        ({"pool_3": np.array([[None] * 5] * 6)}, "objects, which are pickled"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_statistics_are_refused(arrays, message, tmp_path):
    np.savez(tmp_path / "stats.npz", **arrays)
    with pytest.raises(ValueError, match=rf"eval\.stats_path: .*stats\.npz.* {message}"):
        _read_statistics(tmp_path / "stats.npz", 5, image_size=32)


def test_published_statistics_of_large_images_are_of_another_inception(tmp_path):
    """From 256 pixels on the public code takes another network, whose features are 2048 too; our own files are read."""
    pool = np.random.default_rng(0).standard_normal((4, 2048)).astype(np.float32)
    np.savez(tmp_path / "lsun_church_256_stats.npz", pool_3=pool)
    with pytest.raises(ValueError, match=r"eval\.stats_path: .*church_256_stats\.npz .* those of another Inception"):
        _read_statistics(tmp_path / "lsun_church_256_stats.npz", 2048, image_size=256)
    assert np.array_equal(_read_statistics(tmp_path / "lsun_church_256_stats.npz", 2048, image_size=255), pool)
    np.savez(tmp_path / "own.npz", pool_3=pool, key="…")
    assert np.array_equal(_read_statistics(tmp_path / "own.npz", 2048, image_size=256), pool)


def test_files_that_are_no_archives_are_refused(tmp_path):
    path = tmp_path / "stats.npz"
    with pytest.raises(ValueError, match=r"eval\.stats_path: .*stats\.npz is missing"):
        _read_statistics(path, 5, image_size=32)
    np.savez(path, pool_3=POOL)
    whole = path.read_bytes()
    (tmp_path / "single.npy").write_bytes(b"")
    np.save(tmp_path / "single.npy", POOL)
    trace = tmp_path / "executed"
    single = (tmp_path / "single.npy").read_bytes()
    for content in (whole[: len(whole) // 2], b"nothing", single, pickle.dumps(Trap(trace))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"eval\.stats_path: .*damaged"):
            _read_statistics(path, 5, image_size=32)
    assert not trace.exists()


# ------------------------------------------------------------------------------------------------------- extractors


class MeanAndDeviation:
    """Two features that are simple to check, and a record of the batches seen."""

    name, dimension = "moments", 2

    def __init__(self, num_levels: int = 256, device: object = "cpu") -> None:
        self.key, self.seen = f"moments-{num_levels}", []

    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(len(images))
        x = images.double().flatten(1)
        return torch.stack([x.mean(1), x.std(1)], 1), x[:, :3]


@pytest.fixture
def split() -> TensorSplit:
    images = torch.randint(0, 17, (100, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return TensorSplit("noise/train", images, None, num_levels=17)


def test_features_of_all_images_in_batches(split):
    extractor = MeanAndDeviation()
    features = extract_features(extractor, split.images, 33)
    assert extractor.seen == [33, 33, 33, 1] and len(features.pool) == 100
    assert features.pool.dtype == features.logits.dtype == np.float32
    np.testing.assert_allclose(features.pool[:, 0], split.images.double().mean((1, 2, 3)), rtol=1e-6)
    assert np.array_equal(features.logits, split.images.flatten(1)[:, :3])
    whole = extract_features(extractor, split.images)
    assert extractor.seen[4:] == [100] and np.array_equal(whole.pool, features.pool)


@pytest.fixture
def of_a_test(monkeypatch) -> dict:
    """Settings whose extractor and backend are named by their import path."""
    import features

    backend = Backend("mine", lambda x, y: 1.0, lambda x, y: 2.0, lambda logits: 3.0)
    monkeypatch.setattr(features, "extractor_of_a_test", MeanAndDeviation, raising=False)
    monkeypatch.setattr(features, "backend_of_a_test", lambda: backend, raising=False)
    given = dict(features="features:extractor_of_a_test", backend="features:backend_of_a_test")
    return dict(base_config().eval) | given | dict(num_reference=0)


def test_an_extractor_by_its_name_or_import_path(split, of_a_test):
    options = {"seed": 0, "cache_dir": "nowhere", "runtime": Runtime("cpu")}
    assert make_extractor(of_a_test, split, split, **options).key == "moments-17"
    for given, message in {
        ("vgg", ""): r"eval\.features='vgg': allowed are inception, classifier, or module:attribute",
        ("inception", "inception_path"): r"eval\.inception_path=gone: no such file",
        ("inception", "tfhub_inception"): r"eval\.tfhub_inception=gone: no saved_model\.pb in it",
    }.items():
        with pytest.raises(ValueError, match=message):
            make_extractor(of_a_test | {"features": given[0], given[1]: "gone"}, split, split, **options)


def test_a_backend_by_its_name_or_import_path(split, of_a_test, tmp_path):
    def backend(settings: dict) -> Backend:
        return SampleQuality(settings, split, split, tmp_path, Runtime("cpu"), seed=0).backend

    assert backend(of_a_test).name == "mine" and backend(of_a_test | dict(backend="torch")) is OWN_BACKEND
    with pytest.raises(ValueError, match=r"eval\.backend='jax': allowed are torch, tfgan, or module:attribute"):
        backend(of_a_test | dict(backend="jax"))


def test_features_of_other_data_or_fewer_images_are_in_other_files(split, of_a_test, tmp_path):
    def reference(data: TensorSplit, count: int = 0) -> Path:
        settings = of_a_test | dict(num_reference=count)
        return SampleQuality(settings, data, data, tmp_path, Runtime("cpu"), seed=0).reference()[0]

    path = reference(split)
    assert path.parent == tmp_path and path.name.startswith("features-noise-train-") and path.suffix == ".npz"
    changed = TensorSplit(split.name, split.images // 2, None, num_levels=17)
    assert reference(split, 100) == path and len({path, reference(split, 99), reference(changed)}) == 3
