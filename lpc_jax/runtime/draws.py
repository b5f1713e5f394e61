"""z of prompts without a judged pair: every draw at inference comes from here."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from lpc_jax.models.latent import LatentHead, Steering
from lpc_jax.types import LatentCodes


def seeds(prompts: Sequence[Int32[np.ndarray, "_"]]) -> UInt32[np.ndarray, "R"]:
    """What seeds each prompt's draw: the CRC-32 of its token ids, and nothing else."""
    return np.asarray([zlib.crc32(ids.tobytes()) for ids in prompts], np.uint32)


def codes(
    latent: LatentHead,
    hidden: Float[Array, "R D"],
    steering: Steering,
    key: Array,
    seeds: UInt32[Array, "R"],
) -> LatentCodes:
    """The codes of prompts (Gong et al. 2025, eq. 9), the same in whatever batch.

    Args:
        latent: The codebook and the prior.
        hidden: At each prompt's last token.
        steering: How z is chosen.
        key: Of all draws.
        seeds: From the function of that name.
    """
    prior = latent.prior(hidden)
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(seeds)
    return latent.codes(prior, jax.vmap(steering.weights)(prior, keys))
