"""Schedules of the learning rate in epochs, whatever the length of an epoch."""

import contextlib
import contextvars

import gin
import keras

from diffstride.validation import is_finite, require

_LENGTH = contextvars.ContextVar('length')


@contextlib.contextmanager
def training_of(steps_per_epoch: int, num_epochs: int):
    """Says how long the training is for which schedules are made inside."""
    token = _LENGTH.set((steps_per_epoch, num_epochs))
    try:
        yield
    finally:
        _LENGTH.reset(token)


@gin.register(module='schedules')
def warmup_cosine(
    peak: float, warmup_epochs: float = 1.0, final: float = 0.0
) -> keras.optimizers.schedules.LearningRateSchedule:
    """One cycle: from 0 to the peak in a line, then down in half a cosine.

    Args:
        peak: Highest learning rate.
        warmup_epochs: Epochs until the peak, not necessarily whole. The rest of
            the training is the way down.
        final: Learning rate at the end.

    Raises:
        ValueError: If a value is out of its range, or if no training has said
            how long it is.
    """
    require(
        is_finite(peak, above=0),
        '`peak` must be a finite number above 0',
        peak=peak,
    )
    require(
        is_finite(final, least=0),
        '`final` must be a finite number, at least 0',
        final=final,
    )
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
