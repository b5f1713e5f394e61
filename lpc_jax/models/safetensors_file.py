"""Safetensors files as named, lazily read tensors, single or sharded; and their writer.

Reads the format itself (a little-endian length, a JSON header, raw bytes): slices stay
views of a memory map, bfloat16 included, and a cut file is told by its size before
anything is read. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-{number:05d}-of-{count:05d}.safetensors"

_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH = struct.Struct("<Q")
_LFS_POINTER = b"version "


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on disk.

    Attributes:
        path: The file.
        dtype: Of its elements.
        shape: As stored.
        offset: Its first byte in the file.
    """

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int

    def read(self) -> Shaped[np.ndarray, "..."]:
        """A read-only view of the file: only what is used is read from disk."""
        return np.asarray(
            np.memmap(self.path, self.dtype, "r", self.offset, self.shape)
        )


def _read_json(text: bytes, path: Path, what: str) -> dict:
    try:
        parsed = json.loads(text)
    except ValueError as e:  # JSON or UTF-8
        raise ValueError(f"{path}: broken {what} ({e}). Download it again.") from e
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: {what} must be a JSON object. Download it again.")
    return parsed


def _check_size(path: Path, expected: int, actual: int) -> None:
    if actual < expected:
        raise ValueError(
            f"{path}: truncated safetensors file: expected {expected} bytes, got"
            f" {actual}. Download it again."
        )


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name; no data is read.

    Raises:
        ValueError: The file is cut, its header broken, or an element type is not one
            of a language model's weights.
    """
    size = path.stat().st_size
    _check_size(path, _LENGTH.size, size)
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
        if first == _LFS_POINTER:
            raise ValueError(
                f"{path}: expected a safetensors file, got a Git LFS pointer to one."
                " Fetch it: git lfs pull"
            )
        (length,) = _LENGTH.unpack(first)
        start = _LENGTH.size + length
        _check_size(path, start, size)
        header = _read_json(file.read(length), path, "safetensors header")
    header.pop("__metadata__", None)
    tensors, end = {}, start
    for name, entry in header.items():
        try:
            kind, shape = entry["dtype"], tuple(entry["shape"])
            first, last = entry["data_offsets"]
        except (TypeError, KeyError, ValueError) as e:
            raise ValueError(
                f"{path}: broken safetensors header: the entry of {name} is {entry}."
                " Download it again."
            ) from e
        if kind not in _DTYPES:
            raise ValueError(
                f"{path}: {name} must be of type {', '.join(sorted(_DTYPES))}, got"
                f" {kind}. Use the model's unquantised weights."
            )
        dtype = _DTYPES[kind]
        expected = math.prod(shape) * dtype.itemsize
        if last - first != expected:
            raise ValueError(
                f"{path}: broken safetensors header: {name} of shape {list(shape)} and"
                f" type {kind} takes {expected} bytes, got {last - first}. Download it"
                " again."
            )
        tensors[name] = Tensor(path, dtype, shape, start + first)
        end = max(end, start + last)
    _check_size(path, end, size)
    return tensors


def files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, sorted.

    Raises:
        ValueError: There are none, or the index names one that is not there.
    """
    if (folder / SINGLE).exists():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.exists():
        others = sorted(
            entry.name
            for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors")
            for entry in folder.glob(pattern)
        )
        raise ValueError(
            f"{folder} must hold {SINGLE} or {INDEX}, got {others or 'no weights'}."
            " Pickled weights are not read, because a pickle can run code: convert"
            " them with transformers' save_pretrained. A GGUF file is named itself,"
            " not its folder."
        )
    weight_map = _read_json(index.read_bytes(), index, "index").get("weight_map", {})
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.exists()]
    if missing or not shards:
        raise ValueError(
            f"{index}: expected {len(shards)} shards, missing {missing}. Download them"
            " again."
        )
    return shards


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, by name; no data is read.

    Raises:
        ValueError: As ``files`` and ``read_header``; or one tensor is in two shards.
    """
    tensors: dict[str, Tensor] = {}
    for file in files(folder):
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise ValueError(
                    f"{file}: {name} is in {tensors[name].path.name} too. Download the"
                    " folder again."
                )
            tensors[name] = tensor
    return tensors


def _plan(sizes: Mapping[str, int], shard_bytes: int) -> list[list[str]]:
    """Names in shards of at most ``shard_bytes``, or of one tensor above that."""
    shards: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Shaped[np.ndarray, "..."]],
    *,
    dtype: np.dtype,
    shard_bytes: int,
) -> None:
    """Writes tensors in Hugging Face's layout, one tensor in memory at a time.

    Args:
        folder: Where to; exists.
        shapes: Every tensor's name and shape, in the order to write.
        read: The tensor of a name, of that shape.
        dtype: Of the stored elements: float32, float16 or bfloat16.
        shard_bytes: Above this, tensors are spread over shards with an index.

    Raises:
        ValueError: A dtype that is not one of the three.
    """
    if dtype not in _NAMES:
        raise ValueError(
            f"dtype must be one of {sorted(str(d) for d in _NAMES)}, got {dtype}."
        )
    sizes = {name: math.prod(s) * dtype.itemsize for name, s in shapes.items()}
    shards = _plan(sizes, shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = SHARD.format(number=number, count=len(shards))
        file = SINGLE if len(shards) == 1 else file
        weight_map.update(dict.fromkeys(names, file))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shapes[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _LENGTH.size)  # data starts aligned
        with (folder / file).open("wb") as out:
            out.write(_LENGTH.pack(len(text)) + text)
            for name in names:
                out.write(np.ascontiguousarray(read(name), dtype).tobytes())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
