import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.losses import latent

RNG = np.random.default_rng(0)
Q = RNG.normal(size=(4, 5)) * 3
P = RNG.normal(size=(4, 5)) * 3


def probabilities(logits):
    """Second source: float64 NumPy."""
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def test_kl_equals_float64_sum():
    q, p = probabilities(Q), probabilities(P)
    expected = (q * np.log(q / p)).sum(-1)
    found = latent.categorical_kl(jnp.float32(Q), jnp.float32(P))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_kl_of_equal_beliefs_is_zero_whatever_the_logits_offset():
    q = jnp.float32(Q)
    np.testing.assert_allclose(latent.categorical_kl(q, q + 7.0), 0.0, atol=1e-5)


def test_kl_by_hand():
    # q = (1/2, 1/2), p = (1/4, 3/4): ln 2 / 2 + ln(2/3) / 2.
    q = jnp.zeros((1, 2))
    p = jnp.log(jnp.array([[0.25, 0.75]]))
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    np.testing.assert_allclose(latent.categorical_kl(q, p), [expected], rtol=1e-6)


def test_kl_is_finite_with_its_gradient_where_a_code_has_no_weight():
    q = jnp.array([[0.0, -1e4]])
    p = jnp.array([[-1e4, 0.0]])
    value, gradient = jax.value_and_grad(lambda x: latent.categorical_kl(x, p).sum())(q)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_entropy_of_uniform_is_ln_c():
    np.testing.assert_allclose(latent.entropy(jnp.zeros((2, 8))), np.log(8), rtol=1e-6)


@pytest.mark.parametrize(
    ("usage", "perplexity", "largest", "dead"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0, 0.25, 0.0),
        ([8.0, 0.0, 0.0, 0.0], 1.0, 1.0, 3.0),
        ([2.0, 2.0, 0.0, 0.0], 2.0, 0.5, 2.0),
    ],
)
def test_usage_measures_by_hand(usage, perplexity, largest, dead):
    usage = jnp.asarray(usage)
    assert float(latent.usage_perplexity(usage)) == pytest.approx(perplexity)
    assert float(latent.largest_share(usage)) == pytest.approx(largest)
    assert float(latent.dead_codes(usage, share=0.1)) == dead
