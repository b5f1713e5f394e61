"""A frozen decoder's block matrices as int8, with a scale for each output channel.

x @ (values * scale) is (x @ values) * scale: the product reads int8, and no matrix is
kept in a wider dtype. Embedding, head, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from lpc_jax.models import leaves
from lpc_jax.types import HostOrDevice

# Steps from zero to a channel's largest value. -128 is left out: as many below zero.
STEPS = 127


def quantise(
    weight: Float[HostOrDevice, "..."], *, inputs: int
) -> tuple[Int8[HostOrDevice, "..."], Float32[HostOrDevice, "..."]]:
    """Values and scales, whose product is within half a scale of a layer's weight.

    A scale is of all first ``inputs`` axes, |weight|'s maximum there over ``STEPS``; of
    weights that are not finite it isn't either.
    """
    xp: Any = np if isinstance(weight, np.ndarray) else jnp
    wide = weight.astype(xp.float32)
    scale = xp.max(xp.abs(wide), axis=tuple(range(inputs))) / xp.float32(STEPS)
    usable = xp.isfinite(scale) & (scale > 0)
    values = xp.rint(wide / xp.where(usable, scale, xp.float32(1)))
    values = xp.where(usable, xp.clip(values, -STEPS, STEPS), 0)
    return values.astype(xp.int8), scale


def dequantise(
    values: Int8[Array, "L *axes"], scale: Float32[Array, "L *out"]
) -> Float32[Array, "L *axes"]:
    """The weights of all layers that ``values`` and ``scale`` stand for."""
    inputs = (1,) * (values.ndim - scale.ndim)
    return values * scale.reshape(scale.shape[0], *inputs, *scale.shape[1:])


def _targets() -> Iterator[tuple[str, str, int]]:
    for leaf in leaves.TARGETS.values():
        *_, part, target = leaf.path.split("/")
        yield part, target, leaf.inputs


def quantise_blocks(blocks: nnx.Module) -> None:
    """Replaces the matrices of a decoder's stacked blocks by values and scales."""
    for part, target, inputs in _targets():
        module = getattr(blocks, part)
        quantise_layers = jax.vmap(lambda w, inputs=inputs: quantise(w, inputs=inputs))
        values, scale = quantise_layers(getattr(module, target)[...])
        setattr(module, target, nnx.Param(values))
        setattr(module, f"{target}_scale", nnx.Param(scale))


def dequantised(decoder: dict[str, Any]) -> dict[str, Any]:
    """A decoder's parameters without scales: quantised matrices again in fp32."""
    blocks = dict(decoder["blocks"])
    for part, target, _ in _targets():
        module = dict(blocks[part])
        if (scale := module.pop(f"{target}_scale", None)) is not None:
            module[target] = dequantise(module[target], scale)
        blocks[part] = module
    return decoder | {"blocks": blocks}
