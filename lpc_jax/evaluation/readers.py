"""Whether z from a few of a reader's judgements ranks that reader's held-out pairs.

If codes tell readers apart, own judgements rank better than every other reader's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table
from rich.text import Text

from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.evaluation import comparison, intervals
from lpc_jax.evaluation.intervals import Estimate
from lpc_jax.files import untrusted
from lpc_jax.generation import like
from lpc_jax.generation.like import By
from lpc_jax.runtime import loading, reading
from lpc_jax.runtime.policy import Policy

# Draws of a reader's judgements, over which accuracies are averaged.
DRAWS = 4
Texts = tuple[Sequence[PreferenceExample], Drops]


@dataclasses.dataclass(frozen=True)
class Readers:
    """Accuracies under z of ``count`` judgements; estimates are means over pairs."""

    names: list[str]
    count: int  # judgements for a z
    by: By
    accuracy: Float[np.ndarray, "readers readers"]  # row's pairs, column's z
    own: Estimate  # under their own reader's z
    other: Estimate  # mean over the other readers' z
    difference: Estimate  # own less other, pair by pair
    pairs: int


def measure(
    asked: Policy,
    known: Texts,
    held_out: Texts,
    *,
    counts: Sequence[int],
    by: By,
    seed: int,
) -> list[Readers]:
    """Ranks every reader's pairs under z of every reader's judgements.

    Args:
        asked: A policy with codes.
        known: Pairs to draw judgements from, as ``data.pairs.read`` gives them.
        held_out: Pairs to be ranked, likewise.
        counts: Judgements for a z; each count gives a result.
        by: How z follows from them, as in ``generation.like``.
        seed: Of the drawn judgements and of the intervals.
    """
    examples, known_by = _by_reader(asked, known)
    judged, judged_by = _by_reader(asked, held_out)
    names = sorted(set(judged_by.tolist()))
    _require(names, known_by, max(counts))
    mixes = _mixes(asked, examples, known_by, names, counts, by, seed)
    judged = reading.with_states(asked, judged)
    reward = loss_table.reward(None, asked.config.loss)
    reference = _reference_logp(asked, judged) if reward.over_reference else None
    rewards = np.stack(
        [
            reward.of(logp, pair_data.lengths(judged), reference)
            for logp in reading.score_under(asked, judged, mixes)
        ]
    )
    right = rewards[..., 0] > rewards[..., 1]
    right = right.reshape(len(counts), len(names), DRAWS, -1)
    prompts = [pair_data.prompt_key(held_out[0][pair.id]) for pair in judged]
    return [
        _summary(names, judged_by, of_count, prompts, count, by, seed)
        for count, of_count in zip(counts, right, strict=True)
    ]


def _mixes(
    asked: Policy,
    examples: Sequence[TokenizedPair],
    known_by: np.ndarray,
    names: list[str],
    counts: Sequence[int],
    by: By,
    seed: int,
) -> Float[np.ndarray, "M C"]:
    """Weights of the codes for each count, reader and draw of judgements."""
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(known_by == name), count, replace=False)
        for count in counts
        for name in names
        for _ in range(DRAWS)
    ]
    used = np.unique(np.concatenate(drawn))
    with_states = reading.with_states(asked, [examples[i] for i in used])
    evidence = like.evidence(asked, with_states, by)
    places = (np.searchsorted(used, draw) for draw in drawn)
    return np.stack([like.weights(evidence[place], by) for place in places])


def _by_reader(
    asked: Policy, texts: Texts
) -> tuple[Sequence[TokenizedPair], np.ndarray]:
    """Tokenized pairs and their users, or sources if any pair has no user."""
    examples, drops = texts
    tokens, _ = pair_data.tokenize(
        examples, asked.tokenizer, drops, **pair_data.rules(asked.config.data)
    )
    field = "user" if all(text.user for text in examples) else "source"
    return tokens, np.asarray([getattr(examples[pair.id], field) for pair in tokens])


def _reference_logp(
    asked: Policy, judged: Sequence[TokenizedPair]
) -> Float[np.ndarray, "B 2"]:
    config = asked.config
    path = config.reference.path or config.model.path
    if path == config.model.path and config.decoder == "frozen":
        # A frozen decoder without z is its own reference.
        assert asked.latent is not None
        nothing = np.zeros((1, asked.latent.num_codes))
        return reading.score_under(asked, judged, nothing)[0]
    model = comparison.model_for(path, config)
    reference = loading.load(path, mesh=asked.mesh, model=model)
    # Cached hidden states are of the policy's decoder, not of the reference.
    bare = [dataclasses.replace(pair, states=None) for pair in judged]
    return reading.score(reference, bare, steering=None)


def _require(names: list[str], known_by: np.ndarray, count: int) -> None:
    if len(names) < 2:
        raise UserError(
            f"--like-own {count} compares readers, expected at least two users or"
            f" sources among the pairs, got {', '.join(names) or 'none'}."
        )
    few = [name for name in names if np.sum(known_by == name) < count]
    if few:
        raise UserError(
            f"--like-own {count} needs {count} training pairs of every reader, got"
            f" {int(np.sum(known_by == few[0]))} of {few[0]!r}. Ask for fewer, or name"
            " a file of examples with --like."
        )


def _summary(
    names: list[str],
    judged_by: np.ndarray,
    right: Bool[np.ndarray, "readers draws B"],
    prompts: list[str],
    count: int,
    by: By,
    seed: int,
) -> Readers:
    by_reader = right.mean(axis=1)  # readers B
    own_row = np.asarray([names.index(name) for name in judged_by])
    own = by_reader[own_row, np.arange(len(judged_by))]
    other = (by_reader.sum(axis=0) - own) / (len(names) - 1)
    _, number = np.unique(prompts, return_inverse=True)
    columns = np.stack([own, other, own - other], axis=1)
    estimates = intervals.estimates(columns, number, seed=seed)
    accuracy = np.stack(
        [by_reader[:, own_row == row].mean(axis=1) for row in range(len(names))]
    )
    return Readers(names, count, by, accuracy, *estimates, pairs=len(judged_by))


def table(result: Readers) -> Table:
    """Accuracies: rows are the pairs' readers, columns the judgements'."""
    made = Table(
        title=f"Ranked right under z of {result.count} judgements of ...",
        title_justify="left",
    )
    names = [Text(untrusted.shown(name)) for name in result.names]
    made.add_column("pairs of")
    for name in names:
        made.add_column(name, justify="right")
    for name, row in zip(names, result.accuracy, strict=True):
        made.add_row(name, *(f"{value:.3f}" for value in row))
    return made


def lines(result: Readers) -> list[str]:
    """Accuracies under own and other readers' judgements, with intervals."""
    return [
        f"{result.pairs} pairs of {len(result.names)} readers, z of {result.count}"
        f" judgements by {result.by}",
        f"under their own reader's judgements: {result.own.text()}",
        f"under another reader's: {result.other.text()}",
        f"own less other: {result.difference.text()}",
    ]


def as_json(result: Readers) -> dict[str, Any]:
    """The result as JSON."""
    return dataclasses.asdict(result) | {"accuracy": result.accuracy.tolist()}
