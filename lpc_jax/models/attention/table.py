"""Attention backends, a row of ``BACKENDS`` each: how they run, where, at what cost."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from lpc_jax.errors import UserError
from lpc_jax.models.attention import blocks, splash
from lpc_jax.models.attention.mask import Tokens, visible


class Where(NamedTuple):
    """What a backend is to run on, and over."""

    platform: str  # as JAX names it: cpu, gpu, tpu
    dtype: jnp.dtype
    row_unit: int  # divides all row lengths
    head_width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """A way to compute attention."""

    # From tokens and sliding window to what ``attend`` reads; its axes begin with R.
    prepare: Callable[[Tokens, int | None], Any]
    attend: Callable[[Array, Array, Array, Any], Array]  # query, key, value, prepared
    # What it needs instead, in words, or None.
    refuses: Callable[[Where], str | None] = lambda _: None
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


# JAX's operation that is cuDNN's kernel, forward; what remat policies may keep of it.
CUDNN_KERNEL = "dot_product_attention_fwd_wrapper"


@functools.cache
def _cudnn_refuses(where: Where) -> str | None:
    if where.platform != "gpu":
        return f"a GPU, got a {where.platform}. Use 'auto'."
    if where.dtype == jnp.float32:
        return (
            "model.compute_dtype bfloat16, got float32. Use 'auto' for one of the two."
        )

    def total(heads: Array, mask: Array) -> Array:
        return _masked(heads, heads, heads, mask, implementation="cudnn").sum()

    length, width = where.row_unit, where.head_width
    heads = jax.ShapeDtypeStruct((1, length, 1, width), where.dtype)
    mask = jax.ShapeDtypeStruct((1, length, length), jnp.bool_)
    try:  # JAX knows the version that is here, and what it takes
        jax.eval_shape(jax.grad(total), heads, mask)
    except (ValueError, NotImplementedError) as e:
        return f"what its kernel takes, got: {e} Use 'auto'."
    except RuntimeError as e:  # none is here, which a plan for elsewhere does not need
        if jax.default_backend() == "gpu":
            return f"cuDNN, got: {e} Use 'auto'."
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
        refuses=lambda where: splash.refuses(where.platform, where.row_unit),
        auto_on="tpu",
        computed_again=1.5,  # scores, and dO V^T, in each of two passes
    ),
    "cudnn": Backend(
        prepare=_mask,
        attend=functools.partial(_masked, implementation="cudnn"),
        refuses=_cudnn_refuses,
        auto_on="gpu",
        whole_rows=True,
        computed_again=0.5,
        per_device=False,
    ),
}


def choose(name: str, where: Where) -> tuple[str, str]:
    """The backend that ``model.attention`` means, and why where that is ``auto``.

    Raises:
        UserError: It is not known, or cannot run there.
    """
    if name == "auto":
        return _automatic(where)
    if name not in BACKENDS:
        options = " or ".join(map(repr, ("auto", *BACKENDS)))
        raise UserError(f"model.attention must be {options}, got {name!r}.")
    needs = BACKENDS[name].refuses(where)
    if needs is not None:
        raise UserError(f"model.attention={name!r} needs {needs}")
    return name, ""


def _automatic(where: Where) -> tuple[str, str]:
    reasons = []
    for name, backend in BACKENDS.items():
        if backend.auto_on == where.platform:
            needs = backend.refuses(where)
            if needs is None:
                return name, f"the default on a {where.platform}"
            reasons.append(f"{name} needs {needs.partition(' Use ')[0]}")
    return "xla", "; ".join(reasons)
