"""GGUF files: metadata, architecture, and named tensors that dequantise when read.

The header is parsed here rather than by ``gguf.GGUFReader``, which takes seconds over
the tokenizer's arrays and cannot tell how many bytes a cut file lacks; block formats
are the gguf package's. Knows nothing of tokenizers or of our parameter tree.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from jaxtyping import Float, Float32

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted
from lpc_jax.models.architectures import (
    LARGEST_SIZE,
    MOST_LAYERS,
    Architecture,
    RopeScaling,
    head_width,
    positive,
    size,
)
from lpc_jax.models.decoder import rope_frequencies

FAMILY = "llama"
ROPE_FACTORS = "rope_freqs.weight"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_LENGTH = struct.Struct("<Q")
_DEFAULT_ALIGNMENT = 32
# GGML's GGML_MAX_DIMS; and an alignment is a power of two, 32 in practice.
_MOST_AXES, _LARGEST_ALIGNMENT = 4, 1 << 16
_DEFAULT_THETA = 10_000.0
_SCALARS = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
# Llama 3.1's and 3.2's stretch (their config.json); only the factor differs. A file
# holds the resulting factor of each frequency, from which these cannot be told.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_length": 8192}
_ROPE_TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on disk, and how it is quantised.

    Attributes:
        path: The file.
        kind: Its block format.
        shape: In NumPy's order, the reverse of the file's.
        offset: Its first byte in the file.
    """

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int

    @property
    def bytes(self) -> int:
        """Its size on disk."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.kind]
        return math.prod(self.shape) // block * block_bytes

    def read(self) -> Float32[np.ndarray, "..."]:
        """Its values.

        Raises:
            UserError: A block format that the gguf package cannot read.
        """
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.bytes,))
        rows = np.asarray(raw).reshape(*self.shape[:-1], -1)
        try:
            return gguf.dequantize(rows, self.kind)
        except NotImplementedError as e:
            raise UserError(
                f"{self.path}: block format {self.kind.name} cannot be dequantised by"
                f" the gguf package ({untrusted.shown(e)}). Use a Q4_1, Q8_0, F16 or"
                " F32 file."
            ) from e


def _check_size(path: Path, expected: int, actual: int) -> None:
    if actual < expected:
        raise UserError(
            f"{path}: truncated GGUF file: expected at least {expected} bytes, got"
            f" {actual}. Download it again."
        )


class _Cursor:
    """Reads a header's values one after the other."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.offset = path, data, 0

    def take(self, size: int) -> bytes:
        _check_size(self.path, self.offset + size, len(self.data))
        self.offset += size
        return self.data[self.offset - size : self.offset]

    def skip(self, size: int) -> None:
        _check_size(self.path, self.offset + size, len(self.data))
        self.offset += size

    def number(self, code: str) -> Any:
        (value,) = struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))
        return value

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="replace")

    def skip_texts(self, count: int) -> None:
        """One tight loop, because a vocabulary is long."""
        end, size = self.offset, len(self.data)
        for _ in range(count):
            if end + _LENGTH.size > size:
                end += _LENGTH.size
                break
            end += _LENGTH.size + _LENGTH.unpack_from(self.data, end)[0]
        self.skip(end - self.offset)

    def value(self, kind: int) -> Any:
        """A metadata value; None for an array, which no architecture field is."""
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.FLOAT32:
            # 1e-5 in float32 is 9.99999974e-06; the shortest decimal is what was meant.
            return float(str(np.float32(self.number("f"))))
        if kind in _SCALARS:
            return self.number(_SCALARS[GGUFValueType(kind)])
        if kind != GGUFValueType.ARRAY:
            raise UserError(
                f"{self.path}: broken GGUF header: {kind} is no value type. Download"
                " it again."
            )
        item, count = self.number("I"), self.number("Q")
        if item in _SCALARS:
            self.skip(count * struct.calcsize("<" + _SCALARS[GGUFValueType(item)]))
        elif item == GGUFValueType.STRING:
            self.skip_texts(count)
        else:  # lists of lists, which no model has and which could nest without end
            raise UserError(
                f"{self.path}: broken GGUF header: expected lists of numbers or texts,"
                f" got value type {item}. Download it again."
            )
        return None


@dataclasses.dataclass(frozen=True)
class File:
    """A GGUF file's header.

    Attributes:
        path: The file.
        metadata: Key to value; None where the value is an array.
        tensors: By name.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


def read_header(path: Path) -> File:
    """Metadata and tensors of a file; no tensor's data is read.

    Raises:
        UserError: Not a little-endian GGUF file of version 2 or 3, one of several
            splits, cut, or broken.
    """
    _check_size(path, len(_MAGIC), path.stat().st_size)
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        cursor = _Cursor(path, data)
        magic, version = cursor.take(len(_MAGIC)), cursor.number("I")
        if magic != _MAGIC or version not in _VERSIONS:
            raise UserError(
                f"{path}: expected a little-endian GGUF file of version 2 or 3, got"
                f" magic {magic!r} and version {version}. Download it again."
            )
        tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
        metadata = {}
        for _ in range(metadata_count):
            name = cursor.text()
            metadata[name] = cursor.value(cursor.number("I"))
        entries = []
        for _ in range(tensor_count):
            name, axes = cursor.text(), cursor.number("I")
            if axes > _MOST_AXES:
                raise UserError(
                    f"{path}: broken GGUF header: {untrusted.shown(name)} must"
                    f" have at most {_MOST_AXES} axes, got {axes}. Download it again."
                )
            shape = tuple(cursor.number("Q") for _ in range(axes))[::-1]
            entries.append((name, shape, cursor.number("I"), cursor.number("Q")))
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        size(alignment, "general.alignment", str(path), most=_LARGEST_ALIGNMENT)
        start = -(-cursor.offset // alignment) * alignment
        held = len(data)
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path}: expected one file, got one of"
            f" {untrusted.shown(metadata['split.count'])} splits. Join them:"
            " llama-gguf-split --merge FIRST_FILE OUTPUT_FILE"
        )
    tensors = {}
    for name, shape, kind, offset in entries:
        shown = untrusted.shown(name)
        try:
            block = GGMLQuantizationType(kind)
        except ValueError as e:
            raise UserError(
                f"{path}: {shown} has block format {kind}, unknown to the gguf package."
                " Use a Q4_1, Q8_0, F16 or F32 file."
            ) from e
        if name in tensors:
            raise UserError(
                f"{path}: broken GGUF header: {shown} is there twice. Download it"
                " again."
            )
        if (shape or (1,))[-1] % gguf.GGML_QUANT_SIZES[block][0]:
            raise UserError(
                f"{path}: broken GGUF header: {shown} of shape {list(shape)} does"
                f" not divide into blocks of {block.name}. Download it again."
            )
        tensors[name] = Tensor(path, block, shape, start + offset)
    end = max((t.offset + t.bytes for t in tensors.values()), default=start)
    _check_size(path, end, held)
    return File(path, metadata, tensors)


def _llama3_scaling(
    plain: Architecture, factors: Float[np.ndarray, " half_H"], path: Path
) -> RopeScaling:
    """The Llama 3.1 stretch whose factors a file carries."""
    scaling = RopeScaling(kind="llama3", factor=float(factors.max()), **_LLAMA3)
    stretched = dataclasses.replace(plain, rope_scaling=scaling)
    expected = rope_frequencies(plain) / rope_frequencies(stretched)
    if expected.shape != factors.shape or not np.allclose(
        expected, factors, rtol=_ROPE_TOLERANCE
    ):
        raise UserError(
            f"{path}: {ROPE_FACTORS} must be Llama 3.1's stretch by some factor with"
            f" {_LLAMA3}, got factors from {factors.min():g} to {factors.max():g} of"
            " another rule. Use the model's safetensors folder."
        )
    return scaling


def _number(file: File, key: str, default: int | float | None = None) -> Any:
    value = file.metadata.get(f"{FAMILY}.{key}", default)
    if value is None:
        raise UserError(
            f"{file.path}: {FAMILY}.{key} must be one number, got none or a list."
        )
    return value


def _size(
    file: File, key: str, default: int | None = None, *, most: int = LARGEST_SIZE
) -> int:
    value = _number(file, key, default)
    return size(value, f"{FAMILY}.{key}", str(file.path), most=most)


def _positive(file: File, key: str, default: float | None = None) -> float:
    value = _number(file, key, default)
    return positive(value, f"{FAMILY}.{key}", str(file.path))


def _scaling(file: File, plain: Architecture) -> RopeScaling | None:
    kind = file.metadata.get(f"{FAMILY}.rope.scaling.type", "none")
    if ROPE_FACTORS in file.tensors and kind == "none":
        factors = file.tensors[ROPE_FACTORS].read()
        return _llama3_scaling(plain, factors, file.path)
    if kind == "linear" and ROPE_FACTORS not in file.tensors:
        return RopeScaling(kind="linear", factor=_positive(file, "rope.scaling.factor"))
    if kind != "none":
        raise UserError(
            f"{file.path}: {FAMILY}.rope.scaling.type must be none, or linear without"
            f" {ROPE_FACTORS}, got {kind!r:.80}. This scaling is not implemented."
        )
    return None


def architecture(file: File) -> Architecture:
    """The architecture that a file's metadata describes.

    Raises:
        UserError: Another family than llama, a field missing, or a variant that the
            decoder does not compute, by name.
    """
    path, metadata = file.path, file.metadata
    name = metadata.get("general.architecture")
    if name != FAMILY:
        raise UserError(
            f"{path}: general.architecture must be {FAMILY!r}, got {name!r:.80}. Other"
            " families are not implemented."
        )

    width = _size(file, "embedding_length")
    heads = _size(file, "attention.head_count")
    kv_heads = _size(file, "attention.head_count_kv", heads)
    if heads % kv_heads:
        raise UserError(
            f"{path}: {FAMILY}.attention.head_count = {heads} must be a multiple of"
            f" {FAMILY}.attention.head_count_kv = {kv_heads}. Download it again."
        )
    key_length = f"{FAMILY}.attention.key_length"
    width_of_head = head_width(
        metadata.get(key_length),
        width=width,
        heads=heads,
        name=key_length,
        origin=str(path),
    )
    # Fields of variants that the decoder does not compute, with the plain value.
    for key, expected in {
        "expert_count": 0,
        "rope.dimension_count": width_of_head,
        "attention.value_length": width_of_head,
    }.items():
        got = metadata.get(f"{FAMILY}.{key}", expected)
        if got != expected:
            raise UserError(
                f"{path}: {FAMILY}.{key} must be {expected}, got {got!r:.80}. The"
                " decoder does not compute this variant."
            )
    if "token_embd.weight" not in file.tensors:
        raise UserError(f"{path}: expected token_embd.weight among the tensors.")
    window = metadata.get(f"{FAMILY}.attention.sliding_window")
    if window is not None:
        window = _size(file, "attention.sliding_window")
    plain = Architecture(
        family="llama" if window is None else "mistral",
        vocabulary=size(
            next(iter(file.tensors["token_embd.weight"].shape), 0),
            "the vocabulary of token_embd.weight",
            str(path),
        ),
        width=width,
        layers=_size(file, "block_count", most=MOST_LAYERS),
        query_heads=heads,
        kv_heads=kv_heads,
        head_width=width_of_head,
        mlp_width=_size(file, "feed_forward_length"),
        norm_epsilon=_positive(file, "attention.layer_norm_rms_epsilon"),
        rope_theta=_positive(file, "rope.freq_base", _DEFAULT_THETA),
        rope_scaling=None,
        sliding_window=window,
        tied="output.weight" not in file.tensors,
        context_length=_size(file, "context_length"),
    )
    return dataclasses.replace(plain, rope_scaling=_scaling(file, plain))
