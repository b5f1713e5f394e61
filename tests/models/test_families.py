"""Every family: logits, cache, files in and out, adapters, devices, packing.

Second sources: golden/family_logits.npz, which transformers computed; llama.cpp's names
as the gguf package has them; and the decoder itself under another layout.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from lpc_jax import sharding
from lpc_jax.models import adapters, hf_config, leaves, network, weights
from lpc_jax.models.architectures import RopeScaling
from lpc_jax.models.cached import CachedDecoder
from tests import families, tiny
from tests.harness import load_policy, logits
from tests.models.test_weights import permuted

GOLDEN = Path(__file__).parents[1] / "golden" / "family_logits.npz"
NAMES = tuple(families.FIELDS)
# Of which every leaf is looked at, where each of several kinds is in one.
FAMILIES = ("qwen2", "qwen3", "olmo2")


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Folder, graph and parameters of each, read once."""
    made = {}

    def of(name):
        if name not in made:
            folder = families.write(tmp_path_factory.mktemp(name), name)
            made[name] = folder, *load_policy(folder)
        return made[name]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name, golden, loaded):
    _, graph, params = loaded(name)
    found = jax.jit(lambda p, t: logits(graph, p, t)[1])(params, golden["tokens"])
    np.testing.assert_allclose(found[0, 3::4], golden[name], atol=1e-4, rtol=0)


# Each on a model where it matters: a value that must give other logits.
CHANGES = [
    ("qwen2", "qkv_bias", False),
    ("qwen2_windowed", "sliding_window", None),
    ("qwen2_yarn", "rope_scaling", RopeScaling(kind="linear", factor=4.0)),
    ("qwen3", "qk_norm", None),
    ("smollm3", "unturned", ()),
    ("olmo2", "norm_after", False),
    ("olmo2", "qk_norm", None),
    ("phi3_longrope", "rotary_width", 4),
    ("phi3_longrope", "rope_scaling", None),
    ("llama_biases", "output_bias", False),
    ("llama_biases", "mlp_bias", False),
]


@pytest.mark.parametrize(("name", "field", "value"), CHANGES)
def test_each_field_of_a_family_changes_the_output(name, field, value, golden, loaded):
    folder, _, params = loaded(name)
    other = tiny.changed(weights.read_architecture(folder), **{field: value})
    if field == "rotary_width":
        other = tiny.changed(other, rope_scaling=None)
    kept = {leaf.within for leaf in leaves.decoder(other)}
    decoder = _nested(
        {k: x for k, x in sharding.by_path(params["decoder"]).items() if k in kept}
    )
    graph = _graph(other)
    found = logits(graph, {"decoder": decoder}, golden["tokens"])[1]
    assert np.abs(found[0, 3::4] - golden[name]).max() > 0.1


def _nested(flat):
    tree = {}
    for path, value in flat.items():
        node, (*parts, last) = tree, path.split("/")
        for part in parts:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def _graph(architecture, **changes):
    options = {"adapters": None, "latent": None, "remat": "none"} | changes
    return nnx.split(
        nnx.eval_shape(
            lambda: network.build(
                architecture,
                compute_dtype=jnp.dtype("float32"),
                attention_backend="blocks",
                key=jax.random.key(0),
                **options,
            )
        )
    )[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_matters(name, golden, loaded):
    _, graph, params = loaded(name)
    gradient = jax.jit(
        jax.grad(lambda p: jnp.sum(jnp.sin(logits(graph, p, golden["tokens"])[1])))
    )(params)
    for path, value in sharding.by_path(gradient).items():
        assert jnp.abs(value).max() > 1e-3 or "key_bias" in path, path


@pytest.mark.parametrize("name", ["qwen3", "smollm3_yarn", "olmo2", "phi3_longrope"])
def test_the_cache_says_what_whole_rows_say(name, golden, loaded):
    _, graph, params = loaded(name)
    decoder = nnx.merge(graph, params).decoder
    tokens = golden["tokens"]
    # Padded on the left by 3, the last token alone.
    rows = np.concatenate([np.zeros((1, 3), int), tokens], axis=1)
    cached = jax.jit(CachedDecoder(decoder).__call__)
    cache, found = CachedDecoder(decoder).empty_cache(np.asarray([43]), 43), []
    first = jnp.asarray([3])
    for start, end in ((0, 42), (42, 43)):
        piece = jnp.asarray(rows[:, start:end])
        hidden, cache = cached(piece, cache, start=jnp.int32(start), first=first)
        found.append(hidden)
    whole, _ = jax.jit(lambda p, t: logits(graph, p, t))(params, tokens)
    found = jnp.concatenate(found, axis=1)[:, 3:]
    np.testing.assert_allclose(found, whole, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_written_is_what_was_read(name, loaded, tmp_path):
    folder, _, params = loaded(name)
    architecture = weights.read_architecture(folder)
    options = {"dtype": np.float32, "shard_bytes": 1 << 30}
    weights.save(tmp_path / "out", params["decoder"], architecture, **options)
    assert weights.read_architecture(tmp_path / "out") == architecture
    before, after = (
        safetensors.numpy.load_file(f / "model.safetensors")
        for f in (folder, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    for tensor in before:
        np.testing.assert_array_equal(after[tensor], before[tensor])
    if name.startswith("phi3"):
        assert "model.layers.0.mlp.gate_up_proj.weight" in after


# --- GGUF -----------------------------------------------------------------------------


def write_gguf(path, name):
    """As llama.cpp's converter: the gguf package's names, its own layout and fields."""
    config = families.FIELDS[name]
    arch, heads = config["model_type"], config["num_attention_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    head_width = config.get("head_dim", config["hidden_size"] // heads)
    if "head_dim" in config:
        writer.add_key_length(head_width)
        writer.add_value_length(head_width)
    share = config.get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(share * head_width))
    if arch == "phi3":
        writer.add_sliding_window(config.get("sliding_window") or 0)
        original = config.get("original_max_position_embeddings", 4096)
        writer.add_rope_scaling_orig_ctx_len(original)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(scaling["factor"])
        writer.add_rope_scaling_orig_ctx_len(families.ORIGINAL)
    if scaling.get("type") == "longrope":
        # sqrt(1 + ln(512 / 32) / ln(32)), by hand.
        writer.add_rope_scaling_attn_factors(1.3416407865)
        for which in ("long", "short"):
            values = np.asarray(scaling[f"{which}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", values)
    names = gguf.get_tensor_name_map(
        next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch),
        config["num_hidden_layers"],
    )
    for hf_name, tensor in families.tensors(config).items():
        if arch in ("llama", "smollm3") and (
            "q_proj" in hf_name or "k_proj" in hf_name
        ):
            of = "num_attention_heads" if "q_proj" in hf_name else "num_key_value_heads"
            tensor = permuted(tensor, config[of])
        theirs = names.get_name(hf_name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None
        writer.add_tensor(theirs, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", sorted({*NAMES} - {"qwen2_windowed", "smollm3_yarn"}))
def test_a_gguf_file_holds_what_the_folder_holds(name, loaded, tmp_path):
    folder, _, params = loaded(name)
    file = write_gguf(tmp_path / "m.gguf", name)
    expected, found = map(weights.read_architecture, (folder, file))
    if name == "phi3_longrope":
        assert found.rope_scaling is not None
        factor = found.rope_scaling.attention_factor
        assert factor == pytest.approx(1.3416407865)
        scaling = dataclasses.replace(found.rope_scaling, attention_factor=None)
        found = tiny.changed(found, rope_scaling=scaling)
    assert found == expected
    _, read = load_policy(file)
    jax.tree.map(np.testing.assert_array_equal, read, params)


# --- adapters, devices, packing -------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_run_as_they_merge(name, golden, loaded):
    folder, plain, params = loaded(name)
    architecture = weights.read_architecture(folder)
    of = {"targets": tuple(leaves.TARGETS), "rank": 2, "alpha": 4.0}
    _, drawn = tiny.split_policy(architecture, latent=None, adapters=of)
    low_rank = jax.tree.map(lambda x: x + 0.05, drawn["adapters"])  # b starts at 0
    graph = _graph(architecture, adapters=of)
    run, tokens = jax.jit(hidden, static_argnums=0), golden["tokens"]
    found = run(graph, params | {"adapters": low_rank}, tokens)
    merged = adapters.merge(params["decoder"], low_rank, scale=2.0)
    wanted, before = (
        run(plain, {"decoder": d}, tokens) for d in (merged, params["decoder"])
    )
    np.testing.assert_allclose(found, wanted, atol=1e-3)
    assert np.abs(wanted - before).max() > 0.1


def hidden(graph, params, tokens, positions=None, pair=None, branch=None):
    model, tokens = nnx.merge(graph, params), jnp.asarray(tokens)
    same = jnp.zeros_like(tokens)
    positions = jnp.arange(tokens.shape[1])[None] if positions is None else positions
    pair = same if pair is None else pair
    branch = same if branch is None else branch
    return model.decoder(tokens, positions, pair, branch, model.adapters)


@pytest.mark.parametrize("name", ["qwen2", "olmo2", "phi3_longrope"])
def test_eight_devices_say_what_one_says(name, golden, loaded):
    _, graph, params = loaded(name)
    tokens = np.repeat(golden["tokens"], 4, axis=0)

    def value(params, tokens):
        return jnp.sum(jnp.sin(logits(graph, params, tokens)[1])) / 1000

    wanted = jax.jit(jax.value_and_grad(value))(params, tokens)
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2, devices=jax.devices())
    with jax.set_mesh(mesh):
        placed = jax.tree.map(jax.device_put, params, leaves.shardings(params, mesh))
        found = jax.jit(jax.value_and_grad(value))(placed, tokens)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), found, wanted
    )


def test_longrope_judges_a_pair_by_its_longer_answer_whatever_shares_its_row(loaded):
    """Two pairs in a row, of 16 and of 40 tokens; the original context has 32."""
    _, graph, params = loaded("phi3_longrope")
    run = jax.jit(functools.partial(hidden, graph, params))
    rng = np.random.default_rng(3)
    short, long = (rng.integers(0, 64, n) for n in (16, 40))

    def alone(tokens):
        return run(jnp.asarray(tokens)[None])

    tokens = jnp.asarray(np.concatenate([short, long, np.zeros(8, int)]))[None]
    positions = jnp.asarray([*range(16), *range(40), *[0] * 8])[None]
    pair = jnp.asarray([0] * 16 + [1] * 40 + [-1] * 8)[None]
    branch = jnp.where(pair < 0, 3, 0)
    found = run(tokens, positions, pair, branch)
    np.testing.assert_allclose(found[:, :16], alone(short), atol=2e-5)
    np.testing.assert_allclose(found[:, 16:56], alone(long), atol=2e-5)
    # A prompt of 10, answers of 6 and 30: the prompt is as in the longer one.
    answers = jnp.asarray([*long[:10], *short[:6], *long[10:]])[None]
    positions = jnp.asarray([*range(10), *range(10, 16), *range(10, 40)])[None]
    branch = jnp.asarray([0] * 10 + [1] * 6 + [2] * 30)[None]
    found = run(answers, positions, None, branch)
    np.testing.assert_allclose(found[:, 16:], alone(long)[:, 10:], atol=2e-5)
    np.testing.assert_allclose(found[:, :10], alone(long)[:, :10], atol=2e-5)


def test_a_cached_row_that_may_grow_beyond_the_original_context_is_long(loaded):
    _, graph, params = loaded("phi3_longrope")
    decoder = CachedDecoder(nnx.merge(graph, params).decoder)
    tokens = np.random.default_rng(3).integers(0, 64, (1, 16))
    # Both rows have the same tokens and slots; the second may come to 33.
    cache = decoder.empty_cache(np.asarray([32, 33]), 64)
    found, after = jax.jit(decoder.__call__)(
        jnp.asarray(np.repeat(tokens, 2, axis=0)),
        cache,
        start=jnp.int32(0),
        first=jnp.zeros(2, jnp.int32),
    )
    whole, _ = logits(graph, params, tokens)
    np.testing.assert_allclose(found[0], whole[0], atol=2e-5)
    assert np.abs(found[1] - whole[0]).max() > 1e-2
    np.testing.assert_array_equal(after.longest, [32, 33])


def test_config_json_of_an_older_transformers_phi3_has_three_fields_of_scaling(loaded):
    folder, _, _ = loaded("phi3_longrope")
    fields = hf_config.fields(weights.read_architecture(folder))
    assert fields["rope_scaling"] == families.FIELDS["phi3_longrope"]["rope_scaling"]
    assert fields["original_max_position_embeddings"] == families.ORIGINAL
    # Other names that transformers knows it by.
    config = json.loads(json.dumps(fields))
    for name in ("su", "yarn"):
        config["rope_scaling"]["type"] = name
        assert hf_config.read(config, "") == hf_config.read(fields, "")
