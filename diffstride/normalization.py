"""Batch normalization that TensorFlow computes in one operation."""

from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable(package='diffstride')
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization, in one operation where TensorFlow trains it.

    It is `keras.layers.BatchNormalization`, with the same arguments, weights
    and results. That layer computes about ten operations on the whole feature
    map. TensorFlow has one for all, which is used in training with the channels
    last. A thin ResNet then trains about twice as fast on a CPU in bfloat16.
    Everywhere else this layer computes what Keras's does.

    Args:
        **kwargs: Arguments of `keras.layers.BatchNormalization`.

    Input shape:
        [batch, ..., channels], or other axes by `axis`.

    Output shape:
        That of the input.

    Example:

    >>> layer = BatchNormalization(momentum=0.9)
    >>> tuple(layer(keras.ops.ones((4, 8, 8, 3)), training=True).shape)
    (4, 8, 8, 3)

    Reference: Ioffe and Szegedy, 2015 (arXiv:1502.03167), algorithm 1.
    """

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> Any:
        if not (training and mask is None and self._has_one_operation(inputs)):
            return super().call(inputs, training=training, mask=mask)
        import tensorflow as tf

        channels = inputs.shape[-1]
        ones = tf.ones(channels)
        x = tf.reshape(
            ops.cast(inputs, self.compute_dtype), [-1, 1, 1, channels]
        )
        y, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=x,
            scale=ops.cast(self.gamma, 'float32') if self.scale else ones,
            offset=ops.cast(self.beta, 'float32') if self.center else 0 * ones,
            mean=tf.zeros(0),
            variance=tf.zeros(0),
            epsilon=self.epsilon,
            is_training=True,
        )
        # The operation divides the sum of squares by count - 1, Keras by count.
        count = tf.cast(tf.shape(x)[0], 'float32')
        for moving, value in (
            (self.moving_mean, mean),
            (self.moving_variance, variance * ((count - 1) / count)),
        ):
            value = ops.cast(value, moving.dtype)
            moving.assign(moving * self.momentum + value * (1 - self.momentum))
        return tf.reshape(y, tf.shape(inputs))

    def _has_one_operation(self, inputs):
        return (
            keras.backend.backend() == 'tensorflow'
            and self.trainable
            and self.axis in (-1, len(inputs.shape) - 1)
            and self.compute_dtype in ('float16', 'bfloat16', 'float32')
            and not (self.renorm or self.synchronized)
        )
