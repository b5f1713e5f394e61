"""Measures of how codes are used, beside hand calculations and scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics
from sklearn.metrics import cluster

from lpc_jax.evaluation.codes import measures

# Four prompts over three codes; the largest are 0, 0, 1, 2.
PRIOR = np.asarray([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6]])
SOURCES = ["a", "a", "b", "b"]


def logits(probabilities: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(probabilities, 1e-30)).astype(np.float32)


def test_usage_by_source_is_the_mean_over_its_prompts():
    found = measures.usage_by_source(PRIOR, SOURCES)
    np.testing.assert_allclose(found["a"], [0.6, 0.25, 0.15])
    np.testing.assert_allclose(found["b"], [0.15, 0.55, 0.3])


def test_sources_are_counted_the_most_first():
    found = measures.count_sources(["x", "z", "y", "z", "y"])
    assert list(found.items()) == [("y", 2), ("z", 2), ("x", 1)]


def test_the_perplexity_of_a_usage():
    assert measures.perplexity(np.asarray([2.0, 2.0, 0.0, 0.0])) == pytest.approx(2)
    # exp(-(3/4 ln 3/4 + 1/4 ln 1/4)) = 4 / 3^(3/4)
    found = measures.perplexity(np.asarray([0.75, 0.25]))
    assert found == pytest.approx(4 / 3**0.75)


def test_a_code_is_dead_below_a_tenth_of_its_uniform_share():
    # Of 4 codes a tenth of a share is 0.025.
    usage = np.asarray([[0.95, 0.024, 0.026, 0.0]])
    pairs = logits(usage)
    assert measures.measure(usage, ["a"], pairs, pairs, seed=0).dead == (1, 3)


def test_the_prompts_that_call_for_a_code_come_in_order():
    found = measures.callers(np.asarray([0.1, 0.8, 0.3, 0.8]), most=3)
    assert found == ((1, 0.8), (3, 0.8), (2, 0.3))


@pytest.mark.parametrize("count", [12, 200])
def test_mutual_information_equals_scikit_learn_s(count):
    rng = np.random.default_rng(count)
    source = rng.integers(0, 3, count)
    code = np.where(rng.random(count) < 0.5, source, rng.integers(0, 5, count))
    found = measures.mutual_information(
        np.eye(5)[code], [f"source {i}" for i in source]
    )
    assert found == pytest.approx(metrics.mutual_info_score(code, source), abs=1e-12)


def test_soft_mutual_information_is_how_far_sources_lie_from_their_mean():
    # For two sources as large: the Jensen-Shannon divergence of their mean priors.
    a, b = np.asarray([0.6, 0.25, 0.15]), np.asarray([0.15, 0.55, 0.3])
    mean = (a + b) / 2
    divergence = (np.sum(a * np.log(a / mean)) + np.sum(b * np.log(b / mean))) / 2
    found = measures.mutual_information(PRIOR, SOURCES)
    assert found == pytest.approx(divergence)


@pytest.mark.parametrize(
    ("codes", "sources", "expected"),
    [
        ([5, 5, 2, 2], ["a", "a", "b", "b"], 1.0),
        ([5, 2, 5, 2], ["a", "a", "b", "b"], 0.0),
        ([5, 5, 5, 5], ["a", "a", "b", "b"], 0.0),
        ([5, 2, 5, 2], ["a", "a", "a", "a"], 0.0),
        # Four codes tell two sources: ln 2 / sqrt(ln 4 ln 2).
        ([0, 1, 2, 3], ["a", "a", "b", "b"], 1 / np.sqrt(2)),
    ],
)
def test_normalized_mutual_information_by_hand(codes, sources, expected):
    found = measures.normalized_mutual_information(codes, sources)
    assert found == pytest.approx(expected, abs=1e-12)


def test_chance_is_the_expectation_under_shuffled_sources():
    rng = np.random.default_rng(3)
    source, code = rng.integers(0, 4, 60), rng.integers(0, 6, 60)
    found = measures.beside_chance(
        lambda dealt: measures.mutual_information(np.eye(6)[code], dealt),
        sources=[str(i) for i in source],
        seed=0,
    )
    table = cluster.contingency_matrix(code, source, sparse=True)
    # Vinh et al. 2010, exactly; a shuffle's deviation is about 0.04.
    expected = cluster.expected_mutual_information(table, 60)
    assert found.mean == pytest.approx(expected, abs=0.01)
    assert found.mean < found.high < found.mean + 0.15
    # Nothing was planted: the measure is one more of these.
    assert found.value == pytest.approx(metrics.mutual_info_score(code, source))


def test_chance_is_the_same_from_the_same_seed():
    def measure(dealt):
        return measures.mutual_information(PRIOR, dealt)

    first, again, other = (
        measures.beside_chance(measure, sources=SOURCES, seed=seed)
        for seed in (1, 1, 2)
    )
    assert first == again
    assert first.mean != other.mean


def test_all_measures_by_hand():
    # A prompt with three pairs, and three with one: pairs are not prompts.
    of_pairs = PRIOR[[0, 0, 0, 1, 2, 3]]
    posterior = PRIOR[[0, 1, 2, 1, 2, 0]]
    found = measures.measure(
        PRIOR, SOURCES, logits(of_pairs), logits(posterior), seed=0
    )

    def entropy(p: np.ndarray) -> float:
        return -sum(x * np.log(x) for x in p if x > 0)

    usage = np.asarray([1.5, 1.6, 0.9]) / 4
    assert found.perplexity == pytest.approx(np.exp(entropy(usage)))
    of_posterior = np.exp(entropy(np.asarray([2.6, 2.8, 0.6]) / 6))
    assert found.posterior_perplexity == pytest.approx(of_posterior, rel=1e-5)
    mean = np.mean([entropy(row) for row in PRIOR])
    assert found.codes_per_prompt == pytest.approx(np.exp(mean))
    assert found.dead == ()
    # The largest of the prior: 0 0 0 0 1 2; of the posterior: 0 0 1 0 1 0.
    assert found.agreement == pytest.approx(4 / 6)
    assert found.agreement_by_chance == pytest.approx(4 / 6 * 4 / 6 + 1 / 6 * 2 / 6)
    divergences = [
        sum(q * np.log(q / p) for q, p in zip(*rows, strict=True) if q > 0)
        for rows in zip(posterior, np.maximum(of_pairs, 1e-30), strict=True)
    ]
    assert found.kl == pytest.approx(np.mean(divergences), rel=1e-5)
    # Codes 0 0 | 1 2: the source is known from the code.
    assert found.information.value == pytest.approx(np.log(2))
    entropy_of_codes = entropy(np.asarray([2, 1, 1]) / 4)
    assert found.nmi.value == pytest.approx(np.sqrt(np.log(2) / entropy_of_codes))
    soft = measures.mutual_information(PRIOR, SOURCES)
    assert found.soft_information.value == soft
