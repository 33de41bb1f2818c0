"""Learned strides in the place of the integer strides of an existing model."""

import dataclasses
import functools
import inspect
import itertools
import tempfile

import keras
from keras import tree

from diffstride import pooling, validation

_CONVOLUTIONS = tuple(
    getattr(keras.layers, name)
    for name in (
        *('Conv1D', 'Conv2D', 'Conv3D', 'DepthwiseConv1D', 'DepthwiseConv2D'),
        *('SeparableConv1D', 'SeparableConv2D'),
    )
)
_POOLINGS = tuple(
    getattr(keras.layers, f'{kind}Pooling{rank}D')
    for kind in ('Max', 'Average')
    for rank in (1, 2, 3)
)


def replace_strides(
    model, pooling_cls=pooling.DiffStride, layers=None, **kwargs
):
    """Returns a model whose strided layers are followed by learned strides.

    Every convolution (Conv1D to 3D, DepthwiseConv1D and 2D, SeparableConv1D and
    2D) and every maximum and average pooling with a stride above 1 keeps its
    weights, window, padding and activation, loses its stride, and is followed
    by a pooling layer that starts from that stride, `<its name>_pooling`. Where
    the window is a single sample and nothing but a bias follows, as in the 1x1
    convolutions of a ResNet, the pooling runs first: the two commute, and the
    layer costs what it did. Elsewhere it computes at full resolution, with
    prod(S) times the MACs; `complexity` says what that is for a model.

    Maps that meet (`Add`, `Concatenate`, ...) must go on having equal sizes
    while strides move. So layers whose outputs meet, however far downstream,
    share one pooling layer, as the two branches of a residual block do. Where
    sharing cannot help (two poolings against one, an upsampling back to a size
    that is not learned), and where a layer needs a fixed size (`Flatten` and
    `Dense`), a ValueError says so.

    Sizes at the start: where the unstrided layer has N samples the strided one
    had ceil(N / S), and with `ramp='straight_through'`, the default here, or
    'inside' DiffStride has the same, rounded up to an even number and at most
    N. So 224 x 224 pixels become 112, 56, 28, 14 and then 8 in a ResNet50,
    where they became 7.

    The output is not that of the strided model: the pooling removes what would
    be aliased. It is the same, at the samples that both have, for maps without
    frequencies above N / (2 S), less R with a ramp 'inside', if N / S is even
    and the padding of the strided layer begins like that of the unstrided one.
    With `padding='same'` it often does not: at stride 2 and even N a window of
    3 lies one sample further left than before. Weights trained with strides
    need some more training, and more with `ramp='inside'`, which dampens small
    maps.

    Args:
        model: A Sequential or Functional model that is built, as those of
            `keras.applications`, with models within it or without. Layers
            within other layers (wrappers, subclassed models) are left alone.
        pooling_cls: A class of pooling layers, or a callable that returns one,
            called with `strides`, `data_format`, `name`, `dtype` and `kwargs`.
            DiffStride and FixedSpectralPooling stand for those of all ranks.
        layers: Names of the layers to replace; None for all.
        **kwargs: Of `pooling_cls`, such as `smoothness_factor=2.0`.

    Returns:
        A new model of the same layers, names, weights, dtypes and trainable
        flags, not compiled. The given model is left as it is. A model within
        it whose layers share a pooling with layers outside is dissolved into
        the one that holds it. A model class whose constructor takes no layers
        becomes a plain Sequential or Functional model.

    Raises:
        ValueError: If the model is of another kind or not built; if a layer of
            `layers` is not one that strides, or if there is none; if there is
            no pooling of a layer's rank; if sizes could come apart, or a layer
            needs fixed ones; or from `pooling_cls`.

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
        _is_graph(model),
        '`model` must be a Sequential or Functional model. Layers of a '
        'subclassed model are not known; replace strides in its parts, or use '
        'DiffStride in its code',
        model=type(model).__name__,
    )
    validation.require(model.built, '`model` must be built', built=model.built)
    paths = list(_strided_layers(model))
    chosen = _chosen(list(dict.fromkeys(x for x, _ in paths)), layers)
    poolings = {x: _pooling(x, pooling_cls, kwargs) for x in chosen}
    unstrided = {
        x: type(x).from_config({**x.get_config(), 'strides': 1}) for x in chosen
    }
    sizes = _Sizes(poolings, unstrided)
    sizes.follow(model)
    shared = {x: poolings[sizes.leader(x)] for x in chosen}
    dissolved = _that_share([(shared[x], y) for x, y in paths if x in shared])
    copies = {**unstrided, **sizes.inputs_of_any_size()}
    return _Copy(shared, copies, dissolved).of(model)


def _is_graph(layer):
    return isinstance(layer, keras.Model) and (
        isinstance(layer, keras.Sequential)
        or hasattr(layer, '_run_through_graph')
    )


def _strided_layers(model, path=()):
    """Yields each layer that strides and the models within which it is."""
    for layer in model.layers:
        if _is_graph(layer):
            yield from _strided_layers(layer, (*path, layer))
        elif isinstance(layer, _CONVOLUTIONS + _POOLINGS):
            if max(layer.strides) > 1:
                yield layer, path


def _that_share(paths):
    """Returns the inner models whose poolings are shared beyond them.

    Keras saves a layer that two models hold, but does not load it.
    """
    homes = {}
    for pool, path in paths:
        homes.setdefault(pool, set()).add(path)
    shared = [home for home in homes.values() if len(home) > 1]
    return {model for home in shared for path in home for model in path}


def _chosen(strided, names):
    known = [layer.name for layer in strided]
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        validation.require(
            set(names) <= set(known),
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
    """Whether pooling may come before a layer that does not stride."""
    return (
        isinstance(layer, _CONVOLUTIONS)
        and set(layer.kernel_size) == {1}
        and layer.activation is keras.activations.linear
        and isinstance(pool, pooling.SpectralPooling)
        and (pool.norm == 'forward' or not layer.use_bias)
    )


def _run(model, inputs, call):
    """Runs a model, with `call(layer, ...)` in the place of `layer(...)`."""
    inputs = _flat_inputs(model, inputs)
    if isinstance(model, keras.Sequential):
        return functools.reduce(
            lambda x, layer: call(layer, x), model.layers, *inputs
        )
    return model._run_through_graph(
        inputs, operation_fn=lambda layer: functools.partial(call, layer)
    )


def _flat_inputs(model, inputs):
    if isinstance(inputs, dict) and not isinstance(model.input, dict):
        inputs = [inputs[x.name] for x in model.inputs]
    return tree.flatten(inputs)


def _first(args, kwargs):
    return [*args, *kwargs.values()][0]


@dataclasses.dataclass(frozen=True)
class _Size:
    """A size that is not a known number: that of its source, plus an offset.

    Attributes:
        source: ('pooling', layer, axis), ('input', (number, axis)), or
            ('function', values that stand for it).
        parts: The sizes that it is computed from.
        offset: An integer, as of padding.
    """

    source: tuple
    parts: tuple = ()
    offset: int = 0


class _Map:
    """What is known of a tensor: numbers, None and `_Size`, and the dtype."""

    def __init__(self, shape, dtype):
        self.shape = tuple(shape)
        self.dtype = dtype


class _Call(keras.Operation):
    """Infers shapes by a call of a layer, with all checks of its input."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, *args, **kwargs):
        return self.layer(*args, **kwargs)


class _Sizes:
    """The sizes of all maps of a model, as expressions of learned ones.

    Every learned size is first a quantity of its own. Where maps meet that
    must have equal sizes, the expressions are unified: the layers that they
    come from get one leader, whose pooling layer serves them all.
    """

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

        def free(number, axis, n):
            is_free = axis > 0 and n is None
            return _Size(('input', (number, axis))) if is_free else n

        inputs = [
            _Map(
                (free(number, axis, n) for axis, n in enumerate(x.shape)),
                x.dtype,
            )
            for number, x in enumerate(model.inputs)
        ]
        _run(model, inputs, self._call)

    def inputs_of_any_size(self):
        """Returns {InputLayer: copy} of inner models whose inputs resize."""
        return {
            layer: type(layer).from_config(
                {**layer.get_config(), 'batch_shape': shape}
            )
            for layer, shape in self._input_shapes.items()
        }

    def _call(self, layer, *args, **kwargs):
        if _is_graph(layer):
            inputs = _flat_inputs(layer, _first(args, kwargs))
            for x, ours in zip(layer.inputs, inputs):
                source = x._keras_history.operation
                shape = self._input_shapes.get(source, x.shape)
                self._input_shapes[source] = tuple(
                    m if m == n else None for m, n in zip(shape, ours.shape)
                )
            return _run(layer, inputs, self._call)
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
        for axis in pool.spatial_axes:
            shape[axis] = _Size(('pooling', layer, axis), (shape[axis],))
        return _Map(shape, x.dtype)

    def _output(self, layer, infer, args, kwargs):
        try:
            return self._inferred(infer, args, kwargs)
        except Exception:  # Of any class: the layer may be anyone's.
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
        """Infers the output from those of two choices of the unknown sizes."""
        sizes = list(
            dict.fromkeys(
                dataclasses.replace(self._resolved(n), offset=0)
                for x in _maps(args, kwargs)
                for n in x.shape
                if isinstance(n, _Size)
            )
        )
        # Any numbers will do whose differences differ.
        choices = [
            {size: first + step * i for i, size in enumerate(sizes)}
            for first, step in ((128, 6), (197, 11))
        ]
        specs = []
        for values in choices if sizes else choices[:1]:
            known = functools.partial(self._known, values)
            args_now, kwargs_now = tree.map_structure(known, (args, kwargs))
            specs.append(infer(*args_now, **kwargs_now))

        def expressed(x, y):
            if not isinstance(x, keras.KerasTensor):
                return x
            return _Map(
                (expression(m, n) for m, n in zip(x.shape, y.shape)), x.dtype
            )

        def expression(m, n):
            if m == n:
                return m
            for size in sizes:
                offset = m - choices[0][size]
                if offset == n - choices[1][size]:
                    return dataclasses.replace(size, offset=offset)
            return _Size(('function', (m, n)), tuple(sizes))

        return tree.map_structure(expressed, specs[0], specs[-1])

    def _known(self, values, x):
        if not isinstance(x, _Map):
            return x
        shape = list(x.shape)
        for axis, n in enumerate(shape):
            if isinstance(n, _Size):
                size = dataclasses.replace(self._resolved(n), offset=0)
                shape[axis] = values[size] + n.offset
        return keras.KerasTensor(shape, x.dtype)

    def _resolved(self, size):
        if not isinstance(size, _Size):
            return size
        kind, origin, *axis = size.source
        return _Size(
            (kind, self.leader(origin), *axis),
            tuple(map(self._resolved, size.parts)),
            size.offset,
        )

    def _unify_maps(self, layer, args, kwargs):
        for x, y in itertools.combinations(_maps(args, kwargs), 2):
            if len(x.shape) == len(y.shape):
                for m, n in zip(x.shape, y.shape):
                    is_learned = isinstance(m, _Size) or isinstance(n, _Size)
                    must_agree = is_learned and 1 not in (m, n)
                    if must_agree and not self._unify(m, n):
                        raise ValueError(
                            f'Maps that meet in layer "{layer.name}" could '
                            f'come apart: one has {self._origin(m)}, the other '
                            f'{self._origin(n)}. Leave layers out by `layers`, '
                            'or resize one map to the other with '
                            'SpectralResizing before they meet'
                        )

    def _unify(self, m, n):
        """Makes two sizes equal by sharing, and returns whether they are."""
        m, n = self._resolved(m), self._resolved(n)
        if not (isinstance(m, _Size) and isinstance(n, _Size)):
            return m == n or None in (m, n)
        (kind, origin, *axis), (kind_n, origin_n, *axis_n) = m.source, n.source
        if (kind, axis, m.offset) != (kind_n, axis_n, n.offset):
            return False
        if origin != origin_n:
            if kind == 'function' or not self._may_share(origin, origin_n):
                return False
            self._leaders[origin_n] = origin
        return len(m.parts) == len(n.parts) and all(
            map(self._unify, m.parts, n.parts)
        )

    def _may_share(self, origin, other):
        if isinstance(origin, tuple):
            return True  # Unknown sizes of inputs.
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
    return layers + [size.source[1]] * (size.source[0] == 'pooling')


class _Copy:
    """Copies models, with pooling layers for the strides of some layers."""

    def __init__(self, poolings, copies, dissolved):
        self._poolings = poolings
        self._copies = dict(copies)
        self._dissolved = dissolved
        self._pooled = {}

    def of(self, model):
        """Returns the copy of a model, with its weights."""
        copy = self._copy(model)
        for layer, new_layer in self._copies.items():
            if _is_graph(layer):
                new_layer._trainable = layer._trainable
            elif isinstance(layer, keras.Layer):
                _copy_state(layer, new_layer)
        return copy

    def _copy(self, layer):
        if layer not in self._copies:
            if isinstance(layer, keras.Sequential) and not (
                self._dissolved & set(layer.layers)
            ):
                copy = self._copy_sequential(layer)
            elif _is_graph(layer):
                copy = self._copy_functional(layer)
            else:
                copy = type(layer).from_config(layer.get_config())
            self._copies[layer] = copy
        return self._copies[layer]

    def _copy_sequential(self, model):
        cls = _class_taking(model, 'layers') or keras.Sequential
        layers = itertools.chain(*map(self._steps, model.layers))
        return cls([*self._copy_inputs(model.inputs), *layers], name=model.name)

    def _copy_functional(self, model):
        cls = _class_taking(model, 'inputs', 'outputs') or keras.Model
        inputs = tree.pack_sequence_as(
            model.input, self._copy_inputs(model.inputs)
        )
        return cls(inputs, _run(model, inputs, self._call), name=model.name)

    def _copy_inputs(self, inputs):
        return [self._copy(x._keras_history.operation).output for x in inputs]

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
            return _run(layer, _first(args, kwargs), call)
        first, *others = self._steps(layer)
        if others and first is not self._copy(layer):
            x = _first(args, kwargs)
            key = (first, id(x))
            if key not in self._pooled:  # By another branch.
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

    What has arguments of its own cannot be made of layers.
    """
    parameters = inspect.signature(type(model).__init__).parameters
    is_same = tuple(parameters)[1 : 1 + len(names)] == names
    return type(model) if is_same else None


def _copy_state(layer, copy):
    """Copies weights and vocabularies, as saving and loading would."""
    for old, new in zip(layer._flatten_layers(), copy._flatten_layers()):
        store = {}
        old.save_own_variables(store)
        if store:
            new.load_own_variables(store)
        if hasattr(old, 'save_assets'):
            with tempfile.TemporaryDirectory() as folder:
                old.save_assets(folder)
                new.load_assets(folder)
