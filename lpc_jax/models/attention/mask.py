"""The mask's meaning: which tokens of a row a token may attend to.

Stated twice: as a rule on pairs, branches and positions, and for rows in storage order
as one integer a key.
"""

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
    """Which key (last axis) each query may attend to.

    A key is seen iff it is of the query's pair, not later in position, and of the
    prompt or of the query's own answer; under a sliding window also less than
    ``sliding_window`` positions back. Padding sees nothing and is seen by nothing.
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
    """The rule, without a window, as one integer a key: q sees k iff k <= q < end[k].

    For a prompt token that is where its pair ends in the row, for an answer's where
    the answer does, for padding 0. Takes whole rows as ``packing`` stores them.
    """
    length = tokens.pair.shape[-1]

    def end_of_run(x: Int[Array, "R T"]) -> Int[Array, "R T"]:
        last = jnp.pad(x[:, 1:] != x[:, :-1], ((0, 0), (0, 1)), constant_values=True)
        end = jnp.where(last, jnp.arange(length) + 1, length)
        return jax.lax.cummin(end, axis=1, reverse=True)

    of_pair = end_of_run(tokens.pair)
    of_answer = jnp.minimum(of_pair, end_of_run(tokens.branch))
    end = jnp.where(tokens.branch == PROMPT, of_pair, of_answer)
    return jnp.where(tokens.pair == NO_PAIR, 0, end)
