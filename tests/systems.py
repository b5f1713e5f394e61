"""Policies to ask: the tiny golden model, with a latent from a seed or without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.runtime import loading
from lpc_jax.runtime.policy import Policy
from tests import runs

CODES = 8


def mesh(count: int = 1, *, tensor: int = 1) -> Mesh:
    """So many of the emulated devices."""
    return sharding.make_mesh(
        data=1, fsdp=-1, tensor=tensor, devices=jax.devices()[:count]
    )


def plain(where: Mesh, path: Path = runs.MODEL) -> Policy:
    """The decoder alone."""
    return loading.load(str(path), mesh=where)


def with_codes(
    where: Mesh, *, codebook_scale: float, path: Path = runs.MODEL
) -> Policy:
    """The decoder under a latent head with random weights.

    Args:
        where: The mesh.
        codebook_scale: Large enough that z changes which token is the likeliest.
        path: The decoder's.
    """
    latent = cfg.Latent(num_codes=CODES)
    policy = loading.start(
        loading.outline(loading.find(str(path)), mesh=where, latent=latent), seed=7
    )
    codebook = policy.params["latent"]["codebook"]
    scale = codebook_scale / (latent.effect * policy.codebook_unit)
    head = policy.params["latent"] | {"codebook": scale * codebook}
    return dataclasses.replace(policy, params=policy.params | {"latent": head})
