"""Training of an image classifier, set by gin and resumed after a kill."""

import contextlib
import errno
import functools
import os
import pathlib
import platform
import re
import tempfile
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
            data.check_arguments(
                _RULES, 'train.', load_data_fn=load_data_fn,
                model_cls=model_cls, optimizer_cls=optimizer_cls,
                loss_cls=loss_cls, num_epochs=num_epochs,
                steps_per_epoch=steps_per_epoch, data_format=data_format,
                dtype_policy=dtype_policy, jit_compile=jit_compile,
                callbacks=callbacks, seed=seed, deterministic=deterministic,
            )  # fmt: skip
            channels_first = _channels_first(data_format)
            distributed = _distributed(distribution)
            keras.utils.clear_session()  # Names of layers are keys of the logs.
            keras.utils.set_random_seed(seed)
            if deterministic:
                _make_deterministic()
            keras.config.set_dtype_policy(dtype_policy)
            datasets = _returned(
                'load_data_fn', load_data_fn, data.Datasets, seed=seed
            )
            callbacks = [_made(callback) for callback in callbacks]
            with distributed:
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
                if jit_compile is True:
                    for layer in pooling.diffstride_layers(model):
                        layer.pin()
                _exclude_strides_from_weight_decay(optimizer, model)
                model.compile(
                    optimizer=optimizer,
                    loss=loss,
                    metrics=['accuracy'],
                    jit_compile=jit_compile,
                )
            stride_logger = StrideLogger(datasets.image_shape, workdir / 'logs')
            stride_logger.set_model(model)  # Which checks the model.
            steps_per_epoch = steps_per_epoch or datasets.steps_per_epoch
            _make(workdir)
            stack.enter_context(checkpoints.locked(workdir))
            history = checkpoints.restore(model, workdir, steps_per_epoch)
            _make(workdir / 'logs')
        results_path = workdir / 'results.json'
        if len(history) < num_epochs:
            checkpoints.write(
                workdir / 'config.gin', gin.operative_config_str()
            )
            print(
                f'Epochs {len(history) + 1} to {num_epochs} in {workdir}',
                flush=True,
            )
            with _errors_of_a_full_disk():
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
                        stride_logger,
                        *callbacks,
                        _Recorder(workdir, history, seed),
                        keras.callbacks.TensorBoard(
                            workdir / 'logs', write_graph=False
                        ),
                        RepinStrides(),  # After what saves what was validated.
                    ],
                )
        else:
            print(
                f'{len(history)} epochs of {num_epochs} are done in {workdir}',
                flush=True,
            )
            # A kill may have come before these.
            if not _are_of(checkpoints.read(results_path), history):
                checkpoints.write_results(
                    workdir, history, _results(model, history, seed)
                )
            _plot_strides(model, history, workdir / 'strides.png')
    return checkpoints.read(results_path)


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
        workdir = checked_workdir(workdir, 'compare.workdir')
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
        self.history.append(
            {
                'epoch': epoch + 1,
                'steps_per_epoch': self.params['steps'],
                **logs,
                'seconds': seconds,
            }
        )
        checkpoints.save(
            self.model,
            self.workdir,
            self.history,
            _results(self.model, self.history, self.seed),
        )
        _plot_strides(self.model, self.history, self.workdir / 'strides.png')


@contextlib.contextmanager
def _errors_of_a_full_disk():
    """Turns those of TensorBoard's files and of callbacks into a WriteError."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        path, reason = error.filename or 'A file', error.strerror
        raise checkpoints.WriteError(path, reason) from error
    except tf.errors.OpError as error:
        found = re.search(r'(\S*events\.out\.tfevents\S*); (.+)', error.message)
        if found is None:
            raise
        raise checkpoints.WriteError(*found.groups()) from error


def _are_of(results, history):
    """Whether these results are whole, and not of an epoch that was cut."""
    return isinstance(results, dict) and results.get('epochs') == len(history)


def _results(model, history, seed):
    last = history[-1]
    return {
        'test_accuracy': last['val_accuracy'],
        'best_test_accuracy': max(row['val_accuracy'] for row in history),
        'epochs': len(history),
        'steps': int(model.optimizer.iterations),
        'seconds': sum(row['seconds'] for row in history),
        'seed': seed,
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
            for layer in pooling.diffstride_layers(model)
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
    while hasattr(optimizer, 'inner_optimizer'):  # Of a LossScaleOptimizer.
        optimizer = optimizer.inner_optimizer
    if strides:
        optimizer.exclude_from_weight_decay(
            strides,  # And what it excludes already:
            getattr(optimizer, '_exclude_from_weight_decay_names', None),
        )


def _returned(name, function, kind, **kwargs):
    """What an argument of `train` returns, which must be of this kind."""
    made = resnet.configured(function)(**kwargs)
    if not isinstance(made, kind):
        raise ValueError(
            f'train.{name} must return an instance of {kind.__name__}. '
            f'Received: {made!r}'
        )
    return made


def _made(callback):
    made = resnet.configured(callback)() if callable(callback) else callback
    if not isinstance(made, keras.callbacks.Callback):
        raise ValueError(
            'train.callbacks must be Keras callbacks, such as '
            f'[@callbacks.SettleStrides()]. Received: {made!r}'
        )
    return made


def _plot_strides(model, history, path):
    layers = pooling.diffstride_layers(model)
    initial = {x.name: x.get_config()['strides'] for x in layers}
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


def checked_workdir(workdir, parameter='train.workdir'):
    """Returns the path of a folder that is or can be made and written."""
    is_path = isinstance(workdir, (str, os.PathLike))
    if not is_path or workdir == '' or '\0' in str(workdir):
        raise ValueError(
            'workdir must be a folder, set as in '
            f'--gin_bindings="{parameter} = \'/tmp/run\'". '
            f'Received: {workdir!r}'
        )
    with _refusals_of(workdir):
        path = pathlib.Path(workdir).expanduser()
        parents = (path, *path.absolute().parents)
        existing = next(p for p in parents if p.exists())
        if not existing.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f'{existing} is a file')
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return path


@contextlib.contextmanager
def _refusals_of(workdir):
    try:
        yield
    except (OSError, RuntimeError) as error:  # No home is a RuntimeError.
        raise ValueError(
            'workdir must be a folder that can be made and written. Received: '
            f'{str(workdir)!r} ({getattr(error, "strerror", error)})'
        ) from error


def _make(folder):
    with _refusals_of(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _is_policy_of_floats(name):
    try:
        policy = keras.dtype_policies.get(name)
    except (TypeError, ValueError):
        return False
    return keras.backend.is_float_dtype(policy.compute_dtype) and not getattr(
        policy, 'quantization_mode', None
    )


_FUNCTION = callable, 'a class or another callable'
_RULES = {
    'load_data_fn': _FUNCTION,
    'model_cls': _FUNCTION,
    'optimizer_cls': _FUNCTION,
    'loss_cls': _FUNCTION,
    'num_epochs': (lambda x: data.is_int(x, 1, 2**31), 'an integer >= 1'),
    'steps_per_epoch': (
        lambda x: x is None or data.is_int(x, 1, 2**31),
        'an integer >= 1 or None',
    ),
    'data_format': (
        lambda x: x in ('channels_first', 'channels_last', 'auto'),
        "'channels_first', 'channels_last' or 'auto'",
    ),
    'dtype_policy': (
        lambda x: x and _is_policy_of_floats(x),
        "the name of a policy of floats, such as 'mixed_bfloat16'",
    ),
    'jit_compile': (
        lambda x: isinstance(x, bool) or x == 'auto',
        "True, False or 'auto'",
    ),
    'callbacks': (lambda x: isinstance(x, (list, tuple)), 'a list'),
    'seed': (lambda x: data.is_int(x, 0, 2**32), 'an integer in [0, 2**32)'),
    'deterministic': (lambda x: isinstance(x, bool), 'True or False'),
}


def _channels_first(data_format):
    if data_format == 'auto':
        # XLA chooses layouts itself.
        return keras.backend.backend() != 'jax' and bool(_gpus())
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
    labels = np.eye(datasets.num_classes, dtype='float32')[[0, 0]]
    try:
        value = float(keras.ops.convert_to_numpy(loss(labels, outputs)))
    except Exception as error:
        raise ValueError(
            'train.loss_cls must return a loss of one-hot labels. Received: '
            f'{type(loss).__name__} ({checkpoints.first_line(error)})'
        ) from error
    if not np.isfinite(value):
        raise ValueError(
            'The loss must be finite before training. Received: '
            f'{type(loss).__name__} of {value}'
        )


@contextlib.contextmanager
def setup_errors():
    """Turns whatever goes wrong before training into a SetupError."""
    try:
        yield
    except Exception as error:
        logging.debug('Set up', exc_info=True)  # With --verbosity=1.
        raise SetupError(_with_origin(error)) from error


def _with_origin(error):
    """The first line of an error, and what gin says raised it."""
    line = checkpoints.first_line(error)
    origins = re.findall(r"In call to configurable '(\w+)'", str(error))
    return f'{line} (in {origins[0]})' if origins else line
