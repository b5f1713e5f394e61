"""A run's memory on each device, predicted from its compiled programs."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

# A predicted peak above this share of memory hardly fits: the allocator's gaps, the
# compiler's own needs and, on a CPU, Python take the rest.
_SAFE_SHARE = 0.92


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Bytes on the fullest device."""

    parameters: int  # fp32 masters of what is trained
    frozen: int  # the decoder under adapters
    optimizer: int  # what optax keeps
    gradients: int  # one sum of them, to which each micro-batch's are added
    temporary: int  # the most that any program needs besides
    process: int  # on a CPU, Python, libraries and compiled programs
    peak: int  # the most at any time
    capacity: int | None  # what the device has, or None if it does not say
    # On a CPU, the copy that a checkpoint is written from; else it is in host memory.
    checkpoint: int = 0

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the margin that runs need."""
        return self.capacity is None or self.peak <= _SAFE_SHARE * self.capacity

    @property
    def listed(self) -> str:
        """The non-zero parts in words."""
        parts = dataclasses.asdict(self)
        del parts["peak"], parts["capacity"]
        words = {"frozen": "frozen decoder"}
        return ", ".join(f"{words.get(n, n)} {size(b)}" for n, b in parts.items() if b)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's shards of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    )


def trim() -> None:
    """Gives the system what was freed and glibc keeps: 0.3 GB after compiling."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _outside_arrays() -> int:
    """This process's memory besides JAX's arrays, on a CPU; else 0."""
    trim()
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
    file = Path("/proc/self/status")
    if not file.exists():
        return None
    fields = dict(line.split(":", 1) for line in file.read_text().splitlines())
    return int(fields[name].split()[0]) * 1024


def _device_memory(name: str) -> int | None:
    return (jax.local_devices()[0].memory_stats() or {}).get(name)


def _capacity() -> int | None:
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return _device_memory("bytes_limit")


def real_peak() -> int | None:
    """Peak bytes so far on the first device; on a CPU of the process."""
    if jax.default_backend() == "cpu":
        return _status("VmHWM")
    return _device_memory("peak_bytes_in_use")


def predict(
    compiled: Mapping[str, Any], *, saves_between_updates: bool, **of_run: Any
) -> Prediction:
    """``needed`` on this process's devices, with the copy that a checkpoint makes."""
    run = needed(compiled, process=_outside_arrays(), capacity=_capacity(), **of_run)
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
    process: int,
    capacity: int | None,
) -> Prediction:
    """Memory of compiled programs and their arguments; devices may be elsewhere.

    ``compiled`` has ``gradients``, ``update`` and others by name.
    """
    parameters, rest, optimizer = map(bytes_per_device, (params, frozen, opt_state))
    temporary, peak = 0, 0
    for name, program in compiled.items():
        use = program.memory_analysis()
        new = use.output_size_in_bytes
        if name in ("gradients", "update"):  # beside the sum of gradients, in place
            new += parameters - use.alias_size_in_bytes
        temporary = max(temporary, use.temp_size_in_bytes)
        peak = max(peak, use.temp_size_in_bytes + new)
    peak += process + parameters + rest + optimizer
    return Prediction(
        parameters, rest, optimizer, parameters, temporary, process, peak, capacity
    )


def lines(prediction: Prediction, remedies: list[str]) -> list[str]:
    """The prediction in words; with ``remedies`` where it hardly fits."""
    p = prediction
    has = "" if p.capacity is None else f" of {size(p.capacity)}"
    texts = [f"memory: predicted peak {size(p.peak)}{has} a device ({p.listed})"]
    if not p.fits:
        texts.append(f"warning: this will hardly fit. {' '.join(remedies)}")
    return texts


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
