"""A plan as lines, as JSON, and many plans as a Markdown table."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.planning.plan import Plan
from lpc_jax.training.memory import size


def lines(plan: Plan) -> list[str]:
    """The lines that ``scripts/plan.py`` prints, per chip unless they say otherwise."""
    pair = plan.pair
    how = "BY ARITHMETIC, nothing was compiled: memory is an estimate"
    if plan.compiled:
        versions = (f"{name} {version}" for name, version in plan.versions.items())
        how = f"compiled ahead of time by {', '.join(versions)}"
    mesh = " ".join(f"{axis}={ways}" for axis, ways in plan.mesh.items())
    part = plan.trained != plan.parameters
    trained = f", {plan.trained / 1e6:.1f} M trained" if part else ""
    text = [
        f"plan: {plan.config} on {plan.slice} ({plan.chips} chips), {how}",
        f"model: {plan.parameters / 1e6:.1f} M parameters{trained}, compute"
        f" {plan.compute_dtype}; mesh {mesh}; attention {plan.attention}; remat"
        f" {plan.remat}",
        f"assumed: every pair {pair.tokens} tokens ({pair.prompt} prompt and"
        f" {pair.answer} in each answer, {pair.scored} scored), rows full (change with"
        " --prompt-tokens, --answer-tokens)",
        f"batch: {plan.pairs_per_step} pairs a step in {plan.micro_batches:.2f}"
        f" micro-batches of {plan.rows} rows x {plan.row_length} tokens",
        *memory_lines(plan),
        *_step_lines(plan),
    ]
    if plan.compile_seconds:
        times = (f"{name} {t:.0f} s" for name, t in plan.compile_seconds.items())
        text.append(f"compiled in: {', '.join(times)}")
    text += [f"note: {note}" for note in plan.notes]
    if plan.changes:
        text.append(f"pass: {' '.join(plan.changes)}")
    return text


def memory_lines(plan: Plan) -> list[str]:
    """What a chip holds, and whether it has room for it."""
    capacity, reference = plan.memory.capacity or 0, plan.reference_peak
    scoring = [f"memory: {size(reference)} while the reference scores"]
    return [
        f"memory: {plan.memory.listed}",
        *scoring * bool(reference),
        f"memory: peak {size(plan.peak)} of {size(capacity)}"
        f" ({plan.peak / capacity:.0%}): {'fits' if plan.fits else 'DOES NOT FIT'}",
    ]


def _step_lines(plan: Plan) -> list[str]:
    sent = ", ".join(f"{kind} {size(n)}" for kind, n in plan.sent.items() if n)
    unknown = (
        f" ({plan.inexact} of them in loops of unknown length, counted once)"
        if plan.inexact
        else ""
    )
    bounds = ", ".join(f"{name} {t:.3f} s" for name, t in plan.seconds.items())
    return [
        f"a step, all chips: {plan.model_flops / 1e15:.2f} PFLOP of the model,"
        f" {plan.hardware_flops / 1e15:.2f} with what is computed twice",
        f"a step, sent: {sent or 'nothing'}{unknown}",
        f"a step, at least: {bounds}; bound by {plan.binds}",
        f"at best: {plan.step_seconds:.3f} s a step, MFU {plan.mfu:.0%},"
        f" {plan.pairs_per_second:.1f} pairs/s. A bound, not a measurement.",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """A plan's fields and derived numbers."""
    derived = ("peak", "fits", "binds", "step_seconds", "mfu", "pairs_per_second")
    return dataclasses.asdict(plan) | {name: getattr(plan, name) for name in derived}


def write_json(plan: Plan, file: Path) -> None:
    """Writes ``to_json`` to a file."""
    whole.write(file, json.dumps(to_json(plan), indent=1) + "\n")


def table(files: Sequence[Path]) -> str:
    """A Markdown table of plans from JSON files; a foreign file is a ``UserError``."""
    rows = [
        "| config | slice | rows | pass | peak of memory, GB a chip | bound, s a step"
        " | bound by | MFU, at most | pairs/s, at most |",
        "|---|---|---:|---|---:|---:|---|---:|---:|",
    ]
    for file in files:
        try:
            p = json.loads(file.read_text(encoding="utf-8"))
            flags = f"`{' '.join(p['changes'])}`" if p["changes"] else ""
            peak = f"{p['peak'] / 1e9:.1f} of {p['memory']['capacity'] / 1e9:.1f}"
            fits = "" if p["fits"] else ", does not fit"
            rows.append(
                f"| {p['config']} | {p['slice']} | {p['rows']} x {p['row_length']} |"
                f" {flags} | {peak}{fits} | {p['step_seconds']:.2f} | {p['binds']} |"
                f" {p['mfu']:.0%} | {p['pairs_per_second']:.1f} |"
            )
        except (KeyError, json.JSONDecodeError) as e:
            raise UserError(
                f"--table: {file} must be a file that --json wrote, got one without"
                f" {e}. Make it again with --json {file}."
            ) from e
    return "\n".join(rows)
