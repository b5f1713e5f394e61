"""Safetensors files as named, lazily read tensors, single or sharded; and their writer.

Reads the format itself (a little-endian length, a JSON header, raw bytes): slices stay
views of a memory map, bfloat16 included, and a cut file is told by its size before
anything is read. Knows nothing of what the tensors mean.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Shaped

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

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
# The format's own limit (MAX_HEADER_SIZE of the safetensors library).
_LONGEST_HEADER = 100_000_000
# Names of a hundred thousand tensors take a tenth of it.
_LARGEST_INDEX = 100_000_000
_MOST_AXES, _LARGEST_AXIS = 8, 1 << 48
# What else weights come in, by the first bytes; each reads as an impossible length.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive, as torch.save writes it",
    **{bytes([0x80, version]): "a pickle" for version in range(2, 6)},
    b"GGUF": "a GGUF file",
}


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


def _object(read: Callable[[], Any], path: Path, what: str) -> dict[str, Any]:
    try:
        parsed = read()
    except ValueError as e:  # JSON, UTF-8, or out of bounds
        raise UserError(
            f"{path}: broken {what} ({untrusted.shown(e)}). Download it again."
        ) from e
    if not isinstance(parsed, dict):
        raise UserError(f"{path}: {what} must be a JSON object. Download it again.")
    return parsed


def _check_length(path: Path, first: bytes) -> None:
    """Before so many bytes are read: whether this can be a header's length."""
    (length,) = _LENGTH.unpack(first)
    if length <= _LONGEST_HEADER:
        return
    kinds = [kind for start, kind in _OTHER_FORMATS.items() if first.startswith(start)]
    if kinds:
        raise UserError(
            f"{path}: expected a safetensors file, got {kinds[0]}. It is not read,"
            " because a pickle can run code: convert it with transformers'"
            " save_pretrained, and name a GGUF file itself."
        )
    raise UserError(
        f"{path}: broken safetensors header: at most {_LONGEST_HEADER:,} bytes long,"
        f" got {length:,}. Download it again."
    )


def _check_size(path: Path, expected: int, actual: int) -> None:
    if actual < expected:
        raise UserError(
            f"{path}: truncated safetensors file: expected {expected} bytes, got"
            f" {actual}. Download it again."
        )


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, by name; no data is read.

    Raises:
        UserError: The file is cut, its header broken, or an element type is not one
            of a language model's weights.
    """
    size = path.stat().st_size
    _check_size(path, _LENGTH.size, size)
    with path.open("rb") as file:
        first = file.read(_LENGTH.size)
        if first == _LFS_POINTER:
            raise UserError(
                f"{path}: expected a safetensors file, got a Git LFS pointer to one."
                " Fetch it: git lfs pull"
            )
        _check_length(path, first)
        (length,) = _LENGTH.unpack(first)
        start = _LENGTH.size + length
        _check_size(path, start, size)
        text = file.read(length)
    header = _object(lambda: untrusted.parse_json(text), path, "safetensors header")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        shown = untrusted.shown(name)
        try:
            kind, shape, first, last = _entry(entry)
        except (TypeError, KeyError, ValueError) as e:
            raise UserError(
                f"{path}: broken safetensors header: the entry of {shown} is"
                f" {untrusted.shown(entry)}. Download it again."
            ) from e
        if kind not in _DTYPES:
            raise UserError(
                f"{path}: {shown} must be of type {', '.join(sorted(_DTYPES))}, got"
                f" {untrusted.shown(kind)}. Use the model's unquantised weights."
            )
        dtype = _DTYPES[kind]
        expected = math.prod(shape) * dtype.itemsize
        if last - first != expected:
            raise UserError(
                f"{path}: broken safetensors header: {shown} of shape {list(shape)} and"
                f" type {kind} takes {expected} bytes, got {last - first}. Download it"
                " again."
            )
        tensors[name] = Tensor(path, dtype, shape, start + first)
        spans.append((first, last, shown))
    _check_size(path, start + max((last for _, last, _ in spans), default=0), size)
    end = 0
    for first, last, name in [*sorted(spans), (size - start, 0, "nothing more")]:
        if first != end:
            raise UserError(
                f"{path}: broken safetensors header: tensors must lie one after the"
                f" other and fill the file, got {name} at byte {first} after the"
                f" end of the one before at {end}. Download it again."
            )
        end = last
    return tensors


def _entry(entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, first and last byte, which are what they must be."""
    kind, shape = entry["dtype"], tuple(entry["shape"])
    first, last = entry["data_offsets"]
    numbers = (*shape, first, last)
    if (
        not isinstance(kind, str)
        or len(shape) > _MOST_AXES
        or any(type(number) is not int for number in numbers)
        or not all(0 <= number <= _LARGEST_AXIS for number in numbers)
        or first > last
    ):
        raise ValueError("not what the format has")
    return kind, shape, first, last


def files(folder: Path) -> list[Path]:
    """The weight files of a Hugging Face folder, sorted.

    Raises:
        UserError: There are none, or the index names one that is not there.
    """
    single = untrusted.own_file(folder, SINGLE)
    if single is not None:
        return [single]
    index = untrusted.own_file(folder, INDEX)
    if index is None:
        others = sorted(
            entry.name
            for pattern in ("*.bin", "*.pth", "*.pt", "*.gguf", "*.safetensors")
            for entry in folder.glob(pattern)
        )
        raise UserError(
            f"{folder} must hold {SINGLE} or {INDEX}, got {others or 'no weights'}."
            " Pickled weights are not read, because a pickle can run code: convert"
            " them with transformers' save_pretrained. A GGUF file is named itself,"
            " not its folder."
        )
    read = functools.partial(untrusted.read_json, index, most=_LARGEST_INDEX)
    weight_map = _object(read, index, "index").get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UserError(
            f"{index}: weight_map must say the file of each tensor. Download it again."
        )
    found = {
        name: untrusted.own_file(folder, name)
        for name in sorted(set(weight_map.values()))
    }
    missing = [name for name, shard in found.items() if shard is None]
    if missing or not found:
        raise UserError(
            f"{index}: expected {len(found)} shards, missing"
            f" {untrusted.shown(missing)}. Download them again."
        )
    return [shard for shard in found.values() if shard is not None]


def read_folder(folder: Path) -> dict[str, Tensor]:
    """The tensors of a Hugging Face folder, by name; no data is read.

    Raises:
        UserError: As ``files`` and ``read_header``; or one tensor is in two shards.
    """
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


def write_folder(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Shaped[np.ndarray, "..."]],
    *,
    dtype_of: Callable[[str], np.dtype],
    shard_bytes: int,
) -> None:
    """Writes tensors in Hugging Face's layout, one tensor in memory at a time.

    Args:
        folder: Where to; exists.
        shapes: Every tensor's name and shape, in the order to write.
        read: The tensor of a name, of that shape.
        dtype_of: Of the stored elements of a name: float32, float16 or bfloat16.
        shard_bytes: Above this, tensors are spread over shards with an index.

    Raises:
        UserError: A dtype that is not one of the three, or a tensor with elements
            too large for it.
    """
    dtypes = {name: dtype_of(name) for name in shapes}
    for dtype in dtypes.values():
        if dtype not in _NAMES:
            raise UserError(
                f"dtype must be one of {sorted(str(d) for d in _NAMES)}, got {dtype}."
            )
    sizes = {
        name: math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items()
    }
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
                "dtype": _NAMES[dtypes[name]],
                "shape": list(shapes[name]),
                "data_offsets": [end, end + sizes[name]],
            }
            end += sizes[name]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % _LENGTH.size)  # data starts aligned
        with (folder / file).open("wb") as out:
            out.write(_LENGTH.pack(len(text)) + text)
            for name in names:
                out.write(_cast(read(name), dtypes[name], name).tobytes())
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(sizes.values())},
            "weight_map": dict(sorted(weight_map.items())),
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
