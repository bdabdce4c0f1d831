"""Inception's features: what torch-fidelity computes, from the right file or none."""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from traps import Trap

from features import inception
from features.inception import InceptionFeatures, find_weights, rgb_in_8_bits


def random_images(count: int, channels: int = 3, num_levels: int = 256, size: int = 32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, num_levels, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def test_features_are_those_of_torch_fidelity(inception_weights):
    path, sha256 = inception_weights
    state = torch.get_rng_state()
    extractor = InceptionFeatures(path, sha256=sha256, device="cpu")
    assert torch.equal(state, torch.get_rng_state())
    images = random_images(3)
    pool, logits = extractor(images)
    assert pool.shape == (3, 2048) and logits.shape == (3, 1008) and not pool.requires_grad
    assert extractor.dimension == 2048
    # By torch-fidelity itself, from the file: the extractor and the layers that it names for its own metrics.
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Original

    names = [Original.get_default_feature_layer_for_metric(metric) for metric in ("fid", "isc")]
    with torch.no_grad():
        original = Original("inception", names, str(path))(images)
    assert torch.equal(pool, original[0]) and torch.equal(logits, original[1])
    assert (pool - pool[:1])[1:].abs().max() > 0.01  # it sees the images


def test_images_pass_in_parts(inception_weights):
    """More images than go through at once, each with its own features; a stand-in saves the time of the network."""
    path, sha256 = inception_weights
    extractor = InceptionFeatures(path, sha256=sha256, device="cpu")
    seen = []

    class Means(torch.nn.Module):
        def forward(self, images):
            seen.append(len(images))
            return images.float().mean((2, 3)), images.float().amax((2, 3))

    extractor.network = Means()
    images = random_images(150, size=4)
    pool, logits = extractor(images)
    assert seen == [64, 64, 22]
    assert torch.equal(pool, images.float().mean((2, 3))) and torch.equal(logits, images.float().amax((2, 3)))


def test_grey_images_and_fewer_levels_fill_the_range():
    grey = random_images(4, channels=1, num_levels=17, size=8)
    shown = rgb_in_8_bits(grey, 17)
    assert shown.shape == (4, 3, 8, 8) and shown.dtype == torch.uint8
    for channel in range(3):
        assert np.array_equal(shown[:, channel].numpy(), np.rint(grey[:, 0].numpy() * (255 / 16)))
    assert int(shown.min()) == 0 and int(shown.max()) == 255
    colour = random_images(4)
    assert torch.equal(rgb_in_8_bits(colour, 256), colour)
    with pytest.raises(ValueError, match="pixels must be 0 … 16, but one is"):
        rgb_in_8_bits(colour, 17)
    for wrong in (colour.float(), colour[:, :2], colour[0]):
        with pytest.raises(ValueError, match=r"uint8 of shape \(B, 1 or 3, H, W\)"):
            rgb_in_8_bits(wrong, 256)


def test_only_the_expected_file_is_used(inception_weights, tmp_path):
    path, sha256 = inception_weights
    with pytest.raises(ValueError, match=rf"SHA-256 is {sha256}, not {inception.SHA256}.*inception_sha256={sha256}"):
        InceptionFeatures(path, device="cpu")
    extractor = InceptionFeatures(path, sha256=sha256.upper(), num_levels=17, device="cpu")
    # The name says that these are not the published weights, the key which they are.
    assert extractor.name == f"inception-{sha256[:8]}"
    assert sha256 in extractor.key and extractor.key.endswith("-17")

    trace = tmp_path / "executed"
    for content in (pickle.dumps(Trap(trace), 2), b"nothing", b""):
        (tmp_path / "weights.pth").write_bytes(content)
        with pytest.raises(ValueError, match=r"weights\.pth does not hold the weights of torch-fidelity's Inception"):
            InceptionFeatures(tmp_path / "weights.pth", sha256=hashlib.sha256(content).hexdigest(), device="cpu")
    assert not trace.exists()
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    with pytest.raises(ValueError, match="does not hold the weights") as caught:
        InceptionFeatures(tmp_path / "weights.pth", sha256=hashlib.sha256(content).hexdigest(), device="cpu")
    assert "\n" not in str(caught.value)


def test_the_published_weights_are_called_inception(inception_weights, monkeypatch):
    path, sha256 = inception_weights
    monkeypatch.setattr(inception, "SHA256", sha256)
    assert InceptionFeatures(path, device="cpu").name == "inception"


def test_where_the_weights_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    given = tmp_path / "weights.pth"
    with pytest.raises(ValueError, match=r"eval\.inception_path=\S+weights\.pth: no such file; it is at https://"):
        find_weights(given)
    given.write_bytes(b"x")
    assert find_weights(given) == find_weights(str(given)) == given

    requests = []

    def offline(url, destination, hash_prefix):
        requests.append((url, hash_prefix))
        raise URLError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    cached = tmp_path / "torch" / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError) as caught:
        find_weights("")
    message = str(caught.value)
    for part in (str(cached), inception.URL, "no route", "--config.eval.inception_path=", "eval.features=classifier"):
        assert part in message
    assert "\n" not in message
    # Fetched where torch-fidelity keeps it, under the hash that is also in its name.
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, hash_prefix: Path(path).write_bytes(b"y"))
    assert find_weights("") == cached and cached.read_bytes() == b"y"
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    assert find_weights("") == cached
    assert requests == [(inception.URL, inception.SHA256)]
    assert inception.SHA256[:8] == cached.stem.rpartition("-")[2] and len(inception.SHA256) == 64


def test_torch_fidelity_still_uses_these_weights():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert inception.URL == URL_INCEPTION_V3
