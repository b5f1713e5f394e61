"""Measure a run, a model or an exported folder.

python scripts/evaluate.py runs/mine --pairs test.jsonl
python scripts/evaluate.py runs/mine --pairs test.jsonl --against runs/plain
python scripts/evaluate.py runs/mine --pairs a.jsonl --pairs b.jsonl --json out.json
python scripts/evaluate.py path/to/model --pairs test.jsonl --limit 40
python scripts/evaluate.py runs/mine --pairs test.jsonl --code 3

SYSTEM is a run folder, a Hugging Face folder, a .gguf file, package:NAME/FILE or a hub
id. A run brings its own lengths, truncation, reward, z and start model.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lpc_jax import config as cfg

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
    # JAX is slow to import; --help and a mistyped flag need not wait for it.
    from lpc_jax import checkpoint

    try:
        _mode(asked)(asked, arguments, console or Console())
    except (ValueError, OSError, checkpoint.DamagedError) as error:
        if isinstance(error, ValueError) and not _is_ours(error):
            raise  # a fault of the program: the traceback is what helps
        print(f"error: {error}", file=sys.stderr)
        return REFUSED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="evaluate.py",
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("system", metavar="SYSTEM", help="what is measured")
    parser.add_argument(
        "--step", default="latest", help="of a run: latest, best or a checkpoint's step"
    )
    prior = parser.add_mutually_exclusive_group()
    prior.add_argument(
        "--z",
        choices=("mean", "sample", "argmax"),
        help="z from the prior's mean, a draw, or its largest code",
    )
    prior.add_argument("--code", help="z is one code, such as 3")
    prior.add_argument("--mix", help="z is a mix of codes, such as 3:0.7,12:0.3")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    parser.add_argument(
        "--output", type=Path, help="write everything and the table to this folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="of draws and intervals")
    _add_pairs(parser)
    return parser


def _mode(asked: argparse.Namespace) -> Callable[..., None]:
    """The evaluation whose flag is given."""
    given = [name for name in MODES if getattr(asked, name)]
    if len(given) != 1:
        flags = ", ".join(f"--{name}" for name in MODES)
        raise ValueError(
            f"exactly one of {flags} is required, got {len(given)}. Name what to"
            " evaluate on."
        )
    return MODES[given[0]]


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
    pairs.add_argument("--limit", type=_count, help="first rows of each file")
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
    pairs.add_argument("--max-length", type=_count, help=from_run)
    pairs.add_argument("--max-prompt-length", type=_count, help=from_run)
    pairs.add_argument(
        "--truncation",
        choices=("drop", "cut_prompt", "cut_prompt_then_answer"),
        help=from_run,
    )
    pairs.add_argument("--resamples", type=_count, help="draws for the intervals")


def evaluate_pairs(
    asked: argparse.Namespace, arguments: Sequence[str], console: Console
) -> None:
    """Accuracy and margin on preference pairs, beside length and the start model.

    Args:
        asked: The flags.
        arguments: The command line, for the record.
        console: Where to print.

    Raises:
        ValueError: Something that the user can mend.
    """
    import jax
    from rich.progress import Progress

    from lpc_jax import sharding
    from lpc_jax.evaluation import bootstrap, contest, pairs_report

    _require_writable(asked)
    options = contest.Options(
        system=asked.system,
        step=asked.step,
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
        reward=asked.reward,
        max_length=asked.max_length,
        max_prompt_length=asked.max_prompt_length,
        truncation=asked.truncation,
        seed=asked.seed,
    )
    mesh = sharding.make_mesh(data=1, fsdp=-1, tensor=1, devices=jax.devices())
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
    lines = pairs_report.header(held)
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    table = pairs_report.table(groups, resamples=resamples)
    console.print(table)
    command = ["scripts/evaluate.py", *arguments]
    record = pairs_report.as_json(held, groups, command=command, **drawn)
    text = io.StringIO()
    plain = Console(file=text, width=TABLE_WIDTH)
    plain.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    plain.print(table)
    for file in _write(asked, "pairs", record, text.getvalue()):
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
    for flag, folder in (
        ("--output", asked.output),
        ("--json", None if asked.json is None else asked.json.parent),
    ):
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise ValueError(
                f"{flag} must lie in a folder that can be written, got {folder}:"
                f" {error.strerror}. Name another."
            ) from error
    if asked.json is not None and asked.json.is_dir():
        raise ValueError(
            f"--json must be a file, got the folder {asked.json}. Name a file in it, or"
            " use --output."
        )


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
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(file)
    return list(texts)


def _is_ours(error: ValueError) -> bool:
    """Whether the library or this script raised it, in words meant for the user."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).resolve()
    library = Path(cfg.__file__).resolve().parent
    return raised_in == Path(__file__).resolve() or raised_in.is_relative_to(library)


# The flag that asks for an evaluation, and what it does.
MODES: dict[str, Callable[..., None]] = {"pairs": evaluate_pairs}


if __name__ == "__main__":
    sys.exit(main())
