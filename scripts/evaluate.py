"""Measure a run, a model or an exported folder.

python scripts/evaluate.py runs/mine --pairs test.jsonl
python scripts/evaluate.py runs/mine --pairs test.jsonl --against runs/plain
python scripts/evaluate.py runs/mine --pairs a.jsonl --pairs b.jsonl --json out.json
python scripts/evaluate.py path/to/model --pairs test.jsonl --limit 40
python scripts/evaluate.py runs/mine --pairs test.jsonl --code 3
python scripts/evaluate.py runs/mine --pairs test.jsonl --codes --output report
python scripts/evaluate.py runs/mine --pairs test.jsonl --like-own 16
python scripts/evaluate.py runs/mine --tasks arc_easy,gsm8k --limit 100

SYSTEM is a run folder, a Hugging Face folder, a .gguf file, package:NAME/FILE or a hub
id. A run brings its own lengths, truncation, reward, z and start model.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lpc_jax.errors import UserError
from lpc_jax.files import whole

REFUSED = 2
TABLE_WIDTH = 100


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Evaluates; returns the exit status, 2 for what the user can mend.

    Args:
        argv: The command line; None: the process's own.
        console: Where to print; None: standard output.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = _parser().parse_args(argv)
    command = ["scripts/evaluate.py", *argv]
    try:
        _mode(arguments)(arguments, command, console or Console())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    from lpc_jax.evaluation import flags

    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_policy(parser)
    flags.add_steering(parser)
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--output", type=Path, help="write everything and the table to this folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="of draws and intervals")
    parser.add_argument(
        "--limit",
        type=_count,
        help="first rows of each file, or questions of each task",
    )
    parser.add_argument(
        "--max-length", type=_count, help="tokens read at a time [a run's, the model's]"
    )
    _add_pairs(parser)
    _add_tasks(parser)
    return parser


def _mode(arguments: argparse.Namespace) -> Callable[..., None]:
    """The evaluation whose flag is given."""
    if arguments.codes and not arguments.pairs:
        raise UserError("--codes needs --pairs FILE, whose prompts it looks at.")
    if bool(arguments.pairs) == bool(arguments.tasks):
        raise UserError(
            "exactly one of --pairs and --tasks is required, got"
            f" {'both' if arguments.tasks else 'neither'}. Name what to evaluate on."
        )
    if arguments.tasks:
        return evaluate_tasks
    if arguments.like_own is not None:
        return compare_readers
    return look_at_codes if arguments.codes else evaluate_pairs


# --- preference pairs -----------------------------------------------------------------


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    from lpc_jax.config import Loss

    from_run = "default: the run's, else config.py's"
    pairs = parser.add_argument_group("preference pairs")
    pairs.add_argument(
        "--pairs",
        action="append",
        metavar="FILE",
        help="a file, a folder or a hub data set, as data.eval; may be repeated",
    )
    pairs.add_argument("--pairs-split", default="test", help="of a hub data set")
    pairs.add_argument("--against", metavar="OTHER", help="compare, pair by pair")
    pairs.add_argument("--against-step", default="latest", help="of OTHER, a run")
    start = pairs.add_mutually_exclusive_group()
    start.add_argument("--start", help="the start model (default: a run's own)")
    start.add_argument("--no-start", action="store_true", help="leave it out")
    pairs.add_argument(
        "--reward",
        choices=(*(kind.word for kind in Loss.kinds), "mean_logp", "logp"),
        help="of everyone; default: of the run's loss, else mean_logp",
    )
    pairs.add_argument("--max-prompt-length", type=_count, help=from_run)
    pairs.add_argument(
        "--truncation",
        choices=("drop", "cut_prompt", "cut_prompt_then_answer"),
        help=from_run,
    )
    pairs.add_argument("--resamples", type=_count, help="draws for the intervals")
    pairs.add_argument(
        "--like-own",
        type=_count,
        nargs="+",
        metavar="K",
        help="rank each user's (or source's) pairs under z of K training pairs of its"
        " own and of every other; training pairs are the run's, or of --like FILE",
    )
    pairs.add_argument(
        "--codes",
        action="store_true",
        help="look at the codes instead: a page in --output (the extra eval)",
    )


def evaluate_pairs(
    arguments: argparse.Namespace, command: list[str], console: Console
) -> None:
    """Accuracy and margin on preference pairs, beside length and the start model."""
    from rich.progress import Progress

    from lpc_jax.evaluation import comparison, flags, intervals, report

    _require_writable(arguments)
    mesh = flags.make_mesh(arguments)
    terminal = Console(stderr=True)
    shown = Progress(console=terminal, transient=True, disable=not terminal.is_terminal)
    with shown as progress:
        tasks: dict[str, Any] = {}

        def advance(who: str, done: int, total: int) -> None:
            if who not in tasks:
                tasks[who] = progress.add_task(who, total=total)
            progress.update(tasks[who], completed=done)

        compared = comparison.compare(arguments, mesh, on_progress=advance)
    resamples = arguments.resamples or intervals.RESAMPLES
    drawn = {"resamples": resamples, "seed": arguments.seed}
    groups = report.summarize(compared, **drawn)
    record = report.as_json(compared, groups, command=command, **drawn)
    table = report.table(groups, resamples=resamples)
    _tell(arguments, console, "pairs", record, report.header(compared), table)


def compare_readers(
    arguments: argparse.Namespace, command: list[str], console: Console
) -> None:
    """Whether a few of a reader's judgements say what that reader wants."""
    from lpc_jax import config as cfg
    from lpc_jax.data import pairs
    from lpc_jax.evaluation import flags, readers
    from lpc_jax.runtime import steering

    _require_writable(arguments)
    _refuse(
        arguments,
        ("z", "code", "mix", "against"),
        "--like-own",
        "chooses z from judgements",
    )
    outline = flags.find_policy(arguments)
    latent = outline.latent
    steering.require_codes(latent and latent.num_codes, "--like-own", arguments.system)
    run = outline.run
    if arguments.like is None and run is None:
        raise UserError(
            "--like-own takes examples from a run's training pairs, got"
            f" {arguments.system}, which is no run. Name a file of them with --like."
        )
    data = cfg.Data(train=arguments.like or "") if run is None else run.data
    held_out = pairs.read(
        arguments.pairs,
        split=arguments.pairs_split,
        limit=arguments.limit,
        user=data.user,
        ranked=data.ranked,
    )
    known = pairs.read(
        [arguments.like] if arguments.like else pairs.parts_of(data, "train"),
        split=data.train_split,
        limit=None,
        user=data.user,
        ranked=data.ranked,
    )
    policy = flags.load_policy(arguments)
    results = readers.measure(
        policy,
        known,
        held_out,
        counts=arguments.like_own,
        by=arguments.like_by,
        seed=arguments.seed,
    )
    record = {
        "command": command,
        "readers": [dataclasses.asdict(result) for result in results],
    }
    lines = [f"system: {policy.name}"]
    lines += [line for result in results for line in readers.lines(result)]
    _tell(arguments, console, "readers", record, lines, *map(readers.table, results))


def look_at_codes(
    arguments: argparse.Namespace, command: list[str], console: Console
) -> None:
    """Writes a page about a system's codes, and says the most of it."""
    from lpc_jax.evaluation import flags
    from lpc_jax.evaluation.codes import look, page

    if arguments.output is None or len(arguments.pairs) != 1:
        raise UserError(
            "--codes needs --output FOLDER and one --pairs FILE, got"
            f" {arguments.output} and {len(arguments.pairs)}."
        )
    _refuse(arguments, ("z", "code", "mix", "like"), "--codes", "looks at all of them")
    latent = flags.find_policy(arguments).latent
    page.require(latent and latent.num_codes, arguments.system, arguments.output)
    codes = look.look(
        flags.load_policy(arguments),
        arguments.pairs[0],
        split=arguments.pairs_split,
        limit=arguments.limit,
        seed=arguments.seed,
    )
    file = page.write(codes, arguments.output)
    _print(console, *page.summary(codes), f"written: {file}")


def _refuse(
    arguments: argparse.Namespace, flags: Sequence[str], by: str, reason: str
) -> None:
    """Refuses flags that another one makes void."""
    for flag in flags:
        if getattr(arguments, flag) is not None:
            raise UserError(
                f"--{flag} has no effect with {by}, which {reason}. Leave it out."
            )


# --- the standard tasks ---------------------------------------------------------------


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    tasks = parser.add_argument_group("standard tasks (the extra eval)")
    tasks.add_argument(
        "--tasks", help="of lm-eval, with commas: arc_easy,gsm8k,truthfulqa_mc2"
    )
    tasks.add_argument(
        "--tasks-data", type=Path, metavar="FOLDER", help="local files, not the hub"
    )
    tasks.add_argument(
        "--num-fewshot", type=int, metavar="N", help="examples in each prompt"
    )
    tasks.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="ask in the model's chat format, as LPC is trained",
    )
    tasks.add_argument(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with it, examples are turns of their own",
    )
    tasks.add_argument("--system-instruction", metavar="TEXT")
    tasks.add_argument(
        "--log-samples",
        action="store_true",
        help="write each request and its log-likelihood too",
    )


def evaluate_tasks(
    arguments: argparse.Namespace, command: list[str], console: Console
) -> None:
    """Scores of lm-eval's tasks."""
    from lpc_jax.evaluation import flags, lm_eval, tasks
    from lpc_jax.models.latent import Steering

    _require_writable(arguments)
    names = [name.strip() for name in arguments.tasks.split(",")]
    if not all(names):
        raise UserError(
            f"--tasks must be names with commas between, got {arguments.tasks!r}."
            " Write them as arc_easy,gsm8k."
        )
    num_fewshot = arguments.num_fewshot
    loaded = tasks.load(names, data=arguments.tasks_data, num_fewshot=num_fewshot)
    outline = flags.find_policy(arguments)
    choose = flags.choose_z(arguments, outline.latent, outline.name)
    policy = flags.load_policy(arguments)
    steering = choose(policy) or Steering("mean")
    model = lm_eval.LanguageModel(
        policy, steering=steering, max_length=arguments.max_length, seed=arguments.seed
    )
    results = lm_eval.evaluate(
        model,
        loaded,
        num_fewshot=num_fewshot,
        log_samples=arguments.log_samples,
        limit=arguments.limit,
        apply_chat_template=arguments.apply_chat_template,
        fewshot_as_multiturn=arguments.fewshot_as_multiturn,
        system_instruction=arguments.system_instruction,
    )
    results["settings"]["tasks_data"] = arguments.tasks_data and "local files"
    console.print(lm_eval.table(results))
    if model.cut:
        console.print(
            f"{model.cut} requests are longer than {model.max_length} tokens: their"
            " contexts were cut at the start."
        )
    files = [arguments.json, arguments.output and arguments.output / "tasks.json"]
    for file in filter(None, files):
        whole.write(file, json.dumps(results, indent=1, default=float) + "\n")
        _print(console, f"written: {file}")


# --- what all evaluations share -------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1, got {text!r}"
        )
    return int(text)


def _require_writable(arguments: argparse.Namespace) -> None:
    """Refuses a place that cannot be written, before anything is computed."""
    from lpc_jax.evaluation import flags
    from lpc_jax.files import whole

    if arguments.output is not None:
        whole.require_writable(arguments.output, "--output")
    if arguments.json is not None:
        flags.require_new_file(arguments.json, overwrite=True, flag="--json")


def _tell(
    arguments: argparse.Namespace,
    console: Console,
    name: str,
    record: dict[str, Any],
    lines: Sequence[str],
    *tables: Any,
) -> None:
    """Prints lines and tables, and writes them and the record where flags say."""
    text = io.StringIO()
    for where in (console, Console(file=text, width=TABLE_WIDTH)):
        _print(where, *lines)
        for table in tables:
            where.print(table)
    files: dict[Path, str] = {}
    if arguments.json is not None:
        files[arguments.json] = json.dumps(record, indent=1) + "\n"
    if arguments.output is not None:
        files[arguments.output / f"{name}.json"] = json.dumps(record, indent=1) + "\n"
        files[arguments.output / f"{name}.txt"] = text.getvalue()
    for file, content in files.items():
        whole.write(file, content)
        _print(console, f"written: {file}")


def _print(console: Console, *lines: str) -> None:
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
