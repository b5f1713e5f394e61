"""Draws z at inference, for prompts without a judged pair."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
from jaxtyping import Array, Float, Int32, UInt32

from lpc_jax.models.latent import LatentHead, Steering
from lpc_jax.types import LatentCodes


def seeds(prompts: Sequence[Int32[np.ndarray, "_"]]) -> UInt32[np.ndarray, "R"]:
    """The seed of each prompt's draw: the CRC-32 of its token ids alone."""
    return np.asarray([zlib.crc32(ids.tobytes()) for ids in prompts], np.uint32)


def codes(
    latent: LatentHead,
    hidden: Float[Array, "R D"],
    steering: Steering,
    key: Array,
    seeds: UInt32[Array, "R"],
) -> LatentCodes:
    """Codes of prompts by their last token's ``hidden`` (Gong et al. 2025, eq. 9)."""
    return steering.codes(latent, latent.prior(hidden), key, seeds)
