import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.models import latent
from lpc_jax.models.latent import LatentHead, PairStates

HEAD = LatentHead(
    width=8,
    hidden_width=16,
    num_codes=5,
    codebook_scale=0.3,
    posterior_input="concat",
    rngs=nnx.Rngs(0),
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


def test_inputs_stay_standardised_as_they_were():
    graph, state = nnx.split(HEAD)

    def total(params):
        head = nnx.merge(graph, params)
        x = jnp.ones((2, 16))
        return jnp.sum(head.prior(x[:, :8]) ** 2) + jnp.sum(head.posterior(x) ** 2)

    gradient = nnx.to_pure_dict(jax.grad(total)(state))
    for mlp in ("prior_mlp", "posterior_mlp"):
        assert np.any(gradient[mlp]["hidden_kernel"])
        for name in ("input_mean", "input_spread"):
            np.testing.assert_array_equal(gradient[mlp][name], 0.0)


INPUTS = typing.get_args(latent.PosteriorInput)


def answers() -> PairStates:
    shapes = ((3, 8), (3, 2, 8), (3, 2, 8))
    return PairStates(*(jnp.float32(RNG.normal(size=shape)) for shape in shapes))


@pytest.mark.parametrize("posterior_input", INPUTS)
def test_swapped_answers_change_the_posterior(posterior_input):
    head = LatentHead(
        width=8,
        hidden_width=16,
        num_codes=5,
        codebook_scale=0.3,
        posterior_input=posterior_input,
        rngs=nnx.Rngs(0),
    )
    states = answers()
    swapped = PairStates(states.prompt, states.end[:, ::-1], states.mean[:, ::-1])
    one, other = (
        head.posterior(latent.judged(s, posterior_input)) for s in (states, swapped)
    )
    assert np.abs(one - other).max(axis=-1).min() > 1e-2


def test_what_the_posterior_reads_of_two_answers():
    states = answers()
    end, mean = np.asarray(states.end), np.asarray(states.mean)
    wanted = {
        "concat": np.concatenate([end[:, 0], end[:, 1]], axis=1),
        "difference": end[:, 0] - end[:, 1],
        "mean_difference": mean[:, 0] - mean[:, 1],
        "both": np.concatenate(
            [end[:, 0] - end[:, 1], mean[:, 0] - mean[:, 1]], axis=1
        ),
    }
    wanted["all"] = np.concatenate([wanted["both"], states.prompt], axis=1)
    assert wanted.keys() == set(INPUTS)
    for name in INPUTS:
        found = latent.judged(states, name)
        np.testing.assert_array_equal(found, wanted[name])
        assert found.shape[-1] == latent.judged_width(name, 8)


def test_a_random_code_of_the_unit_moves_logits_by_one_nat():
    head = RNG.normal(size=(300, 64)) * RNG.uniform(0.1, 3.0, 64) + 5.0
    unit = float(latent.codebook_unit(jnp.float32(head)))
    codes = unit * RNG.normal(size=(4000, 64))
    moved = codes @ head.T  # float64; a mean over the vocabulary changes nothing
    found = np.sqrt(np.mean(np.var(moved, axis=1)))
    assert found == pytest.approx(1.0, rel=0.03)


def test_limited_codes_change_what_is_said_by_no_more():
    limit, head = 0.2, jnp.float32(RNG.normal(size=(50, 8)))
    codes = jnp.float32(RNG.normal(size=(5, 8))) * jnp.asarray(
        [[0.01], [1], [2], [5], [9]]
    )
    limited = latent.limit_codes(codes, head, limit)
    np.testing.assert_array_equal(limited[0], codes[0])  # was within it already
    moved = np.asarray(limited, np.float64) @ np.asarray(head, np.float64).T
    # The worst mix and the worst start distribution: two tokens far apart.
    worst = 0.0
    for _ in range(300):
        bias = RNG.dirichlet(np.full(5, 0.1)) @ moved
        start = RNG.dirichlet(np.full(50, 0.05))
        under = start * np.exp(bias)
        under /= under.sum()
        kept = under > 0
        worst = max(
            worst, float(np.sum(under[kept] * np.log(under[kept] / start[kept])))
        )
    assert 0.25 * limit < worst <= limit
    for code in moved[1:]:
        assert (code.max() - code.min()) ** 2 / 8 == pytest.approx(limit, rel=3e-3)


def test_codes_mix_the_codebook():
    weights = jnp.asarray([[0.25, 0.75, 0.0, 0.0, 0.0]])
    codes = HEAD.codes(weights, weights)
    rows = np.asarray(HEAD.codebook[...])
    np.testing.assert_allclose(
        codes.vector[0], 0.25 * rows[0] + 0.75 * rows[1], atol=1e-6
    )


def test_a_relaxed_draw_is_on_the_simplex_and_equals_the_formula():
    logits, noise = RNG.normal(size=(2, 4, 5))
    found = latent.draw(
        jnp.float32(logits), jnp.float32(noise), temperature=0.5, one_code=False
    )
    exponent = np.exp((logits + noise) / 0.5)
    np.testing.assert_allclose(
        found, exponent / exponent.sum(-1, keepdims=True), rtol=1e-5
    )


def test_cold_draws_follow_the_belief():
    probabilities = np.array([0.6, 0.3, 0.1])
    noise = jax.random.gumbel(jax.random.key(0), (20_000, 3))
    logits = jnp.broadcast_to(jnp.log(probabilities), noise.shape)
    draws = latent.draw(logits, noise, temperature=1e-4, one_code=False)
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
        width=8,
        hidden_width=8,
        num_codes=3,
        codebook_scale=0.0,
        posterior_input="both",
        rngs=nnx.Rngs(0),
    )
    np.testing.assert_array_equal(head.codebook[...], 0.0)
