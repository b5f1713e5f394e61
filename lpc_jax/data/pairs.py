"""Preference pairs as text and as tokens: read, known again by content, tokenized."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from lpc_jax.data import chat, examples, packing
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops, Report
from lpc_jax.data.tokenizer import Tokenizer

# The settings by which text becomes tokens.
RULES = ("max_length", "max_prompt_length", "truncation", "prefix_mismatch")


def read(
    paths: Sequence[str],
    *,
    split: str | None,
    limit: int | None,
    user: str = examples.USER,
) -> tuple[list[PreferenceExample], Drops]:
    """The pairs of some files or hub data sets, one after the other.

    ``index`` is their place in the list. The arguments are those of ``examples.read``,
    and so is what is raised; ``limit`` is of each file.
    """
    pairs: list[PreferenceExample] = []
    drops = Drops.count([])
    for path in paths:
        of_path, dropped = examples.read(
            path, setting="pairs", split=split, limit=limit, user=user
        )
        pairs += of_path
        drops += dropped
    return [dataclasses.replace(pair, index=i) for i, pair in enumerate(pairs)], drops


def rules(settings: object) -> dict[str, Any]:
    """Those fields of a run's data settings that ``tokenize`` takes."""
    return {name: getattr(settings, name) for name in RULES}


def tokenize(
    texts: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    drops: Drops,
    *,
    max_length: int,
    row_length: int | None = None,
    **rules: Any,
) -> tuple[list[TokenizedPair], Report]:
    """``chat.tokenize`` by ``rules`` of a run's settings.

    ``row_length`` None is for rows that are made as long as the longest pair.
    """
    return chat.tokenize(
        texts,
        tokenizer,
        drops=drops,
        max_length=max_length,
        # The prompt is there once.
        row_length=row_length or 2 * max_length,
        **rules,
    )


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Pairs as token ids.

    Attributes:
        tokens: Of each pair.
        report: What was read, cut and dropped.
        prompts: The last turn before the answers, by pair id.
    """

    tokens: list[TokenizedPair]
    report: Report | None = None
    prompts: dict[int, str] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[TokenizedPair]:
        return iter(self.tokens)

    def digest(self) -> str:
        """SHA-256 over the token ids, in order."""
        return tokens_digest(self.tokens)


def load(
    path: str,
    tokenizer: Tokenizer,
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str,
    **rules: Any,
) -> Pairs:
    """The pairs of one file or hub data set, as tokens.

    Args:
        path: As ``examples.read`` takes it, as are the next four.
        tokenizer: Of the policy.
        setting: What named the path, for messages.
        split: Of a hub data set.
        limit: Read only so many rows, from the first; None: all.
        user: Field of a row that says who judged.
        **rules: As ``tokenize`` takes them.

    Raises:
        UserError: Data that cannot be had, read or tokenized, by file and line.
    """
    texts, drops = examples.read(
        path, setting=setting, split=split, limit=limit, user=user
    )
    tokens, report = tokenize(texts, tokenizer, drops, **rules)
    prompts = {text.index: text.prompt[-1]["content"] for text in texts}
    return Pairs(tokens, report, prompts)


def prompt_key(text: PreferenceExample) -> str:
    """The same for pairs of one conversation, whatever file they are of."""
    messages = json.dumps([sorted(message.items()) for message in text.prompt])
    return hashlib.sha256(messages.encode()).hexdigest()[:16]


def digest(texts: Sequence[PreferenceExample]) -> str:
    """SHA-256 over the texts and sources of pairs, in order."""
    content = hashlib.sha256()
    for text in texts:
        row = (text.prompt, text.chosen, text.rejected, text.source)
        content.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return content.hexdigest()


def tokens_digest(pairs: Sequence[TokenizedPair]) -> str:
    """SHA-256 over the token ids of pairs, in order."""
    return hashlib.sha256(b"".join(pair.key() for pair in pairs)).hexdigest()


def lengths(pairs: Sequence[TokenizedPair]) -> Int[np.ndarray, "B 2"]:
    """Scored tokens of the chosen and the rejected answers."""
    return packing.pair_lengths(pairs)[:, 1:]
