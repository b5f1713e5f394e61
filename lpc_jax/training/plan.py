"""What a run would need and could reach on chips that are not here.

The real programs of ``step.py`` are compiled ahead of time for the named TPU slice from
shapes alone; for GPUs, which need their own compiler, the same is counted by hand.
Nothing is run. Knows nothing of data: all pairs are taken to be of one length.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax

from lpc_jax import assembly, sharding
from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.models.architectures import Architecture
from lpc_jax.training import ahead, arithmetic, collectives, memory
from lpc_jax.training.arithmetic import Pair
from lpc_jax.training.chips import Slice

Say = Callable[[str], None]

# GPUs that NVLink joins, in NVIDIA's HGX and DGX machines of these kinds.
_GPUS_OF_A_MACHINE = 8
# Widths of the tensor axis that are tried.
_TENSOR = (2, 4, 8)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a slice: what it needs, what it moves, what it could reach at best.

    Attributes:
        config: Its name.
        slice: The chips' name.
        chips: How many.
        compiled: Whether a compiler said so; else it was counted by hand.
        versions: Of jax and of the compiler, where one was asked.
        compile_seconds: Of each program.
        mesh: Sizes of the axes.
        rows: Of a micro-batch.
        row_length: Tokens of a row.
        remat: As ``model.remat``.
        attention: The backend.
        compute_dtype: Of matrix products.
        parameters: In all, of which ``trained``.
        trained: Those that updates change.
        pair: What all pairs are taken to be.
        pairs_per_step: B.
        micro_batches: Of full rows that a step fills; a fraction is a shorter one.
        memory: Bytes of each chip.
        reference_peak: Bytes while the reference is scored; 0 for a loss without.
        sent: Bytes that each chip sends in a step, by kind of collective.
        inexact: Collectives in loops whose length only the data knows.
        model_flops: Of a step, over all chips.
        hardware_flops: Likewise, with what is computed twice.
        seconds: The least that a step takes of each: ``compute``, ``memory`` and
            ``interconnect``.
        changes: Flags that this plan has besides those that were asked for.
        notes: What else a person should know.
    """

    config: str
    slice: str
    chips: int
    compiled: bool
    versions: dict[str, str]
    compile_seconds: dict[str, float]
    mesh: dict[str, int]
    rows: int
    row_length: int
    remat: str
    attention: str
    compute_dtype: str
    parameters: int
    trained: int
    pair: Pair
    pairs_per_step: int
    micro_batches: float
    memory: memory.Prediction
    reference_peak: int
    sent: dict[str, int]
    inexact: int
    model_flops: float
    hardware_flops: float
    seconds: dict[str, float]
    peak_flops: float
    changes: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def peak(self) -> int:
        """Most bytes on a chip at any time."""
        return max(self.memory.peak, self.reference_peak)

    @property
    def fits(self) -> bool:
        """Whether that leaves the margin that runs need."""
        return dataclasses.replace(self.memory, peak=self.peak).fits

    @property
    def binds(self) -> str:
        """What a step cannot be faster than."""
        return max(self.seconds, key=lambda name: self.seconds[name])

    @property
    def step_seconds(self) -> float:
        """The roofline: the least that a step takes, all else hidden behind it."""
        return self.seconds[self.binds]

    @property
    def mfu(self) -> float:
        """The share of the peak that a step of that length would reach."""
        return self.model_flops / (self.step_seconds * self.peak_flops)

    @property
    def pairs_per_second(self) -> float:
        """Likewise; a run is slower."""
        return self.pairs_per_step / self.step_seconds


@dataclasses.dataclass(frozen=True)
class _Subject:
    """What a plan is made for."""

    config: cfg.Config
    architecture: Architecture
    slice: Slice
    pair: Pair
    devices: tuple[Any, ...]  # empty where nothing is compiled

    @property
    def mesh_sizes(self) -> dict[str, int]:
        wanted, count = self.config.mesh, self.slice.count
        return sharding.axis_sizes(
            data=wanted.data, fsdp=wanted.fsdp, tensor=wanted.tensor, devices=count
        )

    @property
    def ways(self) -> int:
        """Parts into which a micro-batch's rows are split."""
        return self.mesh_sizes["data"] * self.mesh_sizes["fsdp"]

    @property
    def micro_batches(self) -> float:
        packed = self.config.packing
        room = packed.rows * packed.row_length
        by_slots = packed.rows * packed.pairs_per_row
        pairs = min(room / self.pair.tokens, by_slots)
        return packed.pairs_per_step / pairs

    @property
    def several(self) -> bool:
        return self.micro_batches > 1

    def changed(self, section: str, **values: Any) -> _Subject:
        inner = dataclasses.replace(getattr(self.config, section), **values)
        config = dataclasses.replace(self.config, **{section: inner})
        return dataclasses.replace(self, config=config)


def make(config: cfg.Config, on: Slice, pair: Pair, say: Say) -> Plan:
    """The plan of a config; of one that doesn't fit, with the changes that make it.

    Args:
        config: The run.
        on: Where.
        pair: What all pairs are taken to be.
        say: Told what is compiled, and what was tried.

    Raises:
        UserError: Something that the user can mend, before anything is compiled.
    """
    architecture = ahead.find_architecture(config)
    if pair.tokens > config.packing.row_length:
        raise UserError(
            "a pair's tokens must fit packing.row_length ="
            f" {config.packing.row_length}, got {pair.tokens} of --prompt-tokens"
            f" {pair.prompt} and twice --answer-tokens {pair.answer}. Lower these."
        )
    subject = _Subject(config, architecture, on, pair, ())
    assembly.attention_backend(
        config, on.chip.platform
    )  # refuses what cannot run there
    subject, flags = _with_rows(subject)
    if on.topology is not None:
        subject = dataclasses.replace(subject, devices=ahead.devices(on.topology))
    return _fitting(subject, flags, say)


def _with_rows(subject: _Subject) -> tuple[_Subject, tuple[str, ...]]:
    """With as many rows as the mesh can split; the result doesn't depend on them."""
    rows = subject.config.packing.rows
    needed = rows + -rows % subject.ways
    if needed == rows:
        return subject, ()
    return subject.changed("packing", rows=needed), (f"--packing.rows {needed}",)


def _fitting(subject: _Subject, flags: tuple[str, ...], say: Say) -> Plan:
    first = _plan(subject, flags, say)
    if first is not None and first.fits:
        return first
    tried = []
    for other, more in _changes(subject):
        if not _can_fit(other):  # spares a compilation that can only fail
            tried.append(f"{' '.join(more)} (what stays between programs is too much)")
            continue
        say(f"does not fit; trying {' '.join(more)}")
        found = _plan(other, _merged(flags, more), say)
        if found is not None and found.fits:
            return found
        tried.append(" ".join(more))
    listed = "; ".join(tried) or "nothing: there is nothing left to lower"
    notes = (f"it does not fit, and neither did what was tried: {listed}",)
    if first is None:
        first = _by_hand(subject, flags, ())
        notes = (*notes, "the compiler gave up: memory here is counted by hand")
    return dataclasses.replace(first, notes=(*first.notes, *notes))


def _merged(flags: tuple[str, ...], more: tuple[str, ...]) -> tuple[str, ...]:
    """Flags of which a later one of the same name replaces an earlier."""
    by_name = {flag.split()[0]: flag for flag in (*flags, *more)}
    return tuple(by_name.values())


def _can_fit(subject: _Subject) -> bool:
    """Whether what a step keeps, without any program's own needs, would fit."""
    kept = _by_hand(subject, (), ()).memory
    return dataclasses.replace(kept, peak=kept.peak - kept.temporary).fits


def _changes(subject: _Subject) -> Iterator[tuple[_Subject, tuple[str, ...]]]:
    """Ways to need less memory, the least change first; each keeps those before it."""
    flags: dict[str, str] = {}

    def change(section: str, name: str, value: Any) -> None:
        nonlocal subject
        subject = subject.changed(section, **{name: value})
        flag = f"--{section}.{name.replace('_', '-')}"
        flags[flag] = f"{flag} {value}"

    def rest() -> tuple[_Subject, tuple[str, ...]]:
        return subject, tuple(flags.values())

    order = ("none", "dots", "block")
    remat = subject.config.model.remat
    for less in order[order.index(remat) + 1 :] if remat in order else ("block",):
        change("model", "remat", less)
        yield rest()
    while subject.config.packing.rows // subject.ways > 1:
        per_device = subject.config.packing.rows // subject.ways
        change("packing", "rows", subject.ways * (per_device // 2))
        yield rest()
    data, packed = subject.config.data, subject.config.packing
    longest = 1 + 2 * (data.max_length - 1)
    unit = assembly.row_unit(subject.config, subject.slice.chip.platform)
    shortest = longest + -longest % unit
    if shortest < packed.row_length:
        change("packing", "row_length", shortest)
        yield rest()
    if subject.mesh_sizes["data"] > 1:
        change("mesh", "data", 1)
        change("mesh", "fsdp", -1)
        change("packing", "rows", subject.ways)
        yield rest()
    for tensor in _TENSOR:
        split = tensor * subject.mesh_sizes["data"]
        if tensor <= subject.mesh_sizes["tensor"]:
            continue
        if subject.slice.count % split or subject.architecture.kv_heads % tensor:
            break
        change("mesh", "tensor", tensor)
        change("mesh", "fsdp", -1)
        change("packing", "rows", subject.ways)
        yield rest()


def _plan(subject: _Subject, flags: tuple[str, ...], say: Say) -> Plan | None:
    """None if a program alone is larger than a chip's memory."""
    if not subject.devices:
        return _by_hand(subject, flags, ())
    try:
        return _by_compiler(subject, flags, say)
    except ahead.TooLargeError as e:
        used = "" if e.used is None else f": it would use {memory.size(e.used)} a chip"
        say(f"{e.program} is larger than the memory of a chip{used}")
        return None


def _by_compiler(subject: _Subject, flags: tuple[str, ...], say: Say) -> Plan:
    config, chip = subject.config, subject.slice.chip
    mesh = sharding.make_mesh(
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        tensor=config.mesh.tensor,
        devices=subject.devices,
    )
    seconds: dict[str, float] = {}
    compiled: dict[str, Any] = {}
    of_run = (config, subject.architecture, subject.pair)
    with jax.set_mesh(mesh):
        run = ahead.abstract(*of_run, mesh)
        state = run.state

        def prediction() -> memory.Prediction:
            return memory.needed(
                {name: compiled[name] for name in compiled if name in _HELD},
                params=state.params,
                frozen=run.frozen,
                opt_state=state.opt_state,
                several_micro_batches=subject.several,
                process=0,
                capacity=chip.memory,
            )

        say(f"compiling the gradients of {config.packing.rows} rows for {mesh.size}")
        compiled["gradients"] = ahead.timed(
            "gradients", lambda: run.programs.gradients.lower(*run.given), seconds
        )
        if prediction().fits:
            jobs = ahead.besides_gradients(*of_run, run, mesh, several=subject.several)
            for name, lower in jobs.items():
                compiled[name] = ahead.timed(name, lower, seconds)
    predicted = prediction()
    if "add" in compiled:
        predicted = _with_add(predicted, compiled["add"])
    reference = 0
    if "reference" in compiled:
        use = compiled["reference"].memory_analysis()
        reference = (
            use.argument_size_in_bytes
            + use.temp_size_in_bytes
            + use.output_size_in_bytes
        )
    count = math.ceil(subject.micro_batches)
    runs = {"gradients": count, "add": count - 1, "update": 1}
    found = {
        name: collectives.read(compiled[name].as_text())
        for name in runs
        if name in compiled
    }
    sent = dict.fromkeys(collectives.KINDS, 0)
    for name, some in found.items():
        for kind, size in collectives.sent_by_kind(some).items():
            sent[kind] += size * runs[name]
    inexact = sum(not c.exact for some in found.values() for c in some)
    versions = {
        name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")
    }
    return _assembled(
        subject, flags, predicted, reference, sent, inexact, versions, seconds
    )


# Programs of which memory.needed knows what is held beside them.
_HELD = ("gradients", "update")


def _with_add(predicted: memory.Prediction, add: Any) -> memory.Prediction:
    """With the moment when two sums of gradients become one, the first donated."""
    use = add.memory_analysis()
    held = predicted.parameters + predicted.frozen + predicted.optimizer
    peak = held + predicted.gradients + use.temp_size_in_bytes
    peak += use.output_size_in_bytes - use.alias_size_in_bytes
    return dataclasses.replace(predicted, peak=max(predicted.peak, peak))


def _sizes(subject: _Subject) -> dict[str, Any]:
    """Parameters and bytes of each chip, from shapes alone."""
    config = subject.config
    platform = subject.slice.chip.platform
    _, _, shapes = assembly.abstract(
        config, subject.architecture, platform, plain=False
    )
    return {
        part: sum(leaf.size for leaf in jax.tree.leaves(tree))
        for part, tree in shapes.items()
    }


def _by_hand(subject: _Subject, flags: tuple[str, ...], notes: tuple[str, ...]) -> Plan:
    """By arithmetic: all split evenly, and the least that must be kept and moved."""
    config, chip = subject.config, subject.slice.chip
    mesh, sizes = subject.mesh_sizes, _sizes(subject)
    split = mesh["fsdp"] * mesh["tensor"]
    trained = sum(
        n for part, n in sizes.items() if config.trains_decoder or part != "decoder"
    )
    dtype = assembly.compute_dtype(config, chip.platform)
    frozen = sum(sizes.values()) - trained
    masters = 4 * trained // split
    backend = assembly.attention_backend(config, chip.platform)
    tokens = config.packing.rows * config.packing.row_length
    temporary = arithmetic.temporary(
        config,
        subject.architecture,
        tokens=tokens // (subject.ways * mesh["tensor"]),
        backend=backend,
        split=split,
        tensor=mesh["tensor"],
    )
    # Adam's two moments; optimizers with fewer need less.
    optimizer, gradients = 2 * masters, masters * (2 if subject.several else 1)
    held = masters + dtype.itemsize * frozen // split
    peak = held + optimizer + gradients + temporary
    predicted = memory.Prediction(
        parameters=masters,
        frozen=held - masters,
        optimizer=optimizer,
        gradients=gradients,
        temporary=temporary,
        process=0,
        peak=peak,
        capacity=chip.memory,
    )
    moved = arithmetic.gathered_and_scattered(
        config,
        subject.architecture,
        trained=trained,
        tensor=mesh["tensor"],
        fsdp=mesh["fsdp"],
        data=mesh["data"],
    )
    count = math.ceil(subject.micro_batches)
    sent = dict.fromkeys(collectives.KINDS, 0)
    sent |= {kind: round(count * size) for kind, size in moved.items()}
    if chip.platform == "gpu" and subject.slice.count > _GPUS_OF_A_MACHINE:
        notes = (*notes, "NVLink is taken to join all; between machines it does not")
    if mesh["tensor"] > 1:
        notes = (*notes, "what mesh.tensor sends is not counted")
    return dataclasses.replace(
        _assembled(subject, flags, predicted, 0, sent, 0, {}, {}), notes=notes
    )


def _assembled(
    subject: _Subject,
    flags: tuple[str, ...],
    predicted: memory.Prediction,
    reference_peak: int,
    sent: dict[str, int],
    inexact: int,
    versions: dict[str, str],
    compile_seconds: dict[str, float],
) -> Plan:
    config, chip, count = subject.config, subject.slice.chip, subject.slice.count
    mesh, sizes = subject.mesh_sizes, _sizes(subject)
    backend = assembly.attention_backend(config, chip.platform)
    of_pair = arithmetic.flops(config, subject.architecture, subject.pair, backend)
    pairs = config.packing.pairs_per_step
    micro_batch, update = arithmetic.least_memory_traffic(
        config,
        subject.architecture,
        tensor=mesh["tensor"],
        trained=predicted.parameters,
        optimizer=predicted.optimizer,
    )
    traffic = math.ceil(subject.micro_batches) * micro_batch + update
    peak_flops = chip.flops * count
    return Plan(
        config=config.name,
        slice=subject.slice.name,
        chips=count,
        compiled=bool(versions),
        versions=versions,
        compile_seconds=compile_seconds,
        mesh=mesh,
        rows=config.packing.rows,
        row_length=config.packing.row_length,
        remat=config.model.remat,
        attention=backend,
        compute_dtype=assembly.compute_dtype(config, chip.platform).name,
        parameters=sum(sizes.values()),
        trained=sum(
            n for part, n in sizes.items() if config.trains_decoder or part != "decoder"
        ),
        pair=subject.pair,
        pairs_per_step=pairs,
        micro_batches=subject.micro_batches,
        memory=predicted,
        reference_peak=reference_peak,
        sent=sent,
        inexact=inexact,
        model_flops=of_pair.model * pairs,
        hardware_flops=of_pair.hardware * pairs,
        seconds={
            "compute": of_pair.hardware * pairs / peak_flops,
            "memory": traffic / chip.memory_bandwidth,
            "interconnect": sum(sent.values()) / chip.link_bandwidth,
        },
        peak_flops=peak_flops,
        changes=flags,
        notes=(),
    )
