"""Preference pairs as text and as tokens: reading, tokenizing, digests."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
from jaxtyping import Int

from lpc_jax.data import chat, examples, kept, mixture, packing, rows, templates
from lpc_jax.data.chat import tokenize as tokenize
from lpc_jax.data.columns import Columns, Prompts, batch_of
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.mixture import Part
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.ranked import Ranked
from lpc_jax.data.report import Drops, Report, Tally, measured
from lpc_jax.data.tokenizer import Tokenizer

_BATCH = 1024  # pairs of a batch of the cache
RULES = ("max_length", "max_prompt_length", "truncation", "prefix_mismatch", "date")


def read(
    paths: Sequence[str | Part],
    *,
    split: str | None,
    limit: int | None,
    user: str = examples.USER,
    ranked: Ranked = "all",
) -> tuple[list[PreferenceExample], Drops]:
    """The pairs of several sources, renumbered; ``limit`` is of each."""
    pairs, drops = [], Drops()
    for path in paths:
        part = Part(path, split, limit) if isinstance(path, str) else path
        of_path, dropped = examples.read(
            part.path,
            setting="pairs",
            split=part.split,
            limit=part.limit or limit,
            user=user,
            ranked=ranked,
        )
        alone = isinstance(path, str) or len(paths) == 1
        pairs += part.labels(iter(of_path), alone=alone)
        drops += dropped
    return [dataclasses.replace(pair, index=i) for i, pair in enumerate(pairs)], drops


def rules(settings: object) -> dict[str, Any]:
    """The fields of a run's data settings that ``chat.tokenize`` takes."""
    return {name: getattr(settings, name) for name in RULES}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs as token ids."""

    tokens: Sequence[TokenizedPair]
    report: Report | None = None
    # The last turn before the answers, by pair id.
    prompts: Mapping[int, str] = dataclasses.field(default_factory=dict)
    date: str | None = None  # that the chat template writes in them as today's

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TokenizedPair]:
        return iter(self.tokens)

    def digest(self) -> str:
        """SHA-256 over the token ids, in order."""
        return tokens_digest(self.tokens)


def parts_of(data: Any, name: Literal["train", "eval"]) -> list[Part]:
    """The sources of a set in a run's data settings."""
    return [Part(**vars(source)) for source in data.sources(name)]


def load(
    data: Any,
    name: Literal["train", "eval"],
    tokenizer: Tokenizer,
    *,
    setting: str,
    seed: int,
    row_length: int | None = None,
) -> Pairs:
    """Reads and tokenizes a set of a run's data settings.

    Args:
        seed: Which pairs of several sources are taken where not all are.
        row_length: Most tokens of a whole pair, if any.

    Raises:
        UserError: Data that cannot be read, by file and line, or no pair left.
    """
    parts = parts_of(data, name)
    reading = Reading.of(data, name, tokenizer, setting, row_length)
    columns, tallies = zip(*map(reading.load, parts), strict=True)
    counts, words = [len(of_part) for of_part in columns], ()
    if not isinstance(getattr(data, name), str):
        limit = data.limit if name == "train" else data.eval_limit
        weights = [part.weight for part in parts]
        taken = mixture.taken(counts, weights, limit=limit, seed=seed)
        words = tuple(
            f"{len(places):,} of {count:,} pairs of {part.path}"
            for part, count, places in zip(parts, counts, taken, strict=True)
        )
        ends = itertools.accumulate((c.ids_end for c in columns), initial=0)
        columns = [
            of_part.take(places).after(end)
            for of_part, places, end in zip(columns, taken, ends, strict=False)
        ]
    whole = functools.reduce(operator.add, columns)
    report = measured(
        packing.pair_lengths(whole),
        cuts=whole.rows["cut"],
        different=len({*whole.keys()}),
        sources=whole.sources,
        tally=sum(tallies, Tally()),
        left_out=sum(counts) - len(whole),
        first=[tally.first for tally in tallies],
        taken=words,
    )
    return Pairs(whole, report, Prompts(whole), reading.rules["date"])


@dataclasses.dataclass(frozen=True)
class Reading:
    """How sources are read and tokenized."""

    tokenizer: Tokenizer
    setting: str
    user: str
    ranked: Ranked
    alone: bool  # the only source
    cache: str | None
    rules: dict[str, Any]

    @classmethod
    def of(
        cls,
        data: Any,
        name: Literal["train", "eval"],
        tokenizer: Tokenizer,
        setting: str,
        row_length: int | None,
    ) -> Reading:
        """As a run's data settings say."""
        alone = len(data.sources(name)) == 1
        date = templates.day(tokenizer.chat_template, data.date)
        how = rules(data) | {"row_length": row_length, "date": date}
        known = data.user, data.ranked, alone, data.cache
        return cls(tokenizer, setting, *known, how)

    def load(self, part: Part) -> tuple[Columns, Tally]:
        """A source's pairs, from the cache if they are there."""
        make = functools.partial(self._make, part)
        if self.cache is None:
            batches, tally = kept.make_all(make)
        else:
            content = rows.digest(part.path, setting=self.setting, split=part.split)
            settings = [list(part), self.user, self.ranked, self.alone, self.rules]
            name = kept.key(content, self.tokenizer, settings)
            batches, tally = kept.read(Path(self.cache), name, make)
        return Columns.of(batches), tally

    def encoded(
        self, part: Part, of_rows: Tally, of_pairs: Tally
    ) -> Iterator[tuple[TokenizedPair, PreferenceExample]]:
        """As ``chat.encode``; what reading rows tells goes to a tally of its own."""
        every = rows.read(part.path, setting=self.setting, split=part.split)
        texts = examples.stream(
            every, of_rows, limit=part.limit, user=self.user, ranked=self.ranked
        )
        labelled = part.labels(texts, alone=self.alone)
        return chat.encode(labelled, self.tokenizer, of_pairs, **self.rules)

    def _make(self, part: Part, tally: Tally) -> Iterator[pyarrow.RecordBatch]:
        of_rows, of_pairs, empty = Tally(), Tally(), True
        encoded = self.encoded(part, of_rows, of_pairs)
        while chunk := list(itertools.islice(encoded, _BATCH)):
            empty = False
            yield batch_of(*zip(*chunk, strict=True))
        if empty and not of_pairs.events:
            raise examples.none_in(f"{self.setting} = {part.path!r}", of_rows)
        whole = of_rows + of_pairs
        if empty:
            raise chat.none_left(whole)
        vars(tally).update(vars(whole))


def of_rows(
    rows_in_memory: Sequence[Any], data: Any, tokenizer: Tokenizer, *, setting: str
) -> Pairs:
    """Tokenizes rows as a run's data settings say; raises as ``load``."""
    texts, drops = examples.read(
        rows_in_memory,
        setting=setting,
        split=None,
        limit=data.limit,
        user=data.user,
        ranked=data.ranked,
    )
    how = rules(data) | {"date": templates.day(tokenizer.chat_template, data.date)}
    tokens, report = tokenize(texts, tokenizer, drops, **how)
    prompts = {text.index: text.prompt[-1]["content"] or "" for text in texts}
    return Pairs(tokens, report, prompts, how["date"])


def prompt_key(text: PreferenceExample) -> str:
    """A digest of the conversation, the same in every file."""
    messages = json.dumps([sorted(message.items()) for message in text.prompt])
    return hashlib.sha256(messages.encode()).hexdigest()[:16]


def digest(texts: Sequence[PreferenceExample]) -> str:
    """SHA-256 over the texts and sources of pairs, in order."""
    content = hashlib.sha256()
    for text in texts:
        row = (text.prompt, text.chosen, text.rejected, text.source)
        if text.tools or any(text.more):
            row += (text.more, text.tools)
        content.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return content.hexdigest()


def tokens_digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the token ids of pairs, in order."""
    return hashlib.sha256(b"".join(keys(pairs))).hexdigest()


def keys(pairs: Sequence[TokenizedPair]) -> list[bytes]:
    """Each pair's digest of its token ids."""
    return pairs.keys() if isinstance(pairs, Columns) else [p.key() for p in pairs]


def at(
    pairs: Sequence[TokenizedPair], places: Int[np.ndarray, "_"]
) -> Sequence[TokenizedPair]:
    """The pairs at these places."""
    if isinstance(pairs, Columns):
        return pairs.take(places)
    return [pairs[i] for i in places]


def joined(
    first: Sequence[TokenizedPair], second: Sequence[TokenizedPair]
) -> Sequence[TokenizedPair]:
    """Both sets' pairs in order, without copies of their ids."""
    if not second:
        return first
    if isinstance(first, Columns) and isinstance(second, Columns):
        return first + second
    return [*first, *second]


def of_every_length(pairs: Sequence[TokenizedPair], count: int) -> list[int]:
    """Places of so many pairs, evenly from the one of fewest positions to the most."""
    if not pairs:
        return []
    sizes = packing.pair_lengths(pairs)
    order = np.argsort(sizes[:, 0] + sizes[:, 1:].max(axis=1), kind="stable")
    at = np.linspace(0, len(order) - 1, min(count, len(order))).round()
    return order[at.astype(int)].tolist()


def lengths(pairs: Sequence[TokenizedPair]) -> Int[np.ndarray, "B 2"]:
    """Scored tokens of the chosen and the rejected answers."""
    return packing.pair_lengths(pairs)[:, 1:]
