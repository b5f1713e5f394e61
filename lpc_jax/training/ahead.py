"""A run's programs, compiled ahead of time for devices that are elsewhere.

From shapes with shardings alone: no weight is ever made. Knows nothing of what follows
from them.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from lpc_jax import assembly, sharding
from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.errors import UserError
from lpc_jax.files import sources
from lpc_jax.models import architectures, leaves, weights
from lpc_jax.models.architectures import Architecture
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training import setup, step
from lpc_jax.training.arithmetic import Pair
from lpc_jax.types import Batch

# Updates in the run: the programs hold it as a number that changes no size.
_STEPS = 1000
# What the compiler says when a program alone is larger than the memory there is.
_TOO_LARGE = "RESOURCE_EXHAUSTED"
_USED = re.compile(r"(?:Used |for HLO temporaries \()([\d.]+)([KMGT])")
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class TooLargeError(Exception):
    """A program that alone is larger than a chip's memory."""

    def __init__(self, program: str, used: int | None):
        super().__init__(program)
        self.program, self.used = program, used


def find_architecture(config: cfg.Config) -> Architecture:
    """The model's numbers, without its weights.

    Raises:
        UserError: A hub id that is not here and not among ``architectures.KNOWN``.
    """
    path = config.model.path
    if not sources.is_hub_id(path):
        found = weights.find(path, setting="model.path", revision=None)
        return weights.read_architecture(found)
    if path not in architectures.KNOWN:
        raise UserError(
            f"model.path must be a local folder or one of"
            f" {', '.join(sorted(architectures.KNOWN))}, got {path!r}. A plan downloads"
            " nothing: pass --model.path FOLDER with the model's config.json in it."
        )
    return architectures.KNOWN[path]


def devices(topology: str) -> tuple[Any, ...]:
    """Those of a TPU slice, to compile for; none of them need be here.

    Raises:
        UserError: The TPU's compiler is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU's compiler, the package libtpu, which is not"
            " installed. Install it with pip install -e '.[plan]', or use make plan."
        )
    options: dict[str, Any] = {}
    if topology.endswith(":1x1"):  # less than the four chips of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=topology, **options
    )
    return tuple(found.devices)


def timed(name: str, lower: Callable[[], Any], seconds: dict[str, float]) -> Any:
    """A compiled program; how long that took is noted under its name.

    Raises:
        TooLargeError: It alone needs more than a device has.
    """
    begun = time.perf_counter()
    try:
        program = lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if _TOO_LARGE not in str(e):
            raise
        found = _USED.search(str(e))
        used = float(found.group(1)) * _UNITS[found.group(2)] if found else None
        raise TooLargeError(name, None if used is None else round(used)) from e
    seconds[name] = time.perf_counter() - begun
    return program


@dataclasses.dataclass(frozen=True)
class Abstract:
    """Everything that programs are compiled from, as shapes with shardings."""

    programs: step.Programs
    state: Any
    frozen: dict[str, Any]
    batch: Batch
    plain: dict[str, Any]

    @property
    def given(self) -> tuple[Any, ...]:
        """Arguments of the gradients' program."""
        state = self.state
        return state.params, self.frozen, self.batch, state.key, state.step


def abstract(
    config: cfg.Config, architecture: Architecture, pair: Pair, mesh: Mesh
) -> Abstract:
    """A run's programs and what they are given, none of it materialised.

    Args:
        config: The run.
        architecture: The decoder's.
        pair: What all pairs are taken to be.
        mesh: Of devices that may be elsewhere.
    """
    platform = sharding.platform(mesh)
    dtype = assembly.compute_dtype(config, platform)
    _, graph, shapes = assembly.abstract(config, architecture, platform, plain=False)
    shardings = leaves.shardings(shapes, mesh)
    trained = [part for part in shapes if config.trains_decoder or part != "decoder"]

    def placed(path: Any, shape: Any, where: Any) -> jax.ShapeDtypeStruct:
        kept = assembly.decoder_dtype(config, sharding.path_name(path), dtype)
        return jax.ShapeDtypeStruct(shape.shape, kept, sharding=where)

    decoder = {
        "decoder": jax.tree_util.tree_map_with_path(
            placed, shapes["decoder"], shardings["decoder"]
        )
    }
    frozen = {} if config.trains_decoder else decoder
    trained_shapes = {part: shapes[part] for part in trained}
    trained_shardings = {part: shardings[part] for part in trained}
    optimizer = optimizers.build(config, trained_shapes, _STEPS)
    layout = step.state_shardings(trained_shapes, trained_shardings, optimizer, mesh)
    packed = config.packing
    states = None
    if config.decoder == "frozen":
        states = np.empty((0, architecture.width), dtype)
    prompt = pair.prompt if states is None else 1
    shape = packing.row_shape(
        np.asarray([[prompt, pair.answer, pair.answer]], np.int32),
        rows=packed.rows,
        row_length=packed.row_length,
        pairs_per_row=packed.pairs_per_row,
        score_chunk=assembly.score_chunk(config, platform),
    )
    batch = packing.empty_batch(
        shape,
        packed.row_length,
        with_reference=config.loss.needs_reference,
        states=states,
    )
    return Abstract(
        step.build(config, graph, layout, optimizer, _STEPS),
        step.abstract_state(trained_shapes, optimizer, layout),
        frozen,
        sharding.abstract_batch(batch, mesh),
        decoder,
    )


def besides_gradients(
    config: cfg.Config,
    architecture: Architecture,
    pair: Pair,
    run: Abstract,
    mesh: Mesh,
    *,
    several: bool,
) -> dict[str, Callable[[], Any]]:
    """The rest of a step's programs and the reference's, by how to lower them.

    Args:
        config: The run.
        architecture: The decoder's.
        pair: What all pairs are taken to be.
        run: From ``abstract``.
        mesh: Likewise.
        several: Whether a step has several micro-batches.
    """
    programs = run.programs
    pairs = jax.ShapeDtypeStruct((), jnp.int32)
    jobs: dict[str, Callable[[], Any]] = {
        "update": lambda: programs.update.lower(
            run.state, run.state.params, pairs, run.frozen
        )
    }
    if several:
        summed = jax.eval_shape(programs.gradients, *run.given)[1]
        replicated = run.state.step.sharding
        term = (
            run.state.params,
            jax.tree.map(
                lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=replicated),
                summed,
            ),
        )
        jobs["add"] = lambda: programs.add.lower(term, term)
    if config.loss.needs_reference:
        other = architecture
        if config.reference.path is not None:
            model = dataclasses.replace(config.model, path=config.reference.path)
            other = find_architecture(dataclasses.replace(config, model=model))
        plain = run.plain
        if other != architecture:
            alone = dataclasses.replace(config, latent=None, adapters=None)
            plain = abstract(alone, other, pair, mesh).plain
        unscored = dataclasses.replace(run.batch, reference_logp=None)
        score: Any = setup.reference_program(config, other, mesh)
        jobs["reference"] = lambda: score.lower(plain, unscored)
    return jobs
