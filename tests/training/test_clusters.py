"""The latent's start from hidden states, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.models.latent import CodeMlp
from lpc_jax.training import clusters

RNG = np.random.default_rng(0)


def test_standardized_inputs_have_mean_0_and_spread_1():
    prompt, chosen, rejected = RNG.normal(3.0, [[[2.0]], [[5.0]], [[0.5]]], (3, 50, 8))
    sides = np.concatenate([chosen, rejected], axis=1)
    found = clusters.standardization(prompt, sides, posterior_input="concat")
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
    found = clusters.standardization(states, states, posterior_input="difference")
    np.testing.assert_allclose(found["prior_mlp"]["input_spread"], 0.01, rtol=1e-5)


def test_differences_are_scaled_and_not_moved():
    pairs = RNG.normal(3.0, 2.0, (50, 8)).astype(np.float32)
    found = clusters.standardization(pairs, pairs, posterior_input="difference")
    np.testing.assert_array_equal(found["posterior_mlp"]["input_mean"], 0.0)
    np.testing.assert_allclose(
        found["posterior_mlp"]["input_spread"],
        np.sqrt(np.mean(pairs.astype(np.float64) ** 2, axis=0)),
        rtol=1e-3,
    )


def test_the_prompt_s_state_is_centred_beside_the_differences():
    prompt = RNG.normal(3.0, 2.0, (50, 8)).astype(np.float32)
    pairs = np.concatenate([RNG.normal(3.0, 2.0, (50, 16)), prompt], axis=1)
    found = clusters.standardization(prompt, np.float32(pairs), posterior_input="all")[
        "posterior_mlp"
    ]
    np.testing.assert_allclose(found["input_mean"][16:], prompt.mean(0), rtol=1e-5)
    np.testing.assert_array_equal(found["input_mean"][:16], 0.0)
    np.testing.assert_allclose(found["input_spread"][16:], prompt.std(0), rtol=1e-3)


def test_others_of_a_user_are_averaged_without_the_pair_itself():
    inputs = np.arange(10.0).reshape(5, 2)
    found = clusters.means_of_others(inputs, np.asarray([3, 1, 3, 3, 7]))
    np.testing.assert_allclose(found[0], (inputs[2] + inputs[3]) / 2)
    np.testing.assert_allclose(found[3], (inputs[0] + inputs[2]) / 2)
    np.testing.assert_allclose(found[1], inputs[1])  # alone


def test_a_start_from_clusters_tells_them_apart():
    kind = np.arange(60) % 3
    centres = 5 * np.eye(8)[:3]
    inputs = (centres[kind] + RNG.normal(0, 0.3, (60, 8))).astype(np.float32)
    graph, state = nnx.split(CodeMlp(8, 16, 3, rngs=nnx.Rngs(0)))
    mlp = nnx.to_pure_dict(state)
    hidden = np.asarray(nnx.merge(graph, mlp).hidden(jnp.asarray(inputs)))
    cluster = clusters.clusters(inputs, 3)
    made = clusters.output_for(hidden, cluster, 3)
    network = nnx.merge(graph, mlp | {k: jnp.asarray(v) for k, v in made.items()})
    beliefs = jax.nn.softmax(network(jnp.asarray(inputs)), axis=-1)
    code = np.asarray(beliefs).argmax(axis=-1)
    # One code a kind, each its own, and sure of it.
    assert len(set(zip(kind.tolist(), code.tolist(), strict=True))) == 3
    assert np.asarray(beliefs).max(axis=-1).mean() > 0.8


def test_pooled_logits_are_as_far_apart_as_one_pair_s_are_where_none_are_pooled():
    """Four users whose pairs differ by a tenth of what each pair differs by anyway."""
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(4), 60)
    wants = rng.normal(size=(4, 32))

    def drawn(who):
        noise = rng.normal(size=(len(who), 32))
        return (0.4 * wants[who] + noise).astype(np.float32)

    read, later = drawn(users), drawn(users)
    made = clusters.output_for(read, users, 4, users)
    spread = 3.0 * np.sqrt(3) / 4  # of 3 for one code of four and 0 for the others
    logits = read @ made["output_kernel"] + made["output_bias"]
    assert clusters.means_of_others(logits, users).std() == pytest.approx(
        spread, rel=0.1
    )
    alone = clusters.output_for(read, users, 4)
    assert (read @ alone["output_kernel"]).std() == pytest.approx(spread, rel=0.1)
    # Pairs that were not there are told apart too, four of a user together.
    said = later @ made["output_kernel"] + made["output_bias"]
    said = said.reshape(4, 15, 4, 4).mean(axis=2)
    assert np.mean(said.argmax(axis=-1) == np.arange(4)[:, None]) > 0.9


def test_more_codes_than_pairs_start_without_a_cluster():
    inputs = RNG.normal(size=(4, 8)).astype(np.float32)
    cluster = clusters.clusters(inputs, 6)
    assert sorted(cluster) == [0, 1, 2, 3]
    made = clusters.output_for(inputs, cluster, 6)
    assert made["output_kernel"].shape == (8, 6)
    assert np.isfinite(made["output_kernel"]).all()
    alone = clusters.output_for(inputs[:1], clusters.clusters(inputs[:1], 6), 6)
    assert np.isfinite(alone["output_kernel"]).all()
