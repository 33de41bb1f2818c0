"""The devices of a training, and the layout of images on them."""

import contextlib

import keras
import tensorflow as tf

from diffstride.validation import one_of


def is_channels_first(data_format: str) -> bool:
    """Returns whether a model computes in channels_first.

    'auto' means channels_first on a GPU, except on JAX, where XLA chooses
    layouts.
    """
    if data_format == 'auto':
        return keras.backend.backend() != 'jax' and bool(_gpus())
    return data_format == 'channels_first'


def _gpus():
    """Returns names of the GPUs on which the backend computes."""
    if keras.backend.backend() == 'tensorflow':
        return [device.name for device in tf.config.list_logical_devices('GPU')]
    if keras.backend.backend() == 'jax':
        return [x for x in keras.distribution.list_devices() if 'cpu' not in x]
    import torch

    return list(range(torch.cuda.device_count()))


def scope(distribution: str) -> contextlib.AbstractContextManager:
    """Returns the context in which a model is made, see `train.train`."""
    known = {'tensorflow': 'mirrored', 'jax': 'data_parallel'}
    several = known.get(keras.backend.backend(), 'none')
    one_of('distribution', distribution, ('auto', 'none', several))
    if distribution == 'auto' and len(_gpus()) > 1:
        distribution = several
    if distribution == 'data_parallel':
        # Keras shards each batch over all of its devices.
        keras.distribution.set_distribution(keras.distribution.DataParallel())
    if distribution == 'mirrored':
        cpus = tf.config.list_logical_devices('CPU')
        names = _gpus() or [device.name for device in cpus]
        return tf.distribute.MirroredStrategy(names).scope()
    return contextlib.nullcontext()


def make_deterministic() -> None:
    """Makes two runs of one seed on one machine give equal numbers."""
    tf.config.experimental.enable_op_determinism()
    if keras.backend.backend() == 'torch':
        import torch

        torch.use_deterministic_algorithms(True)
