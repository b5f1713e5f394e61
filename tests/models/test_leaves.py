"""The leaf table: each parameter has one row, and one more row is all a leaf takes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from jax.sharding import PartitionSpec as P

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.models import leaves, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.planning import arithmetic
from lpc_jax.training import optimizer as optimizers
from tests import tiny
from tests.harness import logits

ADAPTERS = {"targets": tuple(leaves.TARGETS), "rank": 4, "alpha": 4.0}
TOKENS = np.random.default_rng(0).integers(0, tiny.ARCHITECTURE.vocabulary, (2, 12))


@pytest.mark.parametrize("tied", [False, True])
def test_each_row_is_a_parameter_and_each_parameter_a_row(tied):
    architecture = tiny.changed(tied=tied)
    _, params = tiny.split_policy(architecture, adapters=ADAPTERS)
    rows = [
        *leaves.decoder(architecture),
        *leaves.adapters(ADAPTERS["targets"]),
        *leaves.LATENT,
    ]
    assert sorted(leaf.path for leaf in rows) == sorted(sharding.by_path(params))
    of = leaves.sizes(architecture, r=4, C=6, W=32, X=64)  # X: both differences
    for path, leaf in sharding.by_path(leaves.known(params)).items():
        array = sharding.by_path(params)[path]
        assert array.shape == leaves.shape(leaf.axes, of), path


def test_parameters_without_a_row_or_with_several_are_both_listed(monkeypatch):
    twice = next(leaf for leaf in leaves.LATENT if leaf.path == "latent/codebook")
    monkeypatch.setattr(leaves, "LATENT", (*leaves.LATENT, twice))
    tree = {"decoder": {"head": 0, "z": 0}, "latent": {"codebook": 0}, "a": {"b": 0}}
    with pytest.raises(ValueError) as error:  # noqa: PT011 -- compared whole
        leaves.known(tree)
    assert str(error.value) == (
        "every parameter must have exactly one row in leaves.py; without one:"
        " ['a/b', 'decoder/z']; with several: ['latent/codebook']. Mend the table."
    )


def test_what_the_config_lets_adapters_be_on_is_what_has_a_row():
    assert cfg.Adapters().targets == tuple(leaves.TARGETS)


# --- leaves that some families have ---------------------------------------------------

BIAS = "decoder/blocks/attention/query_bias"
BIASED = tiny.changed(qkv_bias=True)
SIZE = 2 * (4 * 8 + 2 * (2 * 8))  # L (N H + 2 K H)


def test_a_leaf_more_is_made_run_split_counted_and_kept_from_decay():
    plain_graph, plain = tiny.split_policy(latent=None)
    graph, params = tiny.split_policy(BIASED, latent=None)
    added = sharding.by_path(params)[BIAS]
    np.testing.assert_array_equal(added, np.zeros((2, 4, 8)))  # L N H
    # The others are drawn as without it, and it adds to what they say.
    wanted = logits(plain_graph, plain, TOKENS)[1]
    np.testing.assert_array_equal(logits(graph, params, TOKENS)[1], wanted)
    attention = params["decoder"]["blocks"]["attention"]
    attention["query_bias"] = added + 1.0
    assert np.abs(logits(graph, params, TOKENS)[1] - wanted).max() > 1e-2

    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, devices=jax.devices())
    placed = sharding.by_path(leaves.shardings(params, mesh))
    assert placed[BIAS].spec == P(None, ("tensor",), None)

    size = sum(leaf.size for leaf in jax.tree.leaves(plain))
    assert leaves.count(BIASED) == size + SIZE
    temporary = _temporary(BIASED) - _temporary(tiny.ARCHITECTURE)
    assert temporary == 2 * SIZE  # bfloat16's copies


def test_biases_and_norms_are_spared_from_weight_decay():
    biased = tiny.changed(qkv_bias=True, output_bias=True, mlp_bias=True)
    rows = {
        leaf.path: leaf
        for norm in ("head", "full")
        for leaf in leaves.decoder(tiny.changed(biased, qk_norm=norm))
    }
    of = leaves.sizes(tiny.ARCHITECTURE)
    params: dict[str, Any] = {}
    for path, leaf in rows.items():
        node, (*parts, last) = params, path.split("/")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = jnp.ones(leaves.shape(leaf.axes, of))
    config = tiny.config(
        latent=None, optimizer=cfg.Optimizer(options={"weight_decay": 0.5})
    )
    optimizer = optimizers.build(config, params, 4)
    nothing = jax.tree.map(jnp.zeros_like, params)
    moved, _ = optimizer.update(nothing, optimizer.init(params), params)
    updated = sharding.by_path(optax.apply_updates(params, moved))
    spared = {path for path in updated if "bias" in path or "norm" in path}
    assert len(spared) == 7 + 3 + 4
    for path, value in updated.items():
        assert (np.asarray(value) == 1).all() == (path in spared), path
        if path in spared:
            assert leaves.at(path).frozen_dtype(jnp.dtype("bfloat16")) == jnp.float32


def _temporary(architecture: Architecture) -> int:
    one = {"data": 1, "fsdp": 1, "tensor": 1}
    return arithmetic.temporary(
        tiny.config(), architecture, one, backend="blocks", platform="tpu"
    )


def test_a_leaf_more_is_saved_and_loaded_and_refused_without_its_row(tmp_path):
    architecture = tiny.changed(qkv_bias=True, family="qwen2")
    _, params = tiny.split_policy(architecture, latent=None)
    decoder = params["decoder"]
    value = np.random.default_rng(1).normal(size=(2, 4, 8)).astype(np.float32)
    decoder["blocks"]["attention"]["query_bias"] = value
    weights.save(
        tmp_path, decoder, architecture, dtype=jnp.float32, shard_bytes=1 << 30
    )
    file = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        stored = file[f"model.layers.{layer}.self_attn.q_proj.bias"]
        np.testing.assert_array_equal(stored, value[layer].reshape(-1))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    loaded = weights.load(
        tmp_path,
        architecture,
        dtype_of=lambda _: jnp.float32,
        sharding_of=lambda _: here,
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, decoder)
    with pytest.raises(ValueError, match=r"unexpected: .*layers\.0.*q_proj\.bias"):
        weights.check(tmp_path, tiny.ARCHITECTURE)


@pytest.mark.parametrize(
    ("family", "stored"),
    [
        # llama.cpp's converter permutes LlamaModel and its subclass SmolLM3Model.
        *((family, "(N half two)") for family in ("llama", "mistral", "smollm3")),
        *((family, "(N H)") for family in ("qwen2", "qwen3", "olmo2", "phi3")),
    ],
)
def test_gguf_files_of_llamas_have_rows_pair_by_pair_also_of_biases(family, stored):
    rows = leaves.decoder(tiny.changed(family=family, qkv_bias=True))
    (bias,) = (leaf for leaf in rows if leaf.path == BIAS)
    assert bias.axes_in("gguf")[0] == stored
