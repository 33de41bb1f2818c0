"""Pooling layers whose strides are learned by gradient descent, for Keras 3."""

from diffstride import callbacks, plots, regularizers, resnet
from diffstride.complexity import complexity
from diffstride.pooling import (
    DiffStride,
    FixedSpectralPooling,
    SpatialPooling,
)

__version__ = '0.1.0'
__all__ = [
    'DiffStride',
    'FixedSpectralPooling',
    'SpatialPooling',
    'callbacks',
    'complexity',
    'plots',
    'regularizers',
    'resnet',
]
