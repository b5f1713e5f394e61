import inspect
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


# --- the other losses -----------------------------------------------------------------

R_W, R_L = CHOSEN - REF_CHOSEN, REJECTED - REF_REJECTED
MEANS = CHOSEN / CHOSEN_LENGTH, REJECTED / REJECTED_LENGTH
# Second source: each paper's formula in float64 NumPy, its probabilities written out.
# exo_pair as KL(q, p) over both answers; orpo's odds as p / (1 - p).


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def kl(q, p):
    return q * np.log(q / p)


def odds(logp):
    return np.exp(logp) / (1 - np.exp(logp))


FOUR_AND_LENGTHS = (*FOUR, CHOSEN_LENGTH, REJECTED_LENGTH)
TWO_AND_LENGTHS = (CHOSEN, REJECTED, CHOSEN_LENGTH, REJECTED_LENGTH)
Q = sigmoid(0.3 * DIFFERENCE)
FORMULAS = {
    "hinge": (FOUR, {"beta": 0.3}, np.maximum(0, 1 - 0.3 * DIFFERENCE)),
    "robust": (
        FOUR,
        {"beta": 0.3, "label_smoothing": 0.2},
        (-0.8 * np.log(Q) + 0.2 * np.log(1 - Q)) / 0.6,
    ),
    "apo_zero": (FOUR, {"beta": 0.3}, 1 - sigmoid(0.3 * R_W) + sigmoid(0.3 * R_L)),
    "apo_down": (FOUR, {"beta": 0.3}, sigmoid(0.3 * R_W) + 1 - Q),
    "exo_pair": (
        FOUR,
        {"beta": 0.3, "label_smoothing": 0.01},
        kl(Q, 0.99) + kl(1 - Q, 0.01),
    ),
    "nca_pair": (
        FOUR,
        {"beta": 0.3},
        -np.log(sigmoid(0.3 * R_W))
        - (np.log(sigmoid(-0.3 * R_W)) + np.log(sigmoid(-0.3 * R_L))) / 2,
    ),
    "sppo_hard": (FOUR, {"beta": 0.25}, (R_W - 2.0) ** 2 + (R_L + 2.0) ** 2),
    "sigmoid_norm": (
        FOUR_AND_LENGTHS,
        {"beta": 3.0},
        -np.log(sigmoid(3.0 * (R_W / CHOSEN_LENGTH - R_L / REJECTED_LENGTH))),
    ),
    "orpo": (
        TWO_AND_LENGTHS,
        {"beta": 0.3},
        -0.3 * np.log(sigmoid(np.log(odds(MEANS[0]) / odds(MEANS[1])))),
    ),
    "cpo": ((CHOSEN, REJECTED), {"beta": 0.3}, -log_sigmoid(0.3 * (CHOSEN - REJECTED))),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_equals_its_float64_formula_and_its_gradient_the_difference(name):
    inputs, settings, expected = FORMULAS[name]
    function = getattr(preference, name)
    inputs = arrays(*inputs)
    np.testing.assert_allclose(function(*inputs, **settings), expected, rtol=2e-6)
    # A step of 0.01 in the chosen and rejected log-probs; the hinge has no kink there.
    change = jnp.asarray([1.0, -2.0, 0.5]), jnp.asarray([-0.5, 1.5, 1.0])

    def moved(step):
        two = (x + step * way for x, way in zip(inputs[:2], change, strict=True))
        return function(*two, *inputs[2:], **settings)

    slope = jax.jvp(moved, (0.0,), (1.0,))[1]
    by_steps = (moved(0.01) - moved(-0.01)) / 0.02
    np.testing.assert_allclose(slope, by_steps, rtol=2e-3, atol=2e-4)


def test_losses_take_log_probs_by_name_and_settings_by_keyword():
    assert str(inspect.signature(preference.robust)).replace("'", "") == (
        "(chosen_logp: Logp, rejected_logp: Logp, ref_chosen_logp: Logp,"
        " ref_rejected_logp: Logp, *, beta: float, label_smoothing: float)"
    )
    names = ("chosen_logp", "rejected_logp", "ref_chosen_logp", "ref_rejected_logp")
    named = dict(zip(names, arrays(*FOUR), strict=True))
    np.testing.assert_array_equal(
        preference.hinge(**named, beta=0.3), preference.hinge(*arrays(*FOUR), beta=0.3)
    )
    with pytest.raises(TypeError):
        preference.hinge(*arrays(*FOUR), 0.3)


def test_robust_dpo_without_flipped_labels_is_dpo():
    four = arrays(*FOUR)
    robust = preference.robust(*four, beta=0.3, label_smoothing=0.0)
    np.testing.assert_allclose(robust, preference.dpo(*four, beta=0.3), rtol=1e-6)


def test_robust_dpo_is_unbiased_under_flipped_labels():
    """Chowdhury et al. 2024: its mean over flips at the rate e is DPO's loss."""
    four, e = arrays(*FOUR), 0.2
    flipped = [four[i] for i in (1, 0, 3, 2)]
    one, other = (
        preference.robust(*x, beta=0.3, label_smoothing=e) for x in (four, flipped)
    )
    mean = (1 - e) * one + e * other
    np.testing.assert_allclose(mean, preference.dpo(*four, beta=0.3), rtol=1e-5)


def test_beyond_its_margin_the_hinge_is_0_and_has_no_gradient():
    value, gradient = jax.value_and_grad(
        lambda x: preference.hinge(x, *arrays([0], [0], [0]), beta=0.1).sum()
    )(jnp.asarray([10.5]))
    assert value == gradient[0] == 0


def test_exo_is_0_where_the_policy_says_what_the_labels_do():
    e, ratio = 0.1, math.log(0.9 / 0.1)  # the softmax of (ratio, 0) is (0.9, 0.1)
    loss = preference.exo_pair(
        *arrays([ratio / 0.5], [0], [0], [0]), beta=0.5, label_smoothing=e
    )
    assert float(loss[0]) == pytest.approx(0, abs=1e-7)


def test_answers_of_one_token_make_length_normalised_dpo_dpo():
    four, one = arrays(*FOUR), jnp.ones(3)
    normed = preference.sigmoid_norm(*four, one, one, beta=0.3)
    np.testing.assert_allclose(normed, preference.dpo(*four, beta=0.3), rtol=1e-6)


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


EVERY = FORMULAS | {name: (FOUR, {"beta": 0.3}, None) for name in ("dpo", "ipo")}


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"orpo", "cpo"}))
def test_no_gradient_reaches_the_reference(name):
    inputs, settings, _ = EVERY[name]
    function = getattr(preference, name)
    gradients = jax.grad(lambda *a: function(*a, **settings).sum(), argnums=(2, 3))
    for gradient in gradients(*arrays(*inputs)):
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("logp", [-1e5, 0.0, 1e5])
def test_a_loss_and_its_gradient_are_finite_at_extremes(name, logp):
    inputs, settings, _ = FORMULAS[name]
    rest = arrays(*inputs)[1:]
    value, gradient = jax.value_and_grad(
        lambda x: getattr(preference, name)(x, *rest, **settings).sum()
    )(jnp.full(3, logp))
    assert np.isfinite(value)
    assert np.isfinite(gradient).all()


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
