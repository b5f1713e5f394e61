"""A checkpoint's record: its leaves, their checksums, a digest of the record."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from lpc_jax.errors import UserError
from lpc_jax.runtime.damage import DamagedError

_LISTED = 20  # differing leaves in a message


def require_same_leaves(
    folder: Path,
    step: int,
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
    if any(differences.values()):
        listed = [
            f"  {kind}: {line}"
            for kind, lines in differences.items()
            for line in _shortened(lines)
        ]
        raise UserError(
            f"the checkpoint of step {step} in {folder} must hold the state"
            " that this config describes, got one of another config:\n"
            + "\n".join(listed)
            + "\nContinue with the config.py in its run folder, or start a new"
            " run with another --name."
        )


def require_whole(record: Any) -> dict[str, Any]:
    """The record; ``DamagedError`` where its digest does not match."""
    whole = isinstance(record, dict) and (
        record.get("digest") == record_digest(record.get("meta"), record.get("leaves"))
    )
    if not whole:
        raise DamagedError("its record is not what was saved")
    return record


def require_checksums(
    restored: dict[str, jax.Array], described: Mapping[str, Mapping[str, Any]]
) -> None:
    """Raises ``DamagedError`` where arrays are not those that were saved."""
    found = jax.device_get(checksums(restored))
    changed = [
        path
        for path, leaf in described.items()
        if path in found and int(found[path]) != leaf["checksum"]
    ]
    if changed:
        raise DamagedError(
            f"its arrays are not those that were saved: {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}"
        )


def record_digest(meta: Any, leaves: Any) -> str:
    """SHA-256 of a record, in hex."""
    text = json.dumps([meta, leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    assert len(named) == len(leaves), "two leaves of one path"
    return named


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


def key_data_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The shape of a key's data, which is what is saved."""
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _LISTED:
        return lines
    return [*lines[:_LISTED], f"and {len(lines) - _LISTED} more"]
