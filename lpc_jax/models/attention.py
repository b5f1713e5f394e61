"""Attention over rows that hold whole preference pairs: one function, one mask.

Knows nothing of projections or rotary embeddings.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lpc_jax import axes
from lpc_jax.errors import UserError
from lpc_jax.models import block_attention, splash

# xla: scores of whole rows under a mask. blocks: the CPU's, a block at a time. splash:
# the TPU's kernel. cudnn: a GPU's, which adds the mask to scores that it never holds.
BACKENDS = ("xla", "blocks", "splash", "cudnn")


def choose(backend: str, platform: str, *, row_unit: int) -> str:
    """The backend that ``model.attention`` means on a platform.

    Args:
        backend: One of ``BACKENDS``, or ``auto`` for what suits the platform.
        platform: As JAX names it: ``cpu``, ``gpu`` or ``tpu``.
        row_unit: Of which every row length is a multiple.

    Raises:
        UserError: An unknown backend, or one that cannot run there.
    """
    if backend not in ("auto", *BACKENDS):
        options = " or ".join(map(repr, ("auto", *BACKENDS)))
        raise UserError(f"model.attention must be {options}, got {backend!r}.")
    whole = row_unit % splash.UNIT == 0
    if backend == "splash" and not (platform == "tpu" and whole):
        raise UserError(
            "model.attention='splash' needs a TPU and a packing.row_length that is a"
            f" multiple of {splash.UNIT}, got a {platform} and multiples of {row_unit}."
            " Use 'auto'."
        )
    if backend == "cudnn" and platform != "gpu":
        raise UserError(
            f"model.attention='cudnn' needs a GPU, got a {platform}. Use 'auto'."
        )
    if backend != "auto":
        return backend
    if platform == "tpu" and whole:
        return "splash"
    return "blocks" if platform == "cpu" else "xla"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layout:
    """Which key each query may attend to, in the form that the backend reads.

    Attributes:
        tokens: Positions, pair slots and branches.
        mask: From ``pair_mask``, for all but ``blocks``.
        seen: From ``block_attention.seen_blocks``, for ``blocks``.
        backend: From ``choose``.
        sliding_window: In positions; None for full attention.
    """

    tokens: tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]]
    mask: Bool[Array, "R T T"] | None
    seen: block_attention.SeenBlocks | None
    backend: str = dataclasses.field(metadata={"static": True})
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
        return Layout(tokens, None, seen, backend, sliding_window)
    mask = pair_mask(*tokens, sliding_window=sliding_window)
    return Layout(tokens, mask, None, backend, sliding_window)


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
    if layout.backend in ("xla", "cudnn"):
        assert layout.mask is not None
        mask = jnp.expand_dims(layout.mask, 1)
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, implementation=layout.backend
        )

    if layout.backend == "splash":
        run: Callable[..., Array] = splash.attend
        of_rows: tuple[Any, ...] = (layout.mask,)
    else:
        run = functools.partial(
            block_attention.attend, sliding_window=layout.sliding_window
        )
        of_rows = (layout.tokens, layout.seen)
    rows = axes.split_over("R", query.shape[0])
    kv_heads = axes.split_over("K", key.shape[2])
    if rows is None and kv_heads is None:
        return run(query, key, value, *of_rows)
    # Each device runs over its own rows and heads.
    heads = P(rows, None, kv_heads, None)
    return jax.shard_map(
        run,
        in_specs=(heads, heads, heads, *(P(rows) for _ in of_rows)),
        out_specs=heads,
        check_vma=False,
    )(query, key, value, *of_rows)
