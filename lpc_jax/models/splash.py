"""The TPU's attention: JAX's splash kernel under a mask that the batch decides.

Scores never leave the chip's fast memory, and blocks in which no query sees a key are
skipped, forward and backward. Knows nothing of what the mask means.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernel,
)
from jaxtyping import Array, Bool, Float

from lpc_jax.models.block_attention import KEPT

# The kernel's smallest block, of which a row is a whole number. The largest block that
# divides the row is taken.
UNIT = kernel.NUM_LANES
_BLOCKS = (512, 384, 256, 128)


def attend(
    query: Float[Array, "R T N H"],
    key: Float[Array, "R T K H"],
    value: Float[Array, "R T K H"],
    mask: Bool[Array, "R T T"],
    *,
    interpret: bool = False,
) -> Float[Array, "R T N H"]:
    """Softmax attention with scores scaled by 1 / sqrt(H) and summed in fp32.

    Args:
        query: Rotated queries; query head n reads key head ``n // (N / K)``. T is a
            multiple of ``UNIT``, as ``attention.choose`` has seen to.
        key: Rotated keys.
        value: Values.
        mask: Which key (last axis) each query sees. One that sees none sees itself.
        interpret: Runs the kernel's steps one by one, on any device; for tests.
    """
    length, scale = query.shape[1], 1 / math.sqrt(query.shape[-1])
    block = next(size for size in _BLOCKS if length % size == 0)
    sizes = kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    # The kernel would divide by nothing for a query that sees nothing.
    mask = mask | (~mask.any(axis=-1, keepdims=True) & jnp.eye(length, dtype=bool))

    def of_row(
        row: tuple[
            Float[Array, "T N H"],
            Float[Array, "T K H"],
            Float[Array, "T K H"],
            Bool[Array, "T T"],
        ],
    ) -> Float[Array, "T N H"]:
        *heads, seen = row
        by_head = [x.swapaxes(0, 1) for x in heads]
        attend_row = kernel.make_splash_mha(
            seen[None],  # one for all heads
            block_sizes=sizes,
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
