"""Preference accuracy and its company on held-out pairs, z from the prior.

Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from lpc_jax import objective
from lpc_jax.evaluation.codes import measures
from lpc_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a policy says of a set of pairs.

    Attributes:
        metrics: Means over the set, by metric path; ``code/source_nmi``, with a latent
            and several sources, is how far the prior's largest code tells the source.
        accuracy_by_source: Share of pairs with chosen reward strictly above rejected.
        usage_by_source: Mean prior probability of each code, or empty without a
            latent.
        margins: Reward margin of each pair id.
    """

    metrics: dict[str, float]
    accuracy_by_source: dict[str, float]
    usage_by_source: dict[str, Float[np.ndarray, "C"]]
    margins: dict[int, float]


def evaluate(
    score: Callable[[Batch], tuple[objective.Sums, dict[str, Array]]],
    batches: Sequence[Batch],
    *,
    sources: Mapping[int, str],
) -> Evaluation:
    """Scores every pair once and sums up.

    Args:
        score: Metric sums and per-slot results of a micro-batch, as the ``evaluate``
            program of ``training.step`` returns them.
        batches: Micro-batches as NumPy arrays; padding does not count.
        sources: Source of each pair id in the batches.
    """
    totals: objective.Sums | None = None
    margins: dict[int, float] = {}
    priors: dict[int, np.ndarray] = {}
    for batch in batches:
        sums, by_pair = jax.device_get(score(batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        mask, ids = np.asarray(batch.pair_mask), np.asarray(batch.pair_id)
        rewards = by_pair["rewards"][mask]
        margins.update(
            zip(
                ids[mask].tolist(),
                (rewards[:, 0] - rewards[:, 1]).tolist(),
                strict=True,
            )
        )
        if "prior" in by_pair:
            priors.update(zip(ids[mask].tolist(), by_pair["prior"][mask], strict=True))
    assert totals is not None, "no batches to evaluate"
    by_source: dict[str, list[int]] = {}
    for pair_id in sorted(margins):
        by_source.setdefault(sources[pair_id], []).append(pair_id)
    metrics = objective.values(totals)
    if priors and len(by_source) > 1:
        metrics["code/source_nmi"] = measures.normalized_mutual_information(
            [int(np.argmax(priors[i])) for i in sorted(margins)],
            [sources[i] for i in sorted(margins)],
        )
    return Evaluation(
        metrics=metrics,
        accuracy_by_source={
            source: float(np.mean([margins[i] > 0 for i in ids]))
            for source, ids in sorted(by_source.items())
        },
        usage_by_source={
            source: np.mean([priors[i] for i in ids], axis=0)
            for source, ids in sorted(by_source.items())
            if priors
        },
        margins=margins,
    )
