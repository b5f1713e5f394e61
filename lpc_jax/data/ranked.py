"""Ranked answers to a prompt as pairs: all of them, or the best against others."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any, Literal, assert_never

from lpc_jax.data.forms import known
from lpc_jax.data.forms import wrong as _wrong

Ranked = Literal["all", "best_each", "best_random"]
# Rules that leave a pair or a row out.
TIE, ALONE, UNSCORED = "equal scores", "one answer alone", "answer without a score"
_Scored = tuple[float, Any]


def rows_of(
    row: Any, *, origin: str, ranked: Ranked, events: list[tuple[str, str]]
) -> Iterator[Any]:
    """A row for each pair of its ranked ``answers``; a row of one pair as it is.

    ``scores`` say which is better; without them the first is the best. What makes no
    pair goes to ``events`` by its rule.

    Raises:
        UserError: Answers or scores that are none, or not one score an answer.
    """
    row = known(row, origin) if isinstance(row, dict) else row
    if not isinstance(row, dict) or "answers" not in row or row.get("chosen"):
        yield row
        return
    every = _scored(row, origin)
    scored = [one for one in every if not math.isnan(one[0])]
    events += [(UNSCORED, origin)] * (len(every) - len(scored))
    if len(scored) < 2:
        events.append((ALONE, origin))
        return
    rest = {k: v for k, v in row.items() if k not in ("answers", "scores")}
    for better, worse in _chosen_pairs(scored, row, origin, ranked, events):
        yield rest | {"chosen": better[1], "rejected": worse[1]}


def _scored(row: dict[str, Any], origin: str) -> list[_Scored]:
    answers = row["answers"]
    if not isinstance(answers, list) or not all(
        isinstance(answer, str | list | dict) for answer in answers
    ):
        raise _wrong(origin, "answers must be a list of texts or messages", answers)
    scores = row.get("scores", list(range(len(answers), 0, -1)))
    if not isinstance(scores, list) or len(scores) != len(answers):
        expected = f"scores must be a list of {len(answers)} numbers, one an answer"
        raise _wrong(origin, expected, scores)
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, int | float | None):
            raise _wrong(origin, "a score must be a number", score)
    numbers = [math.nan if score is None else float(score) for score in scores]
    return list(zip(numbers, answers, strict=True))


def _chosen_pairs(
    scored: list[_Scored],
    row: Any,
    origin: str,
    ranked: Ranked,
    events: list[tuple[str, str]],
) -> list[tuple[_Scored, _Scored]]:
    """Pairs of unequal scores, the better answer first; ties go to ``events``."""
    best, *others = ordered = sorted(scored, key=lambda one: -one[0])  # stable
    match ranked:
        case "all":
            pairs = list(itertools.combinations(ordered, 2))
        case "best_each" | "best_random":
            pairs = [(best, other) for other in others]
        case _:
            assert_never(ranked)
    unequal = [pair for pair in pairs if pair[0][0] != pair[1][0]]
    if ranked != "best_random":
        events += [(TIE, origin)] * (len(pairs) - len(unequal))
        return unequal
    if not unequal:
        events.append((TIE, origin))
        return []
    # Drawn by the row alone: the same in any file, order and limit.
    content = json.dumps(row, sort_keys=True, default=str).encode()
    drawn = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return [unequal[drawn % len(unequal)]]
