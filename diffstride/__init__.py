"""Pooling layers whose strides are learned by gradient descent, for Keras 3."""

from diffstride import callbacks, costs, plots, resnet
from diffstride.blurring import BlurPooling
from diffstride.budget import recalibrate, set_budget
from diffstride.counting import complexity
from diffstride.freezing import freeze
from diffstride.pooling import (
    DiffStride,
    DiffStride1D,
    DiffStride3D,
    FixedSpectralPooling,
    FixedSpectralPooling1D,
    FixedSpectralPooling3D,
    SpatialPooling,
    diffstride_layers,
)
from diffstride.replacing import replace_strides
from diffstride.resizing import SpectralResizing

__version__ = '0.1.0'
__all__ = [
    'BlurPooling',
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
    'costs',
    'diffstride_layers',
    'freeze',
    'plots',
    'recalibrate',
    'replace_strides',
    'resnet',
    'set_budget',
]
