"""Programs of generation: prompts into a cache, z, then token after token.

z is chosen once, at the prompt's end, and added before the head at every position of
the answer, as in training (Gong et al. 2025, eq. 10).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32, UInt32

from lpc_jax import axes
from lpc_jax.generation.sampling import Choice
from lpc_jax.models.cached import Cache, CachedDecoder
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import draws
from lpc_jax.types import HostOrDevice

Ids = Int32[np.ndarray, "_"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Answers that are being written: ``count`` tokens of each so far."""

    cache: Cache
    first: Int32[HostOrDevice, "R"]  # the slot of each row's first token
    slot: Int32[HostOrDevice, ""]  # of the token to be read next
    tokens: Int32[HostOrDevice, "R T"]
    count: Int32[HostOrDevice, ""]
    done: Bool[HostOrDevice, "R"]
    choice: Choice
    ends: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    vector: Float[Array, "R D"] | None = None  # z
    keys: Any = None  # a row's own randomness


def lay_apart(graph: Any, params: Any) -> tuple[Any, Any]:
    """Decoder, its layers apart, and latent of a network, for ``nnx.merge``."""
    network = nnx.merge(graph, params)
    return nnx.split((CachedDecoder(network.decoder), network.latent))


@functools.partial(jax.jit, static_argnums=0, static_argnames="slots")
def empty_cache(
    graph: Any, params: Any, longest: Int[HostOrDevice, "R"], *, slots: int
) -> Cache:
    """Room for prompts and answers."""
    decoder, _ = nnx.merge(graph, params)
    return decoder.empty_cache(longest, slots)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def read(
    graph: Any,
    params: Any,
    cache: Cache,
    tokens: Int[Array, "R T"],
    start: Int[Array, ""],
    first: Int[Array, "R"],
) -> tuple[Cache, Float[Array, "R D"]]:
    """The cache with the prompts' next tokens, and the last hidden states."""
    decoder, _ = nnx.merge(graph, params)
    hidden, cache = decoder(tokens, cache, start=start, first=first)
    return cache, hidden[:, -1]


@functools.partial(
    jax.jit, static_argnums=0, static_argnames="steering", donate_argnums=2
)
def begin(
    graph: Any,
    params: Any,
    state: State,
    hidden: Float[Array, "R D"],
    seed: UInt32[Array, ""],
    numbers: Int32[Array, "R"],
    seeds: UInt32[Array, "R"],
    *,
    steering: Steering,
) -> tuple[State, Float[Array, "R C"] | None, Float[Array, "R C"] | None]:
    """Chooses z and the first token; also gives the prior and the codes' weights.

    ``numbers`` of prompts seed their tokens, ``seeds`` the draws of z.
    """
    decoder, latent = nnx.merge(graph, params)
    key = jax.random.key(seed)
    prior = weights = vector = None
    if latent is not None:
        codes = draws.codes(latent, hidden, steering, key, seeds)
        prior, weights = jax.nn.softmax(codes.logits, axis=-1), codes.weights
        vector = codes.vector
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(numbers)
    state = dataclasses.replace(state, vector=vector, keys=keys)
    return _with_token(decoder, state, hidden), *_everywhere(prior, weights)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def write(graph: Any, params: Any, state: State, limit: Int[Array, ""]) -> State:
    """Writes tokens until there are ``limit`` or every row has ended."""
    decoder, _ = nnx.merge(graph, params)

    def goes_on(state: State) -> Array:
        return (state.count < limit) & ~jnp.all(state.done)

    def add(state: State) -> State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        hidden, cache = decoder(last, state.cache, start=state.slot, first=state.first)
        state = dataclasses.replace(state, cache=cache, slot=state.slot + 1)
        return _with_token(decoder, state, hidden[:, 0])

    return jax.lax.while_loop(goes_on, add, state)


def _with_token(
    decoder: CachedDecoder, state: State, hidden: Float[Array, "R D"]
) -> State:
    """One more token in each row: pi(y_t | x, y_<t, z) = softmax(head (h + z))."""
    if state.vector is not None:
        hidden = hidden + state.vector.astype(hidden.dtype)
    head = decoder.head_weight.astype(hidden.dtype)
    logits = jnp.einsum("RD,VD->RV", hidden, head, preferred_element_type=jnp.float32)
    logits = axes.constrain(logits, "R V")
    # Of the row's key and the count alone: the batch does not change a draw.
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(state.keys)
    # A row that has ended repeats an end token, which the host cuts off.
    token = jnp.where(state.done, state.ends[0], state.choice.pick(logits, keys))
    tokens = jax.lax.dynamic_update_slice_in_dim(
        state.tokens, token[:, None], state.count, axis=1
    )
    done = state.done | jnp.isin(token, jnp.asarray(state.ends))
    tokens, count, done = _everywhere(tokens, state.count + 1, done)
    return dataclasses.replace(state, tokens=tokens, count=count, done=done)


def _everywhere(*arrays: Array | None) -> Any:
    """Replicated on all devices, so that every process can read them."""
    return jax.lax.with_sharding_constraint(arrays, PartitionSpec())
