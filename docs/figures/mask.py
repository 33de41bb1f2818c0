"""Draws the masks of the three ramps, and their gradients by the stride.

python docs/figures/mask.py [folder]
"""

import pathlib
import sys

import matplotlib.figure
import numpy as np

from diffstride.ramps import RAMPS, Ramp

SIZE, STRIDE, WIDTH = 32, 2.0, 4.0
EDGE = SIZE / (2 * STRIDE)
FOLDER = pathlib.Path(__file__).parent


def mask(kind, frequencies, edge):
    """Returns the weights whose gradient the stride gets, [frequencies]."""
    end = edge + WIDTH if kind == 'outside' else edge
    return np.clip((end - frequencies) / WIDTH, 0, 1)


def main(folder=FOLDER):
    frequencies = np.linspace(0, SIZE / 2, 1601)
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout='constrained')
    grid = figure.subplots(2, 3, sharex=True, sharey='row')
    for (above, below), kind in zip(grid.T, RAMPS):
        ramp = Ramp(kind, WIDTH)
        count = ramp.output_size(SIZE, EDGE)
        values = ramp.constant_weights(count, EDGE)
        shown = mask(kind, frequencies, EDGE)
        if kind == 'straight_through':
            above.plot(frequencies, shown, 'C1--', label='gives the gradient')
            shown = (frequencies <= EDGE).astype(float)
        above.plot(frequencies, shown, 'C1', label='weighs the frequencies')
        above.plot(values, 'C1.')
        above.axvspan(0, count / 2, color='C0', alpha=0.12)
        above.set_title(
            f"ramp='{kind}': {count} of {SIZE} samples", fontsize=10
        )
        step = 1e-3
        slope = mask(kind, frequencies, SIZE / (2 * (STRIDE + step)))
        slope = (slope - mask(kind, frequencies, EDGE)) / step
        below.fill_between(frequencies, slope, color='C3', alpha=0.6)
        below.set_xlabel('frequency f (cycles per map)')
        for axes in (above, below):
            axes.axvline(EDGE, color='black', linestyle=':')
    grid[0, 0].set_ylabel('mask m(f)')
    grid[1, 0].set_ylabel('gradient dm/dS')
    grid[0, 2].legend(fontsize=8)
    figure.savefig(pathlib.Path(folder, 'mask.png'), dpi=110)


if __name__ == '__main__':
    main(*sys.argv[1:])
