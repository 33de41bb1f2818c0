"""Draws maps whose strides move within a budget, as an animation.

    python docs/figures/moving_strides.py [folder]

It shows one run of the quickstart, from results/quickstart/history.csv.
"""

import csv
import pathlib
import sys

import matplotlib.animation
import matplotlib.figure
import matplotlib.patches
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

SIZE, RUN = 32, 1
START = [3.0, 3.0, 2.0, 2.0]
FRAMES_OF_EPOCH = 2
FOLDER = pathlib.Path(__file__).parent
HISTORY = FOLDER.parents[1] / 'results/quickstart/history.csv'


def learned_strides():
    """Returns the strides of each epoch, from the start to the last change."""
    with HISTORY.open(newline='') as file:
        rows = [row for row in csv.DictReader(file) if row['run'] == str(RUN)]
    strides = [START] + [
        [float(x) for x in row['strides'].split()] for row in rows
    ]
    last = max(i for i, x in enumerate(strides) if x != strides[-1]) + 1
    return np.array(strides[: last + 1])


def main(folder=FOLDER):
    epochs = learned_strides()
    times = np.linspace(0, len(epochs) - 1, FRAMES_OF_EPOCH * (len(epochs) - 1))
    figure = matplotlib.figure.Figure(figsize=(6, 3))
    figure.subplots_adjust(bottom=0.15, top=0.76)
    FigureCanvasAgg(figure)
    grid = figure.subplots(1, 2)
    patches = []
    for axes in grid:
        patches.append(matplotlib.patches.Rectangle((0, 0), 1, 1, color='C0'))
        axes.add_patch(patches[-1])
        axes.set(xlabel='width', ylabel='height', xlim=(0, SIZE))
        axes.set_ylim(SIZE, 0)
        axes.set_aspect('equal')

    def draw(time):
        strides = np.array(
            [np.interp(time, range(len(epochs)), x) for x in epochs.T]
        )
        strides = strides.reshape(2, 2)
        sizes = SIZE / np.cumprod(strides, axis=0)
        names = 'first', 'second'
        for i, (axes, patch) in enumerate(zip(grid, patches)):
            patch.set(height=sizes[i, 0], width=sizes[i, 1])
            height, width = strides[i]
            axes.set_title(
                f'map after the {names[i]} pooling\n'
                f'strides ({height:.1f}, {width:.1f})',
                fontsize=10,
            )
        figure.suptitle(f'epoch {time:.0f}', fontsize=10)
        return patches

    # The last frame stays for a second.
    frames = [*times, *[times[-1]] * 10]
    animation = matplotlib.animation.FuncAnimation(figure, draw, frames)
    animation.save(
        pathlib.Path(folder, 'moving_strides.gif'),
        matplotlib.animation.PillowWriter(fps=10),
        dpi=80,
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
