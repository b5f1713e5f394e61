"""Reads files that others wrote, within bounds: nothing in them is run or followed."""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from lpc_jax.errors import UserError

# Nested lists and objects: rows of messages have 4, tokenizer.json about 10. Well below
# what exhausts Python's stack in whoever walks or prints the value.
DEEPEST = 100
_LONGEST_SHOWN = 200  # characters of a file's own words in a message
# A hub cache keeps each file's bytes in a folder of this name, under their SHA-1 or
# SHA-256, and links to them from the folder of a revision.
_BLOBS, _DIGEST = "blobs", re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def shown(value: object, *, most: int = _LONGEST_SHOWN) -> str:
    """A file's text, fit for a line of a message: printable, and cut where long."""
    text = str(value)
    short = text if len(text) <= most else text[:most] + "..."
    # A terminal obeys control characters, and cannot write half a surrogate pair.
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in short
    )


def parse_json(text: bytes, *, repeats: bool = False) -> Any:
    """The value of a UTF-8 JSON text; with ``repeats`` the last equal key counts."""
    too_deep = f"nested deeper than {DEEPEST}"
    try:
        value = json.loads(text, object_pairs_hook=None if repeats else _unique)
    except RecursionError:
        raise UserError(too_deep) from None
    # Few brackets cannot nest deep; most texts end here.
    if text.count(b"[") + text.count(b"{") > DEEPEST and _nests_deeper(value):
        raise UserError(too_deep)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise UserError(f"the key {shown(repr(key), most=80)} is there twice")
        fields[key] = value
    return fields


def _nests_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
    return bool(level)


def read_json(file: Path, *, most: int, repeats: bool = False) -> Any:
    """The value of a JSON file of at most ``most`` bytes; else ``UserError``."""
    size = file.stat().st_size
    if size > most:
        raise UserError(f"{size:,} bytes, expected at most {most:,}")
    return parse_json(file.read_bytes(), repeats=repeats)


def read_object(file: Path, *, most: int) -> dict[str, Any]:
    """The fields of a JSON file that holds one object; else ``UserError``."""
    try:
        fields = read_json(file, most=most)
    except ValueError as e:
        raise UserError(f"{file}: broken JSON ({shown(e)}). Download it again.") from e
    if not isinstance(fields, dict):
        raise UserError(f"{file} must be a JSON object. Download it again.")
    return fields


def read_arrays(file: Path, dtypes: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Arrays of an .npz file by name, in these dtypes; None where it is broken."""
    try:
        # Arrays of objects are pickles, which can run code: NumPy refuses them.
        with np.load(file, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in dtypes}
    except (
        *(ValueError, EOFError, LookupError, TypeError, MemoryError),
        *(zipfile.BadZipFile, zlib.error, RuntimeError, OSError),
    ):
        return None
    right = all(arrays[name].dtype == np.dtype(kind) for name, kind in dtypes.items())
    return arrays if right else None


def own_file(folder: Path, name: str) -> Path | None:
    """A file that lies in a folder, or None where there is none of that name.

    A name or link out of the folder is a ``UserError``: a folder from elsewhere could
    name any file of this machine as its own. A hub cache's folders are all links, to
    blobs under their digests, and those are its own files.
    """
    if name in ("", ".", "..") or re.search(r"[/\\\0]", name):
        raise UserError(
            f"{folder}: expected the name of a file of this folder, got {name!r:.200}."
            " The folder may be made to mislead: download it again from where you trust"
            " it."
        )
    file = folder / name
    if not file.is_file():  # a pipe or device is none either
        return None
    target = file.resolve()
    is_blob = _BLOBS in target.parts[-3:-1] and _DIGEST.fullmatch(target.name)
    if not is_blob and not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{file} must be a file of its folder, got a link to {target}, outside it."
            " Copy the file there if you mean it."
        )
    return file
