"""The training of a classifier: it is prepared, and then it runs."""

import collections
import contextlib
import dataclasses
import inspect
import math
import numbers
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal

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
    rules,
    schedules,
    settings,
)
from diffstride.examples.checkpoints import Stop
from diffstride.validation import require

_CHECK_STEPS = 100  # The loss is checked this rarely because it costs time.


def _are_callbacks(values):
    return isinstance(values, (list, tuple)) and all(
        isinstance(value, keras.callbacks.Callback) for value in values
    )


Policy = Literal[
    'float32',
    'float64',
    'bfloat16',
    'float16',
    'mixed_bfloat16',
    'mixed_float16',
]
Callbacks = Annotated[
    Sequence[keras.callbacks.Callback],
    rules.Rule(
        'a list of Keras callbacks, such as [@callbacks.StrideBudget()]',
        _are_callbacks,
    ),
]
Labels = Annotated[dict, rules.Rule('a dict', lambda x: isinstance(x, dict))]


@gin.configurable(module='train')
def train(
    workdir: str | os.PathLike | None = None,
    load_data_fn: rules.Factory = data.load_datasets,
    model_cls: rules.Factory = resnet.resnet18,
    optimizer_cls: rules.Factory = keras.optimizers.SGD,
    loss_cls: rules.Factory = keras.losses.CategoricalCrossentropy,
    num_epochs: rules.Count = 400,
    data_format: Literal['auto', 'channels_first', 'channels_last'] = 'auto',
    dtype_policy: Policy = 'float32',
    jit_compile: bool | Literal['auto'] = 'auto',
    distribution: str = 'auto',
    callbacks: Callbacks = (),
    strides_from: rules.Path | None = None,
    seed: rules.Seed = 0,
    deterministic: bool = False,
    on_changed_settings: Literal['refuse', 'continue'] = 'refuse',
    labels: Labels | None = None,
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
        data_format: 'channels_first', 'channels_last' or 'auto': channels_first
            on a GPU and channels_last on a CPU, whose convolutions need it.
        dtype_policy: A dtype policy of Keras, such as 'mixed_bfloat16'.
        jit_compile: See `keras.Model.compile`.
        distribution: 'none'; 'mirrored' (TensorFlow) or 'data_parallel' (JAX)
            over all devices of the kind that computes; 'auto' for the one that
            the backend has if there are several GPUs.
        callbacks: Keras callbacks. A resumption restores the numbers that they
            remember, such as the best loss of EarlyStopping, but no arrays.
        strides_from: The workdir of a finished training of the same network.
            The strides that it learned are held from the first step on, so the
            weights never see other sizes.
        seed: Seed of the initialization, the order of the data, and
            augmentation.
        deterministic: Whether two runs of one seed on one machine, interrupted
            or not, must give equal numbers, at the cost of speed.
        on_changed_settings: 'refuse' to continue a training under other
            settings, or 'continue' to do so, but for another network, other
            strides, another optimizer, or averages of weights that begin or
            end. More epochs are always allowed.
        labels: Words that name the run in a report, such as
            {'variant': 'DiffStride'}.

    Raises:
        ValueError: If a setting is wrong, has no effect, or differs from the
            one under which the training in the workdir began.
    """
    rules.check(train, locals())
    workdir = checked_workdir(workdir)
    channels_first = devices.is_channels_first(data_format)
    scope = devices.scope(distribution)
    keras.utils.clear_session()  # Names of layers are keys of the history.
    keras.utils.set_random_seed(seed)
    if deterministic:
        devices.make_deterministic()
    keras.config.set_dtype_policy(dtype_policy)
    datasets = _returned('load_data_fn', load_data_fn, data.Datasets, seed=seed)
    steps = datasets.steps_per_epoch
    with scope, schedules.training_of(steps, num_epochs):
        optimizer = _returned(
            'optimizer_cls', optimizer_cls, keras.optimizers.Optimizer
        )
        loss = _returned('loss_cls', loss_cls, keras.losses.Loss)
        model = _returned(
            'model_cls',
            model_cls,
            keras.Model,
            num_output_classes=len(datasets.class_names),
            channels_first=channels_first,
        )
        model.build((None, *datasets.image_shape))
        _check_outputs(model, loss, datasets)
        layers = diffstride_layers(model)
        if layers:
            strides = [layer.strides for layer in layers]
            _innermost(optimizer).exclude_from_weight_decay(strides)
        if jit_compile is True:  # XLA on TensorFlow needs static sizes.
            for layer in layers:
                layer.make_sizes_static()
        if strides_from is not None:
            _hold_strides_of(strides_from, layers)
        model.compile(
            optimizer, loss, metrics=['accuracy'], jit_compile=jit_compile
        )
    training = Training(
        workdir=workdir,
        model=model,
        datasets=datasets,
        callbacks=_prepared(callbacks, model, datasets, workdir, num_epochs),
        num_epochs=num_epochs,
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


def _check_outputs(model, loss, datasets):
    num_classes = len(datasets.class_names)
    images = np.zeros((2, *datasets.image_shape), 'float32')
    outputs = keras.ops.convert_to_numpy(model(images, training=False))
    require(
        outputs.shape == (2, num_classes),
        f'`model_cls` must put out {num_classes} classes',
        shape=outputs.shape,
    )
    wants_probabilities = loss.get_config().get('from_logits') is False
    if wants_probabilities and not np.allclose(outputs.sum(1), 1, atol=1e-2):
        raise ValueError(
            'The loss expects probabilities, the model puts out logits: set '
            "resnet.Resnet.output_activation = 'softmax', or from_logits of "
            'the loss'
        )
    labels = np.eye(num_classes, dtype='float32')[[0, 0]]
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


def _hold_strides_of(workdir, layers):
    """Holds layers at the strides that they have in a finished training."""
    path = pathlib.Path(workdir).expanduser() / 'results.json'
    learned = (checkpoints.read(path) or {}).get('layers', {})
    require(
        layers and len(learned) == len(layers),
        '`strides_from` must be the workdir of a finished training with as '
        f'many DiffStride layers as this one, {len(layers)}',
        strides_from=str(workdir),
    )
    # Their order counts, since the names of layers may differ.
    for layer, values in zip(layers, learned.values()):
        layer.strides = values['strides']
        layer.hold()


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


def _innermost(optimizer):
    """Returns the optimizer within any LossScaleOptimizer."""
    while hasattr(optimizer, 'inner_optimizer'):
        optimizer = optimizer.inner_optimizer
    return optimizer


@dataclasses.dataclass
class Training:
    """A training that is prepared; see `train`."""

    workdir: pathlib.Path
    model: keras.Model
    datasets: data.Datasets
    callbacks: list[keras.callbacks.Callback]
    num_epochs: int
    settings: str
    seed: int
    labels: dict
    changes: list[str] = dataclasses.field(default_factory=list)

    def check_changes(self, on_changed_settings: str) -> None:
        """Compares the settings with those of the training in the workdir."""
        folders = checkpoints.epoch_folders(self.workdir)
        states = [checkpoints.read(x / 'state.json') for x in folders]
        before = next(filter(None, states), None)
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

    def run(self) -> None:
        """Trains, or goes on where a run ended, and writes the results.

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
        text = (
            f'{results["epochs"]} epochs of {self.num_epochs} are done in '
            f'{self.workdir}. Test accuracy of epoch {results["epoch"]}: '
            f'{results["test_accuracy"]:.2%}'
        )
        if results['macs']:
            text += f', {results["macs"] / 1e6:.2f} MMAC'
        if results['layers']:
            text += f', strides {report.mean_strides([results])}'
        print(text, flush=True)

    def _restored(self):
        optimizer = self.model.optimizer
        rate = float(optimizer.learning_rate)
        state = checkpoints.restore(
            self.model, self.workdir, self.datasets.steps_per_epoch
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
        datasets, done = self.datasets, len(state.history)
        checkpoints.write(self.workdir / 'config.gin', self.settings)
        names = ('class_names', 'image_shape', 'mean', 'scale')
        checkpoints.write(
            self.workdir / 'data.json', {x: getattr(datasets, x) for x in names}
        )
        (self.workdir / 'results.json').unlink(missing_ok=True)
        print(
            f'{datasets.summary}\n'
            f'Epochs {done + 1} to {self.num_epochs}, of '
            f'{datasets.steps_per_epoch:,} steps, in {self.workdir}',
            flush=True,
        )
        averages = []
        if getattr(_innermost(self.model.optimizer), 'use_ema', False):
            averages.append(keras.callbacks.SwapEMAWeights())
        weights = datasets.class_weights
        self.model.fit(
            datasets.train(done),
            epochs=self.num_epochs,
            initial_epoch=done,
            steps_per_epoch=datasets.steps_per_epoch,
            shuffle=False,
            validation_data=datasets.validation,
            class_weight=weights and dict(enumerate(weights)),
            callbacks=[
                # It comes first, so that its line does not list every stride.
                keras.callbacks.ProgbarLogger(),
                *averages,
                *self.callbacks,
                _Recorder(self, state, *averages),
                keras.callbacks.TensorBoard(
                    self.workdir / 'logs', write_graph=False
                ),
                UpdateSizes(),
            ],
        )

    def _results(self, state):
        """Returns the content of results.json, which it writes if need be."""
        path, history = self.workdir / 'results.json', state.history
        results = checkpoints.read(path)
        if results and results.get('history') == history:
            return results
        steps = int(self.model.optimizer.iterations)
        checkpoints.load_weights(
            self.model, checkpoints.result_file(self.workdir)
        )
        test = self.model.evaluate(
            self.datasets.test, return_dict=True, verbose=0
        )
        epoch = checkpoints.best_epoch(history) or len(history)
        logs = {}  # The logger writes sizes and MACs to it.
        logger = StrideLogger(self.datasets.image_shape)
        logger.set_model(self.model)
        logger.on_epoch_end(epoch - 1, logs)
        layers = {
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
        }
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
            'layers': layers,
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
        if layers:
            strides = {
                key: [row[key] for row in history]
                for key in history[0]
                if key.startswith('stride/')
            }
            initial = {k: x['initial_strides'] for k, x in layers.items()}
            path = self.workdir / 'strides.png'
            checkpoints.write_figure(path, plots.strides(strides, initial))
        return results


class _Recorder(keras.callbacks.Callback):
    """Writes a checkpoint after each epoch.

    It comes after the callbacks whose values it keeps and restores. `averages`
    is the SwapEMAWeights if weights are averaged.
    """

    def __init__(self, training, state, averages=None):
        super().__init__()
        self.training = training
        self.state = state
        self.averages = averages

    def on_train_begin(self, logs=None):
        kept = collections.defaultdict(list)
        for name, values in self.state.callbacks:
            kept[name].append(values)
        for callback in self.training.callbacks:  # Others may be set now.
            if kept[type(callback).__name__]:
                values = kept[type(callback).__name__].pop(0)
                vars(callback).update(values)

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()

    def on_train_batch_end(self, batch, logs=None):
        if batch % _CHECK_STEPS == 0:
            self._check(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs)
        state, training = self.state, self.training
        state.history.append(
            {
                'epoch': epoch + 1,
                'steps': self.params['steps'],
                **{
                    k: float(v) if math.isfinite(v) else None
                    for k, v in logs.items()
                },
                'seconds': time.monotonic() - self.start,
            }
        )
        state.ended = self.model.stop_training
        state.settings = training.settings
        state.callbacks = [
            (type(x).__name__, _remembered(x)) for x in training.callbacks
        ]
        averaged = self._averaged() if self.averages else None
        checkpoints.save(self.model, training.workdir, state, averaged)

    def _check(self, logs):
        for key in ('loss', 'val_loss'):
            if key in logs and not math.isfinite(logs[key]):
                done = len(self.state.history)
                raise Stop(
                    f'The {key} of epoch {done + 1} is {float(logs[key])}. The '
                    f'{done} epochs before are kept in {self.training.workdir}:'
                    ' lower the learning rate'
                )

    @contextlib.contextmanager
    def _averaged(self):
        variables = self.model.trainable_variables
        variables = [*variables, *self.model.optimizer.variables]
        values = [keras.ops.convert_to_numpy(x) for x in variables]
        self.averages.on_test_begin()
        yield
        self.averages.on_test_end()
        for variable, value in zip(variables, values):
            variable.assign(value)  # Swapping twice rounds it.


def _remembered(callback: keras.callbacks.Callback) -> dict[str, Any]:
    """Returns the numbers that a callback keeps beside its arguments."""
    arguments = inspect.signature(type(callback)).parameters
    return {
        key: value
        for key, value in vars(callback).items()
        if isinstance(value, numbers.Number)
        and not key.startswith('_')
        and key not in arguments
    }
