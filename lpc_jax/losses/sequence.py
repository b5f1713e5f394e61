"""Hidden states to log-probabilities of tokens, and of whole answers."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from lpc_jax.losses import head as heads
from lpc_jax.losses.tiles import Split

# Positions of a row whose probabilities are held at once for the whole vocabulary.
HELD = 128


def token_logp(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    chunk: int,
) -> Float[Array, "R S"]:
    """log softmax(head @ hidden)[token] at every scored position, in nats and fp32.

    Gradient flows into ``hidden`` (plus z) and ``head``, which is cast tile by tile so
    that its gradient is summed in its own precision. Chunks after the last scored
    position of a device's longest row hold 0 and are not computed, forward or backward.
    """
    positions = tokens.shape[1]
    hidden, tokens, mask = _in_chunks(chunk, hidden, tokens, mask)
    return _from_chunks(heads.score(hidden, head, tokens, mask), positions)


def token_logp_and_greedy(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    chunk: int,
) -> tuple[Float[Array, "R S"], Bool[Array, "R S"]]:
    """``token_logp`` without a gradient, and whether no token has a larger logit."""
    positions = tokens.shape[1]
    hidden, tokens, mask = _in_chunks(chunk, hidden, tokens, mask)
    logp, greedy, _ = heads.rank(hidden, head, tokens, mask)
    return _from_chunks(logp, positions), _from_chunks(greedy, positions)


def token_logp_and_slope(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    slot: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    pair_slots: int,
    chunk: int,
) -> tuple[Float[Array, "R S"], Float[Array, "R P 2 D"]]:
    """``token_logp``, and each answer's gradient in a vector added to its states.

    One product with the head where ``token_logp`` and its gradient take three: an
    answer's probabilities are summed before they meet it. No gradient flows. ``slot``
    is ``2 * pair slot + side``, and ``chunk`` is at most ``HELD``.
    """
    positions = tokens.shape[1]
    columns = _in_chunks(min(chunk, HELD), hidden, tokens, slot, mask)
    hidden, tokens, slot, mask = jax.lax.stop_gradient(columns)
    head = jax.lax.stop_gradient(head)
    split = Split.of(tokens, head)
    part = functools.partial(heads.slope_part, answers=2 * pair_slots)
    specs = (split.chunks, P(split.rows))
    logp, slope = split.run(part, specs, hidden, head, tokens, slot, mask)
    slope = slope.reshape(slope.shape[0], pair_slots, 2, -1)
    return _from_chunks(logp, positions), slope


def token_logp_under(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    vectors: Float[Array, "M D"],
    tokens: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    chunk: int,
) -> Float[Array, "M R S"]:
    """``token_logp`` under each vector added to all hidden states; no gradient flows.

    One product with the head serves all: exp((h + z) w) = exp(h w) exp(z w). The
    vectors' logits must lie within 80 nats of each other, or fp32's exp underflows.
    """
    positions = tokens.shape[1]
    hidden, tokens, mask = _in_chunks(chunk, hidden, tokens, mask)
    moved = jnp.einsum("MD,VD->MV", vectors, head.astype(jnp.float32))
    split = Split.of(tokens, head)
    specs = P(None, None, split.rows)
    columns = (hidden, head, tokens, mask)
    logp = split.run(heads.under_part, specs, *columns, moved=moved)
    return jax.vmap(lambda of_vector: _from_chunks(of_vector, positions))(logp)


def _in_chunks(chunk: int, *columns: Shaped[Array, "R S ..."]) -> list[Any]:
    """[R S ...] as [chunks R chunk ...], the last chunk filled up with zeros."""
    chunk = min(chunk, columns[0].shape[1])

    def split(x: Array) -> Array:
        padding = [(0, 0)] * x.ndim
        padding[1] = (0, -x.shape[1] % chunk)
        x = jnp.pad(x, padding)
        return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)

    return [split(x) for x in columns]


def _from_chunks(
    x: Shaped[Array, "chunks R chunk"], positions: int
) -> Shaped[Array, "R S"]:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :positions]


def sum_by_answer(
    values: Num[Array, "R S"],
    slot: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    pair_slots: int,
) -> Float[Array, "R P 2"]:
    """Sums values of scored positions over each answer; padding's may be anything."""
    kept = jnp.where(mask, values, 0.0)
    one_hot = jax.nn.one_hot(slot, 2 * pair_slots, dtype=kept.dtype)
    # One-hot products keep rows apart, so that rows may live on different devices;
    # HIGHEST because a sum of log-probabilities must not be rounded to bf16 terms.
    sums = jnp.einsum("RS,RSA->RA", kept, one_hot, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*sums.shape[:1], pair_slots, 2)
