"""Package of diffstride: `pip install .`, or `pip install '.[plot]'`."""

import pathlib
import re

import setuptools

_ROOT = pathlib.Path(__file__).parent
_VERSION = re.search(
    r"__version__ = '(.+)'", (_ROOT / 'diffstride/__init__.py').read_text()
).group(1)

# Keras exports ONNX with tf2onnx; the runtimes run ONNX and LiteRT files.
_EXPORT = ['ai-edge-litert', 'onnxruntime', 'tf2onnx>=1.17']

setuptools.setup(
    name='diffstride',
    version=_VERSION,
    description='Pooling layers with learnable strides, for Keras 3',
    long_description=(_ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=['diffstride', 'diffstride.examples'],
    package_data={'diffstride': ['py.typed'], 'diffstride.examples': ['*.gin']},
    python_requires='>=3.10',
    install_requires=[
        'absl-py',
        'gin-config>=0.5',
        # tensorflow-datasets 4.9.10 imports it without declaring it.
        'importlib_resources',
        'keras>=3.5',
        'numpy',
        'tensorboard',
        'tensorflow>=2.16',
        'tensorflow-datasets>=4.9',
    ],
    extras_require={
        'docs': ['mkdocs-material', 'mkdocstrings[python]', 'ruff'],
        'export': _EXPORT,
        'plot': ['matplotlib'],
        'test': [
            *('filelock', 'hypothesis', 'matplotlib', 'mypy', 'pillow', 'ruff'),
            *('pytest', 'pytest-cov', 'pytest-xdist'),
            *_EXPORT,
        ],
        'train': ['filelock', 'matplotlib', 'pillow'],
    },
)
