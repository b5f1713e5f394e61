"""Preference pairs of a file or a data set, as token ids."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

from lpc_jax.data import chat, examples
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.report import Report
from lpc_jax.data.tokenizer import Tokenizer


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
        return hashlib.sha256(b"".join(pair.key() for pair in self)).hexdigest()


def read(
    path: str,
    tokenizer: Tokenizer,
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str,
    max_length: int,
    max_prompt_length: int,
    row_length: int,
    truncation: chat.Truncation,
    prefix_mismatch: chat.PrefixMismatch,
) -> Pairs:
    """The pairs of one file or hub data set.

    Args:
        path: As ``data.train`` names it.
        tokenizer: Of the policy.
        setting: What named the path, for messages.
        split: Of a hub data set.
        limit: Read only so many rows, from the first; None: all.
        user: Field of a row that says who judged.
        max_length: Most tokens of a prompt with one answer.
        max_prompt_length: Most tokens of a prompt.
        row_length: Most tokens of a prompt with both answers.
        truncation: As ``data.truncation``.
        prefix_mismatch: As ``data.prefix_mismatch``.

    Raises:
        UserError: Data that cannot be had, read or tokenized, by file and line.
    """
    texts, drops = examples.read(
        path, setting=setting, split=split, limit=limit, user=user
    )
    tokens, report = chat.tokenize(
        texts,
        tokenizer,
        drops=drops,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        row_length=row_length,
        truncation=truncation,
        prefix_mismatch=prefix_mismatch,
    )
    prompts = {example.index: example.prompt[-1]["content"] for example in texts}
    return Pairs(tokens, report, prompts)
