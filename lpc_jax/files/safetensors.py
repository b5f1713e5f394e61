"""Reads and writes named tensors of a Hugging Face folder, one in memory at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from huggingface_hub import split_state_dict_into_shards_factory
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_NAMES = {
    np.dtype(np.float32): "F32",
    np.dtype(np.float16): "F16",
    np.dtype(ml_dtypes.bfloat16): "BF16",
}
# The bytes that hold a header's length; the header is JSON, and raw bytes follow it.
_LENGTH_BYTES = 8
# Names of a hundred thousand tensors take a tenth of it.
_LARGEST_INDEX = 100_000_000
_CONVERT = (
    "Pickled weights are not read, because a pickle can run code: convert them with"
    " transformers' save_pretrained. A GGUF file is named itself, not its folder."
)
# What else weights come in, by the first bytes, and what to do.
_OTHER_FORMATS = {
    b"version ": "a Git LFS pointer to one. Fetch it: git lfs pull",
    b"PK\x03\x04": f"a zip archive, as torch.save writes it. {_CONVERT}",
    b"GGUF": f"a GGUF file. {_CONVERT}",
    **{bytes([0x80, n]): f"a pickle. {_CONVERT}" for n in range(2, 6)},
}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of one file, by name, with its shape as stored."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def read(self) -> Shaped[np.ndarray, "..."]:
        """Its values, as stored."""
        with _opened(self.path) as file:
            return file.get_tensor(self.name)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Reads rather than maps, since mapped pages count as this process's memory."""
    try:
        with safe_open(path, framework="np", backend="pread") as file:
            yield file
    except SafetensorError as e:
        with path.open("rb") as other:
            start = other.read(_LENGTH_BYTES)
        for prefix, got in _OTHER_FORMATS.items():
            if start.startswith(prefix):
                message = f"{path}: expected a safetensors file, got {got}"
                raise UserError(message) from e
        raise UserError(
            f"{path}: broken or truncated safetensors file ({untrusted.shown(e)})."
            " Download it again."
        ) from e


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file; no data is read. ``UserError`` if one is quantised."""
    tensors = {}
    with _opened(path) as file:
        for name in file.keys():  # noqa: SIM118 -- not a dict
            entry = file.get_slice(name)
            kind = entry.get_dtype()
            if kind not in _NAMES.values():
                raise UserError(
                    f"{path}: {untrusted.shown(name)} must be of type BF16, F16, F32,"
                    f" got {kind}. Use the model's unquantised weights."
                )
            tensors[name] = Tensor(path, name, tuple(entry.get_shape()))
    return tensors


def files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder; ``UserError`` if one is missing."""
    single = untrusted.own_file(folder, SINGLE)
    if single is not None:
        return [single]
    index = untrusted.own_file(folder, INDEX)
    if index is None:
        patterns = ("*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors")
        others = sorted(file.name for p in patterns for file in folder.glob(p))
        raise UserError(
            f"{folder} must hold {SINGLE} or {INDEX}, got {others or 'no weights'}."
            f" {_CONVERT}"
        )
    weight_map = untrusted.read_object(index, most=_LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UserError(
            f"{index}: weight_map must say the file of each tensor. Download it again."
        )
    names = sorted(set(weight_map.values()))
    shards = [file for name in names if (file := untrusted.own_file(folder, name))]
    if len(shards) < len(names) or not shards:
        missing = sorted(set(names) - {shard.name for shard in shards})
        raise UserError(
            f"{index}: expected {len(names)} shards, missing"
            f" {untrusted.shown(missing)}. Download them again."
        )
    return shards


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder; ``UserError`` if one is in two shards."""
    tensors: dict[str, Tensor] = {}
    for file in files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise UserError(
                    f"{file}: {untrusted.shown(name)} is in"
                    f" {tensors[name].path.name} too. Download the folder again."
                )
            tensors[name] = tensor
    return tensors


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Shaped[np.ndarray, "..."]],
    *,
    dtype_of: Callable[[str], np.dtype],
    shard_bytes: int,
) -> None:
    """Writes tensors in Hugging Face's layout, one in memory at a time.

    The safetensors library would hold a whole file. Tensors are written in the order of
    ``shapes``, as float32, float16 or bfloat16 (else ``UserError``). Above
    ``shard_bytes`` they are spread over shards with an index.
    """
    dtypes = {name: dtype_of(name) for name in shapes}
    for dtype in set(dtypes.values()) - set(_NAMES):
        raise UserError(
            f"dtype must be one of {sorted(str(d) for d in _NAMES)}, got {dtype}."
        )
    sizes = {n: math.prod(s) * dtypes[n].itemsize for n, s in shapes.items()}
    split = split_state_dict_into_shards_factory(
        sizes,
        get_storage_size=lambda size: size,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=shard_bytes,
    )
    for file, names in split.filename_to_tensors.items():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            span = [end, end := end + sizes[name]]
            kind, shape = _NAMES[dtypes[name]], list(shapes[name])
            header[name] = {"dtype": kind, "shape": shape, "data_offsets": span}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _LENGTH_BYTES)  # data starts aligned
        with (folder / file).open("wb") as out:
            out.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
            for name in names:
                out.write(_cast(read(name), dtypes[name], name).tobytes())
    if split.is_sharded:
        files = dict(sorted(split.tensor_to_filename.items()))
        index = {"metadata": split.metadata, "weight_map": files}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _cast(
    tensor: Shaped[np.ndarray, "..."], dtype: np.dtype, name: str
) -> Shaped[np.ndarray, "..."]:
    with np.errstate(over="ignore"):  # told below
        cast = np.ascontiguousarray(tensor, dtype)
    if dtype == np.float16 and np.isinf(cast).any() and not np.isinf(tensor).any():
        raise UserError(
            f"{name} must have elements that float16 can hold, up to"
            f" {np.finfo(dtype).max:g}, got larger ones. Choose bfloat16 or float32."
        )
    return cast
