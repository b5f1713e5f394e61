"""Data of the standard tasks from files of a folder instead of a hub.

The tasks themselves, their prompts, metrics and answers' extraction, are the harness's
own. What differs is said in ``rows``. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lpc_jax.data import rows as files
from lpc_jax.errors import UserError

Row = dict[str, Any]

# A task's file; each line an object with the fields that ``_FORMS`` reads.
FILES = {
    "arc_easy": "arc_easy.test.jsonl.gz",
    "arc_challenge": "arc_challenge.test.jsonl.gz",
    "gsm8k": "gsm8k.test.jsonl.gz",
    "truthfulqa_mc2": "truthfulqa_mc.jsonl.gz",
}


def require(names: list[str], folder: Path) -> None:
    """Refuses what a folder has no data for.

    Raises:
        UserError: No such folder, a task that has no file here, or a file that is not
            there.
    """
    if not folder.is_dir():
        raise UserError(
            f"--tasks-data {folder}: expected a folder with"
            f" {', '.join(FILES.values())}, got no such folder. Check the path, or"
            " leave it out to load from the hub."
        )
    unknown = [name for name in names if name not in FILES]
    if unknown:
        raise UserError(
            f"--tasks {','.join(unknown)}: with --tasks-data expected one of"
            f" {', '.join(FILES)}. Leave out --tasks-data to load other tasks from the"
            " hub."
        )
    missing = [FILES[n] for n in names if not (folder / FILES[n]).is_file()]
    if missing:
        raise UserError(
            f"--tasks-data {folder}: expected the files"
            f" {', '.join(FILES[name] for name in names)}, got none named"
            f" {', '.join(missing)}. Put them there, or leave those tasks out."
        )


def rows(name: str, folder: Path) -> list[Row]:
    """A task's questions in the form that the harness's task reads.

    Only test files are there. Examples for few-shot prompts, which the harness takes
    from a training split at random (gsm8k: 5), are therefore the file's last questions,
    in their order, which are then not asked: scores with examples are near the
    standard's but not the same. Without examples (ARC, TruthfulQA) the prompts are the
    same, and so are scores as far as the file has the same questions.

    Args:
        name: One of ``FILES``.
        folder: With its file.

    Raises:
        UserError: A broken file or row, by line.
    """
    file = folder / FILES[name]
    found = []
    for origin, row in files.read(str(file), setting="--tasks-data", split=None):
        try:
            found.append(_FORMS[name](row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{file.parent / origin}: expected a question of {name}, with the"
                f" fields {_FIELDS[name]}, got another row ({error!r:.80}). Fetch the"
                " file again."
            ) from error
    if not found:
        raise UserError(f"{file}: expected questions, got none. Fetch it again.")
    return found


def _of_arc(row: Row) -> Row:
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    made = {
        "question": _text(row["question"]),
        "choices": {
            "text": [_text(text) for text in texts],
            "label": [_text(label) for label in labels],
        },
        "answerKey": _text(row["answerKey"]),
    }
    if len(texts) != len(labels) or row["answerKey"] not in labels:
        raise ValueError("answerKey is no label of a choice")
    return made


def _of_gsm8k(row: Row) -> Row:
    return {"question": _text(row["question"]), "answer": _text(row["answer"])}


def _of_truthfulqa(row: Row) -> Row:
    targets = row["mc2_targets"]
    labels = list(targets.values())
    if set(labels) != {0, 1}:
        raise ValueError("mc2_targets must have true answers (1) and false ones (0)")
    choices = [_text(choice) for choice in targets]
    return {
        "question": _text(row["question"]),
        "mc2_targets": {"choices": choices, "labels": labels},
    }


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"expected a text, got {value!r:.40}")
    return value


_FORMS: dict[str, Callable[[Row], Row]] = {
    "arc_easy": _of_arc,
    "arc_challenge": _of_arc,
    "gsm8k": _of_gsm8k,
    "truthfulqa_mc2": _of_truthfulqa,
}
_FIELDS = {
    "arc_easy": "question, choices (text and label) and answerKey",
    "arc_challenge": "question, choices (text and label) and answerKey",
    "gsm8k": "question and answer",
    "truthfulqa_mc2": "question and mc2_targets",
}
