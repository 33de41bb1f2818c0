"""Checks of arguments, whose messages name the argument, rule and value."""

import math
import numbers
from collections.abc import Collection, Sequence
from typing import Any

import keras

from diffstride import backend


def require(holds: Any, rule: str, **received: Any) -> None:
    """Raises a ValueError with the rule and the values unless it holds."""
    if not holds:
        values = ', '.join(f'{name}={v!r}' for name, v in received.items())
        raise ValueError(f'{rule}. Received: {values}')


def one_of(name: str, value: Any, allowed: Collection) -> Any:
    """Returns the value of the argument `name` if it is allowed."""
    require(
        value in allowed, f'`{name}` must be one of {allowed}', **{name: value}
    )
    return value


def boolean(name: str, value: Any) -> bool:
    """Returns the argument `name` if it is True or False."""
    require(
        isinstance(value, bool),
        f'`{name}` must be True or False',
        **{name: value},
    )
    return value


def finite(
    name: str, value: Any, least: float = -math.inf, above: float = -math.inf
) -> float:
    """Returns the argument `name` as a float if it is a number in range."""
    rule = f'`{name}` must be a finite number'
    if math.isfinite(least):
        rule += f', at least {least:g}'
    if math.isfinite(above):
        rule += f', above {above:g}'
    require(is_finite(value, least, above), rule, **{name: value})
    return float(value)


def integer(name: str, value: Any, least: int) -> int:
    """Returns the argument `name` as an int if it is at least `least`."""
    rule = f'`{name}` must be an integer, at least {least}'
    require(is_integer(value, least), rule, **{name: value})
    return int(value)


def is_finite(
    value: Any, least: float = -math.inf, above: float = -math.inf
) -> bool:
    """Tells whether a value is a finite number, >= `least` and > `above`."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return (
        is_number and math.isfinite(value) and value >= least and value > above
    )


def is_integer(value: Any, least: int) -> bool:
    """Tells whether a value is an integer >= `least`, and not a bool."""
    return isinstance(value, numbers.Integral) and is_finite(value, least)


def standardize_strides(strides: Any, rank: int) -> tuple[float, ...]:
    """Returns one float per axis, from a number or one number per axis.

    Raises:
        ValueError: If a stride is below 1 or not finite, or if their number is
            not the rank.
    """
    values = strides
    if isinstance(strides, numbers.Real):
        values = (strides,) * rank
    try:
        values = tuple(values)
    except TypeError:
        values = ()
    require(
        len(values) == rank and all(is_finite(s, least=1) for s in values),
        f'`strides` must be a number or a sequence of {rank}, each finite and '
        'at least 1',
        strides=strides,
    )
    return tuple(map(float, values))


def integer_strides(owner: str, strides: Any) -> tuple[int, ...]:
    """Returns the strides of a class over two axes, which must be integers."""
    per_axis = standardize_strides(strides, 2)
    require(
        all(stride.is_integer() for stride in per_axis),
        f'`strides` of {owner} must be integers',
        strides=strides,
    )
    return tuple(map(int, per_axis))


def standardize_size(size: Any) -> int | tuple[int, ...]:
    """Returns an integer, or a tuple of one to three: one per axis.

    Raises:
        ValueError: If a size is not an integer of at least 1, or if there are
            none or more than three.
    """
    if is_integer(size, least=1):
        return int(size)
    values = tuple(size) if hasattr(size, '__iter__') else ()
    require(
        1 <= len(values) <= 3 and all(is_integer(x, least=1) for x in values),
        '`size` must be an integer or one to three integers, each at least 1',
        size=size,
    )
    return tuple(map(int, values))


def check_inputs(
    layer: keras.layers.Layer, inputs: Any, spatial_axes: Sequence[int]
) -> None:
    """Checks the tensor or the list of tensors that a layer is called with."""
    tensors = inputs if isinstance(inputs, (list, tuple)) else [inputs]
    for tensor in tensors:
        require(
            keras.backend.is_float_dtype(tensor.dtype),
            f'The input of layer "{layer.name}" must have a floating-point '
            'dtype',
            dtype=tensor.dtype,
        )
        require(
            len(tensor.shape) == len(spatial_axes) + 2,
            f'The input of layer "{layer.name}" must have '
            f'ndim={len(spatial_axes) + 2}',
            shape=tuple(tensor.shape),
        )
        require(
            all(tensor.shape[axis] != 0 for axis in spatial_axes),
            f'The spatial sizes of the input of layer "{layer.name}" must be '
            'at least 1',
            shape=tuple(tensor.shape),
        )
    sizes = zip(*(backend.static_sizes(x, spatial_axes) for x in tensors))
    require(
        len({tensor.dtype for tensor in tensors}) == 1
        and all(len({*axis} - {None}) <= 1 for axis in sizes),
        f'The inputs of layer "{layer.name}" must be at least one tensor, of '
        'equal spatial sizes and dtype',
        inputs=[(tuple(x.shape), x.dtype) for x in tensors],
    )
