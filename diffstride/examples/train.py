"""The preparation of a training, which gin configures."""

import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
import numpy as np

from diffstride import diffstride_layers, resnet
from diffstride.callbacks import StrideBudget, StrideLogger
from diffstride.examples import (
    checkpoints,
    data,
    devices,
    rules,
    schedules,
    settings,
)
from diffstride.examples.training import Training, innermost
from diffstride.validation import is_integer, require


def _is_policy_of_floats(name):
    try:
        policy = keras.dtype_policies.get(name)
    except (TypeError, ValueError):
        return False
    return (
        bool(name)
        and keras.backend.is_float_dtype(policy.compute_dtype)
        and getattr(policy, 'quantization_mode', None) is None
    )


_RULES: dict[str, rules.Rule] = {
    'load_data_fn': rules.CALLABLE,
    'model_cls': rules.CALLABLE,
    'optimizer_cls': rules.CALLABLE,
    'loss_cls': rules.CALLABLE,
    'num_epochs': rules.COUNT,
    'steps_per_epoch': (
        'an integer, at least 1, or None',
        lambda x: x is None or is_integer(x, least=1),
    ),
    'dtype_policy': (
        "a policy of floats, such as 'mixed_bfloat16'",
        _is_policy_of_floats,
    ),
    'jit_compile': rules.choice(True, False, 'auto'),
    'callbacks': (
        'a list of Keras callbacks, such as [@callbacks.StrideBudget()]',
        lambda values: (
            isinstance(values, (list, tuple))
            and all(isinstance(x, keras.callbacks.Callback) for x in values)
        ),
    ),
    'seed': rules.COUNT_OR_ZERO,
    'deterministic': rules.choice(True, False),
    'on_changed_settings': rules.choice('refuse', 'continue'),
    'labels': ('a dict or None', lambda x: x is None or isinstance(x, dict)),
}


@gin.configurable(module='train')
def train(
    workdir: str | os.PathLike | None = None,
    load_data_fn: Callable = data.load_datasets,
    model_cls: Callable = resnet.resnet18,
    optimizer_cls: Callable = keras.optimizers.SGD,
    loss_cls: Callable = keras.losses.CategoricalCrossentropy,
    num_epochs: int = 400,
    steps_per_epoch: int | None = None,
    data_format: str = 'auto',
    dtype_policy: str = 'float32',
    jit_compile: bool | str = 'auto',
    distribution: str = 'auto',
    callbacks: Sequence = (),
    seed: int = 0,
    deterministic: bool = False,
    on_changed_settings: str = 'refuse',
    labels: dict | None = None,
) -> Training:
    """Prepares the training of a classifier; writes nothing yet.

    Args:
        workdir: Folder of all outputs, see `checkpoints`, made if there is
            none. A training that has begun in it is continued.
        load_data_fn: Called with `seed`; returns `data.Datasets`.
        model_cls: Called with `num_output_classes` and `channels_first`; makes
            a Keras model of [batch, height, width, channels] images, whose
            outputs fit `loss_cls`.
        optimizer_cls: Returns the optimizer. If it averages weights
            (`use_ema`), the averages are validated and kept.
        loss_cls: Returns the loss, of one-hot labels.
        num_epochs: Total number of epochs, with those before a resumption.
        steps_per_epoch: Steps of an epoch; None for the whole training set.
        data_format: 'channels_first', 'channels_last' or 'auto': channels_first
            on a GPU and channels_last on a CPU, whose convolutions need it.
        dtype_policy: A dtype policy of Keras, such as 'mixed_bfloat16'.
        jit_compile: See `keras.Model.compile`.
        distribution: 'none'; 'mirrored' (TensorFlow) or 'data_parallel' (JAX)
            over all devices of the kind that computes; 'auto' for the one that
            the backend has if there are several GPUs.
        callbacks: Keras callbacks. A resumption restores the numbers that they
            remember, such as the best loss of EarlyStopping, but no arrays.
        seed: Seed of the initialization, the order of the data, and
            augmentation.
        deterministic: Whether two runs of one seed on one machine, interrupted
            or not, must give equal numbers, at the cost of speed.
        on_changed_settings: 'refuse' to continue a training under other
            settings, or 'continue' to allow another learning rate, loss,
            callback, seed or augmentation. More epochs are always allowed.
        labels: Words that name the run in a report, such as
            {'variant': 'DiffStride'}.

    Raises:
        ValueError: If a setting is wrong, has no effect, or differs from the
            one under which the training in the workdir began.
    """
    rules.check(locals(), _RULES)
    workdir = checked_workdir(workdir)
    channels_first = devices.is_channels_first(data_format)
    scope = devices.scope(distribution)
    keras.utils.clear_session()  # Names of layers are keys of the history.
    keras.utils.set_random_seed(seed)
    if deterministic:
        devices.make_deterministic()
    keras.config.set_dtype_policy(dtype_policy)
    datasets = _returned('load_data_fn', load_data_fn, data.Datasets, seed=seed)
    steps_per_epoch = steps_per_epoch or datasets.steps_per_epoch
    with scope, schedules.training_of(steps_per_epoch, num_epochs):
        model = _compiled_model(
            datasets,
            optimizer_cls,
            loss_cls,
            model_cls,
            channels_first,
            jit_compile,
        )
    training = Training(
        workdir=workdir,
        model=model,
        datasets=datasets,
        callbacks=_prepared(callbacks, model, datasets, workdir, num_epochs),
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
        settings=gin.operative_config_str(),
        seed=seed,
        labels=labels or {},
    )
    settings.check_reach()
    training.check_changes(on_changed_settings)
    return training


def checked_workdir(workdir: Any) -> pathlib.Path:
    """Returns the path of a folder if it can be made and written."""
    is_path = isinstance(workdir, (str, os.PathLike)) and str(workdir)
    require(
        is_path and '\0' not in str(workdir),
        '`workdir` must be a folder, set as in '
        '--gin_bindings="train.workdir = \'/tmp/run\'"',
        workdir=workdir,
    )
    path = pathlib.Path(workdir).expanduser()
    parents = path, *path.absolute().parents
    existing = next(parent for parent in parents if parent.exists())
    require(
        existing.is_dir() and os.access(existing, os.W_OK | os.X_OK),
        f'`workdir` must be a folder that can be made and written, and '
        f'{existing} cannot',
        workdir=str(workdir),
    )
    return path


def _returned(name, function, kind, **kwargs):
    """Returns what an argument of `train` makes, which must be of a kind."""
    made = resnet.configured(function)(**kwargs)
    if not isinstance(made, kind):
        raise ValueError(
            f'`{name}` must return an instance of {kind.__name__}. '
            f'Received: {made!r}'
        )
    return made


def _compiled_model(
    datasets, optimizer_cls, loss_cls, model_cls, channels_first, jit_compile
):
    optimizer = _returned(
        'optimizer_cls', optimizer_cls, keras.optimizers.Optimizer
    )
    loss = _returned('loss_cls', loss_cls, keras.losses.Loss)
    model = _returned(
        'model_cls',
        model_cls,
        keras.Model,
        num_output_classes=datasets.num_classes,
        channels_first=channels_first,
    )
    model.build((None, *datasets.image_shape))
    _check_outputs(model, loss, datasets)
    layers = diffstride_layers(model)
    if layers:
        strides = [layer.strides for layer in layers]
        innermost(optimizer).exclude_from_weight_decay(strides)
    if jit_compile is True:  # XLA on TensorFlow needs static sizes.
        for layer in layers:
            layer.make_sizes_static()
    model.compile(
        optimizer, loss, metrics=['accuracy'], jit_compile=jit_compile
    )
    return model


def _check_outputs(model, loss, datasets):
    images = np.zeros((2, *datasets.image_shape), 'float32')
    outputs = keras.ops.convert_to_numpy(model(images, training=False))
    require(
        outputs.shape == (2, datasets.num_classes),
        f'`model_cls` must put out {datasets.num_classes} classes',
        shape=outputs.shape,
    )
    wants_probabilities = loss.get_config().get('from_logits') is False
    if wants_probabilities and not np.allclose(outputs.sum(1), 1, atol=1e-2):
        raise ValueError(
            'The loss expects probabilities, the model puts out logits: set '
            "resnet.Resnet.output_activation = 'softmax', or from_logits of "
            'the loss'
        )
    labels = np.eye(datasets.num_classes, dtype='float32')[[0, 0]]
    try:
        value = float(keras.ops.convert_to_numpy(loss(labels, outputs)))
    except Exception as error:  # Keras raises errors of many kinds.
        raise ValueError(
            '`loss_cls` must return a loss of one-hot labels. Received: '
            f'{type(loss).__name__} ({checkpoints.first_line(error)})'
        ) from error
    require(
        math.isfinite(value),
        'The loss must be finite before training',
        **{type(loss).__name__: value},
    )


def _prepared(callbacks, model, datasets, workdir, num_epochs):
    """Returns the callbacks, the first of which logs strides to the workdir."""
    loggers = [x for x in callbacks if isinstance(x, StrideLogger)]
    others = [x for x in callbacks if x not in loggers]
    loggers = loggers or [StrideLogger()]
    loggers[0].log_dir = loggers[0].log_dir or workdir / 'logs'
    for logger in loggers:
        logger.input_shape = logger.input_shape or datasets.image_shape
        logger.set_model(model)  # It checks the names of the layers.
        if isinstance(logger, StrideBudget):
            logger.on_train_begin()  # It checks the budget.
            is_share = isinstance(logger.learn, float)
            learned = logger.learn * (num_epochs if is_share else 1)
            require(
                math.ceil(learned) < num_epochs,
                '`learn` must leave an epoch for weights with strides that are '
                f'held, of {num_epochs} epochs in all',
                learn=logger.learn,
            )
    return [*loggers, *others]
