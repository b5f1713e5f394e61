"""What a run would need and could reach on chips that are not here.

Programs are compiled ahead of time, or counted by arithmetic. All pairs are taken to be
of one length.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.models.architectures import Architecture
from lpc_jax.planning import ahead, arithmetic, collectives
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.planning.chips import GPUS_OF_A_MACHINE, Slice
from lpc_jax.runtime import compute
from lpc_jax.training import memory

Say = Callable[[str], None]
# Widths of the tensor axis that are tried.
_TENSOR = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on a slice: what it needs, what it sends, and a bound on its speed."""

    config: str
    slice: str
    chips: int
    compiled: bool  # else counted by arithmetic
    # If compiled: of jax and the compiler, and of each program.
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    mesh: dict[str, int]
    rows: int  # of a micro-batch
    row_length: int
    remat: str
    attention: str  # the backend
    compute_dtype: str
    parameters: int
    trained: int  # of these
    pair: Pair  # what all pairs are taken to be
    pairs_per_step: int
    micro_batches: float  # of full rows that a step fills; a fraction is a shorter one
    memory: memory.Prediction  # of each chip
    reference_peak: int = 0  # bytes while the reference is scored
    sent: dict[str, int]  # bytes that each chip sends in a step, by kind of collective
    inexact: int = 0  # collectives in loops whose length only the data knows
    model_flops: float  # of a step, over all chips
    hardware_flops: float  # likewise, with what is computed twice
    seconds: dict[str, float]  # the least of compute, memory and interconnect
    peak_flops: float  # of all chips
    changes: tuple[str, ...]  # flags that make it fit
    notes: tuple[str, ...] = ()  # what else a person should know

    @property
    def peak(self) -> int:
        """Most bytes on a chip at any time."""
        return max(self.memory.peak, self.reference_peak)

    @property
    def fits(self) -> bool:
        """Whether the peak leaves the margin that runs need."""
        return dataclasses.replace(self.memory, peak=self.peak).fits

    @property
    def binds(self) -> str:
        """The resource that bounds a step's time."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """The roofline: the least time of a step, all else hidden behind the bound."""
        return self.seconds[self.binds]

    @property
    def mfu(self) -> float:
        """Model FLOP/s over the peak, at ``step_seconds``."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def pairs_per_second(self) -> float:
        """Pairs per second at ``step_seconds``, an upper bound."""
        return self.pairs_per_step / self.step_seconds


@dataclasses.dataclass(frozen=True)
class _Subject:
    """A config on a slice, as it is tried."""

    config: cfg.Config
    architecture: Architecture
    slice: Slice
    pair: Pair
    devices: tuple[Any, ...] = ()  # empty where nothing is compiled
    flags: dict[str, str] = dataclasses.field(default_factory=dict)  # what was changed

    def changed(self, section: str, **values: Any) -> _Subject:
        """With other settings, each noted as its flag."""
        names = {name: f"--{section}.{name.replace('_', '-')}" for name in values}
        flags = {flag: f"{flag} {values[name]}" for name, flag in names.items()}
        inner = dataclasses.replace(getattr(self.config, section), **values)
        config = dataclasses.replace(self.config, **{section: inner})
        return dataclasses.replace(self, config=config, flags=self.flags | flags)

    @property
    def compute(self) -> compute.Compute:
        config = self.config
        return compute.resolve(
            config.model,
            head_width=self.architecture.head_width,
            row_length=config.packing.row_length,
            platform=self.slice.chip.platform,
            base=config.base,
        )

    @property
    def parameters(self) -> dict[str, int]:
        """Of each part."""
        return arithmetic.parameters(self.config, self.architecture)

    @property
    def trained(self) -> int:
        """Parameters that are updated."""
        parts = self.parameters
        frozen = 0 if self.config.trains_decoder else parts["decoder"]
        return sum(parts.values()) - frozen

    @property
    def mesh(self) -> dict[str, int]:
        axes = dataclasses.asdict(self.config.mesh)
        return sharding.axis_sizes(**axes, devices=self.slice.count)

    @property
    def ways(self) -> int:
        """Parts into which a micro-batch's rows are split."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def micro_batches(self) -> float:
        packed = self.config.packing
        room = packed.rows * packed.row_length
        pairs = min(room / self.pair.tokens, packed.rows * packed.pairs_per_row)
        return packed.pairs_per_step / pairs


def make(config: cfg.Config, on: Slice, pair: Pair, say: Say) -> Plan:
    """The plan of a config; if it does not fit, with the changes that make it fit.

    ``say`` is told of each attempt. A pair longer than a row is a ``UserError``.
    """
    architecture = ahead.find_architecture(config.model.path)
    if pair.tokens > config.packing.row_length:
        raise UserError(
            "a pair's tokens must fit packing.row_length ="
            f" {config.packing.row_length}, got {pair.tokens} of --prompt-tokens"
            f" {pair.prompt} and twice --answer-tokens {pair.answer}. Lower these."
        )
    subject = _Subject(config, architecture, on, pair)
    if short := -config.packing.rows % subject.ways:  # the result doesn't depend on it
        subject = subject.changed("packing", rows=config.packing.rows + short)
    if on.topology is not None:
        subject = dataclasses.replace(subject, devices=ahead.devices(on))
    first = _plan(subject, say)
    return first if first is not None and first.fits else _fitting(subject, first, say)


def _fitting(subject: _Subject, first: Plan | None, say: Say) -> Plan:
    """The first plan that fits after changes; else ``first``, with what was tried."""
    tried = []
    for other in _changes(dataclasses.replace(subject, flags={})):
        listed = " ".join(other.flags.values())
        least = _memory_by_hand(other)
        least = dataclasses.replace(least, peak=least.peak - least.temporary)
        if not least.fits:  # spares a compilation that can only fail
            tried.append(f"{listed} (what stays between programs is too much)")
            continue
        say(f"does not fit; trying {listed}")
        flags = subject.flags | other.flags
        plan = _plan(dataclasses.replace(other, flags=flags), say)
        if plan is not None and plan.fits:
            return plan
        tried.append(listed)
    listed = "; ".join(tried) or "nothing: there is nothing left to lower"
    notes = [f"it does not fit, and neither did what was tried: {listed}"]
    if first is None:
        first = _by_hand(subject)
        notes.append("the compiler gave up: memory here is counted by hand")
    return dataclasses.replace(first, notes=(*first.notes, *notes))


def _changes(subject: _Subject) -> Iterator[_Subject]:
    """Ways to need less memory, the least change first; they accumulate."""
    less_kept = {"none": ("dots", "block"), "block": ()}
    for less in less_kept.get(subject.config.model.remat, ("block",)):
        yield (subject := subject.changed("model", remat=less))
    while (per_device := subject.config.packing.rows // subject.ways) > 1:
        rows = subject.ways * (per_device // 2)
        yield (subject := subject.changed("packing", rows=rows))
    longest = 1 + 2 * (subject.config.data.max_length - 1)
    shortest = longest + -longest % subject.compute.row_unit
    if shortest < subject.config.packing.row_length:
        yield (subject := subject.changed("packing", row_length=shortest))
    heads, chips = subject.architecture.kv_heads, subject.slice.count
    meshes = [{"data": 1}] if subject.mesh["data"] > 1 else []
    for tensor in _TENSOR:
        if tensor > subject.mesh["tensor"]:
            if chips % tensor or heads % tensor:
                break
            meshes.append({"tensor": tensor})
    for axis in meshes:
        subject = subject.changed("mesh", **axis, fsdp=-1)
        yield (subject := subject.changed("packing", rows=subject.ways))


def _plan(subject: _Subject, say: Say) -> Plan | None:
    """A plan; None if a program alone is larger than a chip's memory."""
    if not subject.devices:
        return _by_hand(subject)
    try:
        return _by_compiler(subject, say)
    except ahead.TooLargeError as e:
        say(str(e))
        return None


def _by_compiler(subject: _Subject, say: Say) -> Plan:
    programs, seconds = {}, {}
    mesh = sharding.make_mesh(**subject.mesh, devices=subject.devices)
    say(
        f"compiling the gradients of {subject.config.packing.rows} rows for {mesh.size}"
    )
    with jax.set_mesh(mesh):
        run = ahead.abstract(subject.config, subject.architecture, subject.pair, mesh)
        needed = functools.partial(
            memory.needed,
            params=run.state.params,
            frozen=run.policy.frozen,
            opt_state=run.state.opt_state,
            process=0,
            capacity=subject.slice.chip.memory,
        )
        begun = time.perf_counter()
        for name, lowered in ahead.lowered(run):
            programs[name] = ahead.compiled(name, lowered)
            seconds[name] = time.perf_counter() - begun
            if name == "gradients" and not needed(programs).fits:
                break
            begun = time.perf_counter()
    reference_peak = 0
    if reference := programs.pop("reference", None):
        use = reference.memory_analysis()
        reference_peak = use.argument_size_in_bytes + use.temp_size_in_bytes
        reference_peak += use.output_size_in_bytes
    count = math.ceil(subject.micro_batches)
    runs = {"gradients": count, "update": 1}
    sent, inexact = dict.fromkeys(collectives.KINDS, 0), 0
    for name, program in programs.items():
        for collective in collectives.read(program.as_text()):
            sent[collective.kind] += collective.sent * runs[name]
            inexact += not collective.exact
    predicted, (compiler, _) = (
        needed(programs),
        ahead.COMPILERS[subject.compute.platform],
    )
    return _assembled(
        subject,
        predicted,
        sent,
        inexact=inexact,
        reference_peak=reference_peak,
        versions={
            name: importlib.metadata.version(name)
            for name in ("jax", "jaxlib", *compiler)
        },
        compile_seconds=seconds,
    )


def _by_hand(subject: _Subject) -> Plan:
    """Arithmetic: only what must be kept and what FSDP must send counts."""
    mesh, count = subject.mesh, math.ceil(subject.micro_batches)
    data, fsdp, tensor = mesh["data"], mesh["fsdp"], mesh["tensor"]
    # In a ring each device sends (n - 1) / n of the whole, for an all-reduce twice.
    weights = arithmetic.weights_read(subject.config, subject.architecture) / tensor
    gradients = subject.trained / tensor * 4
    moved = {
        "all-gather": weights * (fsdp - 1) / fsdp,
        "reduce-scatter": gradients * (fsdp - 1) / fsdp,
        "all-reduce": 2 * gradients / fsdp * (data - 1) / data,
    }
    sent = {kind: round(count * moved.get(kind, 0)) for kind in collectives.KINDS}
    notes = ["what mesh.tensor sends is not counted"] if tensor > 1 else []
    return _assembled(subject, _memory_by_hand(subject), sent, notes=notes)


def _memory_by_hand(subject: _Subject) -> memory.Prediction:
    """All is split evenly over the devices."""
    mesh, how, trained = subject.mesh, subject.compute, subject.trained
    split = mesh["fsdp"] * mesh["tensor"]
    masters = 4 * trained // split
    stored = masters
    if not subject.config.trains_decoder:
        of_decoder = (subject.config, subject.architecture, how.dtype.itemsize)
        stored += arithmetic.frozen(*of_decoder) // split
    # Adam's two moments; optimizers with fewer need less.
    optimizer = 2 * masters
    temporary = arithmetic.temporary(
        subject.config,
        subject.architecture,
        mesh,
        backend=how.attention,
        platform=how.platform,
    )
    return memory.Prediction(
        parameters=masters,
        frozen=stored - masters,
        optimizer=optimizer,
        gradients=masters,
        temporary=temporary,
        process=0,
        peak=stored + optimizer + masters + temporary,
        capacity=subject.slice.chip.memory,
    )


def _assembled(
    subject: _Subject,
    predicted: memory.Prediction,
    sent: dict[str, int],
    *,
    notes: Sequence[str] = (),
    **how: Any,
) -> Plan:
    config, packed, chip = subject.config, subject.config.packing, subject.slice.chip
    of_run, computed = (config, subject.architecture), subject.compute
    of_pair = arithmetic.flops(*of_run, subject.pair, computed.attention)
    model, hardware = (packed.pairs_per_step * flops for flops in of_pair)
    peak_flops, masters = chip.flops * subject.slice.count, predicted.parameters
    # Every gradient is written and added. The update reads gradients, and reads and
    # writes masters and optimizer state.
    weights = arithmetic.weights_read(*of_run) / subject.mesh["tensor"]
    traffic = math.ceil(subject.micro_batches) * (weights + 2 * masters)
    traffic += 3 * masters + 2 * predicted.optimizer
    if computed.platform == "gpu" and subject.slice.count > GPUS_OF_A_MACHINE:
        notes = *notes, "NVLink is taken to join all; between machines it does not"
    return Plan(
        **how,
        notes=tuple(notes),
        config=config.name,
        slice=subject.slice.name,
        chips=subject.slice.count,
        compiled="versions" in how,
        mesh=subject.mesh,
        rows=packed.rows,
        row_length=packed.row_length,
        remat=config.model.remat,
        attention=computed.attention,
        compute_dtype=computed.precision,
        parameters=sum(subject.parameters.values()),
        trained=subject.trained,
        pair=subject.pair,
        pairs_per_step=packed.pairs_per_step,
        micro_batches=subject.micro_batches,
        memory=predicted,
        sent=sent,
        model_flops=model,
        hardware_flops=hardware,
        seconds={
            "compute": hardware / peak_flops,
            "memory": traffic / chip.memory_bandwidth,
            "interconnect": sum(sent.values()) / chip.link_bandwidth,
        },
        peak_flops=peak_flops,
        changes=tuple(subject.flags.values()),
    )
