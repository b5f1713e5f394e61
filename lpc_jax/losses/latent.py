"""Divergence and entropy of beliefs over codes, and how codes are used."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def categorical_kl(
    q_logits: Float[Array, "B C"], p_logits: Float[Array, "B C"]
) -> Float[Array, "B"]:
    """KL(q || p) = sum_k q_k (log q_k - log p_k), in nats (LPC eq. 7)."""
    q_logp = jax.nn.log_softmax(q_logits, axis=-1)
    p_logp = jax.nn.log_softmax(p_logits, axis=-1)
    return jnp.sum(jnp.exp(q_logp) * (q_logp - p_logp), axis=-1)


def entropy(logits: Float[Array, "*B C"]) -> Float[Array, "*B"]:
    """Entropy of a categorical, in nats: ln C when uniform."""
    logp = jax.nn.log_softmax(logits, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def usage_perplexity(usage: Float[Array, "C"]) -> Float[Array, ""]:
    """Codes in use, from 1 to C: exp of the entropy of the summed beliefs."""
    share = usage / jnp.sum(usage)
    # xlogy: 0 log 0 is 0, for codes that are never used.
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))


def largest_share(usage: Float[Array, "C"]) -> Float[Array, ""]:
    """Share of the most used code, in [1 / C, 1]."""
    return jnp.max(usage) / jnp.sum(usage)


def dead_codes(usage: Float[Array, "C"], *, share: float) -> Float[Array, ""]:
    """Codes with less than ``share`` of a uniform code's usage."""
    num_codes = usage.shape[-1]
    return jnp.sum(usage / jnp.sum(usage) < share / num_codes).astype(jnp.float32)
