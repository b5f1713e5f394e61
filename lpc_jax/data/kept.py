"""Keeps tokenized pairs on disk by content: read once, mapped into memory after."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc

from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.columns import SCHEMA
from lpc_jax.data.report import Tally
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted, whole

_READ_AT_ONCE = 1 << 20
_LARGEST_TALLY = 1 << 30  # a line of each dropped row
_LOG = logging.getLogger(__name__)


Make = Callable[[Tally], Iterator[pyarrow.RecordBatch]]
Kept = tuple[list[pyarrow.RecordBatch], Tally]


def key(content: str, tokenizer: Tokenizer, settings: Any) -> str:
    """A digest of all that decides the tokens of a source.

    ``content`` is the digest of its files. This package's reading and its libraries
    count too.
    """
    parts = {
        "content": content,
        "tokenizer": tokenizers.digest(tokenizer),
        "code": _code(),
        "settings": settings,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code() -> list[str]:
    content = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        content.update(file.read_bytes())
    versions = map(importlib.metadata.version, ("transformers", "tokenizers", "jinja2"))
    return [content.hexdigest(), *versions]


def read(folder: Path, name: str, make: Make) -> Kept:
    """The batches of that name, made and kept if they are not there whole.

    One process writes; others wait for it. Where nothing can be written they are held
    in memory.
    """
    file = folder / f"pairs-{name}.arrow"
    if (kept := _whole(file)) is not None:
        return kept
    try:
        with _alone(file):
            if (kept := _whole(file)) is None:
                _write(file, make)
                kept = _whole(file)
    except OSError as e:
        _LOG.warning(f"data.cache: tokens cannot be kept and stay in memory: {e}")
    return kept or make_all(make)


def make_all(make: Make) -> Kept:
    """The batches in memory."""
    tally = Tally()
    return list(make(tally)), tally


@contextlib.contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Lets one process at a time make the file; leaves no empty folder."""
    new = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_suffix(".lock")
    try:
        with lock.open("w") as opened:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(opened, fcntl.LOCK_EX)
            yield
    finally:
        lock.unlink(missing_ok=True)
        for folder in new:
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()


def _write(file: Path, make: Make) -> None:
    tally = Tally()
    with (
        whole.writing(file) as out,
        pyarrow.ipc.new_file(out, SCHEMA) as writer,
    ):
        for batch in make(tally):
            writer.write_batch(batch)
    told = json.dumps(dataclasses.asdict(tally))
    # Last: what has none counts for nothing.
    whole.write(_tally_of(file), json.dumps([_checksum(file, told), told]))


def _tally_of(file: Path) -> Path:
    return file.with_suffix(".json")


def _whole(file: Path) -> Kept | None:
    """The file's batches, mapped into memory; None unless it is there and whole."""
    if not file.is_file() or not _tally_of(file).is_file():
        return None
    try:
        checksum, told = untrusted.read_json(_tally_of(file), most=_LARGEST_TALLY)
        if _checksum(file, str(told)) != checksum:
            raise UserError("another checksum")
        mapped = pyarrow.ipc.open_file(pyarrow.memory_map(str(file)))
        batches = [mapped.get_batch(i) for i in range(mapped.num_record_batches)]
        counts = json.loads(told)
        for name in ("events", "notes"):
            counts[name] = [(rule, origin) for rule, origin in counts[name]]
        return batches, Tally(**counts)
    except (ValueError, TypeError, LookupError, pyarrow.ArrowException) as e:
        _LOG.warning(f"{file} is damaged ({e}), and made anew")
        return None


def _checksum(file: Path, told: str) -> int:
    crc = zlib.crc32(told.encode())
    with file.open("rb") as opened:
        while part := opened.read(_READ_AT_ONCE):
            crc = zlib.crc32(part, crc)
    return crc
