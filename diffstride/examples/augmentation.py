"""Random changes of training images, each drawn without a state."""

import numpy as np
import tensorflow as tf


def augment(
    images: tf.Tensor, key: tf.Tensor, flip: bool, crop_padding: int
) -> tf.Tensor:
    """Mirrors half of the images and shifts each, at random.

    An image is padded with zeros by `crop_padding` pixels on each side and
    cropped back to its size anywhere inside. The images are [batch, height,
    width, channels], the batch size static; the key is a seed, [2].
    """
    batch, height, width, _ = images.shape
    flip_key, crop_key = tf.unstack(tf.random.split(key))
    rows, columns = tf.range(height)[None], tf.range(width)[None]
    if flip:
        mirrored = tf.random.stateless_uniform([batch, 1], flip_key) < 0.5
        columns = tf.where(mirrored, width - 1 - columns, columns)
    if crop_padding:
        down, right = tf.unstack(
            tf.random.stateless_uniform(
                [2, batch, 1], crop_key, 0, 2 * crop_padding + 1, tf.int32
            )
        )
        rows, columns = rows + down, columns + right
        padding = [crop_padding, crop_padding]
        images = tf.pad(images, [[0, 0], padding, padding, [0, 0]])
        images = tf.gather(images, rows, axis=1, batch_dims=1)
    if flip or crop_padding:
        images = tf.gather(images, columns, axis=2, batch_dims=1)
    return images


def mixup(
    images: tf.Tensor, labels: tf.Tensor, key: tf.Tensor, alpha: float
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mixes each example with another of its batch (arXiv:1710.09412).

        x = lambda x_i + (1 - lambda) x_j,  lambda ~ Beta(alpha, alpha)

    and the labels, one-hot [batch, num_classes], alike. Lambda is drawn for
    each image, where the authors' code draws one per batch: the mean is the
    same and the gradient less noisy. The partner j is the next example; the
    batch is already shuffled. The key is a seed, [2].
    """
    weights = _sample_beta(alpha, images.shape[0], key)

    def mix(x):
        weight = tf.reshape(weights, [-1] + [1] * (x.shape.rank - 1))
        return weight * x + (1 - weight) * tf.roll(x, -1, axis=0)

    return mix(images), mix(labels)


def _sample_beta(alpha, count, key):
    """Draws `count` numbers from Beta(alpha, alpha), float32 [count].

    Beta is G / (G + G') of two Gamma(alpha) draws, which underflow to 0 / 0
    at small alpha. Their logarithms do not: with U uniform,

        log G(alpha) = log G(alpha + 1) + log(U) / alpha
    """
    # Beyond these limits lambda is 0 or 1, or 1/2, to float32 precision.
    alpha = np.clip(np.float64(alpha), 1e-6, 1e12)
    gamma_key, uniform_key = tf.unstack(tf.random.split(key))
    shape = [2, count]
    gamma = tf.random.stateless_gamma(
        shape, gamma_key, alpha + 1, dtype=tf.float64
    )
    uniform = 1 - tf.random.stateless_uniform(
        shape, uniform_key, dtype=tf.float64
    )
    log_gamma = tf.math.log(gamma) + tf.math.log(uniform) / alpha
    return tf.cast(tf.sigmoid(log_gamma[0] - log_gamma[1]), tf.float32)
