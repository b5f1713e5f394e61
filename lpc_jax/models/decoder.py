"""The decoder: Llama's blocks, up to the last hidden states."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from lpc_jax import axes
from lpc_jax.models import attention, embedding, leaves, projection, rope
from lpc_jax.models.adapters import BlockAdapters, adapted
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.attention.blocks import KEPT
from lpc_jax.models.attention.table import CUDNN_KERNEL
from lpc_jax.models.rope import Turns, rotate

Module = TypeVar("Module", bound=nnx.Module)
# From queries, keys and values to the mixed values, [R T N H].
Attend = Callable[[Array, Array, Array], Array]

# Results of a block's matrix products, but for attention's scores.
_KEPT = (projection.PRODUCT, KEPT)
_save_kept = jax.checkpoint_policies.save_only_these_names(*_KEPT)


def _save_products(primitive: Any, *values: Any, **params: Any) -> Any:
    """Whether to keep a result; cuDNN's has no name inside JAX's own derivative."""
    is_kernel = primitive.name == CUDNN_KERNEL
    return is_kernel or _save_kept(primitive, *values, **params)


# What the backward pass finds of a block: its input alone, or ``_KEPT`` too, on the
# device or, being needed much later, in the host's memory.
REMAT_POLICIES = {
    "block": None,
    "dots": _save_products,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(_KEPT),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _fill(
    module: nnx.Module, path: str, architecture: Architecture, rngs: nnx.Rngs
) -> None:
    rows, sizes = leaves.decoder(architecture), leaves.sizes(architecture)
    leaves.fill(module, f"decoder{path}", rows, sizes, rngs)


class RmsNorm(nnx.Module):
    """Root-mean-square norm in fp32 (Zhang & Sennrich 2019)."""

    scale: nnx.Param

    def __init__(self, path: str, architecture: Architecture, *, rngs: nnx.Rngs):
        _fill(self, path, architecture, rngs)
        self.epsilon = architecture.norm_epsilon

    def __call__(self, x: Float[Array, "R T *D"]) -> Float[Array, "R T *D"]:
        """x / rms(x) * scale, over the last axes, which are those of the scale."""
        wide, scale = x.astype(jnp.float32), self.scale[...]
        axes_of_norm = tuple(range(-scale.ndim, 0))
        mean_square = jnp.mean(wide * wide, axis=axes_of_norm, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        _fill(self, "/blocks/attention", architecture, rngs)
        self.qk_norm = architecture.qk_norm
        for name in ("query", "key"):
            if self.qk_norm is not None:
                path = f"{name}_{self.qk_norm}_norm"
                norm = RmsNorm(f"/blocks/attention/{path}", architecture, rngs=rngs)
                setattr(self, path, norm)

    def _turned(
        self, x: Float[Array, "R T D"], name: str, turns: Turns, adapters: Any
    ) -> Float[Array, "R T N H"]:
        """Queries or keys, normed if the architecture does so, then turned."""
        heads = adapted(x, self, name, adapters)
        if self.qk_norm is not None:
            heads = getattr(self, f"{name}_{self.qk_norm}_norm")(heads)
        return rotate(heads, turns)

    def __call__(
        self,
        x: Float[Array, "R T D"],
        turns: Turns,
        attend: Attend,
        adapters: nnx.Dict | None,
    ) -> Float[Array, "R T D"]:
        """What attention adds to the stream; ``attend`` mixes the values."""
        query = axes.constrain(self._turned(x, "query", turns, adapters), "R T N H")
        key = axes.constrain(self._turned(x, "key", turns, adapters), "R T K H")
        value = adapted(x, self, "value", adapters)
        mixed = axes.constrain(attend(query, key, value), "R T N H")
        return adapted(mixed.reshape(*mixed.shape[:2], -1), self, "output", adapters)


class Mlp(nnx.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        _fill(self, "/blocks/mlp", architecture, rngs)

    def __call__(
        self, x: Float[Array, "R T D"], adapters: nnx.Dict | None
    ) -> Float[Array, "R T D"]:
        """down(silu(gate x) * up x)."""
        gate = adapted(x, self, "gate", adapters)
        up = adapted(x, self, "up", adapters)
        inner = axes.constrain(jax.nn.silu(gate) * up, "R T F")
        return adapted(inner, self, "down", adapters)


class Block(nnx.Module):
    """Attention, then MLP, each on a normed copy and added to the stream.

    Under ``norm_after`` (OLMo-2) the norm is of what is added instead.
    """

    def __init__(self, architecture: Architecture, *, rngs: nnx.Rngs):
        self.attention_norm = RmsNorm("/blocks/attention_norm", architecture, rngs=rngs)
        self.attention = Attention(architecture, rngs=rngs)
        self.mlp_norm = RmsNorm("/blocks/mlp_norm", architecture, rngs=rngs)
        self.mlp = Mlp(architecture, rngs=rngs)
        self.norm_after = architecture.norm_after

    def __call__(
        self,
        x: Float[Array, "R T D"],
        turns: Turns,
        attend: Attend,
        adapters: BlockAdapters | None,
    ) -> Float[Array, "R T D"]:
        """The stream after this block."""
        of_attention = None if adapters is None else adapters.attention
        of_mlp = None if adapters is None else adapters.mlp

        def attended(x: Array) -> Array:
            return self.attention(x, turns, attend, of_attention)

        def transformed(x: Array) -> Array:
            return self.mlp(x, of_mlp)

        for norm, sublayer in (
            (self.attention_norm, attended),
            (self.mlp_norm, transformed),
        ):
            x = x + (norm(sublayer(x)) if self.norm_after else sublayer(norm(x)))
        return axes.constrain(x, "R T D")


def stacked(make: Callable[[nnx.Rngs], Module], *, layers: int, key: Array) -> Module:
    """Modules of all layers as one, each leaf with a leading L axis."""
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    states = jax.vmap(lambda key: nnx.split(make(nnx.Rngs(key)))[1])(
        jax.random.split(key, layers)
    )
    return nnx.merge(graph, states)


class Decoder(nnx.Module):
    """Tokens to last hidden states, after the final norm."""

    embedding: nnx.Param
    head: nnx.Param

    def __init__(
        self,
        architecture: Architecture,
        *,
        compute_dtype: jnp.dtype,
        attention_backend: str,
        remat: str,
        rngs: nnx.Rngs,
    ):
        self.architecture = architecture
        self.compute_dtype = compute_dtype
        self.attention_backend = attention_backend
        self.remat = remat
        rows, sizes = leaves.decoder(architecture), leaves.sizes(architecture)
        # Drawn in this order: the embedding, the blocks, the head if there is one.
        leaves.fill(self, "decoder", rows[:1], sizes, rngs)
        # One scan runs the stack: one block is compiled whatever the depth.
        self.blocks = stacked(
            lambda rngs: Block(architecture, rngs=rngs),
            layers=architecture.layers,
            key=rngs.params(),
        )
        self.final_norm = RmsNorm("/final_norm", architecture, rngs=rngs)
        leaves.fill(self, "decoder", rows[1:], sizes, rngs)

    @property
    def head_weight(self) -> Float[Array, "V D"]:
        """The LM head, which a tied architecture shares with the embedding."""
        return self.embedding[...] if self.architecture.tied else self.head[...]

    @property
    def turned_layers(self) -> Bool[np.ndarray, "L"] | None:
        """Which layers have RoPE; None: all."""
        layers, unturned = range(self.architecture.layers), self.architecture.unturned
        return np.asarray([i not in unturned for i in layers]) if unturned else None

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        positions: Int[Array, "R T"],
        pair: Int[Array, "R T"],
        branch: Int[Array, "R T"],
        adapters: BlockAdapters | None = None,
    ) -> Float[Array, "R T D"]:
        """Hidden states h of LPC's equations, of tokens as in ``Batch``."""
        layout = attention.layout(
            positions,
            pair,
            branch,
            sliding_window=self.architecture.sliding_window,
            backend=self.attention_backend,
        )
        longest = rope.longest_of_pair(self.architecture, positions, pair)
        turns = rope.turns(self.architecture, positions, longest)
        attend = functools.partial(attention.attend, layout=layout)
        # Cast after: the table's gradient is summed in its own precision.
        x = embedding.look_up(self.embedding[...], tokens).astype(self.compute_dtype)
        x = axes.constrain(x, "R T D")
        # Adapters that are None have an empty state.
        graph, stacked = nnx.split((self.blocks, adapters))

        def run_block(x: Array, layer: tuple[nnx.State, Any]) -> tuple[Array, None]:
            state, is_turned = layer
            block, its_adapters = nnx.merge(graph, state)
            return block(x, turns.only(is_turned), attend, its_adapters), None

        if self.remat != "none":
            run_block = jax.checkpoint(
                run_block, prevent_cse=False, policy=REMAT_POLICIES[self.remat]
            )
        x, _ = jax.lax.scan(run_block, x, (stacked, self.turned_layers))
        return self.final_norm(x)
