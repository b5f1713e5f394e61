"""Metrics of pairs: sums with counts, which micro-batches and devices add up."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpc_jax.losses import latent as latent_losses
from lpc_jax.types import Batch, HostOrDevice

# A metric is (sum, count); its value is their ratio over all that was added up.
Sums = dict[str, tuple[HostOrDevice, HostOrDevice]]

# A code is dead below this share of what it would have if all were used alike.
DEAD_SHARE = 0.1


def sums(by_slot: dict[str, Float[Array, "R P"]], where: Float[Array, "R P"]) -> Sums:
    """Metrics with a value per pair slot, over the slots where they count."""
    count = jnp.sum(where)
    return {name: (jnp.sum(x * where), count) for name, x in by_slot.items()}


def of_answers(
    logp: Float[Array, "R P 2"],
    end_logp: Float[Array, "R P 2"],
    rewards: Float[Array, "R P 2"],
    batch: Batch,
) -> Sums:
    """Rewards (a tie is not accurate) and likelihoods of the answers of a pair."""
    mask = batch.pair_mask.astype(jnp.float32)
    margin = rewards[..., 0] - rewards[..., 1]
    accurate = (margin > 0).astype(jnp.float32)
    chosen_length, rejected_length = batch.lengths[..., 0], batch.lengths[..., 1]
    longer = (chosen_length > rejected_length) * mask
    shorter = (chosen_length < rejected_length) * mask
    by_slot = {"reward/margin": margin, "reward/accuracy": accurate}
    per_token: Sums = {}
    for side, name in enumerate(("chosen", "rejected")):
        by_slot[f"reward/{name}"] = rewards[..., side]
        by_slot[f"logp_last_token/{name}"] = end_logp[..., side]
        tokens = jnp.sum(batch.lengths[..., side] * mask)
        of_side, name = logp[..., side], f"logp_per_token/{name}"
        per_token[name] = (jnp.sum(of_side * mask), tokens)
        if batch.reference_logp is not None:
            ratio = of_side - batch.reference_logp[..., side]
            per_token[f"{name}_over_reference"] = (jnp.sum(ratio * mask), tokens)
    return (
        sums(by_slot, mask)
        | sums({"reward/accuracy_chosen_longer": accurate}, longer)
        | sums({"reward/accuracy_chosen_shorter": accurate}, shorter)
        | per_token
    )


def of_codes(
    prior: Float[Array, "R P C"],
    posterior: Float[Array, "R P C"],
    mask: Float[Array, "R P"],
) -> Sums:
    """Usage of codes, and whether prior and posterior agree, from probabilities."""
    agree = jnp.argmax(prior, axis=-1) == jnp.argmax(posterior, axis=-1)
    usage = jnp.einsum("RPC,RP->C", prior, mask)
    agreement = sums({"code/agreement": agree.astype(jnp.float32)}, mask)
    return agreement | {"code/usage": (usage, jnp.sum(mask))}


def values(sums: Sums) -> dict[str, float]:
    """Metrics with a count above 0, on the host; code usage becomes its measures."""
    metrics: dict[str, float] = {}
    for name, (total, count) in jax.device_get(sums).items():
        if name == "code/usage":
            usage = jnp.asarray(total)
            perplexity = latent_losses.usage_perplexity(usage)
            dead = latent_losses.dead_codes(usage, share=DEAD_SHARE)
            metrics["code/perplexity"] = float(perplexity)
            metrics["code/largest_share"] = float(latent_losses.largest_share(usage))
            metrics["code/dead"] = float(dead)
        elif count > 0:
            metrics[name] = float(total / count)
    return metrics
