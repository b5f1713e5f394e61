"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from lpc_jax.errors import UserError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[BinaryIO]:
    """A file, in its folder, that is there when the block ends, and never in part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the name without bytes
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def require_writable(folder: Path, setting: str) -> None:
    """Raises ``UserError`` for a folder that cannot be made or written to; makes none.

    A file where a folder must be counts too.
    """
    nearest = nearest_existing(folder.expanduser())
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{setting} = {str(folder)!r} must be a folder that can be written to, got"
            f" {nearest}: {os.strerror(error.errno or 0)}. Name another."
        ) from error


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest of its parents that exists."""
    place = path.absolute()
    return next(p for p in (place, *place.parents) if p.exists())


def write(path: Path, content: str | bytes) -> None:
    """Writes a text, in UTF-8, or bytes, as a whole."""
    with writing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)
