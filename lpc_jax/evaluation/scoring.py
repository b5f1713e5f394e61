"""Log-probabilities of continuations, with z from the prior at the context's end."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, Int32

from lpc_jax import sharding
from lpc_jax.runtime import draws, programs
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.programs import Continuations
from lpc_jax.runtime.steering import Steering
from lpc_jax.types import PADDING, PROMPT

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


class Score(NamedTuple):
    """Summed log-probability of the scored ids; whether each is the likeliest."""

    logp: float
    greedy: bool


@dataclasses.dataclass
class _Row:
    """A context and its continuations, by their requests' numbers."""

    context: Ids
    lead: int
    continuations: list[tuple[int, Ids]] = dataclasses.field(default_factory=list)
    length: int = 0  # ids that are read: of each continuation all but the last

    def has_room(self, added: int) -> bool:
        length = self.length + added - len(self.context)
        most = max(_CONTINUATION_TOKENS, len(self.context))
        return len(self.continuations) < _CONTINUATIONS and length <= most


def score(
    policy: Policy,
    requests: Sequence[Request],
    *,
    steering: Steering,
    seed: int = 0,
    batch_tokens: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> list[Score]:
    """A score for each request, in their order, whatever else is in its batch.

    Args:
        policy: Without codes, ``steering`` is not read.
        requests: Each has an unscored and a scored id, and fits the model.
        steering: How z is chosen.
        seed: A context's draw of z depends on it and the context alone.
        batch_tokens: Of a batch, padding included; None: by device.
        done: Gets the number of requests of each batch.
    """
    mesh, compute = policy.mesh, policy.compute
    if batch_tokens is None:
        on_cpu = compute.platform == "cpu"
        batch_tokens = _CPU_BATCH_TOKENS if on_cpu else _BATCH_TOKENS
    program = programs.score_continuations(
        policy.graph, mesh, steering=steering, chunk=compute.score_chunk
    )
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    over_rows = NamedSharding(mesh, P(("data", "fsdp")))
    scores: dict[int, Score] = {}
    rows = sorted(_gather(requests), key=lambda row: -row.length)
    while rows:
        length = _shape_of(rows[0].length, compute.row_unit)
        count = max(batch_tokens // length, 1)
        count += -count % ways  # each device gets as many rows
        batch, places = _arrays(rows[:count], count, length)
        rows = rows[count:]
        with jax.set_mesh(mesh):
            placed = Continuations(*(sharding.place(x, over_rows) for x in batch))
            scored = program(policy.params, placed, jax.random.key(seed))
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
        assert 0 <= request.lead < len(request.context)
        key = (request.context.tobytes(), request.lead)
        added = len(request.continuation) - 1
        row = open_rows.get(key)
        if row is None or not row.has_room(added):
            row = _Row(request.context, request.lead, length=len(request.context))
            open_rows[key] = row
            rows.append(row)
        row.continuations.append((number, request.continuation))
        row.length += added
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
) -> tuple[Continuations, list[tuple[int, int, Int[np.ndarray, "_"]]]]:
    """The rows as arrays, and each request's number, row and scored positions."""
    read, scored = (count, length), (count, length + _CONTINUATIONS)
    made = Continuations(
        tokens=np.zeros(read, np.int32),
        positions=np.zeros(read, np.int32),
        branch=np.full(read, PADDING, np.int32),
        seed=np.pad(draws.seeds([row.context for row in rows]), (0, count - len(rows))),
        score_from=np.zeros(scored, np.int32),
        score_token=np.zeros(scored, np.int32),
    )
    places = []
    for index, row in enumerate(rows):
        end = len(row.context)
        made.tokens[index, :end] = row.context
        made.positions[index, :end] = np.arange(end)
        made.branch[index, :end] = PROMPT
        lead = np.arange(row.lead)
        made.score_from[index, lead] = end - 1 - row.lead + lead
        made.score_token[index, lead] = row.context[end - row.lead :]
        start, first = end, row.lead
        # Any branch will do: attention compares them for equality alone.
        for branch, (number, ids) in enumerate(row.continuations, start=PADDING + 1):
            here = np.arange(start, start + len(ids) - 1)
            made.tokens[index, here] = ids[:-1]
            made.positions[index, here] = end + here - start
            made.branch[index, here] = branch
            # The context's last state predicts the first id of every continuation.
            where = np.arange(first, first + len(ids))
            made.score_from[index, where] = [end - 1, *here]
            made.score_token[index, where] = ids
            places.append((number, index, np.concatenate([lead, where])))
            start, first = start + len(here), first + len(ids)
    return made, places
