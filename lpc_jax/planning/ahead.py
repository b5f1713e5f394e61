"""A run's programs, compiled ahead of time from shapes for devices elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data import packing
from lpc_jax.errors import UserError
from lpc_jax.files import sources
from lpc_jax.models import architectures, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.runtime import compute, policy, programs
from lpc_jax.runtime.policy import Policy
from lpc_jax.training import memory, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.types import Batch

# Updates in the run; its value changes no program's size.
_STEPS = 1000
# In the compiler's error when a program alone is larger than the memory.
_TOO_LARGE = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"(?:Used |for HLO temporaries \()([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLargeError(Exception):
    """A program that alone is larger than a chip's memory, in words."""


def find_architecture(path: str) -> Architecture:
    """The architecture of ``model.path``; ``UserError`` for an unknown hub id."""
    if not sources.is_hub_id(path):
        file = weights.find(path, setting="model.path", revision=None)
        return weights.read_architecture(file)
    if path not in architectures.KNOWN:
        raise UserError(
            f"model.path must be a local folder or one of"
            f" {', '.join(sorted(architectures.KNOWN))}, got {path!r}. A plan downloads"
            " nothing: pass --model.path FOLDER with the model's config.json in it."
        )
    return architectures.KNOWN[path]


def devices(topology: str) -> tuple[Any, ...]:
    """Devices of a TPU slice to compile for; ``UserError`` without libtpu."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU's compiler, the package libtpu, which is not"
            " installed. Install it with pip install -e '.[plan]', or use make plan."
        )
    options: dict[str, Any] = {"platform": "tpu", "topology_name": topology}
    if topology.endswith(":1x1"):  # less than the four chips of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    return tuple(topologies.get_topology_desc(**options).devices)


def compiled(name: str, lowered: Any) -> Any:
    """A program compiled, or ``TooLargeError``."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if _TOO_LARGE not in str(e):
            raise
        text = f"{name} is larger than the memory of a chip"
        if used := _USED.search(str(e)):
            size = memory.size(round(float(used[1]) * _UNITS[used[2]]))
            text += f": it would use {size} a chip"
        raise TooLargeError(text) from e


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A run's programs and the abstract arguments they are compiled for."""

    config: cfg.Config
    policy: Policy
    programs: step.Programs
    state: Any
    batch: Batch


def abstract(
    config: cfg.Config, architecture: Architecture, pair: Pair, mesh: Mesh
) -> Ahead:
    """A run's programs and abstract arguments on a mesh of devices elsewhere."""
    of_run = _policy(config, architecture, mesh)
    optimizer = optimizers.build(config, of_run.params, _STEPS)
    layout = step.state_shardings(of_run.params, optimizer, mesh)
    chunk = of_run.compute.score_chunk
    return Ahead(
        config,
        of_run,
        step.build(config, of_run.graph, layout, optimizer, _STEPS, chunk=chunk),
        step.abstract_state(of_run.params, optimizer, layout),
        sharding.abstract_batch(_batch(config, of_run, pair), mesh),
    )


def _policy(config: cfg.Config, architecture: Architecture, mesh: Mesh) -> Policy:
    row_length, platform = config.packing.row_length, sharding.platform(mesh)
    return policy.abstract(
        architecture,
        compute.resolve(
            config.model, row_length=row_length, platform=platform, base=config.base
        ),
        latent=config.latent,
        adapters=config.adapters,
        train_decoder=config.trains_decoder,
        mesh=mesh,
        path=Path(config.model.path),
    )


def _batch(config: cfg.Config, of_run: Policy, pair: Pair) -> Batch:
    packed, prompt, states = config.packing, pair.prompt, None
    if config.decoder == "frozen":
        prompt = 1
        states = np.empty((0, of_run.architecture.width), of_run.compute.dtype)
    shape = packing.row_shape(
        np.asarray([[prompt, pair.answer, pair.answer]], np.int32),
        rows=packed.rows,
        row_length=packed.row_length,
        pairs_per_row=packed.pairs_per_row,
        score_chunk=of_run.compute.score_chunk,
    )
    columns = config.loss.reference_columns
    return packing.empty_batch(
        shape, packed.row_length, reference_columns=columns, states=states
    )


def lowered(run: Ahead, *, several: bool) -> Iterator[tuple[str, Any]]:
    """Programs to compile, by name; ``several`` micro-batches need ``add``."""
    state, frozen = run.state, run.policy.frozen
    arguments = (state.params, frozen, run.batch, state.key, state.step)
    yield "gradients", run.programs.gradients.lower(*arguments)
    pairs = jax.ShapeDtypeStruct((), jnp.int32)
    yield "update", run.programs.update.lower(state, state.params, pairs, frozen)
    if several:
        where = state.step.sharding
        sums = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
            jax.eval_shape(run.programs.gradients, *arguments)[1],
        )
        term = (state.params, sums)
        yield "add", run.programs.add.lower(term, term)
    if run.config.loss.needs_reference:
        yield "reference", _lowered_reference(run)


def _lowered_reference(run: Ahead) -> Any:
    path, of_run = run.config.reference.path, run.policy
    if path is not None:
        of_run = _policy(run.config, find_architecture(path), of_run.mesh)
    plain = of_run.plain()
    unscored = dataclasses.replace(run.batch, reference_logp=None)
    score: Any = programs.score(
        plain.graph, plain.mesh, chunk=plain.compute.score_chunk
    )
    return score.lower(plain.params, unscored)
