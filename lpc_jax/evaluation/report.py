"""A comparison as accuracies and margins with intervals, in a table or JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float
from rich import box
from rich.table import Column, Table
from rich.text import Text

from lpc_jax.data import pairs as pair_data
from lpc_jax.evaluation import intervals
from lpc_jax.evaluation.comparison import SYSTEM, Comparison, Entry
from lpc_jax.evaluation.intervals import Estimate

LONGER = "longer"
ACCURACY, MARGIN = "accuracy", "margin"
_CUTS = ("cut_prompts", "cut_chosen", "cut_rejected")
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Line:
    """A policy's accuracy and margin on a group of pairs, or a paired difference."""

    who: str  # a role or LONGER; of a difference "system - " another
    accuracy: Estimate  # share of pairs whose chosen answer has the greater reward
    margin: Estimate | None  # mean of chosen over rejected; None for LONGER
    ties: int | None  # of rewards or, for LONGER, of lengths; None for a difference


@dataclasses.dataclass(frozen=True)
class Group:
    """All pairs (``source`` None) or one source's, and their number of prompts."""

    source: str | None
    pairs: int
    prompts: int
    lines: tuple[Line, ...]


def summarize(comparison: Comparison, **drawn: int) -> list[Group]:
    """Estimates of all pairs, then of each source; ``drawn`` is resamples and seed."""
    texts = comparison.texts
    sources = np.asarray([text.source for text in texts])
    keys = [pair_data.prompt_key(text) for text in texts]
    _, prompts = np.unique(keys, return_inverse=True)
    names = sorted(set(sources.tolist()))
    groups = []
    for source in [None, *(names if len(names) > 1 else [])]:
        where = np.ones(len(sources), bool) if source is None else sources == source
        columns, ties = _columns(comparison.entries, where)
        # One call, so that all intervals share the draws.
        joined = np.stack([*columns.values()], axis=1)
        estimates = intervals.estimates(joined, prompts[where], **drawn)
        of = dict(zip(columns, estimates, strict=True))
        lines = tuple(
            Line(who, of[who, ACCURACY], of.get((who, MARGIN)), ties.get(who))
            for who in dict.fromkeys(who for who, _ in columns)
        )
        count = len(np.unique(prompts[where]))
        groups.append(Group(source, int(where.sum()), count, lines))
    return groups


def _columns(
    entries: Sequence[Entry], where: Bool[np.ndarray, "all"]
) -> tuple[dict[tuple[str, str], Float[np.ndarray, "B"]], dict[str, int]]:
    """Each line's accuracy and margin on every pair, and the ties of each policy."""
    main, *others = entries
    columns, ties = {}, {}
    for entry in entries:
        margins = entry.margins[where]
        # A tie counts as wrong, as in training.
        columns[entry.role, ACCURACY] = (margins > 0).astype(np.float64)
        columns[entry.role, MARGIN] = margins
        ties[entry.role] = int(np.sum(margins == 0))
    longer = np.sign(main.lengths[where] @ [1, -1])
    columns[LONGER, ACCURACY] = (longer + 1) / 2
    ties[LONGER] = int(np.sum(longer == 0))
    alike = [other.role for other in others if other.reward == main.reward]
    for role in [LONGER, *alike]:
        for quantity in [ACCURACY] if role == LONGER else [ACCURACY, MARGIN]:
            difference = columns[SYSTEM, quantity] - columns[role, quantity]
            columns[f"{SYSTEM} - {role}", quantity] = difference
    return columns, ties


def header(comparison: Comparison) -> list[str]:
    """The policies, their rewards, and what became of the pairs."""
    lines = []
    for entry in comparison.entries:
        z = "" if entry.z is None else f"; z: {entry.z}"
        reference = "" if entry.reference is None else f"; pi_ref: {entry.reference}"
        lines.append(f"{entry.role}: {entry.name}{z}")
        lines.append(f"  reward: {entry.formula}{reference}")
    main, *others = comparison.entries
    if any(other.reward != main.reward for other in others):
        lines.append(
            "  (under the system's reward the start model has 0 everywhere if it is the"
            " reference, so its own log-probs rank here; --reward mean_logp asks both"
            " alike)"
        )
    if any(other.tokenizer_digest != main.tokenizer_digest for other in others):
        lines.append(
            "tokenizers differ: lengths, cuts and margins are in each one's own tokens"
        )
    rules = comparison.rules
    lines.append(
        f"data: at most {rules['max_length']} tokens of prompt and answer,"
        f" {rules['max_prompt_length']} of a prompt that is cut; {rules['truncation']}"
    )
    lines += comparison.report.lines()
    if comparison.left_out:
        lines.append(f"  left out, dropped in other tokens: {comparison.left_out:,}")
    return lines


def table(groups: Sequence[Group], *, resamples: int) -> Table:
    """A line for every role and difference in every group."""
    caption = (
        f"In brackets {100 * intervals.LEVEL:g} % intervals: {resamples:,} bootstrap"
        f" draws of prompts.\n'{LONGER}' prefers the answer of more tokens, a tie is a"
        " half; of rewards a tie is wrong."
    )
    numbers = [Column(name, justify="right") for name in ("accuracy, %", "margin")]
    made = Table(
        "", "", *numbers, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    made.caption, made.caption_justify = caption, "left"
    for group in groups:
        heads = ["all" if group.source is None else group.source]
        for count, noun in ((group.pairs, "pair"), (group.prompts, "prompt")):
            heads.append(f"{count:,} {noun}{'s' * (count != 1)}")
        heads += [""] * (len(group.lines) - len(heads))
        for head, line in zip(heads, group.lines, strict=True):
            signed = line.ties is None  # a difference
            accuracy = line.accuracy.text(1, scale=100.0, signed=signed)
            margin = "" if line.margin is None else line.margin.text(signed=True)
            # As Text: rich would take brackets in a source's name for markup.
            made.add_row(*map(Text, (head, line.who, accuracy, margin)))
        made.add_section()
    return made


def as_json(
    comparison: Comparison,
    groups: Sequence[Group],
    *,
    command: list[str],
    **drawn: int,
) -> dict[str, Any]:
    """The estimates and scores; ``groups`` are of ``summarize``, as is ``drawn``."""
    report = comparison.report
    scores = {entry.role: _scores(entry) for entry in comparison.entries}
    return {
        "command": command,
        "contestants": {entry.role: _settings(entry) for entry in comparison.entries},
        "data": {
            "digest": pair_data.digest(comparison.texts),
            "settings": dict(sorted(comparison.rules.items())),
            "read": report.read,
            "scored": len(comparison.texts),
            "dropped": dict(report.drops.counts),
            "dropped_in_other_tokens": comparison.left_out,
            **{name: getattr(report, name) for name in _CUTS},
        },
        "bootstrap": {"level": intervals.LEVEL, **drawn, "drawn": "prompts"},
        "groups": [dataclasses.asdict(group) for group in groups],
        "pairs": [
            {
                "origin": text.origin,
                "source": text.source,
                "prompt": pair_data.prompt_key(text),
                "said": {role: of_pairs[i] for role, of_pairs in scores.items()},
            }
            for i, text in enumerate(comparison.texts)
        ],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _settings(entry: Entry) -> dict[str, Any]:
    names = ("name", "z", "reference", "weights_digest", "tokenizer_digest")
    reward = dataclasses.asdict(entry.reward) | {"formula": entry.formula}
    return {name: getattr(entry, name) for name in names} | {"reward": reward}


def _scores(entry: Entry) -> list[dict[str, Any]]:
    """Of each pair."""
    columns = {"logp": entry.logp, "lengths": entry.lengths, "rewards": entry.rewards}
    columns |= {"margin": entry.margins, "reference_logp": entry.reference_logp}
    lists = {name: x.tolist() for name, x in columns.items() if x is not None}
    return [
        dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)
    ]
