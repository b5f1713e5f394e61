"""Turn several scored answers a prompt into preference pairs, as UltraFeedback has it.

python scripts/prepare_ultrafeedback.py --input openbmb/UltraFeedback \
    --output data/ultrafeedback.jsonl

The best-scored answer is chosen (the first of equals), a random other one rejected.
Which one depends on the seed and the row's own instruction, not on the order of rows.
Faults of the public data are counted: rows of truthful_qa, scores that are missing or
disagree; and dropped where an overall_score of 10 stands for 1.
A row is {"instruction", "source", "completions": [{"response", "overall_score" or
"fine-grained_score"}, ...]}.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax.data import examples, faults, rows
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.files import whole

FEW = "fewer than two completions"
UNSCORED = "fewer than two completions with a score"
SCORES = ("overall_score", "fine-grained_score")
# https://github.com/OpenBMB/UltraFeedback/issues/8
WRONG_TEN = (
    "best by an overall_score of 10 beside a fine-grained_score of at most 2"
    " (OpenBMB/UltraFeedback issue 8)"
)
FROM_TRUTHFUL = (
    f"{faults.BENCHMARK}; HuggingFaceH4 left them out of ultrafeedback_binarized, as"
    f" --leave-out {faults.TRUTHFUL} does"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What to read and where to write."""

    input: str
    """A file, folder or hub dataset id, as data.train takes one."""
    output: str
    """The .jsonl or .jsonl.gz file to write."""
    split: str = "train"
    """Split of a hub dataset."""
    score: Literal["overall_score", "fine-grained_score"] = "overall_score"
    """The field by which completions are ranked."""
    leave_out: tuple[str, ...] = ()
    """Sources of rows to leave out, such as truthful_qa."""
    seed: int = 42
    """Seeds the choice of the rejected answer."""
    limit: int | None = None
    """Read only the first rows."""
    overwrite: bool = False
    """Replace an output that exists."""


def main(argv: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Writes the pairs; returns the exit status, 2 for what the user can mend.

    Args:
        argv: The command line; None: the process's own.
        console: Where to print; None: standard output.
    """
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    cfg.add_version(own)
    _, rest = own.parse_known_args(argv)
    options = tyro.cli(Options, args=rest, description=__doc__)
    try:
        for line in prepare(options):
            (console or Console()).print(line, markup=False, highlight=False)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def prepare(options: Options) -> list[str]:
    """Reads rows, writes pairs, and says in lines what became of the rows.

    Raises:
        UserError: The input cannot be had or is broken, no pair is left, or the
            output exists or cannot be written.
    """
    output = Path(options.output).expanduser()
    _require_output(output, overwrite=options.overwrite)
    pairs, events, notes = [], [], []
    for origin, row in _rows(options):
        pair = to_pair(row, origin=origin, score=options.score, seed=options.seed)
        if isinstance(pair, dict) and pair["source"] in options.leave_out:
            pair = f"from {pair['source']}, left out"
        if isinstance(pair, str):
            events.append((pair, origin))
        else:
            pairs.append(pair)
            notes += ((note, origin) for note in _faults(row, options.score))
    drops = Drops(events)
    if not pairs:
        raise UserError(
            f"--input {options.input}: expected rows with two completions or more, got"
            f" none: {'; '.join(drops.lines()) or 'it has no rows'}. Check the file."
        )
    _write(output, pairs)
    ties = sum(pair["score_chosen"] == pair["score_rejected"] for pair in pairs)
    return [
        f"{len(pairs) + drops.total:,} rows read, {len(pairs):,} pairs written to"
        f" {output}",
        *(f"  dropped: {line}" for line in drops.lines()),
        *(f"  kept: {line}" for line in Drops(notes).lines()),
        f"  kept though both answers have the same score: {ties:,}",
    ]


def to_pair(row: Any, *, origin: str, score: str, seed: int) -> dict[str, Any] | str:
    """One row's pair, or the name of the rule that drops the row.

    Args:
        row: ``instruction``, ``completions`` and, if known, ``source``.
        origin: The row as ``file:line``, for messages.
        score: The field of a completion by which it is ranked.
        seed: Seeds the choice of the rejected answer.

    Raises:
        UserError: A field is missing or of a wrong type.
    """
    instruction = _field(row, "instruction", str, origin)
    completions = _field(row, "completions", list, origin)
    if len(completions) < 2:
        return FEW
    for number, item in enumerate(completions, 1):
        _field(item, "response", str, f"{origin}, completion {number}")
    completions = [item for item in completions if _score(item, score) is not None]
    if len(completions) < 2:
        return UNSCORED
    answers = [item["response"] for item in completions]
    scores = [item[score] for item in completions]
    best = scores.index(max(scores))
    fine = _score(completions[best], SCORES[1])
    if score == SCORES[0] and scores[best] == 10 and fine is not None and fine <= 2:
        return WRONG_TEN
    others = [index for index in range(len(answers)) if index != best]
    digest = hashlib.sha256(f"{seed}\n{instruction}".encode()).digest()
    worse = random.Random(digest).choice(others)
    if not answers[best].strip() or not answers[worse].strip():
        return examples.EMPTY
    if answers[best] == answers[worse]:
        return examples.EQUAL
    source = row.get("source")
    return {
        "prompt": [{"role": "user", "content": instruction}],
        "chosen": [{"role": "assistant", "content": answers[best]}],
        "rejected": [{"role": "assistant", "content": answers[worse]}],
        "source": source if isinstance(source, str) else examples.NO_SOURCE,
        "prompt_id": hashlib.sha256(instruction.encode()).hexdigest(),
        "score_chosen": float(scores[best]),
        "score_rejected": float(scores[worse]),
    }


def _rows(options: Options) -> Iterator[tuple[str, Any]]:
    whole = rows.read(
        options.input,
        setting="input",
        split=options.split,
    )
    for count, row in enumerate(whole):
        if count == options.limit:
            return
        yield row


def _field(row: Any, name: str, kind: type, origin: str) -> Any:
    value = row.get(name) if isinstance(row, dict) else None
    if not isinstance(value, kind):
        raise UserError(
            f"{origin}: the field {name!r} must be a {kind.__name__}, got"
            f" {type(value).__name__}. Expected rows with instruction and completions,"
            " each with a response and a score; mend or remove the row."
        )
    return value


def _score(completion: dict[str, Any], name: str) -> float | None:
    value = completion.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value:
        return None
    return float(value)


def _faults(row: dict[str, Any], score: str) -> Iterator[str]:
    """What is known to be wrong with public rows, of one that is kept."""
    if row.get("source") == faults.TRUTHFUL:
        yield FROM_TRUTHFUL
    (other,) = (name for name in SCORES if name != score)
    both = [(_score(item, score), _score(item, other)) for item in row["completions"]]
    if any(own is None for own, _ in both):
        yield f"without the completions that have no {score}"
    ranked = [
        (own, of_other)
        for own, of_other in both
        if own is not None and of_other is not None
    ]
    best = max((own for own, _ in ranked), default=None)
    of_best = [of_other for own, of_other in ranked if own == best]
    if ranked and max(of_best) < max(of_other for _, of_other in ranked):
        yield f"though {other} finds another answer best"


def _require_output(output: Path, *, overwrite: bool) -> None:
    if not output.name.endswith((".jsonl", ".jsonl.gz")):
        raise UserError(
            f"--output must end in .jsonl or .jsonl.gz, got {str(output)!r}. Rename it."
        )
    if output.is_dir() or (output.exists() and not overwrite):
        raise UserError(
            f"--output {output} must be a new file, got one that exists. Name another,"
            " or pass --overwrite to replace it."
        )
    parent = output.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(
            f"--output {output}: {parent} must be a folder that can be written to, got"
            f" {'one that cannot' if parent.is_dir() else 'no such folder'}. Make it or"
            " name another."
        )


def _write(output: Path, pairs: list[dict[str, Any]]) -> None:
    """All of the file or none of it: written beside it, then renamed."""
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    data = text.encode()
    if output.suffix == ".gz":
        data = gzip.compress(data, mtime=0)
    try:
        whole.write(output, data)
    except OSError as e:
        raise UserError(
            f"--output {output} could not be written: {e.strerror}. Nothing was left"
            " behind; free some space or name another place."
        ) from e


if __name__ == "__main__":
    sys.exit(main())
