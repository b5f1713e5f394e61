"""A decoder's weights: Hugging Face safetensors and GGUF in, safetensors out.

One table says where each of our parameters is in each format. Leaves are made one at
a time, under the sharding that the caller asks for. Knows nothing of policies,
latents or meshes.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import mmap
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import einops
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Shaped

from lpc_jax import sources, untrusted
from lpc_jax.models import architectures, gguf_file, safetensors_file
from lpc_jax.models.architectures import Architecture

# Of a hub repository: pickles and Mistral's second copy (consolidated.*) are left.
_HUB_PATTERNS = (
    "*.json",
    "model*.safetensors",
    "tokenizer*",
    "*.jinja",
    "merges.txt",
)
_CONFIG = "config.json"
_LARGEST_CONFIG = 10_000_000  # real ones have a few thousand bytes
_GGUF = ".gguf"
_SHOWN = 10
_READ_BYTES = 1 << 20


_Stored = safetensors_file.Tensor | gguf_file.Tensor


@dataclasses.dataclass(frozen=True)
class Key:
    """Where one parameter is in a file.

    Attributes:
        path: In our tree.
        name: In the file; with ``{layer}`` for a leaf stacked over layers.
        stored: Axes in the file, as einops writes them.
        ours: Axes in our tree, less the leading L of a stacked leaf.
    """

    path: str
    name: str
    stored: str
    ours: str

    @property
    def stacked(self) -> bool:
        """Whether the leaf has a leading axis of layers."""
        return "{layer}" in self.name


_LAYER = "model.layers.{layer}."
_LLAMA = (
    Key("embedding", "model.embed_tokens.weight", "V D", "V D"),
    Key("head", "lm_head.weight", "V D", "V D"),
    Key("final_norm/scale", "model.norm.weight", "D", "D"),
    Key("blocks/attention_norm/scale", _LAYER + "input_layernorm.weight", "D", "D"),
    Key(
        "blocks/attention/query",
        _LAYER + "self_attn.q_proj.weight",
        "(N H) D",
        "D N H",
    ),
    Key("blocks/attention/key", _LAYER + "self_attn.k_proj.weight", "(K H) D", "D K H"),
    Key(
        "blocks/attention/value",
        _LAYER + "self_attn.v_proj.weight",
        "(K H) D",
        "D K H",
    ),
    Key(
        "blocks/attention/output",
        _LAYER + "self_attn.o_proj.weight",
        "D (N H)",
        "N H D",
    ),
    Key("blocks/mlp_norm/scale", _LAYER + "post_attention_layernorm.weight", "D", "D"),
    Key("blocks/mlp/gate", _LAYER + "mlp.gate_proj.weight", "F D", "D F"),
    Key("blocks/mlp/up", _LAYER + "mlp.up_proj.weight", "F D", "D F"),
    Key("blocks/mlp/down", _LAYER + "mlp.down_proj.weight", "D F", "F D"),
)
KEYS = {"llama": _LLAMA, "mistral": _LLAMA}

# Rows of queries and keys are stored pair by pair, for RoPE on neighbours; ours turns
# element i with element i + H/2.
_BLOCK = "blk.{layer}."
GGUF_KEYS = (
    Key("embedding", "token_embd.weight", "V D", "V D"),
    Key("head", "output.weight", "V D", "V D"),
    Key("final_norm/scale", "output_norm.weight", "D", "D"),
    Key("blocks/attention_norm/scale", _BLOCK + "attn_norm.weight", "D", "D"),
    Key(
        "blocks/attention/query",
        _BLOCK + "attn_q.weight",
        "(N half two) D",
        "D N (two half)",
    ),
    Key(
        "blocks/attention/key",
        _BLOCK + "attn_k.weight",
        "(K half two) D",
        "D K (two half)",
    ),
    Key("blocks/attention/value", _BLOCK + "attn_v.weight", "(K H) D", "D K H"),
    Key("blocks/attention/output", _BLOCK + "attn_output.weight", "D (N H)", "N H D"),
    Key("blocks/mlp_norm/scale", _BLOCK + "ffn_norm.weight", "D", "D"),
    Key("blocks/mlp/gate", _BLOCK + "ffn_gate.weight", "F D", "D F"),
    Key("blocks/mlp/up", _BLOCK + "ffn_up.weight", "F D", "D F"),
    Key("blocks/mlp/down", _BLOCK + "ffn_down.weight", "D F", "F D"),
)

# Tensors that hold nothing a decoder does not know, and that may be there or not.
_HARMLESS = ("*rotary_emb.inv_freq", gguf_file.ROPE_FACTORS)
_HARMLESS_WHEN_TIED = ("lm_head.weight",)


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == _GGUF


def find(
    path: str, *, setting: str, revision: str | None, retry: sources.Retry
) -> Path:
    """The folder or GGUF file that a setting names, downloaded if need be.

    Args:
        path: A local path, ``package:NAME/FILE`` or a hub model id.
        setting: The setting's name in the user's words, for messages.
        revision: Branch, tag or commit of a hub id.
        retry: When a download fails.

    Raises:
        ValueError: In one line, what is missing and how to get it.
    """
    return sources.resolve(
        path,
        setting=setting,
        revision=revision,
        patterns=_HUB_PATTERNS,
        retry=retry,
    )


def read_architecture(path: Path) -> Architecture:
    """The architecture of a Hugging Face folder or a GGUF file.

    Raises:
        ValueError: Neither of the two, a broken file, or a model that the decoder
            does not compute.
    """
    if _is_gguf(path):
        return gguf_file.architecture(gguf_file.read_header(path))
    config = untrusted.own_file(path, _CONFIG)
    if config is None:
        raise ValueError(
            f"{path}: expected a folder with {_CONFIG}, or a file ending in {_GGUF}."
            " Check the path."
        )
    try:
        fields = untrusted.read_json(config, most=_LARGEST_CONFIG)
    except ValueError as e:
        raise ValueError(
            f"{config}: broken JSON ({untrusted.shown(e)}). Download it again."
        ) from e
    if not isinstance(fields, dict):
        raise ValueError(f"{config} must be a JSON object. Download it again.")
    return architectures.from_hf_config(fields, str(config))


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "V": architecture.vocabulary,
        "D": architecture.width,
        "N": architecture.query_heads,
        "K": architecture.kv_heads,
        "H": architecture.head_width,
        "F": architecture.mlp_width,
        "two": 2,
        "half": architecture.head_width // 2,
    }


def _shape(axes: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of ``"(N H) D"``: one number a word or bracket."""
    return tuple(
        math.prod(sizes[letter] for letter in group.strip("()").split())
        for group in re.findall(r"\([^)]*\)|\S+", axes)
    )


def _rearrange(
    x: Shaped[np.ndarray, "..."], before: str, after: str, sizes: Mapping[str, int]
) -> Shaped[np.ndarray, "..."]:
    used = {axis: sizes[axis] for axis in set(re.findall(r"\w+", before))}
    return einops.rearrange(x, f"{before} -> {after}", **used)


def _keys(keys: tuple[Key, ...], architecture: Architecture) -> tuple[Key, ...]:
    return tuple(k for k in keys if k.path != "head" or not architecture.tied)


def _leaf_shape(key: Key, architecture: Architecture) -> tuple[int, ...]:
    layers = (architecture.layers,) if key.stacked else ()
    return layers + _shape(key.ours, _sizes(architecture))


def _stored_shapes(
    keys: tuple[Key, ...], architecture: Architecture
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file must hold."""
    sizes = _sizes(architecture)
    return {
        key.name.format(layer=layer): _shape(key.stored, sizes)
        for key in keys
        for layer in range(architecture.layers if key.stacked else 1)
    }


def _shown(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(map(untrusted.shown, items[:_SHOWN])) or "none") + more


def _check_table(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    harmless: tuple[str, ...],
    origin: str,
    remedy: str,
) -> None:
    """Every expected name is found with its shape, and no other."""
    missing = [name for name in expected if name not in found]
    unexpected = [
        name
        for name in found
        if name not in expected
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
    ]
    misshaped = [
        f"{name} (expected {list(shape)}, got {list(found[name])})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if missing or unexpected or misshaped:
        raise ValueError(
            f"{origin}\n  missing: {_shown(missing)}\n  unexpected:"
            f" {_shown(unexpected)}\n  of another shape: {_shown(misshaped)}\n{remedy}"
        )


def _open(
    path: Path, architecture: Architecture
) -> tuple[tuple[Key, ...], Mapping[str, _Stored]]:
    """The key table and the checked tensors of a folder or file."""
    tensors: Mapping[str, _Stored]
    if _is_gguf(path):
        keys = _keys(GGUF_KEYS, architecture)
        tensors = gguf_file.read_header(path).tensors
    else:
        keys = _keys(KEYS[architecture.family], architecture)
        tensors = safetensors_file.read_folder(path)
    _check_table(
        _stored_shapes(keys, architecture),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        _HARMLESS + _HARMLESS_WHEN_TIED * architecture.tied,
        f"{path}: the tensors are not those of a {architecture.family} decoder with"
        f" {architecture.layers} layers.",
        "Nothing was loaded. Check that the weights and the architecture are of one"
        " model.",
    )
    return keys, tensors


def _bounds(
    index: tuple[slice, ...] | None, shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    parts = index or (slice(None),) * len(shape)
    return tuple(
        part.indices(size)[:2] for part, size in zip(parts, shape, strict=True)
    )


def _slices(bounds: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)


def _pages(shape: list[int], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """An array in pages of its own, which go back to the system when it is dropped.

    What malloc gets back it keeps, up to 32 MB a piece. Not at a page's start, where
    JAX on CPU would take the array as it is: an update could not be given its memory,
    and the first would need the parameters twice.
    """
    count = math.prod(shape)
    pages = mmap.mmap(-1, (count + 1) * dtype.itemsize)
    return np.frombuffer(pages, dtype, count, offset=dtype.itemsize).reshape(shape)


def _leaf(
    key: Key,
    tensors: Mapping[str, _Stored],
    architecture: Architecture,
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> Shaped[Array, "..."]:
    """One parameter; the host holds this process's part, each tensor read once."""
    shape = _leaf_shape(key, architecture)
    sizes = _sizes(architecture)
    indices = sharding.addressable_devices_indices_map(shape)
    shards = {
        bounds: _pages([stop - start for start, stop in bounds], dtype)
        for bounds in {_bounds(index, shape) for index in indices.values()}
    }
    for layer in range(architecture.layers if key.stacked else 1):
        whole = tensors[key.name.format(layer=layer)].read()
        whole = _rearrange(whole, key.stored, key.ours, sizes)
        for bounds, shard in shards.items():
            if not key.stacked:
                shard[...] = whole[_slices(bounds)]
            elif bounds[0][0] <= layer < bounds[0][1]:
                shard[layer - bounds[0][0]] = whole[_slices(bounds[1:])]
    placed = []
    for bounds in list(shards):
        # Let go of before the next is placed: where devices are the host's own memory
        # it would hold the leaf twice.
        shard = shards.pop(bounds)
        for device, index in indices.items():
            if _bounds(index, shape) == bounds:
                there = jax.sharding.SingleDeviceSharding(
                    device, memory_kind=sharding.memory_kind
                )
                placed.append(jax.device_put(shard, there).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from _flat(child, f"{prefix}{name}/")
        else:
            yield prefix + name, child


def check(path: Path, architecture: Architecture) -> None:
    """Refuses what ``load`` would refuse by names and shapes, before anything is made.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.

    Raises:
        ValueError: As ``load``.
    """
    _open(path, architecture)


def load(
    path: Path,
    architecture: Architecture,
    *,
    dtype_of: Callable[[str], DTypeLike],
    sharding_of: Callable[[str], jax.sharding.Sharding],
) -> dict[str, Any]:
    """The decoder's parameters, leaf by leaf, each part on its device.

    All names and shapes are checked before anything is read.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.
        dtype_of: From a leaf's path, such as ``blocks/attention/query``, whatever the
            file's.
        sharding_of: From a leaf's path.

    Returns:
        Nested dict; leaves of blocks are stacked on a leading L axis.

    Raises:
        ValueError: A cut or broken file, or tensors missing, unexpected or of another
            shape; all three lists are in the message.
    """
    keys, tensors = _open(path, architecture)
    leaves = {}
    for key in keys:
        dtype, placed = np.dtype(dtype_of(key.path)), sharding_of(key.path)
        leaves[key.path] = _leaf(key, tensors, architecture, dtype, placed)
    return _nested(leaves)


def digest(path: Path) -> str:
    """SHA-256, in hex, of the weight files' names and bytes."""
    state = hashlib.sha256()
    for file in [path] if _is_gguf(path) else safetensors_file.files(path):
        state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_READ_BYTES):
                state.update(block)
    return state.hexdigest()


def save(
    folder: Path,
    params: dict[str, Any],
    architecture: Architecture,
    *,
    dtype: DTypeLike,
    shard_bytes: int,
) -> None:
    """Writes a Hugging Face folder: safetensors and ``config.json``.

    Tensor by tensor, into a temporary folder that takes the name when it is whole.
    ``load`` of the result in the same dtype gives the same bits.

    Args:
        folder: Where to; must not exist, or be empty.
        params: As ``load`` returns them; every leaf within reach of this process.
        architecture: Of the parameters.
        dtype: Of the stored elements: float32, float16 or bfloat16.
        shard_bytes: Above this the weights are spread over several files.

    Raises:
        ValueError: The folder holds something, the parameters are not those of the
            architecture, or the dtype is another.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} must be new or empty. Choose another folder.")
    keys = _keys(KEYS[architecture.family], architecture)
    sizes, leaves = _sizes(architecture), dict(_flat(params))
    _check_table(
        {key.path: _leaf_shape(key, architecture) for key in keys},
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        (),
        f"{folder}: the parameters are not those of a {architecture.family} decoder"
        f" with {architecture.layers} layers.",
        "Nothing was saved.",
    )
    origin = {
        key.name.format(layer=layer): (key, layer)
        for key in keys
        for layer in range(architecture.layers if key.stacked else 1)
    }

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        key, layer = origin[name]
        leaf = leaves[key.path]
        ours = np.asarray(leaf[layer] if key.stacked else leaf)
        return _rearrange(ours, key.ours, key.stored, sizes)

    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        config = architectures.hf_config(architecture)
        config["dtype"] = config["torch_dtype"] = str(np.dtype(dtype))
        (partial / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        safetensors_file.write_folder(
            partial,
            _stored_shapes(keys, architecture),
            read,
            dtype=np.dtype(dtype),
            shard_bytes=shard_bytes,
        )
        partial.chmod(0o755)  # mkdtemp's folder is the owner's alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
