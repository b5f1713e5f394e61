"""Preference alignment in JAX, plain or with Latent Preference Coding (LPC).

Names are imported when first used: ``import lpc_jax`` alone imports no JAX.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lpc_jax.asking import Policy as Policy
    from lpc_jax.asking import Scores as Scores
    from lpc_jax.config import Adapters as Adapters
    from lpc_jax.config import ApoDown as ApoDown
    from lpc_jax.config import ApoZero as ApoZero
    from lpc_jax.config import Config as Config
    from lpc_jax.config import Cpo as Cpo
    from lpc_jax.config import Dpo as Dpo
    from lpc_jax.config import ExoPair as ExoPair
    from lpc_jax.config import Hinge as Hinge
    from lpc_jax.config import Ipo as Ipo
    from lpc_jax.config import Latent as Latent
    from lpc_jax.config import NcaPair as NcaPair
    from lpc_jax.config import Optimizer as Optimizer
    from lpc_jax.config import Orpo as Orpo
    from lpc_jax.config import Packing as Packing
    from lpc_jax.config import Robust as Robust
    from lpc_jax.config import SigmoidNorm as SigmoidNorm
    from lpc_jax.config import Simpo as Simpo
    from lpc_jax.config import SppoHard as SppoHard
    from lpc_jax.config import Training as Training
    from lpc_jax.data.pairs import Pairs as Pairs
    from lpc_jax.door import Run as Run
    from lpc_jax.door import load as load
    from lpc_jax.door import read_pairs as read_pairs
    from lpc_jax.door import start as start
    from lpc_jax.door import train as train
    from lpc_jax.errors import UserError as UserError
_HOMES = {
    "lpc_jax.config": "Adapters ApoDown ApoZero Config Cpo Dpo ExoPair Hinge Ipo Latent"
    " NcaPair Optimizer Orpo Packing Robust SigmoidNorm Simpo SppoHard Training",
    "lpc_jax.data.pairs": "Pairs",
    "lpc_jax.asking": "Policy Scores",
    "lpc_jax.door": "Run load read_pairs start train",
    "lpc_jax.errors": "UserError",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("lpc-jax")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'lpc_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return list(_HOME_OF)
