"""Low-rank adapters over a frozen decoder (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lpc_jax.models import leaves, quantisation
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.projection import project


class LowRank(nnx.Module):
    """(alpha / r) x @ a @ b, which is added to x @ W (Hu et al. 2021, eq. 3)."""

    a: nnx.Param
    b: nnx.Param

    def __init__(
        self, path: str, sizes: Mapping[str, int], scale: float, rngs: nnx.Rngs
    ):
        self.scale = scale
        leaves.fill(self, path, leaves.adapters(), sizes, rngs)

    def __call__(self, x: Float[Array, "R T inputs"]) -> Float[Array, "R T *out"]:
        """The addition; a target of several input axes takes them as one."""
        a = self.a.reshape(x.shape[-1], -1)
        return project(project(x, a), self.b[...]) * self.scale


class BlockAdapters(nnx.Module):
    """Adapters of one block's ``targets``, by part and target, scaled alpha / rank."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        sizes, scale = leaves.sizes(architecture, r=rank), alpha / rank
        self.attention, self.mlp = nnx.Dict(), nnx.Dict()
        for leaf in leaves.TARGETS.values():
            *_, part, target = leaf.path.split("/")
            if target in targets:
                path = f"adapters/{part}/{target}"
                getattr(self, part)[target] = LowRank(path, sizes, scale, rngs)


def adapted(
    x: Float[Array, "R T inputs"],
    module: nnx.Module,
    target: str,
    adapters: nnx.Dict | None,
) -> Float[Array, "R T *out"]:
    """x @ W, with the target's adapter and bias if it has them; input axes as one.

    W is the target, or its int8 values times the scales beside it.
    """
    weight = getattr(module, target)[...]
    outputs = weight.shape[leaves.TARGETS[target].inputs :]
    product = project(x, weight.reshape(x.shape[-1], *outputs))
    scale: nnx.Param | None = getattr(module, f"{target}_scale", None)
    if scale is not None:  # in fp32: a bf16 scale alone would be off by half a step
        product = (product * scale[...]).astype(product.dtype)
    if adapters is not None and target in adapters:
        product = product + adapters[target](x)
    bias: nnx.Param | None = getattr(module, f"{target}_bias", None)
    return product if bias is None else product + bias[...].astype(product.dtype)


def merge(
    decoder: dict[str, Any], adapters: dict[str, Any], *, scale: float
) -> dict[str, Any]:
    """A decoder's parameters with adapters added, in fp32; both are stacked on L.

    Adapters of an int8 decoder are added to what its values and scales stand for.
    """
    decoder = quantisation.dequantised(decoder)
    blocks = dict(decoder["blocks"])
    for part, targets in adapters.items():
        merged = dict(blocks[part])
        for target, factors in targets.items():
            weight = jnp.asarray(merged[target], jnp.float32)
            a, b = factors["a"], factors["b"]
            product = jnp.einsum(
                "LXr,LrY->LXY",
                a.reshape(a.shape[0], -1, a.shape[-1]),
                b.reshape(*b.shape[:2], -1),
                precision=jax.lax.Precision.HIGHEST,  # merged weights are kept
            )
            merged[target] = weight + scale * product.reshape(weight.shape)
        blocks[part] = merged
    return decoder | {"blocks": blocks}
