"""Attention backends: how each runs, where, and what it costs.

A new one is a file of its own and a row of ``BACKENDS``.
"""

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
    """A way to compute attention.

    Attributes:
        prepare: From a micro-batch's tokens and the sliding window (in positions, or
            None) to what every layer's ``attend`` reads; all of it starts with rows.
        attend: From query, key, value and what was prepared to the mixed values.
        refuses: From platform, compute dtype and what row lengths are multiples of:
            what it needs instead, as the end of a sentence, or None.
        auto_on: The platform where ``auto`` means it, unless it refuses.
        whole_rows: Whether all scores of a row are computed, masked or not.
        holds_scores: Whether these wait in memory for the backward pass, or are
            computed once more for it, as ``remat`` says.
        computed_again: Of the two forward products, what the backward pass computes
            besides its own four.
        per_device: Whether each device is to run it over its own rows and heads.
    """

    prepare: Callable[[Tokens, int | None], Any]
    attend: Callable[[Array, Array, Array, Any], Array]
    refuses: Callable[[str, jnp.dtype, int], str | None] = lambda *_: None
    auto_on: str | None = None
    whole_rows: bool = False
    holds_scores: bool = False
    computed_again: float = 0.0
    per_device: bool = True


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
    """The backend that ``model.attention`` means on a platform, as JAX names it.

    Raises:
        UserError: An unknown backend, or one that cannot run there.
    """
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
