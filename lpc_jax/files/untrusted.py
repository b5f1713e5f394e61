"""Files that others wrote, read within bounds: JSON, and files of a model's folder.

Nothing here runs what a file holds, follows where it leads, or believes what it says of
its own size. Knows nothing of what the values mean.
"""

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

# A hub cache keeps each file's bytes in a folder of this name, under their SHA-1 or
# SHA-256, and links to them from the folder of a revision.
_BLOBS, _DIGEST = "blobs", re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


# What of a file's own words goes into a message.
_LONGEST_SHOWN = 200


def shown(said: object, *, most: int = _LONGEST_SHOWN) -> str:
    """What a file says, fit for a line of a message: printable, and cut where long.

    A terminal obeys control characters, and cannot write half a surrogate pair.
    """
    text = str(said)
    short = text if len(text) <= most else text[:most] + "..."
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in short
    )


def _object_of_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise UserError(f"the key {shown(repr(twice), most=80)} is there twice")
    return found


def parse_json(text: bytes, *, repeats: bool = False) -> Any:
    """The value of a JSON text.

    Args:
        text: In UTF-8.
        repeats: Whether an object may have a key twice, of which the last counts.

    Raises:
        UserError: No JSON, no UTF-8, a key twice, or nested too deep; json's own
            kinds where it is json that refuses.
    """
    hook = None if repeats else _object_of_unique_keys
    too_deep = f"nested deeper than {DEEPEST}"
    try:
        value = json.loads(text, object_pairs_hook=hook)
    except RecursionError:
        raise UserError(too_deep) from None
    # Few brackets cannot nest deep; most texts end here.
    if text.count(b"[") + text.count(b"{") > DEEPEST and _nests_deeper(value):
        raise UserError(too_deep)
    return value


def _nests_deeper(value: Any) -> bool:
    level = [value]
    for _ in range(DEEPEST + 1):
        level = [
            item
            for node in level
            if isinstance(node, dict | list)
            for item in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


def read_json(file: Path, *, most: int, repeats: bool = False) -> Any:
    """The value of a JSON file.

    Args:
        file: The file.
        most: Bytes above which it is not read.
        repeats: As in ``parse_json``.

    Raises:
        UserError: As ``parse_json``, or the file is larger.
    """
    size = file.stat().st_size
    if size > most:
        raise UserError(f"{size:,} bytes, expected at most {most:,}")
    return parse_json(file.read_bytes(), repeats=repeats)


def read_arrays(file: Path, wanted: dict[str, str]) -> dict[str, np.ndarray] | None:
    """Arrays of an .npz file, or None where it is not whole or holds others.

    Args:
        file: The file.
        wanted: The type of each array's items, as NumPy's ``dtype.str`` has it.
    """
    try:
        # Arrays of objects are pickles, which can run code: NumPy refuses them.
        with np.load(file, allow_pickle=False) as stored:
            found = {name: stored[name] for name in wanted}
    except (
        *(ValueError, EOFError, LookupError, TypeError, MemoryError),
        *(zipfile.BadZipFile, zlib.error, RuntimeError, OSError),
    ):
        return None
    types = {name: np.dtype(kind) for name, kind in wanted.items()}
    right = all(found[name].dtype == kind for name, kind in types.items())
    return found if right else None


def own_file(folder: Path, name: str) -> Path | None:
    """A file that lies in a folder, or None where there is none of that name.

    A link that leads out of the folder is refused: a folder from elsewhere could name
    any file of this machine as its own. A hub cache's folders are all links, to blobs
    under their digests, and those are its own files.

    Args:
        folder: A model's.
        name: Of the file, without a folder.

    Raises:
        UserError: The name or its link leads out of the folder.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise UserError(
            f"{folder}: expected the name of a file of this folder, got {name!r:.200}."
            " The folder may be made to mislead: download it again from where you trust"
            " it."
        )
    file = folder / name
    if not file.is_file():  # a pipe or device is none either
        return None
    target = file.resolve()
    is_blob = _DIGEST.fullmatch(target.name) is not None and _BLOBS in (
        target.parent.name,
        target.parent.parent.name,
    )
    if not is_blob and not target.is_relative_to(folder.resolve()):
        raise UserError(
            f"{file} must be a file of its folder, got a link to {target}, outside it."
            " Copy the file there if you mean it."
        )
    return file
