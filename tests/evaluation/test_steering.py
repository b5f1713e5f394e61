"""Weights of codes from the prior or by hand, against hand calculations."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax import config as cfg
from lpc_jax import objective
from lpc_jax.runtime import steering
from lpc_jax.runtime.steering import Steering

LOGITS = np.asarray([[0.0, 1.0, -2.0, 0.5], [3.0, 1.0, 1.0, 1.0]], np.float32)
KEY = jax.random.key(0)


def weights(chosen: Steering) -> np.ndarray:
    return np.asarray(chosen.weights(jnp.asarray(LOGITS), KEY))


def test_the_mean_is_the_prior():
    expected = np.exp(LOGITS.astype(np.float64))
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(weights(Steering("mean")), expected, rtol=1e-6)


def test_argmax_is_the_largest_code():
    expected = [[0, 1, 0, 0], [1, 0, 0, 0]]
    np.testing.assert_array_equal(weights(Steering("argmax")), expected)


def test_a_sample_is_of_the_prior_and_hard_as_its_temperature_falls():
    keys = jax.random.split(KEY, 4000)
    draws = jax.vmap(
        lambda key: Steering("sample", temperature=0.01).weights(
            jnp.asarray(LOGITS[0]), key
        )
    )(keys)
    assert np.mean(np.asarray(draws).max(axis=1) > 0.99) > 0.95
    prior = np.exp(LOGITS[0]) / np.exp(LOGITS[0]).sum()
    np.testing.assert_allclose(np.asarray(draws).mean(axis=0), prior, atol=0.03)


def test_a_mix_by_hand_is_the_same_for_every_prompt():
    found = weights(steering.mix("3:0.7, 1:0.3", 4))
    np.testing.assert_allclose(found, [[0, 0.3, 0, 0.7]] * 2, rtol=1e-6)
    np.testing.assert_array_equal(weights(steering.code("2", 4)), [[0, 0, 1, 0]] * 2)


@pytest.mark.parametrize(
    ("make", "text", "message"),
    [
        (steering.code, "4", "--code 4: expected a code from 0 to 3, got '4'."),
        (steering.code, "-1", "--code -1: expected a code from 0 to 3, got '-1'."),
        (steering.code, "x", "--code x: expected a code from 0 to 3, got 'x'."),
        (steering.mix, "3:0.7", "--mix 3:0.7: the weights must sum to 1, got 0.7."),
        (steering.mix, "9:1", "--mix 9:1: expected a code from 0 to 3, got '9'."),
        (steering.mix, "1:0.5,1:0.5", "--mix 1:0.5,1:0.5: code 1 is there twice."),
        (steering.mix, "1", "--mix 1: expected CODE:WEIGHT with a weight in [0, 1]"),
        (steering.mix, "1:nan", "--mix 1:nan: expected CODE:WEIGHT"),
        (steering.mix, "1:2,2:-1", "--mix 1:2,2:-1: expected CODE:WEIGHT"),
        (steering.mix, "", "--mix : expected a code from 0 to 3, got ''."),
    ],
)
def test_what_is_no_mix_is_refused(make, text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(text, 4)


def test_codes_of_a_system_without_any_are_refused():
    with pytest.raises(ValueError, match="--code 3 needs codes, got runs/plain, which"):
        steering.require_codes(None, "--code 3", "runs/plain")
    assert steering.require_codes(4, "--code 3", "runs/lpc") == 4


def test_it_says_what_it_is():
    assert steering.mix("3:0.7,12:0.3", 16).words() == "codes 3: 0.7, 12: 0.3"
    assert Steering("mean").words() == "the prior's mean"


@pytest.mark.parametrize("draw", ["soft", "straight_through"])
@pytest.mark.parametrize("how", ["mean", "sample", "argmax"])
def test_training_and_asking_choose_z_alike(draw, how):
    latent = cfg.Latent(
        num_codes=4,
        draw=draw,
        inference=how,
        temperature_schedule="linear",
        final_temperature=0.5,
    )
    chosen = steering.of_settings(latent)
    assert chosen == objective.inference(latent)
    found = np.asarray(chosen.weights(jnp.asarray(LOGITS), KEY))
    one = (found.max(axis=-1) == 1).all()
    assert one == (how == "argmax" or (how == "sample" and draw == "straight_through"))
