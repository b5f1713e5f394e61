"""The TPU's attention: JAX's splash kernel, which skips blocks no query may see."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jaxtyping import Array, Bool, Float

from lpc_jax.models.attention.blocks import KEPT

# The kernel's smallest block, and unit of rows; the largest that divides is taken.
UNIT = kernel.NUM_LANES
_BLOCKS = (512, 384, 256, 128)
_OF_PASSES = ("q", "kv", "q_dkv", "kv_dkv", "q_dq", "kv_dq")


def refuses(platform: str, row_unit: int) -> str | None:
    """What the kernel needs where it cannot run; None where it can."""
    if platform == "tpu" and row_unit % UNIT == 0:
        return None
    return (
        f"a TPU and a packing.row_length that is a multiple of {UNIT}, got a {platform}"
        f" and multiples of {row_unit}. Use 'auto'."
    )


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    mask: Bool[Array, "R T T"],
    *,
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """Softmax attention; rows are multiples of ``UNIT``, ``interpret`` is for tests."""
    length, scale = query.shape[1], 1 / math.sqrt(query.shape[-1])
    block = next(size for size in _BLOCKS if length % size == 0)
    sizes: dict[str, Any] = {f"block_{name}": block for name in _OF_PASSES}
    # A query without a key sees itself, or the kernel would divide by 0.
    mask = mask | (~mask.any(axis=-1, keepdims=True) & jnp.eye(length, dtype=bool))

    def of_row(row: tuple[Array, Array, Array, Array]) -> Float[Array, "T N H"]:
        *heads, seen = row
        by_head = [x.swapaxes(0, 1) for x in heads]
        attend_row = kernel.make_splash_mha(
            seen[None],  # one for all heads
            block_sizes=kernel.BlockSizes(**sizes),
            head_shards=1,
            q_seq_shards=1,
            residual_checkpoint_name=KEPT,
            interpret=interpret,
        )
        # Its maker turns this flag into an array, on which a traced call can't branch.
        attend_row.fwd_mask_info = attend_row.fwd_mask_info._replace(
            is_dynamic_mask=True
        )
        mixed: Any = attend_row(*by_head)
        return mixed.swapaxes(0, 1)

    return jax.lax.map(of_row, (query * scale, key, value, mask))
