"""What a run will need of each device's memory, known before its first update.

From the compiler's own account of each program and the sizes of what stays between
them. Knows nothing of losses, models or data.
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
    """Bytes on the fullest device.

    Attributes:
        parameters: fp32 masters of what is trained.
        frozen: The decoder under adapters.
        optimizer: What optax keeps.
        gradients: One sum of gradients; two where a step has several micro-batches.
        temporary: The most that any program needs besides.
        process: On a CPU, what the process holds that is no array: Python, libraries
            and compiled programs.
        peak: The most at any time.
        capacity: What the device has, or None if it does not say.
        checkpoint: On a CPU, the copy of the state that a checkpoint is written from
            while updates go on; other devices' copies are in the host's memory.
    """

    parameters: int
    frozen: int
    optimizer: int
    gradients: int
    temporary: int
    process: int
    peak: int
    capacity: int | None
    checkpoint: int = 0

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the margin that runs need."""
        return self.capacity is None or self.peak <= _SAFE_SHARE * self.capacity


def bytes_per_device(tree: Any) -> int:
    """Size of the arrays' parts on one device.

    Args:
        tree: Arrays, or shapes with shardings.
    """
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def _capacity() -> int | None:
    """Memory of the first device; on a CPU the machine's."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return (device.memory_stats() or {}).get("bytes_limit")


def _status(name: str) -> int | None:
    """A line of Linux's account of this process, in bytes."""
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    lines = file.read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


def _outside_arrays() -> int:
    """What this process holds besides JAX's arrays, where those are in its memory."""
    resident = _status("VmRSS")
    if jax.default_backend() != "cpu" or resident is None:
        return 0
    return max(0, resident - sum(_bytes_here(x) for x in jax.live_arrays()))


def _bytes_here(x: jax.Array) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 0
    return sum(shard.data.nbytes for shard in x.addressable_shards)


def real_peak() -> int | None:
    """The most that was in use so far, of the first device; on a CPU of the process."""
    if jax.default_backend() == "cpu":
        return _status("VmHWM")
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def predict(
    compiled: Mapping[str, Any],
    *,
    params: Any,
    frozen: Any,
    opt_state: Any,
    several_micro_batches: bool,
    saves_between_updates: bool,
) -> Prediction:
    """The memory of a run whose programs are compiled.

    Args:
        compiled: ``gradients``, ``update`` and others by name, from
            ``jitted.lower(...).compile()``.
        params: Shapes with shardings of the trained parameters.
        frozen: Likewise, of the rest.
        opt_state: Likewise, of the optimizer's state.
        several_micro_batches: Whether a step sums gradients over several.
        saves_between_updates: Whether there are checkpoints besides the end's.
    """
    found = needed(
        compiled,
        params=params,
        frozen=frozen,
        opt_state=opt_state,
        several_micro_batches=several_micro_batches,
        process=_outside_arrays(),
        capacity=_capacity(),
    )
    if not saves_between_updates or jax.default_backend() != "cpu":
        return found
    copied = found.parameters + found.optimizer
    return dataclasses.replace(found, checkpoint=copied, peak=found.peak + copied)


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
    """As ``predict``, for devices that may be elsewhere.

    Args:
        compiled: As for ``predict``; likewise the others.
        params: Shapes with shardings of the trained parameters.
        frozen: Likewise, of the rest.
        opt_state: Likewise, of the optimizer's state.
        several_micro_batches: Whether a step sums gradients over several.
        process: What a device holds besides JAX's arrays.
        capacity: What a device has.
    """
    held = bytes_per_device(params), bytes_per_device(frozen)
    optimizer = bytes_per_device(opt_state)
    one_sum = held[0]
    gradients = one_sum * (2 if several_micro_batches else 1)
    temporary, peak = 0, 0
    for name, program in compiled.items():
        use = program.memory_analysis()
        wanted = use.temp_size_in_bytes
        if name.startswith("gradients"):
            wanted += gradients
        elif name == "update":  # parameters and optimizer state in place
            wanted += one_sum + use.output_size_in_bytes - use.alias_size_in_bytes
        else:
            wanted += use.output_size_in_bytes
        temporary = max(temporary, use.temp_size_in_bytes)
        peak = max(peak, sum(held) + optimizer + wanted)
    return Prediction(
        held[0],
        held[1],
        optimizer,
        gradients,
        temporary,
        process,
        process + peak,
        capacity,
    )


def lines(prediction: Prediction, remedies: list[str]) -> list[str]:
    """What to tell a person; with the remedies where it will hardly fit.

    Args:
        prediction: From ``predict``.
        remedies: What would lower the peak, in the words of the settings.
    """
    p = prediction
    parts = {
        "parameters": p.parameters,
        "frozen decoder": p.frozen,
        "optimizer": p.optimizer,
        "gradients": p.gradients,
        "temporary": p.temporary,
        "process": p.process,
        "checkpoint": p.checkpoint,
    }
    listed = ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)
    has = "" if p.capacity is None else f" of {size(p.capacity)}"
    found = [f"memory: predicted peak {size(p.peak)}{has} a device ({listed})"]
    if not p.fits:
        found.append(f"warning: this will hardly fit. {' '.join(remedies)}")
    return found


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
