"""Files of prompts in, files of answers out.

Knows nothing of how an answer is made.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lpc_jax.data import chat, examples, rows
from lpc_jax.data.examples import Message
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.evaluation.generate import Completion, Ids

Format = Literal["jsonl", "alpaca_eval"]

# Codes named beside an answer.
_CODES_NAMED = 4


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One row of a file of prompts.

    Attributes:
        messages: The conversation, the last message the user's.
        ids: It as tokens, with the assistant's header.
        row: As it was in the file.
        origin: ``file:line``.
    """

    messages: list[Message]
    ids: Ids
    row: dict[str, Any]
    origin: str


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
        system_prompt: A first message for conversations that have none of the system.
        limit: Only the first so many; None: all.
        split: Of a hub data set.

    Raises:
        UserError: No such file, a row of no known form, or no rows.
    """
    found = []
    read = rows.read(path, setting="--prompts", split=split)
    for origin, row in itertools.islice(read, limit):
        messages = examples.parse_prompt(row, origin=origin)
        if system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system_prompt}, *messages]
        try:
            ids = chat.encode_prompt(messages, tokenizer)
        except UserError as error:
            raise UserError(f"{origin}: {error} Mend or remove the row.") from error
        found.append(Prompt(messages, ids, row, origin))
    if not found:
        raise UserError(
            f"--prompts {path} must hold at least one prompt, got none. Give rows with"
            " prompt, messages or instruction."
        )
    return found


def write(
    path: Path,
    prompts: Sequence[Prompt],
    answer: Callable[[Sequence[Ids]], list[Completion]],
    *,
    form: Format,
    generator: str,
    at_a_time: int,
) -> Iterator[int]:
    """Answers all prompts into a file; yields how many are in it.

    JSON lines are written as they come, in the order of the prompts, so that a run that
    is cut short leaves those that it made. AlpacaEval's list takes its name when it is
    whole.

    Args:
        path: The file.
        prompts: From ``read_prompts``.
        answer: From prompts to completions.
        form: ``jsonl``: each row as it was, with the answer and what it took;
            ``alpaca_eval``: what AlpacaEval reads as model outputs (Li et al. 2023).
        generator: Who answers, for both.
        at_a_time: Prompts between two writes.
    """

    def answered() -> Iterator[list[tuple[Prompt, Completion]]]:
        for start in range(0, len(prompts), at_a_time):
            some = prompts[start : start + at_a_time]
            yield list(zip(some, answer([p.ids for p in some]), strict=True))

    if form == "jsonl":
        yield from _write_lines(path, answered(), generator)
    else:
        yield from _write_list(path, answered(), generator)


def _write_lines(
    path: Path, answered: Iterable[list[tuple[Prompt, Completion]]], generator: str
) -> Iterator[int]:
    done = 0
    with path.open("w", encoding="utf-8") as file:
        for some in answered:
            for prompt, completion in some:
                line = prompt.row | described(completion) | {"generator": generator}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
            file.flush()
            done += len(some)
            yield done


def _write_list(
    path: Path, answered: Iterable[list[tuple[Prompt, Completion]]], generator: str
) -> Iterator[int]:
    rows = []
    for some in answered:
        for prompt, completion in some:
            kept = {k: prompt.row[k] for k in ("dataset",) if k in prompt.row}
            rows.append(
                kept
                | {
                    "instruction": prompt.row.get(
                        "instruction", prompt.messages[-1]["content"]
                    ),
                    "output": completion.text,
                    "generator": generator,
                }
            )
        yield len(rows)
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(rows, file, ensure_ascii=False, indent=1)
    Path(partial).chmod(0o644)  # mkstemp's file is the owner's alone
    Path(partial).replace(path)


def described(completion: Completion) -> dict[str, Any]:
    """An answer as JSON can hold it, with the codes that weigh most."""
    found: dict[str, Any] = {
        "output": completion.text,
        "reason": completion.reason,
        "new_tokens": len(completion.tokens),
    }
    if completion.prior is not None and completion.weights is not None:
        found["prior"] = largest(completion.prior, _CODES_NAMED)
        found["codes"] = largest(completion.weights, _CODES_NAMED)
    return found


def largest(shares: np.ndarray, count: int) -> dict[str, float]:
    """The codes that weigh most, by number, with their weights."""
    order = np.argsort(-shares, kind="stable")[:count]
    return {str(code): round(float(shares[code]), 4) for code in order if shares[code]}
