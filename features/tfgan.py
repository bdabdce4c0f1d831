"""FID, KID and inception score by tensorflow-gan, the evaluator of score_sde_pytorch and QCSBM, and its own Inception.

Nothing of TensorFlow is loaded before :func:`load_tensorflow_gan` is called. The activations go over in float64, and
KID is asked for one subset at a time, so that both implementations estimate the same number: left to itself
tensorflow-gan would cut the whole sets into blocks of 1024 in the order of their rows.

The Inception of TF-Hub, https://tfhub.dev/tensorflow/tfgan/eval/inception/1, is the network of 2015 again (see
``inception``), with its own resizing and with levels mapped by (x − 127.5)/127.5 instead of (x − 128)/128. A saved
model is a program: take it from nobody but TF-Hub.
"""

from __future__ import annotations

import hashlib
import os
import platform
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from evaluation import Backend
from experiment.files import first_line
from features.inception import rgb_in_8_bits


def load_tensorflow_gan() -> tuple[ModuleType, ModuleType]:
    """The modules ``tensorflow`` and ``tensorflow_gan``, quietly, and leaving torch its share of a GPU; a ValueError if
    they are not installed, or do not work in this environment."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations between releases that no longer change
            import tensorflow
            import tensorflow_gan
    except Exception as error:  # missing, or a release that does not fit and fails in whatever it meets first
        raise ValueError(
            f"eval.backend='tfgan': it cannot be imported ({first_line(error)}); tensorflow-gan needs TensorFlow 2.15, "
            f"and that Python 3.11 or older (this is {platform.python_version()}): see requirements-tfgan.txt. "
            "--config.eval.backend=torch computes the same numbers without"
        ) from error
    tensorflow.get_logger().setLevel("ERROR")
    for gpu in tensorflow.config.list_physical_devices("GPU"):
        tensorflow.config.experimental.set_memory_growth(gpu, True)
    return tensorflow, tensorflow_gan


def tfgan_backend() -> Backend:
    """tensorflow-gan's Fréchet distance, kernel distance and classifier score, of arrays."""
    tensorflow, tensorflow_gan = load_tensorflow_gan()

    def of_float64(function: Callable, **options) -> Callable[..., float]:
        return lambda *arrays: float(function(*(tensorflow.constant(a, tensorflow.float64) for a in arrays), **options))

    def mmd2(x: np.ndarray, y: np.ndarray) -> float:
        one_block = max(len(x), len(y))
        distance = tensorflow_gan.eval.kernel_classifier_distance_from_activations
        return of_float64(distance, max_block_size=one_block)(x, y)

    return Backend(
        name="tensorflow-gan",
        fid=of_float64(tensorflow_gan.eval.frechet_classifier_distance_from_activations),
        mmd2=mmd2,
        inception_score=of_float64(tensorflow_gan.eval.classifier_score_from_logits),
    )


class TFHubFeatures:
    """tensorflow-gan's Inception as a feature extractor: uint8 images (B, 1 or 3, H, W) with levels below
    ``num_levels`` -> ``pool_3`` (B, F) and logits (B, K), on whatever device TensorFlow chooses.

    F is 2048 for the published model; the key names the contents of its ``folder`` and the number of levels.

    Raises:
        ValueError: tensorflow-gan does not work, there is no saved model, or it does not map images to ``pool_3`` and
            ``logits``.
    """

    name = "inception-tfhub"

    def __init__(self, folder: str | Path, *, num_levels: int = 256) -> None:
        folder = Path(folder).expanduser()
        if not (folder / "saved_model.pb").is_file():
            raise ValueError(
                f"eval.tfhub_inception={folder}: no saved_model.pb in it; it wants the unpacked folder of "
                "https://tfhub.dev/tensorflow/tfgan/eval/inception/1 (…?tf-hub-format=compressed)"
            )
        self._tensorflow, self._tensorflow_gan = load_tensorflow_gan()
        import tensorflow_hub  # comes with tensorflow-gan

        try:
            self._model = tensorflow_hub.load(str(folder))
            pool, _ = self._run(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
        except Exception as error:  # TensorFlow raises what it likes on models that it cannot read or call
            raise ValueError(
                f"eval.tfhub_inception={folder}: it does not map images to pool_3 and logits ({first_line(error)})"
            ) from error
        digest = hashlib.sha256()
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + file.read_bytes())
        self.num_levels = num_levels
        self.dimension = pool.shape[1]
        self.key = f"tfhub-{digest.hexdigest()}-{num_levels}"

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        images = rgb_in_8_bits(images, self.num_levels)
        parts = [self._run(part) for part in images.split(64)]
        pool, logits = (torch.cat(part) for part in zip(*parts, strict=True))
        return pool, logits

    def _run(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tensorflow = self._tensorflow

        def classifier(x):
            output = self._model(x)
            return {name: tensorflow.reshape(output[name], (len(x), -1)) for name in ("pool_3", "logits")}

        pixels = images.permute(0, 2, 3, 1).numpy().astype(np.float32)
        output = self._tensorflow_gan.eval.run_classifier_fn(
            tensorflow.constant((pixels - 127.5) / 127.5),
            classifier,
            dtypes={"pool_3": tensorflow.float32, "logits": tensorflow.float32},
        )
        return torch.from_numpy(output["pool_3"].numpy()), torch.from_numpy(output["logits"].numpy())
