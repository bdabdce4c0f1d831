"""The features of Inception v3 as the literature measures FID with it: the network of 2015 in torch-fidelity.

It sees RGB images in 8 bits of any size, enlarged to 299×299 as TensorFlow 1 did (torch-fidelity's own resizing), and
gives the 2048 features of its last pooling (``pool_3``) and 1008 logits. The logits are without the bias of the last
layer, as OpenAI's code for the inception score has them and torch-fidelity after it. Deviation from score_sde_pytorch
and QCSBM: those use the same network as TF-Hub has it, see ``features.tfgan``.

The weights are those that TensorFlow published, converted by torch-fidelity. They are a pickle of known hash: the bytes
are compared with it first, and unpickled with ``weights_only`` all the same.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import torch
from torch import Tensor

from experiment.files import first_line
from features.extraction import check_images, reproducible_convolutions

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def find_weights(path: str | Path) -> Path:
    """The file of weights: ``path``, or where torch-fidelity keeps them, fetched into there if need be.

    ``path`` is ``config.eval.inception_path``; empty: torch's cache (``TORCH_HOME``, by default ~/.cache/torch). A
    ValueError if there is no such file, or it is not in the cache and cannot be fetched.
    """
    if str(path):
        given = Path(path).expanduser()
        if not given.is_file():
            raise ValueError(f"eval.inception_path={path}: no such file; it is at {URL}")
        return given
    cached = Path(torch.hub.get_dir()) / "checkpoints" / URL.rpartition("/")[2]
    if not cached.exists():
        try:
            cached.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL, str(cached), hash_prefix=SHA256)
        except (OSError, RuntimeError) as error:  # no network, no such page; another hash
            raise ValueError(
                f"eval.features='inception': the weights of Inception are not in {cached} and could not be fetched "
                f"({first_line(error)}). Fetch {URL} (96 MB) and put it there, or anywhere and give "
                "--config.eval.inception_path=FILE; or do without Inception: --config.eval.features=classifier (its "
                "numbers compare only with each other), --config.eval.enable_sampling=False"
            ) from error
    return cached


class InceptionFeatures:
    """Inception v3 as a feature extractor: uint8 images (B, 1 or 3, H, W) -> ``pool_3`` (B, 2048), logits (B, 1008).

    Grey images are shown to it as RGB ones of equal channels; levels 0 … L−1 are spread over 0 … 255. Images pass in
    parts of 64, so that memory does not grow with the batch.

    Args:
        path: the file of weights.
        sha256: the hash that the file must have; empty: that of the published weights, with which the extractor's name
            is "inception"; else the name has a part of the hash.
        num_levels: number L of grey levels of the images.
        device: where to compute.

    Raises:
        ValueError: the file has another hash, or does not hold weights of this network.
    """

    dimension = 2048

    def __init__(
        self, path: str | Path, *, sha256: str = "", num_levels: int = 256, device: torch.device | str
    ) -> None:
        # Slow to import, and not needed for other features.
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        expected = sha256.lower() or SHA256
        content = Path(path).read_bytes()
        found = hashlib.sha256(content).hexdigest()
        if found != expected:
            raise ValueError(
                f"the weights of Inception in {path} are not those expected: SHA-256 is {found}, not {expected}. Fetch "
                f"{URL} again; other weights of the same network need --config.eval.inception_sha256={found}"
            )
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            # torch-fidelity unpickles what it is given without reserve: it is given a copy of our own making.
            copy = io.BytesIO()
            torch.save(state, copy)
            copy.seek(0)
            with torch.random.fork_rng(devices=[]):  # the constructor draws initial weights
                network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], copy)
        except (RuntimeError, pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{path} does not hold the weights of torch-fidelity's Inception: {first_line(error)}"
            ) from error
        self.network = network.to(device)
        self.device = torch.device(device)
        self.num_levels = num_levels
        self.name = "inception" if found == SHA256 else f"inception-{found[:8]}"
        self.key = f"inception-{found}-{num_levels}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = rgb_in_8_bits(images, self.num_levels)
        with reproducible_convolutions():
            parts = [self.network(part.to(self.device)) for part in images.split(64)]
        pool, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return pool, logits


def rgb_in_8_bits(images: Tensor, num_levels: int) -> Tensor:
    """Levels 0 … L−1 of (B, 1 or 3, H, W) spread over 0 … 255 and rounded; three equal channels of one."""
    check_images("Inception", images, "(B, 1 or 3, H, W)", images.ndim == 4 and images.shape[1] in (1, 3), num_levels)
    if num_levels != 256:
        images = (images.float() * (255 / (num_levels - 1))).round().to(torch.uint8)
    return images.expand(-1, 3, -1, -1)
