"""What a run will need of each device's memory, known before its first update.

From the compiler's own account of each program and the sizes of what stays between
them.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# A predicted peak above this share of the memory there is will hardly fit: the
# allocator's gaps, the compiler's own needs and, on a CPU, Python take the rest.
_SAFE_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes on the fullest device."""

    parameters: int  # fp32 masters of what is trained
    frozen: int  # the decoder under adapters
    optimizer: int  # what optax keeps
    gradients: int  # one sum of them; two where a step has several micro-batches
    temporary: int  # the most that any program needs besides
    # On a CPU, what the process holds that is no array: Python, libraries and compiled
    # programs.
    process: int
    peak: int  # the most at any time
    capacity: int | None  # what the device has, or None if it does not say
    # On a CPU, the copy of the state that a checkpoint is written from while updates go
    # on; other devices' copies are in the host's memory.
    checkpoint: int = 0

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the margin that runs need."""
        return self.capacity is None or self.peak <= _SAFE_SHARE * self.capacity

    @property
    def listed(self) -> str:
        """The parts in words, those that there are."""
        parts = {
            "parameters": self.parameters,
            "frozen decoder": self.frozen,
            "optimizer": self.optimizer,
            "gradients": self.gradients,
            "temporary": self.temporary,
            "process": self.process,
            "checkpoint": self.checkpoint,
        }
        return ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)


def bytes_per_device(tree: Any) -> int:
    """Size of one device's parts of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _outside_arrays() -> int:
    """What this process holds besides JAX's arrays, where those are in its memory."""
    resident = _status("VmRSS")
    if jax.default_backend() != "cpu" or resident is None:
        return 0
    arrays = (
        sum(shard.data.nbytes for shard in x.addressable_shards)
        for x in jax.live_arrays()
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    return max(0, resident - sum(arrays))


def _status(name: str) -> int | None:
    """A line of Linux's account of this process, in bytes."""
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = file.read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _capacity() -> int | None:
    """Memory of the first device; on a CPU the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


def real_peak() -> int | None:
    """The most that was in use so far, of the first device; on a CPU of the process."""
    if jax.default_backend() == "cpu":
        return _status("VmHWM")
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def predict(
    compiled: Mapping[str, Any], *, saves_between_updates: bool, **of_run: Any
) -> Prediction:
    """The memory of a run on this process's devices.

    Args:
        compiled: As for ``needed``.
        saves_between_updates: Whether there are checkpoints besides the end's.
        **of_run: The trees and ``several_micro_batches`` of ``needed``.
    """
    of_run |= {"process": _outside_arrays(), "capacity": _capacity()}
    run = needed(compiled, **of_run)
    if not saves_between_updates or jax.default_backend() != "cpu":
        return run
    copied = run.parameters + run.optimizer
    return dataclasses.replace(run, checkpoint=copied, peak=run.peak + copied)


def needed(
    compiled: Mapping[str, Any],
    *,
    params: Any,
    frozen: Any,
    opt_state: Any,
    several_micro_batches: bool,
    process: int,
    capacity: int | None,
) -> Prediction:
    """The memory of compiled programs and what they work on; devices may be elsewhere.

    Args:
        compiled: ``gradients``, ``add``, ``update`` and others by name, from
            ``jitted.lower(...).compile()``.
        params: Shapes with shardings of the trained parameters.
        frozen: Likewise, of the rest.
        opt_state: Likewise, of the optimizer's state.
        several_micro_batches: Whether a step sums gradients over several.
        process: What a device holds besides JAX's arrays.
        capacity: What a device has.
    """
    parameters, rest, optimizer = map(bytes_per_device, (params, frozen, opt_state))
    gradients = parameters * (2 if several_micro_batches else 1)
    temporary, peak = 0, 0
    for name, program in compiled.items():
        use = program.memory_analysis()
        new = use.output_size_in_bytes
        if name.startswith("gradients"):
            new = gradients
        elif name == "update":  # parameters and optimizer state in place
            new += parameters - use.alias_size_in_bytes
        elif name == "add":  # two sums become one, in place of the first
            new += gradients - use.alias_size_in_bytes
        temporary = max(temporary, use.temp_size_in_bytes)
        peak = max(peak, use.temp_size_in_bytes + new)
    held = process + parameters + rest + optimizer
    return Prediction(
        parameters,
        rest,
        optimizer,
        gradients,
        temporary,
        process,
        held + peak,
        capacity,
    )


def lines(prediction: Prediction, remedies: list[str]) -> list[str]:
    """What to tell a person; where it will hardly fit, with the remedies."""
    p = prediction
    has = "" if p.capacity is None else f" of {size(p.capacity)}"
    said = [f"memory: predicted peak {size(p.peak)}{has} a device ({p.listed})"]
    if not p.fits:
        said.append(f"warning: this will hardly fit. {' '.join(remedies)}")
    return said


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
