"""Attention over rows that hold whole preference pairs: one mask, several backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lpc_jax import axes
from lpc_jax.models.attention.mask import Tokens
from lpc_jax.models.attention.table import BACKENDS


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which key each query may attend to, as the named backend has prepared it."""

    prepared: Any
    backend: str = dataclasses.field(metadata={"static": True})


def layout(
    positions: Int[Array, "R T"],
    pair: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    *,
    sliding_window: int | None,
    backend: str,
) -> Layout:
    """Made once a micro-batch, read by every layer; the arrays are ``mask.Tokens``'."""
    tokens = Tokens(positions, pair, branch)
    return Layout(BACKENDS[backend].prepare(tokens, sliding_window), backend)


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    layout: Layout,
) -> Float[Array, "R T N H"]:
    """Softmax attention with scores scaled by 1 / sqrt(H) and summed in fp32.

    Query head n reads key head ``n // (N / K)``. Without a key its output is unused.
    """
    backend = BACKENDS[layout.backend]
    rows = axes.split_over("R", query.shape[0])
    kv_heads = axes.split_over("K", key.shape[2])
    if not backend.per_device or (rows is None and kv_heads is None):
        return backend.attend(query, key, value, layout.prepared)
    heads = P(rows, None, kv_heads, None)
    return jax.shard_map(
        backend.attend,
        in_specs=(heads, heads, heads, P(rows)),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, layout.prepared)
