"""Reads rows of a file or a hub data set; a broken one is told by file and line."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import exceptions as dataset_errors

from lpc_jax.errors import UserError
from lpc_jax.files import sources, untrusted

Rows = Iterator[tuple[str, Any]]
# Bytes read at a time. A line is one pair: a million tokens of English are about 4 MB.
# A .json file is parsed whole, and then takes several times its size.
LONGEST_LINE = 64 << 20
LARGEST_JSON = 1 << 30
# Text unpacks to some twenty times its packed size at most, and made-up text to a
# thousand times. Small files may repeat themselves as they like.
MOST_UNPACKED, UNPACKED_FREELY = 200, 16 << 20
# Rows unpacked at a time: a parquet file can repeat a large text in any number of them.
_PARQUET_ROWS = 256


def read(path: str, *, setting: str, split: str | None) -> Rows:
    """Each row of a file, or of a hub data set's split, with its ``file:line``."""
    if not sources.exists(path):
        if path.endswith(tuple(_READERS)) or not sources.is_hub_id(path):
            raise UserError(
                f"{setting} = {path!r}: no such file, and not a hub id of the form"
                f" owner/name. {_near(Path(path))}"
            )
        return _hub(path, setting=setting, split=split)
    file = Path(path).expanduser()
    for suffix, rows_of in _READERS.items():
        if file.name.endswith(suffix) and file.is_file():
            return rows_of(file)
    kind = "a folder" if file.is_dir() else "a device or pipe"
    raise UserError(
        f"{setting} = {path!r} must be a file ending in {', '.join(_READERS)}, got"
        f" {repr(file.name) if file.is_file() else kind}. Convert or rename it, or name"
        " a file inside it."
    )


def _near(path: Path) -> str:
    names = []
    if sources.exists(str(path.parent)) and path.parent.expanduser().is_dir():
        names = [file.name for file in path.parent.expanduser().iterdir()]
    near = difflib.get_close_matches(path.name, names, n=1)
    return (
        f"Did you mean {str(path.parent / near[0])!r}?" if near else "Check the path."
    )


def _json_lines(file: Path) -> Rows:
    number = unpacked = 0
    try:
        with file.open("rb") as packed:
            lines = gzip.GzipFile(fileobj=packed) if file.suffix == ".gz" else packed
            while line := lines.readline(LONGEST_LINE + 1):
                number, unpacked = number + 1, unpacked + len(line)
                where = f"{file}:{number}"
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{where}: expected at most {LONGEST_LINE:,} bytes a line, got"
                        " more. Write one pair a line, or remove it."
                    )
                _check_ratio(where, unpacked, packed.tell())
                if line.strip():
                    yield f"{file.name}:{number}", _decode(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(
            f"{file}:{number + 1}: broken or truncated gzip file"
            f" ({untrusted.shown(e)}). Fetch or compress it again."
        ) from e


def _json_list(file: Path) -> Rows:
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise UserError(
            f"{file}: a .json file must have at most {LARGEST_JSON:,} bytes, got"
            f" {size:,}. Write one object a line in a .jsonl file."
        )
    items = _decode(file.read_bytes(), str(file))
    if not isinstance(items, list):
        raise UserError(
            f"{file} must hold a list of rows, got {type(items).__name__}. Write it as"
            " [{...}, {...}], or one object a line in a .jsonl file."
        )
    yield from ((f"{file.name}:{number}", row) for number, row in enumerate(items, 1))


def _check_ratio(where: str, unpacked: int, packed: int) -> None:
    if unpacked > max(UNPACKED_FREELY, MOST_UNPACKED * packed):
        raise UserError(
            f"{where}: expected text, which unpacks to at most {MOST_UNPACKED} times"
            f" its size, got {unpacked:,} bytes out of {packed:,}. If you trust it,"
            " unpack it yourself."
        )


def _decode(text: bytes, where: str) -> Any:
    try:
        return untrusted.parse_json(text, repeats=True)
    except ValueError as e:
        match e:
            case json.JSONDecodeError():
                # Some of the messages end in "at" themselves.
                reason = e.msg.removesuffix(" at")
                got = f"{reason} at line {e.lineno}, column {e.colno}"
            case UnicodeDecodeError():
                got = f"byte {text[e.start]:#04x} at {e.start}, which is not UTF-8"
            case _:
                got = f"a text that is {untrusted.shown(e)}"
        raise UserError(f"{where}: expected JSON, got {got}. Mend or remove it.") from e


def _parquet(file: Path) -> Rows:
    number = unpacked = 0
    packed = file.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                announced = table.metadata.row_group(group).total_byte_size
                _check_ratio(str(file), announced, packed)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                # Each row counted by itself, where rows share their values too.
                unpacked += sum(
                    (c.dictionary_decode() if hasattr(c, "dictionary") else c).nbytes
                    for c in batch.columns
                )
                _check_ratio(f"{file}:{number + 1}", unpacked, packed)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(
            f"{file}: broken or truncated parquet file after row {number}"
            f" ({untrusted.shown(reason)}). Fetch or write it again."
        ) from e


def _hub(path: str, *, setting: str, split: str | None) -> Rows:
    try:
        table = sources.download(
            lambda: datasets.load_dataset(path, split=split),
            path,
            setting=setting,
            kind=sources.DATA_SET,
            failures=(*sources.FAILURES, dataset_errors.DatasetsError),
        )
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:  # the latter: a data set that is a script
        raise UserError(
            f"{setting} = {path!r} could not be loaded with {setting}_split ="
            f" {split!r}: {e}"
        ) from e
    if not isinstance(table, datasets.Dataset):
        raise UserError(
            f"{setting} = {path!r} has the splits {', '.join(map(str, table))}, and"
            f" none is named. Name one with --{setting}-split."
        )
    for number, row in enumerate(table, 1):
        yield f"{path}/{split}:{number}", row


_READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _json_lines,
    ".jsonl.gz": _json_lines,
    ".json": _json_list,
    ".parquet": _parquet,
}
