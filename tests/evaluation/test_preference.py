"""An evaluation is of each pair once, summed exactly whatever the packing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lpc_jax.evaluation import preference
from lpc_jax.types import Batch
from tests import tiny

FILLER = 1e6  # what an unused slot says; it must not count
PAIRS = tiny.pairs(11)
SOURCES = {pair.id: pair.source for pair in PAIRS}


def rewards(pair_id: int) -> tuple[float, float]:
    """By hand: even pairs are right by their id, odd ones wrong by theirs; 0 ties."""
    return (pair_id, 0.0) if pair_id % 2 == 0 else (0.0, pair_id)


def prior(pair_id: int) -> np.ndarray:
    """All of one code."""
    return np.eye(3, dtype=np.float32)[pair_id % 3]


def score(batch: Batch, *, codes: bool = True) -> tuple[Any, dict[str, np.ndarray]]:
    """As the evaluate program: sums over used slots, and what each slot got."""
    mask, ids = np.asarray(batch.pair_mask), np.asarray(batch.pair_id)
    by_slot = np.full((*mask.shape, 2), FILLER, np.float32)
    beliefs = np.full((*mask.shape, 3), FILLER, np.float32)
    for place in zip(*np.nonzero(mask), strict=True):
        by_slot[place] = rewards(int(ids[place]))
        beliefs[place] = prior(int(ids[place]))
    right = (by_slot[..., 0] > by_slot[..., 1]) & mask
    count = np.float32(mask.sum())
    sums = {"reward/accuracy": (np.float32(right.sum()), count)}
    by_pair = {"rewards": by_slot}
    if codes:
        by_pair["prior"] = beliefs
        usage = beliefs[mask].sum(axis=0)
        sums["code/usage"] = (usage, count)
    return sums, by_pair


LAYOUTS = {
    "one pair a row": {"rows": 4, "pairs_per_row": 1},
    "packed": {"rows": 2, "pairs_per_row": 4},
    "one batch with empty rows": {"rows": 16, "pairs_per_row": 4},
}


@pytest.fixture(params=LAYOUTS)
def found(request: pytest.FixtureRequest) -> preference.Evaluation:
    batches = tiny.batches(PAIRS, **LAYOUTS[request.param])
    return preference.evaluate(score, batches, sources=SOURCES)


def test_accuracy_is_of_the_exact_set_with_a_tie_counted_as_wrong(found):
    # Ids 0 to 10: 2, 4, 6, 8, 10 are right; 0 is a tie.
    assert found.metrics["reward/accuracy"] == pytest.approx(5 / 11)


def test_every_pair_has_its_own_margin(found):
    margins = {i: float(i if i % 2 == 0 else -i) for i in range(11)}
    assert found.margins == margins


def test_accuracy_by_source(found):
    # tiny.pairs: even ids are of source 0, odd ones of source 1.
    assert found.accuracy_by_source == {
        "source 0": pytest.approx(5 / 6),
        "source 1": 0.0,
    }


def test_usage_by_source_is_the_mean_prior_of_its_pairs(found):
    # Even ids 0 2 4 6 8 10 use codes 0 2 1 0 2 1; odd ones 1 3 5 7 9 use 1 0 2 1 0.
    np.testing.assert_allclose(found.usage_by_source["source 0"], [1 / 3] * 3)
    np.testing.assert_allclose(found.usage_by_source["source 1"], [0.4, 0.4, 0.2])


def test_code_usage_is_measured_over_the_whole_set(found):
    # Codes 0, 1, 2 of ids 0 to 10: 4, 4 and 3 of 11.
    shares = np.asarray([4, 4, 3]) / 11
    perplexity = np.exp(-np.sum(shares * np.log(shares)))
    assert found.metrics["code/perplexity"] == pytest.approx(perplexity, rel=1e-5)
    assert found.metrics["code/largest_share"] == pytest.approx(4 / 11)
    assert found.metrics["code/dead"] == 0


def test_without_codes_there_is_no_usage():
    batches = tiny.batches(PAIRS)
    found = preference.evaluate(
        lambda batch: score(batch, codes=False), batches, sources=SOURCES
    )
    assert found.usage_by_source == {}
    assert found.metrics.keys() == {"reward/accuracy"}


def test_codes_that_follow_the_source_are_told_from_those_that_do_not(found):
    # Even ids, of source 0, have codes 0 2 1 0 2 1; odd ones 1 0 2 1 0.
    joint = np.asarray([[2, 2, 2], [2, 2, 1]]) / 11
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    information = np.sum(joint * np.log(joint / independent))
    entropies = [-np.sum(p * np.log(p)) for p in (joint.sum(axis=0), joint.sum(axis=1))]
    expected = information / np.sqrt(np.prod(entropies))
    assert found.metrics["code/source_nmi"] == pytest.approx(expected)
