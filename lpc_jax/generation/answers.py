"""Reads files of prompts and writes files of answers."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, assert_never

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


class Prompt(NamedTuple):
    """One row of a file of prompts."""

    messages: list[Message]  # the last one the user's
    ids: Ids  # with the assistant's header
    row: dict[str, Any]  # as it was in the file


def read_prompts(
    path: str,
    tokenizer: Tokenizer,
    *,
    setting: str = "--prompts",
    system_prompt: str | None = None,
    limit: int | None = None,
    split: str = "train",
) -> list[Prompt]:
    """The prompts of a file or a hub data set.

    Args:
        path: Rows with ``prompt``, ``messages`` or ``instruction``.
        setting: Names the path in messages.
        system_prompt: Goes before conversations without a system message.
        limit: Rows to read, from the first; None: all.
        split: Of a hub data set.

    Raises:
        UserError: A row that cannot be encoded, or no rows.
    """
    prompts = []
    read = rows.read(path, setting=setting, split=split)
    for origin, row in itertools.islice(read, limit):
        messages = examples.parse_prompt(row, origin=origin)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        try:
            tools = examples.tools(row, origin)
            ids = chat.encode_prompt(messages, tokenizer, tools)
        except UserError as error:
            raise UserError(f"{origin}: {error} Mend or remove the row.") from error
        prompts.append(Prompt(messages, ids, row))
    if not prompts:
        raise UserError(
            f"{setting} {path} must hold at least one prompt, got none. Give rows with"
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
    rows: list[dict[str, Any]] = []
    if form == "jsonl":
        whole.write(path, b"")
    for start in range(0, len(prompts), at_a_time):
        part = prompts[start : start + at_a_time]
        completions = answer([prompt.ids for prompt in part])
        new = [
            _row(prompt, completion, form) | {"generator": generator}
            for prompt, completion in zip(part, completions, strict=True)
        ]
        if form == "jsonl":
            # Written as they come, so that an interrupted run keeps its answers.
            with path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in new)
        rows += new
        yield len(rows)
    if form == "alpaca_eval":
        whole.write(path, json.dumps(rows, ensure_ascii=False, indent=1))


def _row(prompt: Prompt, completion: Completion, form: Format) -> dict[str, Any]:
    row, output = prompt.row, {"output": completion.text}
    match form:
        case "jsonl":
            about = {"reason": completion.reason, "new_tokens": len(completion.tokens)}
            if completion.prior is not None and completion.weights is not None:
                about["prior"] = largest(completion.prior, _CODES_NAMED)
                about["codes"] = largest(completion.weights, _CODES_NAMED)
            return row | output | about
        case "alpaca_eval":
            source = {"dataset": row["dataset"]} if "dataset" in row else {}
            last = prompt.messages[-1]["content"]
            return source | {"instruction": row.get("instruction", last)} | output
        case _:
            assert_never(form)


def largest(shares: np.ndarray, count: int) -> dict[str, float]:
    """The ``count`` largest shares but for zeros, by code."""
    order = np.argsort(-shares, kind="stable")[:count]
    return {str(code): round(float(shares[code]), 4) for code in order if shares[code]}
