"""A training that is prepared: it runs, goes on and reports its results."""

import collections
import contextlib
import dataclasses
import inspect
import math
import numbers
import pathlib
import platform
import time
from collections.abc import Sequence

import keras
import tensorflow as tf

import diffstride
from diffstride import diffstride_layers, plots
from diffstride.callbacks import StrideLogger, UpdateSizes
from diffstride.examples import checkpoints, data, report, settings
from diffstride.examples.checkpoints import Stop

_CHECK_STEPS = 100  # The loss is checked this rarely because it costs time.


@dataclasses.dataclass
class Training:
    """A training that is prepared; see `train.train`."""

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
        """Trains, or goes on where a run ended; returns what results.json has.

        Raises:
            checkpoints.Stop: If another process trains in the workdir, its
                checkpoints are of another model, a file cannot be written, or
                the loss is no longer finite.
        """
        with checkpoints.locked(self.workdir):
            state = self._restored()
            if len(state.history) < self.num_epochs and not state.ended:
                with checkpoints.room_on_disk(self.workdir):
                    self._fit(state)
            results = self._results(state)
        text = (
            f'{results["epochs"]} epochs of {self.num_epochs} are done in '
            f'{self.workdir}. Test accuracy of epoch {results["epoch"]}: '
            f'{100 * results["test_accuracy"]:.2f}%'
        )
        if results['macs']:
            text += f', {results["macs"] / 1e6:.2f} MMAC'
        if results['layers']:
            text += f', strides {report.mean_strides([results])}'
        print(text, flush=True)
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
        datasets, done = self.datasets, len(state.history)
        checkpoints.write(self.workdir / 'config.gin', self.settings)
        names = ('class_names', 'image_shape', 'mean', 'scale')
        checkpoints.write(
            self.workdir / 'data.json', {x: getattr(datasets, x) for x in names}
        )
        (self.workdir / 'results.json').unlink(missing_ok=True)
        print(
            f'{datasets.summary}\n{self._plan()}\n'
            f'Epochs {done + 1} to {self.num_epochs} in {self.workdir}',
            flush=True,
        )
        averages = []
        if getattr(innermost(self.model.optimizer), 'use_ema', False):
            averages.append(keras.callbacks.SwapEMAWeights())
        weights = datasets.class_weights
        self.model.fit(
            datasets.train(done),
            epochs=self.num_epochs,
            initial_epoch=done,
            steps_per_epoch=self.steps_per_epoch,
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

    def _plan(self):
        optimizer = self.model.optimizer
        total = self.num_epochs * self.steps_per_epoch
        done, rates = int(optimizer.iterations), {}
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
        if results and results.get('history') == state.history:
            return results
        steps = int(self.model.optimizer.iterations)
        checkpoints.load_weights(
            self.model, checkpoints.result_file(self.workdir)
        )
        test = self.model.evaluate(
            self.datasets.test, return_dict=True, verbose=0
        )
        checkpoints.write(
            path, {**self.labels, **self._facts(state.history, steps, test)}
        )
        results = checkpoints.read(path)
        if results['layers']:
            strides = {
                key: [row[key] for row in state.history]
                for key in state.history[0]
                if key.startswith('stride/')
            }
            initial = {
                name: layer['initial_strides']
                for name, layer in results['layers'].items()
            }
            path = self.workdir / 'strides.png'
            checkpoints.write_figure(path, plots.strides, strides, initial)
        return results

    def _facts(self, history, steps, test):
        """Returns what is to be known of the model that is the result."""
        epoch = checkpoints.best_epoch(history) or len(history)
        logs = {}  # The logger writes sizes and MACs to it.
        logger = StrideLogger(self.datasets.image_shape)
        logger.set_model(self.model)
        logger.on_epoch_end(epoch - 1, logs)
        return {
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
        self.state.history.append(
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
        self.state.ended = self.model.stop_training
        self.state.settings = self.training.settings
        self.state.callbacks = [
            (type(x).__name__, _remembered(x)) for x in self.training.callbacks
        ]
        checkpoints.save(
            self.model,
            self.training.workdir,
            self.state,
            self._averaged() if self.averages else None,
        )

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


def innermost(
    optimizer: keras.optimizers.Optimizer,
) -> keras.optimizers.Optimizer:
    """Returns the optimizer within any LossScaleOptimizer."""
    while hasattr(optimizer, 'inner_optimizer'):
        optimizer = optimizer.inner_optimizer
    return optimizer
