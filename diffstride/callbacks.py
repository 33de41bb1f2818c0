"""Keras callbacks that show what strides do while they learn, and end it."""

import os
import warnings

import gin
import keras
import numpy as np
from keras import tree

from diffstride import validation
from diffstride.complexity import measure
from diffstride.pooling import diffstride_layers

_AXES = {
    1: ('time',),
    2: ('height', 'width'),
    3: ('depth', 'height', 'width'),
}


class StrideLogger(keras.callbacks.Callback):
    """Adds every stride, output size and the MACs to the logs of each epoch.

    The names are 'stride/<layer>/<axis>', 'size/<layer>/<axis>', in samples,
    and 'macs', for one image, of the layers whose MACs are known. Callbacks
    that come after it (History, CSVLogger, TensorBoard) receive them.

    Args:
        input_shape: [height, width, channels] that sizes and MACs are told for;
            None for the input shape of the model. They are left out where it
            has unknown sizes.
        log_dir: Folder in which TensorBoard finds images of the masks, white
            for what is kept and the mean in the middle, under 'masks'. They
            need TensorFlow, and are left out where sizes are. None for no
            images.

    Raises:
        ValueError: If an argument is out of its range. Before training, if two
            layers of the model have one name.

    Example:

    >>> model.fit(x, y, callbacks=[StrideLogger(), TensorBoard('logs')])
    """

    def __init__(self, input_shape=None, log_dir=None):
        super().__init__()
        validation.require(
            input_shape is None
            or all(
                size is None or validation.is_integer(size, least=1)
                for size in tree.flatten(input_shape)
            ),
            '`input_shape` must be None or [height, width, channels]',
            input_shape=input_shape,
        )
        validation.require(
            log_dir is None or isinstance(log_dir, (str, os.PathLike)),
            '`log_dir` must be the path of a folder, or None',
            log_dir=log_dir,
        )
        self.input_shape = input_shape
        self.log_dir = log_dir
        self._writer = None

    def set_model(self, model):
        super().set_model(model)
        names = [layer.name for layer in diffstride_layers(model)]
        validation.require(
            len(set(names)) == len(names),
            'Layers of a model must differ in `name` to be logged',
            name=names,
        )

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        layers = diffstride_layers(self.model)
        for layer in layers:
            for axis, stride in zip(_AXES[layer.rank], layer.stride_values):
                logs[f'stride/{layer.name}/{axis}'] = stride
        shape = self.input_shape or _input_shape(self.model)
        if shape is None or None in tree.flatten(shape):
            return
        rows, calls = measure(self.model, shape)
        layers = [layer for layer in layers if layer in calls]
        for layer in layers:
            output_shape = calls[layer][-1].outputs[-1]
            for axis, index in zip(_AXES[layer.rank], layer.spatial_axes):
                logs[f'size/{layer.name}/{axis}'] = output_shape[index]
        logs['macs'] = sum(row.macs or 0 for row in rows.values())
        if self.log_dir is not None:
            for layer in layers:
                self._write_mask(epoch, layer, calls[layer][-1].inputs[-1])

    def _write_mask(self, epoch, layer, shape):
        import tensorflow as tf

        if self._writer is None:
            self._writer = tf.summary.create_file_writer(
                os.path.join(self.log_dir, 'masks')
            )
        sizes = [shape[axis] for axis in layer.spatial_axes]
        with self._writer.as_default(epoch):
            image = np.atleast_2d(layer.mask(sizes))
            while image.ndim > 2:
                image = image[len(image) // 2]  # The plane of the mean.
            tf.summary.image(f'mask/{layer.name}', image[None, ..., None])

    def on_train_end(self, logs=None):
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _input_shape(model):
    """Without the batch axis, in the structure of the inputs, or None."""
    shape = getattr(model, 'input_shape', None)  # A subclass has none.
    if isinstance(shape, dict):
        return {name: x[1:] for name, x in shape.items()}
    if shape and isinstance(shape[0], (list, tuple)):
        return [x[1:] for x in shape]
    return shape and shape[1:]


@gin.register(module='callbacks')
class SettleStrides(keras.callbacks.Callback):
    """Ends the learning of strides before that of the weights.

    Sizes that change until the end cost accuracy; from the given epoch on all
    strides and sizes stay as they are, and the rest of the training fits the
    weights to them. Just before, the strides of a `StrideCostModel` whose cost
    has a budget are scaled to meet it, see `MacsCost.meet_budget`; if they
    cannot, a warning says so.

    Args:
        epoch: Number of epochs in which strides are learned, at least 0.

    Raises:
        ValueError: If the epoch is not an integer >= 0.

    Example:

    >>> model.fit(x, y, epochs=10, callbacks=[SettleStrides(epoch=5)])
    """

    def __init__(self, epoch):
        super().__init__()
        validation.require(
            validation.is_integer(epoch, least=0),
            '`epoch` must be an integer, at least 0',
            epoch=epoch,
        )
        self.epoch = epoch

    def on_epoch_begin(self, epoch, logs=None):
        layers = diffstride_layers(self.model)
        if epoch < self.epoch or all(layer.settled for layer in layers):
            return
        for model in self.model._flatten_layers():
            cost = getattr(model, 'stride_cost', None)
            if hasattr(cost, 'meet_budget') and not cost.meet_budget(model):
                warnings.warn(
                    f'No strides meet the budget of {cost.budget:,.0f} MACs, '
                    'so they settle as they are',
                    stacklevel=2,
                )
        for layer in layers:
            layer.settle()
        _compile_anew(self.model)


@gin.register(module='callbacks')
class RepinStrides(keras.callbacks.Callback):
    """Lets output sizes that are constants follow the strides by epochs.

    Where XLA compiles a model, that is in `fit` on JAX and with
    `jit_compile=True` on TensorFlow, its output sizes are *pinned*: they stay
    while the strides learn. This pins all layers again at the end of each
    epoch, and at the beginning of training. Only if the size of a map that was
    computed changes by that are the train, test and predict functions compiled
    again. Layers that are not pinned, where sizes follow at each step, and
    layers that are settled stay as they are, so it does no harm anywhere.

    It comes after callbacks that save the model, so that what they save has
    the sizes that were trained and validated in the epoch.

    Example:

    >>> model.fit(x, y, epochs=10, callbacks=[RepinStrides()])
    """

    def on_train_begin(self, logs=None):
        if keras.backend.backend() == 'jax' and self.model.jit_compile:
            for layer in diffstride_layers(self.model):
                if layer.pinned_strides is None:
                    layer.pin()
        self._repin()

    def on_epoch_end(self, epoch, logs=None):
        self._repin()

    def _repin(self):
        layers = [
            layer
            for layer in diffstride_layers(self.model)
            if layer.pinned_strides is not None and not layer.settled
        ]
        if any([layer.repin() for layer in layers]):
            _compile_anew(self.model)


def _compile_anew(model):
    """Makes the functions of a model anew, for maps of other sizes."""
    for inner in model._flatten_layers(include_self=False):
        if isinstance(inner, keras.Model) and inner.input_spec is not None:
            inner.input_spec = None  # It would insist on those it was made for.
    model.make_train_function(force=True)
    model.make_test_function(force=True)
    model.make_predict_function(force=True)
