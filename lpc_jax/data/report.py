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

ORIGINS_KEPT = 5
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
        counts: collections.Counter[str] = collections.Counter()
        origins: dict[str, tuple[str, ...]] = {}
        for rule, origin in events:
            counts[rule] += 1
            if counts[rule] <= ORIGINS_KEPT:
                origins[rule] = (*origins.get(rule, ()), origin)
        return cls(dict(counts), origins)

    @property
    def total(self) -> int:
        """Rows dropped by any rule."""
        return sum(self.counts.values())

    def __add__(self, other: Drops) -> Drops:
        rules = dict.fromkeys([*self.counts, *other.counts])
        return Drops(
            {r: self.counts.get(r, 0) + other.counts.get(r, 0) for r in rules},
            {
                r: (*self.origins.get(r, ()), *other.origins.get(r, ()))[:ORIGINS_KEPT]
                for r in rules
            },
        )

    def lines(self) -> list[str]:
        """One line a rule: its count, its name, its first rows."""
        return [
            f"{count:,} {rule} ({_listed(self.origins[rule], count)})"
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
        """The report as plain text."""
        return [
            f"pairs: {self.read:,} read, {self.kept:,} kept, {self.drops.total:,}"
            " dropped",
            *(f"  dropped: {line}" for line in self.drops.lines()),
            f"cut: {self.cut_prompts:,} prompts, {self.cut_chosen:,} chosen,"
            f" {self.cut_rejected:,} rejected",
            f"prompt not a token prefix: {self.prefix_mismatches:,}",
            f"duplicates, kept: {self.duplicates:,}",
            f"tokens ({', '.join(QUANTILES)}):",
            *(
                f"  {name}: {', '.join(f'{value:,}' for value in values)}"
                for name, values in self.lengths.items()
            ),
            f"chosen is longer: {self.chosen_longer:.1%} (the accuracy of preferring"
            f" the longer answer); same length: {self.same_length:.1%}",
            "sources: " + ", ".join(f"{k} {v:,}" for k, v in self.sources.items()),
        ]

    def tables(self) -> list[Table]:
        """The report as tables for a rich console: rules, lengths, sources."""
        rules = Table("pairs", "", "first rows", title="Pairs")
        rules.columns[1].justify = "right"
        rules.add_row("read", f"{self.read:,}", "")
        for rule, count in self.drops.counts.items():
            # As text: rich would take brackets of a file's words for its markup.
            rules.add_row(
                Text(f"dropped: {rule}"),
                f"{count:,}",
                Text(", ".join(self.drops.origins[rule])),
            )
        rules.add_row("kept", f"{self.kept:,}", "", style="bold")
        for name, count in (
            ("prompt cut", self.cut_prompts),
            ("chosen cut", self.cut_chosen),
            ("rejected cut", self.cut_rejected),
            ("prompt not a token prefix", self.prefix_mismatches),
            ("duplicate", self.duplicates),
        ):
            rules.add_row(f"  of these {name}", f"{count:,}", "")
        lengths = Table("tokens", *QUANTILES, title="Lengths")
        for column in lengths.columns[1:]:
            column.justify = "right"
        for name, values in self.lengths.items():
            lengths.add_row(name, *(f"{value:,}" for value in values))
        lengths.caption = (
            f"chosen is longer in {self.chosen_longer:.1%} of pairs (the accuracy of"
            f" preferring the longer answer), as long in {self.same_length:.1%}"
        )
        sources = Table("source", "pairs", "share", title="Sources")
        for column in sources.columns[1:]:
            column.justify = "right"
        for name, count in self.sources.items():
            sources.add_row(Text(name), f"{count:,}", f"{count / self.kept:.1%}")
        return [rules, lengths, sources]


def quantiles(values: Int[np.ndarray, "_"]) -> tuple[int, ...]:
    """The observed values at ``QUANTILES``, each one of ``values``."""
    at = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return tuple(int(value) for value in at)


def _listed(origins: tuple[str, ...], count: int) -> str:
    return ", ".join(origins) + (", ..." if count > len(origins) else "")
