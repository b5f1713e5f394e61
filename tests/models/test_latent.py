import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpc_jax.models import latent
from lpc_jax.models.latent import LatentHead

HEAD = LatentHead(
    width=8, hidden_width=16, num_codes=5, codebook_scale=0.3, rngs=nnx.Rngs(0)
)
RNG = np.random.default_rng(0)


def _moved(mlp: dict, mean: np.ndarray, spread: np.ndarray) -> dict:
    return mlp | {"input_mean": jnp.float32(mean), "input_spread": jnp.float32(spread)}


def test_prior_equals_float64_mlp():
    x, mean = RNG.normal(size=(3, 8)), RNG.normal(size=8)
    spread = RNG.uniform(0.5, 2.0, size=8)
    graph, state = nnx.split(HEAD)
    params = nnx.to_pure_dict(state)
    params["prior_mlp"] = mlp = _moved(params["prior_mlp"], mean, spread)
    weights = {k: np.asarray(v, np.float64) for k, v in mlp.items()}
    standard = (x - weights["input_mean"]) / weights["input_spread"]
    inner = standard @ weights["hidden_kernel"] / np.sqrt(8) + weights["hidden_bias"]
    outer = inner / (1 + np.exp(-inner)) @ weights["output_kernel"] / np.sqrt(16)
    found = nnx.merge(graph, params).prior(jnp.float32(x))
    np.testing.assert_allclose(found, outer + weights["output_bias"], atol=1e-5)


def test_standardized_inputs_have_mean_0_and_spread_1():
    prompt, chosen, rejected = RNG.normal(3.0, [[[2.0]], [[5.0]], [[0.5]]], (3, 50, 8))
    found = latent.standardization(prompt, chosen, rejected)
    prior, posterior = found["prior_mlp"], found["posterior_mlp"]
    standard = (prompt - prior["input_mean"]) / prior["input_spread"]
    np.testing.assert_allclose(standard.mean(0), 0.0, atol=1e-6)
    np.testing.assert_allclose(standard.std(0), 1.0, atol=1e-3)
    # Both answers share theirs: nothing but their states tells them apart.
    answers = np.concatenate([chosen, rejected])
    for half in np.split(posterior["input_mean"], 2):
        np.testing.assert_allclose(half, answers.mean(0), rtol=1e-5)
    for half in np.split(posterior["input_spread"], 2):
        np.testing.assert_allclose(half, answers.std(0), rtol=1e-3)


def test_a_coordinate_that_never_varies_is_not_blown_up():
    states = np.ones((4, 8), np.float32)
    found = latent.standardization(states, states, states)
    np.testing.assert_allclose(found["prior_mlp"]["input_spread"], 0.01, rtol=1e-5)


def test_inputs_stay_standardised_as_they_were():
    graph, state = nnx.split(HEAD)

    def total(params):
        head = nnx.merge(graph, params)
        x = jnp.ones((2, 8))
        return jnp.sum(head.prior(x) ** 2) + jnp.sum(head.posterior(x, x) ** 2)

    gradient = nnx.to_pure_dict(jax.grad(total)(state))
    for mlp in ("prior_mlp", "posterior_mlp"):
        assert np.any(gradient[mlp]["hidden_kernel"])
        for name in ("input_mean", "input_spread"):
            np.testing.assert_array_equal(gradient[mlp][name], 0.0)


def test_posterior_tells_the_chosen_answer_from_the_rejected():
    one, other = jnp.float32(RNG.normal(size=(2, 3, 8)))
    difference = HEAD.posterior(one, other) - HEAD.posterior(other, one)
    assert np.abs(difference).max() > 1e-2


def test_codes_mix_the_codebook():
    weights = jnp.asarray([[0.25, 0.75, 0.0, 0.0, 0.0]])
    codes = HEAD.codes(weights, weights)
    rows = np.asarray(HEAD.codebook[...])
    np.testing.assert_allclose(
        codes.vector[0], 0.25 * rows[0] + 0.75 * rows[1], atol=1e-6
    )


def test_gumbel_softmax_is_on_the_simplex_and_equals_the_formula():
    logits, noise = RNG.normal(size=(2, 4, 5))
    found = latent.gumbel_softmax(
        jnp.float32(logits), jnp.float32(noise), temperature=0.5
    )
    exponent = np.exp((logits + noise) / 0.5)
    np.testing.assert_allclose(
        found, exponent / exponent.sum(-1, keepdims=True), rtol=1e-5
    )


def test_cold_draws_follow_the_belief():
    probabilities = np.array([0.6, 0.3, 0.1])
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 3))
    logits = jnp.broadcast_to(jnp.log(probabilities), noise.shape)
    draws = latent.gumbel_softmax(logits, noise, temperature=1e-4)
    # Standard error of a share at 20,000 draws is at most 0.0035.
    np.testing.assert_allclose(np.mean(draws, axis=0), probabilities, atol=0.015)


def test_straight_through_is_one_code_forward_and_the_mix_backward():
    weights = jnp.asarray([[0.2, 0.5, 0.3]])
    np.testing.assert_allclose(
        latent.straight_through(weights), [[0.0, 1.0, 0.0]], atol=1e-7
    )
    direction = jnp.asarray([[1.0, 2.0, 3.0]])
    gradient = jax.grad(lambda w: jnp.sum(latent.straight_through(w) * direction))
    np.testing.assert_allclose(gradient(weights), direction)


def test_scale_zero_makes_a_zero_codebook():
    head = LatentHead(
        width=8, hidden_width=8, num_codes=3, codebook_scale=0.0, rngs=nnx.Rngs(0)
    )
    np.testing.assert_array_equal(head.codebook[...], 0.0)
