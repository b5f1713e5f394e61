"""Whether a few of a reader's judgements say what that reader wants.

Each reader's held-out pairs are ranked under z of a few judgements of their own, and of
every other reader's: if the codes know readers apart, the first rank better. Knows
nothing of how codes were trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.table import Table
from rich.text import Text

from lpc_jax import untrusted
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.evaluation import bootstrap, pairs
from lpc_jax.evaluation.bootstrap import Estimate
from lpc_jax.evaluation.system import System
from lpc_jax.generation import like
from lpc_jax.generation.like import By

# Times that a reader's examples are drawn, over which is averaged.
DRAWS = 4


@dataclasses.dataclass(frozen=True)
class Readers:
    """What judgements are worth.

    Attributes:
        names: Of the readers.
        count: Judgements that z is of.
        by: How it is found.
        accuracy: Share of a reader's pairs (row) ranked right under z of a reader's
            judgements (column).
        own: The mean over pairs under z of their own reader's.
        other: The mean under z of every other's.
        difference: Own less other, pair by pair.
        pairs: How many there are.
    """

    names: list[str]
    count: int
    by: By
    accuracy: Float[np.ndarray, "readers readers"]
    own: Estimate
    other: Estimate
    difference: Estimate
    pairs: int


def reader_of(some: Sequence[PreferenceExample]) -> list[str]:
    """Who judged each pair: its user, or where some have none, its source."""
    if all(one.user for one in some):
        return [one.user for one in some]
    return [one.source for one in some]


def measure(
    system: System,
    examples: tuple[Sequence[PreferenceExample], Drops],
    held_out: tuple[Sequence[PreferenceExample], Drops],
    *,
    counts: Sequence[int],
    by: By,
    reference: Callable[[Sequence[Any]], Float[np.ndarray, "B 2"]] | None,
    seed: int,
    on_progress: Callable[[int, int], None],
) -> list[Readers]:
    """Ranks every reader's pairs under z of every reader's judgements.

    Args:
        system: With codes.
        examples: Pairs that z may be of, with the rows that hold none.
        held_out: Pairs to be ranked, likewise.
        counts: Judgements that z is of; each gives a result.
        by: How z is found from them.
        reference: Log-probs of tokenized pairs under the reference, for a loss that has
            one.
        seed: Of the draws of examples.
        on_progress: Told how many pairs were ranked, and of how many.

    Raises:
        UserError: Fewer than two readers, or one with too few examples.
    """
    known, judged = (
        pairs.tokenize(some, system.tokenizer, drops, data=system.config.data)[0]
        for some, drops in (examples, held_out)
    )
    known_by, judged_by = (
        np.asarray(reader_of(some))[[pair.id for pair in tokens]]
        for (some, _), tokens in ((examples, known), (held_out, judged))
    )
    names = sorted(set(judged_by.tolist()))
    _require(names, known_by, max(counts))
    rng = np.random.default_rng(seed)
    drawn = [
        rng.choice(np.flatnonzero(known_by == name), count, replace=False)
        for count in counts
        for name in names
        for _ in range(DRAWS)
    ]
    used = np.unique(np.concatenate(drawn))
    place = {int(i): at for at, i in enumerate(used)}
    said = like.evidence(
        system,
        pairs.with_states(
            system, [dataclasses.replace(known[i], id=at) for at, i in enumerate(used)]
        ),
        by,
    )
    mixes = np.stack(
        [like.weights(said[[place[int(i)] for i in some]], by) for some in drawn]
    )
    judged = pairs.with_states(system, judged)
    logp = pairs.score_under(
        system, judged, mixes, on_progress=lambda done: on_progress(done, len(judged))
    )
    reward = pairs.reward(None, system.config.loss)
    of_reference = None if reference is None else reference(judged)
    rewards = np.stack(
        [reward.of(x, pairs.lengths(judged), of_reference) for x in logp]
    )
    right = (rewards[..., 0] > rewards[..., 1]).reshape(
        len(counts), len(names), DRAWS, -1
    )
    prompts = [pairs.prompt_key(held_out[0][pair.id]) for pair in judged]
    return [
        _summary(names, judged_by, of_count, prompts, count, by, seed)
        for count, of_count in zip(counts, right, strict=True)
    ]


def without_codes(
    system: System, some: Sequence[TokenizedPair]
) -> Float[np.ndarray, "B 2"]:
    """Log-probs of pairs without z, which is a frozen decoder's own reference."""
    assert system.latent is not None
    nothing = np.zeros((1, system.latent.num_codes))
    return pairs.score_under(system, some, nothing, on_progress=lambda _: None)[0]


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
    places = np.arange(len(judged_by))
    own = by_reader[own_row, places]
    other = (by_reader.sum(axis=0) - own) / (len(names) - 1)
    _, number = np.unique(prompts, return_inverse=True)
    found = bootstrap.estimates(
        np.stack([own, other, own - other], axis=1), number, seed=seed
    )
    accuracy = np.stack(
        [by_reader[:, own_row == row].mean(axis=1) for row in range(len(names))]
    )
    return Readers(names, count, by, accuracy, *found, pairs=len(judged_by))


def table(found: Readers) -> Table:
    """The matrix: rows are whose pairs, columns whose judgements."""
    made = Table(
        title=f"Ranked right under z of {found.count} judgements of ...",
        title_justify="left",
    )
    made.add_column("pairs of")
    for name in found.names:
        made.add_column(Text(untrusted.shown(name)), justify="right")
    for row, name in enumerate(found.names):
        cells = [f"{value:.3f}" for value in found.accuracy[row]]
        made.add_row(Text(untrusted.shown(name)), *cells)
    return made


def lines(found: Readers) -> list[str]:
    """Own and other readers' judgements, with intervals of 95 %."""

    def said(name: str, estimate: Estimate) -> str:
        if estimate.low is None or estimate.high is None:
            return f"{name}: {estimate.mean:.3f}"
        return f"{name}: {estimate.mean:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"

    return [
        f"{found.pairs} pairs of {len(found.names)} readers, z of {found.count}"
        f" judgements by {found.by}",
        said("under their own reader's judgements", found.own),
        said("under another reader's", found.other),
        said("own less other", found.difference),
    ]


def as_json(found: Readers) -> dict[str, Any]:
    """Everything, as JSON can hold it."""
    return dataclasses.asdict(found) | {"accuracy": found.accuracy.tolist()}
