"""Pooling layers whose strides are learned by gradient descent, for Keras 3."""

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
from diffstride.resizing import SpectralResizing

__version__ = '0.1.0'
