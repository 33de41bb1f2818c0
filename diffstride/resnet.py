"""Pre-activation ResNets (He et al. 2016, arXiv:1603.05027) for small images.

Wherever the network strides, a `pooling_cls` may take the place of the stride:
any Keras layer class, or callable, that takes `strides` and `data_format`.
Everything here is configurable by gin, as `resnet.<name>`.
"""

import ast
import inspect
import numbers

import gin
import keras
from keras import ops

from diffstride.pooling import SpectralPooling, diffstride_layers
from diffstride.regularizers import ActivationCost, StrideCostModel
from diffstride.validation import (
    is_finite,
    is_integer,
    one_of,
    require,
    standardize_strides,
)


@gin.configurable(module='resnet')
def batch_norm(momentum=0.9, epsilon=1e-5):
    """Returns the arguments of every BatchNormalization of a network."""
    return {'momentum': momentum, 'epsilon': epsilon}


@keras.saving.register_keras_serializable(package='diffstride')
class ResidualLayer(keras.layers.Layer):
    """Pre-activation residual layer of two convolutions.

    With h = relu(norm(x)) it returns x + conv(relu(norm(pool(conv(h))))), or,
    if it projects, conv1x1(pool(h)) + ... One pooling layer serves both
    branches; on the shortcut it runs first, where the map is not yet wider.

    Args:
        filters: Number of output channels.
        kernel_size: Of both convolutions.
        strides: A number >= 1, or one per axis. 1 is no downsampling, and
            makes no pooling layer.
        pooling_cls: What downsamples: a layer class, or a callable that returns
            a layer, called with `strides` and `data_format`. None for strided
            convolutions, whose strides are integers.
        project: Whether the shortcut has a 1x1 convolution, as it must where
            strides are above 1 or the number of channels changes.
        channels_first: Whether channels come before the spatial axes; None for
            `keras.config.image_data_format()`.
        weight_decay: L2 penalty of the kernels.
        batch_norm_args: Arguments of the batch normalizations; None for those
            that `batch_norm()` returns.
        **kwargs: Of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width].

    Output shape:
        [batch, new_height, new_width, filters], or with the channels second.

    Raises:
        ValueError: If strides are not numbers >= 1, not integers for a strided
            convolution, or above 1 without `project`; if the number of channels
            changes without `project`.

    Example:

    >>> layer = ResidualLayer(
    ...     16, strides=2, pooling_cls=DiffStride, project=True
    ... )
    >>> tuple(layer(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 24, 24, 16)
    """

    def __init__(
        self,
        filters,
        kernel_size=3,
        strides=1,
        pooling_cls=None,
        project=False,
        channels_first=None,
        weight_decay=5e-3,
        batch_norm_args=None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        require(
            is_integer(filters, least=1),
            '`filters` must be an integer, at least 1',
            filters=filters,
        )
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = standardize_strides(strides, 2)
        self.project = one_of('project', project, (True, False))
        self.channels_first = _is_channels_first(channels_first)
        self.weight_decay = weight_decay
        self.batch_norm_args = dict(batch_norm_args or batch_norm())
        if self.strides != (1, 1) and not project:
            raise ValueError(
                '`strides` must be 1 in a residual layer with project=False. '
                f'Received: strides={strides}'
            )
        conv_strides, self.pool = _downsampling(
            self.strides, pooling_cls, self.channels_first
        )

        if isinstance(self.pool, keras.layers.Layer):
            self.pool.dtype_policy = self.dtype_policy

        def norm():
            return _batch_norm(
                self.channels_first,
                dtype=self.dtype_policy,
                **self.batch_norm_args,
            )

        def conv(kernel_size, strides=1):
            return _conv(
                filters,
                kernel_size,
                strides,
                self.channels_first,
                weight_decay,
                dtype=self.dtype_policy,
            )

        self.norms = [norm(), norm()]
        self.convs = [conv(kernel_size, conv_strides), conv(kernel_size)]
        self.shortcut = conv(1, conv_strides) if project else None

    def build(self, input_shape):
        channels = input_shape[1 if self.channels_first else -1]
        if not self.project and channels != self.filters:
            raise ValueError(
                f'`filters` must be the number of input channels, {channels}, '
                'in a residual layer with project=False. '
                f'Received: filters={self.filters}'
            )
        self.norms[0].build(input_shape)
        self.convs[0].build(input_shape)
        inner_shape = self.convs[0].compute_output_shape(input_shape)
        shortcut_shape = input_shape
        if self.pool is not None:
            self.pool.build(input_shape)
            inner_shape = self.pool.compute_output_shape(inner_shape)
            shortcut_shape = self.pool.compute_output_shape(input_shape)
        if self.shortcut is not None:
            self.shortcut.build(shortcut_shape)
        self.norms[1].build(inner_shape)
        self.convs[1].build(inner_shape)
        self.built = True

    def call(self, inputs):
        x = ops.relu(self.norms[0](inputs))
        shortcut, x = self._pooled(x, self.convs[0](x))
        shortcut = self.shortcut(shortcut) if self.project else inputs
        x = self.convs[1](ops.relu(self.norms[1](x)))
        return x + shortcut

    def _pooled(self, *maps):
        if self.pool is None:
            return maps
        if isinstance(self.pool, SpectralPooling):
            return self.pool(list(maps))  # One set of tables for both.
        return [self.pool(x) for x in maps]

    def compute_output_shape(self, input_shape):
        shape = self.convs[0].compute_output_shape(input_shape)
        if self.pool is not None:
            shape = self.pool.compute_output_shape(shape)
        return shape

    def get_config(self):
        return {
            **super().get_config(),
            'filters': self.filters,
            'kernel_size': self.kernel_size,
            'strides': self.strides,
            'pooling_cls': keras.saving.serialize_keras_object(self.pool),
            'project': self.project,
            'channels_first': self.channels_first,
            'weight_decay': self.weight_decay,
            'batch_norm_args': self.batch_norm_args,
        }

    @classmethod
    def from_config(cls, config):
        pool = keras.saving.deserialize_keras_object(config['pooling_cls'])
        pooling_cls = None if pool is None else lambda **unused: pool
        return cls(**{**config, 'pooling_cls': pooling_cls})


gin.register(ResidualLayer, module='resnet')


@gin.configurable(module='resnet')
def ResnetBlock(filters, strides=1, num_layers=2, project_first=True, **kwargs):
    """Residual layers of as many filters, of which the first may downsample.

    Args:
        filters: Number of output channels.
        strides: Of the first layer, if that projects.
        num_layers: Number of residual layers.
        project_first: Whether the first layer projects.
        **kwargs: Of every `ResidualLayer`.

    Returns:
        A `keras.Sequential`.

    Raises:
        ValueError: If there is no layer, and as in `ResidualLayer`.
    """
    require(
        is_integer(num_layers, least=1),
        '`num_layers` must be an integer, at least 1',
        num_layers=num_layers,
    )
    layer = configured(ResidualLayer)
    strides = strides if project_first else 1
    first = layer(filters, strides=strides, project=project_first, **kwargs)
    others = [layer(filters, **kwargs) for _ in range(num_layers - 1)]
    return keras.Sequential([first, *others])


@gin.configurable(module='resnet')
def Resnet(
    filters,
    strides,
    num_output_classes,
    output_activation=None,
    id_only=(),
    channels_first=None,
    pooling_cls=None,
    weight_decay=5e-3,
    stride_cost=None,
    **kwargs,
):
    """A pre-activation ResNet for image classification.

    Args:
        filters: Number of filters of the first convolution and of each block.
        strides: As many strides, in a list, each a number or one per axis, or
            in a string such as '1, 1, 3, 2, 3'. Where a stride is 1 there is no
            pooling layer.
        num_output_classes: Number of outputs.
        output_activation: Such as 'softmax'; None for logits.
        id_only: Indices of the blocks whose first layer does not project.
        channels_first: Whether the network computes in channels_first; its
            input is channels_last all the same. None for
            `keras.config.image_data_format()`.
        pooling_cls: What downsamples, see `ResidualLayer`; None for strided
            convolutions.
        weight_decay: L2 penalty of all kernels and of the last bias.
        stride_cost: What learned strides cost in the loss: None or 0 for
            nothing; a number for the paper's cost of that weight, see
            `regularizers.ActivationCost`; or another cost of a model, such as
            `regularizers.MacsCost`. Of no effect without learned strides.
        **kwargs: Of every `ResnetBlock`.

    Returns:
        A `keras.Sequential`, built at its first call,
        [batch, height, width, channels] -> float32 [batch, num_output_classes];
        within a `regularizers.StrideCostModel` if strides cost something.

    Raises:
        ValueError: If `filters` and `strides` differ in length, if a stride is
            not allowed, see `ResidualLayer`, or if it is above 1 in a block of
            `id_only`.

    Example:

    >>> model = Resnet([8, 8, 16], '1, 1, 3', 10, pooling_cls=DiffStride)
    >>> tuple(model(keras.ops.ones((4, 32, 32, 3))).shape)
    (4, 10)
    """
    require(
        isinstance(filters, (list, tuple))
        and filters
        and all(is_integer(x, least=1) for x in filters),
        '`filters` must be a list of integers, each at least 1',
        filters=filters,
    )
    strides = parse_strides(strides)
    if len(filters) != len(strides):
        raise ValueError(
            f'`strides` must be as many as `filters`, {len(filters)}. '
            f'Received: strides={strides}'
        )
    require(
        isinstance(id_only, (list, tuple))
        and all(is_integer(x, least=0) for x in id_only)
        and max(id_only, default=0) < max(1, len(filters) - 1),
        '`id_only` must be a list of indices of blocks, from 0',
        id_only=id_only,
    )
    for block in id_only:
        if strides[1 + block] != (1, 1):
            raise ValueError(
                '`strides` must be 1 in the blocks of `id_only`. '
                f'Received: strides={strides}, id_only={id_only}'
            )
    channels_first = _is_channels_first(channels_first)
    decay = _l2(weight_decay)
    conv_strides, pool = _downsampling(strides[0], pooling_cls, channels_first)
    layers = [
        keras.layers.Permute((3, 1, 2)) if channels_first else None,
        _conv(filters[0], 3, conv_strides, channels_first, weight_decay),
        pool,
    ]
    for block, (width, stride) in enumerate(zip(filters[1:], strides[1:])):
        layers.append(
            ResnetBlock(
                width,
                stride,
                project_first=block not in id_only,
                pooling_cls=pooling_cls,
                channels_first=channels_first,
                weight_decay=weight_decay,
                **kwargs,
            )
        )
    layers += [
        _batch_norm(channels_first, **batch_norm()),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(
            data_format=_format(channels_first)
        ),
        keras.layers.Dense(
            num_output_classes,
            activation=output_activation,
            kernel_initializer='he_normal',
            kernel_regularizer=decay,
            bias_regularizer=decay,
            dtype='float32',
        ),
    ]
    model = keras.Sequential([layer for layer in layers if layer is not None])
    if isinstance(stride_cost, numbers.Real):
        require(
            is_finite(stride_cost, least=0),
            '`stride_cost` must be a finite number, at least 0',
            stride_cost=stride_cost,
        )
        stride_cost = stride_cost and ActivationCost(stride_cost)
    if stride_cost is None or stride_cost == 0 or not diffstride_layers(model):
        return model
    return StrideCostModel(model, stride_cost)


@gin.configurable(module='resnet')
def resnet18(strides=(1, 1, 2, 2, 2), width=64, **kwargs):
    """ResNet-18 for small images: `Resnet` of 4 blocks of 2 layers.

    Args:
        strides: Of the first convolution and of the blocks, see `Resnet`.
        width: Number of filters of the first convolution; less is thinner.
        **kwargs: Of `Resnet`.
    """
    return _resnet((1, 1, 2, 4, 8), strides, width, num_layers=2, **kwargs)


@gin.configurable(module='resnet')
def resnet56(strides=(1, 1, 2, 2), width=16, **kwargs):
    """ResNet-56 for small images: `Resnet` of 3 blocks of 9 layers.

    Args:
        strides: Of the first convolution and of the blocks, see `Resnet`.
        width: Number of filters of the first convolution; less is thinner.
        **kwargs: Of `Resnet`.
    """
    return _resnet((1, 1, 2, 4), strides, width, num_layers=9, **kwargs)


def _resnet(widths, strides, width, **kwargs):
    strides = parse_strides(strides)
    require(
        is_integer(width, least=1),
        '`width` must be an integer, at least 1',
        width=width,
    )
    # The first block widens nothing: it projects only where it must stride.
    id_only = [0] if strides[1:2] == [(1, 1)] else []
    kwargs = {'id_only': id_only, **kwargs}
    return Resnet([width * w for w in widths], strides, **kwargs)


def parse_strides(strides):
    """Returns a list of (height, width) strides, from a list or a string.

    Raises:
        ValueError: If it is none, or if a stride is not a number >= 1.
    """
    try:
        if isinstance(strides, str):
            strides = ast.literal_eval(f'[{strides}]')
        strides = list(strides)
    except (SyntaxError, TypeError, ValueError):
        raise ValueError(
            '`strides` must be a list of strides, or a string such as '
            f"'1, 1, 3, 2, 3'. Received: strides={strides!r}"
        ) from None
    return [standardize_strides(stride, 2) for stride in strides]


def _downsampling(strides, pooling_cls, channels_first):
    """Returns the strides of the convolution, and the pooling layer or None."""
    whole = tuple(int(s) if s == int(s) else s for s in strides)
    if strides == (1, 1):
        return (1, 1), None
    if pooling_cls is None:
        if whole != tuple(map(int, strides)):
            raise ValueError(
                '`strides` of a strided convolution (pooling_cls=None) must be '
                f'integers. Received: strides={strides}'
            )
        return whole, None
    pooling_cls = configured(pooling_cls, 'pooling_cls')
    arguments = {'strides': whole, 'data_format': _format(channels_first)}
    parameters = inspect.signature(pooling_cls).parameters
    if 'pool_size' in parameters and (
        parameters['pool_size'].default is inspect.Parameter.empty
    ):
        arguments['pool_size'] = whole  # As Keras's average pooling needs.
    pool = pooling_cls(**arguments)
    require(
        callable(pool), '`pooling_cls` must return a layer', pooling_cls=pool
    )
    return (1, 1), pool


def configured(function, name=None):
    """Returns a function or class with gin's bindings, if gin knows it.

    Raises:
        ValueError: If it is not callable, naming it as the argument `name`.
    """
    try:
        return gin.get_configurable(function)
    except ValueError:
        require(
            callable(function),
            f'`{name}` must be a class or another callable',
            **{name or 'function': function},
        )
        return function


def _conv(
    filters, kernel_size, strides, channels_first, weight_decay, **kwargs
):
    return keras.layers.Conv2D(
        filters,
        kernel_size,
        strides=strides,
        padding='same',
        data_format=_format(channels_first),
        use_bias=False,
        kernel_initializer='he_normal',
        kernel_regularizer=_l2(weight_decay),
        **kwargs,
    )


def _l2(weight_decay):
    require(
        is_finite(weight_decay, least=0),
        '`weight_decay` must be a finite number, at least 0',
        weight_decay=weight_decay,
    )
    return keras.regularizers.L2(weight_decay)


def _batch_norm(channels_first, **kwargs):
    axis = 1 if channels_first else -1
    return keras.layers.BatchNormalization(axis=axis, **kwargs)


def _is_channels_first(channels_first):
    if channels_first is None:
        return keras.config.image_data_format() == 'channels_first'
    return bool(channels_first)


def _format(channels_first):
    return 'channels_first' if channels_first else 'channels_last'
