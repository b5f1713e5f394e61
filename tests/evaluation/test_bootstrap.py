"""Intervals by prompt: against SciPy, a slow loop, a closed form, and their promise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import scipy.stats

from lpc_jax.evaluation import bootstrap


def clustered(
    rng: np.random.Generator, prompts: int, *, between: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Values around 0 of one to four pairs a prompt, alike within a prompt."""
    sizes = rng.integers(1, 5, size=prompts)
    of = np.repeat(np.arange(prompts), sizes)
    shared = rng.normal(0, between, prompts)[of]
    return (shared + rng.normal(0, 0.5, len(of)))[:, None], of


def test_the_interval_is_scipys():
    values, prompts = clustered(np.random.default_rng(0), 40)
    sums = np.bincount(prompts, values[:, 0])
    counts = np.bincount(prompts)
    theirs = scipy.stats.bootstrap(
        (sums, counts),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20_000,
        method="percentile",
        rng=np.random.default_rng(1),
    ).confidence_interval
    (ours,) = bootstrap.estimates(values, prompts, resamples=20_000)
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.03 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.03 * width)
    assert ours.mean == pytest.approx(sums.sum() / counts.sum())


def test_draws_are_those_of_a_slow_loop_over_whole_prompts():
    values, prompts = clustered(np.random.default_rng(3), 12)
    by_prompt = [values[prompts == p, 0].tolist() for p in range(12)]
    draw = random.Random(0)
    slow = []
    for _ in range(4000):
        pairs = [v for _ in range(12) for v in draw.choice(by_prompt)]
        slow.append(sum(pairs) / len(pairs))
    fast = bootstrap.resampled_means(values, prompts, resamples=4000, seed=0)[:, 0]
    assert scipy.stats.ks_2samp(slow, fast).pvalue > 0.01
    assert np.std(fast) == pytest.approx(np.std(slow), rel=0.05)


def test_with_a_pair_a_prompt_the_spread_is_the_closed_form():
    values = np.random.default_rng(0).normal(2, 3, (400, 1))
    (found,) = bootstrap.estimates(values, np.arange(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_nineteen_of_twenty_intervals_cover_the_truth_and_by_pairs_they_would_not():
    rng = np.random.default_rng(0)
    by_prompt = by_pair = 0
    trials = 300
    for _ in range(trials):
        values, prompts = clustered(rng, 50)
        (right,) = bootstrap.estimates(values, prompts, resamples=500)
        (wrong,) = bootstrap.estimates(values, np.arange(len(values)), resamples=500)
        by_prompt += right.low <= 0 <= right.high
        by_pair += wrong.low <= 0 <= wrong.high
    # The percentile interval of 50 prompts is a little narrow; 0.013 is one standard
    # error of a share of 0.95.
    assert 0.90 < by_prompt / trials < 0.98
    assert by_pair / trials < 0.86


def test_copies_of_a_pair_under_its_prompt_make_no_interval_narrower():
    rng = np.random.default_rng(5)
    values, prompts = rng.normal(size=(30, 1)), np.arange(30)
    once = bootstrap.estimates(values, prompts)
    copied = bootstrap.estimates(np.tile(values, (9, 1)), np.tile(prompts, 9))
    assert copied[0].low == pytest.approx(once[0].low)
    assert copied[0].high == pytest.approx(once[0].high)


def test_a_paired_difference_is_narrower_than_two_systems_apart():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 3, 100)
    first, second = shared + 0.2, shared + rng.normal(0, 0.1, 100)
    values = np.stack([first, second, first - second], axis=1)
    one, _, difference = bootstrap.estimates(values, np.arange(100))
    assert difference.mean == pytest.approx((first - second).mean())
    assert 0 < difference.low < difference.high < 0.3
    assert one.high - one.low > 10 * (difference.high - difference.low)


def test_the_draws_do_not_depend_on_how_many_are_made_at_a_time(monkeypatch):
    values, prompts = clustered(np.random.default_rng(2), 20)
    whole = bootstrap.resampled_means(values, prompts, resamples=101, seed=7)
    monkeypatch.setattr(bootstrap, "_DRAWN_AT_ONCE", 60)
    blocks = bootstrap.resampled_means(values, prompts, resamples=101, seed=7)
    np.testing.assert_allclose(blocks, whole, atol=1e-12)
    other = bootstrap.resampled_means(values, prompts, resamples=101, seed=8)
    assert np.abs(other - whole).max() > 0.01


def test_one_prompt_has_no_interval():
    (found,) = bootstrap.estimates(np.asarray([[1.0], [2.0]]), np.asarray([4, 4]))
    assert found == bootstrap.Estimate(1.5, None, None)
