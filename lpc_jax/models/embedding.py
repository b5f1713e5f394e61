"""Token embeddings, looked up where their columns lie."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from lpc_jax import axes


def look_up(
    table: Float[Array, "V D"], tokens: Int[Array, "R T"]
) -> Float[Array, "R T D"]:
    """``table[tokens]``; on a mesh each device reads its own part of the table."""
    rows = axes.split_over("R", tokens.shape[0])
    vocabulary = axes.split_over("V", table.shape[0])
    width = axes.split_over("D", table.shape[1])
    if rows is None and vocabulary is None and width is None:
        return table[tokens]
    if rows is None:  # too few rows for the mesh: nothing to change places with
        width = None

    # A device reads its columns for all rows that share the table, then rows change
    # places with columns (all-to-all). Over fsdp alone the compiler does the same; over
    # three axes it would hold all rows on every device.
    def of_device(part: Array, tokens: Array) -> Array:
        if width is not None:
            tokens = jax.lax.all_gather(tokens, width, axis=0, tiled=True)
        if vocabulary is not None:
            tokens = tokens - jax.lax.axis_index(vocabulary) * part.shape[0]
            here = (tokens >= 0) & (tokens < part.shape[0])
            vectors = jnp.where(here[..., None], part[jnp.where(here, tokens, 0)], 0)
        else:
            vectors = part[tokens]
        if width is not None:
            # Its columns of many rows become its rows whole.
            vectors = jax.lax.all_to_all(
                vectors, width, split_axis=0, concat_axis=2, tiled=True
            )
        if vocabulary is not None:  # 0 but where the token's row is
            vectors = jax.lax.psum(vectors, vocabulary)
        return vectors

    return jax.shard_map(
        of_device,
        in_specs=(P(vocabulary, width), P(rows)),
        out_specs=P(rows),
        check_vma=False,
    )(table, tokens)
