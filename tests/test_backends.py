"""Models that one backend saved on the others; training on devices of JAX."""

import functools
import importlib.util
import os
import pathlib
import socket
import subprocess

import keras
import numpy as np
import pytest
from backends import (
    BACKEND,
    EAGER,
    array,
    environment,
    error_of,
    image,
    only,
    output_of,
    random,
    sequential,
    start,
)
from keras import layers

from diffstride import DiffStride, diffstride_layers, resnet

NAMES = ('tensorflow', 'jax', 'torch')
INSTALLED = [name for name in NAMES if importlib.util.find_spec(name)]


def images():
    return image((12, 16), channels=3)


def save(folder):
    """Saves a trained model, its outputs and its strides, of this backend."""
    keras.utils.set_random_seed(0)
    pooling_cls = functools.partial(DiffStride, smoothness_factor=1)
    kwargs = {'num_layers': 1, 'pooling_cls': pooling_cls}
    model = resnet.Resnet([2, 4, 4], '2, 1.5, 2', 2, **kwargs)
    model.build((None, 12, 16, 3))
    pools = diffstride_layers(model)
    pools[0].make_sizes_static()
    pools[1].hold()
    sgd = keras.optimizers.SGD(0.1, momentum=0.9)
    model.compile(sgd, 'mse', run_eagerly=True)
    model.fit(images(), np.eye(2), verbose=0)
    values = [layer.stride_values for layer in pools]
    assert values[1] == (1.5, 1.5) and 2.0 not in values[0] + values[2]
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / f'{BACKEND}.keras')
    outputs = array(model(images(), training=False))
    np.savez(folder / f'{BACKEND}.npz', outputs=outputs, strides=values)


def check(folder, backend):
    """Checks that a model of another backend is the same model on this one."""
    # Keras saves an optimizer of PyTorch that no other backend can load.
    has_optimizer = BACKEND == backend or backend != 'torch'
    path = folder / f'{backend}.keras'
    model = keras.models.load_model(path, compile=has_optimizer)
    with np.load(folder / f'{backend}.npz') as saved:
        expected = dict(saved)
    pools = diffstride_layers(model)
    strides = [layer.stride_values for layer in pools]
    np.testing.assert_array_equal(strides, expected['strides'])
    states = [(x.state.has_static_sizes, x.held) for x in pools]
    assert states == [(True, False), (True, True), (False, False)]
    outputs = model(images(), training=False)
    assert error_of(outputs, expected['outputs']) <= 2e-5
    if not has_optimizer:
        return
    # It goes on from the optimizer's state.
    assert int(model.optimizer.iterations) == 1
    model.fit(images(), np.eye(2), verbose=0)
    assert int(model.optimizer.iterations) == 2


CODE = """
import pathlib, sys, test_backends
folder = pathlib.Path(sys.argv[1])
test_backends.check(folder, sys.argv[2])
test_backends.save(folder)
"""


def test_single_batches_are_trained_on_tested_and_predicted():
    """On JAX variables have no values while these functions are traced."""
    head = layers.GlobalAveragePooling2D(), layers.Dense(2)
    model = sequential((12, 16, 3), DiffStride(2.0, ramp='inside'), *head)
    model.compile('sgd', 'mse', run_eagerly=EAGER)
    x, y = images(), np.eye(2)
    before = model.predict_on_batch(x)
    expected = np.mean((before - y) ** 2)
    assert float(model.test_on_batch(x, y)) == pytest.approx(expected)
    assert float(model.train_on_batch(x, y)) == pytest.approx(expected)
    after = model.predict_on_batch(x)
    assert not np.array_equal(before, after)
    np.testing.assert_allclose(after, model.predict(x, verbose=0), atol=1e-6)


def test_saved_models_are_the_same_on_every_backend(tmp_path):
    """The backends are those installed here, and those that saved before.

    DIFFSTRIDE_SAVED_MODELS names a folder in which environments of other
    backends leave theirs.
    """
    shared = os.environ.get('DIFFSTRIDE_SAVED_MODELS')
    folder = pathlib.Path(shared) if shared else tmp_path
    save(folder)
    for other in [x for x in INSTALLED if x != BACKEND]:
        env = environment(KERAS_BACKEND=other)
        output_of('-c', CODE, folder, BACKEND, env=env)
    found = sorted(path.stem for path in folder.glob('*.npz'))
    assert set(INSTALLED) <= set(found)
    for backend in found:
        check(folder, backend)


def train_share(count, process):
    """Prints the weights after two steps with a process's share of batches."""
    keras.utils.set_random_seed(0)
    conv, norm = layers.Conv2D(2, 3), layers.BatchNormalization()
    head = layers.GlobalAveragePooling2D(), layers.Dense(2)
    model = sequential((8, 8, 1), conv, norm, DiffStride(2.0, 1.0), *head)
    model.compile(keras.optimizers.SGD(0.1), 'mse')
    share = slice(process * 8 // count, (process + 1) * 8 // count)
    x = random(2, 8, 8, 8, 1)[:, share].reshape(-1, 8, 8, 1)
    y = np.tile(np.eye(2, dtype='float32')[np.arange(8) % 2][share], (2, 1))
    model.fit(x, y, batch_size=8 // count, shuffle=False, verbose=0)
    print(*np.concatenate([np.ravel(w) for w in model.get_weights()]))


DISTRIBUTED = """
import sys, jax
from keras import distribution
count, process, address = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if count > 1:
    jax.config.update('jax_cpu_collectives_implementation', 'gloo')
    distribution.initialize(','.join([address] * count), count, process)
from test_backends import train_share
if count == 1:
    train_share(count, process)
distribution.set_distribution(
    distribution.DataParallel(auto_shard_dataset=False))
train_share(count, process)
"""


def trained(count, address=''):
    """Returns the weights after two steps, as each training printed them.

    One process trains on one device, then on two; two have a device each.
    """
    devices = 3 - count
    flags = f'--xla_force_host_platform_device_count={devices}'
    command = '-W', 'ignore', '-c', DISTRIBUTED, str(count)
    kwargs = {'env': environment(XLA_FLAGS=flags), 'stdout': subprocess.PIPE}
    numbers = map(str, range(count))
    processes = [start(*command, i, address, **kwargs) for i in numbers]
    texts = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * count
    # Gloo prints something first.
    lines = [line for text in texts for line in text.splitlines()[-devices:]]
    assert len(lines) == 2
    return [np.array(line.split(), 'float64') for line in lines]


@only('jax', 'Keras distributes by it')
def test_two_devices_and_two_processes_train_as_one():
    """Two steps on the same global batches, by Keras's DataParallel."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{free.getsockname()[1]}'
    one, by_devices = trained(1)
    by_processes = trained(2, address)
    for weights in (by_devices, *by_processes):
        np.testing.assert_allclose(weights, one, rtol=1e-4, atol=1e-6)
