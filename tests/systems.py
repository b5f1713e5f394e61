"""Systems to ask: the tiny golden model, with a latent from a seed or without."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from flax import nnx
from jax.sharding import Mesh

from lpc_jax import assembly, sharding
from lpc_jax import config as cfg
from lpc_jax.evaluation import system
from lpc_jax.models import leaves
from tests import runs

CODES = 8


def mesh(count: int = 1, *, tensor: int = 1) -> Mesh:
    """So many of the emulated devices."""
    return sharding.make_mesh(
        data=1, fsdp=-1, tensor=tensor, devices=jax.devices()[:count]
    )


def plain(where: Mesh, path: Path = runs.MODEL) -> system.System:
    """The decoder alone."""
    return system.load(str(path), mesh=where)


def with_codes(
    where: Mesh, *, codebook_scale: float, path: Path = runs.MODEL
) -> system.System:
    """The decoder under a latent head with random weights.

    Args:
        where: The mesh.
        codebook_scale: Large enough that z changes which token is the likeliest.
        path: The decoder's.
    """
    base = plain(where, path)
    latent = cfg.Latent(num_codes=CODES)
    config = dataclasses.replace(base.config, latent=latent)
    make, graph, shapes = assembly.abstract(
        config, base.architecture, "cpu", plain=False
    )
    shardings = leaves.shardings(shapes, where)

    def head(key: jax.Array) -> dict:
        made = nnx.to_pure_dict(nnx.split(make(key))[1])["latent"]
        return made | {"codebook": codebook_scale * made["codebook"]}

    params = jax.jit(head, out_shardings=shardings["latent"])(jax.random.key(7))
    return dataclasses.replace(
        base,
        config=config,
        latent=latent,
        graph=graph,
        params=base.params | {"latent": params},
    )
