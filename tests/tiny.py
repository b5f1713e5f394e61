"""Small random policies, pairs and configs that tests share."""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.models import network
from lpc_jax.models.architectures import Architecture

ARCHITECTURE = Architecture(
    family="llama",
    vocabulary=97,
    width=32,
    layers=2,
    query_heads=4,
    kv_heads=2,
    head_width=8,
    mlp_width=48,
    norm_epsilon=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    sliding_window=None,
    tied=False,
    context_length=128,
)
LATENT = {
    "num_codes": 6,
    "hidden_width": None,
    "codebook_scale": 0.5,
    "posterior_input": "both",
}
# Random weights this large make attention and logits far from uniform.
SHARPENING = 4.0


def config(**changes: Any) -> cfg.Config:
    """A config for the tiny policy; changes replace whole sections."""
    sections: dict[str, Any] = {
        "name": "tiny",
        "model": cfg.Model(path="unused", score_chunk=8),
        "loss": cfg.Simpo(beta=2.0, gamma=0.5),
        "latent": cfg.Latent(num_codes=6),
        "data": cfg.Data(train="unused"),
        "optimizer": cfg.Optimizer(
            learning_rate=1e-3, schedule="constant", warmup_fraction=0.0
        ),
    }
    return cfg.Config(**(sections | changes))


def split_policy(
    architecture: Architecture = ARCHITECTURE,
    latent: dict[str, Any] | None = LATENT,
    *,
    adapters: dict[str, Any] | None = None,
    seed: int = 0,
    remat: str = "block",
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    """Graph and parameters of a random policy, sharpened."""
    graph, params = _split_policy(
        architecture, json.dumps(latent), json.dumps(adapters), seed, remat
    )
    return graph, jax.tree.map(lambda leaf: leaf, params)  # dicts of the caller's own


@functools.lru_cache(maxsize=16)
def _split_policy(
    architecture: Architecture, latent: str, adapters: str, seed: int, remat: str
) -> tuple[nnx.GraphDef, dict[str, Any]]:
    def make(key: jax.Array) -> network.Network:
        return network.build(
            architecture,
            compute_dtype=jnp.dtype("float32"),
            attention_backend="blocks",
            remat=remat,
            adapters=json.loads(adapters),
            latent=json.loads(latent),
            key=key,
        )

    graph, _ = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
    params = jax.jit(lambda key: nnx.to_pure_dict(nnx.split(make(key))[1]))(
        jax.random.key(seed)
    )
    params["decoder"] = {
        name: jax.tree.map(lambda leaf: leaf * SHARPENING, part)
        if name != "final_norm"
        else part
        for name, part in params["decoder"].items()
    }
    return graph, params


def pairs(count: int, *, seed: int = 0, longest: int = 12) -> list[TokenizedPair]:
    """Random pairs; prompts and answers of 1 to ``longest`` tokens."""
    rng = np.random.default_rng(seed)

    def ids() -> np.ndarray:
        length = rng.integers(1, longest + 1)
        return rng.integers(0, ARCHITECTURE.vocabulary, length).astype(np.int32)

    return [
        TokenizedPair(ids(), ids(), ids(), f"source {i % 2}", i, False, False, False)
        for i in range(count)
    ]


def batches(
    some: list[TokenizedPair],
    *,
    rows: int = 2,
    row_length: int = 48,
    pairs_per_row: int = 4,
    reference_logp: np.ndarray | None = None,
) -> list[Any]:
    """The pairs packed, as JAX arrays."""
    shape = packing.row_shape(
        packing.pair_lengths(some),
        rows=rows,
        row_length=row_length,
        pairs_per_row=pairs_per_row,
        score_chunk=8,
    )
    packed = packing.micro_batches(some, shape, reference_logp=reference_logp)
    return [jax.tree.map(jnp.asarray, batch) for batch in packed]


def changed(architecture: Architecture = ARCHITECTURE, **changes: Any) -> Architecture:
    """The tiny architecture with other numbers."""
    return dataclasses.replace(architecture, **changes)
