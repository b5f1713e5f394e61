import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.models import leaves
from lpc_jax.models.architectures import RopeScaling
from tests import tiny
from tests.harness import load_policy, logits

GOLDEN = Path(__file__).parents[1] / "golden"


# Second source: transformers in fp32; golden/make_tiny_models.py made the files.
@pytest.mark.parametrize(
    "name", ["tiny_llama", "tiny_llama31", "tiny_mistral", "tiny_llama_tied"]
)
def test_logits_equal_transformers_on_random_models(name):
    golden = np.load(GOLDEN / name / "logits.npz")
    graph, params = load_policy(GOLDEN / name)
    _, found = jax.jit(lambda p, t: logits(graph, p, t))(params, golden["tokens"])
    assert np.abs(golden["logits"]).max() > 1
    np.testing.assert_allclose(found, golden["logits"], atol=1e-4, rtol=0)


@pytest.mark.smollm2
def test_logits_equal_transformers_on_smollm2(smollm2):
    golden = np.load(GOLDEN / "smollm2_logits.npz")
    graph, params = load_policy(smollm2)
    run = jax.jit(lambda p, t: logits(graph, p, t))
    for index in range(2):
        tokens = golden[f"tokens_{index}"]
        _, found = run(params, tokens[None])
        picked = np.take_along_axis(
            np.asarray(found[0]), golden[f"top_ids_{index}"], axis=-1
        )
        np.testing.assert_allclose(
            picked, golden[f"top_logits_{index}"], atol=2e-3, rtol=0
        )


def test_a_token_does_not_see_later_ones():
    graph, params = tiny.split_policy(latent=None)
    tokens = np.random.default_rng(0).integers(0, 97, (1, 12))
    changed = tokens.copy()
    changed[0, 7] += 1
    before, _ = logits(graph, params, tokens)
    after, _ = logits(graph, params, changed)
    np.testing.assert_array_equal(before[0, :7], after[0, :7])
    assert np.abs(before[0, 7:] - after[0, 7:]).max(-1).min() > 1e-4


SCALING = RopeScaling(
    kind="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_length=16,
)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_theta": 100.0},
        {"rope_scaling": SCALING},
        {"rope_scaling": RopeScaling(kind="linear", factor=2.0)},
        {"sliding_window": 4},
        {"norm_epsilon": 0.5},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_number_of_the_architecture_changes_the_output(change):
    tokens = np.random.default_rng(0).integers(0, 97, (1, 12))
    graph, params = tiny.split_policy(latent=None)
    other, _ = tiny.split_policy(tiny.changed(**change), latent=None)
    found, _ = logits(graph, params, tokens)
    changed, _ = logits(other, params, tokens)
    assert np.abs(found - changed).max() > 1e-3


def test_tied_head_is_the_embedding():
    graph, params = tiny.split_policy(tiny.changed(tied=True), latent=None)
    assert "head" not in params["decoder"]
    head = nnx.merge(graph, params).decoder.head_weight
    np.testing.assert_array_equal(head, params["decoder"]["embedding"])


def test_remat_changes_nothing():
    tokens = np.random.default_rng(0).integers(0, 97, (1, 12))
    values = []
    for remat in ("none", "dots", "block"):
        graph, params = tiny.split_policy(latent=None, remat=remat)
        gradient = jax.grad(
            lambda p, graph=graph: jnp.sum(jnp.sin(logits(graph, p, tokens)[1]))
        )(params)
        values.append(gradient)
    for other in values[1:]:
        chex.assert_trees_all_close(other, values[0], atol=1e-5, rtol=1e-4)


def test_parameter_count_is_the_tree_s():
    for tied in (False, True):
        architecture = tiny.changed(tied=tied)
        _, params = tiny.split_policy(architecture, latent=None)
        counted = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert leaves.count(architecture) == counted


def test_golden_files_say_where_they_come_from():
    assert "make_tiny_models.py" in (GOLDEN / "README.md").read_text()
    assert json.loads((GOLDEN / "tiny_llama" / "config.json").read_text())
