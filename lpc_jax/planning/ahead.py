"""A run's programs, compiled ahead of time from shapes for devices elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable
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
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training import step
from lpc_jax.types import Batch

# Updates in the run; its value changes no program's size.
_STEPS = 1000
# In the compiler's error when a program alone is larger than the memory.
_TOO_LARGE = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"(?:Used |for HLO temporaries \()([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLargeError(Exception):
    """A program that alone is larger than a chip's memory."""

    def __init__(self, program: str, used: int | None):
        super().__init__(program)
        self.program, self.used = program, used


def find_architecture(config: cfg.Config) -> Architecture:
    """The architecture of ``model.path``; ``UserError`` for an unknown hub id."""
    path = config.model.path
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


def timed(name: str, lower: Callable[[], Any], seconds: dict[str, float]) -> Any:
    """A compiled program, its time noted, or ``TooLargeError`` if it is too large."""
    begun = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if _TOO_LARGE not in str(e):
            raise
        used = _USED.search(str(e))
        size = round(float(used.group(1)) * _UNITS[used.group(2)]) if used else None
        raise TooLargeError(name, size) from e
    seconds[name] = time.perf_counter() - begun
    return program


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A run's programs and the abstract arguments they are compiled for."""

    config: cfg.Config
    policy: Policy
    pair: Pair
    programs: step.Programs
    state: Any
    batch: Batch

    @property
    def given(self) -> tuple[Any, ...]:
        """Arguments of ``programs.gradients``."""
        state = self.state
        return state.params, self.policy.frozen, self.batch, state.key, state.step


def abstract(
    config: cfg.Config, architecture: Architecture, pair: Pair, mesh: Mesh
) -> Ahead:
    """A run's programs and abstract arguments on a mesh of devices elsewhere."""
    of_run = policy.abstract(
        architecture,
        compute.resolve(
            config.model,
            row_length=config.packing.row_length,
            platform=sharding.platform(mesh),
        ),
        latent=config.latent,
        adapters=config.adapters,
        train_decoder=config.trains_decoder,
        mesh=mesh,
        path=Path(config.model.path),
    )
    optimizer = optimizers.build(config, of_run.params, _STEPS)
    layout = step.state_shardings(of_run.params, optimizer, mesh)
    chunk = of_run.compute.score_chunk
    return Ahead(
        config=config,
        policy=of_run,
        pair=pair,
        programs=step.build(
            config, of_run.graph, layout, optimizer, _STEPS, chunk=chunk
        ),
        state=step.abstract_state(of_run.params, optimizer, layout),
        batch=sharding.abstract_batch(_batch(config, of_run, pair), mesh),
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
    return packing.empty_batch(
        shape,
        packed.row_length,
        with_reference=config.loss.needs_reference,
        states=states,
    )


def jobs(run: Ahead, *, several: bool) -> dict[str, Callable[[], Any]]:
    """Lowerings by program, gradients first; ``several`` micro-batches need ``add``."""
    state, programs = run.state, run.programs
    pairs = jax.ShapeDtypeStruct((), jnp.int32)
    made: dict[str, Callable[[], Any]] = {
        "gradients": lambda: programs.gradients.lower(*run.given),
        "update": lambda: programs.update.lower(
            state, state.params, pairs, run.policy.frozen
        ),
    }
    if several:
        sums = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(
                s.shape, s.dtype, sharding=state.step.sharding
            ),
            jax.eval_shape(programs.gradients, *run.given)[1],
        )
        term = (state.params, sums)
        made["add"] = lambda: programs.add.lower(term, term)
    if run.config.loss.needs_reference:
        made["reference"] = lambda: _lower_reference(run)
    return made


def _lower_reference(run: Ahead) -> Any:
    config, of_run = run.config, run.policy
    if config.reference.path is not None:
        model = dataclasses.replace(config.model, path=config.reference.path)
        other = find_architecture(dataclasses.replace(config, model=model))
        if other != of_run.architecture:
            alone = dataclasses.replace(config, latent=None, adapters=None)
            of_run = abstract(alone, other, run.pair, of_run.mesh).policy
    plain = of_run.plain()
    unscored = dataclasses.replace(run.batch, reference_logp=None)
    score: Any = programs.score(
        plain.graph, plain.mesh, chunk=plain.compute.score_chunk
    )
    return score.lower(plain.params, unscored)
