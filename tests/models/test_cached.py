"""The cached decoder says what the decoder says of whole rows."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lpc_jax.models import network
from lpc_jax.models.cached import CachedDecoder
from tests import tiny

LENGTHS = (5, 12, 9)
SLOTS = 20


def build(**changes):
    architecture = dataclasses.replace(tiny.ARCHITECTURE, **changes)
    return network.build(
        architecture,
        compute_dtype=jnp.dtype("float32"),
        attention_backend="xla",
        remat="none",
        adapters=None,
        latent=None,
        key=jax.random.key(0),
    ).decoder


@pytest.mark.parametrize("pieces", [(12,), (4, 8), (7, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("changes", [{}, {"sliding_window": 4}, {"tied": True}])
def test_pieces_of_left_padded_rows_give_the_hidden_states_of_each_row(changes, pieces):
    decoder = build(**changes)
    rng = np.random.default_rng(0)
    vocabulary = decoder.architecture.vocabulary
    rows = [rng.integers(1, vocabulary, length) for length in LENGTHS]
    longest = max(LENGTHS)
    first = np.asarray([longest - length for length in LENGTHS])
    # Junk in the padding: nothing of it may be seen.
    tokens = rng.integers(1, vocabulary, (len(rows), longest))
    for row, (start, ids) in enumerate(zip(first, rows, strict=True)):
        tokens[row, start:] = ids
    cached = CachedDecoder(decoder)
    cache = cached.empty_cache(np.full(len(rows), SLOTS), SLOTS)
    start, found = 0, []
    for size in pieces:
        hidden, cache = cached(
            jnp.asarray(tokens[:, start : start + size]),
            cache,
            start=jnp.int32(start),
            first=jnp.asarray(first),
        )
        found.append(hidden)
        start += size
    hidden = np.concatenate(found, axis=1)
    for row, (begin, ids) in enumerate(zip(first, rows, strict=True)):
        one = jnp.zeros((1, len(ids)), jnp.int32)
        positions = jnp.arange(len(ids))[None]
        whole = decoder(jnp.asarray(ids)[None], positions, one, one)
        np.testing.assert_allclose(hidden[row, begin:], whole[0], rtol=1e-4, atol=1e-5)


def test_the_layers_are_shared_not_drawn_anew():
    decoder = build()
    state = nnx.to_pure_dict(nnx.split(CachedDecoder(decoder))[1])
    up = np.asarray(decoder.blocks.mlp.up[...])
    for layer in range(decoder.architecture.layers):
        np.testing.assert_array_equal(state["blocks"][layer]["mlp"]["up"], up[layer])
