"""Attention over rows that hold whole preference pairs: one function, one mask.

Knows nothing of projections or rotary embeddings.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lpc_jax import axes
from lpc_jax.models import block_attention

# xla: scores of whole rows under a mask. blocks: the CPU's, a block at a time.
BACKENDS = ("xla", "blocks")


def choose(backend: str, platform: str) -> str:
    """The backend that ``model.attention`` means on a platform.

    Args:
        backend: One of ``BACKENDS``, or ``auto`` for what measured best there.
        platform: As JAX names it: ``cpu``, ``gpu`` or ``tpu``.

    Raises:
        ValueError: An unknown backend.
    """
    if backend not in ("auto", *BACKENDS):
        options = " or ".join(map(repr, ("auto", *BACKENDS)))
        raise ValueError(f"model.attention must be {options}, got {backend!r}.")
    if backend != "auto":
        return backend
    return "blocks" if platform == "cpu" else "xla"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which key each query may attend to, in the form that the backend reads.

    Attributes:
        tokens: Positions, pair slots and branches.
        mask: From ``pair_mask``, for ``xla``.
        seen: From ``block_attention.seen_blocks``, for ``blocks``.
        sliding_window: In positions; None for full attention.
    """

    tokens: tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]]
    mask: Bool[Array, "R T T"] | None
    seen: block_attention.SeenBlocks | None
    sliding_window: int | None = dataclasses.field(metadata={"static": True})


def layout(
    positions: Int[Array, "R T"],
    pair: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    *,
    sliding_window: int | None,
    backend: str,
) -> Layout:
    """Made once a micro-batch, read by every layer.

    Args:
        positions: Position in the sequence that each token would have had alone.
        pair: Pair slot, ``NO_PAIR`` on padding, which sees and is seen by nothing.
        branch: Prompt, chosen, rejected or padding.
        sliding_window: In positions; None for full attention.
        backend: From ``choose``.
    """
    tokens = (positions, pair, branch)
    if backend == "blocks":
        seen = block_attention.seen_blocks(*tokens, sliding_window=sliding_window)
        return Layout(tokens, None, seen, sliding_window)
    mask = pair_mask(*tokens, sliding_window=sliding_window)
    return Layout(tokens, mask, None, sliding_window)


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
        positions: As in ``layout``; likewise the others.
        pair: Pair slots.
        branch: Branches.
        sliding_window: In positions; None for full attention.
    """
    tokens = (positions, pair, branch)
    return block_attention.visible(*tokens, *tokens, sliding_window=sliding_window)


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    layout: Layout,
) -> Float[Array, "R T N H"]:
    """Softmax attention with scores scaled by 1 / sqrt(H) and summed in fp32.

    Args:
        query: Rotated queries; query head n reads key head ``n // (N / K)``.
        key: Rotated keys.
        value: Values.
        layout: From ``layout``. A query that sees no key gets a finite, unused output.
    """
    if layout.seen is None:
        assert layout.mask is not None
        mask = jnp.expand_dims(layout.mask, 1)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation="xla"
        )

    def run(query, key, value, tokens, seen):
        return block_attention.attend(
            query, key, value, tokens, seen, layout.sliding_window
        )

    arguments = (query, key, value, layout.tokens, layout.seen)
    rows = axes.split_over("R", query.shape[0])
    kv_heads = axes.split_over("K", key.shape[2])
    if rows is None and kv_heads is None:
        return run(*arguments)
    # Each device walks the blocks of its own rows and heads.
    heads = P(rows, None, kv_heads, None)
    return jax.shard_map(
        run,
        in_specs=(heads, heads, heads, P(rows), P(rows)),
        out_specs=heads,
        check_vma=False,
    )(*arguments)
