"""Damaged checkpoints: recognised by their files, and moved out of the way."""

from __future__ import annotations

import json
from pathlib import Path

from lpc_jax.errors import UserError

# Parts of a checkpoint as Orbax lays them out.
STATE, RECORD, METRICS = "state", "record", "metrics/metrics"
# What Orbax writes into a checkpoint once it is whole, and into each part of it.
_COMMITTED = "commit_success.txt"
# Files without which nothing of a checkpoint can be read.
_NEEDED = ("_CHECKPOINT_METADATA", f"{RECORD}/metadata", f"{STATE}/manifest.ocdbt")


class DamagedError(UserError):
    """A checkpoint that is not what was saved."""


def unreadable(part: str, error: Exception) -> DamagedError:
    """The refusal of a checkpoint of which a part cannot be read."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return DamagedError(f"its {part} cannot be read: {first_line}")


def damaged(folder: Path) -> Path:
    """Where damaged checkpoints of a folder go."""
    return folder.with_name(folder.name + ".damaged")


def move(checkpoint: Path) -> Path:
    """Moves a damaged checkpoint beside its folder; returns the new path."""
    folder = damaged(checkpoint.parent)
    folder.mkdir(exist_ok=True)
    to = last = folder / checkpoint.name
    number = 1
    while to.exists():
        number += 1
        last, to = to, folder / f"{checkpoint.name}-{number}"
    try:
        return checkpoint.rename(to)
    except FileNotFoundError:  # another process was faster: it is the last there
        return to if to.exists() else last


def move_broken(folder: Path) -> list[str]:
    """Moves checkpoints whose files show damage; returns a sentence for each."""
    sentences = []
    for checkpoint in sorted(folder.glob("*")):
        if not checkpoint.name.isdigit():  # Orbax clears killed saves
            continue
        absent = [name for name in _NEEDED if not (checkpoint / name).is_file()]
        if (checkpoint / RECORD / _COMMITTED).exists():  # this Orbax writes them
            absent += [_COMMITTED] * (not (checkpoint / _COMMITTED).is_file())
        if metrics(checkpoint) is None:
            absent.append(f"readable {METRICS}")
        if absent:
            sentences.append(
                f"the checkpoint of step {checkpoint.name} is damaged (it has no"
                f" {' and no '.join(absent)}): moved to {move(checkpoint)}."
            )
    return sentences


def metrics(checkpoint: Path) -> dict[str, float] | None:
    """The metric that a checkpoint is ranked by, if any; None where it is broken."""
    file = checkpoint / METRICS
    try:
        values = json.loads(file.read_bytes()) if file.exists() else {}
    except ValueError:  # JSON or UTF-8
        return None
    are_numbers = isinstance(values, dict) and all(
        isinstance(value, int | float) for value in values.values()
    )
    return values if are_numbers else None
