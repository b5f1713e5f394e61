"""The optimizer: one optax transformation per group, one schedule shape for both.

The decoder or its adapters (unless it is frozen), prior and posterior, and the codebook
each have their own peak learning rate: with one rate for everything the codes are never
used. Knows nothing of losses or data.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import optax

from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.models import leaves

# Each with its options of weight decay: how much, and of what.
_OPTIMIZERS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "adamw": (optax.adamw, "weight_decay", "mask"),
    "adam": (optax.adam, "", ""),
    "lion": (optax.lion, "weight_decay", "mask"),
    "sgd": (optax.sgd, "", ""),
    "adafactor": (optax.adafactor, "weight_decay_rate", "weight_decay_mask"),
}


def schedule(optimizer: cfg.Optimizer, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate by update: linear warmup from 0 to the peak, then its decay.

    The decay reaches 0 after the last of ``total_steps`` updates.
    """
    warmup = round(optimizer.warmup_fraction * total_steps)
    rest = max(total_steps - warmup, 1)
    decay = {
        "cosine": optax.cosine_decay_schedule(peak, rest),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "constant": optax.constant_schedule(peak),
    }[optimizer.schedule]
    if not warmup:
        return decay
    return optax.join_schedules(
        [optax.linear_schedule(0.0, peak, warmup), decay], [warmup]
    )


def _decay_mask(params: Any) -> Any:
    """Which of some parameters decay."""
    return jax.tree.map(lambda leaf: leaf.decays, leaves.known(params))


def _named(
    optimizer: cfg.Optimizer, rate: optax.Schedule
) -> optax.GradientTransformation:
    """The optimizer of that name with the config's options."""
    if optimizer.name not in _OPTIMIZERS:
        raise UserError(
            f"optimizer.name must be one of {', '.join(_OPTIMIZERS)}, got"
            f" {optimizer.name!r}. Choose one of these."
        )
    make, decay, mask = _OPTIMIZERS[optimizer.name]
    options: dict[str, Any] = dict(optimizer.options)
    accepted = set(inspect.signature(make).parameters) - {"learning_rate"}
    unknown = sorted(set(options) - accepted)
    if unknown:
        raise UserError(
            f"optimizer.options must be arguments of optax.{optimizer.name}, which has"
            f" {', '.join(sorted(accepted))}; got {', '.join(unknown)}. Leave them out."
        )
    if options.get(decay):
        options[mask] = _decay_mask
    return make(rate, **options)


def trained_part(config: cfg.Config) -> str | None:
    """What of the policy beside the latent is trained: decoder, adapters or nothing."""
    if config.decoder == "frozen":
        return None
    return "decoder" if config.adapters is None else "adapters"


def peaks(config: cfg.Config) -> dict[str, float]:
    """Peak learning rate of each group of trained parameters."""
    part = trained_part(config)
    rates = {} if part is None else {part: config.optimizer.learning_rate}
    if config.latent is not None:
        rates["latent"] = config.latent.learning_rate
        rates["codebook"] = config.latent.codebook_rate
    return rates


def build(
    config: cfg.Config, params: Any, total_steps: int, *, codebook_unit: float = 1.0
) -> optax.GradientTransformation:
    """Clipping over all parameters, then each group's own optimizer.

    A coordinate of the codebook reaches every logit through the head at once, so that
    its rate is in units of what that does: under Adam, whose updates have size 1, one
    of size ``codebook_unit`` in every coordinate moves logits by 1 nat r.m.s.

    Args:
        config: Names optimizer, options, schedule and the peaks.
        params: The trained parameters or their shapes, for masks and groups.
        total_steps: Updates in the run.
        codebook_unit: From ``latent.codebook_unit`` of the start model's head.

    Raises:
        UserError: An optimizer that is none of five, or an option that it has not.
    """
    optimizer = config.optimizer
    groups = {
        group: _named(optimizer, schedule(optimizer, peak, total_steps))
        for group, peak in peaks(config).items()
    }
    if "codebook" in groups:
        groups["codebook"] = optax.chain(groups["codebook"], optax.scale(codebook_unit))
    labels = jax.tree.map(lambda leaf: leaf.group, leaves.known(params))
    by_group = optax.multi_transform({**groups, "fixed": optax.set_to_zero()}, labels)
    if optimizer.clip_norm is None:
        return by_group
    return optax.chain(optax.clip_by_global_norm(optimizer.clip_norm), by_group)
