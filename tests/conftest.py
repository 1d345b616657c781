"""Fixtures shared by all tests."""

import importlib.util
import pathlib
from collections.abc import Iterator

import pytest

# By path: under --import-mode=importlib no test file can be imported by its name.
_spec = importlib.util.spec_from_file_location("workers", pathlib.Path(__file__).with_name("workers.py"))
workers = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(workers)


@pytest.fixture(scope="session")
def pool2() -> Iterator["workers.Pool"]:
    """Two ranks on gloo; see workers.py."""
    with workers.Pool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def pool4() -> Iterator["workers.Pool"]:
    """Four ranks on gloo; see workers.py."""
    with workers.Pool(4) as pool:
        yield pool
