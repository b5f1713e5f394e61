"""Hidden states to log-probabilities of tokens, and of whole answers.

Knows nothing of decoders or losses. No array of scored positions x vocabulary is
ever held for a whole row: positions meet the head a chunk at a time, and the backward
pass computes each chunk again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from lpc_jax import axes


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
        head: The LM head; cast to the dtype of ``hidden`` chunk by chunk, so that
            its gradient is summed in its own precision.
        tokens: The token to score at each position.
        mask: False where a position is padding. Chunks after the last scored position
            of the longest row are not computed, forward or backward.
        chunk: Positions of a row scored at a time.

    Returns:
        Log-probabilities in nats; 0 in chunks that were not computed.
    """
    positions = tokens.shape[1]
    chunk = min(chunk, positions)
    last = jnp.max(jnp.where(mask, jnp.arange(1, positions + 1), 0))
    chunks = -(-last // chunk)
    scores = _score_chunks(
        _in_chunks(hidden, chunk), head, _in_chunks(tokens, chunk), chunks
    )
    return scores.swapaxes(0, 1).reshape(tokens.shape[0], -1)[:, :positions]


def _in_chunks(
    x: Num[Array, "R S ..."], chunk: int
) -> Num[Array, "chunks R chunk ..."]:
    padding = [(0, 0)] * x.ndim
    padding[1] = (0, -x.shape[1] % chunk)
    x = jnp.pad(x, padding)
    return x.reshape(x.shape[0], -1, chunk, *x.shape[2:]).swapaxes(0, 1)


def _logits(
    hidden: Float[Array, "R chunk D"], head: Float[Array, "V D"]
) -> Float[Array, "R chunk V"]:
    logits = jnp.einsum(
        "RQD,VD->RQV",
        hidden,
        head.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    return axes.constrain(logits, "R S V")


# By hand, since JAX differentiates no loop whose length the data decides.
@jax.custom_vjp
def _score_chunks(
    hidden: Float[Array, "chunks R chunk D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "chunks R chunk"],
    chunks: Int[Array, ""],
) -> Float[Array, "chunks R chunk"]:
    return _scores_and_normalisers(hidden, head, tokens, chunks)[0]


def _scores_and_normalisers(hidden, head, tokens, chunks):
    def score(i, carry):
        scores, normalisers = carry
        logits = _logits(hidden[i], head)
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, tokens[i][..., None], axis=-1)[..., 0]
        return scores.at[i].set(picked - normaliser), normalisers.at[i].set(normaliser)

    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return jax.lax.fori_loop(0, chunks, score, (zeros, zeros))


def _score_forward(hidden, head, tokens, chunks):
    arguments = (hidden.value, head.value, tokens.value, chunks.value)
    scores, normalisers = _scores_and_normalisers(*arguments)
    # An empty tuple where the head's gradient is asked for: known to the compiler, so
    # that a frozen head costs neither the product nor an array of its size.
    asked = () if head.perturbed else None
    return scores, (*arguments, normalisers, asked)


def _score_backward(residuals, gradient):
    hidden, head, tokens, chunks, normalisers, asked = residuals

    def differentiate(i, carry):
        d_hidden, d_head = carry
        logits = _logits(hidden[i], head)
        # d log p(token) = one-hot(token) - p.
        d_logits = jax.nn.one_hot(tokens[i], head.shape[0]) - jnp.exp(
            logits - normalisers[i][..., None]
        )
        d_logits = (d_logits * gradient[i][..., None]).astype(hidden.dtype)
        of_hidden = jnp.einsum("RQV,VD->RQD", d_logits, head.astype(hidden.dtype))
        d_hidden = d_hidden.at[i].set(of_hidden)
        if d_head is None:
            return d_hidden, None
        of_head = jnp.einsum(
            "RQD,RQV->DV", hidden[i], d_logits, preferred_element_type=head.dtype
        )
        return d_hidden, d_head + of_head

    zeros = jnp.zeros_like(hidden), None if asked is None else jnp.zeros_like(head.T)
    # Summed as [D, V], for which the CPU's product is up to twice as fast.
    d_hidden, d_head = jax.lax.fori_loop(0, chunks, differentiate, zeros)
    return d_hidden, None if d_head is None else d_head.T, None, None


_score_chunks.defvjp(_score_forward, _score_backward, symbolic_zeros=True)


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
