"""Low-rank adapters over a frozen decoder (Hu et al. 2021, arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lpc_jax.models import leaves
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.projection import project


class LowRank(nnx.Module):
    """(alpha / r) x @ a @ b, which is added to x @ W (Hu et al. 2021, eq. 3)."""

    a: nnx.Param
    b: nnx.Param

    def __init__(
        self,
        path: str,
        rows: Sequence[leaves.Leaf],
        sizes: Mapping[str, int],
        *,
        scale: float,
        rngs: nnx.Rngs,
    ):
        self.scale = scale
        leaves.fill(self, path, rows, sizes, rngs)

    def __call__(self, x: Float[Array, "R T inputs"]) -> Float[Array, "R T *out"]:
        """The addition; a target of several input axes takes them as one."""
        a = self.a.reshape(x.shape[-1], -1)
        return project(project(x, a), self.b[...]) * self.scale


class PartAdapters(nnx.Module):
    """Adapters of one part of a block, by target; others are absent."""

    def __init__(self, adapters: Mapping[str, LowRank]):
        for target, adapter in adapters.items():
            setattr(self, target, adapter)


def adapted(
    x: Float[Array, "R T inputs"],
    module: nnx.Module,
    target: str,
    adapters: PartAdapters | None,
) -> Float[Array, "R T *out"]:
    """x @ W, with the target's adapter and bias if it has them; input axes as one."""
    weight = getattr(module, target)[...]
    outputs = weight.shape[leaves.TARGETS[target].inputs :]
    product = project(x, weight.reshape(x.shape[-1], *outputs))
    adapter: LowRank | None = getattr(adapters, target, None)
    if adapter is not None:
        product = product + adapter(x)
    bias: nnx.Param | None = getattr(module, f"{target}_bias", None)
    return product if bias is None else product + bias[...].astype(product.dtype)


class BlockAdapters(nnx.Module):
    """Adapters of one block's ``targets``, scaled by alpha / rank."""

    def __init__(
        self,
        architecture: Architecture,
        *,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        rows, sizes = leaves.adapters(targets), leaves.sizes(architecture, r=rank)
        parts: dict[str, dict[str, LowRank]] = {"attention": {}, "mlp": {}}
        for path in dict.fromkeys(leaf.path.rpartition("/")[0] for leaf in rows):
            _, part, target = path.split("/")
            parts[part][target] = LowRank(
                path, rows, sizes, scale=alpha / rank, rngs=rngs
            )
        self.attention = PartAdapters(parts["attention"])
        self.mlp = PartAdapters(parts["mlp"])


def merge(
    decoder: dict[str, Any], adapters: dict[str, Any], *, scale: float
) -> dict[str, Any]:
    """A decoder's parameters with adapters added, in fp32; both are stacked on L."""
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
