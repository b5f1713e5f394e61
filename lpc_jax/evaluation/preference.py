"""Preference accuracy and what goes with it on held-out pairs, z from the prior."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float

from lpc_jax.evaluation.codes import measures
from lpc_jax.metrics import Sums, values
from lpc_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What a policy says of a set of pairs.

    ``metrics`` are means over the set, by path. ``code/source_nmi``, with a latent and
    several sources, is how far the prior's largest code tells the source.
    """

    metrics: dict[str, float]
    # Share of pairs with chosen reward strictly above rejected.
    accuracy_by_source: dict[str, float]
    # Mean prior probability of each code; empty without a latent.
    usage_by_source: dict[str, Float[np.ndarray, "C"]]
    margins: dict[int, float]  # by pair id


def evaluate(
    score: Callable[[Batch], tuple[Sums, dict[str, Array]]],
    batches: Sequence[Batch],
    *,
    sources: Mapping[int, str],
) -> Evaluation:
    """Scores every pair once and sums up; padding does not count.

    Args:
        score: From a micro-batch to metric sums and results by pair slot.
        batches: Micro-batches of all pairs.
        sources: Source of each pair id.
    """
    totals: Sums | None = None
    margins: dict[int, float] = {}
    priors: dict[int, np.ndarray] = {}
    for batch in batches:
        sums, by_pair = jax.device_get(score(batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        mask = np.asarray(batch.pair_mask)
        ids = np.asarray(batch.pair_id)[mask].tolist()
        chosen, rejected = by_pair["rewards"][mask].T
        margins |= zip(ids, (chosen - rejected).tolist(), strict=True)
        if "prior" in by_pair:
            priors |= zip(ids, by_pair["prior"][mask], strict=True)
    assert totals is not None, "no batches to evaluate"
    by_source: dict[str, list[int]] = {}
    for pair_id in sorted(margins):
        by_source.setdefault(sources[pair_id], []).append(pair_id)
    metrics = values(totals)
    if priors and len(by_source) > 1:
        metrics["code/source_nmi"] = measures.normalized_mutual_information(
            [int(np.argmax(prior)) for prior in priors.values()],
            [sources[i] for i in priors],
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
