"""Low-rank adapters over a frozen decoder (Hu et al. 2021, arXiv 2106.09685).

Knows nothing of what is trained, nor how; only what an adapter adds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from lpc_jax.models.architectures import Architecture
from lpc_jax.models.projection import project

# Target -> the part of a block that it is in.
TARGETS = {
    "query": "attention",
    "key": "attention",
    "value": "attention",
    "output": "attention",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


def _axes(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Shape of each target's inputs and outputs."""
    width, mlp = (architecture.width,), (architecture.mlp_width,)
    query = (architecture.query_heads, architecture.head_width)
    key = (architecture.kv_heads, architecture.head_width)
    return {
        "query": (width, query),
        "key": (width, key),
        "value": (width, key),
        "output": (query, width),
        "gate": (width, mlp),
        "up": (width, mlp),
        "down": (mlp, width),
    }


class LowRank(nnx.Module):
    """What is added to x @ W: (alpha / r) x @ a @ b, exactly zero at the start.

    Hu et al. 2021, eq. 3, where a is A transposed and b is B transposed. a is drawn
    uniformly within 1 / sqrt(inputs) of 0 (as the PEFT library does) and b is 0.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        self.scale = alpha / rank
        most = 1 / math.sqrt(math.prod(inputs))
        draw = jax.random.uniform(
            rngs.params(), (*inputs, rank), minval=-most, maxval=most
        )
        self.a = nnx.Param(draw)
        self.b = nnx.Param(jnp.zeros((rank, *outputs)))

    def __call__(self, x: Float[Array, "R T inputs"]) -> Float[Array, "R T *out"]:
        """The addition; a target of several input axes takes them as one."""
        a = self.a.reshape(x.shape[-1], -1)
        return project(project(x, a), self.b[...]) * self.scale


class PartAdapters(nnx.Module):
    """Adapters of one part of a block, by target; others are absent."""

    def __init__(self, adapters: dict[str, LowRank]):
        for target, adapter in adapters.items():
            setattr(self, target, adapter)


def adapted(
    x: Float[Array, "R T inputs"],
    weight: Float[Array, "inputs *out"],
    adapters: PartAdapters | None,
    target: str,
) -> Float[Array, "R T *out"]:
    """x @ weight, plus what the target's adapter adds if it has one."""
    product = project(x, weight)
    adapter: LowRank | None = getattr(adapters, target, None)
    return product if adapter is None else product + adapter(x)


class BlockAdapters(nnx.Module):
    """Adapters of one block.

    Args of the constructor:
        architecture: The decoder's.
        targets: Some of ``TARGETS``.
        rank: r.
        alpha: The addition is scaled by alpha / r.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        targets: Sequence[str],
        rank: int,
        alpha: float,
        rngs: nnx.Rngs,
    ):
        axes = _axes(architecture)

        def part(name: str) -> PartAdapters:
            chosen = [t for t, part in TARGETS.items() if t in targets and part == name]
            return PartAdapters(
                {
                    target: LowRank(*axes[target], rank=rank, alpha=alpha, rngs=rngs)
                    for target in chosen
                }
            )

        self.attention = part("attention")
        self.mlp = part("mlp")


def merge(
    decoder: dict[str, Any], adapters: dict[str, Any], *, scale: float
) -> dict[str, Any]:
    """The decoder's parameters with every adapter added to its weight, in fp32.

    Args:
        decoder: Parameters of a ``Decoder``, blocks stacked on L.
        adapters: Parameters of a policy's adapters, stacked on L.
        scale: alpha / r.

    Returns:
        A tree like ``decoder``; weights without an adapter are the same arrays.
    """
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
                precision=jax.lax.Precision.HIGHEST,
            )
            merged[target] = weight + scale * product.reshape(weight.shape)
        blocks[part] = merged
    return decoder | {"blocks": blocks}
