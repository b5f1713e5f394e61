"""Bootstrap intervals of means over pairs; pairs of one prompt are drawn together.

That is the cluster bootstrap (Davison & Hinkley 1997, section 3.8, strategy 1).
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 10_000
LEVEL = 0.95
# Numbers gathered at a time, which bounds memory to about 100 MB.
_GATHERED = 1 << 22


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over pairs, and the ends of its interval; None with a single prompt."""

    mean: float
    low: float | None
    high: float | None

    def text(self, digits: int = 3, *, scale: float = 1.0, signed: bool = False) -> str:
        """As ``0.512 [0.430, 0.601]``."""
        mean = f"{scale * self.mean:{'+' if signed else ''}.{digits}f}"
        if self.low is None or self.high is None:
            return f"{mean} [one prompt]"
        return f"{mean} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


def estimates(
    values: Float[np.ndarray, "B quantities"],
    prompts: Int[np.ndarray, "B"],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    level: float = LEVEL,
) -> list[Estimate]:
    """The mean of each quantity with its percentile interval (Efron 1979).

    ``prompts`` numbers each pair's prompt; of the ``resamples`` draws, each of as many
    prompts as there are, the share ``level`` lies within the interval. All quantities
    share the draws, so a paired difference is one of them. The interval has no width
    where all pairs are equal, and is too narrow below about 20 prompts.
    """
    means = values.mean(axis=0).tolist()
    _, place, counts = np.unique(prompts, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return [Estimate(mean, None, None) for mean in means]
    import scipy.stats  # slow to import, and runs need it for their cards alone

    # Per-prompt sums suffice: a draw's mean is the ratio of two sums over its prompts.
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, place, values)
    interval = scipy.stats.bootstrap(
        (sums.T, counts[None]),
        lambda of_prompts, pairs, axis: of_prompts.sum(axis) / pairs.sum(axis),
        paired=True,  # a prompt's pairs are counted where their values are summed
        n_resamples=resamples,
        batch=max(1, _GATHERED // sums.size),
        confidence_level=level,
        method="percentile",
        rng=np.random.default_rng(seed),
        axis=-1,
    ).confidence_interval
    ends = zip(means, interval.low.tolist(), interval.high.tolist(), strict=True)
    return [Estimate(*parts) for parts in ends]
