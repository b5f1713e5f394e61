"""How the next token is chosen from logits: greedy, or drawn within top-k and top-p."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from lpc_jax.errors import UserError

# NumPy's on the host, JAX's inside jit.
Scalar = np.float32 | Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; values out of range raise ``UserError``."""

    max_new_tokens: int  # the answer's end included
    temperature: float = 0.0  # logits are divided by it; 0: greedy
    top_k: int | None = None  # see ``keep_likeliest``
    top_p: float = 1.0  # likewise

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                got = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} must be {expected}, got {got:g}.")

    @property
    def choice(self) -> Choice:
        """The settings that a compiled program takes."""
        # NumPy's scalars: every process of several hands in the same.
        return Choice(
            temperature=np.float32(self.temperature) if self.temperature else None,
            top_p=np.float32(self.top_p) if self.top_p < 1 else None,
            top_k=self.top_k,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Choice:
    """Sampling inside jit; another temperature or top_p does not recompile."""

    temperature: Scalar | None  # None: greedy
    top_p: Scalar | None
    top_k: int | None = dataclasses.field(metadata={"static": True})

    def pick(self, logits: Float[Array, "R V"], keys: Any) -> Int32[Array, "R"]:
        """A token for each row, drawn with the row's own key."""
        if self.temperature is not None:
            logits = logits / self.temperature
            logits = keep_likeliest(logits, top_k=self.top_k, top_p=self.top_p)
            # Gumbel-max: argmax(logits + noise) is a draw from softmax(logits).
            shape = logits.shape[1:]
            logits += jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def keep_likeliest(
    logits: Float[Array, "R V"], *, top_k: int | None, top_p: float | Scalar | None
) -> Float[Array, "R V"]:
    """Logits with all but the likeliest tokens at minus infinity.

    Args:
        logits: Divided by the temperature.
        top_k: Most tokens to keep; equals of the last are kept too. None: all.
        top_p: Keep the fewest of the likeliest, of those that top_k keeps, that have
            at least this probability together (Holtzman et al. 2020). None: all.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        # Less its own share: the token that crosses top_p is kept.
        before = jnp.cumsum(shares, axis=-1) - shares
        # The likeliest always stays, whatever rounding makes of its share.
        kept = jnp.where((before < top_p).at[:, 0].set(True), ordered, jnp.inf)
        least = kept.min(axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits
