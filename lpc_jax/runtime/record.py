"""A checkpoint's record: its leaves, their checksums, a digest of the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from lpc_jax.errors import UserError
from lpc_jax.runtime import damage

_LISTED = 20  # differing leaves in a message


def read(checkpoint: Path) -> dict[str, Any]:
    """A checkpoint's ``meta`` and ``leaves``; ``DamagedError`` where not as saved."""
    try:
        record = json.loads((checkpoint / damage.RECORD / "metadata").read_bytes())
    except (OSError, ValueError) as error:
        raise damage.unreadable("record", error) from error
    if not isinstance(record, dict) or (
        record.get("digest") != digest(record.get("meta"), record.get("leaves"))
    ):
        raise damage.DamagedError("its record is not what was saved")
    return record


def digest(meta: Any, leaves: Any) -> str:
    """SHA-256 of a record, in hex."""
    text = json.dumps([meta, leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def require_same_leaves(
    checkpoint: Path,
    saved: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    """Raises ``UserError`` unless a checkpoint has the expected leaves."""
    now = {path: _text(describe(leaf)) for path, leaf in expected.items()}
    then = {path: _text(leaf) for path, leaf in saved.items()}
    differences = {
        "missing": [f"{p} {now[p]}" for p in now if p not in then],
        "unexpected": [f"{p} {then[p]}" for p in then if p not in now],
        "mis-shaped": [
            f"{p} expected {now[p]}, got {then[p]}"
            for p in now
            if p in then and now[p] != then[p]
        ],
    }
    listed = ""
    for kind, lines in differences.items():
        more = [f"and {len(lines) - _LISTED} more"] if len(lines) > _LISTED else []
        listed += "".join(f"  {kind}: {line}\n" for line in lines[:_LISTED] + more)
    if listed:
        raise UserError(
            f"the checkpoint of step {checkpoint.name} in {checkpoint.parent} must hold"
            f" the state that this config describes, got one of another config:\n"
            f"{listed}Continue with the config.py in its run folder, or start a new"
            " run with another --name."
        )


@jax.jit
def checksums(data: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A checksum of each array, the same on every mesh and in any summation order."""

    def checksum(x: jax.Array) -> jax.Array:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        if x.dtype == jnp.bool_:
            bits = x.astype(jnp.uint32)
        else:
            bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        # Odd factors are invertible modulo 2^32: one changed element changes the sum.
        for axis in range(x.ndim):
            bits *= 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + 1
        return jnp.sum(bits, dtype=jnp.uint32)

    return {path: checksum(leaf) for path, leaf in data.items()}


def is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf is a PRNG key."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> dict[str, Any]:
    """Shape and dtype of a leaf, and a key's implementation."""
    described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if is_key(leaf) and isinstance(leaf, jax.Array):
        described["impl"] = str(jax.random.key_impl(leaf))
    return described


def _text(described: Mapping[str, Any]) -> str:
    return f"{described['dtype']}[{','.join(map(str, described['shape']))}]"
