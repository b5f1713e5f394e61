"""Attention a block of keys at a time, skipping blocks that no query may see.

The CPU's backend. Scores of a whole row are never held: each block of queries walks
the blocks of keys that it sees any of, with a running softmax (Milakov & Gimelshein
2018; Dao et al. 2022), and the backward pass computes each block again. Other pairs of
a row, and the chosen answer under a rejected one's queries, thus cost nothing. Knows
nothing of projections, meshes or rotary embeddings.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lpc_jax.types import NO_PAIR, PROMPT

Carry = TypeVar("Carry")

# Queries and keys in a block. Of 32, 64 and 128 the best or near it for rows of 512 to
# 2048 tokens, whether of short or of long pairs (docs/performance.md).
BLOCK = 64

# What remat policies may keep, so that the backward pass does not repeat the walk.
KEPT = "attention"

# Below any score; finite, so that a query that sees no key has no NaN.
_UNSEEN = -1e30

# Positions, pairs and branches of tokens that fill up a block.
_FILL = (0, NO_PAIR, PROMPT)


def visible(
    query_positions: Int[Array, "*R queries"],
    query_pair: Int[Array, "*R queries"],
    query_branch: Int[Array, "*R queries"],
    key_positions: Int[Array, "*R T"],
    key_pair: Int[Array, "*R T"],
    key_branch: Int[Array, "*R T"],
    *,
    sliding_window: int | None,
) -> Bool[Array, "*R queries T"]:
    """Which key (last axis) each query may attend to: the rule of ``types.Batch``."""
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    same_pair = query_pair[..., :, None] == key_pair[..., None, :]
    of_answer = query_branch[..., :, None] == key_branch[..., None, :]
    seen = (
        same_pair
        & (key_pair != NO_PAIR)[..., None, :]
        & ((key_branch == PROMPT)[..., None, :] | of_answer)
        & (distance >= 0)
    )
    return seen if sliding_window is None else seen & (distance < sliding_window)


class SeenBlocks(NamedTuple):
    """Which blocks of keys each block of queries sees any of.

    Attributes:
        index: For a block of queries, the blocks of keys that it sees, in their order;
            after them the others.
        count: How many it sees.
    """

    index: Int[Array, "*R blocks blocks"]
    count: Int[Array, "*R blocks"]


def seen_blocks(
    positions: Int[Array, "R T"],
    pair: Int[Array, "R T"],
    branch: Int[Array, "R T"],
    *,
    sliding_window: int | None,
) -> SeenBlocks:
    """By the rule of ``visible``, made once for all layers."""
    tokens = [
        _padded(x, fill)
        for x, fill in zip((positions, pair, branch), _FILL, strict=True)
    ]
    rows = len(tokens[0])
    blocks = [x.reshape(rows, -1, BLOCK).swapaxes(0, 1) for x in tokens]

    def sees(queries: list[Int[Array, "R BLOCK"]]) -> Bool[Array, "R blocks"]:
        seen = visible(*queries, *tokens, sliding_window=sliding_window)
        return seen.reshape(rows, BLOCK, -1, BLOCK).any(axis=(1, 3))

    seen = jax.lax.map(sees, blocks).swapaxes(0, 1)
    return SeenBlocks(jnp.argsort(~seen, axis=-1, stable=True), seen.sum(axis=-1))


def _padded(x: Int[Array, "*R T"], fill: int) -> Int[Array, "*R padded_T"]:
    """To whole blocks."""
    padding = [(0, 0)] * x.ndim
    padding[-1] = (0, -x.shape[-1] % BLOCK)
    return jnp.pad(x, padding, constant_values=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    layout: tuple[Int[Array, "R T"], Int[Array, "R T"], Int[Array, "R T"]],
    seen: SeenBlocks,
    sliding_window: int | None,
) -> Float[Array, "R T N H"]:
    """Softmax attention in fp32 over the keys that ``visible`` allows.

    Args:
        query: Rotated queries; query head n reads key head ``n // (N / K)``.
        key: Rotated keys.
        value: Values.
        layout: Positions, pair slots and branches of a row's tokens.
        seen: From ``seen_blocks``.
        sliding_window: In positions; None for full attention.

    Returns:
        Mixed values; 0 for a query that sees no key.
    """
    return _forward(query, key, value, layout, seen, sliding_window)[0]


def _to_blocks(x: Float[Array, "T K group H"]) -> Float[Array, "blocks K queries H"]:
    """Cut into blocks; the queries that share a key head lie side by side."""
    length, kv_heads, group, width = x.shape
    x = jnp.pad(x, ((0, -length % BLOCK), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(-1, BLOCK, kv_heads, group, width).transpose(0, 2, 3, 1, 4)
    return x.reshape(-1, kv_heads, group * BLOCK, width)


def _from_blocks(
    x: Float[Array, "blocks K queries H"], length: int
) -> Float[Array, "T K group H"]:
    blocks, kv_heads, _, width = x.shape
    x = x.reshape(blocks, kv_heads, -1, BLOCK, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(blocks * BLOCK, kv_heads, -1, width)[:length]


class _Row:
    """One row in blocks: its scores and what may be seen, a block pair at a time."""

    def __init__(self, query, key, value, layout, seen, sliding_window):
        length, heads, width = query.shape
        kv_heads = key.shape[1]
        self.length, self.group = length, heads // kv_heads
        self.scale = 1 / math.sqrt(width)
        self.query = self.cut(query) * self.scale
        self.key, self.value = (
            _to_blocks(x[:, :, None].astype(jnp.float32)) for x in (key, value)
        )
        self.layout = [
            _padded(x, fill).reshape(-1, BLOCK)
            for x, fill in zip(layout, _FILL, strict=True)
        ]
        self.seen, self.sliding_window = seen, sliding_window

    def cut(self, x: Float[Array, "T N H"]) -> Float[Array, "blocks K queries H"]:
        grouped = x.reshape(self.length, -1, self.group, x.shape[-1])
        return _to_blocks(grouped.astype(jnp.float32))

    def join(self, x: Float[Array, "blocks K queries H"]) -> Float[Array, "T N H"]:
        return _from_blocks(x, self.length).reshape(self.length, -1, x.shape[-1])

    def walk(
        self, i: Array, step: Callable[[Array, Carry], Carry], start: Carry
    ) -> Carry:
        """``step(j, carry)`` over the blocks of keys that query block i sees."""

        def turn(n: Array, carry: Carry) -> Carry:
            return step(self.seen.index[i, n], carry)

        return jax.lax.fori_loop(0, self.seen.count[i], turn, start)

    def scores(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Scores of query block i on key block j, and which of them are allowed."""
        queries, keys = ([x[b] for x in self.layout] for b in (i, j))
        seen = visible(*queries, *keys, sliding_window=self.sliding_window)
        seen = jnp.tile(seen, (self.group, 1))
        return jnp.einsum("KQH,KTH->KQT", self.query[i], self.key[j]), seen


def _forward_row(query, key, value, layout, seen, *, sliding_window):
    row = _Row(query, key, value, layout, seen, sliding_window)
    blocks, kv_heads, queries, width = row.query.shape

    def walk(i: Array) -> tuple[Array, Array]:
        def step(j: Array, carry: tuple[Array, Array, Array]):
            mixed, largest, total = carry
            scores, seen = row.scores(i, j)
            scores = jnp.where(seen, scores, _UNSEEN)
            new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_largest)
            shrink = jnp.exp(largest - new_largest)
            total = total * shrink + weights.sum(axis=-1, keepdims=True)
            mixed = mixed * shrink + jnp.einsum("KQT,KTH->KQH", weights, row.value[j])
            return mixed, new_largest, total

        # A query that sees nothing keeps the largest at its start, far above its
        # scores, so its weights are 0.
        start = (
            jnp.zeros((kv_heads, queries, width)),
            jnp.full((kv_heads, queries, 1), _UNSEEN / 2),
            jnp.zeros((kv_heads, queries, 1)),
        )
        mixed, largest, total = row.walk(i, step, start)
        total = jnp.where(total > 0, total, 1.0)
        return mixed / total, largest + jnp.log(total)

    mixed, normaliser = jax.lax.map(walk, jnp.arange(blocks))
    return row.join(mixed).astype(query.dtype), normaliser


def _forward(query, key, value, layout, seen, sliding_window):
    run = functools.partial(_forward_row, sliding_window=sliding_window)
    mixed, normaliser = jax.lax.map(
        lambda row: run(*row), (query, key, value, layout, seen)
    )
    mixed = checkpoint_name(mixed, KEPT)
    normaliser = checkpoint_name(normaliser, KEPT)
    return mixed, (query, key, value, layout, seen, mixed, normaliser)


def _backward_row(
    query, key, value, layout, seen, mixed, normaliser, gradient, *, sliding_window
):
    row = _Row(query, key, value, layout, seen, sliding_window)
    d_mixed = row.cut(gradient)
    # sum_k weight_k d_weight_k of each query: softmax's own term.
    inner = jnp.sum(d_mixed * row.cut(mixed), axis=-1, keepdims=True)

    def walk(carry: tuple[Array, Array], i: Array):
        def step(j: Array, carry: tuple[Array, Array, Array]):
            d_query, d_key, d_value = carry
            scores, seen = row.scores(i, j)
            weights = jnp.where(seen, jnp.exp(scores - normaliser[i]), 0.0)
            d_weights = jnp.einsum("KQH,KTH->KQT", d_mixed[i], row.value[j])
            d_scores = weights * (d_weights - inner[i])
            d_value = d_value.at[j].add(jnp.einsum("KQT,KQH->KTH", weights, d_mixed[i]))
            d_key = d_key.at[j].add(jnp.einsum("KQT,KQH->KTH", d_scores, row.query[i]))
            d_query = d_query + jnp.einsum("KQT,KTH->KQH", d_scores, row.key[j])
            return d_query, d_key, d_value

        start = (jnp.zeros_like(row.query[0]), *carry)
        d_query, d_key, d_value = row.walk(i, step, start)
        return (d_key, d_value), d_query * row.scale

    start = (jnp.zeros_like(row.key), jnp.zeros_like(row.value))
    (d_key, d_value), d_query = jax.lax.scan(
        walk, start, jnp.arange(row.query.shape[0])
    )
    d_key, d_value = (_from_blocks(x, row.length)[:, :, 0] for x in (d_key, d_value))
    return (
        row.join(d_query).astype(query.dtype),
        d_key.astype(key.dtype),
        d_value.astype(value.dtype),
    )


def _backward(sliding_window, residuals, gradient):
    run = functools.partial(_backward_row, sliding_window=sliding_window)
    d_query, d_key, d_value = jax.lax.map(lambda row: run(*row), (*residuals, gradient))
    return d_query, d_key, d_value, None, None


attend.defvjp(_forward, _backward)
