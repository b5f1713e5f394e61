"""Which collectives a compiled program holds: how large, and how often they run.

Read from the compiler's own text, the HLO after partitioning, so that it is what will
run and not what was asked for. Knows nothing of models, chips or seconds.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

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
# A collective that runs beside other work is written down where it starts, in each
# fusion that goes on with it, and where it is done.
_CONTINUED_FUSION = "async_collective_fusion"
_DONE_FUSION = "async-collective-done"

_BITS = {"pred": 8, "s4": 4, "u4": 4}
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation"
    r"|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
# What hands a value on unchanged, for the search of a loop's bounds.
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array's dtype and sizes, as one device holds it."""

    dtype: str
    sizes: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size without padding."""
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = re.search(r"\d+", self.dtype)
            bits = int(found.group()) if found else 0  # a token has none
        return math.prod(self.sizes) * bits // 8


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction.

    Attributes:
        kind: One of ``KINDS``.
        results: What each device has after it.
        group: Devices that take part together.
        times: How often it runs in one call of the program.
        exact: False if a loop around it has a length that only the data knows; that
            loop then counts once.
        source: The operation in the program that it stems from, as JAX named it.
    """

    kind: str
    results: tuple[Shape, ...]
    group: int
    times: int
    exact: bool
    source: str

    @property
    def sent(self) -> int:
        """Bytes that each device sends, at least, in one call of the program.

        Of n devices, each sends its own part to n - 1 others (all-gather, all-to-all)
        or n - 1 parts of what is summed (reduce-scatter); an all-reduce is the latter
        and then the former (Patarasuk & Yuan 2009).
        """
        others = self.group - 1
        size = sum(shape.bytes for shape in self.results)
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
    root: bool


@dataclasses.dataclass(frozen=True)
class _Computation:
    instructions: dict[str, _Instruction]

    @property
    def root(self) -> _Instruction:
        return next(i for i in self.instructions.values() if i.root)


def read(text: str) -> list[Collective]:
    """All collectives of a program.

    Args:
        text: ``compiled.as_text()``.

    Raises:
        ValueError: The text is no HLO module.
    """
    computations, entry = _parse(text)
    partitions = re.search(r"num_partitions=(\d+)", text)
    devices = int(partitions.group(1)) if partitions else 1
    return list(_walk(computations, entry, 1, True, devices))


def sent_by_kind(found: Sequence[Collective]) -> dict[str, int]:
    """Bytes that each device sends in one call, by kind; kinds without any too."""
    return {kind: sum(c.sent for c in found if c.kind == kind) for kind in KINDS}


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    entry, current = None, {}
    for line in text.splitlines():
        opened = _COMPUTATION.match(line)
        if opened:
            current = {}
            computations[opened.group(2)] = _Computation(current)
            if opened.group(1):
                entry = opened.group(2)
            continue
        matched = _INSTRUCTION.match(line)
        if matched:
            instruction = _instruction(line, matched)
            current[instruction.name] = instruction
    if entry is None:
        raise ValueError(
            "a compiled program's text must hold an ENTRY computation, got"
            f" {text[:40]!r}. Use compiled.as_text()."
        )
    return computations, entry


def _instruction(line: str, matched: re.Match[str]) -> _Instruction:
    rest = line[matched.end() :]
    end = _closing(rest, 0) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    operands = re.findall(r"%([\w.\-]+)", rest[opening:closing])
    return _Instruction(
        matched.group(2),
        shape,
        rest[:opening],
        tuple(operands),
        rest[opening:],
        bool(matched.group(1)),
    )


def _closing(text: str, opening: int) -> int:
    """Where the bracket that opens at an index has closed."""
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i + 1
    raise ValueError(f"an HLO line must close its brackets, got {text[:80]!r}")


def _walk(
    computations: dict[str, _Computation],
    name: str,
    times: int,
    exact: bool,
    devices: int,
) -> Iterator[Collective]:
    for instruction in computations[name].instructions.values():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            yield _collective(instruction, kind, times, exact, devices)
            continue
        inner, inner_exact = times, exact
        if instruction.opcode == "while":
            trips = _trips(computations, name, instruction)
            inner, inner_exact = times * (trips or 1), exact and trips is not None
        for called in _called(instruction):
            found = _walk(computations, called, inner, inner_exact, devices)
            if called.startswith(_SCATTERING_FUSION):
                found = (_scattered(c, instruction) for c in found)
            yield from found


def _called(instruction: _Instruction) -> list[str]:
    """Computations that an instruction begins; not those that only add two numbers."""
    names = []
    if instruction.name.startswith(_DONE_FUSION):
        return names
    for attribute, value in _CALLED.findall(instruction.text):
        if attribute == "condition":
            continue
        if attribute == "to_apply" and instruction.opcode != "call":
            continue
        names += re.findall(r"%([\w.\-]+)", value)
    return [name for name in names if not name.startswith(_CONTINUED_FUSION)]


def _collective(
    instruction: _Instruction, kind: str, times: int, exact: bool, devices: int
) -> Collective:
    shapes = _shapes(instruction.shape)
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        # (operands, results, what the hardware keeps beside them)
        count = len(instruction.operands)
        shapes = shapes[count : 2 * count]
    source = re.search(r'op_name="([^"]*)"', instruction.text)
    return Collective(
        kind,
        shapes,
        _group(instruction.text, devices),
        times,
        exact,
        source.group(1) if source else "",
    )


def _scattered(found: Collective, fusion: _Instruction) -> Collective:
    """What the fusion of an all-reduce and a slice is: each keeps a part."""
    return dataclasses.replace(
        found, kind="reduce-scatter", results=_shapes(fusion.shape)
    )


def _shapes(text: str) -> tuple[Shape, ...]:
    return tuple(
        Shape(dtype, tuple(int(size) for size in sizes.split(",") if size))
        for dtype, sizes in _ARRAY.findall(re.sub(r"\{[^}]*\}", "", text))
    )


def _group(text: str, devices: int) -> int:
    """Devices in one of the groups that an instruction names in any of three ways."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", text)
    if listed:
        return listed.group(1).count(",") + 1
    tiled = re.search(r"replica_groups=\[\d+,(\d+)\]<=", text)
    if tiled:
        return int(tiled.group(1))
    by_axis = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text)
    if by_axis:
        sizes = dict(re.findall(r"'([\w:()]+)'=(\d+)", by_axis.group(1)))
        names = re.findall(r"'([\w]+)(?::\(\d+\)(\d+))?'", by_axis.group(2))
        return math.prod(int(part or sizes[name]) for name, part in names)
    return devices


def _trips(
    computations: dict[str, _Computation], caller: str, loop: _Instruction
) -> int | None:
    """How often a loop runs; None if its bounds are no constants.

    The TPU's text names no count, so it is found as the compiler itself does: a counter
    that starts at a constant, grows by one, and is compared with one.
    """
    known = _KNOWN_TRIPS.search(loop.text)
    if known:
        return int(known.group(1))
    called = dict(_CALLED.findall(loop.text))
    condition = computations[called["condition"].lstrip("%")]
    body = computations[called["body"].lstrip("%")]
    test = condition.root
    if test.opcode == "fusion":
        condition, test = _unfused(computations, condition, test)
    if test.opcode != "compare" or "direction=LT" not in test.text:
        return None
    counter = _element(condition, test.operands[0])
    if counter is None:
        return None
    initial = computations[caller].instructions[loop.operands[0]]
    if initial.opcode != "tuple":
        return None

    def before(place: int) -> int | None:
        return _constant(computations[caller], initial.operands[place])

    last = _constant(condition, test.operands[1])
    bound = _element(condition, test.operands[1])
    if last is None and bound is not None:
        last = before(bound)  # carried by the loop, unchanged
    step = _growth(computations, body, counter)
    first = before(counter)
    if first is None or last is None or not step:
        return None
    return max(0, -(-(last - first) // step))


def _unfused(
    computations: dict[str, _Computation], outer: _Computation, fusion: _Instruction
) -> tuple[_Computation, _Instruction]:
    """A fusion's last instruction, its parameters replaced by what they are outside."""
    (name,) = _called(fusion)
    inside = dict(computations[name].instructions)
    for key, instruction in inside.items():
        if instruction.opcode == "parameter":
            index = int(instruction.text[1 : instruction.text.index(")")])
            inside[key] = outer.instructions[fusion.operands[index]]
    both = _Computation({**outer.instructions, **inside})
    return both, computations[name].root


def _resolve(computation: _Computation, name: str) -> _Instruction:
    instruction = computation.instructions[name]
    while instruction.opcode in _TRANSPARENT:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _constant(computation: _Computation, name: str) -> int | None:
    instruction = _resolve(computation, name)
    value = re.match(r"\((-?\d+)\)", instruction.text)
    return int(value.group(1)) if instruction.opcode == "constant" and value else None


def _element(computation: _Computation, name: str) -> int | None:
    """Which of the loop's values an instruction is."""
    instruction = _resolve(computation, name)
    index = re.search(r"index=(\d+)", instruction.text)
    if instruction.opcode != "get-tuple-element" or index is None:
        return None
    return int(index.group(1))


def _growth(
    computations: dict[str, _Computation], body: _Computation, counter: int
) -> int | None:
    """What a pass of the body adds to a counter."""
    if body.root.opcode != "tuple":
        return None
    added = _resolve(body, body.root.operands[counter])
    if added.opcode == "fusion":
        body, added = _unfused(computations, body, added)
    if added.opcode != "add":
        return None
    by = [_constant(body, name) for name in added.operands]
    return next((step for step in by if step is not None), None)
