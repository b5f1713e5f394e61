import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lpc_jax.losses import preference

CHOSEN = np.array([-10.0, -3.0, -7.5])
REJECTED = np.array([-12.0, -2.0, -7.5])
REF_CHOSEN = np.array([-11.0, -3.5, -7.0])
REF_REJECTED = np.array([-11.5, -2.5, -6.0])
CHOSEN_LENGTH = np.array([5, 2, 3])
REJECTED_LENGTH = np.array([6, 1, 4])


def arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


def log_sigmoid(x):
    """Second source: float64 NumPy."""
    return -np.logaddexp(0.0, -np.asarray(x, np.float64))


FOUR = (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED)
DIFFERENCE = (CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)


class LossesTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_dpo_equals_float64_formula(self):
        loss = self.variant(lambda *a: preference.dpo(*a, beta=0.3))
        expected = -log_sigmoid(0.3 * DIFFERENCE)
        np.testing.assert_allclose(loss(*arrays(*FOUR)), expected, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_conservative_dpo_equals_float64_formula(self):
        loss = self.variant(
            lambda *a: preference.dpo(*a, beta=0.3, label_smoothing=0.2)
        )
        x = 0.3 * DIFFERENCE
        expected = -0.8 * log_sigmoid(x) - 0.2 * log_sigmoid(-x)
        np.testing.assert_allclose(loss(*arrays(*FOUR)), expected, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_ipo_sum_equals_formula(self):
        loss = self.variant(lambda *a: preference.ipo(*a, beta=0.25))
        expected = (DIFFERENCE - 2.0) ** 2
        np.testing.assert_allclose(loss(*arrays(*FOUR)), expected, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_ipo_mean_divides_each_log_ratio_by_its_length(self):
        loss = self.variant(
            lambda *a: preference.ipo(
                *a[:4], beta=0.25, chosen_length=a[4], rejected_length=a[5]
            )
        )
        inputs = arrays(*FOUR, CHOSEN_LENGTH, REJECTED_LENGTH)
        chosen = (CHOSEN - REF_CHOSEN) / CHOSEN_LENGTH
        rejected = (REJECTED - REF_REJECTED) / REJECTED_LENGTH
        expected = (chosen - rejected - 2.0) ** 2
        np.testing.assert_allclose(loss(*inputs), expected, rtol=1e-6)

    @chex.variants(with_jit=True, without_jit=True)
    def test_simpo_equals_float64_formula(self):
        loss = self.variant(lambda *a: preference.simpo(*a, beta=2.5, gamma=1.375))
        inputs = arrays(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH)
        margin = CHOSEN / CHOSEN_LENGTH - REJECTED / REJECTED_LENGTH
        expected = -log_sigmoid(2.5 * margin - 1.375)
        np.testing.assert_allclose(loss(*inputs), expected, rtol=1e-6)


def test_simpo_by_hand():
    # Means -1 and -2, beta 2, gamma 1: margin 2 * 1 - 1 = 1.
    inputs = arrays([-2.0], [-6.0], [2], [3])
    loss = preference.simpo(*inputs, beta=2.0, gamma=1.0)
    assert float(loss[0]) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-6)


def test_simpo_smoothing_weighs_the_flipped_label():
    inputs = arrays([-2.0], [-6.0], [2], [3])
    loss = preference.simpo(*inputs, beta=2.0, gamma=1.0, label_smoothing=0.25)
    expected = 0.75 * math.log(1 + math.exp(-1)) + 0.25 * math.log(1 + math.exp(1))
    assert float(loss[0]) == pytest.approx(expected, rel=1e-6)


def test_dpo_is_ln_2_where_policy_is_reference():
    chosen, rejected = arrays(CHOSEN, REJECTED)
    loss = preference.dpo(chosen, rejected, chosen, rejected, beta=0.7)
    np.testing.assert_allclose(loss, math.log(2), rtol=1e-6)


def test_ipo_starts_at_a_quarter_of_inverse_beta_squared():
    chosen, rejected = arrays(CHOSEN, REJECTED)
    loss = preference.ipo(chosen, rejected, chosen, rejected, beta=0.1)
    np.testing.assert_allclose(loss, 1 / (4 * 0.1**2), rtol=1e-6)


def test_dpo_gradient_is_minus_beta_times_the_weight():
    # d/d chosen = -beta sigmoid(-beta D) (Rafailov et al. 2023, section 4).
    gradient = jax.grad(lambda c, *rest: preference.dpo(c, *rest, beta=0.3).sum())
    expected = -0.3 / (1 + np.exp(0.3 * DIFFERENCE))
    np.testing.assert_allclose(gradient(*arrays(*FOUR)), expected, rtol=1e-5)


def test_simpo_gradient_is_divided_by_length():
    def total(chosen, *rest):
        return preference.simpo(chosen, *rest, beta=2.0, gamma=0.5).sum()

    inputs = arrays(CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH)
    margin = 2.0 * (CHOSEN / CHOSEN_LENGTH - REJECTED / REJECTED_LENGTH) - 0.5
    expected = -2.0 / CHOSEN_LENGTH / (1 + np.exp(margin))
    np.testing.assert_allclose(jax.grad(total)(*inputs), expected, rtol=1e-5)


@pytest.mark.parametrize("loss", [preference.dpo, preference.ipo])
def test_no_gradient_reaches_the_reference(loss):
    gradients = jax.grad(lambda *a: loss(*a, beta=0.3).sum(), argnums=(2, 3))
    for gradient in gradients(*arrays(*FOUR)):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("logp", [-1e5, 1e5])
def test_losses_and_gradients_are_finite_at_extremes(logp):
    zero, one, extreme = jnp.zeros(1), jnp.ones(1), jnp.full(1, logp)

    def total(x):
        return (
            preference.dpo(x, zero, zero, zero, beta=0.1)
            + preference.ipo(x, zero, zero, zero, beta=0.1)
            + preference.simpo(x, zero, one, one, beta=2.0, gamma=1.0)
        ).sum()

    value, gradient = jax.value_and_grad(total)(extreme)
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


def test_ipo_refuses_one_length_alone():
    message = (
        "ipo takes chosen_length and rejected_length together (mean) or neither"
        " (sum), got one of them."
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- the whole message is compared
        preference.ipo(*arrays(*FOUR), beta=0.1, chosen_length=jnp.ones(3))
    assert str(error.value) == message
