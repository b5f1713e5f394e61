"""Preference accuracy and metrics on held-out pairs, with z from the prior."""

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
    """Metrics of a policy on a set of pairs."""

    metrics: dict[str, float]  # means over the set, by path
    accuracy_by_source: dict[str, float]  # share with chosen reward > rejected
    usage_by_source: dict[str, Float[np.ndarray, "C"]]  # mean prior; {} without codes
    margins: dict[int, float]  # by pair id


def evaluate(
    score: Callable[[Batch], tuple[Sums, dict[str, Array]]],
    batches: Sequence[Batch],
    *,
    sources: Mapping[int, str],
) -> Evaluation:
    """Scores every pair once and takes means; padding does not count.

    ``score`` gives metric sums and results by pair slot; ``sources`` are by pair id.
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
    metrics, ids = values(totals), sorted(margins)
    of_pairs = [sources[i] for i in ids]
    right = np.asarray([margins[i] > 0 for i in ids])
    accuracy = {
        source: float(right[np.asarray(of_pairs) == source].mean())
        for source in sorted(set(of_pairs))
    }
    usage: dict[str, Float[np.ndarray, "C"]] = {}
    if priors:
        prior = np.stack([priors[i] for i in ids])
        usage = measures.usage_by_source(prior, of_pairs)
        if len(usage) > 1:
            # How far the prior's largest code tells the source.
            metrics["code/source_nmi"] = measures.normalized_mutual_information(
                prior.argmax(axis=1), of_pairs
            )
    return Evaluation(metrics, accuracy, usage, margins)
