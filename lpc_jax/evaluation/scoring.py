"""Log-probabilities of continuations, with z from the prior at the context's end."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from lpc_jax import sharding
from lpc_jax.losses import sequence
from lpc_jax.models.network import Network, read_at
from lpc_jax.runtime import draws
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering
from lpc_jax.types import NO_PAIR, PADDING, PROMPT

Ids = Int32[np.ndarray, "_"]
# Tokens of a batch: few on a CPU, so that the last batch wastes little.
_CPU_BATCH_TOKENS, _BATCH_TOKENS = 2048, 32_768
# The shortest row. Longer ones are 1, 2, 3, 4, 6, 8, 12, ... times as long: at most a
# third of a row is padding, and few shapes are compiled.
_SHORTEST_ROW = 64
# A row's continuations: most tokens (or its context's length, if more), and number.
_CONTINUATION_TOKENS = 256
_CONTINUATIONS = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """A continuation to be scored under z of the prior at the context's end."""

    context: Ids
    continuation: Ids
    lead: int = 0  # last ids of the context that are scored too, without z


@dataclasses.dataclass(frozen=True)
class Score:
    """Summed log-probability of the scored ids; whether each is the likeliest."""

    logp: float
    greedy: bool


class _Rows(NamedTuple):
    """Rows of one shape; an unused row is padding."""

    tokens: Int[Any, "R T"]
    positions: Int[Any, "R T"]  # every continuation goes on from the context
    pair: Int[Any, "R T"]  # 0, or NO_PAIR on padding
    branch: Int[Any, "R T"]  # PROMPT, or a number for each continuation
    context_end: Int[Any, "R"]  # index of the context's last token
    seed: UInt32[Any, "R"]  # of the context alone
    score_from: Int[Any, "R S"]  # index of the hidden state that predicts
    score_token: Int[Any, "R S"]
    score_mask: Bool[Any, "R S"]


@dataclasses.dataclass
class _Row:
    """A context and its continuations, by their requests' numbers."""

    context: Ids
    lead: int
    continuations: list[tuple[int, Ids]]
    added: int = 0

    @property
    def length(self) -> int:
        return len(self.context) + self.added

    def add(self, number: int, continuation: Ids) -> bool:
        """Takes a continuation if there is room; its last id is scored, never read."""
        added = self.added + len(continuation) - 1
        if len(self.continuations) == _CONTINUATIONS or (
            self.continuations and added > max(_CONTINUATION_TOKENS, len(self.context))
        ):
            return False
        self.continuations.append((number, continuation))
        self.added = added
        return True


class Scorer:
    """Scores requests with one policy; ``steering`` is not read without a latent.

    A context's draw of z depends on ``seed`` and the context alone. ``batch_tokens``
    includes padding; None: by device.
    """

    def __init__(
        self,
        system: Policy,
        *,
        steering: Steering,
        seed: int = 0,
        batch_tokens: int | None = None,
    ) -> None:
        platform = sharding.platform(system.mesh)
        default = _CPU_BATCH_TOKENS if platform == "cpu" else _BATCH_TOKENS
        self.system, self._key = system, jax.random.key(seed)
        self._batch_tokens = batch_tokens or default
        self._unit = system.compute.row_unit
        score = functools.partial(
            _score,
            graph=system.graph,
            steering=steering,
            chunk=system.compute.score_chunk,
        )
        everywhere = NamedSharding(system.mesh, P())
        self._program = jax.jit(score, out_shardings=everywhere)

    def score(
        self,
        requests: Sequence[Request],
        *,
        done: Callable[[int], object] = lambda count: None,
    ) -> list[Score]:
        """A score for each request, in their order, whatever else is in its batch.

        Each has at least one unscored id of context and one scored id, and fits the
        model's context. ``done`` gets the number of requests of each batch.
        """
        scores: dict[int, Score] = {}
        rows = sorted(_gather(requests), key=lambda row: -row.length)
        mesh = self.system.mesh
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        over_rows = NamedSharding(mesh, P(("data", "fsdp")))
        while rows:
            length = _shape_of(rows[0].length, self._unit)
            count = max(self._batch_tokens // length, 1)
            count += -count % ways  # each device gets as many rows
            chosen, rows = rows[:count], rows[count:]
            batch, places = _arrays(chosen, count, length)
            with jax.set_mesh(mesh):
                placed = _Rows(*(sharding.place(x, over_rows) for x in batch))
                scored = self._program(self.system.params, placed, self._key)
                logp, greedy = jax.device_get(scored)
            for number, row, where in places:
                # Summed in float64: a long text has thousands of terms.
                total = float(np.sum(logp[row, where], dtype=np.float64))
                scores[number] = Score(total, bool(np.all(greedy[row, where])))
            done(len(places))
        return [scores[i] for i in range(len(requests))]


def _gather(requests: Sequence[Request]) -> list[_Row]:
    # Continuations of one context share a row, so that it is read once for them.
    rows: list[_Row] = []
    open_rows: dict[tuple[bytes, int], _Row] = {}
    for number, request in enumerate(requests):
        assert len(request.continuation) > 0
        assert 0 <= request.lead < len(request.context)
        key = (request.context.tobytes(), request.lead)
        row = open_rows.get(key)
        if row is None or not row.add(number, request.continuation):
            row = open_rows[key] = _Row(request.context, request.lead, [])
            row.add(number, request.continuation)
            rows.append(row)
    return rows


def _shape_of(length: int, unit: int) -> int:
    """The shortest row length that holds ``length`` tokens."""
    size = _SHORTEST_ROW + -_SHORTEST_ROW % unit
    while size < length:
        if 3 * size // 2 >= length and (3 * size // 2) % unit == 0:
            return 3 * size // 2
        size *= 2
    return size


def _arrays(
    rows: Sequence[_Row], count: int, length: int
) -> tuple[_Rows, list[tuple[int, int, Int[np.ndarray, "_"]]]]:
    """The rows as arrays, and each request's number, row and scored positions."""
    made = _Rows(
        tokens=np.zeros((count, length), np.int32),
        positions=np.zeros((count, length), np.int32),
        pair=np.full((count, length), NO_PAIR, np.int32),
        branch=np.full((count, length), PADDING, np.int32),
        context_end=np.zeros(count, np.int32),
        seed=np.pad(draws.seeds([row.context for row in rows]), (0, count - len(rows))),
        score_from=np.zeros((count, length + _CONTINUATIONS), np.int32),
        score_token=np.zeros((count, length + _CONTINUATIONS), np.int32),
        score_mask=np.zeros((count, length + _CONTINUATIONS), bool),
    )
    places = []
    for index, row in enumerate(rows):
        end = len(row.context)
        made.tokens[index, :end] = row.context
        made.positions[index, :end] = np.arange(end)
        made.pair[index, : row.length] = 0
        made.branch[index, :end] = PROMPT
        made.context_end[index] = end - 1
        lead = np.arange(row.lead)
        made.score_from[index, : row.lead] = end - 1 - row.lead + lead
        made.score_token[index, : row.lead] = row.context[end - row.lead :]
        read, scored = end, row.lead
        for branch, (number, ids) in enumerate(row.continuations, start=PADDING + 1):
            here = slice(read, read + len(ids) - 1)
            made.tokens[index, here] = ids[:-1]
            made.positions[index, here] = end + np.arange(len(ids) - 1)
            # Any number will do: attention compares branches for equality alone.
            made.branch[index, here] = branch
            # The context's last state predicts the first id of every continuation.
            where = np.arange(scored, scored + len(ids))
            made.score_from[index, where] = [end - 1, *range(here.start, here.stop)]
            made.score_token[index, where] = ids
            places.append((number, index, np.concatenate([lead, where])))
            read, scored = here.stop, scored + len(ids)
        made.score_mask[index, :scored] = True
    return made, places


def _score(
    params: Any,
    rows: _Rows,
    key: Any,
    *,
    graph: Any,
    steering: Steering,
    chunk: int,
) -> tuple[Float[Array, "R S"], Bool[Array, "R S"]]:
    """Log-probability of each scored id given z (eq. 10), and whether it is greedy."""
    network = nnx.merge(graph, params)
    assert isinstance(network, Network)
    hidden = network.decoder(rows.tokens, rows.positions, rows.pair, rows.branch)
    scored = read_at(hidden, rows.score_from)
    if network.latent is not None:
        end = rows.context_end[:, None]
        at_end = read_at(hidden, end)[:, 0]
        codes = draws.codes(network.latent, at_end, steering, key, rows.seed)
        vector = codes.vector[:, None]
        # z is for what the prior could not read: ids after the context's end.
        has_z = (rows.score_from >= end)[..., None]
        scored = scored + jnp.where(has_z, vector, 0.0).astype(scored.dtype)
    return sequence.token_logp_and_greedy(
        scored,
        network.decoder.head_weight,
        rows.score_token,
        rows.score_mask,
        chunk=chunk,
    )
