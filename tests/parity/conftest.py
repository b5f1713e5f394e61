"""Gives parity tests torch, and the scripts that made the golden files, to run again.

Without torch these tests must still be found, so that they can be left out: nothing
here imports it before a test asks.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

GOLDEN = Path(__file__).parents[1] / "golden"
THREADS = 2
# An interpreter with transformers 4, as make older-transformers names it.
OLDER_PYTHON = os.environ.get("LPC_JAX_OLDER_PYTHON")
collect_ignore = [] if OLDER_PYTHON else ["test_older.py"]


@pytest.fixture(scope="session")
def torch() -> ModuleType:
    """The module, at few threads."""
    import torch

    torch.set_num_threads(THREADS)
    return torch


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_models(torch: ModuleType) -> ModuleType:
    """golden/make_tiny_models.py."""
    return _script("make_tiny_models")


@pytest.fixture(scope="session")
def trl_script(torch: ModuleType) -> ModuleType:
    """golden/make_trl_trajectories.py."""
    return _script("make_trl_trajectories")
