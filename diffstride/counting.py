"""Counts what a model computes, layer by layer, at its present strides."""

import contextlib
import dataclasses
import functools
import math
import numbers
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import keras
from keras import layers, ops, tree

from diffstride import backend, models, pooling, validation


@dataclasses.dataclass(frozen=True)
class LayerComplexity:
    """The work of one layer for one image: a row of `Complexity`.

    Attributes:
        name: The names of the layers that hold it, from the outermost on, and
            its own, joined by '/'.
        class_name: The name of the layer's class.
        output_shape: The shape without the batch axis; a tuple of the different
            shapes if the layer returns several; None if it was not called.
        parameters: Number of weights, without those of layers within it that
            have their own rows.
        activations: Number of values that it returns, summed over its calls; 0
            if layers within it compute them.
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
    """The work of a model for one image; it prints as a table.

    Attributes:
        layers: The rows, in the order in which the layers are first called.
        parameters: Number of weights of the model; shared ones count once.
    """

    layers: tuple[LayerComplexity, ...]
    parameters: int

    @property
    def activations(self) -> int:
        """The sum of the activations of all layers."""
        return sum(layer.activations for layer in self.layers)

    @property
    def macs(self) -> int:
        """The sum of all MACs that are known."""
        return sum(layer.macs or 0 for layer in self.layers)

    @property
    def is_lower_bound(self) -> bool:
        """True if the MACs of a layer are unknown and `macs` lacks them."""
        return any(layer.macs is None for layer in self.layers)

    def __str__(self) -> str:
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


def complexity(
    model: keras.layers.Layer, input_shape: Any = None
) -> Complexity:
    """Counts what a model computes for one image at its present strides.

    The model is called once on zeros, in inference, and every layer within it,
    at any depth, is recorded. No variable changes; a model that is not built
    is first built by a call.

    A layer has a row if no layer within it is called, or if it has weights of
    its own. A layer that is called several times or with several tensors, such
    as the pooling of a `ResidualLayer`, has one row with the sums over them. A
    layer with weights that inference does not call has a row, too.

    One MAC is one multiplication by a weight and one addition. Padding counts
    like pixels. Biases, activations, normalization, plain pooling, embedding
    and operations outside of layers count 0. DiffStride, FixedSpectralPooling
    and SpectralResizing count the multiplications by their matrices: M N per
    line of N samples that becomes M samples, for each spatial axis in turn. The
    matrix itself is not counted, and neither is an axis that
    FixedSpectralPooling or SpectralResizing leaves as it is. With
    `method='fft'` a line counts 5/4 (N log2 N + M log2 M). With 'auto' it
    counts M N, although a long axis takes the FFT then. Recurrent layers, the
    products of attention and unknown layers with weights of rank 2 or more have
    unknown MACs: None, printed as '?'. The total is then a lower bound, printed
    as '>= ...'.

    Args:
        model: A Keras model or layer, built or not.
        input_shape: The shape of its input without the batch axis, such as
            [height, width, channels]; for several inputs a list, tuple or dict
            of shapes, in the structure that the model is called with. None for
            the input shape of the model.

    Returns:
        A `Complexity`.

    Raises:
        ValueError: If `model` is not a layer, if `input_shape` does not consist
            of integers >= 1 or is None and not known, or if the model does not
            take such an input.

    Example:

    >>> model = keras.Sequential(
    ...     [keras.layers.Conv2D(8, 3, padding='same'), DiffStride(2.0)]
    ... )
    >>> counts = complexity(model, (32, 32, 3))
    >>> counts.macs  # 32 32 (3 3 3) 8 + (24 32 32 + 24 24 32) 8
    565248
    >>> print(counts)
    layer        class       output   parameters  activations     MACs
    conv2d       Conv2D      32x32x8         224        8,192  221,184
    diff_stride  DiffStride  24x24x8           5        4,608  344,064
    total                                    229       12,800  565,248
    """
    rows, _ = measure(model, input_shape)
    return Complexity(tuple(rows.values()), _count(model.weights))


class Call(NamedTuple):
    """The shapes of the tensors that a layer was called with and returned."""

    inputs: list[tuple]
    outputs: list[tuple]
    is_symbolic: bool


def measure(
    model: keras.layers.Layer,
    input_shape: Any,
    output_shapes: Mapping[keras.layers.Layer, Callable] | None = None,
) -> tuple[dict, dict]:
    """Calls a model once on zeros and records every layer.

    Args:
        model: A Keras model or layer, built or not.
        input_shape: The shape of its input, see `complexity`.
        output_shapes: Maps layers to functions that take the shape of an input
            and return that of the output, both with the batch axis. Such a
            layer is not computed: it returns zeros of these shapes.

    Returns:
        {layer: LayerComplexity} and {layer: list of `Call`}, both in the order
        in which the layers are first called.
    """
    validation.require(
        isinstance(model, keras.layers.Layer),
        '`model` must be a Keras model or layer',
        model=model,
    )
    if input_shape is None:
        input_shape = known_input_shape(model)
    validation.require(
        input_shape is not None,
        '`input_shape` must be given for a model that does not know its own; '
        'one that is not built yet knows it after `model.build`',
        input_shape=None,
    )
    inputs = _zeros(input_shape, input_shape)
    _build(model, inputs)
    paths = _paths(model)
    calls: dict[keras.layers.Layer, list[Call]] = {}
    known_shapes = output_shapes or {}
    thread = threading.get_ident()

    def record(layer, call, *args, **kwargs):
        # Other threads may call the model, and measurements may be nested.
        if threading.get_ident() != thread or calls is not _running[-1]:
            return call(*args, **kwargs)
        calls_of_layer = calls.setdefault(layer, [])
        if layer in known_shapes:
            shape_of = known_shapes[layer]
            outputs = tree.map_structure(
                lambda x: ops.zeros(shape_of(tuple(x.shape)), x.dtype),
                next(iter((*args, *kwargs.values()))),
            )
        else:
            outputs = call(*args, **kwargs)
        shapes = _shapes((args, kwargs)), _shapes(outputs)
        calls_of_layer.append(Call(*shapes, backend.is_tensorflow_graph()))
        return outputs

    with contextlib.ExitStack() as stack:
        _running.append(calls)
        stack.callback(_running.pop)
        for layer in paths:
            stack.enter_context(
                models.intercepted(layer, functools.partial(record, layer))
            )
        with keras.StatelessScope():
            backend.call_for_shapes(lambda x: model(x, training=False), inputs)
    rows = _rows(paths, calls)
    order = {layer: index for index, layer in enumerate(calls)}
    found = sorted(rows, key=lambda layer: order.get(layer, len(order)))
    return {layer: rows[layer] for layer in found}, calls


def known_input_shape(model: keras.layers.Layer) -> Any:
    """Returns the input shape without the batch axis, None if not known."""
    if getattr(model, 'input_shape', None) is None:  # Subclasses have none.
        return None
    is_sequential = isinstance(model, keras.Sequential)
    inputs = model.inputs[0] if is_sequential else model.input
    shape = tree.map_structure(lambda x: tuple(x.shape[1:]), inputs)
    return None if None in tree.flatten(shape) else shape


# It holds the calls of each measurement under way; they may be nested.
_running: list[dict] = []


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

    The cells of an RNN are left out because they are called in a loop.
    """
    paths = {} if paths is None else paths
    if layer not in paths:
        paths[layer] = path or layer.name
        if not isinstance(layer, layers.RNN):
            for inner in models.inner_layers(layer):
                _paths(inner, f'{path}/{inner.name}'.lstrip('/'), paths)
    return paths


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
    if _rule(layer) is None:
        has_kernel = any(len(weight.shape) > 1 for weight in weights)
        return None if has_kernel and calls_of_layer else 0
    found = mac_terms(layer, calls_of_layer)
    return None if None in found else round(sum(found))


def mac_terms(
    layer: keras.layers.Layer, calls: list[Call], skip_identity: bool = True
) -> list:
    """Returns the MACs of a layer as terms, each a product of sizes.

    There are equally many terms for each pair of tensors that a layer is called
    with and returns. A term is None if the MACs are unknown.

    Args:
        layer: Any layer.
        calls: The calls of the layer.
        skip_identity: Whether a spectral layer without weights has no MACs for
            an axis that it leaves as it is.
    """
    rule = _rule(layer)
    found: list = []
    for inputs, outputs, is_symbolic in calls if rule else ():
        for x, y in zip(inputs, outputs):
            if is_symbolic:  # A traced function may run any number of times.
                found.append(None)
            elif rule is _spectral_resampling:
                found += rule(layer, x, y, skip_identity)
            else:
                found.append(rule(layer, x, y))
    return found


def _rule(layer):
    return next((_RULES[x] for x in type(layer).__mro__ if x in _RULES), None)


def _einsum_dense(layer, x, y):
    operands, result = layer.equation.split('->')
    axes = zip(operands.split(',')[1], layer.kernel.shape)
    return _size(y) * math.prod(n for axis, n in axes if axis not in result)


def _spectral_resampling(layer, x, y, skip_identity):
    found, shape = [], list(x)
    for axis in pooling.spatial_axes(layer):
        before, shape[axis] = list(shape), y[axis]
        if layer.method == 'fft':
            terms = [_fft_macs(before, axis), _fft_macs(shape, axis)]
        else:
            terms = [before[axis] * _size(shape)]
        is_identity = before == shape and not layer.weights
        skip = is_identity and skip_identity
        found += [0] * len(terms) if skip else terms
    return found


def _fft_macs(shape, axis):
    """Returns 5/4 n log2 n for each line of n real values along an axis.

    An FFT of n complex values takes about 5 n log2 n additions and
    multiplications, one of real values half as many, and a MAC is two of them.
    """
    return _size(shape) * 1.25 * math.log2(max(shape[axis], 2))


def _rules(macs, names):
    return dict.fromkeys((getattr(layers, name) for name in names), macs)


# This maps a class to a function of (layer, shape of input, shape of output),
# both with the batch axis, that returns MACs, for spectral layers one term per
# axis. A layer without a rule has no MACs, or unknown ones if it has a kernel.
_RULES = {
    **_rules(
        lambda layer, x, y: _size(y) * math.prod(layer.kernel.shape[:-1]),
        ['Conv1D', 'Conv2D', 'Conv3D', 'Dense'],
    ),
    **_rules(
        lambda layer, x, y: _size(x) * math.prod(layer.kernel.shape[:-1]),
        ['Conv1DTranspose', 'Conv2DTranspose', 'Conv3DTranspose'],
    ),
    **_rules(
        lambda layer, x, y: _size(y) * math.prod(layer.kernel.shape[:-2]),
        ['DepthwiseConv1D', 'DepthwiseConv2D'],
    ),
    **_rules(
        lambda layer, x, y: (
            (_size(y) // layer.filters)
            * _count([layer.depthwise_kernel, layer.pointwise_kernel])
        ),
        ['SeparableConv1D', 'SeparableConv2D'],
    ),
    layers.EinsumDense: _einsum_dense,
    pooling.SpectralResampling: _spectral_resampling,
    # An embedding in reverse is a product.
    layers.Embedding: lambda layer, x, y: 0 if len(y) > len(x) else None,
    **_rules(
        lambda layer, x, y: 0, ['LayerNormalization', 'Normalization', 'PReLU']
    ),
    **_rules(
        lambda layer, x, y: None,
        [
            'AdditiveAttention',
            'Attention',
            'Dot',
            'GroupQueryAttention',
            'MultiHeadAttention',
            'RNN',
        ],
    ),
}


def _count(weights: Iterable) -> int:
    return sum(math.prod(x.shape) for x in weights)


def _size(shape: Sequence) -> int:
    """Returns the number of values, or 0 if the shape is not known."""
    return 0 if None in shape else math.prod(shape)


def _shape_text(shape):
    if shape is None:
        return '-'
    if shape and isinstance(shape[0], tuple):
        return ', '.join(map(_shape_text, shape))
    return 'x'.join(map(str, shape)) or '1'
