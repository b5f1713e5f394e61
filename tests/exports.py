"""Systems with codes that matter, of the golden models, and what they answer.

Codes are as long as hidden states, and nothing of the latent is left at 0 or 1, so that
a part which an export forgot would show in the answers.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.runtime import loading, policy
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

GOLDEN = Path(__file__).parent / "golden"
MODELS = ("tiny_llama", "tiny_llama31", "tiny_mistral", "tiny_llama_tied")
LATENT = cfg.Latent(num_codes=6, hidden_width=5)
# Rows of one shape, so that one program serves all lengths.
_LENGTH = 64


def plain(name: str) -> Policy:
    """A golden model, in fp32 on one device, with the golden tokenizer."""
    folder = GOLDEN / name
    return loading.load(
        str(folder),
        mesh=sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices()[:1]),
        model={"tokenizer": str(GOLDEN / "tiny_tokenizer")},
        dtype=jnp.dtype("float32"),
    )


def with_codes(name: str, latent: cfg.Latent = LATENT, *, seed: int = 0) -> Policy:
    """The same under LPC, with a random latent."""
    base = plain(name)
    graph, shapes = policy.shapes(
        base.architecture, base.compute, latent=latent, adapters=None
    )
    rng = np.random.default_rng(seed)

    def drawn(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.normal(size=leaf.shape)
        if "input_spread" in str(path):
            values = 0.5 + np.abs(values)
        if "output_kernel" in str(path):
            values *= 3  # beliefs far from uniform
        return jnp.asarray(values, leaf.dtype)

    params = base.params | {
        "latent": jax.tree_util.tree_map_with_path(drawn, shapes["latent"])
    }
    return dataclasses.replace(base, graph=graph, params=params, latent=latent)


def hidden_states(of: Policy, tokens: Sequence[int]) -> np.ndarray:
    """After the final norm, [tokens, D]; one whole forward pass."""
    return np.asarray(_padded(of, tokens))[: len(tokens)]


def _padded(of: Policy, tokens: Sequence[int]) -> jax.Array:
    row = np.zeros((1, _LENGTH), np.int32)
    row[0, : len(tokens)] = tokens
    return _forward(of.graph, of.params, jnp.asarray(row))[0]


@functools.partial(jax.jit, static_argnums=0)
def _forward(graph: nnx.GraphDef, params: dict, row: jax.Array) -> jax.Array:
    positions = jnp.arange(_LENGTH)[None]
    same = jnp.zeros_like(row)
    return nnx.merge(graph, params).decoder(row, positions, same, same)


def vector(of: Policy, prompt: Sequence[int], steering: Steering) -> np.ndarray:
    """z of a prompt, [D]."""
    latent = of.network.latent
    assert latent is not None
    logits = latent.prior(jnp.asarray(hidden_states(of, prompt)[-1]))
    weights = steering.weights(logits, jax.random.key(0))
    return np.asarray(latent.codes(logits, weights).vector)


def logp(of: Policy, tokens: Sequence[int], z: np.ndarray) -> np.ndarray:
    """Log-probabilities of every next token under z, [tokens, V]."""
    decoder = of.params["decoder"]
    head = np.asarray(decoder.get("head", decoder["embedding"]))
    return scipy.special.log_softmax((hidden_states(of, tokens) + z) @ head.T, axis=-1)


def greedy(of: Policy, prompt: Sequence[int], z: np.ndarray, count: int) -> list[int]:
    """The likeliest answer token by token, with its end or cut after ``count``."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logp(of, tokens, z)[-1])))
        if tokens[-1] == of.tokenizer.eos_token_id:
            break
    return tokens[len(prompt) :]
