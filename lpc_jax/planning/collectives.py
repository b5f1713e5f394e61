"""Collectives of a compiled program, read from its HLO after partitioning."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

# Instructions that move data between devices, without their asynchronous halves.
KINDS: tuple[str, ...] = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
)
# The TPU compiler's fusion of an all-reduce of which each device keeps a part.
_SCATTERING_FUSION = "all-reduce-scatter"
# An asynchronous collective is written where it starts, in each fusion that goes on
# with it, and where it is done.
_CONTINUED_FUSION = "async_collective_fusion"
_DONE_FUSION = "async-collective-done"
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:(ENTRY) )?%?([\w.\-]+) \(.*\{$")
# Layouts hold brackets of their own, T(8,128): operands end where attributes begin.
_INSTRUCTION = re.compile(
    r"^ +(ROOT )?%?([\w.\-]+) = (.+?) ([a-z][\w\-]*)(\((.*?)\)(?:, [a-z_\-]+=.*|$))"
)
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# Opcodes that hand a value on unchanged, for the search of a loop's bounds.
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's dtype and sizes, as one device holds it."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        digits = re.search(r"\d+", self.dtype)
        bits = 8 if self.dtype == "pred" else int(digits[0]) if digits else 0  # a token
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction."""

    kind: str  # one of KINDS
    results: tuple[Shape, ...]  # what each device has after it
    group: int  # devices that take part together
    times: int  # how often it runs in one call of the program
    # False if a loop around it has a length that only the data knows; that loop then
    # counts once.
    exact: bool

    @property
    def sent(self) -> int:
        """Least bytes that each device sends in one call of the program.

        Of n devices, each sends its own part to n - 1 others (all-gather, all-to-all)
        or n - 1 parts of the sum (reduce-scatter). An all-reduce is both (Patarasuk &
        Yuan 2009).
        """
        size, others = sum(shape.bytes for shape in self.results), self.group - 1
        of_one = {
            "all-gather": size * others // self.group,
            "all-to-all": size * others // self.group,
            "reduce-scatter": size * others,
            "all-reduce": 2 * size * others // self.group,
            "collective-permute": size,
        }
        return of_one[self.kind] * self.times


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    text: str  # what follows the opcode
    is_root: bool

    @property
    def index(self) -> int | None:
        """The place of a tuple's element."""
        return self._number("get-tuple-element", r"index=(\d+)")

    @property
    def constant(self) -> int | None:
        return self._number("constant", r"^\((-?\d+)\)")

    def _number(self, opcode: str, pattern: str) -> int | None:
        number = re.search(pattern, self.text) if self.opcode == opcode else None
        return int(number[1]) if number else None


class _Computation(dict[str, _Instruction]):
    @property
    def root(self) -> _Instruction:
        return next(i for i in self.values() if i.is_root)

    def origin(self, name: str) -> _Instruction:
        """The instruction whose value a name hands on."""
        while self[name].opcode in _TRANSPARENT:
            name = self[name].operands[0]
        return self[name]


def read(text: str) -> list[Collective]:
    """All collectives of a program, from ``compiled.as_text()``."""
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions[1]) if partitions else 1
    return list(_within(_parse(text), "ENTRY", devices))


def _parse(text: str) -> dict[str, _Computation]:
    computations: dict[str, _Computation] = {}
    current = _Computation()
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            current = computations[opened[1] or opened[2]] = _Computation()
        elif matched := _INSTRUCTION.match(line):
            root, name, shape, opcode, rest, arguments = matched.groups()
            operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
            current[name] = _Instruction(
                name, shape, opcode, operands, rest, bool(root)
            )
        elif re.match(r" +(ROOT )?%", line):
            raise ValueError(f"an HLO instruction must have operands, got {line!r}")
    return computations


def _within(
    computations: Mapping[str, _Computation], name: str, devices: int
) -> Iterator[Collective]:
    """Collectives of a computation that runs once, and of those that it calls."""
    for instruction in computations[name].values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            group = _group(instruction.text, devices)
            yield Collective(kind, _results(instruction), group, times=1, exact=True)
            continue
        trips: int | None = 1
        if instruction.opcode == "while":
            trips = _trips(computations, computations[name], instruction)
        for called in _called(instruction):
            for collective in _within(computations, called, devices):
                if called.startswith(_SCATTERING_FUSION):
                    part = _shapes(instruction.shape)
                    collective = dataclasses.replace(
                        collective, kind="reduce-scatter", results=part
                    )
                yield dataclasses.replace(
                    collective,
                    times=collective.times * (trips or 1),
                    exact=collective.exact and trips is not None,
                )


def _called(instruction: _Instruction) -> list[str]:
    """Computations that an instruction starts, without reductions' scalar adds."""
    if instruction.name.startswith(_DONE_FUSION):
        return []
    names = []
    for attribute, value in _CALLED.findall(instruction.text):
        adds = attribute == "to_apply" and instruction.opcode != "call"
        if attribute != "condition" and not adds:
            names += re.findall(r"%([\w.\-]+)", value)
    return [name for name in names if not name.startswith(_CONTINUED_FUSION)]


def _results(collective: _Instruction) -> tuple[Shape, ...]:
    shapes, opcode = _shapes(collective.shape), collective.opcode
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        # (operands, results, what the hardware keeps beside them)
        count = len(collective.operands)
        return shapes[count : 2 * count]
    return shapes


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", text))
    )


def _group(text: str, devices: int) -> int:
    """Devices in a group; HLO writes groups in three ways."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if tiled := re.search(r"replica_groups=\[\d+,(\d+)\]<=", text):
        return int(tiled[1])
    if by_axis := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([\w:()]+)'=(\d+)", by_axis[1]))
        names = re.findall(r"'([\w]+)(?::\(\d+\)(\d+))?'", by_axis[2])
        return math.prod(int(part or sizes[name]) for name, part in names)
    return devices


def _trips(
    computations: Mapping[str, _Computation], caller: _Computation, loop: _Instruction
) -> int | None:
    """How often a loop runs; None unless its bounds are constants."""
    if known := _KNOWN_TRIPS.search(loop.text):
        return int(known[1])
    # The TPU's text has no trip count. As the compiler does, look for a counter that
    # starts at a constant, grows by a constant, and is compared with a constant.
    called = dict(_CALLED.findall(loop.text))
    body, condition = (
        computations[called[name].lstrip("%")] for name in ("body", "condition")
    )
    initial, after = caller[loop.operands[0]], body.root
    condition, test = _unfused(computations, condition, condition.root)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter, bound = (condition.origin(name) for name in test.operands)
    if counter.index is None or {initial.opcode, after.opcode} != {"tuple"}:
        return None

    def at_first(value: _Instruction) -> int | None:
        if value.index is not None:  # carried by the loop
            value = caller.origin(initial.operands[value.index])
        return value.constant

    first, last = at_first(counter), at_first(bound)
    grown = body.origin(after.operands[counter.index])
    body, added = _unfused(computations, body, grown)
    if added.opcode != "add" or first is None or last is None:
        return None
    steps = [body.origin(name).constant for name in added.operands]
    step = next(filter(None, steps), None)
    return step and max(0, -(-(last - first) // step))


def _unfused(
    computations: Mapping[str, _Computation],
    outer: _Computation,
    instruction: _Instruction,
) -> tuple[_Computation, _Instruction]:
    """A fusion's last instruction, its parameters replaced by the outer operands."""
    if instruction.opcode != "fusion":
        return outer, instruction
    (name,) = _called(instruction)
    inside = dict(computations[name])
    for key, inner in inside.items():
        if inner.opcode == "parameter":
            index = int(inner.text[1 : inner.text.index(")")])
            inside[key] = outer[instruction.operands[index]]
    return _Computation({**outer, **inside}), computations[name].root
