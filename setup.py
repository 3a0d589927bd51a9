"""Packaging of the distribution `rpiae`; its metadata is in pyproject.toml."""

from setuptools import setup

setup()
