"""A policy's weights: Hugging Face safetensors and GGUF in, safetensors out.

One table says where each of our parameters is in each format. Leaves are made one at
a time, under the sharding that the caller asks for. Knows nothing of policies or
meshes, nor of what a latent computes.
"""

from __future__ import annotations

import contextlib
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

from lpc_jax.errors import UserError
from lpc_jax.files import gguf, safetensors, sources, untrusted
from lpc_jax.models import architectures, gguf_config
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


_Tensor = safetensors.Tensor | gguf.Tensor


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


def _mlp_keys(name: str, inputs: str) -> tuple[Key, ...]:
    axes = {
        "input_mean": inputs,
        "input_spread": inputs,
        "hidden_kernel": f"{inputs} W",
        "hidden_bias": "W",
        "output_kernel": "W C",
        "output_bias": "C",
    }
    return tuple(
        Key(f"{name}/{leaf}", f"{_LATENT}{name}.{leaf}", a, a)
        for leaf, a in axes.items()
    )


# Of an exported LPC folder, beside the decoder's; always fp32.
_LATENT = "latent."
LATENT_KEYS = (
    Key("codebook", _LATENT + "codebook", "C D", "C D"),
    *_mlp_keys("prior_mlp", "D"),
    *_mlp_keys("posterior_mlp", "X"),
)

# Tensors that hold nothing a decoder does not know, and that may be there or not.
_HARMLESS = ("*rotary_emb.inv_freq", gguf_config.ROPE_FACTORS)
_HARMLESS_WHEN_TIED = ("lm_head.weight",)


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """What the tensors of a latent are as large as, beside the decoder's width.

    Attributes:
        num_codes: C.
        hidden_width: W, the hidden width of prior and posterior.
        posterior_inputs: X, how many numbers the posterior reads.
    """

    num_codes: int
    hidden_width: int
    posterior_inputs: int


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == _GGUF


def find(path: str, *, setting: str, revision: str | None) -> Path:
    """The folder or GGUF file that a setting names, downloaded if need be.

    Args:
        path: A local path, ``package:NAME/FILE`` or a hub model id.
        setting: The setting's name in the user's words, for messages.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: In one line, what is missing and how to get it.
    """
    return sources.resolve(
        path,
        setting=setting,
        revision=revision,
        patterns=_HUB_PATTERNS,
    )


def read_architecture(path: Path) -> Architecture:
    """The architecture of a Hugging Face folder or a GGUF file.

    Raises:
        UserError: Neither of the two, a broken file, or a model that the decoder
            does not compute.
    """
    if _is_gguf(path):
        return gguf_config.architecture(gguf.read(path))
    fields, config = _read_config(path)
    return architectures.from_hf_config(fields, str(config))


def read_latent_section(path: Path) -> dict[str, Any] | None:
    """What the ``config.json`` of an exported LPC folder says of its latent.

    Args:
        path: From ``find``; one that ``read_architecture`` has read.

    Returns:
        Its ``lpc`` section, not looked into; None for a plain model.

    Raises:
        UserError: There is no such section where there must be one.
    """
    if _is_gguf(path):
        return None
    fields, config = _read_config(path)
    if fields["architectures"][0] not in architectures.LPC_FAMILIES:
        return None
    section = fields.get("lpc")
    if not isinstance(section, dict):
        raise UserError(
            f"{config}: lpc must be an object with the settings of the latent, got"
            f" {untrusted.shown(section)}. Export the folder again."
        )
    return section


def _read_config(path: Path) -> tuple[dict[str, Any], Path]:
    config = untrusted.own_file(path, _CONFIG)
    if config is None:
        raise UserError(
            f"{path}: expected a folder with {_CONFIG}, or a file ending in {_GGUF}."
            " Check the path."
        )
    return untrusted.read_object(config, most=_LARGEST_CONFIG), config


def _sizes(
    architecture: Architecture, latent: LatentSizes | None = None
) -> dict[str, int]:
    of_latent = {}
    if latent is not None:
        of_latent = {
            "C": latent.num_codes,
            "W": latent.hidden_width,
            "X": latent.posterior_inputs,
        }
    return of_latent | {
        "L": architecture.layers,
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


def _leaf_shape(key: Key, sizes: Mapping[str, int]) -> tuple[int, ...]:
    layers = (sizes["L"],) if key.stacked else ()
    return layers + _shape(key.ours, sizes)


def _stored(
    keys: tuple[Key, ...], sizes: Mapping[str, int]
) -> dict[str, tuple[Key, int]]:
    """Name of every tensor that a file must hold, with its key and layer."""
    return {
        key.name.format(layer=layer): (key, layer)
        for key in keys
        for layer in range(sizes["L"] if key.stacked else 1)
    }


def _stored_shapes(
    keys: tuple[Key, ...], sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file must hold."""
    return {
        name: _shape(key.stored, sizes)
        for name, (key, _) in _stored(keys, sizes).items()
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
        raise UserError(
            f"{origin}\n  missing: {_shown(missing)}\n  unexpected:"
            f" {_shown(unexpected)}\n  of another shape: {_shown(misshaped)}\n{remedy}"
        )


def _with_codes(latent: LatentSizes | None) -> str:
    return f" and {latent.num_codes} codes" if latent else ""


def _open(
    path: Path, architecture: Architecture, latent: LatentSizes | None = None
) -> tuple[tuple[Key, ...], Mapping[str, _Tensor]]:
    """The decoder's key table and the checked tensors of a folder or file."""
    tensors: Mapping[str, _Tensor]
    if _is_gguf(path):
        keys = _keys(GGUF_KEYS, architecture)
        tensors = gguf.read(path).tensors
    else:
        keys = _keys(KEYS[architecture.family], architecture)
        tensors = safetensors.read_folder(path)
    remedy = "Check that the weights and the architecture are of one model."
    if latent is None and any(name.startswith(_LATENT) for name in tensors):
        remedy = (
            "It has LPC's codes, which only evaluation reads. To train from its"
            " decoder alone, export that with --plain."
        )
    of_latent = LATENT_KEYS if latent else ()
    _check_table(
        _stored_shapes(keys + of_latent, _sizes(architecture, latent)),
        {name: tuple(tensor.shape) for name, tensor in tensors.items()},
        _HARMLESS + _HARMLESS_WHEN_TIED * architecture.tied,
        f"{path}: the tensors are not those of a {architecture.family} decoder with"
        f" {architecture.layers} layers{_with_codes(latent)}.",
        f"Nothing was loaded. {remedy}",
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
    tensors: Mapping[str, _Tensor],
    sizes: Mapping[str, int],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> Shaped[Array, "..."]:
    """One parameter; the host holds this process's part, each tensor read once."""
    shape = _leaf_shape(key, sizes)
    indices = sharding.addressable_devices_indices_map(shape)
    shards = {
        bounds: _pages([stop - start for start, stop in bounds], dtype)
        for bounds in {_bounds(index, shape) for index in indices.values()}
    }
    for layer in range(sizes["L"] if key.stacked else 1):
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


def check(
    path: Path, architecture: Architecture, latent: LatentSizes | None = None
) -> None:
    """Refuses what ``load`` would refuse by names and shapes, before anything is made.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.
        latent: Of an exported LPC folder.

    Raises:
        UserError: As ``load``.
    """
    _open(path, architecture, latent)


def load(
    path: Path,
    architecture: Architecture,
    *,
    dtype_of: Callable[[str], DTypeLike],
    sharding_of: Callable[[str], jax.sharding.Sharding],
    latent: LatentSizes | None = None,
) -> dict[str, Any]:
    """The decoder's parameters, leaf by leaf, each part on its device.

    All names and shapes are checked before anything is read.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.
        dtype_of: From a leaf's path, such as ``blocks/attention/query``, whatever the
            file's.
        sharding_of: From a leaf's path.
        latent: Of an exported LPC folder, whose latent ``load_latent`` reads.

    Returns:
        Nested dict; leaves of blocks are stacked on a leading L axis.

    Raises:
        UserError: A cut or broken file, or tensors missing, unexpected or of another
            shape; all three lists are in the message.
    """
    keys, tensors = _open(path, architecture, latent)
    sizes = _sizes(architecture)
    leaves = {}
    for key in keys:
        dtype, placed = np.dtype(dtype_of(key.path)), sharding_of(key.path)
        leaves[key.path] = _leaf(key, tensors, sizes, dtype, placed)
    return _nested(leaves)


def load_latent(
    path: Path,
    architecture: Architecture,
    latent: LatentSizes,
    *,
    sharding_of: Callable[[str], jax.sharding.Sharding],
) -> dict[str, Any]:
    """The latent's parameters of an exported LPC folder, in fp32.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.
        latent: As the folder's config has them.
        sharding_of: From a leaf's path, such as ``prior_mlp/hidden_kernel``.

    Raises:
        UserError: As ``load``.
    """
    _, tensors = _open(path, architecture, latent)
    sizes, dtype = _sizes(architecture, latent), np.dtype(np.float32)
    return _nested(
        {
            key.path: _leaf(key, tensors, sizes, dtype, sharding_of(key.path))
            for key in LATENT_KEYS
        }
    )


def digest(path: Path) -> str:
    """SHA-256, in hex, of the weight files' names and bytes."""
    state = hashlib.sha256()
    for file in [path] if _is_gguf(path) else safetensors.files(path):
        state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            while block := opened.read(_READ_BYTES):
                state.update(block)
    return state.hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write, which takes the name when all is written.

    Args:
        folder: Where to; must not exist, or be empty.

    Raises:
        UserError: The folder holds something.
    """
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} must be new or empty. Choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp's folder is the owner's alone
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def save(
    folder: Path,
    params: dict[str, Any],
    architecture: Architecture,
    *,
    dtype: DTypeLike,
    shard_bytes: int,
) -> None:
    """Writes a Hugging Face folder of a decoder: safetensors and ``config.json``.

    Tensor by tensor, all or nothing. ``load`` of the result in the same dtype gives
    the same bits.

    Args:
        folder: Where to; must not exist, or be empty.
        params: As ``load`` returns them; every leaf within reach of this process.
        architecture: Of the parameters.
        dtype: Of the stored elements: float32, float16 or bfloat16.
        shard_bytes: Above this the weights are spread over several files.

    Raises:
        UserError: The folder holds something, the parameters are not those of the
            architecture, or the dtype is another.
    """
    with new_folder(folder) as partial:
        write(
            partial,
            params,
            None,
            architecture,
            config={},
            dtype=dtype,
            shard_bytes=shard_bytes,
        )


def _latent_sizes(latent: dict[str, Any]) -> LatentSizes:
    num_codes, _ = latent["codebook"].shape
    inputs, width = latent["posterior_mlp"]["hidden_kernel"].shape
    return LatentSizes(num_codes, width, inputs)


def write(
    folder: Path,
    decoder: dict[str, Any],
    latent: dict[str, Any] | None,
    architecture: Architecture,
    *,
    config: Mapping[str, Any],
    dtype: DTypeLike,
    shard_bytes: int,
) -> None:
    """Writes safetensors and ``config.json`` into a folder, as ``save`` does.

    Args:
        folder: From ``new_folder``.
        decoder: As ``load`` returns it; every leaf within reach of this process.
        latent: As ``load_latent`` returns it, or None; always stored in fp32.
        architecture: Of the decoder.
        config: More fields of ``config.json``, which replace those of one name.
        dtype: Of the decoder's stored elements: float32, float16 or bfloat16.
        shard_bytes: Above this the weights are spread over several files.

    Raises:
        UserError: As ``save``, and for elements too large for float16.
    """
    keys = _keys(KEYS[architecture.family], architecture)
    sizes, leaves = _sizes(architecture), dict(_flat(decoder))
    _check_table(
        {key.path: _leaf_shape(key, sizes) for key in keys},
        {path: tuple(leaf.shape) for path, leaf in leaves.items()},
        (),
        f"the parameters are not those of a {architecture.family} decoder with"
        f" {architecture.layers} layers.",
        "Nothing was saved.",
    )
    origin = {
        name: (key, leaves[key.path], layer)
        for name, (key, layer) in _stored(keys, sizes).items()
    }
    if latent is not None:
        sizes = _sizes(architecture, _latent_sizes(latent))
        of_latent = dict(_flat(latent))
        origin |= {
            name: (key, of_latent[key.path], 0)
            for name, (key, _) in _stored(LATENT_KEYS, sizes).items()
        }

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        key, leaf, layer = origin[name]
        ours = np.asarray(leaf[layer] if key.stacked else leaf)
        return _rearrange(ours, key.ours, key.stored, sizes)

    def dtype_of(name: str) -> np.dtype:
        return np.dtype(np.float32 if name.startswith(_LATENT) else dtype)

    fields = architectures.hf_config(architecture)
    fields["dtype"] = fields["torch_dtype"] = str(np.dtype(dtype))
    text = json.dumps(fields | dict(config), indent=2)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    safetensors.write_folder(
        folder,
        {name: _shape(key.stored, sizes) for name, (key, _, _) in origin.items()},
        read,
        dtype_of=dtype_of,
        shard_bytes=shard_bytes,
    )
