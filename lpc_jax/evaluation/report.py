"""A comparison as accuracies and margins with intervals, in a table or JSON."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int
from rich import box
from rich.table import Table
from rich.text import Text

from lpc_jax.data import pairs as pair_data
from lpc_jax.evaluation import intervals
from lpc_jax.evaluation.comparison import SYSTEM, Comparison, Contestant
from lpc_jax.evaluation.intervals import Estimate

ALL, LONGER = "all", "longer"
_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Line:
    """A policy's accuracy and margin on a group of pairs, or a paired difference."""

    who: str  # a role, LONGER, or "system - " one of these
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


def longer_is_better(lengths: Int[np.ndarray, "B 2"]) -> Float[np.ndarray, "B"]:
    """1 where the chosen answer is longer, 1/2 where equal, else 0."""
    chosen, rejected = lengths.T
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def summarize(comparison: Comparison, *, resamples: int, seed: int) -> list[Group]:
    """Estimates of all pairs, then of each source; see ``intervals.estimates``."""
    texts = comparison.texts
    sources = np.asarray([text.source for text in texts])
    _, prompts = np.unique(
        [pair_data.prompt_key(text) for text in texts], return_inverse=True
    )
    names = sorted(set(sources.tolist()))
    groups: list[Group] = []
    for source in [None, *(names if len(names) > 1 else [])]:
        of = np.ones(len(sources), bool) if source is None else sources == source
        lines = _lines(comparison.contestants, of, prompts[of], resamples, seed)
        count = len(np.unique(prompts[of]))
        groups.append(Group(source, int(of.sum()), count, lines))
    return groups


def _lines(
    contestants: Sequence[Contestant],
    of: Bool[np.ndarray, "all"],
    prompts: Int[np.ndarray, "B"],
    resamples: int,
    seed: int,
) -> tuple[Line, ...]:
    main, *others = contestants
    # By role, columns of each pair: accuracy and, where there is one, margin. A tie
    # counts as wrong, as in training.
    columns: dict[str, np.ndarray] = {}
    ties: dict[str, int] = {}
    for contestant in contestants:
        margins = contestant.margins[of]
        columns[contestant.role] = np.stack([margins > 0.0, margins], axis=1)
        ties[contestant.role] = int(np.sum(margins == 0))
    columns[LONGER] = longer_is_better(main.lengths)[of][:, None]
    ties[LONGER] = int(np.sum(columns[LONGER] == 0.5))
    for role in [LONGER, *(one.role for one in others if one.reward == main.reward)]:
        width = columns[role].shape[1]
        columns[f"{SYSTEM} - {role}"] = columns[SYSTEM][:, :width] - columns[role]
    joined = np.concatenate(list(columns.values()), axis=1)
    # One call, so that all intervals share the draws.
    drawn = intervals.estimates(joined, prompts, resamples=resamples, seed=seed)
    lines, rest = [], iter(drawn)
    for who, values in columns.items():
        accuracy, *margin = itertools.islice(rest, values.shape[1])
        lines.append(Line(who, accuracy, margin[0] if margin else None, ties.get(who)))
    return tuple(lines)


def header(comparison: Comparison) -> list[str]:
    """The policies, their rewards, and what became of the pairs."""
    lines = []
    for one in comparison.contestants:
        z = "" if one.z is None else f"; z: {one.z}"
        lines.append(f"{one.role}: {one.name}{z}")
        against = "" if one.reference is None else f"; pi_ref: {one.reference}"
        lines.append(f"  reward: {one.formula}{against}")
    main, *others = comparison.contestants
    if any(one.reward != main.reward for one in others):
        lines.append(
            "  (under the system's reward the start model has 0 everywhere if it is the"
            " reference, so its own log-probs rank here; --reward mean_logp asks both"
            " alike)"
        )
    if any(one.tokenizer_digest != main.tokenizer_digest for one in others):
        lines.append(
            "tokenizers differ: lengths, cuts and margins are in each one's own tokens"
        )
    rules = comparison.rules
    lines.append(
        f"data: at most {rules['max_length']} tokens of prompt and answer,"
        f" {rules['max_prompt_length']} of a prompt that is cut; {rules['truncation']}"
    )
    kept = ("pairs:", "  dropped:", "cut:")
    lines += [line for line in comparison.report.lines() if line.startswith(kept)]
    if comparison.left_out:
        lines.append(f"  left out, dropped in other tokens: {comparison.left_out:,}")
    return lines


def table(groups: Sequence[Group], *, resamples: int) -> Table:
    """A line for every role and difference in every group."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "", "accuracy, %", "margin"):
        made.add_column(name, justify="right" if name else "left")
    for group in groups:
        heads = [ALL if group.source is None else group.source]
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
    made.caption = (
        f"In brackets {100 * intervals.LEVEL:g} % intervals: {resamples:,} bootstrap"
        f" draws of prompts.\n'{LONGER}' prefers the answer of more tokens, a tie is a"
        " half; of rewards a tie is wrong."
    )
    made.caption_justify = "left"
    return made


def as_json(
    comparison: Comparison,
    groups: Sequence[Group],
    *,
    command: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """The estimates and every pair's scores; ``groups`` are of ``summarize``."""
    report = comparison.report
    return {
        "command": list(command),
        "contestants": {one.role: _who(one) for one in comparison.contestants},
        "data": {
            "digest": pair_data.digest(comparison.texts),
            "settings": dict(sorted(comparison.rules.items())),
            "read": report.read,
            "scored": len(comparison.texts),
            "dropped": dict(report.drops.counts),
            "dropped_in_other_tokens": comparison.left_out,
            "cut_prompts": report.cut_prompts,
            "cut_chosen": report.cut_chosen,
            "cut_rejected": report.cut_rejected,
        },
        "bootstrap": {
            "level": intervals.LEVEL,
            "resamples": resamples,
            "seed": seed,
            "drawn": "prompts",
        },
        "groups": [dataclasses.asdict(group) for group in groups],
        "pairs": _pairs(comparison),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _who(contestant: Contestant) -> dict[str, Any]:
    names = ("name", "z", "reference", "weights_digest", "tokenizer_digest")
    reward = dataclasses.asdict(contestant.reward) | {"formula": contestant.formula}
    return {name: getattr(contestant, name) for name in names} | {"reward": reward}


def _pairs(comparison: Comparison) -> list[dict[str, Any]]:
    said: dict[str, dict[str, list[Any]]] = {}
    for one in comparison.contestants:
        values = {"logp": one.logp, "lengths": one.lengths, "rewards": one.rewards}
        values |= {"margin": one.margins, "reference_logp": one.reference_logp}
        said[one.role] = {k: v.tolist() for k, v in values.items() if v is not None}
    return [
        {
            "origin": text.origin,
            "source": text.source,
            "prompt": pair_data.prompt_key(text),
            "said": {
                role: {name: values[place] for name, values in of_role.items()}
                for role, of_role in said.items()
            },
        }
        for place, text in enumerate(comparison.texts)
    ]
