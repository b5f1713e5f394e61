"""The optimizer: one optax transformation and schedule per parameter group.

Decoder or adapters, prior and posterior, and codebook have their own peak learning
rates: with one rate for all, the codes are never used.
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

# Each with the names of its options for weight decay and for its mask.
_OPTIMIZERS: dict[str, tuple[Callable[..., Any], str, str]] = {
    "adamw": (optax.adamw, "weight_decay", "mask"),
    "adam": (optax.adam, "", ""),
    "lion": (optax.lion, "weight_decay", "mask"),
    "sgd": (optax.sgd, "", ""),
    "adafactor": (optax.adafactor, "weight_decay_rate", "weight_decay_mask"),
}


def schedule(optimizer: cfg.Optimizer, peak: float, total_steps: int) -> optax.Schedule:
    """Linear warmup from 0 to the peak, then a decay to 0 after ``total_steps``."""
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


def _named(
    optimizer: cfg.Optimizer, rate: optax.Schedule
) -> optax.GradientTransformation:
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
        options[mask] = lambda params: jax.tree.map(
            lambda leaf: leaf.decays, leaves.known(params)
        )
    return make(rate, **options)


def peaks(config: cfg.Config) -> dict[str, float]:
    """Peak learning rate of each group of trained parameters."""
    rates = {}
    if config.decoder == "trained":
        part = "decoder" if config.adapters is None else "adapters"
        rates[part] = config.optimizer.learning_rate
    if config.latent is not None:
        rates["latent"] = config.latent.learning_rate
        rates["codebook"] = config.latent.codebook_rate
    return rates


def build(
    config: cfg.Config, params: Any, total_steps: int, *, codebook_unit: float = 1.0
) -> optax.GradientTransformation:
    """Clipping over all parameters, then each group's own optimizer.

    A codebook coordinate reaches every logit through the head at once. Its rate is in
    units of that effect: under Adam, whose updates have size 1, a step of
    ``codebook_unit`` in every coordinate moves logits by 1 nat r.m.s.
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
