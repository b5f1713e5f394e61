"""Hidden states to log-probabilities of tokens, and of whole answers.

Knows nothing of decoders or losses. No array of all scored positions x vocabulary is
ever held: a chunk of positions meets a tile of the head's rows at a time, with a
running log-sum-exp, and the backward pass computes each of these products again (or,
where all hidden states of an answer share their gradient, none). On a mesh every device
scores its own rows against its own part of the vocabulary; a tile of the head is
gathered over ``fsdp`` when its turn comes, and its gradient summed and scattered then.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from lpc_jax import axes

# Rows of the head in a tile: the gradient of so many stays in a CPU's cache while
# positions are added to it (docs/performance.md).
TILE = 4096
# A tile's rows are a multiple of it where the vocabulary is larger: gradients of other
# sizes, such as Llama 3's 4,008, the TPU's compiler sums whole on every device before
# each keeps its part (docs/pods.md).
_TILE_UNIT = 32

# Positions of a row whose probabilities are held at once for the whole vocabulary.
HELD = 128

# Below any logit; finite, so that nothing seen yet has no NaN.
_UNSEEN = -1e30


def token_logp(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    chunk: int,
) -> Float[Array, "R S"]:
    """log softmax(head @ hidden)[token] at every scored position, in fp32.

    Args:
        hidden: Last hidden states (plus z) in the compute dtype; gradient flows.
        head: The LM head; cast to the dtype of ``hidden`` tile by tile, so that
            its gradient is summed in its own precision.
        tokens: The token to score at each position.
        mask: False where a position is padding. Chunks after the last scored position
            of a device's longest row are not computed, forward or backward.
        chunk: Positions of a row scored at a time.

    Returns:
        Log-probabilities in nats; 0 in chunks that were not computed.
    """
    positions = tokens.shape[1]
    chunk = min(chunk, positions)
    hidden, tokens, mask = (_in_chunks(x, chunk) for x in (hidden, tokens, mask))
    return _from_chunks(_score(hidden, head, tokens, mask), positions)


def token_logp_and_greedy(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    chunk: int,
) -> tuple[Float[Array, "R S"], Bool[Array, "R S"]]:
    """``token_logp``, and whether no other token has a larger logit.

    Args:
        hidden: As in ``token_logp``; likewise the others. No gradient flows.
        head: The LM head.
        tokens: The token to score at each position.
        mask: False where a position is padding, whose results mean nothing.
        chunk: Positions of a row scored at a time.

    Returns:
        Log-probabilities in nats, and True where the token is the likeliest or one of
        several equals.
    """
    positions = tokens.shape[1]
    chunk = min(chunk, positions)
    hidden, tokens, mask = (_in_chunks(x, chunk) for x in (hidden, tokens, mask))
    split = _Split.of(tokens, head)
    chunks = split.chunks
    run = split.run(_rank_part, (chunks, split.head, chunks, chunks), (chunks, chunks))
    logp, greedy = run(hidden, head, tokens, mask)
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
    """``token_logp``, and how each answer's sum changes with a vector added to it.

    One product with the head where ``token_logp`` and its gradient take three: what is
    the same for all of an answer's hidden states meets the head once, after their
    probabilities are summed. A chunk's probabilities are held for the whole vocabulary.

    Args:
        hidden: As in ``token_logp``; likewise head, tokens, mask and chunk. No gradient
            flows into any of them.
        head: The LM head.
        tokens: The token to score at each position.
        slot: ``2 * pair slot + side`` of each position.
        mask: False where a position is padding.
        pair_slots: P.
        chunk: Positions of a row scored at a time.

    Returns:
        Log-probabilities in nats; and the gradient of each answer's summed one in a
        vector that is added to all its hidden states, in fp32.
    """
    positions = tokens.shape[1]
    chunk = min(chunk, positions, HELD)
    inputs = (_in_chunks(x, chunk) for x in (hidden, tokens, slot, mask))
    hidden, tokens, slot, mask = jax.lax.stop_gradient(tuple(inputs))
    split = _Split.of(tokens, head)
    chunks = split.chunks
    run = split.run(
        functools.partial(_slope_part, answers=2 * pair_slots),
        (chunks, split.head, *3 * (chunks,)),
        (chunks, P(split.rows)),
    )
    logp, slope = run(hidden, jax.lax.stop_gradient(head), tokens, slot, mask)
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
    """``token_logp`` under each of some vectors added to all hidden states.

    The hidden states meet the head once for all of them, since
    exp((h + z) w) = exp(h w) exp(z w). No gradient flows.

    Args:
        hidden: As in ``token_logp``; likewise head, tokens, mask and chunk.
        head: The LM head.
        vectors: What is added. Their logits must lie within 80 nats of each other.
        tokens: The token to score at each position.
        mask: False where a position is padding.
        chunk: Positions of a row scored at a time.
    """
    positions = tokens.shape[1]
    chunk = min(chunk, positions)
    hidden, tokens, mask = (_in_chunks(x, chunk) for x in (hidden, tokens, mask))
    moved = jnp.einsum("MD,VD->MV", vectors, head.astype(jnp.float32))
    split = _Split.of(tokens, head)
    chunks = split.chunks
    run = split.run(
        _under_part,
        (chunks, split.head, P(None, split.vocabulary), chunks, chunks),
        P(None, None, split.rows),
    )
    logp = run(hidden, head, moved, tokens, mask)
    return jax.vmap(lambda x: _from_chunks(x, positions))(logp)


def _in_chunks(
    x: Num[Array, "R S ..."] | Bool[Array, "R S"], chunk: int
) -> Num[Array, "chunks R chunk ..."] | Bool[Array, "chunks R chunk"]:
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _from_chunks(
    x: Shaped[Array, "chunks R chunk"], positions: int
) -> Shaped[Array, "R S"]:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)[:, :positions]


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes over which rows, the vocabulary and the head's width lie."""

    rows: tuple[str, ...] | None
    vocabulary: tuple[str, ...] | None
    width: tuple[str, ...] | None

    @classmethod
    def of(cls, tokens: Array, head: Array) -> _Split:
        return cls(
            axes.split_over("R", tokens.shape[1]),
            axes.split_over("V", head.shape[0]),
            axes.split_over("D", head.shape[1]),
        )

    def run(self, function: Callable[..., Any], specs: Any, out_specs: Any) -> Any:
        """The function as each device runs it on its part; alone, on everything."""
        local = functools.partial(function, split=self)
        if self == _Split(None, None, None):
            return local
        return jax.shard_map(
            local, in_specs=specs, out_specs=out_specs, check_vma=False
        )

    @property
    def head(self) -> P:
        return P(self.vocabulary, self.width)

    @property
    def chunks(self) -> P:
        return P(None, self.rows)

    def first_token(self, vocabulary: int) -> Int[Array, ""] | int:
        """The token of this device's first row of the head."""
        if self.vocabulary is None:
            return 0
        return jax.lax.axis_index(self.vocabulary) * vocabulary

    def gather(self, tile: Float[Array, "tile part"]) -> Float[Array, "tile D"]:
        if self.width is None:
            return tile
        return jax.lax.all_gather(tile, self.width, axis=1, tiled=True)

    def scatter_sum(self, tile: Float[Array, "tile D"]) -> Float[Array, "tile part"]:
        """A tile's gradient summed over all rows, of which each keeps its part."""
        others = tuple(a for a in self.rows or () if a not in (self.width or ()))
        if others:
            tile = jax.lax.psum(tile, others)
        if self.width is None:
            return tile
        if self.rows is None or not set(self.width) <= set(self.rows):
            # Rows are not split over these axes: every device has the whole sum.
            part = tile.shape[1] // jax.lax.axis_size(self.width)
            start = jax.lax.axis_index(self.width) * part
            return jax.lax.dynamic_slice_in_dim(tile, start, part, axis=1)
        return jax.lax.psum_scatter(tile, self.width, scatter_dimension=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class _Tile:
    """Some rows of the head, and where they are.

    Attributes:
        weight: The rows.
        start: The first one's place in the device's part of the head.
        repeated: How many of the first were in the tile before already; only the last
            tile of a vocabulary that is no multiple of its size has any.
    """

    weight: Float[Array, "tile D"]
    start: Int[Array, ""]
    repeated: Int[Array, ""] | None

    def logits(self, hidden: Float[Array, "R chunk D"]) -> Float[Array, "R chunk tile"]:
        found = jnp.einsum(
            "RQD,VD->RQV", hidden, self.weight, preferred_element_type=jnp.float32
        )
        if self.repeated is None:
            return found
        return jnp.where(jnp.arange(found.shape[-1]) < self.repeated, _UNSEEN, found)

    def places(self, tokens: Int[Array, "R chunk"]) -> Int[Array, "R chunk"]:
        """Of tokens among the tile's rows; -1 for one that is not in it."""
        place = tokens - self.start
        first = 0 if self.repeated is None else self.repeated
        within = (place >= first) & (place < self.weight.shape[0])
        return jnp.where(within, place, -1)


def _tiles(vocabulary: int) -> tuple[int, int]:
    """How many tiles, and rows in each."""
    even = -(-vocabulary // -(-vocabulary // TILE))
    size = min(even + -even % _TILE_UNIT, vocabulary)
    return -(-vocabulary // size), size


def _tile(head: Array, i: Array, dtype: Any, split: _Split) -> _Tile:
    vocabulary = head.shape[0]
    _, size = _tiles(vocabulary)
    start = jnp.minimum(i * size, vocabulary - size)
    weight = jax.lax.dynamic_slice_in_dim(head, start, size).astype(dtype)
    repeated = i * size - start if vocabulary % size else None
    return _Tile(split.gather(weight), start, repeated)


def _chunks_to_score(mask: Bool[Array, "chunks R chunk"]) -> Int[Array, ""]:
    scored = jnp.any(mask, axis=(1, 2))
    return jnp.max(jnp.where(scored, jnp.arange(1, scored.shape[0] + 1), 0))


def _most_chunks(mask: Bool[Array, "chunks R chunk"], split: _Split) -> Int[Array, ""]:
    """Of any device: where each chunk meets all tiles, they gather these together."""
    chunks = _chunks_to_score(mask)
    return chunks if split.rows is None else jax.lax.pmax(chunks, split.rows)


# By hand, since JAX differentiates no loop whose length the data decides.
@jax.custom_vjp
def _score(
    hidden: Float[Array, "chunks R chunk D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "chunks R chunk"],
    mask: Bool[Array, "chunks R chunk"],
) -> Float[Array, "chunks R chunk"]:
    return _scores_and_normalisers(hidden, head, tokens, mask)[0]


def _scores_and_normalisers(hidden, head, tokens, mask):
    split = _Split.of(tokens, head)
    chunks = split.chunks
    run = split.run(_score_part, (chunks, split.head, chunks, chunks), (chunks, chunks))
    return run(hidden, head, tokens, mask)


def _score_part(hidden, head, tokens, mask, *, split):
    """Scores and normalisers of one device's rows."""
    picked, _, normaliser = _meet_head(hidden, head, tokens, mask, split)
    return picked - normaliser, normaliser


def _rank_part(hidden, head, tokens, mask, *, split):
    """Scores of one device's rows, and which are of the largest logit."""
    picked, largest, normaliser = _meet_head(hidden, head, tokens, mask, split)
    return picked - normaliser, picked >= largest


def _meet_head(hidden, head, tokens, mask, split):
    """Tokens' logits, the largest ones, and normalisers of one device's rows."""
    tokens = tokens - split.first_token(head.shape[0])
    chunks = _chunks_to_score(mask)

    def meet_tile(i, carry):
        tile = _tile(head, i, hidden.dtype, split)

        def meet_chunk(j, carry):
            largest, total, picked = (x[j] for x in carry)
            logits = tile.logits(hidden[j])
            place = tile.places(tokens[j])
            logit = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
            new_largest = jnp.maximum(largest, logits.max(axis=-1))
            new_total = total * jnp.exp(largest - new_largest) + jnp.sum(
                jnp.exp(logits - new_largest[..., None]), axis=-1
            )
            new = (new_largest, new_total, jnp.where(place < 0, picked, logit))
            return tuple(x.at[j].set(y) for x, y in zip(carry, new, strict=True))

        return jax.lax.fori_loop(0, chunks, meet_chunk, carry)

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    count, _ = _tiles(head.shape[0])
    largest, total, picked = jax.lax.fori_loop(
        0, count, meet_tile, (zeros + _UNSEEN, zeros, zeros)
    )
    if split.vocabulary is not None:
        own, largest = largest, jax.lax.pmax(largest, split.vocabulary)
        total = jax.lax.psum(total * jnp.exp(own - largest), split.vocabulary)
        picked = jax.lax.psum(picked, split.vocabulary)
    computed = (jnp.arange(tokens.shape[0]) < chunks)[:, None, None]
    normaliser = jnp.where(computed, largest + jnp.log(total), 0.0)
    return picked, largest, normaliser


def _score_forward(hidden, head, tokens, mask):
    arguments = (hidden.value, head.value, tokens.value, mask.value)
    scores, normalisers = _scores_and_normalisers(*arguments)
    # An empty tuple where the head's gradient is asked for: known to the compiler, so
    # that a frozen head costs neither the product nor an array of its size.
    asked = () if head.perturbed else None
    return scores, (*arguments, normalisers, asked)


def _score_backward(residuals, gradient):
    hidden, head, tokens, mask, normalisers, asked = residuals
    split = _Split.of(tokens, head)
    chunks, of_head = split.chunks, None if asked is None else split.head
    run = split.run(
        functools.partial(_differentiate_part, head_asked=asked is not None),
        (chunks, split.head, *4 * (chunks,)),
        (chunks, of_head),
    )
    d_hidden, d_head = run(hidden, head, tokens, mask, normalisers, gradient)
    return d_hidden, d_head, None, None


def _differentiate_part(
    hidden, head, tokens, mask, normalisers, gradient, *, split, head_asked
):
    """Gradients of one device's rows and of its part of the head."""
    tokens = tokens - split.first_token(head.shape[0])
    chunks = _chunks_to_score(mask)

    def meet_tile(i, carry):
        d_hidden, d_head = carry
        tile = _tile(head, i, hidden.dtype, split)

        def meet_chunk(j, carry):
            d_hidden, d_weight = carry
            logits = tile.logits(hidden[j])
            # d log p(token) = one-hot(token) - p.
            d_logits = jax.nn.one_hot(
                tile.places(tokens[j]), logits.shape[-1]
            ) - jnp.exp(logits - normalisers[j][..., None])
            d_logits = (d_logits * gradient[j][..., None]).astype(hidden.dtype)
            of_hidden = jnp.einsum(
                "RQV,VD->RQD",
                d_logits,
                tile.weight,
                preferred_element_type=jnp.float32,
            )
            d_hidden = d_hidden.at[j].add(of_hidden)
            if d_weight is None:
                return d_hidden, None
            flat = (x.reshape(-1, x.shape[-1]) for x in (d_logits, hidden[j]))
            of_weight = jnp.einsum(
                "QV,QD->VD", *flat, preferred_element_type=d_weight.dtype
            )
            return d_hidden, d_weight + of_weight

        start = jnp.zeros(tile.weight.shape, head.dtype) if head_asked else None
        d_hidden, d_weight = jax.lax.fori_loop(0, chunks, meet_chunk, (d_hidden, start))
        if d_head is None:
            return d_hidden, None
        d_weight = split.scatter_sum(d_weight)
        # Added: the last tile may repeat rows of the one before, with zeros.
        before = jax.lax.dynamic_slice_in_dim(d_head, tile.start, len(d_weight))
        return d_hidden, jax.lax.dynamic_update_slice_in_dim(
            d_head, before + d_weight, tile.start, axis=0
        )

    zeros = (
        jnp.zeros(hidden.shape, jnp.float32),
        jnp.zeros_like(head) if head_asked else None,
    )
    count, _ = _tiles(head.shape[0])
    d_hidden, d_head = jax.lax.fori_loop(0, count, meet_tile, zeros)
    if split.vocabulary is not None:
        d_hidden = jax.lax.psum(d_hidden, split.vocabulary)
    return d_hidden.astype(hidden.dtype), d_head


_score.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


def _exponentials(tile: _Tile, hidden: Array) -> tuple[Array, Array, Array]:
    """Logits of a chunk, the largest of each position, and exp of what is below it."""
    logits = tile.logits(hidden)
    largest = logits.max(axis=-1)
    return logits, largest, jnp.exp(logits - largest[..., None])


def _slope_part(hidden, head, tokens, slot, mask, *, answers, split):
    """Scores of one device's rows, and its answers' slopes."""
    tokens = tokens - split.first_token(head.shape[0])
    count, size = _tiles(head.shape[0])
    rows, positions = tokens.shape[1:]

    def meet_chunk(j, carry):
        scores, said = carry

        def meet_tile(i, carry):
            exps, shift, total, picked = carry
            tile = _tile(head, i, hidden.dtype, split)
            logits, largest, exp = _exponentials(tile, hidden[j])
            place = tile.places(tokens[j])
            logit = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
            return (
                exps.at[i].set(exp),
                shift.at[i].set(largest),
                total.at[i].set(exp.sum(axis=-1)),
                jnp.where(place < 0, picked, logit),
            )

        zeros = jnp.zeros((count, rows, positions), jnp.float32)
        exps, shift, total, picked = jax.lax.fori_loop(
            0,
            count,
            meet_tile,
            (jnp.zeros((*zeros.shape, size), jnp.float32), zeros, zeros, zeros[0]),
        )
        normaliser = _normaliser(shift, total, split)
        if split.vocabulary is not None:
            picked = jax.lax.psum(picked, split.vocabulary)
        of_answer = jax.nn.one_hot(slot[j], answers) * mask[j][..., None]

        def sum_tile(i, said):
            share = of_answer * jnp.exp(shift[i] - normaliser)[..., None]
            found = jnp.einsum(
                "RQA,RQV->RAV", share, exps[i], precision=jax.lax.Precision.HIGHEST
            )
            start = jnp.minimum(i * size, head.shape[0] - size)
            before = jax.lax.dynamic_slice_in_dim(said, start, size, axis=2)
            return jax.lax.dynamic_update_slice_in_dim(
                said, before + found, start, axis=2
            )

        said = jax.lax.fori_loop(0, count, sum_tile, said)
        return scores.at[j].set(picked - normaliser), said

    said = jnp.zeros((rows, answers, head.shape[0]), jnp.float32)
    scores, said = jax.lax.fori_loop(
        0,
        _most_chunks(mask, split),
        meet_chunk,
        (jnp.zeros(tokens.shape, jnp.float32), said),
    )
    # d log p(token) = one-hot(token) - p.
    known = mask & (tokens >= 0) & (tokens < head.shape[0])
    row = jnp.broadcast_to(jnp.arange(rows)[:, None], tokens.shape)
    token = jnp.where(known, tokens, head.shape[0])
    d_logits = (-said).at[row, slot, token].add(1.0, mode="drop")

    def meet_head(i, slope):
        tile = _tile(head, i, hidden.dtype, split)
        of_tile = jax.lax.dynamic_slice_in_dim(d_logits, tile.start, size, axis=2)
        if tile.repeated is not None:
            of_tile = jnp.where(jnp.arange(size) < tile.repeated, 0.0, of_tile)
        return slope + jnp.einsum(
            "RAV,VD->RAD", of_tile, tile.weight.astype(jnp.float32)
        )

    zeros = jnp.zeros((rows, answers, hidden.shape[-1]), jnp.float32)
    slope = jax.lax.fori_loop(0, count, meet_head, zeros)
    if split.vocabulary is not None:
        slope = jax.lax.psum(slope, split.vocabulary)
    return scores, slope


def _under_part(hidden, head, moved, tokens, mask, *, split):
    """Scores of one device's rows under each of some changes of the logits."""
    tokens = tokens - split.first_token(head.shape[0])
    count, size = _tiles(head.shape[0])
    vectors = len(moved)

    def meet_chunk(j, scores):
        def meet_tile(i, carry):
            shift, total, picked = carry
            tile = _tile(head, i, hidden.dtype, split)
            logits, largest, exp = _exponentials(tile, hidden[j])
            place = tile.places(tokens[j])
            logit = jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]
            change = jax.lax.dynamic_slice_in_dim(moved, tile.start, size, axis=1)
            most = change.max(axis=1)
            found = jnp.einsum(
                "RQV,MV->MRQ",
                exp,
                jnp.exp(change - most[:, None]),
                precision=jax.lax.Precision.HIGHEST,
            )
            now = jnp.where(place < 0, picked, logit + change[:, place])
            return (
                shift.at[i].set(largest + most[:, None, None]),
                total.at[i].set(found),
                now,
            )

        zeros = jnp.zeros((count, vectors, *tokens.shape[1:]), jnp.float32)
        shift, total, picked = jax.lax.fori_loop(
            0, count, meet_tile, (zeros, zeros, zeros[0])
        )
        if split.vocabulary is not None:
            picked = jax.lax.psum(picked, split.vocabulary)
        return scores.at[:, j].set(picked - _normaliser(shift, total, split))

    scores = jnp.zeros((vectors, *tokens.shape), jnp.float32)
    return jax.lax.fori_loop(0, _most_chunks(mask, split), meet_chunk, scores)


def _normaliser(
    shift: Float[Array, "tiles ..."], total: Float[Array, "tiles ..."], split: _Split
) -> Float[Array, "..."]:
    """log of the sum of exp(shift) * total over the tiles of every device."""
    largest = shift.max(axis=0)
    if split.vocabulary is not None:
        largest = jax.lax.pmax(largest, split.vocabulary)
    whole = jnp.sum(total * jnp.exp(shift - largest), axis=0)
    if split.vocabulary is not None:
        whole = jax.lax.psum(whole, split.vocabulary)
    return largest + jnp.log(whole)


def sum_by_answer(
    values: Num[Array, "R S"],
    slot: Int[Array, "R S"],
    mask: Bool[Array, "R S"],
    *,
    pair_slots: int,
) -> Float[Array, "R P 2"]:
    """Sums a value of scored positions over each answer.

    Args:
        values: One value a scored position, such as ``token_logp``.
        slot: ``2 * pair slot + side`` of each position.
        mask: False where the position is padding.
        pair_slots: P.

    Returns:
        Sums for each pair slot and side (0 chosen, 1 rejected); 0 where unused.
    """
    kept = jnp.where(mask, values, 0.0)
    one_hot = jax.nn.one_hot(slot, 2 * pair_slots, dtype=kept.dtype)
    # One-hot products keep rows apart, so that rows may live on different devices;
    # HIGHEST because a sum of log-probabilities must not be rounded to bf16 terms.
    sums = jnp.einsum("RS,RSA->RA", kept, one_hot, precision=jax.lax.Precision.HIGHEST)
    return sums.reshape(*sums.shape[:1], pair_slots, 2)
