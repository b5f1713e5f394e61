"""Warnings about a run from its metrics; any metric may be absent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# A codebook counts as unused below this KL (nats) with usage this near uniform, or
# with one code this near to taking all.
_UNUSED_KL = 1e-3
_UNIFORM_SHARE = 0.98
_COLLAPSED_SHARE = 0.95
# Nats per token that chosen answers may lose against the start before a warning.
_FALLING_LOGP = 0.3
# Likewise in shares of answers: more that run in a circle, fewer that end.
_CIRCLES, _ENDED = 0.1, 0.2
_CHOSEN_LOGP = "logp_per_token/chosen"
_OVER_START = "logp_per_token/chosen_over_start"
_OVER_REFERENCE = "logp_per_token/chosen_over_reference"
_MORE_LIKELIHOOD = "Raise loss.sft_weight or lower optimizer.learning_rate."


def over_start(
    metrics: Mapping[str, float], start: Mapping[str, Any]
) -> dict[str, float]:
    """Change of the chosen answers' log-prob per token since the run's first record."""
    if _CHOSEN_LOGP not in start:
        return {}
    return {_OVER_START: metrics[_CHOSEN_LOGP] - start[_CHOSEN_LOGP]}


def warnings(
    metrics: Mapping[str, float], start: Mapping[str, Any], num_codes: int | None
) -> list[str]:
    """What is wrong and what to change in a run; ``start`` are its first metrics."""
    texts = []
    if num_codes is not None and "code/perplexity" in metrics:
        uniform = metrics["code/perplexity"] > _UNIFORM_SHARE * num_codes
        if metrics["latent/kl"] < _UNUSED_KL and uniform:
            texts.append(
                "codes are unused: KL is near 0 and usage uniform. Raise"
                " latent.learning_rate or latent.codebook_rate."
            )
        if metrics["code/largest_share"] > _COLLAPSED_SHARE:
            texts.append(
                "one code takes all: lower latent.kl_weight or latent.codebook_rate, or"
                " set latent.posterior_start to clusters."
            )
    fallen = metrics.get(_OVER_START, metrics.get(_OVER_REFERENCE, 0.0))
    if fallen < -_FALLING_LOGP:
        texts.append(
            f"chosen answers have lost more than {_FALLING_LOGP:g} nats per token"
            f" since the start: the model unlearns to say them. {_MORE_LIKELIHOOD}"
        )
    for name, sign, limit, what in (
        ("answers/circle", 1, _CIRCLES, "run in a circle"),
        ("answers/ended", -1, _ENDED, "end within training.sample_tokens"),
    ):
        if name not in metrics or name not in start:
            continue
        if sign * (metrics[name] - start[name]) >= limit:
            texts.append(
                f"{metrics[name]:.0%} of its answers {what}, of the start model's"
                f" {start[name]:.0%}. {_MORE_LIKELIHOOD}"
            )
    return texts
