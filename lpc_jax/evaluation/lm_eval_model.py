"""lm-eval-harness's model class over a system, and a run of its tasks.

The only module that imports the harness (the extra ``eval``); import it where it is
used. Knows nothing of tokens.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import lm_eval  # pyright: ignore[reportMissingImports] -- an extra
from lm_eval import evaluator  # pyright: ignore[reportMissingImports] -- an extra
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports] -- an extra
from lm_eval.tasks import (  # pyright: ignore[reportMissingImports] -- an extra
    TaskManager,
)
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lpc_jax.data.tokenizer import TEMPLATE_REMEDY
from lpc_jax.errors import UserError
from lpc_jax.evaluation import local_tasks
from lpc_jax.evaluation.harness import TextModel

# Where the harness has the tasks of local_tasks.FILES; of all its folders the index
# takes seconds to make.
_FOLDERS = ("arc", "gsm8k", "truthfulqa")
_TEST, _EXAMPLES = "test", "examples"


class LpcModel(LM):
    """The harness's view of a system.

    Args:
        model: Answers the requests.
        console: Where progress goes.
    """

    def __init__(self, model: TextModel, console: Console) -> None:
        super().__init__()
        self._model, self._console = model, console
        # What results say of the model is read from these.
        self.tokenizer, self.max_length = model.tokenizer, model.max_length
        self.eot_token_id = model.tokenizer.eos_token_id

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation)."""
        with self._progress("log-likelihoods", len(requests)) as done:
            return self._model.loglikelihood([r.args for r in requests], done=done)

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Of each text."""
        texts = [text for (text,) in (request.args for request in requests)]
        with self._progress("texts", len(texts)) as done:
            return self._model.loglikelihood_rolling(texts, done=done)

    def generate_until(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[str]:
        """After each context."""
        with self._progress("answers", len(requests)) as done:
            return self._model.generate_until([r.args for r in requests], done=done)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text."""
        return self._model.apply_chat_template(
            chat_history, header=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The model's own template, for the record."""
        return str(self.tokenizer.chat_template) if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests, which we don't use."""
        return self._model.system.name

    @contextlib.contextmanager
    def _progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, console=self._console, transient=True) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count: progress.advance(task, count)


def load_tasks(
    names: Sequence[str], *, data: Path | None, num_fewshot: int | None
) -> list[Any]:
    """The harness's tasks, with data from the hub or from local files.

    Args:
        names: Of tasks, groups or tags.
        data: A folder with the files of ``local_tasks.FILES``; None: the hub.
        num_fewshot: Examples in each prompt; None: as each task has it. A task that
            fixes them to none keeps none.

    Raises:
        UserError: No such task, or its data cannot be had.
    """
    names = list(dict.fromkeys(names))
    if data is not None:
        local_tasks.require(names, data)
        root = Path(lm_eval.__path__[0]) / "tasks"
        manager = TaskManager(
            include_defaults=False, include_path=[root / f for f in _FOLDERS]
        )
        specs = [_local(name, data, manager, num_fewshot) for name in names]
        # A group is how the harness takes a task with some settings replaced.
        loaded = manager.load([{"group": "local", "task": specs}])
        return [loaded["tasks"][name] for name in names]
    manager = TaskManager()
    unknown = [name for name in names if name not in manager.all_tasks]
    if unknown:
        near = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else "See lm-eval ls tasks."
        raise UserError(
            f"--tasks {','.join(unknown)}: expected tasks of lm-eval"
            f" {lm_eval.__version__}, got none of that name. {hint}"
        )
    try:
        return list(manager.load(names)["tasks"].values())
    except OSError as error:  # the hub's and datasets' own errors are of it
        raise UserError(
            f"--tasks {','.join(names)}: the data cannot be had from the hub"
            f" ({str(error).splitlines()[0]:.200}). Check the connection, or name a"
            " folder of local files with --tasks-data."
        ) from error


def _local(
    name: str, folder: Path, manager: Any, num_fewshot: int | None
) -> dict[str, Any]:
    """What of a task's config is replaced for local data."""
    default = (manager.task_index[name].cfg or {}).get("num_fewshot")
    shots = 0 if default == 0 else num_fewshot if num_fewshot is not None else default
    shots = shots or 0
    rows = local_tasks.rows(name, folder)
    if shots >= len(rows):
        raise UserError(
            f"--num-fewshot must be less than the {len(rows)} questions of"
            f" {local_tasks.FILES[name]}, of which examples are taken, got {shots}."
        )
    splits = {_TEST: datasets.Dataset.from_list(rows[: len(rows) - shots])}
    if shots:
        splits[_EXAMPLES] = datasets.Dataset.from_list(rows[-shots:])
    return {
        "task": name,
        "custom_dataset": lambda **metadata: splits,
        "dataset_kwargs": None,
        "training_split": None,
        "validation_split": None,
        "test_split": _TEST,
        "fewshot_split": _EXAMPLES if shots else None,
        "fewshot_config": {"sampler": "first_n"},
    }


def require(
    model: TextModel, tasks: Sequence[Any], *, apply_chat_template: bool
) -> None:
    """Refuses what a system cannot be asked, before anything is computed.

    Raises:
        UserError: A chat template is asked for and there is none, or a task generates
            with settings that we don't have.
    """
    if apply_chat_template and not model.tokenizer.chat_template:
        raise UserError(
            f"--apply-chat-template needs a chat template, got {model.system.name},"
            f" which has none. {TEMPLATE_REMEDY}"
        )
    for task in tasks:
        if task.config.output_type == "generate_until":
            model.sampling(task.config.generation_kwargs)


def run(
    model: TextModel,
    tasks: Sequence[Any],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    fewshot_as_multiturn: bool = True,
    system_instruction: str | None = None,
    console: Console,
) -> dict[str, Any]:
    """The harness's results of some tasks.

    Args:
        model: Answers.
        tasks: From ``load_tasks``.
        limit: Questions of each task, from the first; None: all.
        num_fewshot: As in ``load_tasks``.
        apply_chat_template: Ask in the model's chat format, as it was trained, and not
            as text to be continued.
        fewshot_as_multiturn: With it, examples are turns of their own.
        system_instruction: Stands before each question.
        console: Where progress goes.

    Returns:
        As the harness has it: ``results`` by task, ``n-shot``, ``n-samples``,
        ``samples`` with each request's log-likelihood, among others.

    Raises:
        UserError: As ``require``, or a request that the model cannot be asked.
    """
    require(model, tasks, apply_chat_template=apply_chat_template)
    found = evaluator.simple_evaluate(
        model=LpcModel(model, console),
        tasks=list(tasks),
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=apply_chat_template,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        log_samples=True,
    )
    assert found is not None, "the harness gives results to its first process"
    return dict(found)
