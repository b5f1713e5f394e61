"""What a run would need and could reach on chips that are not here.

TPU programs are compiled ahead of time; GPUs need their own compiler, so their plans
are arithmetic. All pairs are taken to be of one length.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.models.architectures import Architecture
from lpc_jax.planning import ahead, arithmetic, collectives
from lpc_jax.planning.arithmetic import Pair
from lpc_jax.planning.chips import Slice
from lpc_jax.runtime import compute, policy
from lpc_jax.training import memory

Say = Callable[[str], None]
# GPUs that NVLink joins, in NVIDIA's HGX and DGX machines of these kinds.
_GPUS_OF_A_MACHINE = 8
# Widths of the tensor axis that are tried.
_TENSOR = (2, 4, 8)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A config on a slice: what it needs, what it sends, and a bound on its speed."""

    config: str
    slice: str
    chips: int
    compiled: bool  # else counted by arithmetic
    versions: dict[str, str]  # of jax and the compiler, if compiled
    compile_seconds: dict[str, float]  # of each program
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
    reference_peak: int  # bytes while the reference is scored; 0 for a loss without
    sent: dict[str, int]  # bytes that each chip sends in a step, by kind of collective
    inexact: int  # collectives in loops whose length only the data knows
    model_flops: float  # of a step, over all chips
    hardware_flops: float  # likewise, with what is computed twice
    seconds: dict[str, float]  # the least of compute, memory and interconnect
    peak_flops: float  # of all chips
    changes: tuple[str, ...]  # flags that make it fit
    notes: tuple[str, ...]  # what else a person should know

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
    config: cfg.Config
    architecture: Architecture
    slice: Slice
    pair: Pair
    sizes: dict[str, int]  # parameters of each part
    devices: tuple[Any, ...]  # empty where nothing is compiled

    @property
    def platform(self) -> str:
        return self.slice.chip.platform

    @property
    def compute(self) -> compute.Compute:
        return compute.resolve(
            self.config.model,
            row_length=self.config.packing.row_length,
            platform=self.platform,
        )

    @property
    def trained(self) -> int:
        frozen = () if self.config.trains_decoder else ("decoder",)
        return sum(n for part, n in self.sizes.items() if part not in frozen)

    @property
    def mesh(self) -> dict[str, int]:
        wanted, count = self.config.mesh, self.slice.count
        return sharding.axis_sizes(
            data=wanted.data, fsdp=wanted.fsdp, tensor=wanted.tensor, devices=count
        )

    @property
    def ways(self) -> int:
        """Parts into which a micro-batch's rows are split."""
        return self.mesh["data"] * self.mesh["fsdp"]

    @property
    def micro_batches(self) -> float:
        packed = self.config.packing
        room = packed.rows * packed.row_length
        by_slots = packed.rows * packed.pairs_per_row
        return packed.pairs_per_step / min(room / self.pair.tokens, by_slots)


@dataclasses.dataclass(frozen=True)
class _Account:
    memory: memory.Prediction
    sent: dict[str, int]
    reference_peak: int = 0
    inexact: int = 0
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    compile_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make(config: cfg.Config, on: Slice, pair: Pair, say: Say) -> Plan:
    """The plan of a config; if it does not fit, with the changes that make it fit.

    ``say`` is told of each attempt. A pair longer than a row is a ``UserError``.
    """
    architecture = ahead.find_architecture(config)
    if pair.tokens > config.packing.row_length:
        raise UserError(
            "a pair's tokens must fit packing.row_length ="
            f" {config.packing.row_length}, got {pair.tokens} of --prompt-tokens"
            f" {pair.prompt} and twice --answer-tokens {pair.answer}. Lower these."
        )
    subject = _Subject(config, architecture, on, pair, {}, ())
    # Refuses an attention backend that cannot run there.
    _, shapes = policy.shapes(
        architecture, subject.compute, latent=config.latent, adapters=config.adapters
    )
    sizes = {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for part, tree in shapes.items()
    }
    subject = dataclasses.replace(subject, sizes=sizes)
    flags: dict[str, str] = {}
    if short := -config.packing.rows % subject.ways:  # the result doesn't depend on it
        subject = _change(subject, flags, "packing", rows=config.packing.rows + short)
    if on.topology is not None:
        subject = dataclasses.replace(subject, devices=ahead.devices(on.topology))
    return _fitting(subject, flags, say)


def _change(
    subject: _Subject, flags: dict[str, str], section: str, **values: Any
) -> _Subject:
    """The subject with other settings, each noted as its flag."""
    for name, value in values.items():
        flag = f"--{section}.{name.replace('_', '-')}"
        flags[flag] = f"{flag} {value}"
    inner = dataclasses.replace(getattr(subject.config, section), **values)
    config = dataclasses.replace(subject.config, **{section: inner})
    return dataclasses.replace(subject, config=config)


def _fitting(subject: _Subject, flags: dict[str, str], say: Say) -> Plan:
    first = _plan(subject, flags, say)
    if first is not None and first.fits:
        return first
    tried = []
    for other, more in _changes(subject):
        listed = " ".join(more.values())
        if not _can_fit(other):  # spares a compilation that can only fail
            tried.append(f"{listed} (what stays between programs is too much)")
            continue
        say(f"does not fit; trying {listed}")
        plan = _plan(other, flags | more, say)
        if plan is not None and plan.fits:
            return plan
        tried.append(listed)
    listed = "; ".join(tried) or "nothing: there is nothing left to lower"
    notes = (f"it does not fit, and neither did what was tried: {listed}",)
    if first is None:
        first = _assembled(subject, flags, _by_hand(subject))
        notes = (*notes, "the compiler gave up: memory here is counted by hand")
    return dataclasses.replace(first, notes=(*first.notes, *notes))


def _can_fit(subject: _Subject) -> bool:
    """Whether what stays between programs would fit."""
    kept = _by_hand(subject).memory
    return dataclasses.replace(kept, peak=kept.peak - kept.temporary).fits


def _changes(subject: _Subject) -> Iterator[tuple[_Subject, dict[str, str]]]:
    """Ways to need less memory, the least change first; they accumulate."""
    flags: dict[str, str] = {}
    less_kept = {"none": ("dots", "block"), "block": ()}
    for less in less_kept.get(subject.config.model.remat, ("block",)):
        subject = _change(subject, flags, "model", remat=less)
        yield subject, dict(flags)
    while (per_device := subject.config.packing.rows // subject.ways) > 1:
        rows = subject.ways * (per_device // 2)
        subject = _change(subject, flags, "packing", rows=rows)
        yield subject, dict(flags)
    longest = 1 + 2 * (subject.config.data.max_length - 1)
    unit = subject.compute.row_unit
    shortest = longest + -longest % unit
    if shortest < subject.config.packing.row_length:
        subject = _change(subject, flags, "packing", row_length=shortest)
        yield subject, dict(flags)
    if subject.mesh["data"] > 1:
        subject = _change(subject, flags, "mesh", data=1, fsdp=-1)
        subject = _change(subject, flags, "packing", rows=subject.ways)
        yield subject, dict(flags)
    for tensor in _TENSOR:
        if tensor <= subject.mesh["tensor"]:
            continue
        split = tensor * subject.mesh["data"]
        if subject.slice.count % split or subject.architecture.kv_heads % tensor:
            break
        subject = _change(subject, flags, "mesh", tensor=tensor, fsdp=-1)
        subject = _change(subject, flags, "packing", rows=subject.ways)
        yield subject, dict(flags)


def _plan(subject: _Subject, flags: dict[str, str], say: Say) -> Plan | None:
    """A plan; None if a program alone is larger than a chip's memory."""
    try:
        account = _by_compiler(subject, say) if subject.devices else _by_hand(subject)
    except ahead.TooLargeError as e:
        used = "" if e.used is None else f": it would use {memory.size(e.used)} a chip"
        say(f"{e.program} is larger than the memory of a chip{used}")
        return None
    return _assembled(subject, flags, account)


def _by_compiler(subject: _Subject, say: Say) -> _Account:
    config, seconds, compiled = subject.config, {}, {}
    several = subject.micro_batches > 1
    mesh = sharding.make_mesh(**subject.mesh, devices=subject.devices)
    with jax.set_mesh(mesh):
        run = ahead.abstract(config, subject.architecture, subject.pair, mesh)

        def prediction() -> memory.Prediction:
            return memory.needed(
                {name: compiled[name] for name in compiled if name != "reference"},
                params=run.state.params,
                frozen=run.policy.frozen,
                opt_state=run.state.opt_state,
                several_micro_batches=several,
                process=0,
                capacity=subject.slice.chip.memory,
            )

        say(f"compiling the gradients of {config.packing.rows} rows for {mesh.size}")
        for name, lower in ahead.jobs(run, several=several).items():
            compiled[name] = ahead.timed(name, lower, seconds)
            if name == "gradients" and not prediction().fits:
                break
    reference = 0
    if "reference" in compiled:
        use = compiled["reference"].memory_analysis()
        reference = use.argument_size_in_bytes + use.temp_size_in_bytes
        reference += use.output_size_in_bytes
    count = math.ceil(subject.micro_batches)
    sent, inexact = dict.fromkeys(collectives.KINDS, 0), 0
    for name, runs in {"gradients": count, "add": count - 1, "update": 1}.items():
        if name not in compiled:
            continue
        for collective in collectives.read(compiled[name].as_text()):
            sent[collective.kind] += collective.sent * runs
            inexact += not collective.exact
    libraries = ("jax", "jaxlib", "libtpu")
    versions = {name: importlib.metadata.version(name) for name in libraries}
    return _Account(prediction(), sent, reference, inexact, versions, seconds)


def _by_hand(subject: _Subject) -> _Account:
    """Arithmetic: all is split evenly, only what must be kept and sent counts."""
    config, mesh, trained = subject.config, subject.mesh, subject.trained
    of_run = (config, subject.architecture, mesh)
    split = mesh["fsdp"] * mesh["tensor"]
    masters = 4 * trained // split
    dtype = subject.compute.dtype
    held = masters + dtype.itemsize * (sum(subject.sizes.values()) - trained) // split
    # Adam's two moments; optimizers with fewer need less.
    optimizer = 2 * masters
    gradients = masters * (2 if subject.micro_batches > 1 else 1)
    temporary = arithmetic.temporary(*of_run, subject.compute.attention)
    predicted = memory.Prediction(
        parameters=masters,
        frozen=held - masters,
        optimizer=optimizer,
        gradients=gradients,
        temporary=temporary,
        process=0,
        peak=held + optimizer + gradients + temporary,
        capacity=subject.slice.chip.memory,
    )
    count = math.ceil(subject.micro_batches)
    moved = arithmetic.gathered_and_scattered(*of_run, trained)
    sent = {kind: round(count * moved.get(kind, 0)) for kind in collectives.KINDS}
    notes = ()
    if subject.platform == "gpu" and subject.slice.count > _GPUS_OF_A_MACHINE:
        notes = ("NVLink is taken to join all; between machines it does not",)
    if mesh["tensor"] > 1:
        notes = (*notes, "what mesh.tensor sends is not counted")
    return _Account(predicted, sent, notes=notes)


def _assembled(subject: _Subject, flags: dict[str, str], account: _Account) -> Plan:
    config, chip, count = subject.config, subject.slice.chip, subject.slice.count
    of_run = (config, subject.architecture)
    of_pair = arithmetic.flops(*of_run, subject.pair, subject.compute.attention)
    traffic = arithmetic.least_memory_traffic(
        *of_run,
        tensor=subject.mesh["tensor"],
        micro_batches=math.ceil(subject.micro_batches),
        trained=account.memory.parameters,
        optimizer=account.memory.optimizer,
    )
    pairs, peak_flops = config.packing.pairs_per_step, chip.flops * count
    return Plan(
        **vars(account),
        config=config.name,
        slice=subject.slice.name,
        chips=count,
        compiled=bool(account.versions),
        mesh=subject.mesh,
        rows=config.packing.rows,
        row_length=config.packing.row_length,
        remat=config.model.remat,
        attention=subject.compute.attention,
        compute_dtype=subject.compute.dtype.name,
        parameters=sum(subject.sizes.values()),
        trained=subject.trained,
        pair=subject.pair,
        pairs_per_step=pairs,
        micro_batches=subject.micro_batches,
        model_flops=of_pair.model * pairs,
        hardware_flops=of_pair.hardware * pairs,
        seconds={
            "compute": of_pair.hardware * pairs / peak_flops,
            "memory": traffic / chip.memory_bandwidth,
            "interconnect": sum(account.sent.values()) / chip.link_bandwidth,
        },
        peak_flops=peak_flops,
        changes=tuple(flags.values()),
    )
