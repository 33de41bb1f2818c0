"""Draws the operator: a signal, its spectrum and mask, and the pooled signal.

python docs/figures/one_axis.py [folder]
"""

import pathlib
import sys

import keras
import matplotlib.figure
import numpy as np

from diffstride import DiffStride

SIZE, STRIDE, WIDTH = 32, 2.0, 4.0
FOLDER = pathlib.Path(__file__).parent


def main(folder=FOLDER):
    rng = np.random.default_rng(3)
    signal = np.cumsum(rng.normal(size=SIZE))
    signal -= np.linspace(signal[0], signal[-1], SIZE)
    layer = DiffStride(STRIDE, WIDTH, ramp='outside')
    image = np.broadcast_to(signal, (SIZE, SIZE))[None, ..., None]
    pooled = keras.ops.convert_to_numpy(layer(image.astype('float32')))
    pooled = pooled[0, 0, :, 0]
    count = len(pooled)

    figure = matplotlib.figure.Figure(figsize=(10, 2.8), layout='constrained')
    before, spectrum, after = figure.subplots(1, 3)
    before.plot(signal, '.-', color='C0')
    before.set(title=f'1. A signal of N = {SIZE} samples', xlabel='sample')
    strengths = np.abs(np.fft.rfft(signal)) / SIZE
    spectrum.bar(
        range(len(strengths)), strengths / max(strengths), color='C0', width=0.5
    )
    # The mask begins at f = -(N // 2), and it is the same at f and -f.
    mask = layer.mask([SIZE, 1])[SIZE // 2 :: -1, 0]
    spectrum.plot(mask, 'C1.-', label='mask m(f)')
    spectrum.axvline(
        SIZE / (2 * STRIDE), color='black', ls=':', label='band edge b'
    )
    spectrum.axvspan(
        count / 2, SIZE / 2 + 0.5, color='0.85', label='dropped', zorder=0
    )
    spectrum.set(
        title='2. Its spectrum is weighted and cropped', xlabel='frequency f'
    )
    spectrum.legend(fontsize=8)
    positions = np.arange(count) * SIZE / count
    after.plot(signal, color='C0', alpha=0.3)
    after.plot(positions, pooled, '.-', color='C1')
    after.set(title=f'3. The output of M = {count} samples', xlabel='sample')
    for axes in (before, after):
        axes.set_yticks([])
    figure.savefig(pathlib.Path(folder, 'one_axis.png'), dpi=110)


if __name__ == '__main__':
    main(*sys.argv[1:])
