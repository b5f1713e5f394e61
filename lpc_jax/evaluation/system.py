"""Names of the first house, until every room takes a policy."""

from lpc_jax.runtime.loading import CHECKPOINTS as CHECKPOINTS
from lpc_jax.runtime.loading import load as load
from lpc_jax.runtime.policy import Policy as System


def digest(system: System) -> str:
    """SHA-256 over a policy's parameters."""
    return system.digest()
