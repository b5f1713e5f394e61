"""Accelerators by name: data-sheet numbers and slice layouts."""

from __future__ import annotations

import dataclasses
import math
import re

from lpc_jax.errors import UserError

GIB = 2**30
# GPUs that NVLink joins, in NVIDIA's HGX and DGX machines of these kinds.
GPUS_OF_A_MACHINE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Multiprocessors:
    """What XLA's compiler for GPUs asks of a chip besides its data sheet."""

    capability: str  # of CUDA
    count: int
    fp32_units: int  # of each
    clock_ghz: float
    shared_memory: int  # bytes of each
    shared_memory_of_block: int  # bytes that one thread block may ask for
    cache: int  # bytes of L2
    memory: int  # bytes that the driver reports


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator by its maker's data sheet."""

    name: str
    platform: str  # as JAX names it
    memory: int  # bytes of high-bandwidth memory
    flops: float  # dense bfloat16 operations a second, a multiply-add being two
    memory_bandwidth: float  # bytes a second to and from that memory
    # Bytes a second that it can send to the others, all links taken together. Where a
    # source counts both directions, half of it.
    link_bandwidth: float
    layouts: tuple[str, ...] = ()  # of slices; none of GPUs
    cores_in_name: int = 1  # what the number in a name such as v5p-8 counts for a chip
    gpu: Multiprocessors | None = None  # where programs can be compiled for it


# Google Cloud, "TPU v5e" and "TPU v6e": supported configurations. The single chip is
# compiled for with other host bounds than the rest, see ahead.py.
_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
# Google Cloud, "TPU v5p": supported configurations, those of up to a cube of 8.
_CUBE = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
# NVIDIA H100 Tensor Core GPU architecture white paper, SXM5, and CUDA C++ Programming
# Guide, technical specifications of capability 9.0; memory as devices report it.
_HOPPER = Multiprocessors(
    capability="9.0a",
    count=132,
    fp32_units=128,
    clock_ghz=1.98,
    shared_memory=228 * 2**10,
    shared_memory_of_block=227 * 2**10,
    cache=50 * 2**20,
    memory=84_942_979_072,
)
CHIPS = {
    chip.name: chip
    for chip in (
        # Google Cloud documentation, "TPU v5e" (docs.cloud.google.com/tpu/docs/v5e):
        # 197 TFLOP/s, 16 GB (GiB: the compiler gives programs 15.75), 819 GB/s, ICI 400
        # GB/s in both directions.
        Chip("v5e", "tpu", 16 * GIB, 197e12, 819e9, 200e9, _PLANE),
        # The same, "TPU v5p": 459 TFLOP/s, 95 GiB, 2,765 GB/s, ICI 1,200 GB/s in both
        # directions. A name counts cores, two a chip.
        Chip("v5p", "tpu", 95 * GIB, 459e12, 2765e9, 600e9, _CUBE, cores_in_name=2),
        # The same, "TPU v6e": 918 TFLOP/s, 32 GB (GiB), 1,640 GB/s (1,600 in other
        # editions of the page), ICI 800 GB/s in both directions.
        Chip("v6e", "tpu", 32 * GIB, 918e12, 1640e9, 400e9, _PLANE),
        # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s dense, 2,039 GB/s, NVLink 600
        # GB/s in both directions.
        # Its white paper, and the same guide's capability 8.0, for the rest.
        Chip(
            "a100",
            "gpu",
            80 * 10**9,
            312e12,
            2039e9,
            300e9,
            gpu=Multiprocessors(
                capability="8.0",
                count=108,
                fp32_units=64,
                clock_ghz=1.41,
                shared_memory=164 * 2**10,
                shared_memory_of_block=163 * 2**10,
                cache=40 * 2**20,
                memory=85_100_068_864,
            ),
        ),
        # NVIDIA H100 data sheet, SXM: 1,979 TFLOP/s with sparsity, half of it dense; 80
        # GB at 3.35 TB/s; NVLink 900 GB/s in both directions.
        Chip("h100", "gpu", 80 * 10**9, 989e12, 3350e9, 450e9, gpu=_HOPPER),
        # NVIDIA H200 data sheet, SXM: as the H100, with 141 GB at 4.8 TB/s.
        Chip(
            "h200",
            "gpu",
            141 * 10**9,
            989e12,
            4800e9,
            450e9,
            gpu=dataclasses.replace(_HOPPER, memory=151_397_597_184),
        ),
        # NVIDIA L4 data sheet: 242 TFLOP/s with sparsity, half of it dense; 24 GB at
        # 300 GB/s; PCIe 64 GB/s in both directions.
        Chip("l4", "gpu", 24 * 10**9, 121e12, 300e9, 32e9),
        # NVIDIA Ada GPU architecture white paper, GeForce RTX 4090: 165.2 TFLOP/s dense
        # with FP32 sums, 24 GB at 1,008 GB/s; PCIe 64 GB/s in both directions.
        Chip("rtx4090", "gpu", 24 * 10**9, 165.2e12, 1008e9, 32e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips of one kind, wired to each other."""

    chip: Chip
    count: int
    topology: str | None = (
        None  # what can be compiled for (``v5e:8x8``, ``gpu:8xh100``)
    )

    @property
    def name(self) -> str:
        """Its topology, or number and kind."""
        return self.topology or f"{self.count} x {self.chip.name}"


def named(*, topology: str | None, devices: str | None) -> Slice:
    """The slice of ``--topology`` or ``--devices``; ``UserError`` unless just one."""
    if topology is not None and devices is None:
        return parse_topology(topology)
    if devices is not None and topology is None:
        return parse_devices(devices)
    raise UserError(
        "exactly one of --topology and --devices is required, got"
        f" {'neither' if topology is None else 'both'}. Use --topology v5e:8x8 or"
        " gpu:8xh100 to compile for them, --devices gpu:8xl4 for arithmetic."
    )


def parse_topology(text: str) -> Slice:
    """The slice of ``--topology`` (``v5e:8x8``, ``v5p-8``, ``gpu:8xh100``).

    Raises:
        UserError: There is none of that name, or no compiler for it.
    """
    if text.startswith("gpu:"):
        return _gpus(text)
    # As Google's accelerator types spell it.
    name = text.removeprefix("tpu:").replace("v5litepod", "v5e")
    kind = re.split("[:-]", name)[0]
    slices: dict[tuple[str, str], Slice] = {}
    for layout in CHIPS[kind].layouts if kind in CHIPS else ():
        count, topology = math.prod(map(int, layout.split("x"))), f"{kind}:{layout}"
        by_number = f"{kind}-{count * CHIPS[kind].cores_in_name}"
        slices[topology, by_number] = Slice(CHIPS[kind], count, topology)
    for names, known_slice in slices.items():
        if name in names:
            return known_slice
    known = ", ".join(f"{topology} ({number})" for topology, number in slices)
    expected = known or "a TPU slice or GPUs: v5e:8x8, v5p-8, v6e-8, gpu:8xh100"
    raise UserError(
        f"--topology must be {'one of ' * bool(known)}{expected}, got {text!r}. Use"
        " such a one."
    )


def _gpus(text: str) -> Slice:
    known = parse_devices(text, "--topology")
    if known.chip.gpu is None:
        kinds = ", ".join(chip.name for chip in CHIPS.values() if chip.gpu)
        raise UserError(
            f"--topology must be of GPUs that programs can be compiled for ({kinds}),"
            f" got {text!r}. Use --devices {text} for arithmetic."
        )
    if known.count > GPUS_OF_A_MACHINE and known.count % GPUS_OF_A_MACHINE:
        raise UserError(
            f"--topology must be of whole machines above {GPUS_OF_A_MACHINE} GPUs, got"
            f" {text!r}. Use a multiple of {GPUS_OF_A_MACHINE}."
        )
    return dataclasses.replace(known, topology=text)


def parse_devices(text: str, flag: str = "--devices") -> Slice:
    """The chips of ``--devices`` (``gpu:8xh100``, ``tpu:4xv5p``), or ``UserError``."""
    matched = re.fullmatch(r"(?:(gpu|tpu):)?([1-9]\d*)x([a-z0-9]+)", text)
    platform, count, name = matched.groups() if matched else (None, "", "")
    chip = CHIPS.get(name.replace("v5litepod", "v5e"))
    if chip is None or platform not in (None, chip.platform):
        known = ", ".join(f"{c.platform}:8x{c.name}" for c in CHIPS.values())
        raise UserError(
            f"{flag} must be a number of chips such as {known}, got {text!r}."
            " Use one of these kinds."
        )
    return Slice(chip, int(count))
