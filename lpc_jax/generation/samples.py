"""Answers to a few held-out prompts, kept by step and measured."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from lpc_jax.data.pair import TokenizedPair
from lpc_jax.files import untrusted, whole
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.decode import Ids
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering

FILE = "samples.jsonl"
# An answer runs in a circle if a smaller share of its token 4-grams is distinct.
_GRAM, _DISTINCT = 4, 0.7
# Shorter answers have too few 4-grams to tell.
_LEAST_GRAMS = 5
# Characters shown of a text.
_SHOWN = 400


@dataclasses.dataclass(frozen=True)
class Sample:
    """An answer to a pair's prompt: a line of the file."""

    step: int  # updates done before it
    id: int  # of the pair
    source: str
    prompt: str  # the last turn before the answer
    answer: str
    tokens: int  # without the one that ended it
    chosen_tokens: int  # of the pair's better answer, likewise
    ended: bool  # by the model itself
    circle: bool  # see ``in_circle``


def in_circle(tokens: Ids | Sequence[int]) -> bool:
    """Whether fewer than 70 % of an answer's 4-grams of tokens are distinct."""
    grams = [tuple(tokens[i : i + _GRAM]) for i in range(len(tokens) - _GRAM + 1)]
    return len(grams) >= _LEAST_GRAMS and len(set(grams)) < _DISTINCT * len(grams)


def choose(
    pairs: Sequence[TokenizedPair], count: int, *, most_tokens: int
) -> list[TokenizedPair]:
    """Pairs with different prompts of at most ``most_tokens``, sources in turn."""
    by_source = collections.defaultdict(dict)  # and by prompt
    for pair in pairs:
        if len(pair.prompt) <= most_tokens:
            by_source[pair.source].setdefault(pair.prompt.tobytes(), pair)
    in_turn = itertools.zip_longest(*(by_source[s].values() for s in sorted(by_source)))
    chosen = (pair for turn in in_turn for pair in turn if pair is not None)
    return list(itertools.islice(chosen, count))


def answer(
    generator: Generator,
    pairs: Sequence[TokenizedPair],
    prompts: Mapping[int, str],
    *,
    step: int,
    steering: Steering,
    max_new_tokens: int,
) -> list[Sample]:
    """Greedy answers; ``prompts`` has each pair's prompt as text, by pair id."""
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
    """Shares and mean tokens of the answers, and tokens over the chosen answers'."""
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
    """The samples of a file; a last line cut off by a crash is skipped."""
    if not file.exists():
        return []
    *lines, _cut_off = file.read_text(encoding="utf-8").split("\n")
    return [Sample(**json.loads(line)) for line in lines]


def append(file: Path, samples: Sequence[Sample]) -> None:
    """Appends samples to the file, one JSON object a line."""
    with file.open("a", encoding="utf-8") as opened:
        opened.write(_lines(samples))


def _lines(samples: Sequence[Sample]) -> str:
    return "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in samples)


def rewind(file: Path, resume_from: int | None) -> None:
    """Removes samples of later steps than ``resume_from``; None, a new run: all."""
    kept = [s for s in read(file) if resume_from is not None and s.step <= resume_from]
    if kept:
        whole.write(file, _lines(kept))
    else:
        file.unlink(missing_ok=True)


def before_and_after(samples: Sequence[Sample]) -> list[str]:
    """A prompt of each source with its first and its last answer."""

    def shown(text: str) -> str:
        return untrusted.shown(" ".join(text.split()), most=_SHOWN) or "(nothing)"

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
