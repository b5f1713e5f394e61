"""Preference alignment in JAX, plain or with Latent Preference Coding (LPC).

Names are imported when first used: ``import lpc_jax`` alone imports no JAX.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpc_jax.asking import Policy, Scores
    from lpc_jax.config import (
        Adapters,
        Config,
        Dpo,
        Ipo,
        Latent,
        Optimizer,
        Packing,
        Simpo,
        Training,
    )
    from lpc_jax.data.pairs import Pairs
    from lpc_jax.door import Run, load, read_pairs, start, train
    from lpc_jax.errors import UserError
_HOMES = {
    "lpc_jax.config": "Adapters Config Dpo Ipo Latent Optimizer Packing Simpo Training",
    "lpc_jax.data.pairs": "Pairs",
    "lpc_jax.asking": "Policy Scores",
    "lpc_jax.door": "Run load read_pairs start train",
    "lpc_jax.errors": "UserError",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}
__all__ = [
    "Adapters",
    "Config",
    "Dpo",
    "Ipo",
    "Latent",
    "Optimizer",
    "Packing",
    "Pairs",
    "Policy",
    "Run",
    "Scores",
    "Simpo",
    "Training",
    "UserError",
    "load",
    "read_pairs",
    "start",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lpc_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return __all__
