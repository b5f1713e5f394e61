"""What became of a data set's pairs: dropped, cut, duplicated, how long.

Knows nothing of how pairs are read or tokenized; it holds counts and prints them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable, Mapping

import numpy as np
from jaxtyping import Int
from rich.table import Table
from rich.text import Text

_ORIGINS_KEPT = 5
QUANTILES = {"least": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclasses.dataclass(frozen=True)
class Drops:
    """Rows left out, by the rule that left them out.

    Attributes:
        counts: Rows per rule, in the order in which rules first applied.
        origins: The first few rows of each rule, as ``file:line``.
    """

    counts: Mapping[str, int]
    origins: Mapping[str, tuple[str, ...]]

    @classmethod
    def count(cls, events: Iterable[tuple[str, str]]) -> Drops:
        """The drops among ``(rule, origin)`` events, one a dropped row."""
        by_rule: dict[str, list[str]] = {}
        for rule, origin in events:
            by_rule.setdefault(rule, []).append(origin)
        return cls(
            {rule: len(origins) for rule, origins in by_rule.items()},
            {rule: tuple(o[:_ORIGINS_KEPT]) for rule, o in by_rule.items()},
        )

    @property
    def total(self) -> int:
        """Rows dropped by any rule."""
        return sum(self.counts.values())

    def __add__(self, other: Drops) -> Drops:
        counts = collections.Counter(self.counts) + collections.Counter(other.counts)
        origins = {
            rule: (*self.origins.get(rule, ()), *other.origins.get(rule, ()))
            for rule in counts
        }
        return Drops(
            dict(counts), {rule: o[:_ORIGINS_KEPT] for rule, o in origins.items()}
        )

    def lines(self) -> list[str]:
        """One line a rule: its count, its name, its first rows."""
        return [
            f"{count:,} {rule} ({', '.join(self.origins[rule])}"
            f"{', ...' * (count > len(self.origins[rule]))})"
            for rule, count in self.counts.items()
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """What tokenizing did to a data set.

    Attributes:
        read: Rows that came in, dropped ones included.
        kept: Pairs that remain.
        drops: Rows left out, by rule.
        cut_prompts: Kept pairs whose prompt lost its start.
        cut_chosen: Kept pairs whose chosen answer lost its end.
        cut_rejected: Kept pairs whose rejected answer lost its end.
        prefix_mismatches: Kept pairs whose prompt, tokenized alone, was no prefix of
            prompt plus answer; their common prefix is the prompt.
        duplicates: Kept pairs whose three token strings all occurred before.
        lengths: Token counts at ``QUANTILES`` of ``prompt``, ``chosen``, ``rejected``
            and ``pair`` (all three).
        chosen_longer: Share of kept pairs whose chosen answer has more tokens: the
            accuracy of preferring the longer answer.
        same_length: Share of kept pairs whose answers have as many tokens.
        sources: Kept pairs per source.
    """

    read: int
    kept: int
    drops: Drops
    cut_prompts: int
    cut_chosen: int
    cut_rejected: int
    prefix_mismatches: int
    duplicates: int
    lengths: Mapping[str, tuple[int, ...]]
    chosen_longer: float
    same_length: float
    sources: Mapping[str, int]

    def lines(self) -> list[str]:
        """How many pairs were read, kept, dropped and cut, as plain text."""
        return [
            f"pairs: {self.read:,} read, {self.kept:,} kept, {self.drops.total:,}"
            " dropped",
            *(f"  dropped: {line}" for line in self.drops.lines()),
            f"cut: {self.cut_prompts:,} prompts, {self.cut_chosen:,} chosen,"
            f" {self.cut_rejected:,} rejected",
        ]

    def tables(self) -> list[Table]:
        """All of the report, for a rich console: rules, lengths, sources."""
        rules = _table("Pairs", "pairs", "", "first rows", numbers=1)
        rules.add_row("read", f"{self.read:,}", "")
        for rule, count in self.drops.counts.items():
            # As text: rich would take brackets of a file's words for its markup.
            origins = Text(", ".join(self.drops.origins[rule]))
            rules.add_row(Text(f"dropped: {rule}"), f"{count:,}", origins)
        rules.add_row("kept", f"{self.kept:,}", "", style="bold")
        of_these = {
            "prompt cut": self.cut_prompts,
            "chosen cut": self.cut_chosen,
            "rejected cut": self.cut_rejected,
            "prompt not a token prefix": self.prefix_mismatches,
            "duplicate": self.duplicates,
        }
        for name, count in of_these.items():
            rules.add_row(f"  of these {name}", f"{count:,}", "")
        lengths = _table("Lengths", "tokens", *QUANTILES, numbers=len(QUANTILES))
        for name, values in self.lengths.items():
            lengths.add_row(name, *(f"{value:,}" for value in values))
        lengths.caption = (
            f"chosen is longer in {self.chosen_longer:.1%} of pairs (the accuracy of"
            f" preferring the longer answer), as long in {self.same_length:.1%}"
        )
        sources = _table("Sources", "source", "pairs", "share", numbers=2)
        for name, count in self.sources.items():
            sources.add_row(Text(name), f"{count:,}", f"{count / self.kept:.1%}")
        return [rules, lengths, sources]


def _table(title: str, *columns: str, numbers: int) -> Table:
    """A table whose columns after the first are numbers, so many of them."""
    table = Table(*columns, title=title)
    for column in table.columns[1 : 1 + numbers]:
        column.justify = "right"
    return table


def quantiles(values: Int[np.ndarray, "_"]) -> tuple[int, ...]:
    """The observed values at ``QUANTILES``, each one of ``values``."""
    at = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return tuple(int(value) for value in at)
