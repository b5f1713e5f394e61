"""lm-evaluation-harness's tasks, with data from the hub or from local files.

``_with_file`` says what local files change.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval
from lm_eval.tasks import TaskManager

from lpc_jax.data import rows as files
from lpc_jax.errors import UserError

# Local files, and the harness's folders of their tasks: indexing all takes seconds.
FILES = {
    "arc_easy": "arc_easy.test.jsonl.gz",
    "arc_challenge": "arc_challenge.test.jsonl.gz",
    "gsm8k": "gsm8k.test.jsonl.gz",
    "truthfulqa_mc2": "truthfulqa_mc.jsonl.gz",
}
_FOLDERS = ("arc", "gsm8k", "truthfulqa")
_FIELDS = {
    "gsm8k": "question and answer",
    "truthfulqa_mc2": "question and mc2_targets",
}


def load(
    names: Sequence[str], *, data: Path | None = None, num_fewshot: int | None = None
) -> list[Any]:
    """The harness's tasks, groups or tags.

    Args:
        names: Of the harness.
        data: A folder with the files of ``FILES``; None: the hub.
        num_fewshot: Examples in each prompt; None: the task's own; a task's 0 stays 0.

    Raises:
        UserError: A negative ``num_fewshot``, an unknown task, or the hub fails.
    """
    # The harness warns of what is set on purpose.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if num_fewshot is not None and num_fewshot < 0:
        raise UserError(f"--num-fewshot must be at least 0, got {num_fewshot}.")
    names = list(dict.fromkeys(names))
    specs: list[Any] = names
    if data is None:
        manager = TaskManager()
        _require(names, manager.all_tasks, "")
    else:
        _require(names, list(FILES), f" with --tasks-data, {', '.join(FILES)}")
        above = Path(lm_eval.__path__[0]) / "tasks"
        folders: list[str | Path] = [above / name for name in _FOLDERS]
        manager = TaskManager(include_defaults=False, include_path=folders)
        with_files = []
        for name in names:
            default = (manager.task_index[name].cfg or {}).get("num_fewshot")
            shots = default if num_fewshot is None or default == 0 else num_fewshot
            with_files.append(_with_file(name, data, shots or 0))
        # A group is how the harness takes a task with some settings replaced.
        specs = [{"group": "local", "task": with_files}]
    try:
        return list(manager.load(specs)["tasks"].values())
    except OSError as error:  # the hub's and datasets' own errors are of it
        raise UserError(
            f"--tasks {','.join(names)}: the data cannot be had from the hub"
            f" ({str(error).splitlines()[0]:.200}). Check the connection, or name a"
            " folder of local files with --tasks-data."
        ) from error


def _require(names: Sequence[str], known: Sequence[str], where: str) -> None:
    if unknown := [name for name in names if name not in known]:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See lm-eval ls tasks."
        raise UserError(
            f"--tasks {','.join(unknown)}: expected tasks of lm-eval"
            f" {lm_eval.__version__}{where}, got none of that name. {hint}"
        )


def _with_file(name: str, folder: Path, shots: int) -> dict[str, Any]:
    """A task's settings where its data are of a file.

    Only test files are there. Few-shot examples, which the harness draws from training
    splits (gsm8k: 5), are the file's last questions in order, and are not asked: scores
    are near the standard's. Without examples (ARC, TruthfulQA) they are the standard's.
    """
    questions = rows(name, folder)
    count = len(questions) - shots
    if count <= 0:
        raise UserError(
            f"--num-fewshot must be less than the {len(questions)} questions of"
            f" {FILES[name]}, of which examples are taken, got {shots}."
        )
    splits = {"test": datasets.Dataset.from_list(questions[:count])}
    if shots:
        splits["examples"] = datasets.Dataset.from_list(questions[count:])
    return {
        "task": name,
        "custom_dataset": lambda **metadata: splits,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": "test",
        "fewshot_split": "examples" if shots else None,
        "fewshot_config": {"sampler": "first_n"},
    }


def rows(name: str, folder: Path) -> list[dict[str, Any]]:
    """A task's questions; ``UserError`` for a row without its fields, or no rows."""
    file, questions = folder / FILES[name], []
    for origin, row in files.read(str(file), setting="--tasks-data", split=None):
        try:
            questions.append(_question(name, row))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fields = _FIELDS.get(name, "question, choices (text and label), answerKey")
            raise UserError(
                f"{file.parent / origin}: expected a question of {name}, with the"
                f" fields {fields}, got another row ({error!r:.80}). Fetch the file"
                " again."
            ) from error
    if not questions:
        raise UserError(f"{file}: expected questions, got none. Fetch it again.")
    return questions


def _question(name: str, row: dict[str, Any]) -> dict[str, Any]:
    match name:
        case "gsm8k":
            more, texts = {"answer": row["answer"]}, [row["answer"]]
        case "truthfulqa_mc2":
            texts, labels = list(row["mc2_targets"]), [*row["mc2_targets"].values()]
            more = {"mc2_targets": {"choices": texts, "labels": labels}}
            if set(labels) != {0, 1}:
                raise ValueError("mc2_targets must have true answers (1) and false (0)")
        case _:  # ARC
            choices = {key: row["choices"][key] for key in ("text", "label")}
            more = {"choices": choices, "answerKey": row["answerKey"]}
            texts, labels = [*choices["text"], *choices["label"]], choices["label"]
            if len(texts) != 2 * len(labels) or row["answerKey"] not in labels:
                raise ValueError("answerKey is no label of a choice")
    if not all(isinstance(text, str) and text for text in [row["question"], *texts]):
        raise TypeError(f"expected texts, got {texts!r:.40}")
    return {"question": row["question"], **more}
