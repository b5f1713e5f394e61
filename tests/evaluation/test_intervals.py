"""Intervals by prompt: against a slow loop, a closed form, and their promise."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from lpc_jax.evaluation import intervals


def clustered(
    rng: np.random.Generator, prompts: int, *, between: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Values around 0 of one to four pairs a prompt, alike within a prompt."""
    sizes = rng.integers(1, 5, size=prompts)
    of = np.repeat(np.arange(prompts), sizes)
    shared = rng.normal(0, between, prompts)[of]
    return (shared + rng.normal(0, 0.5, len(of)))[:, None], of


def test_the_interval_is_that_of_a_slow_loop_over_whole_prompts():
    values, prompts = clustered(np.random.default_rng(3), 12)
    by_prompt = [values[prompts == p, 0].tolist() for p in range(12)]
    draw = random.Random(0)
    slow = []
    for _ in range(20_000):
        pairs = [v for _ in range(12) for v in draw.choice(by_prompt)]
        slow.append(sum(pairs) / len(pairs))
    low, high = np.quantile(slow, [0.025, 0.975])
    (ours,) = intervals.estimates(values, prompts, resamples=20_000)
    assert ours.low == pytest.approx(low, abs=0.03 * (high - low))
    assert ours.high == pytest.approx(high, abs=0.03 * (high - low))
    assert ours.mean == pytest.approx(values.mean())


def test_with_a_pair_a_prompt_the_spread_is_the_closed_form():
    values = np.random.default_rng(0).normal(2, 3, (400, 1))
    (found,) = intervals.estimates(values, np.arange(400))
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.05 * half)


def test_nineteen_of_twenty_intervals_cover_the_truth_and_by_pairs_they_would_not():
    rng = np.random.default_rng(0)
    by_prompt = by_pair = 0
    trials = 300
    for _ in range(trials):
        values, prompts = clustered(rng, 50)
        (right,) = intervals.estimates(values, prompts, resamples=500)
        (wrong,) = intervals.estimates(values, np.arange(len(values)), resamples=500)
        by_prompt += right.low <= 0 <= right.high
        by_pair += wrong.low <= 0 <= wrong.high
    # The percentile interval of 50 prompts is a little narrow; 0.013 is one standard
    # error of a share of 0.95.
    assert 0.90 < by_prompt / trials < 0.98
    assert by_pair / trials < 0.86


def test_copies_of_a_pair_under_its_prompt_make_no_interval_narrower():
    rng = np.random.default_rng(5)
    values, prompts = rng.normal(size=(30, 1)), np.arange(30)
    once = intervals.estimates(values, prompts)
    copied = intervals.estimates(np.tile(values, (9, 1)), np.tile(prompts, 9))
    assert copied[0].low == pytest.approx(once[0].low)
    assert copied[0].high == pytest.approx(once[0].high)


def test_a_paired_difference_is_narrower_than_two_systems_apart():
    rng = np.random.default_rng(1)
    shared = rng.normal(0, 3, 100)
    first, second = shared + 0.2, shared + rng.normal(0, 0.1, 100)
    values = np.stack([first, second, first - second], axis=1)
    one, _, difference = intervals.estimates(values, np.arange(100))
    assert difference.mean == pytest.approx((first - second).mean())
    assert 0 < difference.low < difference.high < 0.3
    assert one.high - one.low > 10 * (difference.high - difference.low)


def test_the_interval_does_not_depend_on_how_many_are_drawn_at_a_time(monkeypatch):
    values, prompts = clustered(np.random.default_rng(2), 20)
    (whole,) = intervals.estimates(values, prompts, resamples=101, seed=7)
    monkeypatch.setattr(intervals, "_GATHERED", 60)
    (parts,) = intervals.estimates(values, prompts, resamples=101, seed=7)
    assert (parts.low, parts.high) == (whole.low, whole.high)
    (other,) = intervals.estimates(values, prompts, resamples=101, seed=8)
    assert abs(other.low - whole.low) > 1e-3


def test_one_prompt_has_no_interval():
    (found,) = intervals.estimates(np.asarray([[1.0], [2.0]]), np.asarray([4, 4]))
    assert found == intervals.Estimate(1.5, None, None)
    assert found.text() == "1.500 [one prompt]"


def test_an_estimate_as_text():
    estimate = intervals.Estimate(0.1234, -0.1, 0.4)
    assert estimate.text() == "0.123 [-0.100, 0.400]"
    assert estimate.text(1, scale=100.0, signed=True) == "+12.3 [-10.0, 40.0]"
