"""Hidden states to log-probabilities of tokens, and of whole answers.

Knows nothing of decoders or losses. No array of scored positions x vocabulary is
ever held for a whole row: positions meet the head a chunk at a time, and the backward
pass computes each chunk again.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from lpc_jax import axes


def token_logp(
    hidden: Float[Array, "R S D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "R S"],
    *,
    chunk: int,
) -> Float[Array, "R S"]:
    """log softmax(head @ hidden)[token] at every position, in fp32.

    Args:
        hidden: Last hidden states (plus z) in the compute dtype; gradient flows.
        head: The LM head; cast to the dtype of ``hidden`` chunk by chunk, so that
            its gradient is summed in its own precision.
        tokens: The token to score at each position.
        chunk: Positions of a row scored at a time.

    Returns:
        Log-probabilities in nats.
    """
    rows, positions, width = hidden.shape
    chunk = min(chunk, positions)
    padding = -positions % chunk
    hidden = jnp.pad(hidden, ((0, 0), (0, padding), (0, 0)))
    tokens = jnp.pad(tokens, ((0, 0), (0, padding)))
    in_chunks = hidden.reshape(rows, -1, chunk, width).swapaxes(0, 1)
    tokens_in_chunks = tokens.reshape(rows, -1, chunk).swapaxes(0, 1)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def score(inputs: tuple[Array, Array]) -> Array:
        chunk_hidden, chunk_tokens = inputs
        logits = jnp.einsum(
            "RSD,VD->RSV",
            chunk_hidden,
            head.astype(chunk_hidden.dtype),
            preferred_element_type=jnp.float32,
        )
        logits = axes.constrain(logits, "R S V")
        normaliser = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, chunk_tokens[..., None], axis=-1)
        return picked[..., 0] - normaliser

    scores = jax.lax.map(score, (in_chunks, tokens_in_chunks))
    return scores.swapaxes(0, 1).reshape(rows, -1)[:, :positions]


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
