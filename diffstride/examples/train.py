"""Training of an image classifier, configured by gin and resumable."""

import contextlib
import dataclasses
import inspect
import math
import numbers
import os
import pathlib
import platform
import time
from collections.abc import Callable, Sequence
from typing import Any

import gin
import keras
import numpy as np
import tensorflow as tf

import diffstride
from diffstride import diffstride_layers, plots, resnet
from diffstride.callbacks import StrideBudget, StrideLogger, UpdateSizes
from diffstride.examples import (
    checkpoints,
    data,
    devices,
    report,
    schedules,
    settings,
)
from diffstride.examples.checkpoints import Stop
from diffstride.validation import integer, one_of, require

_CHECK_STEPS = 100  # The loss is checked this rarely because it costs time.


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
) -> 'Training':
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

    Returns:
        A `Training`.

    Raises:
        ValueError: If a setting is wrong, has no effect, or differs from the
            one under which the training in the workdir began.
    """
    workdir = checked_workdir(workdir)
    for name, function in (
        ('load_data_fn', load_data_fn),
        ('model_cls', model_cls),
        ('optimizer_cls', optimizer_cls),
        ('loss_cls', loss_cls),
    ):
        rule = f'`{name}` must be a class or another callable'
        require(callable(function), rule, **{name: function})
    integer('num_epochs', num_epochs, least=1)
    if steps_per_epoch is not None:
        integer('steps_per_epoch', steps_per_epoch, least=1)
    require(
        _is_policy_of_floats(dtype_policy),
        "`dtype_policy` must be a policy of floats, such as 'mixed_bfloat16'",
        dtype_policy=dtype_policy,
    )
    one_of('jit_compile', jit_compile, (True, False, 'auto'))
    require(
        isinstance(callbacks, (list, tuple))
        and all(isinstance(x, keras.callbacks.Callback) for x in callbacks),
        '`callbacks` must be a list of Keras callbacks, such as '
        '[@callbacks.StrideBudget()]',
        callbacks=callbacks,
    )
    integer('seed', seed, least=0)
    one_of('deterministic', deterministic, (True, False))
    one_of('on_changed_settings', on_changed_settings, ('refuse', 'continue'))
    require(
        labels is None or isinstance(labels, dict),
        '`labels` must be a dict or None',
        labels=labels,
    )
    channels_first = devices.is_channels_first(data_format)
    distributed = devices.scope(distribution)
    keras.utils.clear_session()  # Names of layers are keys of the history.
    keras.utils.set_random_seed(seed)
    if deterministic:
        devices.make_deterministic()
    keras.config.set_dtype_policy(dtype_policy)
    datasets = _returned('load_data_fn', load_data_fn, data.Datasets, seed=seed)
    steps_per_epoch = steps_per_epoch or datasets.steps_per_epoch
    with distributed:
        with schedules.training_of(steps_per_epoch, num_epochs):
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
        strides = [x.strides for x in diffstride_layers(model)]
        if strides:
            _innermost(optimizer).exclude_from_weight_decay(strides)
        if jit_compile is True:  # XLA on TensorFlow needs static sizes.
            for layer in diffstride_layers(model):
                layer.make_sizes_static()
        model.compile(
            optimizer=optimizer,
            loss=loss,
            metrics=['accuracy'],
            jit_compile=jit_compile,
        )
    callbacks = [
        StrideLogger(datasets.image_shape, workdir / 'logs'),
        *callbacks,
    ]
    for callback in callbacks:
        if isinstance(callback, StrideLogger):
            callback.set_model(model)  # It checks the names of the layers.
        if isinstance(callback, StrideBudget):
            _check_budget(callback, num_epochs)
    settings.check_reach()
    training = Training(
        workdir=workdir,
        model=model,
        datasets=datasets,
        callbacks=callbacks,
        num_epochs=num_epochs,
        steps_per_epoch=steps_per_epoch,
        settings=settings.text(),
        seed=seed,
        labels=labels or {},
    )
    training.check_changes(on_changed_settings)
    return training


@dataclasses.dataclass
class Training:
    """A training that is prepared; see `train`."""

    workdir: pathlib.Path
    model: keras.Model
    datasets: data.Datasets
    callbacks: list[keras.callbacks.Callback]
    num_epochs: int
    steps_per_epoch: int
    settings: str
    seed: int
    labels: dict
    changes: Sequence[str] = ()

    def check_changes(self, on_changed_settings: str) -> None:
        """Compares the settings with those of the training in the workdir."""
        folders = checkpoints.epoch_folders(self.workdir)
        before = folders and checkpoints.read(folders[0] / 'state.json')
        if not before:
            return
        self.changes, can_continue = settings.changes(
            before['settings'], self.settings
        )
        known = checkpoints.read(self.workdir / 'data.json') or {}
        for key in ('class_names', 'image_shape'):
            value = list(getattr(self.datasets, key))
            if known.get(key, value) != value:
                self.changes.append(f'{key} were {known[key]} and are {value}')
                can_continue = False
        if self.changes and (
            not can_continue or on_changed_settings == 'refuse'
        ):
            advice = "train.on_changed_settings = 'continue' to go on, or "
            raise ValueError(
                f'The training in {self.workdir} began under other settings: '
                f'{"; ".join(self.changes)}. Set '
                f'{advice if can_continue else ""}train.workdir to another '
                'folder'
            )

    def run(self) -> dict:
        """Trains, or goes on where a run of the same workdir ended.

        Returns:
            The content of results.json.

        Raises:
            checkpoints.Stop: If another process trains in the workdir, its
                checkpoints are of another model, a file cannot be written, or
                the loss is no longer finite.
        """
        with checkpoints.locked(self.workdir):
            state = self._restored()
            if len(state.history) < self.num_epochs and not state.ended:
                self._fit(state)
            results = self._results(state)
        self._tell(results)
        return results

    def _restored(self):
        optimizer = self.model.optimizer
        rate = float(optimizer.learning_rate)
        state = checkpoints.restore(
            self.model, self.workdir, self.steps_per_epoch
        )
        done = len(state.history)
        if done > self.num_epochs:
            raise Stop(
                f'{done} epochs are done in {self.workdir}, more than '
                f'train.num_epochs = {self.num_epochs}'
            )
        if self.changes:
            state.ended = False
            print('Changed: ' + '; '.join(self.changes), flush=True)
        if any('learning_rate was' in change for change in self.changes):
            with contextlib.suppress(TypeError):  # A schedule is in effect.
                optimizer.learning_rate = rate  # The checkpoint had another.
        return state

    def _fit(self, state):
        data, done = self.datasets, len(state.history)
        weights = data.class_weights
        checkpoints.write(self.workdir / 'config.gin', self.settings)
        names = ('class_names', 'image_shape', 'mean', 'scale')
        checkpoints.write(
            self.workdir / 'data.json', {x: getattr(data, x) for x in names}
        )
        (self.workdir / 'results.json').unlink(missing_ok=True)
        print(data.summary)
        print(self._plan())
        print(
            f'Epochs {done + 1} to {self.num_epochs} in {self.workdir}',
            flush=True,
        )
        swap = None
        if getattr(_innermost(self.model.optimizer), 'use_ema', False):
            swap = keras.callbacks.SwapEMAWeights()
        self.model.fit(
            data.train(done),
            epochs=self.num_epochs,
            initial_epoch=done,
            steps_per_epoch=self.steps_per_epoch,
            shuffle=False,
            validation_data=data.validation,
            class_weight=weights and dict(enumerate(weights)),
            callbacks=[
                # It comes first, so that its line does not list every stride.
                keras.callbacks.ProgbarLogger(),
                *([swap] if swap else []),
                *self.callbacks,
                _Recorder(
                    self.workdir, state, self.settings, self.callbacks, swap
                ),
                keras.callbacks.TensorBoard(
                    self.workdir / 'logs', write_graph=False
                ),
                UpdateSizes(),
            ],
        )

    def _plan(self):
        total = self.num_epochs * self.steps_per_epoch
        optimizer = self.model.optimizer
        done = int(optimizer.iterations)
        rates = {}
        for share in (i / 6 for i in range(7)):
            optimizer.iterations.assign(round(total * share))
            rates[self.num_epochs * share] = float(optimizer.learning_rate)
        optimizer.iterations.assign(done)
        if len(set(rates.values())) == 1:
            rates = {0: rates[0]}
        rates = ', '.join(f'{x:.3g} at epoch {k:.3g}' for k, x in rates.items())
        return (
            f'{self.steps_per_epoch:,} steps per epoch, {total:,} in '
            f'{self.num_epochs} epochs; learning rate {rates}'
        )

    def _results(self, state):
        path = self.workdir / 'results.json'
        results = checkpoints.read(path)
        history = state.history
        if results and results.get('history') == history:
            return results
        model_path = checkpoints.result_file(self.workdir)
        steps = int(self.model.optimizer.iterations)
        checkpoints.load_weights(self.model, model_path)
        epoch = checkpoints.best_epoch(history) or len(history)
        logs = {}  # The logger writes strides, sizes and MACs to it.
        logger = StrideLogger(self.datasets.image_shape)
        logger.set_model(self.model)
        logger.on_epoch_end(epoch - 1, logs)
        test = self.model.evaluate(
            self.datasets.test, return_dict=True, verbose=0
        )
        results = {
            **self.labels,
            'test_accuracy': test['accuracy'],
            'test_loss': test['loss'],
            'validation_accuracy': history[epoch - 1].get('val_accuracy'),
            'epoch': epoch,
            'epochs': len(history),
            'steps': steps,
            'seconds': sum(row['seconds'] for row in history),
            'seed': self.seed,
            'macs': logs.get('macs'),
            'layers': {
                layer.name: {
                    'initial_strides': layer.get_config()['strides'],
                    'strides': layer.stride_values,
                    'sizes': [
                        size
                        for key, size in logs.items()
                        if key.startswith(f'size/{layer.name}/')
                    ],
                }
                for layer in diffstride_layers(self.model)
            },
            'versions': {
                'diffstride': diffstride.__version__,
                'keras': keras.__version__,
                'backend': keras.backend.backend(),
                'tensorflow': tf.__version__,
                'python': platform.python_version(),
            },
            'history': history,
        }
        checkpoints.write(path, results)
        self._plot_strides(results)
        return checkpoints.read(path)

    def _plot_strides(self, results):
        rows = results['history']
        columns = {
            key: [row[key] for row in rows]
            for key in rows[0]
            if key.startswith('stride/')
        }
        initial = {
            name: layer['initial_strides']
            for name, layer in results['layers'].items()
        }
        if initial:
            path = self.workdir / 'strides.png'
            checkpoints.write_figure(path, plots.strides, columns, initial)

    def _tell(self, results):
        line = (
            f'{results["epochs"]} epochs of {self.num_epochs} are done in '
            f'{self.workdir}. Test accuracy of epoch {results["epoch"]}: '
            f'{100 * results["test_accuracy"]:.2f}%'
        )
        if results['macs']:
            line += f', {results["macs"] / 1e6:.2f} MMAC'
        if results['layers']:
            line += f', strides {report.mean_strides([results])}'
        print(line, flush=True)


class _Recorder(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch.

    It comes after the callbacks whose values it keeps and restores.
    """

    def __init__(self, workdir, state, settings, callbacks, swap):
        super().__init__()
        self.workdir = workdir
        self.state = state
        self.settings = settings
        self.callbacks = callbacks
        self.swap = swap

    def on_train_begin(self, logs=None):
        for callback, (name, values) in zip(
            self.callbacks, self.state.callbacks
        ):
            if name == type(callback).__name__:  # Others may be set now.
                vars(callback).update(values)

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        if batch % _CHECK_STEPS == 0:
            self._check(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs)
        row = {key: float(value) for key, value in logs.items()}
        row = {
            'epoch': epoch + 1,
            'steps': self.params['steps'],
            **{k: v if math.isfinite(v) else None for k, v in row.items()},
            'seconds': time.monotonic() - self.start,
        }
        self.state.history.append(row)
        self.state.ended = self.model.stop_training
        self.state.settings = self.settings
        self.state.callbacks = [
            (type(x).__name__, _remembered(x)) for x in self.callbacks
        ]
        checkpoints.save(
            self.model,
            self.workdir,
            self.state,
            self._averaged() if self.swap else None,
        )

    def _check(self, logs):
        for key in ('loss', 'val_loss'):
            if key in logs and not math.isfinite(logs[key]):
                done = len(self.state.history)
                raise Stop(
                    f'The {key} of epoch {done + 1} is {float(logs[key])}. '
                    f'The {done} epochs before are kept in {self.workdir}: '
                    'lower the learning rate'
                )

    @contextlib.contextmanager
    def _averaged(self):
        variables = self.model.trainable_variables
        variables = [*variables, *self.model.optimizer.variables]
        values = [keras.ops.convert_to_numpy(x) for x in variables]
        self.swap.on_test_begin()
        yield
        self.swap.on_test_end()
        for variable, value in zip(variables, values):
            variable.assign(value)  # Swapping twice rounds it.


def _remembered(callback):
    """Returns the numbers that a callback keeps beside its arguments."""
    arguments = inspect.signature(type(callback)).parameters
    return {
        key: value
        for key, value in vars(callback).items()
        if isinstance(value, numbers.Number)
        and not key.startswith('_')
        and key not in arguments
    }


def _innermost(optimizer):
    """Returns the optimizer within any LossScaleOptimizer."""
    while hasattr(optimizer, 'inner_optimizer'):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _returned(name, function, kind, **kwargs):
    """Returns what an argument of `train` makes, which must be of a kind."""
    made = resnet.configured(function)(**kwargs)
    if not isinstance(made, kind):
        raise ValueError(
            f'`{name}` must return an instance of {kind.__name__}. '
            f'Received: {made!r}'
        )
    return made


def checked_workdir(workdir: Any) -> pathlib.Path:
    """Returns the path of a folder if it can be made and written."""
    is_path = isinstance(workdir, (str, os.PathLike))
    if not is_path or workdir == '' or '\0' in str(workdir):
        raise ValueError(
            '`workdir` must be a folder, set as in '
            '--gin_bindings="train.workdir = \'/tmp/run\'". '
            f'Received: {workdir!r}'
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


def _check_budget(callback, num_epochs):
    """Checks before training what the callback checks when it begins."""
    callback.on_train_begin()
    is_share = isinstance(callback.learn, float)
    learned = callback.learn * num_epochs if is_share else callback.learn
    require(
        math.ceil(learned) < num_epochs,
        '`learn` must leave an epoch for weights with strides that are held, '
        f'of {num_epochs} epochs in all',
        learn=callback.learn,
    )


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
