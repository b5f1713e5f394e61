"""Reads checkpoints, also of a run that is still training; changes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lpc_jax.errors import UserError
from lpc_jax.runtime import damage, record


def find(folder: Path, which: str) -> Path:
    """The checkpoint ``latest``, ``best`` (the later of equals) or of a step's number.

    ``UserError`` where a run's folder of checkpoints has none such.
    """
    # Orbax gives a checkpoint its name once it is whole.
    steps = sorted(int(p.name) for p in folder.glob("*") if p.name.isdigit())
    if not steps:
        raise UserError(
            f"{folder} must hold a checkpoint, got none. Let the run reach its"
            " first one (training.checkpoint_every), or name another run."
        )
    named = {str(step): step for step in steps} | {"latest": steps[-1]}
    if which == "best":
        rank, best = max((_rank(folder / str(step)), step) for step in steps)
        if rank > -math.inf:
            named["best"] = best
    if which not in named:
        raise UserError(
            f"--step must be latest, one of {', '.join(map(str, steps))}, or best for a"
            f" run with held-out pairs, got {which!r} for {folder}."
        )
    return folder / str(named[which])


def _rank(checkpoint: Path) -> float:
    """The metric, of which higher is better; -inf without one."""
    values = (damage.metrics(checkpoint) or {}).values()
    return next((float(value) for value in values if not math.isnan(value)), -math.inf)


def read(
    checkpoint: Path,
    saved: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> dict[str, jax.Array]:
    """Arrays of a checkpoint by path, bit by bit, in the layout of ``expected``.

    Args:
        saved: What its record says of these leaves.
        expected: Shapes with shardings, on any mesh.

    Raises:
        UserError: Other leaves were saved than are expected.
        DamagedError: Arrays that cannot be read, or that have changed.
    """
    record.require_same_leaves(checkpoint, saved, expected)
    stored = {path: _stored(leaf) for path, leaf in expected.items()}
    args = ocp.args.PyTreeRestore(
        stored,
        restore_args=ocp.checkpoint_utils.construct_restore_args(stored),
        partial_restore=True,
    )
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
            arrays = orbax.restore((checkpoint / damage.STATE).absolute(), args=args)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:  # so plain is what Orbax raises for cut files
        raise damage.unreadable("arrays", error) from error
    sums = jax.device_get(record.checksums(arrays))
    changed = [p for p, leaf in saved.items() if int(sums[p]) != leaf["checksum"]]
    if changed:
        raise damage.DamagedError(
            f"its arrays are not those that were saved: {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}"
        )
    return {
        path: jax.random.wrap_key_data(arrays[path], impl=saved[path]["impl"])
        if record.is_key(leaf)
        else arrays[path]
        for path, leaf in expected.items()
    }


def _stored(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape on disk, where a key is its data."""
    if not record.is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)
