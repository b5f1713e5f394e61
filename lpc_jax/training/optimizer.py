"""The optimizer: one optax transformation per group, one schedule shape for both.

The decoder or its adapters (unless it is frozen), prior and posterior, and the codebook
each have their own peak learning rate: with one rate for everything the codes are never
used. Knows nothing of losses or data.
"""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import jax
import optax

from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.models import leaves

# What optax's optimizers call weight decay, and where it applies.
_DECAY_OPTIONS = ("weight_decay", "weight_decay_rate")
_MASK_ARGUMENTS = ("mask", "weight_decay_mask")

# Beginnings of names that have a learning rate and yet are parts of optimizers, or
# (lbfgs) ask for the loss itself.
_NO_OPTIMIZERS = ("_", "scale_by_", "lbfgs")


def schedule(optimizer: cfg.Optimizer, peak: float, total_steps: int) -> optax.Schedule:
    """Learning rate by update: linear warmup from 0 to the peak, then its decay.

    Args:
        optimizer: Names the decay and the warmup's share.
        peak: The largest rate.
        total_steps: Updates in the run; the decay reaches 0 after the last.
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
    """The optax optimizer of that name with the config's options."""
    known = _known()
    if optimizer.name not in known:
        near = difflib.get_close_matches(optimizer.name, known)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise UserError(
            "optimizer.name must be an optimizer of optax that takes a learning rate,"
            f" got {optimizer.name!r}. {hint}There are: {', '.join(known)}."
        )
    accepted = known[optimizer.name]
    unknown = sorted(set(optimizer.options) - accepted)
    if unknown:
        raise UserError(
            f"optimizer.options must be arguments of optax.{optimizer.name}, which has"
            f" {', '.join(sorted(accepted - {'learning_rate'}))}; got"
            f" {', '.join(unknown)}. Leave them out."
        )
    options: dict[str, Any] = dict(optimizer.options)
    decays = [name for name in _DECAY_OPTIONS if options.get(name)]
    masks = [name for name in _MASK_ARGUMENTS if name in accepted]
    if decays and not masks:
        raise UserError(
            f"optimizer.options: {decays[0]} must spare norms, biases and the codebook,"
            f" which optax.{optimizer.name} cannot, got {options[decays[0]]!r}. Leave"
            " it out or choose another optimizer, such as adamw."
        )
    if decays:
        options[masks[0]] = _decay_mask
    make: Any = getattr(optax, optimizer.name)
    made: Any = make(learning_rate=rate, **options)
    return made


def _known() -> dict[str, set[str]]:
    """Optimizers of optax that take a learning rate, with their arguments' names."""
    functions = inspect.getmembers(optax, inspect.isfunction)
    arguments = {
        name: set(inspect.signature(make).parameters) for name, make in functions
    }
    return {
        name: accepted
        for name, accepted in arguments.items()
        if "learning_rate" in accepted and not name.startswith(_NO_OPTIMIZERS)
    }


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
        UserError: An optimizer or option that optax does not have.
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
