"""Which tokens are kept and drawn, against NumPy and their probabilities."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.generation.sampling import Sampling, keep_likeliest


def keep_by_hand(logits, top_k, top_p):
    """Token by token, in float64."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")[:top_k]
    shares = np.exp(logits[order] - logits[order].max())
    shares /= shares.sum()
    kept, total = [], 0.0
    for token, share in zip(order, shares, strict=True):
        if total >= top_p:
            break
        kept.append(int(token))
        total += share
    return sorted(kept)


@pytest.mark.parametrize("top_k", [None, 1, 7, 40])
@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.93, 1.0])
def test_the_likeliest_tokens_are_kept(top_k, top_p):
    logits = np.random.default_rng(0).normal(0, 2, (3, 40)).astype(np.float32)
    found = keep_likeliest(
        jnp.asarray(logits), top_k=top_k, top_p=None if top_p == 1 else top_p
    )
    for row, kept in zip(logits, np.asarray(found), strict=True):
        assert np.flatnonzero(np.isfinite(kept)).tolist() == keep_by_hand(
            row, top_k, top_p
        )
        np.testing.assert_array_equal(kept[np.isfinite(kept)], row[np.isfinite(kept)])


def test_tokens_are_drawn_with_their_probabilities():
    logits = jnp.asarray([[0.0, 1.0, 2.0, -1.0]])
    temperature, draws = 1.7, 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    choice = Sampling(1, temperature=temperature).choice
    found = choice.pick(jnp.broadcast_to(logits, (draws, 4)), keys)
    expected = np.exp(np.asarray([0.0, 1.0, 2.0, -1.0]) / temperature)
    expected /= expected.sum()
    shares = np.bincount(np.asarray(found), minlength=4) / draws
    # Five standard errors.
    error = 5 * np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(shares - expected) < error)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1, got 0."),
        ({"temperature": -0.5}, "--temperature must be at least 0, got -0.5."),
        ({"top_k": 0}, "--top-k must be at least 1, got 0."),
        ({"top_p": 0.0}, "--top-p must be above 0 and at most 1, got 0."),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1, got 1.5."),
    ],
)
def test_sampling_that_means_nothing_is_refused(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Sampling(**({"max_new_tokens": 1} | settings))
