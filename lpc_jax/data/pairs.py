"""Preference pairs as text and as tokens: reading, tokenizing, digests."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lpc_jax.data import examples, packing
from lpc_jax.data.chat import TokenizedPair, tokenize
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops, Report
from lpc_jax.data.tokenizer import Tokenizer

RULES = ("max_length", "max_prompt_length", "truncation", "prefix_mismatch", "date")


def read(
    paths: Sequence[str],
    *,
    split: str | None,
    limit: int | None,
    user: str = examples.USER,
) -> tuple[list[PreferenceExample], Drops]:
    """The pairs of several files or hub data sets, renumbered; ``limit`` is of each."""
    pairs, drops = [], Drops()
    for path in paths:
        of_path, dropped = examples.read(
            path, setting="pairs", split=split, limit=limit, user=user
        )
        pairs += of_path
        drops += dropped
    return [dataclasses.replace(pair, index=i) for i, pair in enumerate(pairs)], drops


def rules(settings: object) -> dict[str, Any]:
    """The fields of a run's data settings that ``chat.tokenize`` takes."""
    return {name: getattr(settings, name) for name in RULES}


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs as token ids."""

    tokens: list[TokenizedPair]
    report: Report | None = None
    # The last turn before the answers, by pair id.
    prompts: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TokenizedPair]:
        return iter(self.tokens)

    def digest(self) -> str:
        """SHA-256 over the token ids, in order."""
        return tokens_digest(self.tokens)


def load(
    source: str | Sequence[Any],
    tokenizer: Tokenizer,
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str,
    **rules: Any,
) -> Pairs:
    """Reads and tokenizes the pairs of one file or hub data set, or of rows."""
    texts, drops = examples.read(
        source, setting=setting, split=split, limit=limit, user=user
    )
    tokens, report = tokenize(texts, tokenizer, drops, **rules)
    prompts = {text.index: text.prompt[-1]["content"] or "" for text in texts}
    return Pairs(tokens, report, prompts)


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
    return hashlib.sha256(b"".join(pair.key() for pair in pairs)).hexdigest()


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
