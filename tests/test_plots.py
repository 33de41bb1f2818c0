"""The plots draw the numbers that they are given."""

import keras
import numpy as np
import pytest
from backends import array, random, refusals

from diffstride import DiffStride, FixedSpectralPooling, plots, resnet

HISTORY = {
    'loss': [1.0, 0.5],
    'stride/a/height': [2.5, 2.6],
    'stride/a/width': [1.5, 1.4],
    'stride/b/height': [3.0, 3.1],
    'stride/b/width': [4.0, 4.1],
}


def lines(axes):
    return {x.get_label(): x.get_xydata().tolist() for x in axes.get_lines()}


def test_strides():
    figure = plots.strides(HISTORY, {'a': (2.0, 2.0), 'b': (3.0, 3.0)})
    assert lines(figure.axes[0])['a, width'] == [[0, 2.0], [1, 1.5], [2, 1.4]]
    assert len(lines(figure.axes[0])) == 4
    without_start = lines(plots.strides(HISTORY).axes[0])
    assert without_start['b, height'] == [[1, 3.0], [2, 3.1]]


def test_accuracy_macs():
    figure = plots.accuracy_macs(
        {'DiffStride': [(3e6, 0.7), (1e6, 0.6, 0.01)], 'other': [(2e6, 0.5)]}
    )
    first, second = figure.axes[0].containers
    np.testing.assert_allclose(first[0].get_xydata(), [[1, 60], [3, 70]])
    np.testing.assert_allclose(second[0].get_xydata(), [[2, 50]])
    assert first.get_label() == 'DiffStride'


def test_response():
    layer = DiffStride((2.0, 4.0), smoothness_factor=2.0)
    (axes,) = plots.response(layer, 16, index=1).axes
    assert [y for _, y in lines(axes)['m(f)']] == [1, 1, 1, 0.5, *[0] * 5]
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert 'kept: 8 of 16 samples' in labels
    assert 'b = N / (2 S), S = 4.00' in labels


@pytest.mark.parametrize('channels_first', [False, True])
def test_pooled(channels_first):
    model = resnet.Resnet([4, 4], '1, 2', 3, pooling_cls=DiffStride)
    if channels_first:
        pool = DiffStride(2.0, 1.0, data_format='channels_first')
        model = keras.Sequential([keras.layers.Permute((3, 1, 2)), pool])
    image = random(16, 12, 3)
    before = array(model(image[None]))
    figure = plots.pooled(model, image)
    shapes = [axes.images[0].get_array().shape for axes in figure.axes]
    assert shapes == [(16, 12), (10, 8) if channels_first else (16, 12)]
    np.testing.assert_array_equal(array(model(image[None])), before)


START = {'stride/a/height': [2.0]}
RELU = keras.Sequential([keras.layers.ReLU()])
test_wrong_arguments = refusals(
    (lambda: plots.accuracy_macs({}), '`points` must have at least one'),
    (lambda: plots.accuracy_macs({'a': []}), '`points` must have at least'),
    (lambda: plots.strides({'loss': [1.0]}), '`history` must have strides'),
    (lambda: plots.strides(START, {'a': []}), '`initial` must have as many'),
    (lambda: plots.strides(START, {'b': [2.0]}), '`initial` must have as many'),
    (lambda: plots.response(FixedSpectralPooling(2.0), 8),
     '`layer` must be a DiffStride'),
    (lambda: plots.response(DiffStride(2.0), 0), '`size` must be an int'),
    (lambda: plots.response(DiffStride(2.0), 8, 2), '`index` must be one'),
    (lambda: plots.pooled(RELU, np.zeros((8, 8, 1))),
     '`model` must have spectral pooling layers'),
)  # fmt: skip
