"""Tiles of the LM head, and how a mesh splits them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from lpc_jax import axes

# Rows of the head in a tile: the gradient of so many stays in a CPU's cache while
# positions are added to it (docs/performance.md).
TILE = 4096
# Tiles have a multiple of so many rows: gradients of other sizes (Llama 3's 4,008) the
# TPU's compiler sums whole on every device before each keeps its part (docs/pods.md).
TILE_UNIT = 32

UNSEEN = -1e30  # below any logit; finite, since -inf less -inf is NaN


@dataclasses.dataclass(frozen=True)
class Split:
    """The mesh axes over which rows, the vocabulary and the head's width lie."""

    rows: tuple[str, ...] | None
    vocabulary: tuple[str, ...] | None
    width: tuple[str, ...] | None

    @classmethod
    def of(cls, tokens: Array, head: Array) -> Split:
        """The split of tokens [chunks R chunk] and head on the mesh that is set."""
        return cls(
            axes.split_over("R", tokens.shape[1]),
            axes.split_over("V", head.shape[0]),
            axes.split_over("D", head.shape[1]),
        )

    def run(
        self,
        part: Callable[..., Any],
        out_specs: Any,
        hidden: Array,
        head: Array,
        *columns: Array,
        moved: Array | None = None,
    ) -> Any:
        """Runs a part on each device's [chunks R ...], head and ``moved`` [M V]."""
        arrays = (hidden, head, *columns)
        specs = (self.chunks, self.head, *(self.chunks for _ in columns))
        if moved is not None:
            arrays, specs = (*arrays, moved), (*specs, P(None, self.vocabulary))
        run = functools.partial(part, split=self)
        if self != Split(None, None, None):
            run = jax.shard_map(
                run, in_specs=specs, out_specs=out_specs, check_vma=False
            )
        return run(*arrays)

    @property
    def head(self) -> P:
        """The head's sharding."""
        return P(self.vocabulary, self.width)

    @property
    def chunks(self) -> P:
        """The sharding of arrays [chunks R ...]."""
        return P(None, self.rows)

    def over_vocabulary(self, sum_or_max: Callable[..., Array], x: Array) -> Array:
        """A sum or maximum over the devices that split the vocabulary."""
        return x if self.vocabulary is None else sum_or_max(x, self.vocabulary)

    def first_token(self, vocabulary: int) -> Int[Array, ""] | int:
        """The token of this device's first row of the head."""
        if self.vocabulary is None:
            return 0
        return jax.lax.axis_index(self.vocabulary) * vocabulary

    def gather(self, tile: Float[Array, "tile part"]) -> Float[Array, "tile D"]:
        """A tile's rows in their whole width."""
        if self.width is None:
            return tile
        return jax.lax.all_gather(tile, self.width, axis=1, tiled=True)

    def scatter_sum(self, tile: Float[Array, "tile D"]) -> Float[Array, "tile part"]:
        """A tile's gradient summed over all rows; each device keeps its part."""
        others = tuple(a for a in self.rows or () if a not in (self.width or ()))
        if others:  # copies of this device's part (data), each of other rows
            tile = jax.lax.psum(tile, others)
        if self.width is None:
            return tile
        if self.rows is None or not set(self.width) <= set(self.rows):
            # Rows are not split over these axes: every device has the whole sum.
            part = tile.shape[1] // jax.lax.axis_size(self.width)
            start = jax.lax.axis_index(self.width) * part
            return jax.lax.dynamic_slice_in_dim(tile, start, part, axis=1)
        return jax.lax.psum_scatter(tile, self.width, scatter_dimension=1, tiled=True)


@dataclasses.dataclass(frozen=True)
class Tile:
    """Rows of the head, and where they are."""

    weight: Float[Array, "tile D"]
    start: Int[Array, ""]  # of ``weight`` in the device's part of the head
    first_token: Int[Array, ""]  # that of the first row
    repeated: Int[Array, ""] | None  # first rows that the tile before has too

    @classmethod
    def of(cls, head: Array, i: Array, dtype: Any, split: Split) -> Tile:
        """The i-th tile of a device's part of the head."""
        vocabulary = head.shape[0]
        _, size = count_and_size(vocabulary)
        # The last tile ends with the vocabulary, and so may repeat rows.
        start = jnp.minimum(i * size, vocabulary - size)
        weight = jax.lax.dynamic_slice_in_dim(head, start, size).astype(dtype)
        first_token = split.first_token(vocabulary) + start
        repeated = i * size - start if vocabulary % size else None
        return cls(split.gather(weight), start, first_token, repeated)

    def logits(self, hidden: Float[Array, "R chunk D"]) -> Float[Array, "R chunk tile"]:
        """In fp32; ``UNSEEN`` for repeated rows."""
        logits = jnp.einsum(
            "RQD,VD->RQV", hidden, self.weight, preferred_element_type=jnp.float32
        )
        if self.repeated is None:
            return logits
        return jnp.where(jnp.arange(logits.shape[-1]) < self.repeated, UNSEEN, logits)

    def exponentials(self, hidden: Array) -> tuple[Array, Array, Array]:
        """Logits, the largest of each position, and exp(logits - largest)."""
        logits = self.logits(hidden)
        largest = logits.max(axis=-1)
        return logits, largest, jnp.exp(logits - largest[..., None])

    def places(self, tokens: Int[Array, "R chunk"]) -> Int[Array, "R chunk"]:
        """The tokens' rows in the tile; -1 for one that is not in it."""
        place = tokens - self.first_token
        first = 0 if self.repeated is None else self.repeated
        within = (place >= first) & (place < self.weight.shape[0])
        return jnp.where(within, place, -1)

    def pick(self, logits: Array, tokens: Array) -> tuple[Array, Array]:
        """The tokens' rows, and their logits where they have one."""
        place = self.places(tokens)
        return place, jnp.take_along_axis(logits, place[..., None], axis=-1)[..., 0]


def count_and_size(vocabulary: int) -> tuple[int, int]:
    """How many tiles, and rows in each."""
    even = -(-vocabulary // -(-vocabulary // TILE))
    size = min(even + -even % TILE_UNIT, vocabulary)
    return -(-vocabulary // size), size


def chunks_to_score(mask: Bool[Array, "chunks R chunk"]) -> Int[Array, ""]:
    """How many chunks, from the first, hold every scored position."""
    scored = jnp.any(mask, axis=(1, 2))
    return jnp.max(jnp.where(scored, jnp.arange(1, scored.shape[0] + 1), 0))


def most_chunks(mask: Bool[Array, "chunks R chunk"], split: Split) -> Int[Array, ""]:
    """The most of any device: where each chunk meets all tiles, all gather together."""
    chunks = chunks_to_score(mask)
    return chunks if split.rows is None else jax.lax.pmax(chunks, split.rows)


def normaliser(
    shift: Float[Array, "tiles ..."], total: Float[Array, "tiles ..."], split: Split
) -> Float[Array, "..."]:
    """log of the sum of exp(shift) * total over the tiles of every device."""
    largest = split.over_vocabulary(jax.lax.pmax, shift.max(axis=0))
    total = jnp.sum(total * jnp.exp(shift - largest), axis=0)
    return largest + jnp.log(split.over_vocabulary(jax.lax.psum, total))
