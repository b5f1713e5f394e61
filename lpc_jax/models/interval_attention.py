"""Attention kernels that are told, query by query, which stretch of keys to read.

Stored as ``rejected reversed | prompt | chosen``, the keys that any query of a pair
may see are one interval: a rejected token sees itself, what lies between it and the
prompt, and the prompt; others see what lies before them. Kernels of tokamax skip the
rest. Knows nothing of projections or rotary embeddings.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lpc_jax.types import NO_PAIR, REJECTED

# tokamax and what it needs beside our own packages. Without --no-deps pip refuses: it
# asks for a typeguard older than tyro's.
_PACKAGES = ("tokamax==0.0.12", "einshape", "immutabledict", "pydantic", "qwix")


def order(
    positions: Int[Array, "R T"], pair: Int[Array, "R T"], branch: Int[Array, "R T"]
) -> Int[Array, "R T"]:
    """Where the token of each storage place comes from; padding goes last."""
    return jnp.argsort(_rank(positions, pair, branch), axis=1)


def _rank(positions: Array, pair: Array, branch: Array) -> Array:
    """By pair; in a pair rejected tokens, last first, then the others, first first."""
    length = positions.shape[1]
    signed = jnp.where(branch == REJECTED, -positions, positions)
    last = jnp.where(pair == NO_PAIR, length, pair)
    return last * 2 * length + length + signed


def key_range(
    positions: Int[Array, "R T"], pair: Int[Array, "R T"], branch: Int[Array, "R T"]
) -> tuple[Int[Array, "R T"], Int[Array, "R T"]]:
    """First key of each query, and one past its last.

    Args:
        positions: In storage order; likewise the others.
        pair: Pair slots.
        branch: Branches.

    Returns:
        Storage places; a padding query sees itself alone.
    """
    length = positions.shape[1]
    here = jnp.broadcast_to(jnp.arange(length), positions.shape)
    rank = _rank(positions, pair, branch)
    prompt_rank = pair * 2 * length + length
    prompt = jax.vmap(jnp.searchsorted)(rank, prompt_rank)
    # The rejected token next to the prompt has the position that the prompt is long.
    beside = jnp.maximum(prompt - 1, 0)
    prompt_end = prompt + jnp.take_along_axis(positions, beside, axis=1)
    rejected = branch == REJECTED
    first = jnp.where(rejected, here, prompt)
    stop = jnp.where(rejected, prompt_end, here + 1)
    padding = pair == NO_PAIR
    return jnp.where(padding, here, first), jnp.where(padding, here + 1, stop)


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    first: Int[Array, "R T"],
    stop: Int[Array, "R T"],
) -> Float[Array, "R T N H"]:
    """Softmax attention of each query over its interval, by tokamax.

    Its Triton kernel where there is an NVIDIA GPU; else its XLA path, a chunk of keys
    at a time.

    Args:
        query: Rotated, in storage order; likewise the others.
        key: Rotated.
        value: Values.
        first: From ``key_range``.
        stop: Likewise.

    Raises:
        ValueError: tokamax is not installed.
    """
    try:
        # Its public function has no key ranges yet.
        from tokamax._src.ops.attention import (  # pyright: ignore[reportMissingImports] -- optional
            api,
            base,
        )
    except ImportError as error:
        raise ValueError(
            "model.attention='tokamax' needs tokamax, which is not installed. Run: "
            f"pip install --no-deps {' '.join(_PACKAGES)}, or choose another"
            " model.attention."
        ) from error
    on_gpu = jax.default_backend() == "gpu"
    kernel = api.IMPLEMENTATIONS["triton" if on_gpu else "xla_chunked"]
    ranges = base.Mask(k_start=first[:, None], k_end=stop[:, None])
    return kernel(query, key, value, mask=ranges)
