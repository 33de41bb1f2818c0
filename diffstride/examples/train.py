"""Training of an image classifier, set by gin and resumed after a kill."""

import contextlib
import functools
import json
import os
import pathlib
import platform
import time

import gin
import keras
import numpy as np
import tensorflow as tf
from absl import logging

import diffstride
from diffstride import plots, pooling, resnet
from diffstride.callbacks import RepinStrides, StrideLogger
from diffstride.examples import checkpoints, data


class SetupError(Exception):
    """What stops a training before it starts, in one line."""


@gin.configurable(module='train')
def train(
    workdir=None,
    load_data_fn=data.load_datasets,
    model_cls=resnet.resnet18,
    optimizer_cls=keras.optimizers.SGD,
    loss_cls=keras.losses.CategoricalCrossentropy,
    num_epochs=400,
    steps_per_epoch=None,
    data_format='auto',
    dtype_policy='float32',
    jit_compile='auto',
    distribution='auto',
    callbacks=(),
    seed=0,
    deterministic=False,
):
    """Trains a classifier, or continues where a run of the same workdir ended.

    The workdir receives, after each epoch: last.keras, previous.keras (of the
    epoch before) and best.keras (by test accuracy), history.json, results.json,
    strides.png (with matplotlib), and for TensorBoard logs/; config.gin holds
    every parameter that was in effect.

    What callbacks remember is not restored, but for what they keep in the
    model, as SettleStrides does.

    Args:
        workdir: Folder of all outputs, made if there is none.
        load_data_fn: Called with `seed`, returns `data.Datasets`.
        model_cls: Called with `num_output_classes` and `channels_first`; makes
            a Keras model of [batch, height, width, channels] images that puts
            out what `loss_cls` expects.
        optimizer_cls: Returns the optimizer.
        loss_cls: Returns the loss, of one-hot labels.
        num_epochs: Epochs in all, those before a resumption counted in.
        steps_per_epoch: Steps of an epoch; None for the whole training set.
        data_format: 'channels_first', 'channels_last' or 'auto': channels_first
            on a GPU and channels_last on a CPU, whose convolutions need it.
        dtype_policy: Such as 'mixed_bfloat16'.
        jit_compile: As in `keras.Model.compile`. On TensorFlow layers whose
            sizes follow the strides cannot be compiled; True pins them, and
            their sizes then follow from epoch to epoch, as they do on JAX.
        distribution: 'none'; 'mirrored' (TensorFlow) or 'data_parallel' (JAX)
            over all devices of the kind that computes; 'auto' for the one that
            the backend has if there are several GPUs.
        callbacks: Keras callbacks, or functions that return them, called after
            those that log strides and before those that write files.
        seed: Of the initialization, the order of the data, and augmentation.
        deterministic: Whether two runs of one seed on one machine, interrupted
            or not, must give equal numbers, at the cost of speed.

    Returns:
        The content of results.json, a dict.

    Raises:
        SetupError: Before any training, if something is set wrong, or if
            another process is training in the workdir.
        checkpoints.WriteError: If a file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with setup_errors():
            workdir = checked_workdir(workdir)
            _check_arguments(
                num_epochs, steps_per_epoch, seed, jit_compile, deterministic
            )
            channels_first = _channels_first(data_format)
            distributed = _distributed(distribution)
            keras.utils.clear_session()  # Names of layers are keys of the logs.
            keras.utils.set_random_seed(seed)
            if deterministic:
                _make_deterministic()
            keras.config.set_dtype_policy(dtype_policy)
            datasets = resnet.configured(load_data_fn, 'load_data_fn')(
                seed=seed
            )
            with distributed:
                model = resnet.configured(model_cls, 'model_cls')(
                    num_output_classes=datasets.num_classes,
                    channels_first=channels_first,
                )
                model.build((None, *datasets.image_shape))
                loss = resnet.configured(loss_cls, 'loss_cls')()
                _check_outputs(model, loss, datasets)
                if jit_compile is True:
                    for layer in pooling.diffstride_layers(model):
                        layer.pin()
                optimizer = resnet.configured(optimizer_cls, 'optimizer_cls')()
                _exclude_strides_from_weight_decay(optimizer, model)
                model.compile(
                    optimizer=optimizer,
                    loss=loss,
                    metrics=['accuracy'],
                    jit_compile=jit_compile,
                )
            steps_per_epoch = steps_per_epoch or datasets.steps_per_epoch
            if not isinstance(callbacks, (list, tuple)):
                raise ValueError(
                    f'train.callbacks must be a list. Received: {callbacks!r}'
                )
            callbacks = [_made(callback) for callback in callbacks]
            _make(workdir)
            stack.enter_context(checkpoints.locked(workdir))
            history = checkpoints.restore(model, workdir, steps_per_epoch)
        if len(history) < num_epochs:
            checkpoints.write(
                workdir / 'config.gin', gin.operative_config_str()
            )
            print(
                f'Epochs {len(history) + 1} to {num_epochs} in {workdir}',
                flush=True,
            )
            model.fit(
                datasets.train(len(history)),
                epochs=num_epochs,
                initial_epoch=len(history),
                steps_per_epoch=steps_per_epoch,
                shuffle=False,
                validation_data=datasets.test,
                callbacks=[
                    # First, so that its line does not list every stride.
                    keras.callbacks.ProgbarLogger(),
                    StrideLogger(datasets.image_shape, workdir / 'logs'),
                    *callbacks,
                    _Recorder(workdir, history, seed),
                    keras.callbacks.TensorBoard(
                        workdir / 'logs', write_graph=False
                    ),
                    RepinStrides(),  # After what saves what was validated.
                ],
            )
    return json.loads((workdir / 'results.json').read_text())


@gin.configurable(module='train')
def compare(workdir=None, model_cls=resnet.resnet18):
    """Compares strided convolutions, fixed strides and learned strides.

    Args:
        workdir: Folder of one workdir for each of the three.
        model_cls: As in `train`; also called with `pooling_cls`.

    Returns:
        A dict from the name of the pooling to its results.
    """
    with setup_errors():
        workdir = checked_workdir(workdir)
    results = {}
    for pooling_cls in (
        None,
        pooling.FixedSpectralPooling,
        pooling.DiffStride,
    ):
        name = pooling_cls.__name__ if pooling_cls else 'StridedConvolution'
        print(f'\n{name}', flush=True)
        results[name] = train(
            workdir=workdir / name,
            model_cls=functools.partial(
                resnet.configured(model_cls), pooling_cls=pooling_cls
            ),
        )
    print(
        '\n| pooling | test accuracy | MMAC per image | seconds '
        '| learned strides |'
    )
    print('| --- ' * 5 + '|')
    for name, result in results.items():
        strides = ', '.join(
            '({})'.format(' '.join(f'{s:.2f}' for s in layer['strides']))
            for layer in result['layers'].values()
        )
        print(
            f'| {name} | {100 * result["test_accuracy"]:.1f}% '
            f'| {result["macs"] / 1e6:.2f} | {result["seconds"]:.0f} '
            f'| {strides or "-"} |'
        )
    for path in sorted(workdir.glob('*/strides.png')):
        print(f'\nStrides over the epochs: {path}')
    return results


class _Recorder(keras.callbacks.Callback):
    """Writes down each epoch."""

    def __init__(self, workdir, history, seed):
        super().__init__()
        self.workdir = workdir
        self.history = history
        self.seed = seed

    def on_epoch_begin(self, epoch, logs=None):
        self.start = time.monotonic()

    def on_epoch_end(self, epoch, logs=None):
        seconds = time.monotonic() - self.start
        self.history.append({'epoch': epoch + 1, **logs, 'seconds': seconds})
        checkpoints.save(
            self.model, self.workdir, self.history, self._results()
        )
        layers = pooling.diffstride_layers(self.model)
        initial = {x.name: x.get_config()['strides'] for x in layers}
        _plot_strides(initial, self.history, self.workdir / 'strides.png')

    def _results(self):
        last = self.history[-1]
        return {
            'test_accuracy': last['val_accuracy'],
            'best_test_accuracy': max(
                row['val_accuracy'] for row in self.history
            ),
            'epochs': len(self.history),
            'steps': int(self.model.optimizer.iterations),
            'seconds': sum(row['seconds'] for row in self.history),
            'seed': self.seed,
            'macs': last.get('macs'),
            'layers': {
                layer.name: {
                    'initial_strides': layer.get_config()['strides'],
                    'strides': layer.stride_values,
                    'sizes': [
                        value
                        for key, value in last.items()
                        if key.startswith(f'size/{layer.name}/')
                    ],
                }
                for layer in pooling.diffstride_layers(self.model)
            },
            'versions': {
                'diffstride': diffstride.__version__,
                'keras': keras.__version__,
                'backend': keras.backend.backend(),
                'tensorflow': tf.__version__,
                'python': platform.python_version(),
            },
        }


def _make_deterministic():
    tf.config.experimental.enable_op_determinism()
    if keras.backend.backend() == 'torch':
        import torch

        torch.use_deterministic_algorithms(True)


def _exclude_strides_from_weight_decay(optimizer, model):
    strides = [layer.strides for layer in pooling.diffstride_layers(model)]
    if strides:
        optimizer.exclude_from_weight_decay(
            strides,  # And what it excludes already:
            getattr(optimizer, '_exclude_from_weight_decay_names', None),
        )


def _made(callback):
    made = resnet.configured(callback)() if callable(callback) else callback
    if not isinstance(made, keras.callbacks.Callback):
        raise ValueError(
            'train.callbacks must be Keras callbacks, such as '
            f'[@callbacks.SettleStrides()]. Received: {made!r}'
        )
    return made


def _plot_strides(initial, history, path):
    keys = [key for key in history[0] if key.startswith('stride/')]
    if not keys:
        return
    columns = {key: [row[key] for row in history] for key in keys}
    try:
        figure = plots.strides(columns, initial)
    except ImportError:
        if len(history) == 1:
            logging.warning('No strides.png: pip install diffstride[plot]')
        return
    checkpoints.write_figure(path, figure)


def checked_workdir(workdir):
    """Returns the path of a folder that is or can be made and written."""
    if not workdir or not isinstance(workdir, (str, os.PathLike)):
        raise ValueError(
            'workdir must be a folder, set as in '
            '--gin_bindings="train.workdir = \'/tmp/run\'". '
            f'Received: {workdir!r}'
        )
    path = pathlib.Path(workdir).expanduser()
    existing = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(
            f'workdir must be a folder that can be written. Received: {workdir}'
        )
    return path


def _make(workdir):
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f'workdir must be a folder that can be made. Received: {workdir} '
            f'({error.strerror})'
        ) from error


def _check_arguments(
    num_epochs, steps_per_epoch, seed, jit_compile, deterministic
):
    for name, value, allowed in (
        ('jit_compile', jit_compile, (True, False, 'auto')),
        ('deterministic', deterministic, (True, False)),
    ):
        if value not in allowed:
            raise ValueError(
                f'train.{name} must be one of {allowed}. Received: {value!r}'
            )
    for name, value, least in (
        ('num_epochs', num_epochs, 1),
        ('steps_per_epoch', steps_per_epoch or 1, 1),
        ('seed', seed, 0),
    ):
        if not isinstance(value, int) or value < least:
            raise ValueError(
                f'train.{name} must be an integer of at least {least}. '
                f'Received: {value!r}'
            )


def _channels_first(data_format):
    if data_format == 'auto':
        # XLA chooses layouts itself.
        return keras.backend.backend() != 'jax' and bool(_gpus())
    if data_format not in ('channels_first', 'channels_last'):
        raise ValueError(
            "train.data_format must be 'channels_first', 'channels_last' or "
            f"'auto'. Received: {data_format!r}"
        )
    return data_format == 'channels_first'


def _gpus():
    """Names of the GPUs on which the backend computes."""
    if keras.backend.backend() == 'tensorflow':
        return [device.name for device in tf.config.list_logical_devices('GPU')]
    if keras.backend.backend() == 'jax':
        return [x for x in keras.distribution.list_devices() if 'cpu' not in x]
    import torch

    return list(range(torch.cuda.device_count()))


_DISTRIBUTIONS = {'tensorflow': 'mirrored', 'jax': 'data_parallel'}


def _distributed(distribution):
    """The scope in which the model is made, for one device or for several."""
    backend = keras.backend.backend()
    known = ('auto', 'none', *_DISTRIBUTIONS.values())
    if distribution not in known:
        raise ValueError(
            f'train.distribution must be one of {known}. '
            f'Received: {distribution!r}'
        )
    if distribution == 'auto':
        several = len(_gpus()) > 1 and backend in _DISTRIBUTIONS
        distribution = _DISTRIBUTIONS[backend] if several else 'none'
    if distribution == 'none':
        return contextlib.nullcontext()
    if distribution != _DISTRIBUTIONS.get(backend):
        raise ValueError(
            f"train.distribution must be 'auto', 'none' or, on {backend}, "
            f'{_DISTRIBUTIONS.get(backend)!r}. Received: {distribution!r}'
        )
    if backend == 'jax':
        # All of Keras's own devices; it shards each batch over them.
        return _globally(keras.distribution.DataParallel())
    names = _gpus() or [d.name for d in tf.config.list_logical_devices('CPU')]
    return tf.distribute.MirroredStrategy(names).scope()


@contextlib.contextmanager
def _globally(distribution):
    """Sets it for all that Keras makes and trains from now on."""
    keras.distribution.set_distribution(distribution)
    yield


def _check_outputs(model, loss, datasets):
    images = np.zeros((2, *datasets.image_shape), 'float32')
    outputs = keras.ops.convert_to_numpy(model(images, training=False))
    if outputs.shape != (2, datasets.num_classes):
        raise ValueError(
            f'train.model_cls must put out {datasets.num_classes} classes. '
            f'Received: outputs of shape {outputs.shape}'
        )
    wants_probabilities = loss.get_config().get('from_logits') is False
    if wants_probabilities and not np.allclose(outputs.sum(1), 1, atol=1e-2):
        raise ValueError(
            'The loss expects probabilities, the model puts out logits: set '
            "resnet.Resnet.output_activation = 'softmax', or from_logits of "
            'the loss'
        )


@contextlib.contextmanager
def setup_errors():
    """Turns whatever goes wrong before training into a SetupError."""
    try:
        yield
    except Exception as error:
        logging.debug('Set up', exc_info=True)  # With --verbosity=1.
        raise SetupError(checkpoints.first_line(error)) from error
