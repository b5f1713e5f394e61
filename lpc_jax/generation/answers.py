"""Reads files of prompts and writes files of answers."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, assert_never

import numpy as np

from lpc_jax.data import chat, examples, rows
from lpc_jax.data.examples import Message
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.generation.answering import Completion
from lpc_jax.generation.decode import Ids

Format = Literal["jsonl", "alpaca_eval"]
# Codes named beside an answer.
_CODES_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a file of prompts."""

    messages: list[Message]  # the last one the user's
    ids: Ids  # with the assistant's header
    row: dict[str, Any]  # as it was in the file


def read_prompts(
    path: str,
    tokenizer: Tokenizer,
    *,
    system_prompt: str | None,
    limit: int | None,
    split: str,
) -> list[Prompt]:
    """The prompts of a file or a hub data set.

    Args:
        path: Rows with ``prompt``, ``messages`` or ``instruction``.
        tokenizer: With a chat template.
        system_prompt: Goes before conversations without a system message.
        limit: Rows to read, from the first; None: all.
        split: Of a hub data set.

    Raises:
        UserError: A row that cannot be encoded, or no rows.
    """
    prompts = []
    read = rows.read(path, setting="--prompts", split=split)
    for origin, row in itertools.islice(read, limit):
        messages = examples.parse_prompt(row, origin=origin)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        try:
            ids = chat.encode_prompt(messages, tokenizer)
        except UserError as error:
            raise UserError(f"{origin}: {error} Mend or remove the row.") from error
        prompts.append(Prompt(messages, ids, row))
    if not prompts:
        raise UserError(
            f"--prompts {path} must hold at least one prompt, got none. Give rows with"
            " prompt, messages or instruction."
        )
    return prompts


def write(
    path: Path,
    prompts: Sequence[Prompt],
    answer: Callable[[Sequence[Ids]], list[Completion]],
    *,
    form: Format,
    generator: str,
    at_a_time: int,
) -> Iterator[int]:
    """Answers all prompts into a file; yields how many are answered.

    ``jsonl`` has each prompt's row with its answer; ``alpaca_eval`` is AlpacaEval's
    list of model outputs (Li et al. 2023). ``generator`` names the policy in both.
    """

    def answered() -> Iterator[list[tuple[Prompt, Completion]]]:
        for start in range(0, len(prompts), at_a_time):
            part = prompts[start : start + at_a_time]
            yield list(zip(part, answer([p.ids for p in part]), strict=True))

    count, rows = 0, []
    match form:
        case "jsonl":
            # Written as they come, so that an interrupted run keeps its answers.
            with path.open("w", encoding="utf-8") as file:
                for pairs in answered():
                    for pair in pairs:
                        row = _of_lines(*pair) | {"generator": generator}
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    file.flush()
                    count += len(pairs)
                    yield count
        case "alpaca_eval":
            for pairs in answered():
                rows += [_of_list(*pair) | {"generator": generator} for pair in pairs]
                yield len(rows)
            whole.write(path, json.dumps(rows, ensure_ascii=False, indent=1))
        case _:
            assert_never(form)


def _of_lines(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    """The prompt's row with its answer and its largest codes."""
    row = prompt.row | {
        "output": completion.text,
        "reason": completion.reason,
        "new_tokens": len(completion.tokens),
    }
    if completion.prior is not None and completion.weights is not None:
        row["prior"] = largest(completion.prior, _CODES_NAMED)
        row["codes"] = largest(completion.weights, _CODES_NAMED)
    return row


def _of_list(prompt: Prompt, completion: Completion) -> dict[str, Any]:
    last = prompt.messages[-1]["content"]
    kept = {name: prompt.row[name] for name in ("dataset",) if name in prompt.row}
    return kept | {
        "instruction": prompt.row.get("instruction", last),
        "output": completion.text,
    }


def largest(shares: np.ndarray, count: int) -> dict[str, float]:
    """The ``count`` largest shares but for zeros, by code."""
    order = np.argsort(-shares, kind="stable")[:count]
    return {str(code): round(float(shares[code]), 4) for code in order if shares[code]}
