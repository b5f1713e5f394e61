"""Which mesh axes each axis letter is split over, of activations and parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

# data: copies of the parameters; fsdp: rows and parameters split together;
# tensor: heads, MLP width and vocabulary.
MESH_AXES = ("data", "fsdp", "tensor")

# Letters of types.py, and of the latent's networks X (inputs) and W (hidden width).
# Others are whole on every device.
SPLIT_OVER: dict[str, tuple[str, ...]] = {
    "R": ("data", "fsdp"),
    "N": ("tensor",),
    "K": ("tensor",),
    "F": ("tensor",),
    "V": ("tensor",),
    "D": ("fsdp",),
    "X": ("fsdp",),
    "W": ("fsdp",),
}


def spec(letters: Sequence[str], shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """How an array of these axes lies on a mesh."""
    free = set(MESH_AXES)
    split = []
    for letter, size in zip(letters, shape, strict=True):
        axes = SPLIT_OVER.get(letter, ())
        # A mesh axis splits the first that asks: of "R T D" rows take fsdp, D is whole.
        if not free.issuperset(axes):
            axes = ()
        free.difference_update(axes)
        # 3 key heads over 2 devices stay whole.
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        split.append(axes if axes and divides else None)
    return P(*split)


def constrain(x: Shaped[Array, "..."], letters: str) -> Shaped[Array, "..."]:
    """Lays an activation out by letters such as "R T D"; the identity off a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(letters.split(), x.shape, mesh))


def split_over(letter: str, size: int) -> tuple[str, ...] | None:
    """The axes of the set mesh over which an array axis is split, or None."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = SPLIT_OVER.get(letter, ())
    ways = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)
    return axes if ways > 1 and size % ways == 0 else None
