"""A contest in numbers: accuracy and margin with intervals, as a table and as JSON.

Knows nothing of models: it reads what everyone said of each pair.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int
from rich import box
from rich.table import Table
from rich.text import Text

from lpc_jax.evaluation import bootstrap, pairs
from lpc_jax.evaluation.bootstrap import Estimate
from lpc_jax.evaluation.contest import SYSTEM, Contest, Contestant

ALL = "all"
LONGER = "longer"

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "transformers", "tokenizers")


@dataclasses.dataclass(frozen=True)
class Line:
    """What one says of a group of pairs, or the system less another, pair by pair.

    Attributes:
        who: A contestant's role, ``LONGER``, or ``system - `` one of these.
        accuracy: Share of pairs whose chosen answer has the greater reward.
        margin: Mean reward of the chosen over the rejected answer; None for the rule.
        ties: Pairs whose answers have one reward or, for the rule, one length; None for
            a difference.
    """

    who: str
    accuracy: Estimate
    margin: Estimate | None
    ties: int | None


@dataclasses.dataclass(frozen=True)
class Group:
    """All pairs, or those of one source.

    Attributes:
        source: Its name, or None for all.
        pairs: How many there are.
        prompts: How many prompts they are of.
        lines: Of everyone.
    """

    source: str | None
    pairs: int
    prompts: int
    lines: tuple[Line, ...]


def longer_is_better(
    lengths: Int[np.ndarray, "B 2"],
) -> Float[np.ndarray, "B"]:
    """1 where the chosen answer is the longer one, 0 where the other is, else 1/2."""
    chosen, rejected = lengths.T
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def summarize(contest: Contest, *, resamples: int, seed: int) -> list[Group]:
    """All pairs, then each source by its name.

    Args:
        contest: What everyone said.
        resamples: Of the bootstrap over prompts.
        seed: Of its draws.
    """
    examples = contest.examples
    sources = np.asarray([one.source for one in examples])
    _, prompts = np.unique(
        [pairs.prompt_key(one) for one in examples], return_inverse=True
    )
    named = [None, *sorted(set(sources.tolist()))]
    if len(named) == 2:  # all is the only source
        named = [None]
    groups = []
    for source in named:
        of = np.ones(len(sources), bool) if source is None else sources == source
        groups.append(_group(source, contest.contestants, prompts, of, resamples, seed))
    return groups


def _group(
    source: str | None,
    contestants: Sequence[Contestant],
    prompts: Int[np.ndarray, "B"],
    of: np.ndarray,
    resamples: int,
    seed: int,
) -> Group:
    main, *others = contestants
    # Columns of pairs: accuracy and, where there is one, margin.
    said = {one.role: _said(one)[of] for one in (main, *others)}
    said[LONGER] = longer_is_better(main.lengths)[of][:, None]
    ties = {one.role: int(np.sum(one.margins[of] == 0)) for one in contestants}
    ties[LONGER] = int(np.sum(said[LONGER] == 0.5))
    comparable = [LONGER, *(one.role for one in others if one.reward == main.reward)]
    for role in comparable:
        columns = said[role].shape[1]
        said[f"{SYSTEM} - {role}"] = said[SYSTEM][:, :columns] - said[role]
    found = bootstrap.estimates(
        np.concatenate(list(said.values()), axis=1),
        prompts[of],
        resamples=resamples,
        seed=seed,
    )
    lines, first = [], 0
    for who, columns in said.items():
        accuracy, *margin = found[first : first + columns.shape[1]]
        first += columns.shape[1]
        lines.append(Line(who, accuracy, margin[0] if margin else None, ties.get(who)))
    return Group(source, int(of.sum()), len(np.unique(prompts[of])), tuple(lines))


def _said(one: Contestant) -> Float[np.ndarray, "B 2"]:
    """Whether each pair is right, a tie counted as wrong as in training; its margin."""
    return np.stack([(one.margins > 0).astype(np.float64), one.margins], axis=1)


def header(contest: Contest) -> list[str]:
    """Who is who, what is compared, and what became of the pairs."""
    lines = []
    for one in contest.contestants:
        z = "" if one.z is None else f"; z: {one.z}"
        lines.append(f"{one.role}: {one.name}{z}")
        against = "" if one.reference is None else f"; pi_ref: {one.reference}"
        lines.append(f"  reward: {one.formula}{against}")
    main, *others = contest.contestants
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
    data = contest.data
    lines.append(
        f"data: at most {data.max_length} tokens of prompt and answer,"
        f" {data.max_prompt_length} of a prompt that is cut; {data.truncation}"
    )
    kept = ("pairs:", "  dropped:", "cut:")
    lines += [line for line in contest.report.lines() if line.startswith(kept)]
    if contest.left_out:
        lines.append(f"  left out, dropped in other tokens: {contest.left_out:,}")
    return lines


def table(groups: Sequence[Group], *, resamples: int) -> Table:
    """A line for everyone in every group."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("", "", "accuracy, %", "margin"):
        made.add_column(name)
    for column in made.columns[2:]:
        column.justify = "right"
    for group in groups:
        # As text: rich would take brackets of a file's words for its markup.
        heads = [Text(ALL if group.source is None else group.source)]
        for count, noun in ((group.pairs, "pair"), (group.prompts, "prompt")):
            heads.append(Text(f"{count:,} {noun}{'s' * (count != 1)}"))
        heads += [Text("")] * (len(group.lines) - len(heads))
        for head, line in zip(heads, group.lines, strict=True):
            difference = line.ties is None
            accuracy = _shown(line.accuracy, scale=100.0, digits=1, signed=difference)
            margin = _shown(line.margin, scale=1.0, digits=3, signed=True)
            made.add_row(head, Text(line.who), Text(accuracy), Text(margin))
        made.add_section()
    made.caption = (
        f"In brackets {100 * bootstrap.LEVEL:g} % intervals: {resamples:,} bootstrap"
        f" draws of prompts.\n'{LONGER}' prefers the answer of more tokens, a tie is a"
        " half; of rewards a tie is wrong."
    )
    made.caption_justify = "left"
    return made


def _shown(
    estimate: Estimate | None, *, scale: float, digits: int, signed: bool
) -> str:
    if estimate is None:
        return ""
    mean = f"{scale * estimate.mean:{'+' if signed else ''}.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return f"{mean} [one prompt]"
    low, high = (f"{scale * end:.{digits}f}" for end in (estimate.low, estimate.high))
    return f"{mean} [{low}, {high}]"


def as_json(
    contest: Contest,
    groups: Sequence[Group],
    *,
    command: Sequence[str],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    """Everything: who, what, all estimates, and what everyone said of each pair.

    Args:
        contest: What everyone said.
        groups: From ``summarize``.
        command: The command line.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
    """
    data, report = contest.data, contest.report
    shares = {"max_length", "max_prompt_length", "truncation", "prefix_mismatch"}
    return {
        "command": list(command),
        "contestants": {
            one.role: {
                "name": one.name,
                "z": one.z,
                "reward": dataclasses.asdict(one.reward) | {"formula": one.formula},
                "reference": one.reference,
                "weights_digest": one.weights_digest,
                "tokenizer_digest": one.tokenizer_digest,
            }
            for one in contest.contestants
        },
        "data": {
            "digest": pairs.digest(contest.examples),
            "settings": {name: getattr(data, name) for name in sorted(shares)},
            "read": report.read,
            "scored": len(contest.examples),
            "dropped": dict(report.drops.counts),
            "dropped_in_other_tokens": contest.left_out,
            "cut_prompts": report.cut_prompts,
            "cut_chosen": report.cut_chosen,
            "cut_rejected": report.cut_rejected,
        },
        "bootstrap": {
            "level": bootstrap.LEVEL,
            "resamples": resamples,
            "seed": seed,
            "drawn": "prompts",
        },
        "groups": [dataclasses.asdict(group) for group in groups],
        "pairs": [_pair(contest, place) for place in range(len(contest.examples))],
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "devices": [device.device_kind for device in jax.devices()],
    }


def _pair(contest: Contest, place: int) -> dict[str, Any]:
    example = contest.examples[place]
    said = {}
    for one in contest.contestants:
        said[one.role] = {
            "logp": one.logp[place].tolist(),
            "lengths": one.lengths[place].tolist(),
            "rewards": one.rewards[place].tolist(),
            "margin": float(one.margins[place]),
        }
        if one.reference_logp is not None:
            said[one.role]["reference_logp"] = one.reference_logp[place].tolist()
    return {
        "origin": example.origin,
        "source": example.source,
        "prompt": pairs.prompt_key(example),
        "said": said,
    }
