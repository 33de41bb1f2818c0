"""Pre-activation ResNets (He et al. 2016, arXiv:1603.05027) for small images.

Any pooling layer may take the place of a stride: a Keras layer class, or a
callable that returns a layer, called with `strides` and `data_format`. Gin
knows the networks as `resnet.<name>`.
"""

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
from keras import ops

from diffstride.costs import ActivationCost
from diffstride.normalization import BatchNormalization
from diffstride.pooling import SpectralPooling, diffstride_layers
from diffstride.validation import (
    boolean,
    finite,
    integer,
    is_integer,
    one_of,
    require,
    standardize_strides,
)

PoolingClass = Callable[..., keras.layers.Layer]
Strides = float | Sequence[float]

POOL_AFTER = ('convolution', 'activation')


@gin.configurable(module='resnet')
def batch_norm(
    momentum: float = 0.9, epsilon: float = 1e-5
) -> dict[str, float]:
    """Returns the arguments of every BatchNormalization of a network."""
    return {'momentum': momentum, 'epsilon': epsilon}


@keras.saving.register_keras_serializable(package='diffstride')
class ResidualLayer(keras.layers.Layer):
    """Pre-activation residual layer of two convolutions.

    With h = relu(norm(x)) it returns x + conv(relu(norm(pool(conv(h))))), or,
    if it projects, conv1x1(pool(h)) + ... One pooling layer serves both
    branches; on the shortcut it runs before the convolution, whose input has
    fewer channels than its output.

    Args:
        filters: Number of output channels.
        kernel_size: Window of both convolutions.
        strides: A number >= 1, or one per axis. A stride of 1 makes no pooling
            layer.
        pooling_cls: A layer class, or a callable that returns a layer, called
            with `strides` and `data_format`. None for strided convolutions,
            whose strides are integers.
        project: Whether the shortcut has a 1x1 convolution. It must have one
            where strides are above 1 or the number of channels changes.
        channels_first: Whether channels come before the spatial axes; None for
            `keras.config.image_data_format()`.
        weight_decay: L2 penalty of the kernels.
        batch_norm_args: Arguments of the batch normalizations; None for those
            that `batch_norm()` returns.
        pool_after: 'convolution' to pool the inner branch before its second
            normalization, or 'activation' to pool it after the normalization
            and the activation, conv(pool(relu(norm(conv(h))))), at the same
            MACs. It has no effect on strided convolutions.
        **kwargs: Arguments of `keras.layers.Layer`.

    Input shape:
        [batch, height, width, channels], or [batch, channels, height, width].

    Output shape:
        [batch, new_height, new_width, filters], or with the channels second.

    Raises:
        ValueError: If an argument is out of its range; if strides are not
            integers in a strided convolution, or above 1 without `project`; if
            the number of channels changes without `project`.

    Example:

    >>> layer = ResidualLayer(
    ...     16, strides=2, pooling_cls=DiffStride, project=True
    ... )
    >>> tuple(layer(keras.ops.ones((1, 32, 32, 8))).shape)
    (1, 24, 24, 16)
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int | Sequence[int] = 3,
        strides: Strides = 1,
        pooling_cls: PoolingClass | None = None,
        project: bool = False,
        channels_first: bool | None = None,
        weight_decay: float = 5e-3,
        batch_norm_args: dict[str, Any] | None = None,
        pool_after: str = 'convolution',
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.filters = integer('filters', filters, least=1)
        self.kernel_size = kernel_size
        self.strides = standardize_strides(strides, 2)
        self.project = boolean('project', project)
        require(
            project or self.strides == (1, 1),
            '`strides` must be 1 in a residual layer with project=False',
            strides=strides,
        )
        self.channels_first = _is_channels_first(channels_first)
        self.weight_decay = weight_decay
        self.batch_norm_args = dict(
            batch_norm() if batch_norm_args is None else batch_norm_args
        )
        self.pool_after = one_of('pool_after', pool_after, POOL_AFTER)
        conv_strides, self.pool = downsampling(
            self.strides, pooling_cls, self.channels_first
        )
        if self.pool is not None:
            self.pool.dtype_policy = self.dtype_policy
        conv, norm = _layer_classes(
            self.channels_first,
            weight_decay,
            self.batch_norm_args,
            dtype=self.dtype_policy,
        )
        self.norms = [norm(), norm()]
        self.convs = [
            conv(filters, kernel_size, conv_strides),
            conv(filters, kernel_size),
        ]
        self.shortcut = conv(filters, 1, conv_strides) if project else None

    def build(self, input_shape: Sequence) -> None:
        channels = input_shape[1 if self.channels_first else -1]
        require(
            self.project or channels == self.filters,
            f'`filters` must be the number of input channels, {channels}, in '
            'a residual layer with project=False',
            filters=self.filters,
        )
        # These layers read the number of channels alone.
        output_shape = self.compute_output_shape(input_shape)
        self.norms[0].build(input_shape)
        self.convs[0].build(input_shape)
        self.norms[1].build(output_shape)
        self.convs[1].build(output_shape)
        if self.pool is not None:
            self.pool.build(input_shape)
        if self.shortcut is not None:
            self.shortcut.build(input_shape)
        self.built = True

    def call(self, inputs: Any) -> Any:
        h = ops.relu(self.norms[0](inputs))
        x = self.convs[0](h)
        if self.pool_after == 'convolution':
            h, x = self._pooled(h, x)
        x = ops.relu(self.norms[1](x))
        if self.pool_after == 'activation':
            h, x = self._pooled(h, x)
        shortcut = inputs if self.shortcut is None else self.shortcut(h)
        return self.convs[1](x) + shortcut

    def _pooled(self, *maps):
        if self.pool is None:
            return maps
        if isinstance(self.pool, SpectralPooling):
            return self.pool(list(maps))  # Both share the tables.
        return [self.pool(x) for x in maps]

    def compute_output_shape(self, input_shape: Sequence) -> tuple:
        shape = self.convs[0].compute_output_shape(input_shape)
        if self.pool is not None:
            shape = self.pool.compute_output_shape(shape)
        return shape

    def get_config(self) -> dict[str, Any]:
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
            'pool_after': self.pool_after,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> 'ResidualLayer':
        pool = keras.saving.deserialize_keras_object(config['pooling_cls'])
        pooling_cls = None if pool is None else lambda **unused: pool
        return cls(**{**config, 'pooling_cls': pooling_cls})


gin.register(ResidualLayer, module='resnet')


@gin.configurable(module='resnet')
def ResnetBlock(
    filters: int,
    strides: Strides = 1,
    num_layers: int = 2,
    project_first: bool = True,
    **kwargs: Any,
) -> keras.Sequential:
    """Returns residual layers of equal width, the first of which may stride.

    Args:
        filters: Number of output channels.
        strides: Strides of the first layer; 1 if it does not project.
        num_layers: Number of residual layers.
        project_first: Whether the first layer projects.
        **kwargs: Arguments of every `ResidualLayer`.

    Raises:
        ValueError: If `num_layers` is below 1, or from `ResidualLayer`.
    """
    integer('num_layers', num_layers, least=1)
    layer = configured(ResidualLayer)
    first = layer(filters, strides=strides, project=project_first, **kwargs)
    others = [layer(filters, **kwargs) for _ in range(num_layers - 1)]
    return keras.Sequential([first, *others])


@gin.configurable(module='resnet')
def Resnet(
    filters: Sequence[int],
    strides: str | Sequence[Strides],
    num_output_classes: int,
    output_activation: str | Callable | None = None,
    id_only: Sequence[int] = (),
    channels_first: bool | None = None,
    pooling_cls: PoolingClass | None = None,
    weight_decay: float = 5e-3,
    stride_cost: float | None = None,
    pool_after: str = 'convolution',
    num_layers: int = 2,
    name: str | None = None,
) -> keras.Sequential:
    """Returns a pre-activation ResNet for image classification.

    Args:
        filters: Number of filters of the first convolution and of each block.
        strides: One stride for each of `filters`: a list of numbers or pairs,
            or a string such as '1, 1, 3, 2, 3'. A stride of 1 makes no pooling
            layer.
        num_output_classes: Number of outputs.
        output_activation: Activation such as 'softmax'; None for logits.
        id_only: Indices of the blocks whose first layer does not project.
        channels_first: Whether the network computes in channels_first; its
            input is channels_last all the same. None for
            `keras.config.image_data_format()`.
        pooling_cls: The class of pooling layers, see `ResidualLayer`; None for
            strided convolutions.
        weight_decay: L2 penalty of all kernels and of the last bias.
        stride_cost: Weight of the paper's cost of learned strides in the loss,
            see `costs.ActivationCost`; None for no cost. Without learned
            strides it has no effect.
        pool_after: Where residual layers pool, see `ResidualLayer`. With
            'activation', a pooling layer after the first convolution has a
            normalization and an activation before it, too.
        num_layers: Number of residual layers of each block.
        name: The name of the model.

    Returns:
        A `keras.Sequential`, built at its first call,
        [batch, height, width, channels] -> float32 [batch, num_output_classes].

    Raises:
        ValueError: If an argument is out of its range; if `filters` and
            `strides` differ in length; if a stride is not allowed, see
            `ResidualLayer`, or above 1 in a block of `id_only`.

    Example:

    >>> model = Resnet([8, 8, 16], '1, 1, 3', 10, pooling_cls=DiffStride)
    >>> tuple(model(keras.ops.ones((4, 32, 32, 3))).shape)
    (4, 10)
    """
    strides = parse_strides(strides)
    _check_blocks(filters, strides, id_only)
    one_of('pool_after', pool_after, POOL_AFTER)
    channels_first = _is_channels_first(channels_first)
    conv_strides, pool = downsampling(strides[0], pooling_cls, channels_first)
    conv, norm = _layer_classes(channels_first, weight_decay, batch_norm())
    decay = keras.regularizers.L2(weight_decay)
    layers = [keras.layers.Permute((3, 1, 2))] if channels_first else []
    layers.append(conv(filters[0], 3, conv_strides))
    if pool is not None:
        if pool_after == 'activation':
            layers += [norm(), keras.layers.ReLU()]
        layers.append(pool)
    layers += [
        ResnetBlock(
            width,
            stride,
            num_layers,
            project_first=block not in id_only,
            pooling_cls=pooling_cls,
            channels_first=channels_first,
            weight_decay=weight_decay,
            pool_after=pool_after,
        )
        for block, (width, stride) in enumerate(zip(filters[1:], strides[1:]))
    ]
    integer('num_output_classes', num_output_classes, least=1)
    if stride_cost is not None:
        finite('stride_cost', stride_cost, least=0)
    if stride_cost and any(map(diffstride_layers, layers)):
        layers.append(ActivationCost(stride_cost))
    layers += [
        norm(),
        keras.layers.ReLU(),
        keras.layers.GlobalAveragePooling2D(_data_format(channels_first)),
        keras.layers.Dense(
            num_output_classes,
            activation=output_activation,
            kernel_initializer='he_normal',
            kernel_regularizer=decay,
            bias_regularizer=decay,
            dtype='float32',
        ),
    ]
    return keras.Sequential(layers, name=name)


@gin.configurable(module='resnet')
def resnet18(
    strides: str | Sequence[Strides] = (1, 1, 2, 2, 2),
    width: int = 64,
    **kwargs: Any,
) -> keras.Sequential:
    """Returns a `Resnet` of 4 blocks of 2 layers.

    Args:
        strides: Strides of the first convolution and the blocks, see `Resnet`.
        width: Number of filters of the first convolution.
        **kwargs: Other arguments of `Resnet`.
    """
    return _resnet((1, 1, 2, 4, 8), strides, width, num_layers=2, **kwargs)


@gin.configurable(module='resnet')
def resnet56(
    strides: str | Sequence[Strides] = (1, 1, 2, 2),
    width: int = 16,
    **kwargs: Any,
) -> keras.Sequential:
    """Returns a `Resnet` of 3 blocks of 9 layers, see `resnet18`."""
    return _resnet((1, 1, 2, 4), strides, width, num_layers=9, **kwargs)


def _resnet(widths, strides, width, **kwargs):
    strides = parse_strides(strides)
    integer('width', width, least=1)
    # The first block keeps the width, so it projects only if it strides.
    id_only = [0] if strides[1:2] == [(1, 1)] else []
    kwargs = {'id_only': id_only, **kwargs}
    return Resnet([width * w for w in widths], strides, **kwargs)


def parse_strides(
    strides: str | Sequence[Strides], rank: int = 2
) -> list[tuple[float, ...]]:
    """Returns strides, one per axis, from a list or a string of them.

    Args:
        strides: Numbers, or one per axis each, as in '1, 1, (3, 2), 2'.
        rank: The number of axes.

    Raises:
        ValueError: If it is no such list, or if a stride is not a number >= 1.
    """
    try:
        is_text = isinstance(strides, str)
        values = list(ast.literal_eval(f'[{strides}]') if is_text else strides)
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(
            '`strides` must be a list of strides, or a string such as '
            f"'1, 1, 3, 2, 3'. Received: strides={strides!r}"
        ) from error
    return [standardize_strides(stride, rank) for stride in values]


def _check_blocks(filters, strides, id_only):
    require(
        isinstance(filters, (list, tuple))
        and filters
        and all(is_integer(x, least=1) for x in filters),
        '`filters` must be a list of integers, each at least 1',
        filters=filters,
    )
    require(
        len(filters) == len(strides),
        f'`strides` must be as many as `filters`, {len(filters)}',
        strides=strides,
    )
    require(
        isinstance(id_only, (list, tuple))
        and all(is_integer(x, least=0) for x in id_only)
        and all(block < len(filters) - 1 for block in id_only),
        '`id_only` must be a list of indices of blocks, from 0',
        id_only=id_only,
    )
    require(
        all(strides[1 + block] == (1, 1) for block in id_only),
        '`strides` must be 1 in the blocks of `id_only`',
        strides=strides,
        id_only=id_only,
    )


def downsampling(
    strides: tuple[float, ...],
    pooling_cls: Callable | None,
    channels_first: bool,
) -> tuple[Any, keras.layers.Layer | None]:
    """Returns how a convolution and a pooling after it downsample.

    Args:
        strides: The strides, one per axis.
        pooling_cls: See `ResidualLayer`.
        channels_first: Whether the layers are channels_first.

    Returns:
        The strides of the convolution, and the pooling layer, or None if there
        is none: if all strides are 1, or with `pooling_cls=None`.

    Raises:
        ValueError: If a convolution shall have fractional strides, or if
            `pooling_cls` returns no layer.
    """
    if max(strides) == 1:
        return 1, None
    strides = tuple(int(s) if s.is_integer() else s for s in strides)
    if pooling_cls is None:
        require(
            all(isinstance(s, int) for s in strides),
            '`strides` of a strided convolution (pooling_cls=None) must be '
            'integers',
            strides=strides,
        )
        return strides, None
    pooling_cls = configured(pooling_cls, 'pooling_cls')
    kwargs = {'strides': strides, 'data_format': _data_format(channels_first)}
    # Keras's average pooling has no default window. This looks at `__init__`
    # because gin hides the signature of a class.
    function = (
        pooling_cls.__init__ if inspect.isclass(pooling_cls) else pooling_cls
    )
    window = inspect.signature(function).parameters.get('pool_size')
    if window is not None and window.default is inspect.Parameter.empty:
        kwargs['pool_size'] = strides
    pool = pooling_cls(**kwargs)
    require(
        isinstance(pool, keras.layers.Layer),
        '`pooling_cls` must return a layer',
        pooling_cls=pool,
    )
    return 1, pool


def configured(function: Callable, name: str = 'function') -> Callable:
    """Returns a function or class, with gin's bindings if gin knows it.

    Args:
        function: Any callable.
        name: The name of the argument that an error mentions.

    Raises:
        ValueError: If it is not callable.
    """
    try:
        return gin.get_configurable(function)
    except ValueError:
        require(
            callable(function),
            f'`{name}` must be a class or another callable',
            **{name: function},
        )
        return function


def _layer_classes(channels_first, weight_decay, batch_norm_args, dtype=None):
    """Returns Conv2D and BatchNormalization with the arguments of a network."""
    decay = finite('weight_decay', weight_decay, least=0)
    conv = functools.partial(
        keras.layers.Conv2D,
        padding='same',
        data_format=_data_format(channels_first),
        use_bias=False,
        kernel_initializer='he_normal',
        kernel_regularizer=keras.regularizers.L2(decay),
        dtype=dtype,
    )
    norm = functools.partial(
        BatchNormalization,
        axis=1 if channels_first else -1,
        dtype=dtype,
        **batch_norm_args,
    )
    return conv, norm


def _is_channels_first(channels_first):
    if channels_first is None:
        return keras.config.image_data_format() == 'channels_first'
    return bool(channels_first)


def _data_format(channels_first):
    return 'channels_first' if channels_first else 'channels_last'
