"""The decoder with a cache of keys and values: a few new tokens of each row at a time.

Rows are padded on the left, so that all of them grow at one place.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lpc_jax import axes
from lpc_jax.models import embedding, rope
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.decoder import Block, Decoder
from lpc_jax.types import HostOrDevice


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Rotated keys, and values, of the tokens so far: one array a layer."""

    keys: tuple[Float[Array, "R T K H"], ...]
    values: tuple[Float[Array, "R T K H"], ...]
    longest: Int[HostOrDevice, "R"]  # tokens that a row may come to; see ``rope.turns``


class CachedDecoder(nnx.Module):
    """A ``Decoder`` with its layers apart; it shares the other parameters."""

    def __init__(self, decoder: Decoder):
        self.architecture: Architecture = decoder.architecture
        self.compute_dtype = decoder.compute_dtype
        self.embedding = decoder.embedding
        graph, stacked = nnx.split(decoder.blocks)
        # A loop over stacked layers copies each before it is used, which on a CPU takes
        # longer than one token's products with it. A small program a leaf cuts out its
        # layers; one for the decoder would compile for 1.6 s.
        cut = functools.partial(jax.lax.dynamic_index_in_dim, keepdims=False)
        self.blocks = nnx.List(
            nnx.merge(graph, jax.tree.map(lambda leaf, i=i: cut(leaf, i), stacked))
            for i in range(self.architecture.layers)
        )
        self.final_norm = decoder.final_norm
        if not self.architecture.tied:
            self.head = decoder.head

    head_weight = Decoder.head_weight

    def empty_cache(self, longest: Int[HostOrDevice, "R"], slots: int) -> Cache:
        """Room for ``slots`` tokens in each row; ``longest`` is the cache's."""
        architecture = self.architecture
        shape = (len(longest), slots, architecture.kv_heads, architecture.head_width)
        keys, values = (
            tuple(
                axes.constrain(jnp.zeros(shape, self.compute_dtype), "R T K H")
                for _ in range(architecture.layers)
            )
            for _ in range(2)
        )
        return Cache(keys, values, jnp.asarray(longest))

    def __call__(
        self,
        tokens: Int[Array, "R T"],
        cache: Cache,
        *,
        start: Int[Array, ""],  # slot of the first new token, in all rows
        first: Int[Array, "R"],  # slot of each row's first token, after padding
    ) -> tuple[Float[Array, "R T D"], Cache]:
        """Hidden states of new tokens, and the cache with them."""
        slots = start + jnp.arange(tokens.shape[1])
        positions = slots - first[:, None]
        turns = rope.turns(self.architecture, positions, cache.longest[:, None])
        cached = jnp.arange(cache.keys[0].shape[1])
        seen = (cached >= first[:, None, None]) & (cached <= slots[:, None])
        if self.architecture.sliding_window is not None:
            seen &= cached > slots[:, None] - self.architecture.sliding_window
        x = embedding.look_up(self.embedding[...], tokens).astype(self.compute_dtype)
        x = axes.constrain(x, "R T D")
        keys: list[Array] = []
        values: list[Array] = []

        def attend(query: Array, key: Array, value: Array) -> Array:
            # The layers call it in turn: as many are behind as have been appended.
            layer, at = len(keys), (0, start, 0, 0)
            keys.append(jax.lax.dynamic_update_slice(cache.keys[layer], key, at))
            values.append(jax.lax.dynamic_update_slice(cache.values[layer], value, at))
            return jax.nn.dot_product_attention(
                query, keys[-1], values[-1], mask=seen[:, None]
            )

        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            turned = i not in self.architecture.unturned
            x = block(x, turns.only(turned), attend, None)
        return self.final_norm(x), Cache(tuple(keys), tuple(values), cache.longest)
