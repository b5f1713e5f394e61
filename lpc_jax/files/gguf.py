"""GGUF files: metadata, and named tensors that are dequantised when they are read.

The header and the block formats are the gguf package's.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from jaxtyping import Float32

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where a tensor lies on disk, and how it is quantised.

    Attributes:
        path: The file.
        kind: Its block format.
        shape: In NumPy's order, the reverse of the file's.
        offset: Its first byte in the file.
        bytes: Its size on disk.
    """

    path: Path
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes: int

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


@dataclasses.dataclass(frozen=True)
class File:
    """A GGUF file's metadata by key, and its tensors by name."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, Tensor]


class _BoundedReader(gguf.GGUFReader):
    """Refuses values beyond the file's end, which the package takes to be empty."""

    def _get(self, offset: int, dtype: Any, count: Any = 1, *order: Any, **more: Any):
        # Each slice of a memmap runs Python code: a tokenizer's would take three times
        # as long.
        self.data = np.asarray(self.data)
        values = super()._get(offset, dtype, count, *order, **more)
        if len(values) < count:
            raise ValueError("a value lies beyond the end of the file")
        return values


def read(path: Path) -> File:
    """Metadata and tensors of a file; no tensor's data is read.

    The last file read is kept, because parsing a tokenizer's arrays takes seconds.

    Raises:
        UserError: Not a GGUF file that the gguf package reads, cut, of another byte
            order, or one of several splits.
    """
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _read(path: Path, size: int, changed: int) -> File:
    """Size and time of the last change tell one content of a path from the next."""
    try:
        reader = _BoundedReader(path)
        if reader.byte_order != "I":
            raise ValueError("its byte order is not this machine's")
        metadata = {name: _value(field) for name, field in reader.fields.items()}
    except (LookupError, ValueError, OverflowError, OSError, RecursionError) as e:
        raise UserError(
            f"{path}: expected a GGUF file, got a broken or truncated one"
            f" ({untrusted.shown(e)}). Fetch it again."
        ) from e
    if metadata.get("split.count", 1) not in (0, 1):
        raise UserError(
            f"{path}: expected one file, got one of"
            f" {untrusted.shown(metadata['split.count'])} splits. Join them:"
            " llama-gguf-split --merge FIRST_FILE OUTPUT_FILE"
        )
    # The package's tensors would keep the whole file mapped.
    tensors = {
        tensor.name: Tensor(
            path,
            tensor.tensor_type,
            tuple(reversed(tensor.shape.tolist())),
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in reader.tensors
    }
    return File(path, metadata, tensors)


def _value(field: gguf.ReaderField) -> Any:
    if field.types == [GGUFValueType.FLOAT32]:
        # 1e-5 in float32 is 9.99999974e-06; the shortest decimal is what was meant.
        return float(str(field.parts[-1][0]))
    return field.contents()
