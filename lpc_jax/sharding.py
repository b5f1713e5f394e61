"""The mesh, and placing arrays on it; ``axes.py`` says which letter is split where."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Shaped

from lpc_jax import axes
from lpc_jax.errors import UserError
from lpc_jax.types import Batch


def axis_sizes(*, data: int, fsdp: int, tensor: int, devices: int) -> dict[str, int]:
    """The axes' sizes, -1 resolved; a UserError unless they multiply to ``devices``."""
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    known = math.prod(size for size in sizes.values() if size != -1)
    free = devices // known if known <= devices else 0
    sizes = {axis: free if size == -1 else size for axis, size in sizes.items()}
    if math.prod(sizes.values()) != devices:
        remedy = (
            f"The axes that are not -1 must divide {devices}."
            if -1 in (data, fsdp, tensor)
            else "Set one of them to -1 to take what is left."
        )
        raise UserError(
            f"mesh axes data={data} fsdp={fsdp} tensor={tensor} must multiply to the"
            f" {devices} devices present. {remedy}"
        )
    return sizes


def make_mesh(*, data: int, fsdp: int, tensor: int, devices: Sequence[Any]) -> Mesh:
    """A mesh of all given devices; an axis of -1 takes what the others leave."""
    sizes = axis_sizes(data=data, fsdp=fsdp, tensor=tensor, devices=len(devices))
    return Mesh(
        _arranged(sizes, devices),
        axes.MESH_AXES,
        axis_types=(AxisType.Auto,) * len(axes.MESH_AXES),
    )


def _arranged(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of the mesh's axes, near ones along the inner axes."""
    # TPU slices, and most nodes of GPUs, are joined by a slow network: ``data``, which
    # moves gradients alone, crosses it. Nodes of GPUs may have one that bears other
    # axes; slices of a TPU would crawl.
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    shape = tuple(sizes.values())
    if slices == 1 or (sizes["data"] % slices and devices[0].platform != "tpu"):
        return mesh_utils.create_device_mesh(shape, devices)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data must be a multiple of the {slices} slices that the devices are"
            f" in, got {sizes['data']}. Use mesh.data {slices} and mesh.fsdp -1: only"
            " data may cross the network between slices."
        )
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    return mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices)


def platform(mesh: Mesh) -> str:
    """What the mesh's devices are, as JAX names it: ``cpu``, ``gpu`` or ``tpu``."""
    return mesh.devices.flat[0].platform


def require_rows_divide(rows: int, mesh: Mesh) -> None:
    """A UserError unless ``rows`` is a multiple of data x fsdp."""
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % ways:
        sizes = f"{mesh.shape['data']} x {mesh.shape['fsdp']} = {ways}"
        raise UserError(
            f"packing.rows must be a multiple of mesh.data x mesh.fsdp = {sizes}, got"
            f" {rows}. Use packing.rows {rows + -rows % ways} or another mesh."
        )


def path_name(path: tuple[Any, ...]) -> str:
    """``decoder/blocks/mlp/up`` from a tree path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def by_path(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their ``path_name``."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): leaf for path, leaf in leaves}


def like_parameters(tree: Any, shardings: Any, mesh: Mesh) -> Any:
    """Shardings for a tree that holds copies of the parameters, as optax's does."""
    known = by_path(shardings)

    def find(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        # A path that ends in a parameter's is its copy; others (counts) are whole.
        for start in range(len(path)):
            sharding = known.get(path_name(path[start:]))
            if sharding is not None and len(sharding.spec) == len(leaf.shape):
                return sharding
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(find, tree)


def place_batch(batch: Batch, mesh: Mesh) -> Batch:
    """The micro-batch on the mesh, by rows; every process gives the whole of it."""
    rows = NamedSharding(mesh, P(axes.SPLIT_OVER["R"]))
    return jax.tree.map(lambda x: place(x, rows), batch)


def place(
    value: Shaped[np.ndarray, "..."] | Shaped[Array, "..."], where: NamedSharding
) -> Shaped[Array, "..."]:
    """A host's array on the mesh; each process places the parts of its devices."""
    if where.is_fully_addressable:
        return jax.device_put(value, where)
    host = np.asarray(value)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


def place_parts(
    parts: Iterable[tuple[int | None, Shaped[np.ndarray, "..."]]],
    shape: tuple[int, ...],
    dtype: np.dtype,
    where: Sharding,
) -> Shaped[Array, "..."]:
    """An array on its devices, from parts of which one at a time is in memory.

    Each part has its index on the first axis, or None: it is the whole array. The host
    holds no more than this process's devices do.
    """
    indices = where.addressable_devices_indices_map(shape)
    bounds = {device: _bounds(index, shape) for device, index in indices.items()}
    shards = {
        its: _pages([end - first for first, end in its], dtype)
        for its in set(bounds.values())
    }
    for at, part in parts:
        for ((first, end), *rest), shard in shards.items():
            if at is None:
                shard[...] = part[_slices([(first, end), *rest])]
            elif first <= at < end:
                shard[at - first] = part[_slices(rest)]
    placed = []
    for its in list(shards):
        # Freed before the next: where devices are host memory, it would be there twice.
        shard = shards.pop(its)
        for device in (device for device in bounds if bounds[device] == its):
            there = SingleDeviceSharding(device, memory_kind=where.memory_kind)
            placed.append(jax.device_put(shard, there).block_until_ready())
    return jax.make_array_from_single_device_arrays(shape, where, placed)


def _bounds(
    index: tuple[slice, ...] | None, shape: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    parts = zip(index or (), shape, strict=True)
    return tuple(part.indices(size)[:2] for part, size in parts)


def _slices(bounds: Sequence[tuple[int, int]]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in bounds)


def _pages(shape: list[int], dtype: np.dtype) -> Shaped[np.ndarray, "..."]:
    """An array in pages of its own, which go back to the OS when it is dropped."""
    # malloc keeps what it gets back, up to 32 MB a piece. The offset: JAX on CPU takes
    # an array at a page's start as it is, and cannot give its memory to an update: the
    # first would need the parameters twice.
    count = math.prod(shape)
    pages = mmap.mmap(-1, (count + 1) * dtype.itemsize)
    return np.frombuffer(pages, dtype, count, offset=dtype.itemsize).reshape(shape)


def abstract_batch(batch: Batch, mesh: Mesh) -> Batch:
    """Shapes and shardings of ``place_batch``'s result, to compile programs with."""
    rows = NamedSharding(mesh, P(axes.SPLIT_OVER["R"]))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows), batch
    )
