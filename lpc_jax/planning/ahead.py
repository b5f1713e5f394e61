"""A run's programs, compiled ahead of time from shapes for devices elsewhere."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
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
from lpc_jax.planning.chips import GPUS_OF_A_MACHINE, Chip, Multiprocessors, Slice
from lpc_jax.runtime import compute, policy, programs
from lpc_jax.runtime.policy import Policy
from lpc_jax.training import memory, step
from lpc_jax.training import optimizer as optimizers
from lpc_jax.types import Batch

# Updates in the run; its value changes no program's size.
_STEPS = 1000
# In the error of a TPU's compiler when a program alone is larger than the memory. A
# GPU's says so of a kernel's shared memory alone.
_TOO_LARGE, _SHARED = "RESOURCE_EXHAUSTED", "hared memory"
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


# The packages that hold each platform's compiler, and the extra that brings them.
COMPILERS = {
    "tpu": (("libtpu",), "plan"),
    "gpu": (("jax-cuda13-plugin", "nvidia-cuda-nvcc", "nvidia-cudnn-cu13"), "plan-gpu"),
}


def devices(of: Slice) -> tuple[Any, ...]:
    """Devices to compile for; ``UserError`` without their compiler."""
    packages, extra = COMPILERS[of.chip.platform]
    for package in packages:
        try:
            importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            raise UserError(
                f"--topology {of.topology} needs a compiler, the package {package},"
                f" which is not installed. Install it with pip install -e '.[{extra}]',"
                f" or use make {extra}."
            ) from None
    options: dict[str, Any] = {"platform": "tpu", "topology_name": of.topology}
    if of.chip.gpu is not None:
        hosts = math.ceil(of.count / GPUS_OF_A_MACHINE)
        options = {
            "platform": "cuda",
            "target_config": _target(of.chip, of.chip.gpu),
            "topology": f"1x{hosts}x{of.count // hosts}",
        }
    elif of.count == 1:  # less than the four chips of a host
        options["chips_per_host_bounds"] = (1, 1, 1)
    return tuple(topologies.get_topology_desc(**options).devices)


def _target(chip: Chip, gpu: Multiprocessors) -> str:
    """A GPU as XLA's compiler is told of it (``GpuTargetConfigProto``, as text).

    Limits of threads, blocks and registers are those of all these capabilities.
    """
    major, minor = gpu.capability.removesuffix("a").split(".")
    extended = "ACCELERATED_FEATURES" if gpu.capability.endswith("a") else "NONE"
    fields = {
        "core_count": gpu.count,
        "fpus_per_core": gpu.fp32_units,
        "clock_rate_ghz": gpu.clock_ghz,
        "device_memory_size": gpu.memory,
        "memory_bandwidth": round(chip.memory_bandwidth),
        "l2_cache_size": gpu.cache,
        "shared_memory_per_core": gpu.shared_memory,
        "shared_memory_per_block": 48 * 2**10,
        "shared_memory_per_block_optin": gpu.shared_memory_of_block,
        "threads_per_warp": 32,
        "threads_per_block_limit": 1024,
        "threads_per_core_limit": 2048,
        "registers_per_core_limit": 2**16,
        "registers_per_block_limit": 2**16,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "thread_dim_limit_x": 1024,
        "thread_dim_limit_y": 1024,
        "thread_dim_limit_z": 64,
        "device_address_bits": 64,
        "driver_version": '"13.0.0"',
        "runtime_version": '"13.0.0"',
        "dnn_version": '"9.12.0"',
    }
    device = " ".join(f"{name}: {value}" for name, value in fields.items())
    return (
        f"gpu_device_info {{ {device} cuda_compute_capability {{ major: {major} minor:"
        f" {minor} feature_extension: {extended} }} }}\n"
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 12 }\n'
        f'device_description_str: "NVIDIA {chip.name.upper()}"'
    )


def compiled(name: str, lowered: Any) -> Any:
    """A program compiled, or ``TooLargeError``."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as e:
        if _TOO_LARGE not in str(e) or _SHARED in str(e):
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
            config.model,
            head_width=architecture.head_width,
            row_length=row_length,
            platform=platform,
            base=config.base,
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


def lowered(run: Ahead) -> Iterator[tuple[str, Any]]:
    """Programs to compile, by name."""
    state, frozen = run.state, run.policy.frozen
    yield "gradients", lowered_gradients(run)
    pairs = jax.ShapeDtypeStruct((), jnp.int32)
    yield "update", run.programs.update.lower(state, state.params, pairs, frozen)
    if run.config.loss.needs_reference:
        yield "reference", _lowered_reference(run)


def lowered_gradients(run: Ahead) -> Any:
    """The program of a micro-batch, which adds to gradients laid out as parameters."""
    state, frozen = run.state, run.policy.frozen
    return run.programs.gradients.lower(
        state.params, state.params, frozen, run.batch, state.key, state.step
    )


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
