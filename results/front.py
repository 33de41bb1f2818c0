"""Draws front.png, the figure in README.md, from the runs beside it.

python3 results/front.py
"""

import json
import pathlib

from diffstride.examples import sweep

# As they are called in the runs, and in the figure.
NAMES = {
    'strided convolution': 'strided convolution',
    'FixedSpectralPooling': 'FixedSpectralPooling',
    "FixedSpectralPooling, norm = 'backward'": (
        "FixedSpectralPooling, norm='backward'"
    ),
    'DiffStride, 25 MMAC': 'DiffStride, budget',
    'DiffStride, 47 MMAC': 'DiffStride, budget',
    "norm = 'backward', 25 MMAC": "DiffStride, budget, norm='backward'",
    "norm = 'backward'": "DiffStride, budget, norm='backward'",
    'DiffStride, inside, R = 1': 'DiffStride, no budget, inside, R = 1',
    'DiffStride, inside, R = 2': 'DiffStride, no budget, inside, R = 2',
    'DiffStride, outside, R = 4': 'DiffStride, no budget, outside, R = 4',
}
STARTS = ('1, 1, 2, 2, 2', '1, 1, 3, 2, 3', '1, 1, 4, 4, 4', '1, 1, 1.5, 4, 2')

folder = pathlib.Path(__file__).parent
runs = [json.loads(path.read_text()) for path in folder.glob('*/runs/*.json')]
groups = {}
for variant, name in NAMES.items():
    for start in STARTS:
        found = [
            run
            for run in runs
            if (run['variant'], run['strides']) == (variant, start)
        ]
        if found:
            groups.setdefault(name, {})[variant, start] = found
sweep.accuracy_macs(groups).savefig(folder / 'front.png', dpi=120)
