"""A policy's network: a decoder, with or without adapters and a latent."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lpc_jax.models import quantisation
from lpc_jax.models.adapters import BlockAdapters
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.decoder import Decoder, stacked
from lpc_jax.models.latent import LatentHead, PairStates, judged
from lpc_jax.types import CHOSEN, REJECTED, Batch

_ADAPTERS = 1  # folded into a policy's key to seed its adapters


class Network(nnx.Module):
    """pi_theta(y | x, z) = softmax(head (h + z)), eq. 10; z = 0 without a latent."""

    def __init__(
        self,
        decoder: Decoder,
        adapters: BlockAdapters | None,
        latent: LatentHead | None,
    ):
        self.decoder = decoder
        self.adapters = adapters
        self.latent = latent

    def hidden(self, batch: Batch) -> Float[Array, "R T D"]:
        """One decoder pass over rows of whole pairs, unless the batch has its own."""
        if batch.hidden is not None:
            return batch.hidden
        return self.decoder(
            batch.tokens, batch.positions, batch.pair, batch.branch, self.adapters
        )

    def states(self, batch: Batch) -> States:
        """One decoder pass, and the states that are read of it."""
        hidden = self.hidden(batch)
        scored = read_at(hidden, batch.score_from)
        if self.latent is None:
            return States(scored, None, None)
        pairs = pair_states(hidden, batch)
        return States(scored, pairs.prompt, judged(pairs, self.latent.posterior_input))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class States:
    """Last hidden states of a micro-batch where something reads them."""

    scored: Float[Array, "R S D"]  # those that predict an answer's token
    prompt: Float[Array, "R P D"] | None  # for the prior; None without a latent
    judged: Float[Array, "R P inputs"] | None  # for the posterior, likewise


def pair_states(hidden: Float[Array, "R T D"], batch: Batch) -> PairStates:
    """Each pair at its prompt's end, its answers' ends, and in the mean over these."""
    ends = jnp.stack([batch.chosen_end, batch.rejected_end], axis=-1)
    slots = batch.pair_mask.shape[1]
    sides = jnp.stack([batch.branch == CHOSEN, batch.branch == REJECTED], axis=-1)
    of_slot = batch.pair[..., None] == jnp.arange(slots)  # R T P
    share = (of_slot[..., None] & sides[:, :, None, :]) / batch.lengths[:, None]
    mean = jnp.einsum(
        "RTD,RTPA->RPAD",
        hidden,
        share.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    rows = ends.shape[0]
    end = read_at(hidden, ends.reshape(rows, -1)).reshape(rows, slots, 2, -1)
    return PairStates(read_at(hidden, batch.prompt_end), end, mean)


def read_at(
    hidden: Float[Array, "R T D"], index: Int[Array, "R X"]
) -> Float[Array, "R X D"]:
    """Hidden states at given indices of each row."""
    return jnp.take_along_axis(hidden, index[..., None], axis=1)


def build(
    architecture: Architecture,
    *,
    compute_dtype: jnp.dtype,
    attention_backend: str,
    remat: str,
    base: str = "compute",
    adapters: dict[str, Any] | None,
    latent: dict[str, Any] | None,
    key: Array,
) -> Network:
    """A network with random weights; under ``nnx.eval_shape`` only its shapes.

    ``adapters`` and ``latent`` set ``BlockAdapters`` and ``LatentHead``. No part's
    weights depend on another's. With the ``base`` int8 the blocks are quantised.
    """
    decoder_key, latent_key = jax.random.split(key)
    decoder = Decoder(
        architecture,
        compute_dtype=compute_dtype,
        attention_backend=attention_backend,
        remat=remat,
        rngs=nnx.Rngs(decoder_key),
    )
    if base == "int8":
        quantisation.quantise_blocks(decoder.blocks)
    low_rank = head = None
    if adapters is not None:
        low_rank = stacked(
            lambda rngs: BlockAdapters(architecture, **adapters, rngs=rngs),
            layers=architecture.layers,
            key=jax.random.fold_in(key, _ADAPTERS),
        )
    if latent is not None:
        rngs = nnx.Rngs(latent_key)
        head = LatentHead(width=architecture.width, **latent, rngs=rngs)
    return Network(decoder, low_rank, head)
