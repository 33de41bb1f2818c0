"""Replacement of the integer strides of a model by learned ones."""

import dataclasses
import functools
import inspect
import itertools
import tempfile
from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops, tree

from diffstride import models, pooling, validation

_CONVOLUTIONS = (
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
    keras.layers.DepthwiseConv1D,
    keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D,
    keras.layers.SeparableConv2D,
)
_POOLINGS = (
    keras.layers.MaxPooling1D,
    keras.layers.MaxPooling2D,
    keras.layers.MaxPooling3D,
    keras.layers.AveragePooling1D,
    keras.layers.AveragePooling2D,
    keras.layers.AveragePooling3D,
)
# A subclass of a Sequential or Functional model may have its own versions.
_OWN_METHODS = (
    'call',
    'train_step',
    'test_step',
    'predict_step',
    'compute_loss',
    'compute_metrics',
)


def replace_strides(
    model: keras.Model,
    pooling_cls: Callable[..., keras.layers.Layer] = pooling.DiffStride,
    layers: str | Iterable[str] | None = None,
    **kwargs: Any,
) -> keras.Model:
    """Returns a model whose strided layers are followed by learned strides.

    Every convolution (Conv1D to 3D, DepthwiseConv1D and 2D, SeparableConv1D and
    2D) and every maximum and average pooling with a stride above 1 keeps its
    weights, window, padding and activation, loses its stride, and is followed
    by a pooling layer that starts from that stride, `<its name>_pooling`. Where
    the window is a single sample and nothing but a bias follows, as in the 1x1
    convolutions of a ResNet, the pooling runs first: the two commute, and the
    cost of the layer stays. Elsewhere the layer computes at full resolution,
    with prod(S) times the MACs; `complexity` counts them.

    **Maps that meet** (`Add`, `Concatenate`, ...) must go on having equal sizes
    while strides move. So layers whose outputs meet, however far downstream,
    share one pooling layer, as the two branches of a residual block do. Where
    sharing cannot help (two poolings on one branch and one on the other, or an
    upsampling back to a size that is not learned), and where a layer needs a
    fixed size (`Flatten` and `Dense`), a ValueError says so.

    **Outputs.** An output map that is upsampled from a learned size, such as
    that of an autoencoder or of a segmentation network, would soon differ in
    size from its targets, and is refused: end the model with
    `SpectralResizing()([output, input])`. A map that is not upsampled, such as
    that of a network without its head, is allowed. Its size moves with the
    strides, so let global pooling follow it, or resize it to that of the map it
    is compared with.

    **Sizes at the start.** Where the unstrided layer has N samples the strided
    one had ceil(N / S). With `ramp='straight_through'`, the default here, or
    'inside' DiffStride has the same, rounded up to an even number and at most
    N. So 224 x 224 pixels become 112, 56, 28, 14 and then 8 in a ResNet50,
    which ends with 7 otherwise.

    **Accuracy.** The output is not that of the strided model, because the
    pooling removes the frequencies that would be aliased. For maps without
    frequencies above N / (2 S), or N / (2 S) - R with a ramp 'inside', the two
    are equal at the samples that both have, if N / S is even and the padding of
    the strided layer begins like that of the unstrided one. With
    `padding='same'` it often does not: at stride 2 and even N a window of 3
    lies one sample further left than before. A network that was trained with
    strides loses accuracy at first. `diffstride.recalibrate(model, batches)`
    restores much of it without training, by new statistics of the batch
    normalizations. Some training restores the rest.

    Args:
        model: A Sequential or Functional model that is built, as those of
            `keras.applications`, with models within it or without. Layers
            within other layers (wrappers, subclassed models) are left alone.
        pooling_cls: A class of pooling layers, or a callable that returns one,
            called with `strides`, `data_format`, `name`, `dtype` and `kwargs`.
            DiffStride and FixedSpectralPooling mean the class of each layer's
            rank, such as DiffStride1D.
        layers: Names of the layers to replace; None for all.
        **kwargs: Arguments of `pooling_cls`, such as `smoothness_factor=2.0`.

    Returns:
        A new model of the same layers, names, weights, dtypes and trainable
        flags, not compiled; the given model stays as it is. Strides are learned
        if all layers that they serve are trainable, so those of a frozen base
        are not; `trainable=True` in `kwargs` makes all of them learn. An
        inner model whose layers share a pooling with layers outside is
        dissolved into the model that holds it. A model class whose constructor
        takes more than layers becomes a plain Sequential or Functional model.

    Raises:
        ValueError: If the model is of another kind, is not built, or has a
            layer that Keras cannot copy; if a layer of `layers` does not
            stride, or no layer does; if there is no pooling of a layer's rank;
            if sizes could come apart, or a layer or an output needs fixed ones;
            if a model class that would become a plain model has its own
            `train_step` or the like; or from `pooling_cls`.

    Example:

    >>> model = keras.Sequential(
    ...     [
    ...         keras.Input((32, 32, 3)),
    ...         keras.layers.Conv2D(8, 3, 2, padding='same', name='conv'),
    ...         keras.layers.GlobalAveragePooling2D(),
    ...     ]
    ... )
    >>> learned = replace_strides(model)
    >>> [layer.name for layer in learned.layers[:2]]
    ['conv', 'conv_pooling']
    >>> learned.get_layer('conv_pooling').stride_values
    (2.0, 2.0)
    """
    validation.require(
        models.is_graph(model),
        '`model` must be a Sequential or Functional model. The layers of a '
        'subclassed model are not known; replace strides in its parts, or use '
        'DiffStride in its code',
        model=type(model).__name__,
    )
    validation.require(model.built, '`model` must be built', built=model.built)
    validation.require(
        callable(pooling_cls),
        '`pooling_cls` must be a class of pooling layers',
        pooling_cls=pooling_cls,
    )
    own = {'strides', 'data_format', 'name', 'dtype'} & set(kwargs)
    validation.require(
        not own,
        '`kwargs` must not hold what the strided layer gives to its pooling',
        kwargs=sorted(own),
    )
    paths = list(_strided_layers(model))
    chosen = _chosen(list(dict.fromkeys(x for x, _ in paths)), layers)
    poolings = {x: _pooling(x, pooling_cls, kwargs) for x in chosen}
    unstrided = {
        x: type(x).from_config({**x.get_config(), 'strides': 1}) for x in chosen
    }
    sizes = _Sizes(poolings, unstrided)
    sizes.follow(model)
    shared = {x: poolings[sizes.leader(x)] for x in chosen}
    for layer, pool in shared.items():
        if not layer.trainable and 'trainable' not in kwargs:
            pool.trainable = False
    dissolved = _sharing_models(
        [(shared[x], y) for x, y in paths if x in shared]
    )
    copies = {**unstrided, **sizes.inputs_of_any_size()}
    return _Copy(shared, copies, dissolved).of(model)


def _strided_layers(model, path=()):
    """Yields each layer that strides, with the inner models that hold it."""
    for layer in model.layers:
        if models.is_graph(layer):
            yield from _strided_layers(layer, (*path, layer))
        elif isinstance(layer, _CONVOLUTIONS + _POOLINGS):
            if max(layer.strides) > 1:
                yield layer, path


def _sharing_models(paths):
    """Returns the inner models whose poolings serve layers outside of them.

    They must be dissolved, because Keras saves a layer that two models hold,
    but does not load it.
    """
    homes = {}
    for pool, path in paths:
        homes.setdefault(pool, set()).add(path)
    shared = [home for home in homes.values() if len(home) > 1]
    return {model for home in shared for path in home for model in path}


def _chosen(strided, names):
    known = [layer.name for layer in strided]
    if names is not None:
        names = [names] if isinstance(names, str) else names
        validation.require(
            isinstance(names, (list, tuple, set)) and set(names) <= set(known),
            f'`layers` must be names of layers that stride, of {known}',
            layers=names,
        )
        strided = [layer for layer in strided if layer.name in names]
    validation.require(
        strided,
        'There must be a layer to replace, a convolution or pooling of stride '
        'above 1',
        layers=names,
    )
    return strided


def _pooling(layer, pooling_cls, kwargs):
    rank = len(layer.strides)
    if getattr(pooling_cls, 'rank', rank) != rank:
        name = f'{pooling_cls.__name__}{rank}D'
        validation.require(
            hasattr(pooling, name),
            f'`pooling_cls` must be a pooling over {rank} axes, which layer '
            f'"{layer.name}" has',
            pooling_cls=pooling_cls.__name__,
        )
        pooling_cls = getattr(pooling, name)
    if inspect.isclass(pooling_cls):
        if issubclass(pooling_cls, pooling.DiffStride):
            kwargs = {'ramp': 'straight_through', **kwargs}
    return pooling_cls(
        strides=layer.strides,
        data_format=layer.data_format,
        name=f'{layer.name}_pooling',
        dtype=layer.dtype_policy,
        **kwargs,
    )


def _commute(layer, pool):
    """Tells whether pooling may come before a layer that does not stride."""
    return (
        isinstance(layer, _CONVOLUTIONS)
        and set(layer.kernel_size) == {1}
        and layer.activation is keras.activations.linear
        and isinstance(pool, pooling.SpectralPooling)
        and (pool.norm == 'forward' or not layer.use_bias)
    )


def _first(args, kwargs):
    """Returns the first argument of a call, its inputs."""
    return next(iter((*args, *kwargs.values())))


@dataclasses.dataclass(frozen=True)
class _Size:
    """A size that is not a fixed number.

    Attributes:
        kind: 'pooling' for a learned size, 'input' for an unknown size of the
            input, 'function' for one that a layer computes from others.
        origin: The strided layer of a learned size; the number of the input and
            the axis of an unknown size; or the values of a function at the two
            choices of `_Sizes`.
        axis: The axis of a learned size.
        parts: The sizes that this one is computed from.
        offset: The number of samples added to it, such as by padding.
        is_upsampled: Whether a function is larger than all of its parts.
    """

    kind: str
    origin: Any
    axis: int | None = None
    parts: tuple = ()
    offset: int = 0
    is_upsampled: bool = False

    def without_offset(self):
        return dataclasses.replace(self, offset=0)


class _Map:
    """The dtype of a tensor and its shape of numbers, None and `_Size`."""

    def __init__(self, shape, dtype):
        self.shape = tuple(shape)
        self.dtype = dtype


class _Call(keras.Operation):
    """Infers the shapes of a layer's call, with all checks of the input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class _Sizes:
    """The sizes of all maps of a model, as expressions of learned sizes.

    At first each strided layer learns a size of its own. Where maps meet that
    must have equal sizes, their expressions are unified: the layers that they
    come from get one leader, whose pooling layer serves them all.

    Args:
        poolings: The pooling layer of each strided layer.
        unstrided: The copy without stride of each strided layer.
    """

    # Layers tell their output shapes for two choices of the unknown sizes:
    # size i is first + step * i. Each size differs by another number between
    # the choices, so outputs that equal a size up to an offset are recognized.
    _CHOICES = ((128, 6), (197, 11))

    def __init__(self, poolings, unstrided):
        self._poolings = poolings
        self._unstrided = unstrided
        self._leaders = {}
        self._input_shapes = {}

    def leader(self, layer):
        """Returns the layer whose pooling layer a strided layer shares."""
        while layer in self._leaders:
            layer = self._leaders[layer]
        return layer

    def follow(self, model):
        """Raises a ValueError if maps of a model cannot have learned sizes."""
        inputs = [
            _Map(
                (
                    _Size('input', (number, axis)) if axis and n is None else n
                    for axis, n in enumerate(x.shape)
                ),
                x.dtype,
            )
            for number, x in enumerate(model.inputs)
        ]
        outputs = models.run_graph(model, inputs, self._call)
        for before, after in zip(model.outputs, tree.flatten(outputs)):
            for axis, n in enumerate(after.shape):
                self._check_output(model, before, axis, n)

    def _check_output(self, model, output, axis, n):
        if isinstance(n, _Size):
            holds = not (self._is_upsampled(n) and _layers_of(n))
        else:
            before = output.shape[axis]
            holds = n == before or all(
                len(x.shape) <= axis or x.shape[axis] != before
                for x in model.inputs
            )
        if not holds:
            raise ValueError(
                f'The output of layer "{models.source(output).name}" would not '
                f'keep its size: it has {self._origin(n)}, upsampled. End the '
                'model with SpectralResizing()([output, input]), which gives '
                'it the size of the input, or leave layers out by `layers`'
            )

    def _is_upsampled(self, size):
        return isinstance(size, _Size) and (
            size.is_upsampled
            or (
                size.kind == 'function'
                and any(map(self._is_upsampled, size.parts))
            )
        )

    def inputs_of_any_size(self):
        """Returns {InputLayer: copy} for inner models whose inputs vary."""
        return {
            layer: type(layer).from_config(
                {**layer.get_config(), 'batch_shape': shape}
            )
            for layer, shape in self._input_shapes.items()
        }

    def _call(self, layer, *args, **kwargs):
        if models.is_graph(layer):
            inputs = models.flat_inputs(layer, _first(args, kwargs))
            for x, ours in zip(layer.inputs, inputs):
                source = models.source(x)
                shape = self._input_shapes.get(source, x.shape)
                self._input_shapes[source] = tuple(
                    m if m == n else None for m, n in zip(shape, ours.shape)
                )
            return models.run_graph(layer, inputs, self._call)
        if layer in self._poolings:
            infer = self._unstrided[layer].compute_output_spec
            x = self._output(layer, infer, args, kwargs)
            return self._pooled(self._poolings[layer], layer, x)
        if isinstance(layer, pooling.DiffStride):
            return tree.map_structure(
                functools.partial(self._pooled, layer, layer),
                _first(args, kwargs),
            )
        infer = _Call(layer).compute_output_spec
        return self._output(layer, infer, args, kwargs)

    def _pooled(self, pool, layer, x):
        if not (isinstance(pool, pooling.DiffStride) and pool.cropping):
            return self._output(layer, pool.compute_output_spec, (x,), {})
        shape = list(x.shape)
        for axis in pooling.spatial_axes(pool):
            shape[axis] = _Size('pooling', layer, axis, (shape[axis],))
        return _Map(shape, x.dtype)

    def _output(self, layer, infer, args, kwargs):
        """Returns the output maps of a layer, unifying its inputs if needed."""
        try:
            return self._inferred(infer, args, kwargs)
        except Exception:  # A layer of any author may raise any class.
            self._unify_maps(layer, args, kwargs)
        try:
            return self._inferred(infer, args, kwargs)
        except Exception as error:
            message = self._refusal(layer, _maps(args, kwargs))
            raise ValueError(message) from error

    def _refusal(self, layer, maps):
        sizes = [n for x in maps for n in x.shape if isinstance(n, _Size)]
        found = map(self._origin, sizes) if sizes else (x.shape for x in maps)
        message = (
            f'Layer "{layer.name}" cannot take what it would be given with '
            f'other strides: {", ".join(dict.fromkeys(map(str, found)))}. '
            'Leave layers out by `layers`'
        )
        if sizes:
            message += (
                ', have global pooling before this layer, or have fixed sizes '
                'with `pooling_cls=FixedSpectralPooling`'
            )
        return message

    def _inferred(self, infer, args, kwargs):
        """Infers the output maps from those at two choices of the sizes."""
        maps = _maps(args, kwargs)
        sizes = list(
            dict.fromkeys(
                self._resolved(n).without_offset()
                for x in maps
                for n in x.shape
                if isinstance(n, _Size)
            )
        )
        choices = [
            {size: first + step * i for i, size in enumerate(sizes)}
            for first, step in self._CHOICES
        ]
        specs = []
        for values in choices if sizes else choices[:1]:
            known = functools.partial(self._known, values)
            args_now, kwargs_now = tree.map_structure(known, (args, kwargs))
            specs.append(infer(*args_now, **kwargs_now))

        def expressed(x, y):
            if not isinstance(x, keras.KerasTensor):
                return x
            may_grow = any(len(x.shape) == len(z.shape) for z in maps)
            return _Map(
                (expression(m, n, may_grow) for m, n in zip(x.shape, y.shape)),
                x.dtype,
            )

        def expression(m, n, may_grow):
            if m == n:
                return m
            for size in sizes:
                offset = m - choices[0][size]
                if offset == n - choices[1][size]:
                    return dataclasses.replace(size, offset=offset)
            largest = (max(values.values()) for values in choices)
            grows = all(x > y for x, y in zip((m, n), largest))
            return _Size(
                'function',
                (m, n),
                parts=tuple(sizes),
                is_upsampled=may_grow and grows,
            )

        return tree.map_structure(expressed, specs[0], specs[-1])

    def _known(self, values, x):
        """Returns a symbolic tensor for a map, at one choice of the sizes."""
        if not isinstance(x, _Map):
            return x
        shape = [
            values[self._resolved(n).without_offset()] + n.offset
            if isinstance(n, _Size)
            else n
            for n in x.shape
        ]
        return keras.KerasTensor(shape, x.dtype)

    def _resolved(self, size):
        """Returns a size with the leaders of the layers that it comes from."""
        if not isinstance(size, _Size):
            return size
        is_function = size.kind == 'function'
        return dataclasses.replace(
            size,
            origin=size.origin if is_function else self.leader(size.origin),
            parts=tuple(map(self._resolved, size.parts)),
        )

    def _unify_maps(self, layer, args, kwargs):
        for x, y in itertools.combinations(_maps(args, kwargs), 2):
            if len(x.shape) != len(y.shape):
                continue
            for m, n in zip(x.shape, y.shape):
                is_learned = isinstance(m, _Size) or isinstance(n, _Size)
                must_agree = is_learned and 1 not in (m, n)
                if must_agree and not self._unify(m, n):
                    raise ValueError(
                        f'Maps that meet in layer "{layer.name}" could come '
                        f'apart: one has {self._origin(m)}, the other '
                        f'{self._origin(n)}. Leave layers out by `layers`, or '
                        'resize one map to the other with SpectralResizing '
                        'before they meet'
                    )

    def _unify(self, m, n):
        """Makes two sizes equal by sharing, and returns whether they are."""
        m, n = self._resolved(m), self._resolved(n)
        if not (isinstance(m, _Size) and isinstance(n, _Size)):
            return m == n or None in (m, n)
        if (m.kind, m.axis, m.offset) != (n.kind, n.axis, n.offset):
            return False
        if m.origin != n.origin:
            if m.kind == 'function' or not self._may_share(m.origin, n.origin):
                return False
            self._leaders[n.origin] = m.origin
        return len(m.parts) == len(n.parts) and all(
            map(self._unify, m.parts, n.parts)
        )

    def _may_share(self, origin, other):
        if isinstance(origin, tuple):
            return True  # Unknown sizes of inputs may be equal.
        return {origin, other} <= set(self._poolings) and all(
            getattr(origin, name) == getattr(other, name)
            for name in ('strides', 'data_format', 'dtype_policy')
        )

    def _origin(self, size):
        """Says in words where a size comes from."""
        if not isinstance(size, _Size):
            return f'{size} samples'
        names = [f'"{layer.name}"' for layer in _layers_of(size)]
        names = ', '.join(dict.fromkeys(names))
        return f'a size learned by {names}' if names else 'a size of the input'


def _maps(args, kwargs):
    return [x for x in tree.flatten((args, kwargs)) if isinstance(x, _Map)]


def _layers_of(size):
    """Returns the strided layers that a size depends on, from the input on."""
    if not isinstance(size, _Size):
        return []
    layers = [layer for part in size.parts for layer in _layers_of(part)]
    return layers + [size.origin] if size.kind == 'pooling' else layers


class _Copy:
    """Copies models, with pooling layers for the strides of some layers.

    Args:
        poolings: The pooling layer of each strided layer.
        copies: Copies that are already made, by layer.
        dissolved: The inner models whose layers the outer model takes over.
    """

    def __init__(self, poolings, copies, dissolved):
        self._poolings = poolings
        self._copies = dict(copies)
        self._dissolved = dissolved
        self._pooled = {}

    def of(self, model):
        """Returns the copy of a model, with its weights."""
        copy = self._copy(model)
        for layer, new_layer in self._copies.items():
            if models.is_graph(layer):
                models.set_trainable(new_layer, layer.trainable)
            elif isinstance(layer, keras.Layer):
                _copy_state(layer, new_layer)
        return copy

    def _copy(self, layer):
        if layer not in self._copies:
            if isinstance(layer, keras.Sequential) and not (
                self._dissolved & set(layer.layers)
            ):
                copy = self._copy_sequential(layer)
            elif models.is_graph(layer):
                copy = self._copy_functional(layer)
            else:
                copy = _copy_layer(layer)
            self._copies[layer] = copy
        return self._copies[layer]

    def _copy_sequential(self, model):
        cls = _class_taking(model, 'layers') or keras.Sequential
        layers = itertools.chain(*map(self._steps, model.layers))
        copy = cls([*self._copy_inputs(model.inputs), *layers], name=model.name)
        _check_methods(model, copy)
        return copy

    def _copy_functional(self, model):
        cls = _class_taking(model, 'inputs', 'outputs') or keras.Model
        inputs = tree.pack_sequence_as(
            model.input, self._copy_inputs(model.inputs)
        )
        outputs = models.run_graph(model, inputs, self._call)
        copy = cls(inputs, outputs, name=model.name)
        _check_methods(model, copy)
        return copy

    def _copy_inputs(self, inputs):
        return [self._copy(models.source(x)).output for x in inputs]

    def _steps(self, layer):
        """Returns the layers that take the place of one."""
        copy = self._copy(layer)
        if layer not in self._poolings:
            return [copy]
        pool = self._poolings[layer]
        return [pool, copy] if _commute(copy, pool) else [copy, pool]

    def _call(self, layer, *args, **kwargs):
        if layer in self._dissolved:
            call = functools.partial(
                self._call_within, training=kwargs.get('training')
            )
            return models.run_graph(layer, _first(args, kwargs), call)
        first, *others = self._steps(layer)
        if others and first is not self._copy(layer):
            x = _first(args, kwargs)
            key = (first, id(x))
            if key not in self._pooled:  # Another branch may have pooled x.
                self._pooled[key] = first(x)
            return others[0](self._pooled[key])
        x = first(*args, **kwargs)
        return others[0](x) if others else x

    def _call_within(self, layer, *args, training, **kwargs):
        """Calls a layer of a dissolved model as the model would."""
        if training is not None:
            if 'training' in inspect.signature(layer.call).parameters:
                kwargs.setdefault('training', training)
        return self._call(layer, *args, **kwargs)


def _class_taking(model, *names):
    """Returns the class of a model if its first arguments are these, or None.

    A class with arguments of its own cannot be made from layers.
    """
    parameters = inspect.signature(type(model).__init__).parameters
    others = {'trainable', 'name', 'args', 'kwargs'}
    is_same = tuple(parameters)[1 : 1 + len(names)] == names
    is_same &= set(parameters) <= {'self', *names, *others}
    return type(model) if is_same else None


def _check_methods(model, copy):
    """Refuses the copy of a model that would train or compute otherwise."""
    for name in _OWN_METHODS:
        is_kept = getattr(type(model), name) is getattr(type(copy), name)
        validation.require(
            is_kept,
            f'`model` has its own `{name}`, so the constructor of its class '
            'must take (inputs, outputs), or (layers) if it is Sequential, and '
            'nothing more',
            model=type(model).__name__,
        )


def _copy_layer(layer):
    try:
        return models.copy_layer(layer)
    except Exception as error:  # A layer of any author may raise any class.
        raise ValueError(
            '`model` must have layers that Keras can make from their '
            f'`get_config()`. Received: layer "{layer.name}", of which it '
            f'says: {error}'
        ) from error


def _copy_state(layer, copy):
    """Copies weights and vocabularies, as saving and loading would."""
    for old, new in zip(models.flatten(layer), models.flatten(copy)):
        store = {}
        old.save_own_variables(store)
        if store:
            # A copy of each array, for JAX takes those of a model away.
            arrays = {k: ops.convert_to_numpy(x) for k, x in store.items()}
            new.load_own_variables(arrays)
        if hasattr(old, 'save_assets'):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
