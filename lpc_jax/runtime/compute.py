"""How a policy computes, resolved once: platform, precision, kernels, tiles."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform as machine
from pathlib import Path

import jax
import jax.numpy as jnp

from lpc_jax import config as cfg
from lpc_jax.config.fields import Base
from lpc_jax.models.attention import table

# Row lengths are multiples of attention's blocks: 64 on CPU, 128 in kernels.
_CPU_ROW_UNIT, _ROW_UNIT = 64, 128
# Scored positions of a row that meet the LM head at a time.
_CPU_SCORE_CHUNK, _SCORE_CHUNK = 128, 512


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a policy computes on one platform, resolved from its settings."""

    platform: str  # as JAX names it: cpu, gpu, tpu
    dtype: jnp.dtype  # of matrix products
    attention: str  # the backend
    reason: str  # why that one; empty where the config names it
    remat: str
    score_chunk: int  # scored positions of a row that meet the LM head at a time
    row_unit: int  # divides all row lengths, so that attention's blocks are full
    base: Base = "compute"  # how a frozen decoder's block matrices are kept

    @property
    def precision(self) -> str:
        """Of weights and products, in words."""
        return self.dtype.name + ("" if self.base == "compute" else f"-{self.base}")


def resolve(
    model: cfg.Model,
    *,
    head_width: int,
    row_length: int,
    platform: str,
    base: Base = "compute",
) -> Compute:
    """How a model computes on a platform, in rows of at most ``row_length`` tokens."""
    cpu = platform == "cpu"
    dtype = model.compute_dtype
    if dtype == "auto":  # bfloat16 where the device is made for it
        dtype = "float32" if cpu else "bfloat16"
    row_unit = math.gcd(row_length, _CPU_ROW_UNIT if cpu else _ROW_UNIT)
    where = table.Where(platform, jnp.dtype(dtype), row_unit, head_width)
    backend, reason = table.choose(model.attention, where)
    chunk = model.score_chunk or (_CPU_SCORE_CHUNK if cpu else _SCORE_CHUNK)
    return Compute(
        platform, where.dtype, backend, reason, model.remat, chunk, row_unit, base
    )


def keep_compiled(folder: Path) -> None:
    """Has JAX cache compiled programs in a folder, for the next start."""
    # JAX's own keys leave out what the CPU can execute; machines may share a folder.
    cache = folder.resolve() / _instruction_set()
    jax.config.update("jax_compilation_cache_dir", str(cache))
    # JAX's is 1 s: what takes less adds up to 3 s of a start on a CPU.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _instruction_set() -> str:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    named = (line for line in lines if line.startswith(("flags", "Features")))
    flags = next(named, machine.processor())
    digest = hashlib.sha256(flags.encode()).hexdigest()
    return f"{machine.machine()}-{digest[:8]}"
