"""Rows of one file of JSON, CSV, parquet or Arrow; a broken one is told by its line."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Rows = Iterator[tuple[str, Any]]
_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_TABLES = (".parquet", ".arrow", ".feather")
SUFFIXES = (*_TEXTS, *(f"{suffix}.gz" for suffix in _TEXTS), *_TABLES)
IN_WORDS = ".jsonl, .json, .csv, .tsv (each also .gz), .parquet or .arrow"
# Bytes read at a time. A line is one pair: a million tokens of English are about 4 MB.
# JSON that is no line is parsed whole, and then takes several times its size.
LONGEST_LINE = 64 << 20
LARGEST_JSON = 1 << 30
# Text unpacks to some twenty times its packed size at most, and made-up text to a
# thousand times. Small files may repeat themselves as they like.
MOST_UNPACKED, UNPACKED_FREELY = 200, 16 << 20
# Rows unpacked at a time: a table can repeat a large text in any number of them.
_TABLE_ROWS = 256
_GZIP, _PARQUET, _BOM = b"\x1f\x8b", b"PAR1", b"\xef\xbb\xbf"
_ARROW_FILE = b"ARROW1"  # of a file with an index, which Feather is; streams have none
# A row has one of these; what has none may be a wrapper around rows.
_ROW_FIELDS = {"prompt", "chosen", "rejected", "messages", "instruction", "answers"}


def is_readable(name: str) -> bool:
    """Whether a file's name ends as one of ``SUFFIXES``."""
    return name.lower().endswith(SUFFIXES)


def rows_of(file: Path, *, split: str | None) -> Rows:
    """Each row with its ``file:line``; the first bytes tell more than the name.

    Args:
        file: With one of ``SUFFIXES``.
        split: Chooses among the named lists of a JSON file that has several.
    """
    head = _head(file)
    name = file.name.lower().removesuffix(".gz")
    if head.startswith(_PARQUET) or (
        name.endswith(".parquet") and head[:1] not in b"{["
    ):
        return _table(file, "parquet", _parquet(file))
    if name.endswith((".arrow", ".feather")):
        return _table(file, "Arrow", _arrow(file, head.startswith(_ARROW_FILE)))
    if name.endswith((".csv", ".tsv")):
        return _csv(file)
    return _json(file, split)


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        return opened.read(512).removeprefix(_BOM).lstrip()


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines and their numbers, unpacked if the file is gzip, whatever its name."""
    number = unpacked = 0
    try:
        with file.open("rb") as packed:
            is_gzip = packed.peek(2)[:2] == _GZIP
            lines = gzip.GzipFile(fileobj=packed) if is_gzip else packed
            while line := lines.readline(LONGEST_LINE + 1):
                number, unpacked = number + 1, unpacked + len(line)
                where = f"{file}:{number}"
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{where}: expected at most {LONGEST_LINE:,} bytes a line, got"
                        " more. Write one pair a line, or remove it."
                    )
                _check_ratio(where, unpacked, packed.tell())
                yield number, line
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(
            f"{file}:{number + 1}: broken or truncated gzip file"
            f" ({untrusted.shown(e)}). Fetch or compress it again."
        ) from e


def _check_ratio(where: str, unpacked: int, packed: int) -> None:
    if unpacked > max(UNPACKED_FREELY, MOST_UNPACKED * packed):
        raise UserError(
            f"{where}: expected text, which unpacks to at most {MOST_UNPACKED} times"
            f" its size, got {unpacked:,} bytes out of {packed:,}. If you trust it,"
            " unpack it yourself."
        )


# --- JSON -----------------------------------------------------------------------------


def _json(file: Path, split: str | None) -> Rows:
    """Objects, a line or several each; or a list, bare or in a wrapper."""
    for place, (number, text) in enumerate(_objects(file)):
        value = _decode(text, f"{file}:{number}" if number else str(file))
        # A list behind other rows is a row, and a wrong one.
        items = None if place else _items(value, str(file), split)
        if items is None:
            yield f"{file.name}:{number}", value
        else:
            yield from ((f"{file.name}:{i}", item) for i, item in enumerate(items, 1))


def _objects(file: Path) -> Iterator[tuple[int, bytes]]:
    """JSON texts, and the lines that they start on."""
    head = _head(file)
    if head.startswith(b"["):
        _require_parsable(file, file.stat().st_size)
        yield 0, file.read_bytes()  # its own lines are counted in messages
        return
    lines = ((n, line) for n, line in _lines(file) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].removeprefix(_BOM).startswith(b"[") or _goes_on(first[1]):
        yield from _spread(file, itertools.chain([first], lines))
    else:
        yield first
        yield from lines


def _goes_on(line: bytes) -> bool:
    """Whether an object goes on in the next line, as in indented JSON."""
    text = line.decode(errors="replace").rstrip()
    try:
        json.loads(text)
    except json.JSONDecodeError as e:
        return text.lstrip("\ufeff").startswith("{") and e.pos >= len(text) - 1
    except (RecursionError, ValueError):
        return False
    return False


def _spread(
    file: Path, lines: Iterable[tuple[int, bytes]]
) -> Iterator[tuple[int, bytes]]:
    """Values over several lines, each of which ends at a bracket without indent."""
    start, size, parts = 1, 0, []
    for number, line in lines:
        start = start if parts else number
        parts.append(line)
        size += len(line)
        _require_parsable(file, size)
        if line.rstrip() in (b"}", b"]"):
            yield start, b"".join(parts)
            size, parts = 0, []
    if parts:
        yield start, b"".join(parts)


def _require_parsable(file: Path, size: int) -> None:
    if size > LARGEST_JSON:
        raise UserError(
            f"{file}: JSON that is no line must have at most {LARGEST_JSON:,} bytes,"
            f" got {size:,}. Write one object a line in a .jsonl file."
        )


def _items(value: Any, where: str, split: str | None) -> list[Any] | None:
    """The rows of a list, or of the list that an object wraps; None: it is a row."""
    match value:
        case list():
            return value
        case {"chosen": dict(column)} if column and all(map(str.isdecimal, column)):
            pass
        case {"chosen": [str(), *_]}:
            pass
        case dict() if not _ROW_FIELDS & value.keys():
            return _wrapped(value, where, split)
        case _:
            return None
    raise UserError(
        f"{where}: expected rows, got columns, as pandas writes them. Write it with"
        " to_json(FILE, orient='records', lines=True)."
    )


def _wrapped(value: dict[str, Any], where: str, split: str | None) -> list[Any] | None:
    lists = {
        name: items
        for name, items in value.items()
        if isinstance(items, list)
        and items
        and isinstance(items[0], dict)
        and _ROW_FIELDS & items[0].keys()
    }
    if len(lists) < 2:
        return next(iter(lists.values()), None)
    if split not in lists:
        names = untrusted.shown(", ".join(lists))
        raise UserError(
            f"{where}: expected one list of rows, or one named {split!r} as the split"
            f" is, got {names}. Name one of them as the split."
        )
    return lists[split]


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


# --- CSV ------------------------------------------------------------------------------


def _csv(file: Path) -> Rows:
    """Rows of text by the header's names; the header tells what separates cells."""
    csv.field_size_limit(LONGEST_LINE)
    lines = (_utf8(line, f"{file}:{number}") for number, line in _lines(file))
    header = next(lines, "")
    separator = max(",;\t", key=header.count)
    table = csv.DictReader(
        itertools.chain([header], lines), delimiter=separator, strict=True
    )
    start = 2
    try:
        names = list(table.fieldnames or ())
        for row in table:
            start, where = table.line_num + 1, f"{file}:{start}"
            cells = len(row) - (None in row) - list(row.values()).count(None)
            if None in row or cells < len(names):
                raise UserError(
                    f"{where}: expected {len(names)} cells, as the first line has, got"
                    f" {'more' if None in row else cells}. Put cells with"
                    f" {separator!r} or line breaks in quotes."
                )
            origin = where.replace(str(file), file.name, 1)
            yield origin, row
    except csv.Error as e:
        raise UserError(f"{file}:{start}: broken CSV ({e}). Mend or remove it.") from e


def _utf8(line: bytes, where: str) -> str:
    try:
        return line.removeprefix(_BOM).decode()
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: expected text in UTF-8, got the byte {line[e.start]:#04x} at"
            f" {e.start}. Save it as UTF-8."
        ) from e


# --- tables ---------------------------------------------------------------------------


def _parquet(file: Path) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file) as table:
        packed = file.stat().st_size
        for group in range(table.num_row_groups):
            announced = table.metadata.row_group(group).total_byte_size
            _check_ratio(str(file), announced, packed)
        yield from table.iter_batches(batch_size=_TABLE_ROWS)


def _arrow(file: Path, indexed: bool) -> Iterator[pyarrow.RecordBatch]:
    """Of a stream, as ``save_to_disk`` writes shards, or of a file with an index."""
    reader = pyarrow.ipc.open_file if indexed else pyarrow.ipc.open_stream
    with pyarrow.memory_map(str(file)) as mapped:
        batches: Any = reader(mapped)
        if indexed:
            batches = map(batches.get_batch, range(batches.num_record_batches))
        for batch in batches:
            for first in range(0, batch.num_rows, _TABLE_ROWS):
                yield batch.slice(first, _TABLE_ROWS)


def _table(file: Path, kind: str, batches: Iterator[pyarrow.RecordBatch]) -> Rows:
    number = unpacked = 0
    try:
        for batch in batches:
            # Each row counted by itself, where rows share their values too.
            unpacked += sum(
                (c.dictionary_decode() if hasattr(c, "dictionary") else c).nbytes
                for c in batch.columns
            )
            _check_ratio(f"{file}:{number + 1}", unpacked, file.stat().st_size)
            for row in batch.to_pylist():
                number += 1
                yield f"{file.name}:{number}", filled(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(
            f"{file}: broken or truncated {kind} file after row {number}"
            f" ({untrusted.shown(reason)}). Fetch or write it again."
        ) from e


def filled(row: Any) -> dict[str, Any]:
    """The row without the nulls that a table adds to objects of unlike fields."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    match value:
        case list():
            return [_without_nulls(x) for x in value]
        case dict():
            return {k: _without_nulls(x) for k, x in value.items() if x is not None}
        case _:
            return value
