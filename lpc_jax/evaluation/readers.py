"""Whether z from a few of a reader's judgements ranks that reader's held-out pairs.

If codes tell readers apart, own judgements rank better than every other reader's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Column, Table
from rich.text import Text

from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.pair import TokenizedPair
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
    accuracy: list[list[float]]  # of each reader's pairs under each reader's z
    own: Estimate  # under their own reader's z
    other: Estimate  # mean over the other readers' z
    difference: Estimate  # own less other, pair by pair
    pairs: int


def measure(
    policy: Policy,
    known: Texts,
    held_out: Texts,
    *,
    counts: Sequence[int],
    by: By,
    seed: int,
) -> list[Readers]:
    """Ranks every reader's pairs under z of every reader's judgements.

    Args:
        policy: With codes.
        known: Pairs to draw judgements from, as ``data.pairs.read`` gives them.
        held_out: Pairs to be ranked, likewise.
        counts: Judgements for a z; each count gives a result.
        by: How z follows from them, as in ``generation.like``.
        seed: Of the drawn judgements and of the intervals.
    """
    examples, known_by = _by_reader(policy, known)
    judged, judged_by = _by_reader(policy, held_out)
    names = sorted(set(judged_by.tolist()))
    _require(names, known_by, max(counts))
    rng = np.random.default_rng(seed)
    draws = [
        rng.choice(np.flatnonzero(known_by == name), count, replace=False)
        for count in counts
        for name in names
        for _ in range(DRAWS)
    ]
    mixes = _mixes(policy, examples, draws, by)
    judged = reading.with_states(policy, judged)
    reward = loss_table.reward(None, policy.config.loss)
    reference = _reference_logp(policy, judged) if reward.over_reference else None
    lengths = pair_data.lengths(judged)
    logp = reading.score_under(policy, judged, mixes)
    rewards = np.stack([reward.of(x, lengths, reference) for x in logp])
    right = rewards[..., 0] > rewards[..., 1]
    prompts = [pair_data.prompt_key(held_out[0][pair.id]) for pair in judged]
    by_count = right.reshape(len(counts), len(names), DRAWS, -1)
    return [
        _summary(names, judged_by, of_count, prompts, count, by, seed)
        for count, of_count in zip(counts, by_count, strict=True)
    ]


def _mixes(
    policy: Policy,
    examples: Sequence[TokenizedPair],
    draws: Sequence[np.ndarray],
    by: By,
) -> Float[np.ndarray, "M C"]:
    """Weights of the codes by each draw of the examples."""
    used = np.unique(np.concatenate(draws))
    read = reading.with_states(policy, [examples[i] for i in used])
    evidence = like.evidence(policy, read, by)
    places = (np.searchsorted(used, draw) for draw in draws)
    return np.stack([like.weights(evidence[place], by) for place in places])


def _by_reader(
    policy: Policy, texts: Texts
) -> tuple[Sequence[TokenizedPair], np.ndarray]:
    """Tokenized pairs and their users, or sources if any pair has no user."""
    examples, drops = texts
    rules = pair_data.rules(policy.config.data)
    tokens, _ = pair_data.tokenize(examples, policy.tokenizer, drops, **rules)
    field = "user" if all(text.user for text in examples) else "source"
    return tokens, np.asarray([getattr(examples[pair.id], field) for pair in tokens])


def _reference_logp(
    policy: Policy, judged: Sequence[TokenizedPair]
) -> Float[np.ndarray, "B 2"]:
    config = policy.config
    path = config.reference.path or config.model.path
    if path == config.model.path and config.decoder == "frozen":
        # A frozen decoder without z is its own reference.
        assert policy.latent is not None
        nothing = np.zeros((1, policy.latent.num_codes))
        return reading.score_under(policy, judged, nothing)[0]
    model = comparison.model_for(path, config)
    reference = loading.load(path, mesh=policy.mesh, model=model, base=config.base)
    # Cached hidden states are of the policy's decoder, not of the reference.
    bare = [dataclasses.replace(pair, states=None) for pair in judged]
    return reading.score(reference, bare, steering=None)


def _require(names: list[str], known_by: np.ndarray, count: int) -> None:
    if len(names) < 2:
        raise UserError(
            f"--like-own {count} compares readers, expected at least two users or"
            f" sources among the pairs, got {', '.join(names) or 'none'}."
        )
    for name in names:
        number = int(np.sum(known_by == name))
        if number < count:
            raise UserError(
                f"--like-own {count} needs {count} training pairs of every reader, got"
                f" {number} of {name!r}. Ask for fewer, or name a file of examples with"
                " --like."
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
    accuracy = [
        by_reader[:, own_row == row].mean(axis=1).tolist() for row in range(len(names))
    ]
    return Readers(names, count, by, accuracy, *estimates, pairs=len(judged_by))


def table(result: Readers) -> Table:
    """Accuracies: rows are the pairs' readers, columns the judgements'."""
    title = f"Ranked right under z of {result.count} judgements of ..."
    names = [Text(untrusted.shown(name)) for name in result.names]
    columns = [Column(name, justify="right") for name in names]
    made = Table("pairs of", *columns, title=title, title_justify="left")
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
