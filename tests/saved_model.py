"""A saved model that is called as TF-Hub's Inception is, and small enough to be followed by hand.

It maps images (B, H, W, 3) in [−1, 1] to ``pool_3`` (B, 1, 1, 4), the means of the channels and of their product, and
to ``logits`` (B, 5), which are linear in those.
"""

from __future__ import annotations

import numpy as np

WEIGHTS = 3 * np.random.default_rng(0).standard_normal((4, 5)).astype(np.float32)


def expected(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``pool_3`` (B, 4) and ``logits`` (B, 5) of uint8 images (B, H, W, 3)."""
    x = (images.astype(np.float64) - 127.5) / 127.5
    pool = np.concatenate([x.mean((1, 2)), x.prod(3, keepdims=True).mean((1, 2))], axis=1)
    return pool, pool @ WEIGHTS


def save(folder: str) -> None:
    """To be called in a process of its own: TensorFlow is slow to load, and warns."""
    import tensorflow as tf

    class Inception(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec((None, None, None, 3), tf.float32)])
        def __call__(self, images):
            product = tf.reduce_prod(images, axis=3, keepdims=True)
            pool = tf.reduce_mean(tf.concat([images, product], axis=3), axis=(1, 2), keepdims=True)
            return {"pool_3": pool, "logits": tf.linalg.matmul(tf.reshape(pool, (-1, 4)), tf.constant(WEIGHTS))}

    tf.saved_model.save(Inception(), folder)
