"""The standard tasks on a command line: its flags, its table, its file.

Knows nothing of how a task is scored. lm-eval-harness is imported only where tasks are
asked for.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import math
import time
import types
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lpc_jax.errors import UserError
from lpc_jax.evaluation.harness import TextModel
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

_PACKAGE = "lm_eval"
# Of a task's results what is no metric.
_NO_METRICS = ("alias", "name", "sample_len", "sample_count")
# What --log-samples keeps of a question beside its metrics.
_OF_SAMPLE = ("doc_id", "arguments", "resps", "filtered_resps", "filter", "target")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags; ``load`` and ``main`` read them."""
    group = parser.add_argument_group("standard tasks (the extra eval)")
    group.add_argument(
        "--tasks", help="of lm-eval, with commas: arc_easy,gsm8k,truthfulqa_mc2"
    )
    group.add_argument(
        "--tasks-data", type=Path, metavar="FOLDER", help="local files, not the hub"
    )
    group.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in each prompt"
    )
    group.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="ask in the model's chat format, as LPC is trained",
    )
    group.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with it, examples are turns of their own",
    )
    group.add_argument("--system-instruction", metavar="TEXT")
    group.add_argument(
        "--log-samples",
        action="store_true",
        help="write each request and its log-likelihood too",
    )


def load(arguments: argparse.Namespace) -> list[Any]:
    """The tasks that are asked for, before a model is loaded.

    Raises:
        UserError: The harness is not installed, a number is out of range, no such
            task, or its data cannot be had.
    """
    shots = arguments.num_fewshot
    if shots is not None and shots < 0:
        raise UserError(f"--num-fewshot must be at least 0, got {shots}.")
    names = [name.strip() for name in arguments.tasks.split(",")]
    if not all(names):
        raise UserError(
            f"--tasks must be names with commas between, got {arguments.tasks!r}."
            " Write them as arc_easy,gsm8k."
        )
    return _harness().load_tasks(
        names, data=arguments.tasks_data, num_fewshot=arguments.num_fewshot
    )


def _harness() -> types.ModuleType:
    try:
        importlib.import_module(_PACKAGE)
    except ModuleNotFoundError as error:
        if error.name != _PACKAGE:  # it is there, but something that it needs is not
            raise
        raise UserError(
            f"--tasks needs the package {_PACKAGE}, and that is not installed. Run: pip"
            " install 'lpc-jax[eval]'."
        ) from error
    # It warns of what we set on purpose.
    logging.getLogger(_PACKAGE).setLevel(logging.ERROR)
    return importlib.import_module("lpc_jax.evaluation.lm_eval_model")


def main(
    arguments: argparse.Namespace,
    system: Policy,
    tasks: list[Any],
    *,
    steering: Steering,
    seed: int = 0,
    console: Console,
) -> dict[str, Any]:
    """Runs the tasks and prints a table.

    Args:
        arguments: With the flags of ``add_arguments``.
        system: What is asked.
        tasks: From ``load``.
        steering: How z is chosen; not read without a latent.
        seed: Of draws of z and of tokens.
        console: Where the table goes.

    Returns:
        What a file of them holds, as JSON can with ``default=float``.

    Raises:
        UserError: What the system cannot be asked.
    """
    start = time.monotonic()
    model = TextModel(
        system, steering=steering, max_length=arguments.max_length, seed=seed
    )
    found = _harness().run(
        model,
        tasks,
        limit=arguments.limit,
        num_fewshot=arguments.num_fewshot,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        system_instruction=arguments.system_instruction,
        console=console,
    )
    results = {
        "system": system.name,
        "z": None if system.latent is None else steering.said(),
        "tasks": _by_task(found),
        "settings": {
            "tasks_data": None if arguments.tasks_data is None else "local files",
            "limit": arguments.limit,
            "apply_chat_template": arguments.apply_chat_template,
            "fewshot_as_multiturn": arguments.fewshot_as_multiturn,
            "system_instruction": arguments.system_instruction,
            "max_length": model.max_length,
            "seed": seed,
        },
        "cut_requests": model.cut,
        "lm_eval": found["lm_eval_version"],
        "seconds": round(time.monotonic() - start, 1),
    }
    if arguments.log_samples:
        results["samples"] = {
            task: [_sample(sample) for sample in samples]
            for task, samples in found["samples"].items()
        }
    console.print(_table(results))
    if model.cut:
        console.print(
            f"{model.cut} requests are longer than {model.max_length} tokens: their"
            " contexts were cut at the start."
        )
    return results


def _by_task(found: dict[str, Any]) -> dict[str, Any]:
    """Each task's questions, examples and metrics, with their standard errors."""
    return {
        task: {
            "questions": found["n-samples"][task]["effective"],
            "examples": found["n-shot"][task],
            "version": found["versions"].get(task),
            "metrics": {
                name: _number(value)
                for name, value in values.items()
                if name not in _NO_METRICS
            },
        }
        for task, values in found["results"].items()
        if task in found["n-samples"]  # the others are groups
    }


def _number(value: Any) -> float | None:
    """A metric; the harness writes words where there is none."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return float(value) if known else None


def _sample(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: sample[name] for name in (*_OF_SAMPLE, *sample["metrics"])}


def _table(results: dict[str, Any]) -> Table:
    z = "" if results["z"] is None else f", z: {results['z']}"
    table = Table(title=f"{results['system']}{z}", box=box.SIMPLE_HEAD)
    for name in ("task", "n", "n-shot", "metric", "value", "±"):
        is_text = name in ("task", "metric")
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    for task, of_task in results["tasks"].items():
        first = (task, str(of_task["questions"]), str(of_task["examples"]))
        for name, value in of_task["metrics"].items():
            metric, _, extraction = name.partition(",")
            if metric.endswith("_stderr"):
                continue
            error = of_task["metrics"].get(f"{metric}_stderr,{extraction}")
            said = metric if extraction == "none" else f"{metric} ({extraction})"
            table.add_row(*first, said, _shown(value), _shown(error))
            first = ("", "", "")
    return table


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
