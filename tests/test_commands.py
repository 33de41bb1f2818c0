"""The commands after a training: evaluate, predict and export."""

import csv
import sys

import keras
import numpy as np
import onnxruntime
import pytest
from absl.testing import flagsaver
from backends import sequential
from PIL import Image
from runtimes import RUNTIMES, exports_to_onnx
from small_data import picture, write_pictures

from diffstride import DiffStride
from diffstride.examples import checkpoints, classifier
from diffstride.examples.evaluate import evaluate
from diffstride.examples.export import export
from diffstride.examples.predict import predict

NAMES = ('red', 'green', 'blue')
SHAPE = (12, 16, 3)
MEAN, SCALE = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
pytestmark = exports_to_onnx


def color_model(activation='softmax', mean=MEAN, scale=SCALE):
    """A network of standardized images whose logits are mean colors / 20."""
    model = sequential(
        SHAPE,
        DiffStride((2.0, 1.5), norm='forward'),
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(3, activation=activation, dtype='float32'),
    )
    weights = np.diag(np.broadcast_to(scale, 3)) / 20
    bias = np.broadcast_to(mean, 3) / 20
    model.layers[-1].set_weights([weights, bias])
    return model


def reference(pixels):
    """The probabilities that `color_model` should give, in float64."""
    logits = np.mean(pixels, (1, 2), np.float64) / 20
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def make_workdir(folder, model, mean=MEAN, scale=SCALE, settings=''):
    """Writes what a training leaves behind."""
    folder.mkdir()
    (folder / 'config.gin').write_text(settings)
    data = dict(class_names=NAMES, image_shape=SHAPE, mean=mean, scale=scale)
    checkpoints.write(folder / 'data.json', data)
    state = checkpoints.State(history=[{'epoch': 1, 'val_accuracy': 1.0}])
    checkpoints.save(model, folder, state)
    return folder


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    return make_workdir(tmp_path_factory.mktemp('after') / 'run', color_model())


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in a folder that stays empty: its output or its error."""
    here = tmp_path / 'here'
    here.mkdir()
    monkeypatch.chdir(here)

    def run(command, workdir, *arguments, fails=False):
        flags = [f'--workdir={workdir}'] if workdir else []
        arguments = ['command', *flags, *map(str, arguments)]
        monkeypatch.setattr(sys, 'argv', arguments)
        with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
            classifier.run_command(command)
        assert not list(here.iterdir())
        code = ended.value.code
        if not fails:
            assert not code
            return capsys.readouterr().out
        assert code.startswith('error: ') and '\n' not in code
        return code

    return run


PIXELS = np.stack([picture(i, i) for i in range(3)]).astype('float32')


@pytest.mark.parametrize('name', ['litert', 'tf_saved_model'])
def test_other_formats_contain_the_preprocessing(workdir, run, name):
    file = 'model.tflite' if name == 'litert' else 'saved_model'
    (workdir / 'export/saved_model').mkdir(parents=True, exist_ok=True)
    run(export, workdir, f'--format={name}')
    probabilities = RUNTIMES[name][1](str(workdir / 'export' / file))(PIXELS)
    np.testing.assert_allclose(probabilities, reference(PIXELS), atol=1e-5)


def test_bfloat16_is_exported_as_float32_with_class_names(tmp_path, run):
    keras.config.set_dtype_policy('mixed_bfloat16')
    model = color_model()
    keras.config.set_dtype_policy('float32')
    workdir = make_workdir(tmp_path / 'run', model)
    output = tmp_path / 'exported'
    text = run(export, workdir, f'--output={output}')
    files = sorted(path.name for path in output.iterdir())
    assert files == ['labels.txt', 'model.onnx']
    assert (output / 'labels.txt').read_text().split() == list(NAMES)
    path = str(output / 'model.onnx')
    assert f'Wrote {path}' in text and 'float32 [batch, 12, 16, 3]' in text
    (entry,) = onnxruntime.InferenceSession(path).get_inputs()
    assert entry.name == 'images'
    probabilities = RUNTIMES['onnx'][1](path)(PIXELS)
    np.testing.assert_allclose(probabilities, reference(PIXELS), atol=1e-5)


def test_predict_says_the_likely_classes_at_any_size(run, tmp_path):
    """The network puts out logits; the last picture is resized."""
    workdir = make_workdir(tmp_path / 'run', color_model(activation=None))
    output, paths, expected = tmp_path / 'out', [], []
    for channel, size in (1, (12, 16)), (0, (12, 16)), (1, (36, 32)):
        pixels = picture(channel, size=size)
        paths.append(str(tmp_path / f'{len(paths)}.png'))
        Image.fromarray(pixels).save(paths[-1])
        expected.append(reference(pixels[None])[0])
    text = run(predict, workdir, '--top=2', f'--output={output}', *paths)
    lines = [line for line in text.splitlines() if '.png' in line]
    assert len(lines) == len(paths)
    for line, path, row in zip(lines[:2], paths, expected):
        likely = [f'{NAMES[i]} {row[i]:.1%}' for i in np.argsort(-row)[:2]]
        assert line == f'{path}: {", ".join(likely)}'
    text = (output / 'predictions.csv').read_text()
    header, *rows = csv.reader(text.splitlines())
    assert header == ['file', *NAMES] and [row[0] for row in rows] == paths
    # Resizing keeps mean colors, to the rounding of pixels.
    found = np.float64([row[1:] for row in rows])
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_evaluate_on_a_folder_and_a_split(workdir, run, tmp_path):
    """Of 4 red, 3 green and 2 blue images, a blue one looks red."""
    data, out = tmp_path / 'data', tmp_path / 'out'
    for name, channels in zip(NAMES, ([0] * 4, [1] * 3, [2, 0])):
        write_pictures(data / 'unseen' / name, channels)
        write_pictures(data / 'train' / name, [NAMES.index(name)])
    first = run(evaluate, workdir, f'--folder={data}/unseen', f'--output={out}')
    settings = f"""
import diffstride.examples.data
data.load_datasets:
  name = '{data}'
  test_split = 'train'
  batch_size = 2
  normalization = None
"""
    model = color_model(mean=0, scale=1)
    workdir = make_workdir(tmp_path / 'run', model, 0, 1, settings)
    second = run(evaluate, workdir, '--split=unseen')
    for text, output in (first, out), (second, workdir / 'evaluation'):
        assert '9 images, accuracy 88.9%' in text
        assert '| blue | 2 | 50.0% | 100.0% | red |' in text
        assert '| red | 4 | 100.0% | 80.0% | - |' in text
        confusion = (output / 'confusion.csv').read_text().split()
        rows = ['red,4,0,0', 'green,0,3,0', 'blue,1,0,1']
        assert confusion == ['class,red,green,blue', *rows]
        classes = (output / 'classes.csv').read_text().split()
        rows = ['red,4,1.0,0.8', 'green,3,1.0,1.0', 'blue,2,0.5,1.0']
        assert classes == ['class,images,recall,precision', *rows]
        assert f'Wrote {output / "confusion.png"}' in text
        with Image.open(output / 'confusion.png') as image:
            assert image.format == 'PNG'
    assert '3 images, accuracy 100.0%' in run(evaluate, workdir)


def test_wrong_arguments_end_in_one_line(workdir, run, tmp_path):
    none = tmp_path / 'none'
    unset = 'error: --workdir must be the folder of a finished training'
    for command, *arguments in [evaluate], [predict, 'cat.jpg'], [export]:
        assert run(command, None, *arguments, fails=True) == unset
        assert str(none) in run(command, none, *arguments, fails=True)
        assert not none.exists()
    (tmp_path / 'text.jpg').write_text('no picture')
    write_pictures(tmp_path / 'others/cat', [0])
    (tmp_path / 'empty').mkdir()
    for command, arguments, message in (
        (predict, [], 'Name the pictures after the flags'),
        (predict, [tmp_path / 'text.jpg'], 'text.jpg cannot be read'),
        (predict, [tmp_path / 'none.jpg'], 'none.jpg cannot be read'),
        (evaluate, ['x'], "Unknown arguments: ['x']"),
        (evaluate, [f'--folder={tmp_path}/others'], "['cat']"),
        (evaluate, [f'--folder={tmp_path}/empty'], 'must hold images'),
        (export, ['x'], "Unknown arguments: ['x']"),
    ):
        assert message in run(command, workdir, *arguments, fails=True)
    sound = 'train.load_data_fn = @audio.load_datasets'
    workdir = make_workdir(tmp_path / 'run', color_model(), settings=sound)
    message = run(predict, workdir, tmp_path / 'text.jpg', fails=True)
    assert '--workdir must be a training on images' in message
