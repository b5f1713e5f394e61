"""Which tokens of a row a token may attend to: a rule, and one integer a key."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from lpc_jax.types import NO_PAIR, PROMPT


class Tokens(NamedTuple):
    """What the mask reads of each token: position in its own sequence, pair, branch."""

    positions: Int[Array, "*R T"]
    pair: Int[Array, "*R T"]
    branch: Int[Array, "*R T"]


def visible(
    queries: Tokens, keys: Tokens, *, sliding_window: int | None
) -> Bool[Array, "*R queries T"]:
    """Which key (last axis) each query may attend to; padding sees and is seen by none.

    A key is of the query's pair, not later in position, and of the prompt or the
    query's own answer; under a window less than ``sliding_window`` positions back.
    """
    distance = queries.positions[..., :, None] - keys.positions[..., None, :]
    same_pair = queries.pair[..., :, None] == keys.pair[..., None, :]
    of_answer = queries.branch[..., :, None] == keys.branch[..., None, :]
    seen = (
        same_pair
        & (keys.pair != NO_PAIR)[..., None, :]
        & ((keys.branch == PROMPT)[..., None, :] | of_answer)
        & (distance >= 0)
    )
    return seen if sliding_window is None else seen & (distance < sliding_window)


def ends(tokens: Tokens) -> Int[Array, "R T"]:
    """The rule, without a window, for rows in storage order: k <= q < end[k]."""
    length = tokens.pair.shape[-1]

    def end_of_run(x: Int[Array, "R T"]) -> Int[Array, "R T"]:
        last = jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        end = jnp.where(last, jnp.arange(length) + 1, length)
        return jax.lax.cummin(end, axis=1, reverse=True)

    # A prompt token's end is its pair's, an answer token's its answer's.
    of_pair = end_of_run(tokens.pair)
    of_answer = jnp.minimum(of_pair, end_of_run(tokens.branch))
    end = jnp.where(tokens.branch == PROMPT, of_pair, of_answer)
    return jnp.where(tokens.pair == NO_PAIR, 0, end)
