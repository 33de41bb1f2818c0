"""Draws what a stride of 2 keeps of an image, with four ways to pool.

    python docs/figures/stride_of_2.py [folder]

The image shows rings that get finer from its center, at 0 cycles per pixel, to
its edge, at 1/2. A stride of 2 can keep rings up to 1/4 cycle per pixel, those
within half the radius. Rings that appear elsewhere are aliases.
"""

import pathlib
import sys

import keras
import matplotlib.figure
import numpy as np

from diffstride import FixedSpectralPooling

SIZE = 128
FOLDER = pathlib.Path(__file__).parent


def rings():
    """Returns an image [SIZE, SIZE] from 0 to 1 that is gray at its edge."""
    x = np.arange(SIZE) - SIZE / 2
    squares = x[:, None] ** 2 + x**2
    fade = np.clip((SIZE / 2 - np.sqrt(squares)) / 8, 0, 1)
    return 0.5 + 0.5 * fade * np.cos(np.pi * squares / SIZE)


def main(folder=FOLDER):
    image = rings()
    maps = {
        'an image of rings': image,
        'every second pixel,\nas a strided convolution': image[::2, ::2],
    }
    for name, layer in {
        'max pooling': keras.layers.MaxPooling2D(2),
        'average pooling': keras.layers.AveragePooling2D(2),
        'spectral pooling': FixedSpectralPooling(2),
    }.items():
        pooled = layer(keras.ops.convert_to_tensor(image[None, ..., None]))
        maps[name] = keras.ops.convert_to_numpy(pooled)[0, ..., 0]
    figure = matplotlib.figure.Figure(figsize=(7, 3.9), layout='constrained')
    grid = figure.subplot_mosaic('AABC;AADE')
    for axes, (name, x) in zip(grid.values(), maps.items()):
        axes.imshow(x, cmap='gray', vmin=0, vmax=1, interpolation='nearest')
        axes.set_title(name, fontsize=10)
        axes.set_axis_off()
    figure.savefig(pathlib.Path(folder, 'stride_of_2.png'), dpi=160)


if __name__ == '__main__':
    main(*sys.argv[1:])
