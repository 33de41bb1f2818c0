"""Compares the times of a model, its frozen copy, and the copy in onnxruntime.

    python3 benchmarks/freezing.py --rounds 20

It takes some 2 minutes on two CPU cores.
"""

import argparse
import os
import tempfile

import harness
import keras
import numpy as np
import onnxruntime
import tensorflow as tf

from diffstride import DiffStride, freeze, resnet


def exported(model):
    """Exports a model to ONNX; returns a function of images that runs it."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'model.onnx')
        model.export(path, format='onnx', verbose=False)
        session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def steps(model, images):
    """Returns {name: function without arguments}, the steps to compare."""
    frozen = freeze(model)
    run = exported(frozen)
    calls = {'eager model': model, 'eager frozen': frozen}
    for name, called in (('predict model', model), ('predict frozen', frozen)):
        calls[name] = called.predict_on_batch
    calls['onnxruntime frozen'] = run
    expected = np.asarray(model(images))
    for name, call in calls.items():
        error = np.abs(np.asarray(call(images)) - expected).max()
        assert error < 1e-4 * np.abs(expected).max(), (name, error)
    return {
        name: lambda call=call: call(images) for name, call in calls.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=20)
    parser.add_argument('--width', type=int, default=64)
    parser.add_argument('--batches', type=int, nargs='*', default=[1, 32])
    args = parser.parse_args()
    keras.utils.set_random_seed(0)
    model = resnet.resnet18(
        num_output_classes=10, width=args.width, pooling_cls=DiffStride
    )
    model.build((None, 32, 32, 3))
    model.compile()
    print(f'TensorFlow {tf.__version__}, onnxruntime', end=' ')
    print(f'{onnxruntime.__version__}, n = {args.rounds}')
    for batch in args.batches:
        images = np.random.default_rng(0).normal(size=(batch, 32, 32, 3))
        images = images.astype('float32')
        seconds = harness.interleaved_seconds(steps(model, images), args.rounds)
        for name, values in seconds.items():
            median = 1e3 * np.median(values)
            spread = 1e3 * (
                np.quantile(values, 0.75) - np.quantile(values, 0.25)
            )
            print(f'batch {batch:3} {name:20} {median:9.1f} ms +- {spread:.1f}')


if __name__ == '__main__':
    main()
