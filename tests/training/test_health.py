"""Warnings that say what is wrong and what to change."""

import pytest

from lpc_jax.training import health

HEALTHY = {
    "code/perplexity": 20.0,
    "code/largest_share": 0.2,
    "latent/kl": 0.3,
    "logp_per_token/chosen_over_start": -0.1,
    "answers/circle": 0.05,
    "answers/ended": 0.9,
}
START = {"answers/circle": 0.05, "answers/ended": 0.95}
UNUSED = (
    "codes are unused: KL is near 0 and usage uniform. Raise latent.learning_rate or"
    " latent.codebook_rate."
)
COLLAPSED = (
    "one code takes all: lower latent.kl_weight or latent.codebook_rate, or set"
    " latent.posterior_start to clusters."
)
FALLING = (
    "chosen answers have lost more than 0.3 nats per token since the start: the model"
    " unlearns to say them. Raise loss.sft_weight or lower optimizer.learning_rate."
)
CIRCLES = (
    "16% of its answers run in a circle, of the start model's 5%. Raise loss.sft_weight"
    " or lower optimizer.learning_rate."
)
ENDLESS = (
    "74% of its answers end within training.sample_tokens, of the start model's 95%."
    " Raise loss.sft_weight or lower optimizer.learning_rate."
)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({}, []),
        ({"code/perplexity": 31.9, "latent/kl": 1e-4}, [UNUSED]),
        ({"code/perplexity": 31.9}, []),  # uniform, and yet posterior and prior differ
        ({"latent/kl": 1e-4}, []),  # alike, and yet not uniform
        ({"code/perplexity": 1.1, "code/largest_share": 0.98}, [COLLAPSED]),
        ({"logp_per_token/chosen_over_start": -0.31}, [FALLING]),
        ({"logp_per_token/chosen_over_start": -0.29}, []),
        ({"answers/circle": 0.16}, [CIRCLES]),
        ({"answers/circle": 0.14}, []),
        ({"answers/ended": 0.74}, [ENDLESS]),
        ({"answers/ended": 0.76}, []),
        (
            {"code/largest_share": 1.0, "logp_per_token/chosen_over_start": -9.0},
            [COLLAPSED, FALLING],
        ),
    ],
)
def test_warnings_say_what_a_person_should_look_at(change, found):
    assert health.warnings(HEALTHY | change, START, 32) == found


def test_without_a_start_the_reference_s_numbers_serve():
    metrics = {"logp_per_token/chosen_over_reference": -0.4}
    assert health.warnings(metrics, {}, None) == [FALLING]


def test_a_run_without_codes_or_answers_has_no_warnings_of_theirs():
    assert health.warnings({"loss/total": 0.7}, {}, None) == []
    assert health.warnings(HEALTHY, START, None) == []


def test_chosen_answers_are_compared_with_the_start_under_every_loss():
    now, start = {"logp_per_token/chosen": -1.5}, {"logp_per_token/chosen": -1.25}
    assert health.over_start(now, start) == {"logp_per_token/chosen_over_start": -0.25}
    assert health.over_start(now, {}) == {}
