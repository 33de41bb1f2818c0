"""Pooling layers whose strides are learned by gradient descent, for Keras 3."""

from diffstride import callbacks, plots, regularizers, resnet
from diffstride.complexity import complexity
from diffstride.freezing import freeze
from diffstride.pooling import (
    DiffStride,
    DiffStride1D,
    DiffStride3D,
    FixedSpectralPooling,
    FixedSpectralPooling1D,
    FixedSpectralPooling3D,
    SpatialPooling,
)
from diffstride.replacing import replace_strides
from diffstride.resizing import SpectralResizing

__version__ = '0.1.0'
__all__ = [
    'DiffStride',
    'DiffStride1D',
    'DiffStride3D',
    'FixedSpectralPooling',
    'FixedSpectralPooling1D',
    'FixedSpectralPooling3D',
    'SpatialPooling',
    'SpectralResizing',
    'callbacks',
    'complexity',
    'freeze',
    'plots',
    'regularizers',
    'replace_strides',
    'resnet',
]
