"""Attention over rows that hold whole preference pairs: one function, one mask.

Knows nothing of projections or rotary embeddings.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lpc_jax.types import NO_PAIR, PROMPT


def pair_mask(
    positions: Int[Array, "R T"],
    pair: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    *,
    sliding_window: int | None,
) -> Bool[Array, "R T T"]:
    """Which key (last axis) each query may attend to.

    A key is seen iff it is of the query's pair, not later in position, and of the
    prompt or of the query's own answer; under a sliding window also less than
    ``sliding_window`` positions back. Prompt queries thus see the prompt alone.

    Args:
        positions: Position in the sequence that each token would have had alone.
        pair: Pair slot, ``NO_PAIR`` on padding, which sees and is seen by nothing.
        branch: Prompt, chosen, rejected or padding.
        sliding_window: In positions; None for full attention.
    """
    distance = positions[:, :, None] - positions[:, None, :]
    same_pair = (pair[:, :, None] == pair[:, None, :]) & (pair != NO_PAIR)[:, None, :]
    key_branch = branch[:, None, :]
    visible = (key_branch == PROMPT) | (key_branch == branch[:, :, None])
    mask = same_pair & visible & (distance >= 0)
    if sliding_window is not None:
        mask &= distance < sliding_window
    return mask


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    mask: Bool[Array, "R T T"],
    *,
    backend: str,
) -> Float[Array, "R T N H"]:
    """Softmax attention with scores scaled by 1 / sqrt(H) and summed in fp32.

    Args:
        query: Rotated queries; query head n reads key head ``n // (N / K)``.
        key: Rotated keys.
        value: Values.
        mask: From ``pair_mask``. A query that sees no key gets a finite, unused
            output.
        backend: ``xla``, or ``auto``, which chooses among the backends there are:
            so far that is ``xla`` on every device.

    Raises:
        ValueError: An unknown backend.
    """
    if backend not in ("auto", "xla"):
        raise ValueError(f"model.attention must be 'auto' or 'xla', got {backend!r}.")
    return jax.nn.dot_product_attention(
        query, key, value, mask=jnp.expand_dims(mask, 1), implementation="xla"
    )
