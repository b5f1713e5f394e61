"""A plan for a person, for a file, and many of them as the table of a document.

Knows nothing of how a plan is made.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lpc_jax.errors import UserError
from lpc_jax.training.memory import size
from lpc_jax.training.plan import Plan


def lines(plan: Plan) -> list[str]:
    """What ``scripts/plan.py`` prints, per chip unless it says otherwise."""
    m, pair = plan.memory, plan.pair
    how = (
        "compiled ahead of time by "
        + ", ".join(f"{name} {version}" for name, version in plan.versions.items())
        if plan.compiled
        else "BY ARITHMETIC, nothing was compiled: memory is an estimate"
    )
    mesh = " ".join(f"{axis}={ways}" for axis, ways in plan.mesh.items())
    trained = (
        ""
        if plan.trained == plan.parameters
        else f", {plan.trained / 1e6:.1f} M trained"
    )
    held = {
        "parameters": m.parameters,
        "frozen decoder": m.frozen,
        "optimizer": m.optimizer,
        "gradients": m.gradients,
        "temporary": m.temporary,
    }
    capacity = m.capacity or 0
    found = [
        f"plan: {plan.config} on {plan.slice} ({plan.chips} chips), {how}",
        f"model: {plan.parameters / 1e6:.1f} M parameters{trained}, compute"
        f" {plan.compute_dtype}; mesh {mesh}; attention {plan.attention}; remat"
        f" {plan.remat}",
        f"assumed: every pair {pair.tokens} tokens ({pair.prompt} prompt and"
        f" {pair.answer} in each answer, {pair.scored} scored), rows full (change with"
        " --prompt-tokens, --answer-tokens)",
        f"batch: {plan.pairs_per_step} pairs a step in {plan.micro_batches:.2f}"
        f" micro-batches of {plan.rows} rows x {plan.row_length} tokens",
        "memory: "
        + ", ".join(f"{name} {size(part)}" for name, part in held.items() if part),
    ]
    if plan.reference_peak:
        found.append(f"memory: {size(plan.reference_peak)} while the reference scores")
    found.append(
        f"memory: peak {size(plan.peak)} of {size(capacity)}"
        f" ({plan.peak / capacity:.0%}): {'fits' if plan.fits else 'DOES NOT FIT'}"
    )
    found += _step_lines(plan)
    if plan.compile_seconds:
        times = plan.compile_seconds.items()
        found.append(
            "compiled in: " + ", ".join(f"{name} {t:.0f} s" for name, t in times)
        )
    found += [f"note: {note}" for note in plan.notes]
    if plan.changes:
        found.append(f"pass: {' '.join(plan.changes)}")
    return found


def _step_lines(plan: Plan) -> list[str]:
    sent = {kind: count for kind, count in plan.sent.items() if count}
    listed = ", ".join(f"{kind} {size(count)}" for kind, count in sent.items())
    unknown = (
        f" ({plan.inexact} of them in loops of unknown length, counted once)"
        if plan.inexact
        else ""
    )
    bounds = ", ".join(f"{name} {t:.3f} s" for name, t in plan.seconds.items())
    return [
        f"a step, all chips: {plan.model_flops / 1e15:.2f} PFLOP of the model,"
        f" {plan.hardware_flops / 1e15:.2f} with what is computed twice",
        f"a step, sent: {listed or 'nothing'}{unknown}",
        f"a step, at least: {bounds}; bound by {plan.binds}",
        f"at best: {plan.step_seconds:.3f} s a step, MFU {plan.mfu:.0%},"
        f" {plan.pairs_per_second:.1f} pairs/s. A bound, not a measurement.",
    ]


def to_json(plan: Plan) -> dict[str, Any]:
    """Everything in a plan and what follows from it."""
    derived = ("peak", "fits", "binds", "step_seconds", "mfu", "pairs_per_second")
    return dataclasses.asdict(plan) | {name: getattr(plan, name) for name in derived}


def write_json(plan: Plan, file: Path) -> None:
    """``to_json`` in a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_json(plan), indent=1) + "\n", encoding="utf-8")


def table(files: Sequence[Path]) -> str:
    """Plans from their JSON files as a table in Markdown.

    Raises:
        UserError: A file that no plan wrote.
    """
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
