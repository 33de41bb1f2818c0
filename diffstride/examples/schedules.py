"""Schedules of the learning rate, measured in epochs."""

import contextlib
import contextvars
from collections.abc import Iterator

import gin
import keras

from diffstride.validation import finite, is_finite, require

_LENGTH: contextvars.ContextVar = contextvars.ContextVar('length')


@contextlib.contextmanager
def training_of(steps_per_epoch: int, num_epochs: int) -> Iterator[None]:
    """Sets the length of the training for schedules that are made inside."""
    token = _LENGTH.set((steps_per_epoch, num_epochs))
    try:
        yield
    finally:
        _LENGTH.reset(token)


@gin.register(module='schedules')
def warmup_cosine(
    peak: float, warmup_epochs: float = 1.0, final: float = 0.0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """Returns a cycle: a line from 0 to the peak, then half a cosine down.

    Args:
        peak: Highest learning rate.
        warmup_epochs: Epochs until the peak, not necessarily a whole number. In
            all other epochs the rate falls.
        final: Learning rate at the end.

    Raises:
        ValueError: If a value is out of its range, or outside of `training_of`.
    """
    finite('peak', peak, above=0)
    finite('final', final, least=0)
    steps_per_epoch, num_epochs = _LENGTH.get((0, 0))
    require(
        num_epochs > 0,
        '`schedules` in epochs must be made by train.train',
        num_epochs=num_epochs,
    )
    require(
        is_finite(warmup_epochs, least=0) and warmup_epochs < num_epochs,
        f'`warmup_epochs` must be at least 0 and below the {num_epochs} epochs '
        'of the training',
        warmup_epochs=warmup_epochs,
    )
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=num_epochs * steps_per_epoch - warmup_steps,
        alpha=final / peak,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )
