"""Low-rank adapters: exactly nothing at the start, and merged the same as added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.models import adapters, leaves, network, weights
from tests import tiny
from tests.harness import logits

ALL = tuple(leaves.TARGETS)
SETTINGS = {"targets": ALL, "rank": 3, "alpha": 6.0}
TOKENS = jax.random.randint(jax.random.key(0), (2, 12), 0, tiny.ARCHITECTURE.vocabulary)


def drawn(params, seed=1):
    """The parameters, each adapter's b drawn so that it adds something."""
    leaves, structure = jax.tree.flatten(params["adapters"])
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    moved = [
        leaf + 0.1 * jax.random.normal(key, leaf.shape)
        for leaf, key in zip(leaves, keys, strict=True)
    ]
    return params | {"adapters": jax.tree.unflatten(structure, moved)}


def hidden(graph, params):
    zeros = jnp.zeros_like(TOKENS)
    positions = jnp.broadcast_to(jnp.arange(TOKENS.shape[1]), TOKENS.shape)
    model = nnx.merge(graph, params)
    return model.decoder(TOKENS, positions, zeros, zeros, model.adapters)


def test_new_adapters_change_no_bit():
    graph, params = tiny.split_policy(latent=None, adapters=SETTINGS)
    plain, _ = logits(graph, params, TOKENS)
    np.testing.assert_array_equal(hidden(graph, params), plain)


@pytest.mark.parametrize("target", ALL)
def test_each_target_adds_its_own_product(target):
    settings = SETTINGS | {"targets": (target,)}
    graph, params = tiny.split_policy(latent=None, adapters=settings)
    params = drawn(params)
    (part,) = params["adapters"]
    assert list(params["adapters"][part]) == [target]
    plain, _ = logits(graph, params, TOKENS)
    # Second source: the weight itself, changed by NumPy in float64.
    factors = params["adapters"][part][target]
    weight = np.asarray(params["decoder"]["blocks"][part][target], np.float64)
    layers, rank = weight.shape[0], settings["rank"]
    a = np.asarray(factors["a"], np.float64).reshape(layers, -1, rank)
    b = np.asarray(factors["b"], np.float64).reshape(layers, rank, -1)
    changed = weight + (6.0 / 3) * (a @ b).reshape(weight.shape)
    blocks = params["decoder"]["blocks"]
    moved = params["decoder"] | {
        "blocks": blocks
        | {part: blocks[part] | {target: jnp.asarray(changed, jnp.float32)}}
    }
    wanted, _ = logits(graph, params | {"decoder": moved}, TOKENS)
    found = hidden(graph, params)
    assert np.abs(wanted - plain).max() > 1e-2
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)


def test_merging_gives_the_same_logits_and_leaves_the_rest_alone():
    graph, params = tiny.split_policy(latent=None, adapters=SETTINGS)
    params = drawn(params)
    merged = adapters.merge(params["decoder"], params["adapters"], scale=6.0 / 3)
    wanted = hidden(graph, params)
    found, _ = logits(graph, params | {"decoder": merged}, TOKENS)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=0)
    assert merged["embedding"] is params["decoder"]["embedding"]
    assert jax.tree.structure(merged) == jax.tree.structure(params["decoder"])


def test_a_merged_policy_is_a_folder_like_any_other(tmp_path):
    graph, params = tiny.split_policy(latent=None, adapters=SETTINGS)
    params = drawn(params)
    merged = adapters.merge(params["decoder"], params["adapters"], scale=6.0 / 3)
    folder = tmp_path / "merged"
    weights.save(
        folder, merged, tiny.ARCHITECTURE, dtype=jnp.float32, shard_bytes=1 << 30
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = weights.load(
        folder,
        weights.read_architecture(folder),
        dtype_of=lambda _: jnp.float32,
        sharding_of=lambda _: here,
    )
    found, _ = logits(graph, params | {"decoder": loaded}, TOKENS)
    np.testing.assert_allclose(found, hidden(graph, params), atol=2e-5, rtol=0)


def test_the_decoder_s_draw_does_not_depend_on_adapters():
    _, without = tiny.split_policy(latent=tiny.LATENT)
    _, beside = tiny.split_policy(latent=tiny.LATENT, adapters=SETTINGS)
    for part in ("decoder", "latent"):
        jax.tree.map(np.testing.assert_array_equal, without[part], beside[part])


def test_sizes_are_what_rank_and_targets_say():
    graph = nnx.eval_shape(
        lambda: network.build(
            tiny.ARCHITECTURE,
            compute_dtype=jnp.dtype("float32"),
            attention_backend="blocks",
            remat="none",
            adapters=SETTINGS,
            latent=None,
            key=jax.random.key(0),
        )
    )
    shapes = jax.tree.map(
        lambda x: x.shape, nnx.to_pure_dict(nnx.state(graph.adapters))
    )
    # By hand: L = 2, D = 32, N = 4, K = 2, H = 8, F = 48, r = 3.
    assert shapes["attention"]["query"] == {"a": (2, 32, 3), "b": (2, 3, 4, 8)}
    assert shapes["attention"]["key"] == {"a": (2, 32, 3), "b": (2, 3, 2, 8)}
    assert shapes["attention"]["output"] == {"a": (2, 4, 8, 3), "b": (2, 3, 32)}
    assert shapes["mlp"]["down"] == {"a": (2, 48, 3), "b": (2, 3, 32)}
