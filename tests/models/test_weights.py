"""Weights in and out; files are written and read by safetensors and gguf themselves."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lpc_jax.files import gguf as gguf_file
from lpc_jax.files import safetensors as safetensors_file
from lpc_jax.models import hf_config, leaves, weights
from lpc_jax.models.architectures import Architecture, RopeScaling

D, F, H, K, L, N, V = 64, 96, 16, 2, 3, 4, 40
TINY = Architecture(
    family="llama",
    vocabulary=V,
    width=D,
    layers=L,
    query_heads=N,
    kv_heads=K,
    head_width=H,
    mlp_width=F,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=None,
    tied=False,
    context_length=128,
)
MISTRAL = dataclasses.replace(TINY, family="mistral", sliding_window=8)
TIED = dataclasses.replace(TINY, tied=True)
# Leaf, tensor of layer 1, axes of ours in terms of the stored ones: by hand.
BY_HAND = {
    "attention/query": ("self_attn.q_proj", lambda w: w.T.reshape(D, N, H)),
    "attention/key": ("self_attn.k_proj", lambda w: w.T.reshape(D, K, H)),
    "attention/value": ("self_attn.v_proj", lambda w: w.T.reshape(D, K, H)),
    "attention/output": ("self_attn.o_proj", lambda w: w.T.reshape(N, H, D)),
    "attention_norm/scale": ("input_layernorm", lambda w: w),
    "mlp_norm/scale": ("post_attention_layernorm", lambda w: w),
    "mlp/gate": ("mlp.gate_proj", lambda w: w.T),
    "mlp/up": ("mlp.up_proj", lambda w: w.T),
    "mlp/down": ("mlp.down_proj", lambda w: w.T),
}


def hf_tensors(architecture: Architecture) -> dict[str, np.ndarray]:
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not architecture.tied:
        shapes["lm_head.weight"] = (V, D)
    for layer in range(L):
        block = {
            "self_attn.q_proj": (N * H, D),
            "self_attn.k_proj": (K * H, D),
            "self_attn.v_proj": (K * H, D),
            "self_attn.o_proj": (D, N * H),
            "input_layernorm": (D,),
            "post_attention_layernorm": (D,),
            "mlp.gate_proj": (F, D),
            "mlp.up_proj": (F, D),
            "mlp.down_proj": (D, F),
        }
        for name, shape in block.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
    generator = np.random.default_rng(0)
    return {
        name: generator.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_folder(
    folder: Path,
    tensors: dict[str, np.ndarray],
    architecture: Architecture,
    *,
    dtype=np.float32,
    shards: int = 1,
) -> Path:
    folder.mkdir(exist_ok=True)
    config = hf_config.fields(architecture)
    (folder / "config.json").write_text(json.dumps(config))
    names = list(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        file = "model.safetensors" if shards == 1 else file
        held = {name: tensors[name].astype(dtype) for name in names[shard::shards]}
        safetensors.numpy.save_file(held, folder / file)
        weight_map.update(dict.fromkeys(held, file))
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def permuted(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
        .swapaxes(1, 2)
        .reshape(rows.shape)
    )


def write_gguf(
    path: Path,
    tensors: dict[str, np.ndarray],
    architecture: Architecture,
    *,
    kind: str = "F32",
    name: str = "llama",
    metadata: dict[str, int | str | float] | None = None,
    factors: np.ndarray | None = None,
    more: dict[str, np.ndarray] | None = None,
) -> Path:
    writer = gguf.GGUFWriter(path, name)
    writer.add_block_count(architecture.layers)
    writer.add_context_length(architecture.context_length)
    writer.add_embedding_length(architecture.width)
    writer.add_feed_forward_length(architecture.mlp_width)
    writer.add_head_count(architecture.query_heads)
    writer.add_head_count_kv(architecture.kv_heads)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_freq_base(architecture.rope_theta)
    writer.add_rope_dimension_count(architecture.head_width)
    writer.add_token_list(["a", "bc"])
    writer.add_token_scores([0.0, -1.0])
    for key, value in (metadata or {}).items():
        add = {
            int: writer.add_uint32,
            str: writer.add_string,
            float: writer.add_float32,
        }
        add[type(value)](key, value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, architecture.layers)
    for hf_name, tensor in tensors.items():
        if "q_proj" in hf_name:
            tensor = permuted(tensor, architecture.query_heads)
        if "k_proj" in hf_name:
            tensor = permuted(tensor, architecture.kv_heads)
        block = "F32" if tensor.ndim == 1 else kind
        quantised = gguf.GGMLQuantizationType[block]
        theirs = names.get_name(hf_name, try_suffixes=(".weight",))
        data = gguf.quantize(tensor, quantised)
        writer.add_tensor(theirs, data, raw_dtype=quantised)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors)
    for more_name, tensor in (more or {}).items():
        writer.add_tensor(more_name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def on_one_device(path: str) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load(path: Path, architecture: Architecture, *, dtype=np.float32):
    return weights.load(
        path, architecture, dtype_of=lambda _: dtype, sharding_of=on_one_device
    )


def message_of(action, *arguments) -> str:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 - callers compare it whole
        action(*arguments)
    return str(raised.value)


def assert_holds(params, tensors, *, atol: float = 0.0, relative: float = 0.0):
    """Every leaf is the stored tensor, its axes turned by hand."""
    close = {"atol": atol, "rtol": relative}
    top = {"embedding": "model.embed_tokens", "head": "lm_head"}
    for leaf, name in top.items():
        stored = tensors.get(f"{name}.weight")
        assert (leaf in params) == (stored is not None)
        if stored is not None:
            np.testing.assert_allclose(params[leaf], stored, **close)
    np.testing.assert_allclose(
        params["final_norm"]["scale"], tensors["model.norm.weight"], **close
    )
    for leaf, (name, turned) in BY_HAND.items():
        part, key = leaf.split("/")
        assert params["blocks"][part][key].shape[0] == L
        for layer in range(L):
            stored = tensors[f"model.layers.{layer}.{name}.weight"]
            np.testing.assert_allclose(
                params["blocks"][part][key][layer], turned(stored), **close
            )


@pytest.mark.parametrize("architecture", [TINY, MISTRAL, TIED])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_holds_the_tensors_with_their_axes_turned(
    tmp_path, architecture, shards
):
    tensors = hf_tensors(architecture)
    folder = write_folder(tmp_path, tensors, architecture, shards=shards)
    assert weights.read_architecture(folder) == architecture
    assert_holds(load(folder, architecture), tensors)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("wanted", [jnp.float32, jnp.bfloat16])
def test_every_stored_type_is_converted_to_the_wanted_one(tmp_path, stored, wanted):
    tensors = hf_tensors(TINY)
    folder = write_folder(tmp_path, tensors, TINY, dtype=stored)
    params = load(folder, TINY, dtype=wanted)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(wanted)}
    as_stored = {name: tensor.astype(stored) for name, tensor in tensors.items()}
    expected = {
        name: tensor.astype(wanted).astype(np.float32)
        for name, tensor in as_stored.items()
    }
    assert_holds(jax.tree.map(lambda x: x.astype(jnp.float32), params), expected)


# Half a step of the block format over values in about +-4: Q8_0 has 255 levels over
# the block's range, Q4_1 has 16; 16-bit floats keep 11 and 8 bits.
@pytest.mark.parametrize(
    ("kind", "atol", "relative"),
    [
        ("F32", 0.0, 0.0),
        ("F16", 1e-6, 2**-11),
        ("BF16", 0.0, 2**-8),
        ("Q8_0", 0.02, 0.0),
        ("Q4_1", 0.3, 0.0),
    ],
)
@pytest.mark.parametrize("architecture", [TINY, TIED])
def test_a_gguf_file_holds_the_same_decoder_as_the_folder(
    tmp_path, architecture, kind, atol, relative
):
    tensors = hf_tensors(architecture)
    path = write_gguf(tmp_path / "m.gguf", tensors, architecture, kind=kind)
    assert weights.read_architecture(path) == architecture
    assert_holds(load(path, architecture), tensors, atol=atol, relative=relative)


def test_quantised_values_are_those_of_the_gguf_package(tmp_path):
    tensors = hf_tensors(TINY)
    path = write_gguf(tmp_path / "m.gguf", tensors, TINY, kind="Q4_1")
    reader = gguf.GGUFReader(path)
    ours = gguf_file.read(path).tensors
    assert set(ours) == {tensor.name for tensor in reader.tensors}
    for tensor in reader.tensors:
        theirs = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours[tensor.name].read(), theirs)


def llama3_factors(factor: float) -> np.ndarray:
    """convert_hf_to_gguf.py, LlamaModel.generate_extra_tensors."""
    old_length, low, high = 8192, 1, 4
    factors = []
    for i in range(0, H, 2):
        wavelength = 2 * np.pi * TINY.rope_theta ** (i / H)
        if wavelength < old_length / high:
            factors.append(1.0)
        elif wavelength > old_length / low:
            factors.append(factor)
        else:
            smooth = (old_length / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])  # Llama 3.1 and 3.2
def test_llama3_scaling_is_recovered_from_its_factors(tmp_path, factor):
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_tensors(TINY), TINY, factors=llama3_factors(factor))
    scaling = RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_length=8192,
    )
    read = weights.read_architecture(path)
    assert read == dataclasses.replace(TINY, rope_scaling=scaling)
    assert_holds(load(path, read), hf_tensors(TINY))


def test_linear_scaling_and_a_window_are_read_from_gguf_metadata(tmp_path):
    metadata = {
        "llama.rope.scaling.type": "linear",
        "llama.rope.scaling.factor": 2.0,
        "llama.attention.sliding_window": 8,
    }
    path = tmp_path / "m.gguf"
    write_gguf(path, hf_tensors(TINY), TINY, metadata=metadata)
    scaling = RopeScaling(kind="linear", factor=2.0)
    expected = dataclasses.replace(MISTRAL, rope_scaling=scaling)
    assert weights.read_architecture(path) == expected


@pytest.mark.parametrize("form", ["hf", "gguf"])
def test_each_parameter_has_a_tensor_of_its_own(form):
    rows = leaves.decoder(TINY)
    names = weights.shapes(rows, form, leaves.sizes(TINY))
    assert len(names) == len(hf_tensors(TINY))
    assert len(names) == sum(L if leaf.stacked else 1 for leaf in rows)


def test_harmless_tensors_are_passed_over(tmp_path):
    tensors = hf_tensors(TIED)
    extra = {
        "lm_head.weight": np.ones((V, D), np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(H // 2, np.float32),
    }
    folder = write_folder(tmp_path, tensors | extra, TIED)
    assert_holds(load(folder, TIED), tensors)


# One axis a leaf that 8 divides, or none.
SPECS = {
    "embedding": PartitionSpec("all", None),
    "head": PartitionSpec(None, "all"),
    "blocks/attention/query": PartitionSpec(None, "fsdp", "tensor", None),
    "blocks/attention/value": PartitionSpec(None, "fsdp", "tensor", None),
    "blocks/mlp/gate": PartitionSpec(None, "fsdp", "tensor"),
    "blocks/mlp/down": PartitionSpec(None, "tensor", "fsdp"),
}


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_each_device_is_given_its_shard_alone_and_each_tensor_read_once(
    tmp_path, monkeypatch, kind
):
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("fsdp", "tensor"))
    specs = {
        path: PartitionSpec(
            *(("fsdp", "tensor") if axis == "all" else axis for axis in spec)
        )
        for path, spec in SPECS.items()
    }

    def sharding_of(path: str) -> NamedSharding:
        return NamedSharding(mesh, specs.get(path, PartitionSpec()))

    tensors = hf_tensors(TINY)
    if kind == "gguf":
        path, room = write_gguf(tmp_path / "m.gguf", tensors, TINY), gguf_file
    else:
        path, room = write_folder(tmp_path, tensors, TINY), safetensors_file
    reads = collections.Counter()
    read = room.Tensor.read

    def counted(tensor):
        reads[tensor] += 1
        return read(tensor)

    monkeypatch.setattr(room.Tensor, "read", counted)
    params = weights.load(
        path, TINY, dtype_of=lambda _: np.float32, sharding_of=sharding_of
    )
    assert len(reads) == len(tensors)
    assert set(reads.values()) == {1}
    assert_holds(params, tensors)
    shapes = {
        "embedding": (V // 8, D),
        "head": (V, D // 8),
        "blocks/attention/query": (L, D // 4, N // 2, H),
        "blocks/attention/value": (L, D // 4, K // 2, H),
        "blocks/mlp/gate": (L, D // 4, F // 2),
        "blocks/mlp/down": (L, F // 2, D // 4),
    }
    for leaf_path, shape in shapes.items():
        leaf = params
        for part in leaf_path.split("/"):
            leaf = leaf[part]
        assert leaf.sharding == sharding_of(leaf_path)
        assert len(leaf.addressable_shards) == 8
        assert {shard.data.shape for shard in leaf.addressable_shards} == {shape}
        assert not leaf.is_fully_replicated


def test_layers_spread_over_devices_are_read_by_their_own_device(tmp_path):
    tensors = hf_tensors(TINY)
    folder = write_folder(tmp_path, tensors, TINY)
    mesh = Mesh(np.array(jax.devices()[:L]), ("layer",))

    def sharding_of(path: str) -> NamedSharding:
        spec = PartitionSpec("layer") if "blocks" in path else PartitionSpec()
        return NamedSharding(mesh, spec)

    params = weights.load(
        folder, TINY, dtype_of=lambda _: np.float32, sharding_of=sharding_of
    )
    gate = params["blocks"]["mlp"]["gate"]
    assert {shard.data.shape for shard in gate.addressable_shards} == {(1, D, F)}
    assert_holds(params, tensors)


def test_missing_extra_and_misshaped_tensors_are_all_listed(tmp_path):
    tensors = hf_tensors(TINY)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    del tensors["lm_head.weight"]
    tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(N * H, np.float32)
    tensors["model.norm.weight"] = np.zeros(D + 1, np.float32)
    folder = write_folder(tmp_path, tensors, TINY)
    assert message_of(load, folder, TINY) == (
        f"{folder}: the tensors are not those of a llama decoder with 3 layers.\n"
        "  missing: lm_head.weight, model.layers.1.mlp.up_proj.weight\n"
        "  unexpected: model.layers.0.self_attn.q_proj.bias\n"
        "  of another shape: model.norm.weight (expected [64], got [65])\n"
        "Nothing was loaded. Check that the weights and the architecture are of one"
        " model."
    )


def test_long_differences_are_counted(tmp_path):
    folder = write_folder(tmp_path, hf_tensors(TINY), TINY)
    deeper = dataclasses.replace(TINY, layers=L + 2)
    message = message_of(load, folder, deeper)
    # Two layers of nine tensors lack; ten are shown.
    assert ", and 8 more\n  unexpected: none\n  of another shape: none\n" in message


def broken(file: Path, reason: str) -> str:
    return (
        f"{file}: broken or truncated safetensors file (Error while deserializing"
        f" header: {reason}). Download it again."
    )


def test_a_truncated_safetensors_file_is_named(tmp_path):
    folder = write_folder(tmp_path, hf_tensors(TINY), TINY)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for size, reason in (
        (len(whole) - 100, "incomplete metadata, file not fully covered"),
        (50, "invalid header length"),
        (0, "header too small"),
    ):
        file.write_bytes(whole[:size])
        assert message_of(load, folder, TINY) == broken(file, reason)


def test_a_broken_safetensors_header_is_named(tmp_path):
    folder = write_folder(tmp_path, hf_tensors(TINY), TINY)
    file = folder / "model.safetensors"
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
    text = json.dumps({"a": entry}).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    reason = "invalid shape, data type, or offset for tensor"
    assert message_of(load, folder, TINY) == broken(file, reason)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert message_of(load, folder, TINY) == (
        f"{file}: expected a safetensors file, got a Git LFS pointer to one. Fetch it:"
        " git lfs pull"
    )


def test_quantised_safetensors_are_refused(tmp_path):
    tensors = hf_tensors(TINY)
    folder = write_folder(tmp_path, tensors, TINY, dtype=np.int8)
    file = folder / "model.safetensors"
    first = next(iter(safetensors.numpy.load_file(file)))
    assert first in tensors
    message = message_of(load, folder, TINY)
    assert message.startswith(f"{file}: ")
    assert message.endswith(
        " must be of type BF16, F16, F32, got I8. Use the model's unquantised weights."
    )


def test_a_missing_shard_and_a_doubled_tensor_are_named(tmp_path):
    tensors = hf_tensors(TINY)
    folder = write_folder(tmp_path, tensors, TINY, shards=3)
    shard = folder / "model-00002-of-00003.safetensors"
    doubled = safetensors.numpy.load_file(shard)
    doubled["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    safetensors.numpy.save_file(doubled, shard)
    assert message_of(load, folder, TINY) == (
        f"{shard}: model.embed_tokens.weight is in model-00001-of-00003.safetensors"
        " too. Download the folder again."
    )
    shard.unlink()
    assert message_of(load, folder, TINY) == (
        f"{folder}/model.safetensors.index.json: expected 3 shards, missing"
        " ['model-00002-of-00003.safetensors']. Download them again."
    )


def test_pickled_weights_are_refused(tmp_path):
    folder = write_folder(tmp_path, hf_tensors(TINY), TINY)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for action in (weights.digest, lambda path: load(path, TINY)):
        assert message_of(action, folder) == (
            f"{folder} must hold model.safetensors or model.safetensors.index.json,"
            " got ['pytorch_model.bin']. Pickled weights are not read, because a"
            " pickle can run code: convert them with transformers' save_pretrained. A"
            " GGUF file is named itself, not its folder."
        )


def test_a_path_that_is_no_model_is_refused(tmp_path):
    assert message_of(weights.read_architecture, tmp_path) == (
        f"{tmp_path}: expected a folder with config.json, or a file ending in .gguf."
        " Check the path."
    )
    config = tmp_path / "config.json"
    config.write_text("{")
    assert message_of(weights.read_architecture, tmp_path) == (
        f"{config}: broken JSON (Expecting property name enclosed in double quotes:"
        " line 1 column 2 (char 1)). Download it again."
    )
    config.write_text("[]")
    assert message_of(weights.read_architecture, tmp_path) == (
        f"{config} must be a JSON object. Download it again."
    )


def test_bad_gguf_files_are_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(TINY), TINY)
    whole = path.read_bytes()
    end = max(
        tensor.data_offset + tensor.n_bytes for tensor in gguf.GGUFReader(path).tensors
    )
    for content in (
        *(whole[: end - 1], whole[:300], whole[:6], b""),
        b"GGUF" + (1).to_bytes(4, "little") + whole[8:],
    ):
        path.write_bytes(content)
        message = message_of(load, path, TINY)
        assert message.startswith(
            f"{path}: expected a GGUF file, got a broken or truncated one ("
        )
        assert message.endswith("). Fetch it again.")
    assert "version 1 which we cannot handle" in message


def test_a_gguf_file_that_changes_is_read_anew(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(TINY), TINY)
    assert not gguf_file.read(path).metadata.get("llama.attention.sliding_window")
    assert gguf_file.read(path) is gguf_file.read(path)
    metadata = {"llama.attention.sliding_window": 8}
    write_gguf(path, hf_tensors(TINY), TINY, metadata=metadata)
    assert gguf_file.read(path).metadata["llama.attention.sliding_window"] == 8


def test_a_big_endian_gguf_file_is_refused(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert "its byte order is not this machine's" in message_of(load, path, TINY)


def test_gguf_differences_are_listed_in_its_own_names(tmp_path):
    tensors = hf_tensors(TINY)
    del tensors["model.layers.2.mlp.up_proj.weight"]
    more = {"blk.0.attn_q.bias": np.zeros(N * H, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tensors, TINY, more=more)
    assert message_of(load, path, TINY) == (
        f"{path}: the tensors are not those of a llama decoder with 3 layers.\n"
        "  missing: blk.2.ffn_up.weight\n"
        "  unexpected: blk.0.attn_q.bias\n"
        "  of another shape: none\n"
        "Nothing was loaded. Check that the weights and the architecture are of one"
        " model."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "gemma"},
            "general.architecture must be one of ['llama', 'olmo2', 'phi3', 'qwen2',"
            " 'qwen3', 'smollm3'], got 'gemma'. Gemma's norms, its scaled embedding and"
            " its capped logits are not implemented.",
        ),
        (
            {"name": "qwen3moe"},
            "general.architecture must be one of ['llama', 'olmo2', 'phi3', 'qwen2',"
            " 'qwen3', 'smollm3'], got 'qwen3moe'. Mixtures of experts are not"
            " implemented.",
        ),
        (
            {"metadata": {"llama.expert_count": 8}},
            "llama.expert_count must be 0, got 8. The decoder does not compute this"
            " variant.",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "longrope"}},
            "llama.rope.scaling.type must be none, or linear or yarn without"
            " rope_freqs.weight, got 'longrope'. This scaling is not implemented.",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "dynamic"}},
            "llama.rope.scaling.type must be none, or linear or yarn without"
            " rope_freqs.weight, got 'dynamic'. This scaling is not implemented.",
        ),
        (
            {
                "metadata": {
                    "llama.rope.scaling.type": "yarn",
                    "llama.rope.scaling.factor": 2.0,
                    "llama.rope.scaling.yarn_ext_factor": 0.5,
                }
            },
            "llama.rope.scaling.* must be of yarn, got ['yarn_ext_factor']. The decoder"
            " does not compute this variant.",
        ),
        (
            {"metadata": {"llama.rope.scaling.type": "linear"}},
            "llama.rope.scaling.factor must be a number above 0 and at most 1e+12, got"
            " None. Download it again.",
        ),
        (
            {"factors": np.linspace(1, 5, H // 2, dtype=np.float32)},
            "rope_freqs.weight must be Llama 3.1's stretch by some factor with"
            " {'low_freq_factor': 1.0, 'high_freq_factor': 4.0, 'original_length':"
            " 8192}, got factors from 1 to 5 of another rule. Use the model's"
            " safetensors folder.",
        ),
        (
            {"metadata": {"split.count": 2}},
            "expected one file, got one of 2 splits. Join them: llama-gguf-split"
            " --merge FIRST_FILE OUTPUT_FILE",
        ),
    ],
)
def test_a_gguf_model_that_the_decoder_does_not_compute_is_named(
    tmp_path, arguments, message
):
    path = write_gguf(tmp_path / "m.gguf", hf_tensors(TINY), TINY, **arguments)
    assert message_of(weights.read_architecture, path) == f"{path}: {message}"


def test_digest_is_of_names_sizes_and_bytes_of_the_weight_files(tmp_path):
    folder = write_folder(tmp_path / "a", hf_tensors(TINY), TINY, shards=2)
    expected = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        data = file.read_bytes()
        expected.update(f"{file.name}\0{len(data)}\0".encode() + data)
    assert weights.digest(folder) == expected.hexdigest()
    (folder / "README.md").write_text("not a weight")
    assert weights.digest(folder) == expected.hexdigest()
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x7f")
    assert weights.digest(folder) != expected.hexdigest()


@pytest.mark.parametrize("architecture", [TINY, MISTRAL, TIED])
@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_what_is_saved_reads_back_bit_for_bit(tmp_path, architecture, shard_bytes):
    source = write_folder(tmp_path / "a", hf_tensors(architecture), architecture)
    params = load(source, architecture)
    folder = tmp_path / "deep" / "b"
    weights.save(
        folder, params, architecture, dtype=np.float32, shard_bytes=shard_bytes
    )
    assert weights.read_architecture(folder) == architecture
    again = load(folder, architecture)
    jax.tree.map(np.testing.assert_array_equal, again, params)
    # The safetensors library reads the same tensors as were written at first.
    read = {}
    files = sorted(folder.glob("*.safetensors"))
    for file in files:
        assert shard_bytes < 1 << 30 or file.name == "model.safetensors"
        with safetensors.safe_open(file, framework="np") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - not a dict
                read[name] = opened.get_tensor(name)
    expected = hf_tensors(architecture)
    assert set(read) == set(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(read[name], tensor)
    index = folder / "model.safetensors.index.json"
    assert index.exists() == (len(files) > 1) == (shard_bytes < 1 << 30)
    if index.exists():
        parsed = json.loads(index.read_text())
        assert set(parsed["weight_map"]) == set(expected)
        assert set(parsed["weight_map"].values()) == {file.name for file in files}
        total = sum(tensor.nbytes for tensor in expected.values())
        assert parsed["metadata"] == {"total_size": total}
        assert all(file.stat().st_size < shard_bytes * 2 for file in files)
    assert [entry.name for entry in folder.parent.iterdir()] == ["b"]


def test_sharded_parameters_are_saved_whole_and_in_bfloat16(tmp_path):
    source = write_folder(tmp_path / "a", hf_tensors(TINY), TINY)
    mesh = Mesh(np.array(jax.devices()[:4]), ("fsdp",))  # divides N, D, F and V
    params = weights.load(
        source,
        TINY,
        dtype_of=lambda _: np.float32,
        sharding_of=lambda path: NamedSharding(
            mesh,
            PartitionSpec(None, "fsdp") if "blocks" in path else PartitionSpec("fsdp"),
        ),
    )
    folder = tmp_path / "b"
    weights.save(folder, params, TINY, dtype=jnp.bfloat16, shard_bytes=1 << 30)
    read = safetensors.numpy.load_file(folder / "model.safetensors")
    for name, tensor in hf_tensors(TINY).items():
        assert read[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(read[name], tensor.astype(ml_dtypes.bfloat16))
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_save_leaves_nothing_behind_when_it_fails(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "a", hf_tensors(TINY), TINY)
    params = load(source, TINY)
    folder = tmp_path / "out" / "b"

    def save(tree, dtype=np.float32):
        weights.save(folder, tree, TINY, dtype=dtype, shard_bytes=1 << 30)

    with pytest.raises(AssertionError):  # a tree that is no decoder's is a fault
        save({"embedding": params["embedding"], "z": {"y": np.ones(3)}})
    assert message_of(save, params, np.float64) == (
        "dtype must be one of ['bfloat16', 'float16', 'float32'], got float64."
    )
    monkeypatch.setattr(
        weights, "_rearrange", lambda *_: (_ for _ in ()).throw(OSError(28, "No space"))
    )
    with pytest.raises(OSError, match="No space"):
        save(params)
    assert not list(tmp_path.glob("out/*"))


def test_save_refuses_a_full_folder(tmp_path):
    params = load(write_folder(tmp_path / "a", hf_tensors(TIED), TIED), TIED)

    def save(folder):
        weights.save(folder, params, TIED, dtype=np.float32, shard_bytes=1 << 30)

    assert message_of(save, tmp_path / "a") == (
        f"{tmp_path}/a must be new or empty. Choose another folder."
    )


def test_find_names_the_setting_of_a_path_that_is_not_there(tmp_path):
    absent = str(tmp_path / "absent" / "model")

    def find(path):
        return weights.find(path, setting="model.path", revision=None)

    assert find(str(tmp_path)) == tmp_path
    assert message_of(find, absent) == (
        f"model.path = {absent!r}: no such file or folder, and not a hub id of the"
        " form owner/name. Check the path."
    )


@pytest.mark.smollm2
def test_smollm2_is_a_llama_of_135_million(smollm2):
    assert weights.read_architecture(smollm2) == Architecture(
        family="llama",
        vocabulary=49152,
        width=576,
        layers=30,
        query_heads=9,
        kv_heads=3,
        head_width=64,
        mlp_width=1536,
        norm_epsilon=1e-5,
        rope_theta=100_000.0,
        rope_scaling=None,
        sliding_window=None,
        tied=True,
        context_length=8192,
    )


def test_what_is_loaded_can_be_given_to_an_update(tmp_path):
    """JAX cannot reuse memory that NumPy owns, and would hold parameters twice."""
    folder = write_folder(tmp_path, hf_tensors(TINY), TINY)
    update = jax.jit(lambda x: x + 1, donate_argnums=0)
    for leaf in jax.tree.leaves(load(folder, TINY)):
        before = leaf.unsafe_buffer_pointer()
        assert update(leaf).unsafe_buffer_pointer() == before


@pytest.mark.skipif(sys.platform != "linux", reason="reads and writes /proc")
def test_a_sharded_checkpoint_loads_within_1_3_of_its_size_each_device_its_eighth(
    tmp_path, repository
):
    """VmHWM counts mapped pages too. LPC_JAX_CHECKPOINT_BYTES=2000000000 for 2 GB."""
    wanted = int(os.environ.get("LPC_JAX_CHECKPOINT_BYTES", 512_000_000))
    script = repository / "tests" / "models" / "load_at_scale.py"
    environment = os.environ | {"PYTHONPATH": str(repository)}
    command = [sys.executable, str(script), str(tmp_path / "big"), str(wanted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    finally:
        shutil.rmtree(tmp_path / "big", ignore_errors=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ratio = found["grew"] / found["checkpoint"]
    print(f"{found['checkpoint']:,} bytes loaded at {ratio:.3f} of their size")
    assert found["checkpoint"] >= wanted
    assert found["shards"] > 1
    assert ratio < 1.3
    # Norms are whole on each device where 8 does not divide them; here it does.
    parameters = sum(found["held"])
    assert found["held"] == [parameters // 8] * 8
    assert parameters == pytest.approx(found["checkpoint"], rel=1e-3)
    assert found["first"] == [1.0, 3.0]  # as the tensors are numbered


_PEAK = """
import sys
from pathlib import Path
import jax
from lpc_jax.models import leaves, weights
path = Path(sys.argv[1])
one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
read = weights.read_architecture(path)
params = weights.load(
    path, read, dtype_of=lambda _: "float32", sharding_of=lambda _: one
)
assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 134_515_008
# Not ru_maxrss, which starts at the size of the process that started this one.
(line,) = [s for s in open("/proc/self/status") if s.startswith("VmHWM:")]
print(line.split()[1])
"""


@pytest.mark.smollm2
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_smollm2_loads_leaf_by_leaf(smollm2):
    """134.5 M parameters are 0.54 GB; twice that would be no streaming."""
    command = [sys.executable, "-c", _PEAK, str(smollm2)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 1.2e9
