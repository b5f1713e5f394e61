"""A policy's weights: Hugging Face safetensors and GGUF in, safetensors out.

``leaves.py`` says where each parameter is in each format. They are made one at a time,
under the sharding that the caller asks for.
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

from lpc_jax import sharding as shardings
from lpc_jax import sources, untrusted
from lpc_jax.errors import UserError
from lpc_jax.models import gguf_file, hf_config, leaves, safetensors_file
from lpc_jax.models.architectures import LPC_FAMILIES, Architecture
from lpc_jax.models.leaves import Format, Leaf

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

# Tensors that hold nothing a decoder does not know, and that may be there or not.
_HARMLESS = ("*rotary_emb.inv_freq", gguf_file.ROPE_FACTORS)
_HARMLESS_WHEN_TIED = ("lm_head.weight",)

_Tensor = safetensors_file.Tensor | gguf_file.Tensor
_Bounds = tuple[tuple[int, int], ...]


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
        UserError: In one line, what is missing and how to get it.
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
        UserError: Neither of the two, a broken file, or a model that the decoder
            does not compute.
    """
    if _is_gguf(path):
        return gguf_file.architecture(gguf_file.read_header(path))
    fields, config = _read_config(path)
    return hf_config.read(fields, str(config))


def read_latent_section(path: Path) -> dict[str, Any] | None:
    """The ``lpc`` section of an exported folder's ``config.json``, not looked into.

    None for a plain model. Of a path that ``read_architecture`` has read.

    Raises:
        UserError: There is no such section where there must be one.
    """
    if _is_gguf(path):
        return None
    fields, config = _read_config(path)
    if fields["architectures"][0] not in LPC_FAMILIES:
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
    try:
        fields = untrusted.read_json(config, most=_LARGEST_CONFIG)
    except ValueError as e:
        raise UserError(
            f"{config}: broken JSON ({untrusted.shown(e)}). Download it again."
        ) from e
    if not isinstance(fields, dict):
        raise UserError(f"{config} must be a JSON object. Download it again.")
    return fields, config


def tensors(
    rows: tuple[Leaf, ...], form: Format, sizes: Mapping[str, int]
) -> dict[str, tuple[Leaf, int]]:
    """Name of every tensor that a file holds, with its row and layer."""
    return {
        getattr(leaf, form).format(layer=layer): (leaf, layer)
        for leaf in rows
        for layer in range(sizes["L"] if leaf.stacked else 1)
    }


def shapes(
    rows: tuple[Leaf, ...], form: Format, sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file holds."""
    return {
        name: leaves.shape(leaf.axes_in(form)[0], sizes)
        for name, (leaf, _) in tensors(rows, form, sizes).items()
    }


def _rearrange(
    x: Shaped[np.ndarray, "..."], before: str, after: str, sizes: Mapping[str, int]
) -> Shaped[np.ndarray, "..."]:
    used = {axis: sizes[axis] for axis in set(re.findall(r"\w+", before))}
    return einops.rearrange(x, f"{before} -> {after}", **used)


def _sizes(architecture: Architecture, latent: LatentSizes | None) -> dict[str, int]:
    if latent is None:
        return leaves.sizes(architecture)
    codes, width = latent.num_codes, latent.hidden_width
    return leaves.sizes(architecture, C=codes, W=width, X=latent.posterior_inputs)


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(map(untrusted.shown, items[:_SHOWN])) or "none") + more


def _require_same(
    expected: Mapping[str, tuple[int, ...]],
    got: Mapping[str, tuple[int, ...]],
    harmless: tuple[str, ...],
    origin: str,
    remedy: str,
) -> None:
    """Every expected name is there with its shape, and no other."""
    missing = [name for name in expected if name not in got]
    unexpected = [
        name
        for name in got
        if name not in expected
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
    ]
    misshaped = [
        f"{name} (expected {list(shape)}, got {list(got[name])})"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    if missing or unexpected or misshaped:
        raise UserError(
            f"{origin}\n  missing: {_listed(missing)}\n  unexpected:"
            f" {_listed(unexpected)}\n  of another shape: {_listed(misshaped)}\n"
            f"{remedy}"
        )


def check(
    path: Path, architecture: Architecture, latent: LatentSizes | None = None
) -> None:
    """Refuses what ``load`` would refuse by names and shapes; nothing is made.

    Raises:
        UserError: Tensors are missing, unexpected or of another shape.
    """
    _open(path, architecture, latent)


def _open(
    path: Path, architecture: Architecture, latent: LatentSizes | None
) -> tuple[Format, Mapping[str, _Tensor]]:
    """The format and the checked tensors of a folder or file."""
    form: Format = "gguf" if _is_gguf(path) else "hf"
    stored: Mapping[str, _Tensor]
    if form == "gguf":
        stored = gguf_file.read_header(path).tensors
    else:
        stored = safetensors_file.read_folder(path)
    remedy = "Check that the weights and the architecture are of one model."
    if latent is None and any(name.startswith("latent.") for name in stored):
        remedy = (
            "It has LPC's codes, which only evaluation reads. To train from its"
            " decoder alone, export that with --plain."
        )
    rows = leaves.decoder(architecture) + (leaves.LATENT if latent else ())
    with_codes = f" and {latent.num_codes} codes" if latent else ""
    _require_same(
        shapes(rows, form, _sizes(architecture, latent)),
        {name: tuple(tensor.shape) for name, tensor in stored.items()},
        _HARMLESS + _HARMLESS_WHEN_TIED * architecture.tied,
        f"{path}: the tensors are not those of a {architecture.family} decoder with"
        f" {architecture.layers} layers{with_codes}.",
        f"Nothing was loaded. {remedy}",
    )
    return form, stored


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
    form, stored = _open(path, architecture, latent)
    rows, sizes = leaves.decoder(architecture), _sizes(architecture, latent)
    return _read(rows, form, stored, sizes, dtype_of, sharding_of)


def load_latent(
    path: Path,
    architecture: Architecture,
    latent: LatentSizes,
    *,
    sharding_of: Callable[[str], jax.sharding.Sharding],
) -> dict[str, Any]:
    """The latent's parameters of an exported LPC folder, in fp32, as ``load`` does.

    Args:
        path: From ``find``.
        architecture: From ``read_architecture``.
        latent: As the folder's config has them.
        sharding_of: From a leaf's path, such as ``prior_mlp/hidden_kernel``.

    Raises:
        UserError: What ``load`` refuses.
    """
    form, stored = _open(path, architecture, latent)
    sizes = _sizes(architecture, latent)
    return _read(leaves.LATENT, form, stored, sizes, lambda _: np.float32, sharding_of)


def _read(
    rows: tuple[Leaf, ...],
    form: Format,
    stored: Mapping[str, _Tensor],
    sizes: Mapping[str, int],
    dtype_of: Callable[[str], DTypeLike],
    sharding_of: Callable[[str], jax.sharding.Sharding],
) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf in rows:
        node, (*folders, name) = tree, leaf.within.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        dtype, placed = np.dtype(dtype_of(leaf.within)), sharding_of(leaf.within)
        node[name] = _read_leaf(leaf, form, stored, sizes, dtype, placed)
    return tree


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> _Bounds:
    parts = index or (slice(None),) * len(shape)
    return tuple(
        part.indices(size)[:2] for part, size in zip(parts, shape, strict=True)
    )


def _slices(bounds: _Bounds) -> tuple[slice, ...]:
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


def _read_leaf(
    leaf: Leaf,
    form: Format,
    stored: Mapping[str, _Tensor],
    sizes: Mapping[str, int],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding,
) -> Shaped[Array, "..."]:
    """One parameter; the host holds this process's part, each tensor read once."""
    shape = leaves.shape(leaf.axes, sizes)
    indices = {
        device: _bounds(index, shape)
        for device, index in sharding.addressable_devices_indices_map(shape).items()
    }
    shards = {
        bounds: _pages([stop - start for start, stop in bounds], dtype)
        for bounds in set(indices.values())
    }
    for name, (_, layer) in tensors((leaf,), form, sizes).items():
        whole = _rearrange(stored[name].read(), *leaf.axes_in(form), sizes)
        for bounds, shard in shards.items():
            if not leaf.stacked:
                shard[...] = whole[_slices(bounds)]
            elif bounds[0][0] <= layer < bounds[0][1]:
                shard[layer - bounds[0][0]] = whole[_slices(bounds[1:])]
    placed = []
    for bounds in list(shards):
        # Let go of before the next is placed: where devices are the host's own memory
        # it would hold the leaf twice.
        shard = shards.pop(bounds)
        for device in (d for d, its in indices.items() if its == bounds):
            there = jax.sharding.SingleDeviceSharding(
                device, memory_kind=sharding.memory_kind
            )
            placed.append(jax.device_put(shard, there).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, sharding, placed)


def digest(path: Path) -> str:
    """SHA-256, in hex, of the weight files' names and bytes."""
    state = hashlib.sha256()
    for file in [path] if _is_gguf(path) else safetensors_file.files(path):
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
    the same bits. Arguments as those of ``write``.

    Raises:
        UserError: What ``new_folder`` and ``write`` refuse.
    """
    options: dict[str, Any] = {"dtype": dtype, "shard_bytes": shard_bytes}
    with new_folder(folder) as partial:
        write(partial, params, None, architecture, config={}, **options)


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
    """Writes safetensors and ``config.json`` into a folder, tensor by tensor.

    Args:
        folder: From ``new_folder``.
        decoder: As ``load`` returns it; every leaf within reach of this process.
        latent: As ``load_latent`` returns it, or None; always stored in fp32.
        architecture: Of the decoder.
        config: More fields of ``config.json``, which replace those of one name.
        dtype: Of the decoder's stored elements: float32, float16 or bfloat16.
        shard_bytes: Above this the weights are spread over several files.

    Raises:
        UserError: The parameters are not those of the architecture, another dtype, or
            elements too large for it.
    """
    rows = leaves.decoder(architecture)
    params = shardings.by_path({"decoder": decoder})
    sizes = _sizes(architecture, None)
    _require_same(
        {leaf.within: leaves.shape(leaf.axes, sizes) for leaf in rows},
        {path.partition("/")[2]: tuple(leaf.shape) for path, leaf in params.items()},
        (),
        f"the parameters are not those of a {architecture.family} decoder with"
        f" {architecture.layers} layers.",
        "Nothing was saved.",
    )
    if latent is not None:
        inputs, width = latent["posterior_mlp"]["hidden_kernel"].shape
        codes = LatentSizes(len(latent["codebook"]), width, inputs)
        rows, sizes = rows + leaves.LATENT, _sizes(architecture, codes)
        params |= shardings.by_path({"latent": latent})
    named = tensors(rows, "hf", sizes)

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        leaf, layer = named[name]
        stored, ours = leaf.axes_in("hf")
        whole = params[leaf.path]
        one = np.asarray(whole[layer] if leaf.stacked else whole)
        return _rearrange(one, ours, stored, sizes)

    def dtype_of(name: str) -> np.dtype:
        return np.dtype(dtype if named[name][0] in leaves.DECODER else np.float32)

    fields = hf_config.fields(architecture)
    fields["dtype"] = fields["torch_dtype"] = str(np.dtype(dtype))
    text = json.dumps(fields | dict(config), indent=2)
    (folder / _CONFIG).write_text(text + "\n", encoding="utf-8")
    safetensors_file.write_folder(
        folder,
        shapes(rows, "hf", sizes),
        read,
        dtype_of=dtype_of,
        shard_bytes=shard_bytes,
    )
