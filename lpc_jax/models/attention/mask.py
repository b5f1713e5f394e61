"""Which tokens of a row a token may attend to."""

from __future__ import annotations

from typing import NamedTuple

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
