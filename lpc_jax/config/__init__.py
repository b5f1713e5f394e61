"""What a run is: frozen, documented settings, read from a Python file and flags.

Knows nothing of arrays, models or devices. The config files of users and of old run
folders import the names below from here.
"""

from lpc_jax.config.checks import Settings
from lpc_jax.config.command_line import (
    add_version,
    flat,
    from_flat,
    load,
    read,
    source,
)
from lpc_jax.config.data import Data, Source, in_words
from lpc_jax.config.fields import (
    Adapters,
    Config,
    Distributed,
    Latent,
    Mesh,
    Model,
    Optimizer,
    Packing,
    Reference,
    Run,
    Training,
)
from lpc_jax.config.losses import (
    ApoDown,
    ApoZero,
    Cpo,
    Dpo,
    ExoPair,
    Hinge,
    Ipo,
    Loss,
    NcaPair,
    Orpo,
    Robust,
    SigmoidNorm,
    Simpo,
    SppoHard,
)
