"""Damaged checkpoints: recognised by their files, and moved out of the way."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import jax

from lpc_jax.errors import UserError

# Parts of a checkpoint as Orbax lays them out.
STATE, RECORD, METRICS = "state", "record", "metrics/metrics"
# What Orbax writes into a checkpoint once it is whole, and into each part of it.
_COMMITTED = "commit_success.txt"
# Files without which nothing of a checkpoint can be read.
_NEEDED = ("_CHECKPOINT_METADATA", f"{RECORD}/metadata", f"{STATE}/manifest.ocdbt")
# What Orbax raises where a checkpoint's record is damaged.
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError)


class DamagedError(UserError):
    """A checkpoint that is not what was saved."""


@contextlib.contextmanager
def reading_record() -> Iterator[None]:
    """Raises ``DamagedError`` where Orbax cannot read a checkpoint's record."""
    try:
        yield
    except _DAMAGE as error:
        raise DamagedError(
            f"its record cannot be read: {_first_line(error)}"
        ) from error


@contextlib.contextmanager
def reading_arrays() -> Iterator[None]:
    """Raises ``DamagedError`` where Orbax cannot read a checkpoint's arrays."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # so plain is what Orbax raises for cut files
        raise DamagedError(
            f"its arrays cannot be read: {_first_line(error)}"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def damaged(folder: Path) -> Path:
    """Where damaged checkpoints of a folder go."""
    return folder.with_name(folder.name + ".damaged")


def move(checkpoint: Path) -> Path:
    """Moves a damaged checkpoint beside its folder; returns the new path."""
    folder = damaged(checkpoint.parent)
    folder.mkdir(exist_ok=True)
    to, number = folder / checkpoint.name, 1
    while to.exists():
        if not checkpoint.exists():  # another process was faster: it is the last there
            return _last_moved(folder, checkpoint.name)
        number += 1
        to = folder / f"{checkpoint.name}-{number}"
    try:
        checkpoint.rename(to)
    except FileNotFoundError:
        return _last_moved(folder, checkpoint.name)
    return to


def _last_moved(folder: Path, name: str) -> Path:
    found, number = folder / name, 2
    while (following := folder / f"{name}-{number}").exists():
        found, number = following, number + 1
    return found


def move_broken(folder: Path) -> list[str]:
    """Moves checkpoints whose files show damage; returns a sentence for each."""
    if not folder.is_dir():
        return []
    said = []
    for checkpoint in sorted(folder.iterdir()):
        if not checkpoint.name.isdigit():  # Orbax clears killed saves
            continue
        needed = [name for name in _NEEDED if not (checkpoint / name).is_file()]
        if (checkpoint / RECORD / _COMMITTED).exists():  # this Orbax writes them
            needed += [_COMMITTED] * (not (checkpoint / _COMMITTED).is_file())
        if not are_metrics(checkpoint / METRICS):
            needed.append(f"readable {METRICS}")
        if needed:
            said.append(
                f"the checkpoint of step {checkpoint.name} is damaged (it has no"
                f" {' and no '.join(needed)}): moved to {move(checkpoint)}."
            )
    return said


def are_metrics(file: Path) -> bool:
    """Whether a metrics file is absent, or holds numbers by name."""
    if not file.exists():
        return True
    try:
        found = json.loads(file.read_bytes())
    except ValueError:  # JSON or UTF-8
        return False
    return isinstance(found, dict) and all(
        isinstance(value, int | float) for value in found.values()
    )
