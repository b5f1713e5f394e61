"""Rotary positions (Su et al. 2021), and how they are stretched for long contexts."""

from __future__ import annotations

import math
from typing import NamedTuple, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lpc_jax.models.architectures import Architecture, RopeScaling


class Turns(NamedTuple):
    """How far each plane of a head is turned at each position, and how it grows."""

    angles: Float[Array, "R T planes"]
    scale: float | Float[Array, ""]  # of cos and sin

    def only(self, turned: bool | Array | None) -> Turns:
        """Those of a layer; one without RoPE leaves its heads exactly as they are."""
        if turned is None or turned is True:
            return self
        return Turns(
            jnp.where(turned, self.angles, 0), jnp.where(turned, self.scale, 1)
        )


def turns(
    architecture: Architecture,
    positions: Int[Array, "R T"],
    longest: Int[Array, "R _"],
) -> Turns:
    """All layers' turns; ``longest`` is the length that each token's text may take.

    Longrope has one list of factors for texts up to ``original_length`` and another for
    longer ones. transformers takes the longest of the batch as it is so far, so that a
    text is read anew when it grows past. Here a pair is judged by its longer answer,
    and an answer that is being written by the most tokens it may come to, so that no
    other text has a say and nothing is read twice.
    """
    scaling = architecture.rope_scaling
    frequencies: Array | np.ndarray = rope_frequencies(architecture)
    if scaling is not None and scaling.kind == "longrope":
        beyond = rope_frequencies(architecture, beyond=True)
        is_long = longest > scaling.original_length
        frequencies = jnp.where(is_long[..., None], beyond, frequencies)
    scale = 1.0 if scaling is None else _scale(scaling)
    return Turns(positions[..., None] * frequencies, scale)


def longest_of_pair(
    architecture: Architecture, positions: Int[Array, "R T"], pair: Int[Array, "R T"]
) -> Int[Array, "R T"]:
    """Tokens of the longest sequence in each token's pair; only longrope needs them."""
    scaling = architecture.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return positions

    def of_row(positions: Array, pair: Array) -> Array:
        # Padding, whose pair is -1, is left out, and what it reads is not used.
        last = jax.ops.segment_max(positions, pair, num_segments=len(pair))
        return last[pair] + 1

    return jax.vmap(of_row)(positions, pair)


def rope_frequencies(
    architecture: Architecture, *, beyond: bool = False
) -> Float[np.ndarray, "planes"]:
    """Radians per position of the rotary planes, in float32.

    ``beyond`` chooses longrope's factors for texts longer than ``original_length``.
    """
    width = architecture.rotary_width or architecture.head_width
    frequencies = 1.0 / architecture.rope_theta ** (np.arange(0, width, 2) / width)
    scaling = architecture.rope_scaling
    if scaling is not None:
        frequencies = _stretched(frequencies, architecture, scaling, beyond)
    return frequencies.astype(np.float32)


def _stretched(
    frequencies: np.ndarray, a: Architecture, scaling: RopeScaling, beyond: bool
) -> np.ndarray:
    match scaling.kind:
        case "linear":
            return frequencies / scaling.factor
        case "longrope":
            factors = scaling.long_factor if beyond else scaling.short_factor
            return frequencies / np.asarray(factors)
        case "llama3":
            turned = scaling.original_length * frequencies / (2 * math.pi)
            # Llama 3.1: below low_freq_factor turns in the original context a frequency
            # is divided, above high_freq_factor kept, and between the two interpolated.
            kept = (turned - scaling.low_freq_factor) / (
                scaling.high_freq_factor - scaling.low_freq_factor
            )
        case "yarn":
            kept = _yarn_kept(len(frequencies), a.rope_theta, scaling)
        case _:
            assert_never(scaling.kind)
    kept = np.clip(kept, 0.0, 1.0)
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn_kept(planes: int, theta: float, scaling: RopeScaling) -> np.ndarray:
    """How much of each plane's frequency stays (Peng et al. 2023, arXiv 2309.00071)."""

    def plane(turned: float) -> float:
        """The plane that turns so often in the original context."""
        wavelength = scaling.original_length / (2 * math.pi * turned)
        return planes * math.log(wavelength) / math.log(theta)

    # Whole planes, within the head, as its authors' code and transformers have it.
    low = max(math.floor(plane(scaling.beta_fast)), 0)
    high = min(math.ceil(plane(scaling.beta_slow)), 2 * planes - 1)
    width = (high - low) or 1e-3
    return 1 - (np.arange(planes) - low) / width


def _scale(scaling: RopeScaling) -> float:
    """What cos and sin are multiplied by, so that attention is as sharp as before."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1:
        return 1.0
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1
    if scaling.kind == "longrope":
        return math.sqrt(
            1 + math.log(scaling.factor) / math.log(scaling.original_length)
        )
    return 1.0


def rotate(x: Float[Array, "R T N H"], turns: Turns) -> Float[Array, "R T N H"]:
    """Turns each plane (i, i + planes) of a head by its angle, in fp32.

    Elements behind the planes stay as they are.
    """
    cos, sin = (f(turns.angles)[:, :, None] * turns.scale for f in (jnp.cos, jnp.sin))
    planes = turns.angles.shape[-1]
    first, second, rest = jnp.split(
        x.astype(jnp.float32), [planes, 2 * planes], axis=-1
    )
    rotated = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin, rest], axis=-1
    )
    return rotated.astype(x.dtype)
