"""Divergence between two beliefs over codes, and measures of how codes are used.

Knows nothing of codebooks or networks; a belief is a row of logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def categorical_kl(
    q_logits: Float[Array, "B C"], p_logits: Float[Array, "B C"]
) -> Float[Array, "B"]:
    """KL(q || p) between two categoricals in closed form, in nats (LPC eq. 7).

    Args:
        q_logits: The posterior's, unnormalised.
        p_logits: The prior's. Gradient flows into both.

    Returns:
        ``sum_k q_k (log q_k - log p_k)`` for each pair, at least 0 to rounding.
    """
    q_logp = jax.nn.log_softmax(q_logits, axis=-1)
    p_logp = jax.nn.log_softmax(p_logits, axis=-1)
    return jnp.sum(jnp.exp(q_logp) * (q_logp - p_logp), axis=-1)


def entropy(logits: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Entropy of a categorical, in nats: ln C when uniform."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def usage_perplexity(usage: Float[Array, "C"]) -> Float[Array, ""]:
    """How many codes are in use: exp of the entropy of the mean belief.

    Args:
        usage: Probabilities summed over pairs; need not be normalised.

    Returns:
        From 1 (one code takes all) to C (uniform).
    """
    share = usage / jnp.sum(usage)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def largest_share(usage: Float[Array, "C"]) -> Float[Array, ""]:
    """Share of the most used code, in [1 / C, 1]."""
    return jnp.max(usage) / jnp.sum(usage)


def dead_codes(usage: Float[Array, "C"], *, share: float) -> Float[Array, ""]:
    """How many codes have less than ``share`` of a uniform code's usage."""
    num_codes = usage.shape[-1]
    return jnp.sum(usage / jnp.sum(usage) < share / num_codes).astype(jnp.float32)
