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
import functools
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
    arguments = list(sys.argv[1:] if argv is None else argv)
    asked = _parser().parse_args(arguments)
    try:
        _mode(asked)(asked, arguments, console or Console())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    from lpc_jax.evaluation import command, task_command

    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_system(parser)
    command.add_steering(parser)
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
    task_command.add_arguments(parser)
    return parser


def _mode(asked: argparse.Namespace) -> Callable[..., None]:
    """The evaluation whose flag is given."""
    if asked.codes and not asked.pairs:
        raise UserError("--codes needs --pairs FILE, whose prompts it looks at.")
    if bool(asked.pairs) == bool(asked.tasks):
        raise UserError(
            "exactly one of --pairs and --tasks is required, got"
            f" {'both' if asked.tasks else 'neither'}. Name what to evaluate on."
        )
    if asked.tasks:
        return evaluate_tasks
    if asked.like_own is not None:
        return compare_readers
    return look_at_codes if asked.codes else evaluate_pairs


# --- preference pairs -----------------------------------------------------------------


def _add_pairs(parser: argparse.ArgumentParser) -> None:
    from_run = "default: the run's, else config.py's"
    pairs = parser.add_argument_group("preference pairs")
    pairs.add_argument(
        "--pairs",
        action="append",
        metavar="FILE",
        help=".jsonl, .jsonl.gz, .json, .parquet or a hub data set; may be repeated",
    )
    pairs.add_argument("--pairs-split", default="test", help="of a hub data set")
    pairs.add_argument("--against", metavar="OTHER", help="compare, pair by pair")
    pairs.add_argument("--against-step", default="latest", help="of OTHER, a run")
    start = pairs.add_mutually_exclusive_group()
    start.add_argument("--start", help="the start model (default: a run's own)")
    start.add_argument("--no-start", action="store_true", help="leave it out")
    pairs.add_argument(
        "--reward",
        choices=("simpo", "dpo", "ipo", "mean_logp", "logp"),
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
    asked: argparse.Namespace, arguments: Sequence[str], console: Console
) -> None:
    """Accuracy and margin on preference pairs, beside length and the start model.

    Args:
        asked: The flags.
        arguments: The command line, for the record.
        console: Where to print.

    Raises:
        UserError: Something that the user can mend.
    """
    from rich.progress import Progress

    from lpc_jax.evaluation import bootstrap, command, contest, pairs_report

    _require_writable(asked)
    options = contest.Options(
        system=asked.system,
        step=asked.step,
        model=command.model_of(asked),
        against=asked.against,
        against_step=asked.against_step,
        start=asked.start,
        with_start=not asked.no_start,
        files=tuple(asked.pairs),
        split=asked.pairs_split,
        limit=asked.limit,
        how=asked.z,
        code=asked.code,
        mix=asked.mix,
        like=asked.like,
        like_by=asked.like_by,
        reward=asked.reward,
        max_length=asked.max_length,
        max_prompt_length=asked.max_prompt_length,
        truncation=asked.truncation,
        seed=asked.seed,
    )
    mesh = command.make_mesh(asked)
    terminal = Console(stderr=True)
    shown = Progress(console=terminal, transient=True, disable=not terminal.is_terminal)
    with shown as progress:
        tasks: dict[str, Any] = {}

        def advance(who: str, done: int, total: int) -> None:
            if who not in tasks:
                tasks[who] = progress.add_task(who, total=total)
            progress.update(tasks[who], completed=done)

        held = contest.hold(options, mesh, on_progress=advance)
    resamples = asked.resamples or bootstrap.RESAMPLES
    drawn = {"resamples": resamples, "seed": asked.seed}
    groups = pairs_report.summarize(held, **drawn)
    command_line = ["scripts/evaluate.py", *arguments]
    record = pairs_report.as_json(held, groups, command=command_line, **drawn)
    table = pairs_report.table(groups, resamples=resamples)
    _tell(asked, console, "pairs", record, pairs_report.header(held), table)


# --- readers --------------------------------------------------------------------------


def compare_readers(
    asked: argparse.Namespace, arguments: Sequence[str], console: Console
) -> None:
    """Whether a few of a reader's judgements say what that reader wants.

    Args:
        asked: The flags.
        arguments: The command line, for the record.
        console: Where to print.

    Raises:
        UserError: Something that the user can mend.
    """
    from lpc_jax.evaluation import command, pairs, readers, steering, system

    _require_writable(asked)
    counts = asked.like_own
    for flag in ("z", "code", "mix", "against"):
        if getattr(asked, flag) is not None:
            raise UserError(
                f"--{flag} has no effect with --like-own, which chooses z from"
                " judgements. Leave it out."
            )
    outline = command.outline_system(asked)
    config = outline.config
    num_codes = None if config.latent is None else config.latent.num_codes
    steering.require_codes(num_codes, "--like-own", asked.system)
    if asked.like is None and outline.checkpoint is None:
        raise UserError(
            "--like-own takes examples from a run's training pairs, got"
            f" {asked.system}, which is no run. Name a file of them with --like."
        )
    user = config.data.user
    some = pairs.read(
        asked.pairs, split=asked.pairs_split, limit=asked.limit, user=user
    )
    known = pairs.read(
        [asked.like or config.data.train],
        split=config.data.train_split,
        limit=config.data.limit if asked.like is None else None,
        user=user,
    )
    loaded = command.load_system(asked)
    reference = None
    if pairs.reward(None, config.loss).over_reference:
        model = dataclasses.asdict(config.model)
        own = model.pop("path")
        path = config.reference.path or own
        if path != own:
            model["revision"] = None
        if path == own and config.decoder == "frozen":
            reference = functools.partial(readers.without_codes, loaded)
        else:
            start = system.load(path, mesh=loaded.mesh, model=model)
            reference = functools.partial(
                pairs.score, start, steering=None, seed=0, on_progress=lambda _: None
            )
    found = readers.measure(
        loaded,
        known,
        some,
        counts=counts,
        by=asked.like_by,
        reference=reference,
        seed=asked.seed,
        on_progress=lambda done, total: None,
    )
    record = {
        "command": ["scripts/evaluate.py", *arguments],
        "readers": [readers.as_json(one) for one in found],
    }
    said = [
        f"system: {loaded.name}",
        *(line for x in found for line in readers.lines(x)),
    ]
    _tell(asked, console, "readers", record, said, *map(readers.table, found))


# --- the codes ------------------------------------------------------------------------


def look_at_codes(
    asked: argparse.Namespace, arguments: Sequence[str], console: Console
) -> None:
    """Writes a page about a system's codes, and says the most of it.

    Args:
        asked: The flags.
        arguments: Not read.
        console: Where to print.

    Raises:
        UserError: Something that the user can mend.
    """
    from lpc_jax.evaluation import codes_report, command, steering

    if asked.output is None or len(asked.pairs) != 1:
        raise UserError(
            "--codes needs --output FOLDER and one --pairs FILE, got"
            f" {asked.output} and {len(asked.pairs)}."
        )
    for flag in ("z", "code", "mix", "like"):
        if getattr(asked, flag) is not None:
            raise UserError(
                f"--{flag} has no effect with --codes, which looks at all of them."
                " Leave it out."
            )
    codes_report.require(asked.output)
    latent = command.outline_system(asked).config.latent
    num_codes = None if latent is None else latent.num_codes
    steering.require_codes(num_codes, "--codes", asked.system)
    loaded = command.load_system(asked)
    looked, page = codes_report.make(
        loaded,
        asked.pairs[0],
        asked.output,
        split=asked.pairs_split,
        limit=asked.limit,
        seed=asked.seed,
        on_progress=lambda _: None,
    )
    said = [*codes_report.summary(looked), f"written: {page}"]
    console.print("\n".join(said), highlight=False, markup=False, soft_wrap=True)


# --- the standard tasks ---------------------------------------------------------------


def evaluate_tasks(
    asked: argparse.Namespace, arguments: Sequence[str], console: Console
) -> None:
    """Scores of lm-eval's tasks.

    Args:
        asked: The flags.
        arguments: Not read.
        console: Where to print.

    Raises:
        UserError: Something that the user can mend.
    """
    from lpc_jax.evaluation import command, task_command

    _require_writable(asked)
    tasks = task_command.load(asked)
    command.require_steering(asked, command.outline_system(asked))
    loaded = command.load_system(asked)
    steering = command.read_steering(asked, loaded)
    files = [asked.json, asked.output and asked.output / "tasks.json"]
    results = task_command.main(
        asked,
        loaded,
        tasks,
        steering=steering,
        seed=asked.seed,
        console=console,
    )
    for file in filter(None, files):
        whole.write(file, json.dumps(results, indent=1, default=float) + "\n")
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


# --- what all evaluations share -------------------------------------------------------


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(
            f"expected a whole number from 1, got {text!r}"
        )
    return int(text)


def _require_writable(asked: argparse.Namespace) -> None:
    """Refuses a place that cannot be written, before anything is computed."""
    from lpc_jax.evaluation import command

    if asked.output is not None:
        command.require_writable(asked.output, flag="--output")
    if asked.json is not None:
        command.require_new_file(asked.json, overwrite=True, flag="--json")


def _tell(
    asked: argparse.Namespace,
    console: Console,
    name: str,
    record: dict[str, Any],
    lines: Sequence[str],
    *tables: Any,
) -> None:
    """Prints lines and tables, and writes them and the record where flags say."""
    text = io.StringIO()
    for where in (console, Console(file=text, width=TABLE_WIDTH)):
        where.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
        for table in tables:
            where.print(table)
    for file in _write(asked, name, record, text.getvalue()):
        console.print(f"written: {file}", highlight=False, markup=False, soft_wrap=True)


def _write(
    asked: argparse.Namespace, name: str, record: dict[str, Any], table: str
) -> list[Path]:
    """The record and the table where the flags say; returns the files."""
    texts: dict[Path, str] = {}
    if asked.json is not None:
        texts[asked.json] = json.dumps(record, indent=1) + "\n"
    if asked.output is not None:
        texts[asked.output / f"{name}.json"] = json.dumps(record, indent=1) + "\n"
        texts[asked.output / f"{name}.txt"] = table
    for file, text in texts.items():
        whole.write(file, text)
    return list(texts)


if __name__ == "__main__":
    sys.exit(main())
