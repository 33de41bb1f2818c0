"""Keras callbacks that show what strides do while they learn."""

import contextlib

import keras
from keras import ops

from diffstride.complexity import recorded
from diffstride.pooling import diffstride_layers

_AXES = {
    1: ('time',),
    2: ('height', 'width'),
    3: ('depth', 'height', 'width'),
}


class StrideLogger(keras.callbacks.Callback):
    """Adds every stride and every output size to the logs of each epoch.

    The names are 'stride/<layer>/<axis>' and 'size/<layer>/<axis>', in samples.
    Callbacks that come after it (History, CSVLogger, TensorBoard) receive them.

    Args:
        input_shape: [height, width, channels] that the sizes are told for; None
            for the input shape of the model. Sizes are left out where it has
            unknown sizes.

    Example:

    >>> model.fit(x, y, callbacks=[StrideLogger(), TensorBoard('logs')])
    """

    def __init__(self, input_shape=None):
        super().__init__()
        self.input_shape = input_shape

    def on_epoch_end(self, epoch, logs=None):
        if logs is None:
            return
        for layer in diffstride_layers(self.model):
            for axis, stride in zip(_AXES[layer.rank], layer.stride_values):
                logs[f'stride/{layer.name}/{axis}'] = stride
        shape = self.input_shape or self.model.input_shape[1:]
        if None not in shape:
            for layer, sizes in output_sizes(self.model, shape).items():
                for axis, size in zip(_AXES[layer.rank], sizes):
                    logs[f'size/{layer.name}/{axis}'] = size


def output_sizes(model, input_shape):
    """Returns the sizes that the DiffStride layers of a model put out now.

    Args:
        model: A model with DiffStride layers, at any depth.
        input_shape: [height, width, channels] of its input.

    Returns:
        A dict from layer to a tuple of one size per spatial axis, in the order
        of the layers. A layer that is called more than once tells the last.
    """
    found = diffstride_layers(model)
    calls = {}
    with contextlib.ExitStack() as stack:
        for layer in found:
            stack.enter_context(recorded(layer, calls))
        model(ops.zeros((1, *input_shape)), training=False)
    shapes = {layer: calls[layer][-1].outputs[-1] for layer in found}
    return {
        layer: tuple(shape[axis] for axis in layer.spatial_axes)
        for layer, shape in shapes.items()
    }
