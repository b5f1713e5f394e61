"""Jitted forward passes, cached by graph, mesh and settings."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt32

from lpc_jax import objective
from lpc_jax.losses import sequence
from lpc_jax.models.latent import Steering
from lpc_jax.models.network import Network, read_at
from lpc_jax.runtime import draws
from lpc_jax.types import NO_PAIR, PADDING, PROMPT, Batch, HostOrDevice

_KEPT = 16  # programs cached of a kind


def _program(forward: Callable[..., Any]) -> Callable[..., Callable[..., Any]]:
    """From a forward pass to ``(graph, mesh, **statics) -> jitted program``."""

    @functools.lru_cache(maxsize=_KEPT)
    def make(
        graph: nnx.GraphDef[Network], mesh: Mesh, **statics: Any
    ) -> Callable[..., Any]:
        # Replicated, so that every process reads all of it.
        @functools.partial(jax.jit, out_shardings=NamedSharding(mesh, PartitionSpec()))
        def program(params: dict[str, Any], *arrays: Any) -> Any:
            # Parameters are arguments, so that no program keeps a policy's alive.
            return forward(nnx.merge(graph, params), *arrays, **statics)

        return program

    return functools.wraps(forward)(make)


@_program
def score(
    network: Network,
    batch: Batch,
    *,
    steering: Steering | None = None,
    seed: int = 0,
    chunk: int,
) -> Float[Array, "R P 2"]:
    """Log-probability of each answer, z by ``steering``; None: without codes."""
    key = jax.random.key(seed)
    return objective.score_inference(
        network, batch, steering=steering, key=key, chunk=chunk
    ).logp


@_program
def score_under(
    network: Network, batch: Batch, mixes: Float[Array, "M C"], *, chunk: int
) -> Float[Array, "R P M 2"]:
    """Log-probability of each answer under each mix of the codes."""
    logp = objective.logp_under(network, batch, mixes, chunk=chunk)
    return jnp.moveaxis(logp, 0, 2)


@_program
def believe(
    network: Network, batch: Batch
) -> tuple[Float[Array, "R P C"], Float[Array, "R P C"], Float[Array, "R P D"]]:
    """Logits of prior and posterior, and z of the prior's mean; runs no LM head."""
    states, latent = network.states(batch), network.latent
    assert latent is not None
    assert states.prompt is not None
    assert states.judged is not None
    prior, posterior = latent.prior(states.prompt), latent.posterior(states.judged)
    vector = latent.codes(prior, jax.nn.softmax(prior, axis=-1)).vector
    return prior, posterior, vector


@_program
def latent_inputs(
    network: Network, batch: Batch
) -> tuple[Float[Array, "R P D"], Float[Array, "R P inputs"]]:
    """The inputs of prior and posterior for each pair."""
    states = network.states(batch)
    assert states.prompt is not None
    assert states.judged is not None
    return states.prompt, states.judged


@_program
def latent_layers(
    network: Network, inputs: dict[str, Float[Array, "B _"]]
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Standardised inputs and hidden layer of the latent's networks, by their names."""
    networks = {name: getattr(network.latent, name) for name in inputs}
    standard = {name: mlp.standard(inputs[name]) for name, mlp in networks.items()}
    return standard, {name: networks[name].hidden(x) for name, x in standard.items()}


@_program
def hidden(network: Network, batch: Batch) -> Float[Array, "R T D"]:
    """The decoder's last hidden states."""
    return network.hidden(batch)


@_program
def code_weights(
    network: Network,
    tokens: Int[Array, "R T"],
    length: Int[Array, ""],
    seeds: UInt32[Array, "R"],
    *,
    steering: Steering,
) -> Float[Array, "R C"]:
    """The codes' weights at the end of prompts of one ``length``."""
    positions, same = jnp.arange(tokens.shape[1])[None], jnp.zeros_like(tokens)
    # Padding is on the right, where no token of the prompt looks.
    end = network.decoder(tokens, positions, same, same)[:, length - 1]
    assert network.latent is not None
    return draws.codes(network.latent, end, steering, jax.random.key(0), seeds).weights


@_program
def code_bias(network: Network) -> Float[Array, "C V"]:
    """Logits that each code alone adds to every token of an answer, in fp32.

    LMHead(h + e_k) = LMHead(h) + LMHead(e_k) (LPC eq. 10).
    """
    assert network.latent is not None
    return jnp.einsum(
        "CD,VD->CV",
        network.latent.codebook[...].astype(jnp.float32),
        network.decoder.head_weight.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )


class Continuations(NamedTuple):
    """Rows of a context and its continuations; an unused row is padding."""

    tokens: Int[HostOrDevice, "R T"]
    positions: Int[HostOrDevice, "R T"]  # every continuation goes on from the context
    branch: Int[HostOrDevice, "R T"]  # PROMPT, PADDING, or a number of a continuation
    seed: UInt32[HostOrDevice, "R"]  # of the context alone
    score_from: Int[HostOrDevice, "R S"]  # index of the hidden state that predicts
    score_token: Int[HostOrDevice, "R S"]


@_program
def score_continuations(
    network: Network, rows: Continuations, key: Array, *, steering: Steering, chunk: int
) -> tuple[Float[Array, "R S"], Bool[Array, "R S"]]:
    """Log-probability of each scored id given z (eq. 10), and whether it is greedy."""
    pair = jnp.where(rows.branch == PADDING, NO_PAIR, 0)
    hidden = network.decoder(rows.tokens, rows.positions, pair, rows.branch)
    scored = read_at(hidden, rows.score_from)
    if network.latent is not None:
        end = jnp.sum(rows.branch == PROMPT, axis=1, keepdims=True) - 1
        at_end = read_at(hidden, end)[:, 0]
        codes = draws.codes(network.latent, at_end, steering, key, rows.seed)
        # z is for what the prior could not read: ids after the context's end.
        has_z = (rows.score_from >= end)[..., None]
        vector = jnp.where(has_z, codes.vector[:, None], 0.0)
        scored = scored + vector.astype(scored.dtype)
    return sequence.token_logp_and_greedy(
        scored,
        network.decoder.head_weight,
        rows.score_token,
        jnp.ones_like(rows.score_token, bool),  # what is not read is not masked either
        chunk=chunk,
    )
