"""The policy: a decoder, adapters in it or none, and a latent over it or none.

Knows nothing of losses or schedules.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from lpc_jax.models.adapters import BlockAdapters
from lpc_jax.models.architectures import Architecture
from lpc_jax.models.decoder import Decoder, stacked
from lpc_jax.models.latent import LatentHead
from lpc_jax.types import Batch

# Folded into a policy's key to seed its adapters.
_ADAPTERS = 1


class Policy(nnx.Module):
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
        """One decoder pass over rows of whole pairs."""
        return self.decoder(
            batch.tokens, batch.positions, batch.pair, batch.branch, self.adapters
        )


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
    adapters: dict[str, Any] | None,
    latent: dict[str, Any] | None,
    key: Array,
) -> Policy:
    """A policy with random weights; under ``nnx.eval_shape`` only its shapes.

    Args:
        architecture: The decoder's.
        compute_dtype: Of matrix products.
        attention_backend: From ``attention.choose``.
        remat: As ``model.remat``.
        adapters: ``targets``, ``rank`` and ``alpha`` of the adapters, or None.
        latent: ``num_codes``, ``hidden_width`` (None is D) and ``codebook_scale`` of
            the latent head, or None.
        key: Seeds the weights; none of the three parts' depend on another's.
    """
    decoder_key, latent_key = jax.random.split(key)
    decoder = Decoder(
        architecture,
        compute_dtype=compute_dtype,
        attention_backend=attention_backend,
        remat=remat,
        rngs=nnx.Rngs(decoder_key),
    )
    low_rank = head = None
    if adapters is not None:
        adapter_key = jax.random.fold_in(key, _ADAPTERS)
        low_rank = stacked(
            lambda rngs: BlockAdapters(architecture, **adapters, rngs=rngs),
            layers=architecture.layers,
            key=adapter_key,
        )
    if latent is not None:
        head = LatentHead(
            width=architecture.width,
            hidden_width=latent["hidden_width"] or architecture.width,
            num_codes=latent["num_codes"],
            codebook_scale=latent["codebook_scale"],
            rngs=nnx.Rngs(latent_key),
        )
    return Policy(decoder, low_rank, head)
