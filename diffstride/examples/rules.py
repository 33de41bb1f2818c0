"""The rules for arguments of the example, which stand in its signatures.

    def load(batch_size: rules.Count, cache: bool | Literal['auto']):
        rules.check(load, locals())

The type of a parameter is a rule, an alias at the end of this module.
"""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from diffstride.validation import is_finite, is_integer, require


@dataclasses.dataclass(frozen=True)
class Rule:
    """A text, and a function that tells whether a value follows it."""

    text: str
    holds: Callable[[Any], bool]


def check(function: Callable, arguments: Mapping[str, Any]) -> None:
    """Checks the arguments of a function by the types of its parameters.

    Rules, `bool`, literals and unions of these with None are checked, and
    other types are not.

    Raises:
        ValueError: If a value breaks its rule. The message names both.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    for name, value in arguments.items():
        rule = _rule(hints.get(name))
        if rule is not None:
            text = f'`{name}` must be {rule.text}'
            require(rule.holds(value), text, **{name: value})


def _rule(hint):
    """Returns the rule of a type, or None."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    rule, allowed = None, []
    for part in typing.get_args(hint) if union else [hint]:
        if hasattr(part, '__metadata__'):
            (rule,) = part.__metadata__
        elif part is bool:
            allowed += [True, False]
        elif part is type(None):
            allowed.append(None)
        elif typing.get_origin(part) is typing.Literal:
            allowed += typing.get_args(part)
        else:
            return None

    def is_allowed(value):
        return any(type(value) is type(x) and value == x for x in allowed)

    if rule is None:
        return Rule(f'one of {tuple(allowed)}', is_allowed)
    text = f'{rule.text}, or None' if allowed else rule.text
    return Rule(text, lambda value: is_allowed(value) or rule.holds(value))


def is_text(value: Any) -> bool:
    """Tells whether a value is a string that is not empty."""
    return isinstance(value, str) and value != ''


def is_seed(value: Any) -> bool:
    """Tells whether NumPy and all backends take a value as a seed."""
    return is_integer(value, least=0) and value < 2**32


def are(values: Any, is_allowed: Callable[[Any], bool]) -> bool:
    """Tells whether all values of a list are allowed and different."""
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(map(is_allowed, values))
        and len(set(values)) == len(values)
    )


def _is_pattern(value):
    try:
        return is_text(value) and bool(re.compile(value))
    except re.error:
        return False


def _is_size(value):
    is_pair = isinstance(value, (list, tuple)) and len(value) == 2
    return is_pair and all(is_integer(x, least=1) for x in value)


def _is_share(value):
    return is_finite(value, above=0) and value < 1


Count = Annotated[
    int, Rule('an integer, at least 1', lambda x: is_integer(x, least=1))
]
CountOrZero = Annotated[
    int, Rule('an integer, at least 0', lambda x: is_integer(x, least=0))
]
Seed = Annotated[int, Rule('an integer in [0, 2**32)', is_seed)]
Number = Annotated[
    float, Rule('a finite number, at least 0', lambda x: is_finite(x, least=0))
]
Seconds = Annotated[
    float,
    Rule('a number of seconds, above 0', lambda x: is_finite(x, above=0)),
]
Text = Annotated[str, Rule('a string that is not empty', is_text)]
Pattern = Annotated[str, Rule('a regular expression', _is_pattern)]
Path = Annotated[
    str | os.PathLike,
    Rule('a path', lambda x: is_text(x) or isinstance(x, os.PathLike)),
]
Factory = Annotated[Callable, Rule('a class or another callable', callable)]
Size = Annotated[
    tuple[int, int],
    Rule('(height, width), two integers of at least 1', _is_size),
]
SplitOrShare = Annotated[
    str | float,
    Rule(
        'the name of a split, a slice of one, or a share between 0 and 1',
        lambda x: is_text(x) or _is_share(x),
    ),
]
