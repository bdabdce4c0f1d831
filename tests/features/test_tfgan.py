"""tensorflow-gan, the second implementation of FID, KID and the inception score, and its own Inception from a folder.

TensorFlow is loaded once, in a process of its own, whose answers the tests share.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from evaluation import OWN_BACKEND, Features, kid, sample_quality
from features import tfgan

ROOT = Path(__file__).parents[2]
absent = any(importlib.util.find_spec(name) is None for name in ("tensorflow", "tensorflow_gan"))


def with_tensorflow(test):
    return pytest.mark.skipif(absent, reason="TensorFlow is not installed: make tfgan")(test)


PROGRAM = """
import json, sys
from pathlib import Path
from types import ModuleType
import numpy as np, torch
from evaluation import Features, kid, sample_quality
from features.tfgan import TFHubFeatures, tfgan_backend

sys.path.insert(0, "tests")
import saved_model
folder = Path(sys.argv[1])
loaded_too_early = "tensorflow" in sys.modules
with np.load(folder / "arrays.npz", allow_pickle=False) as file:
    arrays = dict(file)
backend = tfgan_backend()
answers = {"loaded_too_early": loaded_too_early, "quality": {}, "score": {}}
for case in ("few", "many"):
    generated = Features(arrays[case + "_generated"], arrays[case + "_logits"])
    answers["quality"][case] = sample_quality(arrays[case + "_real"], generated, seed=3, backend=backend)
real, generated = arrays["many_real"], arrays["many_generated"]
answers["subset_kid"] = kid(real, generated, num_subsets=7, subset_size=20, seed=1, mmd2=backend.mmd2)
for case in ("one_hot", "uniform"):
    answers["score"][case] = backend.inception_score(arrays[case])

saved_model.save(str(folder / "hub"))
extractor = TFHubFeatures(folder / "hub")
images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
pool, logits = extractor(images)
grey = TFHubFeatures(folder / "hub", num_levels=17)
np.savez(folder / "features.npz", pool=pool, logits=logits, grey=grey(images[:, :1] // 16)[0])
answers["dimension"], answers["name"] = extractor.dimension, extractor.name
keys = [extractor.key, TFHubFeatures(folder / "hub").key, grey.key]
(folder / "hub" / "assets" / "more").write_bytes(b"another")
answers["keys"] = [*keys, TFHubFeatures(folder / "hub").key]

import tensorflow as tf
class Other(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3))])
    def __call__(self, images):
        return {"pool_3": images}
tf.saved_model.save(Other(), str(folder / "other"))
(folder / "damaged").mkdir()
(folder / "damaged" / "saved_model.pb").write_bytes(b"nothing")
answers["errors"] = []
for name in ("other", "damaged"):
    try:
        TFHubFeatures(folder / name)
    except ValueError as error:
        answers["errors"].append(str(error))
print(json.dumps(answers))
"""


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.fixture(scope="module")
def arrays() -> dict[str, np.ndarray]:
    """Features of sets that are well apart, one of fewer images than dimensions, and logits with known scores."""
    mixing = normal(9, 30, 30) / 5
    return {
        "few_real": normal(0, 24, 30) @ mixing,
        "few_generated": (1.3 * normal(1, 20, 30) + 0.5) @ mixing,
        "few_logits": 3 * normal(2, 20, 12),
        "many_real": normal(3, 400, 30) @ mixing,
        "many_generated": (1.1 * normal(4, 300, 30) + 0.4) @ mixing,
        "many_logits": 3 * normal(5, 300, 12),
        "one_hot": np.tile(1000 * np.eye(8), (3, 1)),
        "uniform": np.full((16, 8), 2.5),
        "images": np.random.default_rng(6).integers(0, 256, (70, 6, 5, 3), dtype=np.uint8),
    }


@pytest.fixture(scope="module")
def answered(arrays, tmp_path_factory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("tensorflow")
    np.savez(folder / "arrays.npz", **arrays)
    program = [sys.executable, "-c", PROGRAM, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    answer = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert answer.returncode == 0, answer.stderr
    assert not answer.stderr  # TensorFlow has been quietened
    return json.loads(answer.stdout.splitlines()[-1]), folder


@with_tensorflow
@pytest.mark.parametrize("case", ["few", "many"])
def test_both_backends_give_the_same_numbers(case, arrays, answered):
    generated = Features(arrays[f"{case}_generated"], arrays[f"{case}_logits"])
    own = sample_quality(arrays[f"{case}_real"], generated, seed=3, backend=OWN_BACKEND)
    theirs = answered[0]["quality"][case]
    assert own["kid"] > 0.1 and own["fid"] > 1 and own["inception_score"] > 2  # far from where relative errors blow up
    for name, value in own.items():
        assert theirs[name] == pytest.approx(value, rel=1e-6), name
    if case == "many":
        expected = kid(arrays["many_real"], generated.pool, num_subsets=7, subset_size=20, seed=1)
        assert answered[0]["subset_kid"] == pytest.approx(expected, rel=1e-6)


@with_tensorflow
def test_inception_score_of_certain_and_of_uniform_predictions(answered):
    assert answered[0]["score"] == {"one_hot": pytest.approx(8, rel=1e-12), "uniform": pytest.approx(1, rel=1e-12)}


@with_tensorflow
def test_features_of_a_saved_model(arrays, answered):
    import saved_model

    answers, folder = answered
    with np.load(folder / "features.npz", allow_pickle=False) as file:
        pool, logits, grey = file["pool"], file["logits"], file["grey"]
    expected_pool, expected_logits = saved_model.expected(arrays["images"])
    np.testing.assert_allclose(pool, expected_pool, atol=1e-6)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5)
    shown = np.rint((arrays["images"][..., :1] // 16) * (255 / 16)).repeat(3, axis=3)
    np.testing.assert_allclose(grey, saved_model.expected(shown)[0], atol=1e-6)
    assert (answers["dimension"], answers["name"]) == (4, "inception-tfhub")
    first, again, other_levels, other_files = answers["keys"]
    assert first == again and len({first, other_levels, other_files}) == 3


@with_tensorflow
def test_saved_models_of_another_kind_are_refused(answered):
    errors = answered[0]["errors"]
    assert len(errors) == 2
    for name, error in zip(("other", "damaged"), errors, strict=True):
        assert f"{name}: it does not map images to pool_3 and logits" in error and "\n" not in error


@with_tensorflow
def test_tensorflow_is_not_loaded_before_it_is_asked_for(answered):
    assert answered[0]["loaded_too_early"] is False


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"eval\.tfhub_inception=.*: no saved_model\.pb in it.*tfhub\.dev"):
        tfgan.TFHubFeatures(tmp_path)
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("missing", ["tensorflow", "tensorflow_gan"])
def test_missing_tensorflow_is_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", ModuleType("tensorflow"))
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError) as caught:
        tfgan.tfgan_backend()
    message = str(caught.value)
    for part in ("eval.backend='tfgan'", f"import of {missing} ", "Python 3.11", "--config.eval.backend=torch"):
        assert part in message
    assert "\n" not in message


def test_a_broken_installation_is_named(monkeypatch, tmp_path):
    for name in ("tensorflow", "tensorflow_gan"):
        (tmp_path / f"{name}.py").write_text("raise AttributeError('no attribute\\nof that name')\n")
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"it cannot be imported \(no attribute\); .*--config\.eval\.backend=torch"):
        tfgan.tfgan_backend()
