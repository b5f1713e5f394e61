"""Counts of a data set's pairs: read, dropped, cut, duplicated, how long."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int
from rich.table import Table
from rich.text import Text

from lpc_jax.files import untrusted

_ORIGINS_SHOWN = 5
QUANTILES = {"least": 0.0, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "most": 1.0}


@dataclasses.dataclass
class Tally:
    """What reading and tokenizing count besides the pairs that they keep."""

    # Dropped rows and pairs, and notes of kept ones: the rule, and file:line.
    events: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    notes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    unread: dict[str, int] = dataclasses.field(default_factory=dict)  # rows, by field
    mismatches: int = 0  # pairs whose prompt was no token prefix
    first: str = ""  # what the first row has

    def meet(self, unread: Sequence[str], form: str = "") -> None:
        """Counts a row's fields that nothing reads, and keeps the first one's form."""
        self.first = self.first or form
        for name in unread:
            self.unread[name] = self.unread.get(name, 0) + 1

    def __add__(self, other: Tally) -> Tally:
        unread = collections.Counter(self.unread) + collections.Counter(other.unread)
        events, notes = self.events + other.events, self.notes + other.notes
        mismatches = self.mismatches + other.mismatches
        return Tally(events, notes, dict(unread), mismatches, self.first or other.first)


@dataclasses.dataclass(frozen=True)
class Drops:
    """Rows that are dropped, or noted and kept, as ``(rule, file:line)`` each."""

    events: Sequence[tuple[str, str]] = ()

    @property
    def total(self) -> int:
        """Rows by any rule."""
        return len(self.events)

    @property
    def counts(self) -> dict[str, int]:
        """Rows by rule, in the order of first occurrence."""
        return dict(collections.Counter(rule for rule, _ in self.events))

    def origins(self, rule: str) -> str:
        """The first few rows of a rule."""
        origins = (origin for by, origin in self.events if by == rule)
        return ", ".join(itertools.islice(origins, _ORIGINS_SHOWN))

    def __add__(self, other: Drops) -> Drops:
        return Drops([*self.events, *other.events])

    def lines(self) -> list[str]:
        """One line a rule: its count, its name, its first rows."""
        return [
            f"{count:,} {rule} ({self.origins(rule)}"
            f"{', ...' * (count > _ORIGINS_SHOWN)})"
            for rule, count in self.counts.items()
        ]


@dataclasses.dataclass(frozen=True)
class Report:
    """What tokenizing did to a data set."""

    read: int  # rows that came in, dropped ones included
    kept: int  # of which are all below but drops
    drops: Drops
    cut_prompts: int  # at their start
    cut_chosen: int  # at their end
    cut_rejected: int
    prefix_mismatches: int  # the prompt alone was no token prefix of prompt plus answer
    duplicates: int  # all three token strings occurred before
    lengths: Mapping[str, tuple[int, ...]]  # tokens at QUANTILES: each string, all
    chosen_longer: float  # share: the accuracy of preferring the longer answer
    same_length: float  # share
    sources: Mapping[str, int]
    notes: Drops = Drops()  # what is worth a count in pairs that are kept
    unread: Mapping[str, int] = dataclasses.field(
        default_factory=dict
    )  # rows, by field
    first: Sequence[str] = ()  # the form of each source's first row
    taken: Sequence[str] = ()  # of several files, how many pairs of each

    def _unread(self) -> list[str]:
        """One line for all fields that nothing reads, if there are any."""
        names = ((untrusted.shown(n or "unnamed"), c) for n, c in self.unread.items())
        fields = (f"{name} ({count:,})" for name, count in names)
        return [f"fields not read (rows): {', '.join(fields)}"] if self.unread else []

    def lines(self) -> list[str]:
        """How many pairs were read, kept, dropped and cut, as plain text."""
        return [
            f"pairs: {self.read:,} read, {self.kept:,} kept, {self.drops.total:,}"
            " dropped",
            *(f"  dropped: {line}" for line in self.drops.lines()),
            *(f"  kept: {line}" for line in self.notes.lines()),
            *self._unread(),
            f"cut: {self.cut_prompts:,} prompts, {self.cut_chosen:,} chosen,"
            f" {self.cut_rejected:,} rejected",
            *self.taken,
        ]

    def tables(self) -> list[Table]:
        """All of the report, for a rich console: rules, lengths, sources."""
        rules = _table("Pairs", "pairs", "", "first rows", numbers=1)
        rules.add_row("read", f"{self.read:,}", "")
        for rule, count in self.drops.counts.items():
            # As text: rich would take brackets of a file's words for its markup.
            origins = Text(self.drops.origins(rule))
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
        for note, count in self.notes.counts.items():
            origins = Text(self.notes.origins(note))
            rules.add_row(Text(f"  of these {note}"), f"{count:,}", origins)
        rules.caption = Text("".join(self._unread()))
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
        sources.caption = "\n".join(self.taken) or None
        return [rules, lengths, sources]


def _table(title: str, *columns: str, numbers: int) -> Table:
    table = Table(*columns, title=title)
    for column in table.columns[1 : 1 + numbers]:
        column.justify = "right"
    return table


def quantiles(values: Int[np.ndarray, "_"]) -> tuple[int, ...]:
    """The observed values at ``QUANTILES``, each one of ``values``."""
    at = np.quantile(values, list(QUANTILES.values()), method="nearest")
    return tuple(int(value) for value in at)


def measured(
    lengths: Int[np.ndarray, "B 3"],
    *,
    cuts: Bool[np.ndarray, "B 3"],
    different: int,
    sources: Sequence[str],
    tally: Tally,
    left_out: int = 0,
    **told: Sequence[str],
) -> Report:
    """A report from the pairs' columns: prompt, chosen and rejected each.

    ``different`` is how many pairs have other tokens than all before, ``left_out`` how
    many no weight or limit took, and ``told`` are ``first`` and ``taken``.
    """
    prompt, chosen, rejected = lengths.T
    by_name = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    by_name["pair"] = lengths.sum(axis=1)
    cut_prompts, cut_chosen, cut_rejected = cuts.sum(axis=0).tolist()
    return Report(
        read=len(lengths) + len(tally.events) + left_out,
        kept=len(lengths),
        drops=Drops(tally.events),
        cut_prompts=cut_prompts,
        cut_chosen=cut_chosen,
        cut_rejected=cut_rejected,
        prefix_mismatches=tally.mismatches,
        duplicates=len(lengths) - different,
        lengths={name: quantiles(values) for name, values in by_name.items()},
        chosen_longer=float(np.mean(chosen > rejected)),
        same_length=float(np.mean(chosen == rejected)),
        sources=dict(collections.Counter(sources).most_common()),
        notes=Drops(tally.notes),
        unread=tally.unread,
        **told,
    )
