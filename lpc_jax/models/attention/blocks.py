"""The CPU's attention: a block of keys at a time, skipping blocks no query may see.

Each block of queries walks the blocks of keys that it sees with a running softmax
(Milakov & Gimelshein 2018; Dao et al. 2022), and the backward pass computes each block
again. Other pairs of a row, and the other answer of a pair, thus cost nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from lpc_jax.models.attention.mask import Tokens, visible
from lpc_jax.types import NO_PAIR, PROMPT

# Queries and keys in a block. Of 32, 64 and 128 the best or near it for rows of 512 to
# 2048 tokens, whether of short or of long pairs (docs/performance.md).
BLOCK = 64

# What remat policies may keep, so that the backward pass does not repeat the walk.
KEPT = "attention"

_UNSEEN = -1e30  # below any score; finite, so that a query without a key has no NaN
_FILL = (0, NO_PAIR, PROMPT)  # Tokens that fill up a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Walks:
    """For each block of queries those of keys: first the ``count`` that it sees."""

    # Any: JAX may rebuild the tree with leaves that are no arrays.
    tokens: Tokens
    index: Any  # Int[Array, "*R blocks blocks"]
    count: Any  # Int[Array, "*R blocks"]
    sliding_window: int | None = dataclasses.field(metadata={"static": True})


def prepare(tokens: Tokens, sliding_window: int | None) -> Walks:
    """A micro-batch's walks, made once for all layers."""
    padded = Tokens(*map(_padded, tokens, _FILL))
    rows = len(padded.pair)
    queries = jax.tree.map(lambda x: x.reshape(rows, -1, BLOCK).swapaxes(0, 1), padded)

    def sees(queries: Tokens) -> Bool[Array, "R blocks"]:
        seen = visible(queries, padded, sliding_window=sliding_window)
        return seen.reshape(rows, BLOCK, -1, BLOCK).any(axis=(1, 3))

    seen = jax.lax.map(sees, queries).swapaxes(0, 1)
    index = jnp.argsort(~seen, axis=-1, stable=True)
    return Walks(tokens, index, seen.sum(axis=-1), sliding_window)


def _padded(x: Int[Array, "*R T"], fill: int) -> Int[Array, "*R padded_T"]:
    padding = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % BLOCK)]
    return jnp.pad(x, padding, constant_values=fill)


@jax.custom_vjp
def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    walks: Walks,
) -> Float[Array, "R T N H"]:
    """Softmax attention, all of it in fp32; 0 for a query that sees no key."""
    return _forward(query, key, value, walks)[0]


def _cut(x: Float[Array, "T N H"], kv_heads: int) -> Float[Array, "blocks K queries H"]:
    """Into blocks of fp32; the queries that share a key head lie side by side."""
    length, _, width = x.shape
    x = x.astype(jnp.float32).reshape(length, kv_heads, -1, width)
    x = jnp.pad(x, ((0, -length % BLOCK), (0, 0), (0, 0), (0, 0)))
    x = x.reshape(-1, BLOCK, *x.shape[1:]).transpose(0, 2, 3, 1, 4)
    return x.reshape(len(x), kv_heads, -1, width)


def _join(x: Float[Array, "blocks K queries H"], length: int) -> Float[Array, "T N H"]:
    blocks, kv_heads, _, width = x.shape
    x = x.reshape(blocks, kv_heads, -1, BLOCK, width).transpose(0, 3, 1, 2, 4)
    return x.reshape(blocks * BLOCK, -1, width)[:length]


class _Row:
    def __init__(self, query, key, value, walks: Walks):
        kv_heads, width = key.shape[1:]
        self.group = query.shape[1] // kv_heads
        self.scale = 1 / math.sqrt(width)
        self.query = _cut(query, kv_heads) * self.scale
        self.key, self.value = _cut(key, kv_heads), _cut(value, kv_heads)
        self.tokens = Tokens(
            *(
                _padded(x, fill).reshape(-1, BLOCK)
                for x, fill in zip(walks.tokens, _FILL, strict=True)
            )
        )
        self.walks = walks

    def walk(self, i: Array, step: Callable[[Array, Any], Any], start: Any) -> Any:
        """``step(j, carry)`` over the blocks of keys that query block i sees."""

        def turn(n: Array, carry: Any) -> Any:
            return step(self.walks.index[i, n], carry)

        # Its length is the data's, which JAX does not differentiate: hence _backward.
        return jax.lax.fori_loop(0, self.walks.count[i], turn, start)

    def scores(self, i: Array, j: Array) -> tuple[Array, Array]:
        """Scores of query block i on key block j, and which of them are allowed."""
        queries, keys = (Tokens(*(x[block] for x in self.tokens)) for block in (i, j))
        seen = visible(queries, keys, sliding_window=self.walks.sliding_window)
        seen = jnp.tile(seen, (self.group, 1))
        return jnp.einsum("KQH,KTH->KQT", self.query[i], self.key[j]), seen


def _forward_row(query, key, value, walks: Walks):
    row = _Row(query, key, value, walks)
    blocks, kv_heads, queries, width = row.query.shape

    def walk(i: Array) -> tuple[Array, Array]:
        def step(j: Array, carry: tuple[Array, Array, Array]):
            mixed, largest, total = carry
            scores, seen = row.scores(i, j)
            scores = jnp.where(seen, scores, _UNSEEN)
            new_largest = jnp.maximum(largest, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_largest)
            # What was summed under a smaller maximum is rescaled.
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
        # With the log-normaliser alone the backward pass has the weights by one exp.
        return mixed / total, largest + jnp.log(total)

    mixed, normaliser = jax.lax.map(walk, jnp.arange(blocks))
    return _join(mixed, len(query)).astype(query.dtype), normaliser


def _forward(query, key, value, walks: Walks):
    rows = (query, key, value, walks)
    # Row after row: under vmap a block would walk as far as the longest of all rows.
    mixed, normaliser = jax.lax.map(lambda row: _forward_row(*row), rows)
    mixed = checkpoint_name(mixed, KEPT)
    normaliser = checkpoint_name(normaliser, KEPT)
    return mixed, (*rows, mixed, normaliser)


def _backward_row(query, key, value, walks: Walks, mixed, normaliser, gradient):
    row = _Row(query, key, value, walks)
    d_mixed, mixed = (_cut(x, key.shape[1]) for x in (gradient, mixed))
    # softmax's own term: sum_k weight_k d_weight_k = d_mixed . mixed of each query.
    inner = jnp.sum(d_mixed * mixed, axis=-1, keepdims=True)

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
    blocks = jnp.arange(len(row.query))
    (d_key, d_value), d_query = jax.lax.scan(walk, start, blocks)
    gradients = ((d_query, query), (d_key, key), (d_value, value))
    return tuple(_join(d, len(x)).astype(x.dtype) for d, x in gradients)


def _backward(kept, gradient):
    rows = (*kept, gradient)
    return *jax.lax.map(lambda row: _backward_row(*row), rows), None


attend.defvjp(_forward, _backward)
