"""Intervals of means over pairs, by drawing prompts again and again.

Pairs of one prompt are not independent, so they are drawn together. Knows nothing of
what the values are.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
LEVEL = 0.95

# Prompts drawn at a time: bounds the memory, some 100 MB.
_DRAWN_AT_ONCE = 1 << 22


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean and its interval, which a single prompt has not.

    Attributes:
        mean: Over the pairs that there are.
        low: The interval's lower end.
        high: Its upper end.
    """

    mean: float
    low: float | None
    high: float | None


def resampled_means(
    values: Float[np.ndarray, "B quantities"],
    prompts: Int[np.ndarray, "B"],
    *,
    resamples: int,
    seed: int,
) -> Float[np.ndarray, "resamples quantities"]:
    """Means over all pairs of prompts that are drawn with replacement.

    The cluster bootstrap (Davison & Hinkley 1997, section 3.8, their strategy 1): as
    many prompts are drawn as there are, each with all its pairs. Every quantity is of
    the same draws.

    Args:
        values: Some quantities of each pair.
        prompts: A number for each pair, the same for pairs of one prompt.
        resamples: How many times all prompts are drawn.
        seed: Of the draws.
    """
    _, place = np.unique(prompts, return_inverse=True)
    groups = int(place.max()) + 1
    sums = np.zeros((groups, values.shape[1]))
    np.add.at(sums, place, values)
    counts = np.bincount(place).astype(np.float64)
    rng = np.random.default_rng(seed)
    found = np.empty((resamples, values.shape[1]))
    block = max(1, _DRAWN_AT_ONCE // groups)
    for first in range(0, resamples, block):
        size = min(block, resamples - first)
        drawn = rng.integers(groups, size=(size, groups))
        drawn += groups * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * groups)
        times = times.reshape(size, groups).astype(np.float64)
        found[first : first + size] = (times @ sums) / (times @ counts)[:, None]
    return found


def estimates(
    values: Float[np.ndarray, "B quantities"],
    prompts: Int[np.ndarray, "B"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    """The mean of each quantity with its percentile interval (Efron 1979).

    A paired difference is a quantity like any other: the difference of each pair.
    Where all pairs have one value the interval has no width, which says little; with
    fewer than about 20 prompts it is too narrow.

    Args:
        values: Some quantities of each pair, at least one pair.
        prompts: A number for each pair, the same for pairs of one prompt.
        resamples: How many times all prompts are drawn.
        seed: Of the draws.
        level: Share of the draws within the interval.
    """
    means = values.mean(axis=0)
    if len(np.unique(prompts)) < 2:
        return [Estimate(float(mean), None, None) for mean in means]
    drawn = resampled_means(values, prompts, resamples=resamples, seed=seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Estimate(*map(float, ends)) for ends in zip(means, low, high, strict=True)]
