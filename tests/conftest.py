"""Settings of every test: fixed seeds, clean configuration, a small CPU."""

import gc
import os

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
os.environ.setdefault('JAX_DISABLE_MOST_OPTIMIZATIONS', 'true')

import gin
import keras
import pytest

# Warnings from within Keras and the backends, without consequence here.
HARMLESS_WARNINGS = [
    # keras.ops.convert_to_numpy gives it for tensors under NumPy 2.
    "ignore:__array__ implementation doesn't accept a copy:DeprecationWarning",
    # PyTorch gives it for a module of its own.
    'ignore:`torch.jit:DeprecationWarning',
    # float(x) gives it for a tensor of PyTorch that has a gradient.
    'ignore:Converting a tensor with requires_grad=True:UserWarning',
]

if keras.backend.backend() == 'tensorflow':
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(2)
    tf.config.threading.set_inter_op_parallelism_threads(2)

# Graphs are many small objects. To look through all for garbage again and
# again takes a sixth of the time of the tests.
gc.freeze()
gc.set_threshold(50_000, 20, 100)

# The training example needs TensorFlow, and so do the exports.
NEEDS_TENSORFLOW = (
    *('audio', 'benchmarks', 'checkpoints', 'command_line', 'commands'),
    *('convnet', 'data', 'docs', 'folders', 'freezing', 'gratings', 'grid'),
    *('long_runs', 'readme_commands', 'train'),
)
# JAX compiles anew for each shape, which takes minutes in these.
LONG_ON_JAX = (
    *('blurring', 'budget', 'plots', 'properties', 'replacing', 'resnet'),
    *('stability', 'unet'),
)
collect_ignore = []
if keras.backend.backend() != 'tensorflow':
    collect_ignore += [f'test_{name}.py' for name in NEEDS_TENSORFLOW]
if keras.backend.backend() == 'jax':
    collect_ignore += [f'test_{name}.py' for name in LONG_ON_JAX]


# Their tests begin first, so that no process ends long after the others.
LONG = ('benchmarks', 'callbacks', 'checkpoints', 'grid', 'readme', 'train')


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.split('_')[1] not in LONG)


def pytest_configure(config):
    for line in HARMLESS_WARNINGS:
        config.addinivalue_line('filterwarnings', line)


@pytest.fixture(autouse=True)
def fresh_state():
    keras.utils.set_random_seed(0)
    yield
    gin.clear_config()
    keras.config.set_image_data_format('channels_last')
    keras.config.set_floatx('float32')
    keras.config.set_dtype_policy('float32')


@pytest.fixture
def config(tmp_path):
    """A gin file of a small training."""
    from small_runs import SMALL

    path = tmp_path / 'small.gin'
    path.write_text(SMALL)
    return path


@pytest.fixture(scope='session')
def data_dir(tmp_path_factory):
    """A folder in which TFDS keeps the datasets of tests."""
    return tmp_path_factory.mktemp('tfds')


@pytest.fixture
def without_tracing(monkeypatch):
    """Lets models be fitted eagerly: a graph of a few steps takes longer."""
    fit = keras.Model.fit

    def fit_eagerly(model, *args, **kwargs):
        model.run_eagerly = True
        return fit(model, *args, **kwargs)

    monkeypatch.setattr(keras.Model, 'fit', fit_eagerly)


@pytest.fixture
def run(config, tmp_path, without_tracing):
    """Runs a small linear model; returns its workdir."""
    from small_runs import LINEAR, run_here

    def run(*bindings, name='run', model=(LINEAR,), epochs=None):
        workdir = tmp_path / name
        if epochs:
            bindings += (f'train.num_epochs = {epochs}',)
        run_here(*model, *bindings, workdir=workdir, gin_config=[config])
        return workdir

    return run
