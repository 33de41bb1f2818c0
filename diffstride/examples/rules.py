"""The rules for arguments of the example, each in one place.

A rule is a text and a function that tells whether a value follows it.
"""

import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from diffstride.validation import is_finite, is_integer, require

Rule = tuple[str, Callable[[Any], bool]]


def check(arguments: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Checks the arguments of a function, in the order of the rules.

    Raises:
        ValueError: If one breaks its rule. The message names both.
    """
    for name, (rule, holds) in rules.items():
        value = arguments[name]
        require(holds(value), f'`{name}` must be {rule}', **{name: value})


def choice(*allowed: Any) -> Rule:
    """Returns the rule that a value is one of these, and of the same type."""
    return f'one of {allowed}', lambda value: any(
        type(value) is type(x) and value == x for x in allowed
    )


def is_text(value: Any) -> bool:
    """Tells whether a value is a string that is not empty."""
    return isinstance(value, str) and value != ''


def is_pattern(value: Any) -> bool:
    """Tells whether a value is a regular expression that is not empty."""
    try:
        return is_text(value) and bool(re.compile(value))
    except re.error:
        return False


def are(values: Any, is_allowed: Callable[[Any], bool]) -> bool:
    """Tells whether all values of a list are allowed and different."""
    return (
        isinstance(values, (list, tuple))
        and len(values) > 0
        and all(map(is_allowed, values))
        and len(set(values)) == len(values)
    )


def _is_share(value):
    return is_finite(value, above=0) and value < 1


COUNT = 'an integer, at least 1', lambda x: is_integer(x, least=1)
COUNT_OR_ZERO = 'an integer, at least 0', lambda x: is_integer(x, least=0)
SEED = (
    'an integer in [0, 2**63)',
    lambda x: is_integer(x, least=0) and x < 2**63,
)
CALLABLE: Rule = 'a class or another callable', callable
SIZE = (
    '(height, width), two integers of at least 1, or None',
    lambda x: (
        x is None
        or (
            isinstance(x, (list, tuple))
            and len(x) == 2
            and all(is_integer(size, least=1) for size in x)
        )
    ),
)
# The arguments that all loaders of datasets have.
DATASETS = {
    'data_dir': (
        'a path or None',
        lambda x: x is None or is_text(x) or isinstance(x, os.PathLike),
    ),
    'batch_size': COUNT,
    'train_split': (
        'the name of a split, a slice of one or a sum of slices',
        is_text,
    ),
    'validation_split': (
        'the name of a split, a slice of one, a share between 0 and 1, or None',
        lambda x: x is None or is_text(x) or _is_share(x),
    ),
    'test_split': (
        'the name of a split, a slice of one, or a share between 0 and 1',
        lambda x: is_text(x) or _is_share(x),
    ),
    'class_weights': choice('balanced', None),
    'seed': SEED,
}
