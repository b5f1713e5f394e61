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


def test_prior_equals_float64_mlp():
    x = RNG.normal(size=(3, 8))
    mlp = HEAD.prior_mlp
    weights = [
        np.asarray(p[...], np.float64)
        for p in (
            mlp.hidden_kernel,
            mlp.hidden_bias,
            mlp.output_kernel,
            mlp.output_bias,
        )
    ]
    normed = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)
    inner = normed @ weights[0] / np.sqrt(8) + weights[1]
    outer = inner / (1 + np.exp(-inner)) @ weights[2] / np.sqrt(16) + weights[3]
    np.testing.assert_allclose(HEAD.prior(jnp.float32(x)), outer, atol=1e-5)


def test_beliefs_do_not_depend_on_the_size_of_hidden_states():
    x = jnp.float32(RNG.normal(size=(3, 8)))
    np.testing.assert_allclose(HEAD.prior(x), HEAD.prior(50.0 * x), atol=1e-4)


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
