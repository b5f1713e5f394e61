"""The LM head in tiles: logits, their normalisers and gradients, on one device or many.

A chunk of positions meets a tile of the head's rows at a time, with a running
log-sum-exp, and the backward pass computes these products again. On a mesh every device
scores its own rows against its part of the vocabulary; a tile is gathered over ``fsdp``
in its turn, and its gradient summed and scattered.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from lpc_jax.losses import tiles
from lpc_jax.losses.tiles import Split, Tile


# By hand, since JAX differentiates no loop whose length the data decides.
@jax.custom_vjp
def score(
    hidden: Float[Array, "chunks R chunk D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "chunks R chunk"],
    mask: Bool[Array, "chunks R chunk"],
) -> Float[Array, "chunks R chunk"]:
    """Log-probabilities of tokens; 0 in chunks after the last scored position."""
    return rank(hidden, head, tokens, mask)[0]


def rank(hidden, head, tokens, mask):
    """Scores, whether each token has the largest logit, and the normalisers."""
    split = Split.of(tokens, head)
    return split.run(_rank_part, split.chunks, hidden, head, tokens, mask)


def _rank_part(hidden, head, tokens, mask, *, split):
    chunks = tiles.chunks_to_score(mask)

    # The outer loop is over tiles: each is gathered once for all chunks.
    def meet_tile(i, carry):
        tile = Tile.of(head, i, hidden.dtype, split)

        def meet_chunk(j, carry):
            largest, total, picked = (x[j] for x in carry)
            logits = tile.logits(hidden[j])
            place, logit = tile.pick(logits, tokens[j])
            # log-sum-exp as it goes: total is the sum of exp(logit - largest) so far,
            # rescaled whenever a tile has a larger logit than all before.
            new_largest = jnp.maximum(largest, logits.max(axis=-1))
            new_total = total * jnp.exp(largest - new_largest) + jnp.sum(
                jnp.exp(logits - new_largest[..., None]), axis=-1
            )
            new = (new_largest, new_total, jnp.where(place < 0, picked, logit))
            return tuple(x.at[j].set(y) for x, y in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, chunks, meet_chunk, carry)

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    count, _ = tiles.count_and_size(head.shape[0])
    largest, total, picked = jax.lax.fori_loop(
        0, count, meet_tile, (zeros + tiles.UNSEEN, zeros, zeros)
    )
    if split.vocabulary is not None:
        # Each device's total is below its own largest; a token's logit is 0 elsewhere.
        own, largest = largest, jax.lax.pmax(largest, split.vocabulary)
        total = jax.lax.psum(total * jnp.exp(own - largest), split.vocabulary)
        picked = jax.lax.psum(picked, split.vocabulary)
    computed = (jnp.arange(tokens.shape[0]) < chunks)[:, None, None]
    normaliser = jnp.where(computed, largest + jnp.log(total), 0.0)
    return picked - normaliser, picked >= largest, normaliser


def _score_forward(hidden, head, tokens, mask):
    arguments = (hidden.value, head.value, tokens.value, mask.value)
    scores, _, normalisers = rank(*arguments)
    # An empty tuple where the head takes a gradient, None where it is frozen: a tree's
    # structure is known when compiling, and a frozen head then costs neither the
    # product nor an array of its size.
    trained = () if head.perturbed else None
    return scores, (*arguments, normalisers, trained)


def _score_backward(residuals, gradient):
    hidden, head, tokens, mask, normalisers, trained = residuals
    split = Split.of(tokens, head)
    part = functools.partial(_differentiate_part, trains_head=trained is not None)
    out_specs = (split.chunks, None if trained is None else split.head)
    columns = (tokens, mask, normalisers, gradient)
    return *split.run(part, out_specs, hidden, head, *columns), None, None


def _differentiate_part(
    hidden, head, tokens, mask, normalisers, gradient, *, split, trains_head
):
    chunks = tiles.chunks_to_score(mask)

    def meet_tile(i, carry):
        d_hidden, d_head = carry
        tile = Tile.of(head, i, hidden.dtype, split)

        def meet_chunk(j, carry):
            d_hidden, d_weight = carry
            logits = tile.logits(hidden[j])
            # d log p(token) = one-hot(token) - p.
            probabilities = jnp.exp(logits - normalisers[j][..., None])
            one_hot = jax.nn.one_hot(tile.places(tokens[j]), logits.shape[-1])
            d_logits = (one_hot - probabilities) * gradient[j][..., None]
            d_logits = d_logits.astype(hidden.dtype)
            fp32 = {"preferred_element_type": jnp.float32}
            of_hidden = jnp.einsum("RQV,VD->RQD", d_logits, tile.weight, **fp32)
            d_hidden = d_hidden.at[j].add(of_hidden)
            if d_weight is None:
                return d_hidden, None
            # Rows and positions as one axis, for the reason in models/projection.py.
            flat = (x.reshape(-1, x.shape[-1]) for x in (d_logits, hidden[j]))
            own = {"preferred_element_type": d_weight.dtype}
            return d_hidden, d_weight + jnp.einsum("QV,QD->VD", *flat, **own)

        start = jnp.zeros(tile.weight.shape, head.dtype) if trains_head else None
        d_hidden, d_weight = jax.lax.fori_loop(0, chunks, meet_chunk, (d_hidden, start))
        if d_head is None:
            return d_hidden, None
        d_weight = split.scatter_sum(d_weight)
        # Added: the last tile may repeat rows of the one before, with zeros.
        before = jax.lax.dynamic_slice_in_dim(d_head, tile.start, len(d_weight))
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(
            d_head, before + d_weight, tile.start, axis=0
        )

    d_head = jnp.zeros_like(head) if trains_head else None
    start = jnp.zeros(hidden.shape, jnp.float32), d_head
    count, _ = tiles.count_and_size(head.shape[0])
    d_hidden, d_head = jax.lax.fori_loop(0, count, meet_tile, start)
    d_hidden = split.over_vocabulary(jax.lax.psum, d_hidden)
    return d_hidden.astype(hidden.dtype), d_head


score.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def slope_part(hidden, head, tokens, slot, mask, *, answers, split):
    """Scores of one device's rows, and each answer's gradient in a vector added."""
    # The gradient is the sum of w[token_t] - sum_v p_t(v) w[v] over positions t:
    # probabilities are summed over these first, and meet the head's rows w once.
    count, size = tiles.count_and_size(head.shape[0])
    rows, positions = tokens.shape[1:]

    def meet_chunk(j, carry):
        scores, summed = carry

        def meet_tile(i, carry):
            exps, shift, total, picked = carry
            tile = Tile.of(head, i, hidden.dtype, split)
            logits, largest, exp = tile.exponentials(hidden[j])
            place, logit = tile.pick(logits, tokens[j])
            return (
                exps.at[i].set(exp),
                shift.at[i].set(largest),
                total.at[i].set(exp.sum(axis=-1)),
                jnp.where(place < 0, picked, logit),
            )

        # All tiles' are held: what to divide them by is known after the last.
        zeros = jnp.zeros((count, rows, positions), jnp.float32)
        exps = jnp.zeros((*zeros.shape, size), jnp.float32)
        exps, shift, total, picked = jax.lax.fori_loop(
            0, count, meet_tile, (exps, zeros, zeros, zeros[0])
        )
        normaliser = tiles.normaliser(shift, total, split)
        picked = split.over_vocabulary(jax.lax.psum, picked)
        of_answer = jax.nn.one_hot(slot[j], answers) * mask[j][..., None]

        def sum_tile(i, summed):
            # exp(logit - largest) exp(largest - normaliser) is the probability.
            share = of_answer * jnp.exp(shift[i] - normaliser)[..., None]
            # HIGHEST: by default a TPU rounds fp32 operands to bf16.
            of_tile = jnp.einsum(
                "RQA,RQV->RAV", share, exps[i], precision=jax.lax.Precision.HIGHEST
            )
            # The last tile repeats rows of the one before, as Tile.of: exp is 0 there.
            start = jnp.minimum(i * size, head.shape[0] - size)
            before = jax.lax.dynamic_slice_in_dim(summed, start, size, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(
                summed, before + of_tile, start, axis=2
            )

        summed = jax.lax.fori_loop(0, count, sum_tile, summed)
        return scores.at[j].set(picked - normaliser), summed

    # Probabilities of each token, summed over an answer's positions.
    summed = jnp.zeros((rows, answers, head.shape[0]), jnp.float32)
    scores = jnp.zeros(tokens.shape, jnp.float32)
    chunks = tiles.most_chunks(mask, split)
    scores, summed = jax.lax.fori_loop(0, chunks, meet_chunk, (scores, summed))
    # d log p(token) = one-hot(token) - p.
    local = tokens - split.first_token(head.shape[0])
    known = mask & (local >= 0) & (local < head.shape[0])
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], tokens.shape)
    # Tokens of other devices and of padding are put beyond the end, and dropped there.
    local = jnp.where(known, local, head.shape[0])
    d_logits = (-summed).at[row, slot, local].add(1.0, mode="drop")

    def meet_head(i, slope):
        tile = Tile.of(head, i, hidden.dtype, split)
        of_tile = jax.lax.dynamic_slice_in_dim(d_logits, tile.start, size, axis=2)
        if tile.repeated is not None:  # the tile before has had these rows
            of_tile = jnp.where(jnp.arange(size) < tile.repeated, 0.0, of_tile)
        weight = tile.weight.astype(jnp.float32)
        return slope + jnp.einsum("RAV,VD->RAD", of_tile, weight)

    zeros = jnp.zeros((rows, answers, hidden.shape[-1]), jnp.float32)
    slope = jax.lax.fori_loop(0, count, meet_head, zeros)
    return scores, split.over_vocabulary(jax.lax.psum, slope)


def under_part(hidden, head, tokens, mask, moved, *, split):
    """Scores of one device's rows under each change of the logits, ``moved``."""
    count, size = tiles.count_and_size(head.shape[0])
    vectors = len(moved)

    def meet_chunk(j, scores):
        def meet_tile(i, carry):
            shift, total, picked = carry
            tile = Tile.of(head, i, hidden.dtype, split)
            logits, largest, exp = tile.exponentials(hidden[j])
            place, logit = tile.pick(logits, tokens[j])
            change = jax.lax.dynamic_slice_in_dim(moved, tile.start, size, axis=1)
            # Both factors are at most 1: exp((h + z) w) less the two largest logits.
            most = change.max(axis=1)
            of_tile = jnp.einsum(
                "RQV,MV->MRQ",
                exp,
                jnp.exp(change - most[:, None]),
                precision=jax.lax.Precision.HIGHEST,
            )
            now = jnp.where(place < 0, picked, logit + change[:, place])
            return (
                shift.at[i].set(largest + most[:, None, None]),
                total.at[i].set(of_tile),
                now,
            )

        zeros = jnp.zeros((count, vectors, *tokens.shape[1:]), jnp.float32)
        shift, total, picked = jax.lax.fori_loop(
            0, count, meet_tile, (zeros, zeros, zeros[0])
        )
        picked = split.over_vocabulary(jax.lax.psum, picked)
        return scores.at[:, j].set(picked - tiles.normaliser(shift, total, split))

    scores = jnp.zeros((vectors, *tokens.shape), jnp.float32)
    return jax.lax.fori_loop(0, tiles.most_chunks(mask, split), meet_chunk, scores)
