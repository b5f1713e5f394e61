"""Packs pairs into rows by lengths and a seed alone, so alike on every host."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from lpc_jax.data.columns import Columns
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.truncation import Ids
from lpc_jax.errors import UserError
from lpc_jax.types import CHOSEN, NO_PAIR, PADDING, PROMPT, REJECTED, Batch

# Room for scored positions beyond the data's average share of a row: enough not to keep
# pairs out of a row. Chunks that stay empty cost no pass through the LM head.
_SCORED_SLACK = 1.3
_TOGETHER = 4  # pairs of one user that come together, at least, where there are so many
_CANDIDATES = 32  # row lengths tried: a finer choice saves under a thirtieth of a row


@dataclasses.dataclass(frozen=True)
class RowShape:
    """The few static shapes of a run's micro-batches: each is compiled once."""

    rows: int  # R
    row_lengths: tuple[int, ...]  # choices of T, ascending
    pair_slots: int  # P
    scored: int  # S of the greatest length; no row has more of them than tokens

    @property
    def of_one_length(self) -> RowShape:
        """The longest rows alone: what a set that is read once is worth compiling."""
        return dataclasses.replace(self, row_lengths=self.row_lengths[-1:])

    def holding(self, tokens: int) -> int:
        """The smallest row length of at least ``tokens``."""
        return next(length for length in self.row_lengths if length >= tokens)


def pair_lengths(pairs: Sequence[TokenizedPair]) -> Int[np.ndarray, "B 3"]:
    """Tokens of prompt, chosen and rejected that each pair takes in a row."""
    if isinstance(pairs, Columns):
        return np.ascontiguousarray(pairs.rows["lengths"])
    lengths = [(len(_prompt(p)), len(p.chosen), len(p.rejected)) for p in pairs]
    return np.asarray(lengths, np.int32).reshape(-1, 3)


def _prompt(pair: TokenizedPair) -> Ids:
    """The prompt's tokens in a row; only the last where hidden states are known."""
    return pair.prompt if pair.states is None else pair.prompt[-1:]


def row_shape(
    lengths: Int[np.ndarray, "B 3"],
    *,
    rows: int,
    row_length: int,
    pairs_per_row: int,
    score_chunk: int,
) -> RowShape:
    """The smallest shape of one row length; ``UserError`` if a pair is longer."""
    totals = lengths.sum(axis=1)
    longest = int(np.argmax(totals))
    if totals[longest] > row_length:
        raise UserError(
            f"packing.row_length must be at least {totals[longest]}, got {row_length}:"
            f" pair {longest} has {lengths[longest, 0]} prompt,"
            f" {lengths[longest, 1]} chosen and {lengths[longest, 2]} rejected tokens."
            " Raise packing.row_length or lower data.max_length."
        )
    scored = lengths[:, 1:].sum(axis=1)
    typical = row_length * scored.sum() / totals.sum() * _SCORED_SLACK
    positions = max(int(scored.max()), int(typical))
    positions += -positions % score_chunk
    return RowShape(rows, (row_length,), pairs_per_row, min(positions, row_length))


def choose_row_lengths(
    shape: RowShape,
    lengths: Int[np.ndarray, "B 3"],
    steps: Sequence[Int[np.ndarray, "_"]],
    *,
    choices: int,
    unit: int,
    least_saved: float = 0.0,
) -> RowShape:
    """The shape with up to ``choices`` row lengths, the shorter multiples of ``unit``.

    Greedy: each added length is the one with which the steps (indices of pairs) take
    the fewest tokens, if it saves more than ``least_saved`` of them a row; lengths that
    no step takes are removed again.
    """
    (row_length,) = shape.row_lengths
    stride = unit * -(-row_length // (unit * _CANDIDATES))
    shorter = range(stride, row_length, stride)
    # Tokens of micro-batches, by the length that their rows are filled up to.
    needs = {
        most: [_needs(lengths[step], shape, most) for step in steps]
        for most in (*shorter, row_length)
    }

    def tokens(chosen: list[int]) -> float:
        sizes = np.asarray(sorted(chosen))
        plans = [
            [
                np.inf if need is None else sizes[np.searchsorted(sizes, need)].sum()
                for need in needs[most]
            ]
            for most in chosen
        ]
        return float(np.min(plans, axis=0).sum())

    chosen = [row_length]
    while shorter and len(chosen) < choices:
        added = min(shorter, key=lambda length: tokens([*chosen, length]))
        if tokens(chosen) - tokens([*chosen, added]) <= least_saved:
            break
        chosen.append(added)
    longest = int(lengths.sum(axis=1).max())
    for length in sorted(chosen):
        rest = [other for other in chosen if other != length]
        if max(rest, default=0) >= longest and tokens(rest) <= tokens(chosen):
            chosen = rest
    return dataclasses.replace(shape, row_lengths=tuple(sorted(chosen)))


def _needs(
    lengths: Int[np.ndarray, "B 3"], shape: RowShape, row_length: int
) -> Int[np.ndarray, "micro_batches"] | None:
    """Tokens of each micro-batch's fullest row; None if a pair is longer."""
    totals = lengths.sum(axis=1)
    if totals.max(initial=0) > row_length:
        return None
    filled = [totals[row].sum() for row in _fill_rows(lengths, shape, row_length)]
    return np.sort(filled)[::-1][:: shape.rows]  # the first of each R is the fullest


def plan_micro_batches(
    lengths: Int[np.ndarray, "B 3"], shape: RowShape
) -> list[tuple[int, list[list[int]]]]:
    """A row length and at most R rows for each micro-batch; every pair is in one row.

    Rows, lists of indices into ``lengths``, are filled up to each length in turn and
    cut to a shorter one that they fit; the plan with the fewest tokens is taken.
    """
    totals = lengths.sum(axis=1)
    longest = int(totals.max(initial=0))
    plans = []
    for most in reversed([n for n in shape.row_lengths if n >= longest]):
        rows = _fill_rows(lengths, shape, most)
        filled = [(shape.holding(int(totals[row].sum())), row) for row in rows]
        filled.sort(key=lambda of_length: -of_length[0])  # stable: one length in order
        groups = [filled[i : i + shape.rows] for i in range(0, len(rows), shape.rows)]
        plans.append([(group[0][0], [row for _, row in group]) for group in groups])
    return min(plans, key=lambda plan: sum(length for length, _ in plan))


def _fill_rows(
    lengths: Int[np.ndarray, "B 3"], shape: RowShape, row_length: int
) -> list[list[int]]:
    """First-fit decreasing: indices into ``lengths``, row by row."""
    totals, scored = lengths.sum(axis=1), lengths[:, 1:].sum(axis=1)
    # Tokens, scored positions and pair slots: what pairs take, what rows have left.
    needs = np.stack([totals, scored, np.ones_like(totals)], axis=1)
    room = np.tile([row_length, shape.scored, shape.pair_slots], (len(lengths), 1))
    rows: list[list[int]] = [[] for _ in lengths]  # as many as there can be
    for index in np.argsort(-totals, kind="stable"):
        first = int(np.argmax((room >= needs[index]).all(axis=1)))
        rows[first].append(int(index))
        room[first] -= needs[index]
    return [row for row in rows if row]


def empty_batch(
    shape: RowShape,
    length: int,
    *,
    reference_columns: int,
    states: Float[np.ndarray, "_ D"] | None = None,
) -> Batch:
    """A micro-batch of padding; it has hidden states of the width of ``states``."""

    def zeros(*axes: int) -> np.ndarray:
        return np.zeros((shape.rows, *axes), np.int32)

    scored, slots = min(shape.scored, length), shape.pair_slots
    return Batch(
        tokens=zeros(length),
        positions=zeros(length),
        pair=zeros(length) + NO_PAIR,
        branch=zeros(length) + PADDING,
        score_from=zeros(scored),
        score_token=zeros(scored),
        score_slot=zeros(scored),
        score_mask=zeros(scored).astype(bool),
        prompt_end=zeros(slots),
        chosen_end=zeros(slots),
        rejected_end=zeros(slots),
        pair_mask=zeros(slots).astype(bool),
        pair_id=zeros(slots),
        lengths=zeros(slots, 2) + 1,  # losses divide by them, in empty slots too
        reference_logp=zeros(slots, reference_columns).astype(np.float32)
        if reference_columns
        else None,
        hidden=None
        if states is None
        else np.zeros((shape.rows, length, states.shape[1]), states.dtype),
    )


def _write_pair(
    batch: Batch, pair: TokenizedPair, row: int, slot: int, start: int, scored: int
) -> tuple[int, int]:
    """Writes one pair at ``start``; returns where tokens and scores go on."""
    prompt = _prompt(pair)
    sizes = np.asarray([len(prompt), len(pair.chosen), len(pair.rejected)])
    prompt_end, chosen_end, rejected_end = (start + np.cumsum(sizes) - 1).tolist()
    answers = np.concatenate([pair.chosen, pair.rejected])
    span = slice(start, rejected_end + 1)  # the pair's tokens in the row
    scored_span = slice(scored, scored + len(answers))  # its scored positions
    batch.tokens[row, span] = np.concatenate([prompt, answers])
    # For RoPE both answers continue from the prompt, as if each stood alone after it.
    starts = np.repeat([0, sizes[1]], sizes[1:])
    positions = sizes[0] + np.arange(len(answers)) - starts
    batch.positions[row, span] = np.concatenate([np.arange(sizes[0]), positions])
    batch.pair[row, span] = slot
    batch.branch[row, span] = np.repeat([PROMPT, CHOSEN, REJECTED], sizes)
    # A token is predicted one before it, an answer's first at the prompt's end.
    batch.score_from[row, scored_span] = np.arange(prompt_end, rejected_end)
    batch.score_from[row, scored + sizes[1]] = prompt_end
    batch.score_token[row, scored_span] = answers
    batch.score_slot[row, scored_span] = 2 * slot + np.repeat([0, 1], sizes[1:])
    batch.score_mask[row, scored_span] = True
    batch.prompt_end[row, slot] = prompt_end
    batch.chosen_end[row, slot] = chosen_end
    batch.rejected_end[row, slot] = rejected_end
    batch.lengths[row, slot] = sizes[1:]
    batch.pair_mask[row, slot] = True
    batch.pair_id[row, slot] = pair.id
    if pair.states is not None:
        assert batch.hidden is not None
        batch.hidden[row, prompt_end : span.stop] = pair.states
    return span.stop, scored_span.stop


def micro_batches(
    pairs: Sequence[TokenizedPair],
    shape: RowShape,
    *,
    reference_logp: Float[np.ndarray, "B _"] | None,
) -> list[Batch]:
    """All pairs once, packed into as many micro-batches as they need."""
    batches = []
    for length, rows in plan_micro_batches(pair_lengths(pairs), shape):
        batch = empty_batch(
            shape,
            length,
            reference_columns=0 if reference_logp is None else reference_logp.shape[1],
            states=pairs[0].states,
        )
        for row, indices in enumerate(rows):
            start = scored = 0
            for slot, index in enumerate(indices):
                start, scored = _write_pair(
                    batch, pairs[index], row, slot, start, scored
                )
                if reference_logp is not None:
                    assert batch.reference_logp is not None
                    batch.reference_logp[row, slot] = reference_logp[index]
        batches.append(batch)
    return batches


def steps_per_epoch(count: int, *, pairs_per_step: int) -> int:
    """Steps of an epoch over ``count`` pairs; the last may be smaller."""
    return -(-count // pairs_per_step)


def step_indices(
    count: int,
    *,
    step: int,
    pairs_per_step: int,
    seed: int,
    users: Int[np.ndarray, "_"] | None = None,
) -> Int[np.ndarray, "B"]:
    """The pairs that a step of the run reads: a function of its number alone.

    The last step of an epoch has what is left. With ``users``, who judged each pair,
    pairs of one user come a few together, as ``latent.pool = "user"`` needs them.
    """
    epoch, within = divmod(step, steps_per_epoch(count, pairs_per_step=pairs_per_step))
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(count)
    if users is not None:
        by_user = order[np.argsort(users[order], kind="stable")]
        ends = np.flatnonzero(np.diff(users[by_user])) + 1
        groups = [
            group
            for own in np.split(by_user, ends)
            for group in np.array_split(own, max(len(own) // _TOGETHER, 1))
        ]
        order = np.concatenate([groups[i] for i in rng.permutation(len(groups))])
    return order[within * pairs_per_step : (within + 1) * pairs_per_step]
