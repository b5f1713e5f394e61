"""A policy's weights: Hugging Face safetensors and GGUF in, safetensors out."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import einops
import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Shaped

from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.files import gguf, safetensors, sources, untrusted
from lpc_jax.models import gguf_config, hf_config, leaves, quantisation
from lpc_jax.models.architectures import LPC_FAMILIES, Architecture
from lpc_jax.models.leaves import Format, Leaf

_Tensors = Mapping[str, safetensors.Tensor | gguf.Tensor]
_Stored = tuple[Format, _Tensors, dict[str, int]]  # checked, with the axes' sizes

# Of a hub repository, without pickles and Mistral's second copy (consolidated.*).
_HUB_PATTERNS = ("*.json", "model*.safetensors", "tokenizer*", "*.jinja", "merges.txt")
_GGUF = ".gguf"
_SHOWN = 10

# Tensors that may be absent or present, since a decoder knows what they hold.
_HARMLESS = (
    "*rotary_emb.inv_freq",
    gguf_config.ROPE_FACTORS,
    *gguf_config.LONGROPE_FACTORS.values(),
)
_HEAD = "lm_head.weight"
_HARMLESS_WHEN_TIED = (_HEAD,)
_EMBEDDING = "model.embed_tokens.weight"
_TIE = (
    "If the head is the embedding, set tie_word_embeddings to true in config.json; else"
    " download the weights again."
)


@dataclasses.dataclass(frozen=True)
class LatentSizes:
    """Sizes of a latent; the posterior reads ``posterior_inputs`` numbers of a pair."""

    num_codes: int
    hidden_width: int
    posterior_inputs: int


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix == _GGUF


def find(path: str, *, setting: str, revision: str | None) -> Path:
    """The folder or GGUF file that a setting names, as ``sources.resolve`` finds it."""
    return sources.resolve(
        path, setting=setting, revision=revision, patterns=_HUB_PATTERNS
    )


def read_architecture(path: Path) -> Architecture:
    """The architecture of a Hugging Face folder or a GGUF file."""
    if _is_gguf(path):
        return gguf_config.architecture(gguf.read(path))
    fields, config = hf_config.open_folder(path)
    return hf_config.read(fields, str(config))


def read_latent_section(path: Path) -> dict[str, Any] | None:
    """An exported folder's latent settings, or a UserError; None for a plain model."""
    if _is_gguf(path):
        return None
    fields, config = hf_config.open_folder(path)
    if fields["architectures"][0] not in LPC_FAMILIES:
        return None
    section = fields.get("lpc")
    if not isinstance(section, dict):
        raise UserError(
            f"{config}: lpc must be an object with the settings of the latent, got"
            f" {untrusted.shown(section)}. Export the folder again."
        )
    return section


class Part(NamedTuple):
    """A row's values of one layer, if it has layers, and where a tensor holds them."""

    leaf: Leaf
    layer: int | None
    rows: slice  # of the tensor's first axis


def tensors(
    rows: tuple[Leaf, ...], form: Format, sizes: Mapping[str, int]
) -> dict[str, list[Part]]:
    """Name of every tensor that a file holds, with its parts in order: mostly one."""
    named: dict[str, list[Part]] = {}
    for leaf in rows:
        length = leaves.shape(leaf.axes_in(form)[0], sizes)[0]
        for layer in range(sizes["L"]) if leaf.stacked else (None,):
            parts = named.setdefault(getattr(leaf, form).format(layer=layer), [])
            start = parts[-1].rows.stop if parts else 0
            parts.append(Part(leaf, layer, slice(start, start + length)))
    return named


def shapes(
    rows: tuple[Leaf, ...], form: Format, sizes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a file holds."""
    return {
        name: (last.rows.stop, *leaves.shape(last.leaf.axes_in(form)[0], sizes)[1:])
        for name, (*_, last) in tensors(rows, form, sizes).items()
    }


def _rearrange(
    x: Shaped[np.ndarray, "..."], before: str, after: str, sizes: Mapping[str, int]
) -> Shaped[np.ndarray, "..."]:
    used = {axis: sizes[axis] for axis in set(re.findall(r"\w+", before))}
    return einops.rearrange(x, f"{before} -> {after}", **used)


def _listed(items: list[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return (", ".join(map(untrusted.shown, items[:_SHOWN])) or "none") + more


def _differences(
    expected: Mapping[str, tuple[int, ...]], stored: _Tensors, harmless: tuple[str, ...]
) -> str:
    """A line each for names missing, unexpected and misshapen; empty without any."""
    missing = [name for name in expected if name not in stored]
    unexpected = [
        name
        for name in stored
        if name not in expected
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in harmless)
    ]
    misshapen = [
        f"{name} (expected {list(shape)}, got {list(stored[name].shape)})"
        for name, shape in expected.items()
        if name in stored and tuple(stored[name].shape) != shape
    ]
    if not (missing or unexpected or misshapen):
        return ""
    return (
        f"  missing: {_listed(missing)}\n  unexpected: {_listed(unexpected)}\n"
        f"  of another shape: {_listed(misshapen)}\n"
    )


def check(
    path: Path, architecture: Architecture, latent: LatentSizes | None = None
) -> _Stored:
    """Refuses with a UserError what is no such decoder, by names, shapes and types."""
    if _is_gguf(path):
        form, stored = "gguf", gguf.read(path).tensors
    else:
        form, stored = "hf", safetensors.read_folder(path)
    rows, sizes = leaves.decoder(architecture), leaves.sizes(architecture)
    if latent is not None:
        rows += leaves.LATENT
        sizes |= {"C": latent.num_codes, "W": latent.hidden_width}
        sizes["X"] = latent.posterior_inputs
    harmless = _HARMLESS + _HARMLESS_WHEN_TIED * architecture.tied
    differences = _differences(shapes(rows, form, sizes), stored, harmless)
    if differences:
        with_codes = f" and {latent.num_codes} codes" if latent else ""
        remedy = "Check that the weights and the architecture are of one model."
        if f"missing: {_HEAD}\n" in differences:
            remedy = _TIE
        if latent is None and any(name.startswith("latent.") for name in stored):
            remedy = (
                "It has LPC's codes, which only evaluation reads. To train from its"
                " decoder alone, export that with --plain."
            )
        raise UserError(
            f"{path}: the tensors are not those of a {architecture.family} decoder with"
            f" {architecture.layers} layers{with_codes}.\n{differences}"
            f"Nothing was loaded. {remedy}"
        )
    if architecture.tied and _HEAD in stored:
        _require_tied(path, stored)
    return form, stored, sizes


def _require_tied(path: Path, stored: _Tensors) -> None:
    """Refuses a head beside the embedding that it is said to be, with other values.

    transformers 4 drops such a head, transformers 5 keeps it.
    """
    if np.array_equal(stored[_HEAD].read(), stored[_EMBEDDING].read()):
        return
    raise UserError(
        f"{path}: tie_word_embeddings is true, but {_HEAD} differs from"
        f" {_EMBEDDING}. Nothing was loaded. If the head is what was trained, set"
        " tie_word_embeddings to false in config.json; else remove it from the file."
    )


def load(
    path: Path,
    architecture: Architecture,
    *,
    dtype_of: Callable[[str], DTypeLike],
    sharding_of: Callable[[str], jax.sharding.Sharding],
    latent: LatentSizes | None = None,
    part: Literal["decoder", "latent"] = "decoder",
) -> dict[str, Any]:
    """A part's parameters as a nested dict, each read onto its device.

    All names and shapes are checked before anything is read. ``dtype_of`` and
    ``sharding_of`` take a path such as ``blocks/attention/query``; ``latent`` is of an
    exported LPC folder.
    """
    form, files, sizes = check(path, architecture, latent)
    rows = leaves.decoder(architecture) if part == "decoder" else leaves.LATENT
    tree: dict[str, Any] = {}
    named = tensors(rows, form, sizes)
    for leaf in rows:
        node, (*folders, name) = tree, leaf.within.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        parts = (
            (part.layer, _part_in(files[name].read(), part, form, sizes))
            for name, parts in named.items()
            for part in parts
            if part.leaf is leaf
        )
        dtype, scales = np.dtype(dtype_of(leaf.within)), []
        if dtype == np.int8:
            parts = _quantised(parts, leaf, scales)
        shape, where = leaves.shape(leaf.axes, sizes), sharding_of(leaf.within)
        node[name] = sharding.place_parts(parts, shape, dtype, where)
        if scales:
            its = leaves.at(f"{leaf.path}_scale")
            shape, where = leaves.shape(its.axes, sizes), sharding_of(its.within)
            scale = sharding.place_parts(scales, shape, np.dtype("float32"), where)
            node[f"{name}_scale"] = scale
    return tree


_Parts = Iterator[tuple[int | None, Shaped[np.ndarray, "..."]]]


def _quantised(
    parts: _Parts, leaf: Leaf, scales: list[tuple[int | None, np.ndarray]]
) -> _Parts:
    """The values of each part; its scales are appended to ``scales``."""
    for layer, part in parts:
        values, scale = quantisation.quantise(part, inputs=leaf.inputs)
        if not np.isfinite(scale).all():
            raise UserError(
                f"{leaf.path} must be finite to be kept in int8, got nan or inf in"
                f" layer {layer}. Check the weights, or use adapters.base 'compute'."
            )
        scales.append((layer, scale))
        yield layer, values


def _part_in(
    whole: Shaped[np.ndarray, "..."], part: Part, form: Format, sizes: Mapping[str, int]
) -> Shaped[np.ndarray, "..."]:
    theirs, ours = part.leaf.axes_in(form)
    return _rearrange(whole[part.rows], theirs, ours, sizes)


def digest(path: Path) -> str:
    """SHA-256, in hex, of the weight files' names and bytes."""
    state = hashlib.sha256()
    for file in [path] if _is_gguf(path) else safetensors.files(path):
        state.update(f"{file.name}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: state)
    return state.hexdigest()


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder, renamed once written; a UserError if the name holds files."""
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
    """Writes a decoder's Hugging Face folder, all or nothing; see ``write``."""
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
    """Writes safetensors and ``config.json`` into a ``new_folder``, tensor by tensor.

    ``decoder`` and ``latent`` are as ``load`` returns them;
    ``dtype`` is the decoder's (float32, float16 or bfloat16), the latent's is fp32.
    ``config`` adds or replaces fields; above ``shard_bytes`` weights take several
    files.
    """
    params = sharding.by_path({"decoder": decoder})
    rows, sizes = leaves.decoder(architecture), leaves.sizes(architecture)
    if latent is not None:
        params |= sharding.by_path({"latent": latent})
        inputs, hidden_width = latent["posterior_mlp"]["hidden_kernel"].shape
        rows += leaves.LATENT
        sizes |= {"C": len(latent["codebook"]), "W": hidden_width, "X": inputs}
    assert params.keys() == {leaf.path for leaf in rows}
    named = tensors(rows, "hf", sizes)

    def read(name: str) -> Shaped[np.ndarray, "..."]:
        parts = []
        for leaf, layer, _ in named[name]:
            stored, ours = leaf.axes_in("hf")
            whole = params[leaf.path]
            part = np.asarray(whole if layer is None else whole[layer])
            parts.append(_rearrange(part, ours, stored, sizes))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def dtype_of(name: str) -> np.dtype:
        of_decoder = named[name][0].leaf.path.startswith("decoder/")
        return np.dtype(dtype if of_decoder else np.float32)

    fields = hf_config.fields(architecture)
    fields["dtype"] = fields["torch_dtype"] = str(np.dtype(dtype))
    text = json.dumps(fields | dict(config), indent=2)
    (folder / hf_config.NAME).write_text(text + "\n", encoding="utf-8")
    safetensors.write_folder(
        folder,
        shapes(rows, "hf", sizes),
        read,
        dtype_of=dtype_of,
        shard_bytes=shard_bytes,
    )
