"""Trains a network with strides, replaces them, and trains on.

    python3 benchmarks/existing_network.py --downsampling strides
    python3 benchmarks/existing_network.py --downsampling max_pooling --width 8

It writes results/existing_network/runs.csv, and adds seeds to a file that it
finds there. It needs `pip install '.[train]'` and CIFAR-10 by TFDS.
"""

import argparse
import csv
import pathlib

import keras
import numpy as np
import tensorflow_datasets as tfds

import diffstride
from diffstride.callbacks import StrideBudget

FOLDER = pathlib.Path(__file__).parents[1] / 'results' / 'existing_network'
RUNS = FOLDER / 'runs.csv'
FIELDS = [
    'downsampling',
    'seed',
    'network',
    'epochs',
    'macs',
    'accuracy',
    'strides',
]
SHAPE = (32, 32, 3)


def network(downsampling, width):
    """Two convolutions at each size; the second strides, or is pooled."""
    layers = [
        keras.Input(SHAPE),
        keras.layers.Rescaling(1 / 64, -2),
        keras.layers.ZeroPadding2D(4),
        keras.layers.RandomCrop(32, 32),
        keras.layers.RandomFlip('horizontal'),
    ]
    is_strided = downsampling == 'strides'
    for filters in width, 2 * width, 4 * width:
        for strides in 1, 2 if is_strided else 1:
            layers += [
                keras.layers.Conv2D(
                    filters, 3, strides, padding='same', use_bias=False
                ),
                keras.layers.BatchNormalization(momentum=0.9),
                keras.layers.ReLU(),
            ]
        layers += [] if is_strided else [keras.layers.MaxPooling2D(2)]
    layers += [
        keras.layers.GlobalAveragePooling2D(),
        keras.layers.Dense(10, activation='softmax'),
    ]
    return keras.Sequential(layers)


def train(model, data, epochs, rate, callbacks=()):
    images, labels = data['train']
    steps = epochs * -(-len(images) // 128)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, steps - steps // 10, warmup_target=rate, warmup_steps=steps // 10
    )
    model.compile(
        keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True),
        'sparse_categorical_crossentropy',
        metrics=['accuracy'],
    )
    model.fit(images, labels, 128, epochs, verbose=2, callbacks=[*callbacks])


def study(downsampling, width, seed, data, epochs):
    """Yields a row of the table after each part of the study."""
    keras.utils.set_random_seed(seed)

    def row(name, model, trained):
        _, accuracy = model.evaluate(*data['test'], 500, verbose=0)
        strides = [
            '/'.join(f'{x:.3f}' for x in layer.stride_values)
            for layer in diffstride.diffstride_layers(model)
        ]
        macs = diffstride.complexity(model, SHAPE).macs
        values = downsampling, seed, name, trained, macs, round(accuracy, 4)
        return dict(zip(FIELDS, (*values, ' '.join(strides))))

    original = network(downsampling, width)
    train(original, data, epochs, 0.1)
    yield row('original', original, epochs)
    macs = diffstride.complexity(original, SHAPE).macs
    more = epochs // 10, epochs // 2
    weights = original.get_weights()
    for trained in more:
        original.set_weights(weights)
        train(original, data, trained, 0.03)
        yield row('original, trained on', original, epochs + trained)
    original.set_weights(weights)
    replaced = diffstride.replace_strides(original)
    replaced.compile(
        loss='sparse_categorical_crossentropy', metrics=['accuracy']
    )
    yield row('replaced', replaced, epochs)
    diffstride.recalibrate(
        replaced, np.array_split(data['train'][0][:4096], 16)
    )
    yield row('replaced, recalibrated', replaced, epochs)
    for trained in more:
        held = diffstride.replace_strides(original)
        diffstride.set_budget(held, macs=macs)
        train(held, data, trained, 0.03)
        yield row('replaced, set_budget, trained on', held, epochs + trained)
        learned = diffstride.replace_strides(original)
        train(learned, data, trained, 0.03, [StrideBudget(macs=macs)])
        yield row('replaced, StrideBudget', learned, epochs + trained)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    kinds = ['strides', 'max_pooling']
    parser.add_argument('--downsampling', choices=kinds, default=kinds[0])
    parser.add_argument('--width', type=int, default=16)
    parser.add_argument('--seeds', type=int, nargs='*', default=[0])
    parser.add_argument('--epochs', type=int, default=20)
    parser.add_argument('--images', type=int, default=10_000)
    args = parser.parse_args()
    data = {}
    for split in f'train[:{args.images}]', 'test':
        examples = tfds.load('cifar10', split=split, batch_size=-1)
        examples = tfds.as_numpy(examples)
        name = split.split('[')[0]
        data[name] = examples['image'], examples['label']
    rows = []
    if RUNS.exists():
        with RUNS.open(newline='') as file:
            rows = list(csv.DictReader(file))
    done = {(row['downsampling'], int(row['seed'])) for row in rows}
    for seed in args.seeds:
        if (args.downsampling, seed) in done:
            continue
        rows += study(args.downsampling, args.width, seed, data, args.epochs)
        FOLDER.mkdir(exist_ok=True)
        with RUNS.open('w', newline='') as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == '__main__':
    main()
