"""Which mesh axes each axis letter is split over: activations' side of sharding.

Knows nothing of parameters; their table is in ``sharding.py``.
"""

from __future__ import annotations

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

# data: copies of the parameters; fsdp: rows and parameters split together;
# tensor: heads, MLP width and vocabulary.
MESH_AXES = ("data", "fsdp", "tensor")

_SPLIT_OVER: dict[str, tuple[str, ...]] = {
    "R": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
}


def divisible(
    axes: tuple[str, ...] | None, size: int, mesh: Mesh | AbstractMesh
) -> tuple[str, ...] | None:
    """The mesh axes if they divide an array axis of this size, else None."""
    if axes is None:
        return None
    ways = 1
    for axis in axes:
        ways *= mesh.shape[axis]
    return axes if size % ways == 0 else None


def constrain(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Asks the compiler to lay an activation out as its letters say.

    Outside ``jax.set_mesh`` this is the identity. An axis that the mesh does not
    divide (3 key heads over 2 devices) stays whole.

    Args:
        x: An activation.
        letters: Its axes, as in ``"R T D"``.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = P(*map(split_over, letters.split(), x.shape))
    return jax.lax.with_sharding_constraint(x, spec)


def split_over(letter: str, size: int) -> tuple[str, ...] | None:
    """The axes of the mesh that is set over which an array axis is split, if any."""
    return _split(_SPLIT_OVER.get(letter), size)


def fsdp_over(size: int) -> tuple[str, ...] | None:
    """Likewise, of a parameter's axis that is split over ``fsdp``."""
    return _split(("fsdp",), size)


def _split(axes: tuple[str, ...] | None, size: int) -> tuple[str, ...] | None:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or axes is None or all(mesh.shape[axis] == 1 for axis in axes):
        return None
    return divisible(axes, size, mesh)
