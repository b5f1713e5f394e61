"""GGUF files: metadata, and named tensors that are dequantised when read."""

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
    """Where a tensor lies on disk, and how it is quantised."""

    path: Path
    kind: GGMLQuantizationType  # block format
    shape: tuple[int, ...]  # in NumPy's order, the reverse of the file's
    offset: int  # of its first byte in the file
    bytes: int  # on disk

    def read(self) -> Float32[np.ndarray, "..."]:
        """The values; ``UserError`` where the gguf package cannot read the format."""
        raw = np.memmap(self.path, np.uint8, "r", self.offset, (self.bytes,))
        rows = np.asarray(raw).reshape(*self.shape[:-1], -1)
        try:
            return gguf.dequantize(rows, self.kind)
        except NotImplementedError as e:
            raise UserError(
                f"{self.path}: the gguf package cannot dequantise {self.kind.name}"
                f" blocks ({untrusted.shown(e)}). Use a Q4_K_M, Q8_0 or F16 file."
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
        # Each slice of a memmap runs Python code: three times as slow for a tokenizer.
        self.data = np.asarray(self.data)
        values = super()._get(offset, dtype, count, *order, **more)
        if len(values) < count:
            raise ValueError("a value lies beyond the end of the file")
        return values


def read(path: Path) -> File:
    """Metadata of a file and where its tensors lie; no tensor's data is read."""
    status = path.stat()
    return _read(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1)  # parsing a tokenizer's arrays takes seconds
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
        count = untrusted.shown(metadata["split.count"])
        raise UserError(
            f"{path}: expected one file, got one of {count} splits. Join them:"
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
