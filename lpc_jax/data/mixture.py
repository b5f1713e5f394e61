"""Several sources of pairs as one set: which pairs of each are taken."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from lpc_jax.data.examples import NO_SOURCE, PreferenceExample

# A product of a share and a count may lie this far below a whole number.
_ROUNDING = 1e-6


class Part(NamedTuple):
    """One source, with the fields of the config's ``Source``."""

    path: str
    split: str | None = None
    limit: int | None = None  # rows
    weight: float | None = None  # share of all pairs
    name: str | None = None  # of all its pairs in reports

    def labels(
        self, examples: Iterator[PreferenceExample], *, alone: bool
    ) -> Iterator[PreferenceExample]:
        """Pairs under the source's name; without one, those that name no source."""
        stem = NO_SOURCE if alone else Path(self.path).name.split(".")[0]
        for example in examples:
            source = example.source if example.source != NO_SOURCE else stem
            if (self.name or source) != example.source:
                example = dataclasses.replace(example, source=self.name or source)
            yield example


def taken(
    counts: Sequence[int],
    weights: Sequence[float | None],
    *,
    limit: int | None,
    seed: int,
) -> list[Int[np.ndarray, "_"]]:
    """Places of the pairs that are taken of each source, ascending.

    With weights as many pairs as shares and counts allow, none twice; else all. At most
    ``limit`` in all. Which ones, ``seed`` decides.
    """
    shares = np.asarray([w or c for w, c in zip(weights, counts, strict=True)], float)
    shares /= shares.sum()
    most = min(np.asarray(counts) / shares)  # all, where shares are those of the counts
    total = most if limit is None else min(most, limit)
    # Rounded as a running sum, so that the numbers add up.
    ends = np.floor(np.cumsum(shares) * total + _ROUNDING).astype(int)
    rng = np.random.default_rng(seed)
    return [
        np.sort(rng.choice(count, min(number, count), replace=False))
        for count, number in zip(counts, np.diff(ends, prepend=0).tolist(), strict=True)
    ]
