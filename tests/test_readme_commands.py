"""The README's commands lead from a training to a file that stands alone."""

import pathlib
import re
import shlex

import pytest
from backends import output_of
from PIL import Image
from small_data import picture, write_pictures

ROOT = pathlib.Path(__file__).parents[1]
NAMES = ('blue', 'green', 'red')
# These turn the training of the README's command into one of seconds.
SMALL = """
data.load_datasets.name = 'pictures'
data.load_datasets.batch_size = 12
data.load_datasets.mixup_alpha = 0
train.train.num_epochs = 6
keras.optimizers.SGD.ema_momentum = 0.5
train.train.model_cls = @resnet.Resnet
resnet.Resnet.filters = [4, 4]
resnet.Resnet.strides = '1, 2'
resnet.Resnet.num_layers = 1
"""


def blocks(page, language):
    text = (ROOT / page).read_text()
    return re.findall(rf'^```{language}\n(.*?)^```$', text, re.M | re.S)


@pytest.mark.slow
def test_from_a_training_to_the_class_of_a_jpeg(tmp_path, monkeypatch, capsys):
    style = {'size': (32, 32), 'brighter': 80}
    for channel, name in zip((2, 1, 0), NAMES):
        for split, first, count in (('train', 0, 24), ('test', 24, 4)):
            folder = tmp_path / 'pictures' / split / name
            write_pictures(folder, [channel] * count, first, **style)
        pixels = picture(channel, 28, (48, 40), brighter=80)
        Image.fromarray(pixels).save(tmp_path / f'{name}.jpg')

    def run(command):
        arguments = shlex.split(command)
        assert arguments[0] == '.venv/bin/python'
        if 'main' in command:
            arguments.append(f'--gin_bindings={SMALL}')
        return output_of(*arguments[1:], cwd=tmp_path)

    workdir = str(tmp_path / 'run')
    commands = [
        command.replace('/tmp/cifar10', workdir)
        for block in blocks('README.md', 'bash')
        for command in block.replace('\\\n', '').splitlines()
        if '-m diffstride' in command and '/tmp/cifar10' in command
    ]
    jobs = [re.search(r'examples\.(\w+)', x)[1] for x in commands]
    assert jobs == ['main', 'evaluate', 'predict', 'export']
    pictures = ' '.join(f'{name}.jpg' for name in NAMES)
    commands[2] = commands[2].replace('cat.jpg', pictures)
    _, evaluated, predicted, _ = map(run, commands)
    settings = pathlib.Path(workdir, 'config.gin').read_text()
    assert 'label_smoothing = 0.1' in settings  # The packaged file was read.
    assert '12 images, accuracy 100.0%' in evaluated
    found = dict(re.findall(r'^(\w+)\.jpg: (\w+)', predicted, re.M))
    assert found == {name: name for name in NAMES}

    (snippet,) = (
        code.replace('/tmp/cifar10', workdir)
        for code in blocks('docs/export.md', 'python')
        if 'onnxruntime' in code
    )
    assert 'diffstride' not in snippet.replace(workdir, '')
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for name in NAMES:
        exec(snippet.replace('cat.jpg', f'{name}.jpg'), {})
    assert capsys.readouterr().out.split() == list(NAMES)
