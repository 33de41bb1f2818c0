"""What a model computes at its present strides, layer by layer."""

import contextlib
import dataclasses
import functools
import math
import numbers
import typing

import keras
from keras import layers, ops, tree

from diffstride import backend, pooling, validation


@dataclasses.dataclass(frozen=True)
class LayerComplexity:
    """A row of `Complexity`: what one layer computes for one image.

    Attributes:
        name: The names of the layer and of what holds it, joined by '/'.
        class_name: Of the layer.
        output_shape: Without the batch axis; a tuple of the different shapes if
            the layer returns several; None for a layer that was not called.
        parameters: Number of weights, without those of rows of their own.
        activations: Number of values that it returns, 0 if it holds other
            layers that compute them; summed over its calls.
        macs: Multiply-accumulates, summed over its calls; None if unknown.
        calls: Number of its calls.
    """

    name: str
    class_name: str
    output_shape: tuple | None
    parameters: int
    activations: int
    macs: int | None
    calls: int


@dataclasses.dataclass(frozen=True)
class Complexity:
    """What a model computes for one image; prints as a table.

    Attributes:
        layers: A tuple of `LayerComplexity`, in the order of their first calls.
        parameters: Number of weights of the model, shared ones counted once.
    """

    layers: tuple
    parameters: int

    @property
    def activations(self):
        """The sum of the activations of all layers."""
        return sum(layer.activations for layer in self.layers)

    @property
    def macs(self):
        """The sum of all MACs that are known."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def is_lower_bound(self):
        """Whether `macs` lacks those of a layer for which they are unknown."""
        return any(layer.macs is None for layer in self.layers)

    def __str__(self):
        rows = ['layer class output parameters activations MACs'.split()]
        for x in self.layers:
            macs = '?' if x.macs is None else f'{x.macs:,}'
            row = [x.name, x.class_name, _shape_text(x.output_shape)]
            rows.append([*row, f'{x.parameters:,}', f'{x.activations:,}', macs])
        macs = f'{">= " if self.is_lower_bound else ""}{self.macs:,}'
        totals = [f'{self.parameters:,}', f'{self.activations:,}', macs]
        rows.append(['total', '', '', *totals])
        widths = [max(map(len, column)) for column in zip(*rows)]
        aligned = [
            [x.ljust(width) for x, width in zip(row[:3], widths)]
            + [x.rjust(width) for x, width in zip(row[3:], widths[3:])]
            for row in rows
        ]
        return '\n'.join('  '.join(row) for row in aligned)


def complexity(model, input_shape):
    """Counts what a model computes for one image at its present strides.

    The model is called once on zeros, in inference, and every layer within it,
    at any depth, is recorded. No variable changes; a model that is not built
    is first built by a call.

    A row is a layer without others inside, or one with weights of its own. A
    layer that is called more than once, or with several tensors, as is the
    pooling of a `ResidualLayer`, has one row, with the sums over them. A layer
    with weights that is not called in inference has one too.

    One MAC is one multiplication by a weight and one addition. Padding counts
    like pixels. Biases, activations, normalization, plain pooling, embedding
    and operations outside of layers count 0. DiffStride, FixedSpectralPooling
    and SpectralResizing count the multiplications by their matrices, one per
    spatial axis, M N for each line of N samples that becomes one of M; not the
    making of the matrix, and no axis that the last two leave as it is. Where
    they use the FFT they count as the matrices would. Where the MACs of a layer
    are unknown (recurrent layers, the products of attention, other layers with
    weights of rank 2 or more) they are None, printed as '?', and the total is a
    lower bound, printed as '>= ...'.

    Args:
        model: A `keras.Model`, or another layer, built or not.
        input_shape: The shape of its input without the batch axis, such as
            [height, width, channels]; for several inputs a list, tuple or dict
            of shapes, in the structure that the model is called with.

    Returns:
        A `Complexity`.

    Raises:
        ValueError: If the model is none, if `input_shape` is not of integers
            >= 1, or if the model does not take an input of this shape.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.layers.Conv2D(8, 3, padding='same'), DiffStride(2.0)]
    ... )
    >>> costs = complexity(model, (32, 32, 3))
    >>> costs.macs  # 32 32 (3 3 3) 8 + (24 32 32 + 24 24 32) 8
    565248
    >>> print(costs)
    layer        class       output   parameters  activations     MACs
    conv2d       Conv2D      32x32x8         224        8,192  221,184
    diff_stride  DiffStride  24x24x8           2        4,608  344,064
    total                                    226       12,800  565,248
    """
    rows, _ = measure(model, input_shape)
    return Complexity(tuple(rows.values()), _count(model.weights))


def measure(model, input_shape):
    """As `complexity`, but returns what it is made of.

    Returns:
        {layer: LayerComplexity} and {layer: list of Call}, both in the order of
        the layers' first calls.
    """
    validation.require(
        isinstance(model, keras.layers.Layer),
        '`model` must be a Keras model or layer',
        model=model,
    )
    inputs = _zeros(input_shape, input_shape)
    _build(model, inputs)
    paths = _paths(model)
    calls = {}
    with contextlib.ExitStack() as stack:
        _running.append(calls)
        stack.callback(_running.pop)
        for layer in paths:
            stack.enter_context(
                recorded(layer, functools.partial(_add_call, calls, layer))
            )
        with keras.StatelessScope():
            backend.call_for_shapes(lambda x: model(x, training=False), inputs)
    rows = _rows(paths, calls)
    order = {layer: index for index, layer in enumerate(calls)}
    found = sorted(rows, key=lambda layer: order.get(layer, len(order)))
    return {layer: rows[layer] for layer in found}, calls


# The calls of each measurement that runs: of a cost, one within another.
_running = []


def _zeros(shape, received):
    """Returns zeros with a batch axis of 1, in the structure of the shapes."""
    if isinstance(shape, dict):
        return {key: _zeros(x, received) for key, x in shape.items()}
    is_sequence = isinstance(shape, (list, tuple))
    if shape and is_sequence and not isinstance(shape[0], numbers.Number):
        return type(shape)([_zeros(x, received) for x in shape])
    validation.require(
        is_sequence and all(validation.is_integer(x, least=1) for x in shape),
        '`input_shape` must be a sequence of integers, each at least 1, or a '
        'list, tuple or dict of such',
        input_shape=received,
    )
    return ops.zeros((1, *shape))


def _build(model, inputs):
    is_sequential = isinstance(model, keras.Sequential) and not model.built
    if is_sequential and ops.is_tensor(inputs):
        model.build((None, *inputs.shape[1:]))  # A call fixes the batch at 1.
    if not all(layer.built for layer in _paths(model)):
        model(inputs, training=False)


def _paths(layer, path='', paths=None):
    """Returns {layer: path} of a layer and of all within it, from outside in.

    What an RNN holds is left out, as it is called in a loop.
    """
    paths = {} if paths is None else paths
    if layer not in paths:
        paths[layer] = path or layer.name
        if not isinstance(layer, layers.RNN):
            for inner in layer._layers:
                _paths(inner, f'{path}/{inner.name}'.lstrip('/'), paths)
    return paths


class Call(typing.NamedTuple):
    """The shapes of what a layer was called with and of what it returned."""

    inputs: list
    outputs: list
    is_symbolic: bool


def _add_call(calls, layer):
    if calls is not _running[-1]:
        return lambda *unused: None
    calls_of_layer = calls.setdefault(layer, [])

    def add(inputs, outputs):
        call = Call(_shapes(inputs), _shapes(outputs), backend.is_symbolic())
        calls_of_layer.append(call)

    return add


@contextlib.contextmanager
def recorded(layer, begin):
    """Makes a layer tell each of its calls.

    Args:
        layer: Any layer.
        begin: Called at the beginning of each call; returns what is called at
            its end, with its arguments and its outputs.
    """
    is_quantized = getattr(layer, 'quantization_mode', None) is not None
    name = 'quantized_call' if is_quantized else 'call'
    attributes = vars(layer)
    before = {name: attributes[name]} if name in attributes else {}
    call = getattr(layer, name)

    @functools.wraps(call)
    def recording_call(*args, **kwargs):
        end = begin()
        outputs = call(*args, **kwargs)
        end((args, kwargs), outputs)
        return outputs

    attributes[name] = recording_call
    try:
        yield
    finally:
        del attributes[name]
        attributes.update(before)


def _shapes(tensors):
    return [tuple(x.shape) for x in tree.flatten(tensors) if ops.is_tensor(x)]


def _rows(paths, calls):
    """Returns {layer: LayerComplexity} of the layers that have a row."""
    rows, covered = {}, set()
    for layer, path in paths.items():
        if layer in covered:
            continue
        calls_of_layer = calls.get(layer, [])
        inner = [x for x in _paths(layer) if x is not layer]
        weights = layer.weights
        is_leaf = not any(x in calls for x in inner)
        if is_leaf:
            covered.update(inner)
        else:
            others = {id(weight) for x in inner for weight in x.weights}
            weights = [x for x in weights if id(x) not in others]
        has_work = is_leaf or _rule(layer) is not None
        if weights or (calls_of_layer and has_work):
            outputs = [shape for _, y, _ in calls_of_layer for shape in y]
            shapes = tuple(dict.fromkeys(shape[1:] for shape in outputs))
            rows[layer] = LayerComplexity(
                name=path,
                class_name=type(layer).__name__,
                output_shape=shapes[0] if len(shapes) == 1 else shapes or None,
                parameters=_count(weights),
                activations=sum(map(_size, outputs)) if is_leaf else 0,
                macs=_macs(layer, weights, calls_of_layer),
                calls=len(calls_of_layer),
            )
    return rows


def _macs(layer, weights, calls_of_layer):
    rule = _rule(layer)
    if rule is None:
        has_kernel = any(len(weight.shape) > 1 for weight in weights)
        return None if has_kernel and calls_of_layer else 0
    macs = [
        # What is traced may run any number of times.
        None if is_symbolic else rule(layer, x, y)
        for inputs, outputs, is_symbolic in calls_of_layer
        for x, y in zip(inputs, outputs)
    ]
    return None if None in macs else sum(macs)


def _rule(layer):
    return next((_RULES[x] for x in type(layer).__mro__ if x in _RULES), None)


def _einsum_dense(layer, x, y):
    operands, result = layer.equation.split('->')
    axes = zip(operands.split(',')[1], layer.kernel.shape)
    return _size(y) * math.prod(n for axis, n in axes if axis not in result)


def _spectral_resampling(layer, x, y):
    macs, shape = 0, list(x)
    for axis in layer.spatial_axes:
        size, shape[axis] = shape[axis], y[axis]
        # Without learned strides an axis that keeps its size is left as it is.
        if size != y[axis] or layer.weights:
            macs += size * _size(shape)
    return macs


def _rules(macs, *names):
    return dict.fromkeys((getattr(layers, name) for name in names), macs)


# From class to a function of (layer, shape of input, shape of output), both
# with the batch axis. Without a rule MACs are 0, or unknown if it has a kernel.
_RULES = {
    **_rules(
        lambda layer, x, y: _size(y) * math.prod(layer.kernel.shape[:-1]),
        *('Conv1D', 'Conv2D', 'Conv3D', 'Dense'),
    ),
    **_rules(
        lambda layer, x, y: _size(x) * math.prod(layer.kernel.shape[:-1]),
        *('Conv1DTranspose', 'Conv2DTranspose', 'Conv3DTranspose'),
    ),
    **_rules(
        lambda layer, x, y: _size(y) * math.prod(layer.kernel.shape[:-2]),
        *('DepthwiseConv1D', 'DepthwiseConv2D'),
    ),
    **_rules(
        lambda layer, x, y: (
            (_size(y) // layer.filters)
            * _count([layer.depthwise_kernel, layer.pointwise_kernel])
        ),
        *('SeparableConv1D', 'SeparableConv2D'),
    ),
    layers.EinsumDense: _einsum_dense,
    pooling.SpectralResampling: _spectral_resampling,
    # Reversed, an embedding is a product.
    layers.Embedding: lambda layer, x, y: 0 if len(y) > len(x) else None,
    **_rules(
        lambda layer, x, y: 0, 'LayerNormalization', 'Normalization', 'PReLU'
    ),
    **_rules(
        lambda layer, x, y: None,
        *('AdditiveAttention', 'Attention', 'Dot', 'GroupQueryAttention'),
        *('MultiHeadAttention', 'RNN'),
    ),
}


def _count(weights):
    return sum(math.prod(x.shape) for x in weights)


def _size(shape):
    """Number of values, or 0 if the shape is not known."""
    return 0 if None in shape else math.prod(shape)


def _shape_text(shape):
    if shape is None:
        return '-'
    if shape and isinstance(shape[0], tuple):
        return ', '.join(map(_shape_text, shape))
    return 'x'.join(map(str, shape)) or '1'
