"""Answers to a few held-out prompts, kept with the step that gave them and measured.

A number on pairs says which of two answers a model prefers, not what it says itself.
Knows nothing of training.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lpc_jax.data.chat import TokenizedPair
from lpc_jax.evaluation.generate import Generator, Ids, Sampling
from lpc_jax.evaluation.steering import Steering
from lpc_jax.files import untrusted, whole

FILE = "samples.jsonl"

# An answer runs in a circle if fewer of its 4-grams of tokens are distinct.
_GRAM, _DISTINCT = 4, 0.7
# Shorter answers have too few 4-grams to tell.
_LEAST_GRAMS = 5


@dataclasses.dataclass(frozen=True)
class Sample:
    """One answer.

    Attributes:
        step: Updates done when it was given.
        id: Of the pair whose prompt it answers.
        source: Of that pair.
        prompt: The last turn before the answer.
        answer: Without special tokens.
        tokens: How many it has, without the one that ended it.
        chosen_tokens: How many the pair's better answer has, likewise.
        ended: Whether the model ended it.
        circle: Whether it runs in a circle.
    """

    step: int
    id: int
    source: str
    prompt: str
    answer: str
    tokens: int
    chosen_tokens: int
    ended: bool
    circle: bool


def in_circle(tokens: Ids | Sequence[int]) -> bool:
    """Whether fewer than 70 % of an answer's 4-grams of tokens are distinct."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return len(grams) >= _LEAST_GRAMS and len(set(grams)) < _DISTINCT * len(grams)


def choose(
    pairs: Sequence[TokenizedPair], count: int, *, most_tokens: int
) -> list[TokenizedPair]:
    """Pairs with different prompts, of all sources in turn, from the first.

    Args:
        pairs: The held-out pairs.
        count: How many to choose, where there are so many.
        most_tokens: Longer prompts are left out.
    """
    by_source: dict[str, dict[bytes, TokenizedPair]] = {}
    for pair in pairs:
        if len(pair.prompt) <= most_tokens:
            of_source = by_source.setdefault(pair.source, {})
            of_source.setdefault(pair.prompt.tobytes(), pair)
    left = [list(by_source[source].values()) for source in sorted(by_source)]
    turns = max(map(len, left), default=0)
    found = [some[turn] for turn in range(turns) for some in left if turn < len(some)]
    return found[:count]


def answer(
    generator: Generator,
    pairs: Sequence[TokenizedPair],
    prompts: Mapping[int, str],
    *,
    step: int,
    steering: Steering,
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy answers to the pairs' prompts.

    Args:
        generator: Of the policy as it is now.
        pairs: From ``choose``.
        prompts: What to show of each pair's prompt, by pair id.
        step: Updates done.
        steering: How z is chosen; not read without a latent.
        max_new_tokens: Most tokens of an answer.
    """
    completions = generator.generate(
        [pair.prompt for pair in pairs],
        sampling=Sampling(max_new_tokens=max_new_tokens),
        steering=steering,
    )
    return [
        Sample(
            step=step,
            id=pair.id,
            source=pair.source,
            prompt=prompts[pair.id],
            answer=completion.text,
            tokens=len(completion.tokens),
            chosen_tokens=len(pair.chosen) - (not pair.cut_chosen),
            ended=completion.reason == "end",
            circle=in_circle(completion.tokens.tolist()),
        )
        for pair, completion in zip(pairs, completions, strict=True)
    ]


def measure(samples: Sequence[Sample]) -> dict[str, float]:
    """What a person would see of the answers, as metrics; shares of all of them.

    ``answers/length_ratio`` is the answers' tokens over those of the chosen answers to
    the same prompts.
    """
    if not samples:
        return {}
    tokens = sum(sample.tokens for sample in samples)
    chosen = sum(sample.chosen_tokens for sample in samples)
    return {
        "answers/ended": float(np.mean([sample.ended for sample in samples])),
        "answers/circle": float(np.mean([sample.circle for sample in samples])),
        "answers/tokens": tokens / len(samples),
        "answers/length_ratio": tokens / max(chosen, 1),
    }


def read(file: Path) -> list[Sample]:
    """The samples that a run kept; a line cut off by a crash is passed over."""
    if not file.exists():
        return []
    *whole, _cut_off = file.read_text(encoding="utf-8").split("\n")
    return [Sample(**json.loads(line)) for line in whole]


def append(file: Path, samples: Sequence[Sample]) -> None:
    """Adds samples to the file, one JSON object a line."""
    with file.open("a", encoding="utf-8") as opened:
        opened.writelines(map(_line, samples))


def _line(sample: Sample) -> str:
    return json.dumps(dataclasses.asdict(sample)) + "\n"


def rewind(file: Path, resume_from: int | None) -> None:
    """Removes samples of steps that will be done again; of a new run, all."""
    kept = [s for s in read(file) if resume_from is not None and s.step <= resume_from]
    if not kept:
        file.unlink(missing_ok=True)
        return
    whole.write(file, "".join(map(_line, kept)))


def before_and_after(samples: Sequence[Sample], *, most: int = 400) -> list[str]:
    """One prompt of each source with its first and its last answer, to be read.

    Args:
        samples: Of at least one step.
        most: Characters of a text that are shown.
    """

    def shown(text: str) -> str:
        return untrusted.shown(" ".join(text.split()), most=most) or "(nothing)"

    lines: list[str] = []
    first, last = (pick(s.step for s in samples) for pick in (min, max))
    for source in sorted({sample.source for sample in samples}):
        of_source = [sample for sample in samples if sample.source == source]
        old = next(s for s in of_source if s.step == first)
        new = next(s for s in of_source if s.step == last and s.id == old.id)
        lines += [
            f"{source}: {shown(old.prompt)}",
            f"  before: {shown(old.answer)}",
            f"  after:  {shown(new.answer)}",
        ]
    return lines
