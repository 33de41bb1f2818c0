"""Lets tools that need a setup.py work; pyproject.toml has all metadata."""

import setuptools

setuptools.setup()
