"""Attention backends, a row of ``BACKENDS`` each: how they run, where, at what cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lpc_jax.errors import UserError
from lpc_jax.models.attention import blocks, splash
from lpc_jax.models.attention.mask import Tokens, visible


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute attention."""

    # From tokens and sliding window to what ``attend`` reads; its axes begin with R.
    prepare: Callable[[Tokens, int | None], Any]
    attend: Callable[[Array, Array, Array, Any], Array]  # query, key, value, prepared
    # From platform, dtype and row unit to what it needs instead, in words, or None.
    refuses: Callable[[str, jnp.dtype, int], str | None] = lambda *_: None
    auto_on: str | None = None  # the platform where ``auto`` means it
    whole_rows: bool = False  # computes masked scores too
    holds_scores: bool = False  # for the backward pass, unless ``remat`` repeats them
    computed_again: float = 0.0  # of 2 forward products, in the backward pass
    per_device: bool = True  # each device runs it on its own rows and heads


def _mask(tokens: Tokens, sliding_window: int | None) -> Bool[Array, "R T T"]:
    return visible(tokens, tokens, sliding_window=sliding_window)


def _masked(query, key, value, mask, *, implementation):
    return jax.nn.dot_product_attention(
        query, key, value, mask=jnp.expand_dims(mask, 1), implementation=implementation
    )


def _cudnn_refuses(platform: str, dtype: jnp.dtype, row_unit: int) -> str | None:
    if platform != "gpu":
        return f"a GPU, got a {platform}. Use 'auto'."
    if dtype == jnp.float32:
        return (
            "model.compute_dtype bfloat16, got float32. Use 'auto' for one of the two."
        )
    return None


BACKENDS = {
    "xla": Backend(
        prepare=_mask,
        attend=functools.partial(_masked, implementation="xla"),
        whole_rows=True,
        holds_scores=True,
        per_device=False,
    ),
    "blocks": Backend(
        prepare=blocks.prepare,
        attend=blocks.attend,
        auto_on="cpu",
        computed_again=0.5,  # scores
    ),
    "splash": Backend(
        prepare=_mask,
        attend=splash.attend,
        refuses=splash.refuses,
        auto_on="tpu",
        computed_again=1.5,  # scores, and dO V^T, in each of two passes
    ),
    "cudnn": Backend(
        prepare=_mask,
        attend=functools.partial(_masked, implementation="cudnn"),
        refuses=_cudnn_refuses,
        whole_rows=True,
        computed_again=0.5,
        per_device=False,
    ),
}


def choose(name: str, platform: str, *, dtype: jnp.dtype, row_unit: int) -> str:
    """The backend that ``model.attention`` means, or a UserError if it cannot run."""
    if name == "auto":
        meant = [n for n, b in BACKENDS.items() if b.auto_on == platform]
        return next(
            (n for n in meant if not BACKENDS[n].refuses(platform, dtype, row_unit)),
            "xla",
        )
    if name not in BACKENDS:
        options = " or ".join(map(repr, ("auto", *BACKENDS)))
        raise UserError(f"model.attention must be {options}, got {name!r}.")
    needs = BACKENDS[name].refuses(platform, dtype, row_unit)
    if needs is not None:
        raise UserError(f"model.attention={name!r} needs {needs}")
    return name
