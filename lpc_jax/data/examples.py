"""Reads preference pairs from files and hub data sets: one parser per source form.

Knows nothing of tokens. A row that no parser understands is an error that names its
file and line; a row that is understood but holds no preference is a counted drop.
"""

from __future__ import annotations

import dataclasses
import difflib
import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
from datasets import exceptions as dataset_errors

from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.files import sources, untrusted

Message = dict[str, str]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
NO_SOURCE = "unknown"
# Field of a row that says who judged.
USER = "user"

# What is read at a time, in bytes. A line is one pair: of English, a million tokens are
# about 4 MB. A .json file is parsed whole, and then takes several times its size.
LONGEST_LINE = 64 << 20
LARGEST_JSON = 1 << 30
# Text unpacks to some twenty times its packed size at most, and made-up text to a
# thousand times. Small files may repeat themselves as they like.
MOST_UNPACKED, UNPACKED_FREELY = 200, 16 << 20
# A few large texts can stand for any number of rows of a parquet file, so that rows are
# unpacked by so few.
_PARQUET_ROWS = 256

EMPTY = "empty answer"
EQUAL = "chosen equals rejected"
NOT_ASSISTANT = "answer is not the assistant's"
NO_USER_TURN = "prompt does not end with the user's turn"
EARLY_SPLIT = "transcripts differ before the last answer"

_FORMS = (
    "chosen and rejected as two lists of messages with prompt as a list of messages,"
    " two full transcripts (lists of messages) without a prompt list, or prompt,"
    " chosen and rejected as three strings"
)


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """A conversation and two answers to its last turn.

    Attributes:
        prompt: Messages ``{"role", "content"}``, the last one the user's.
        chosen: The better answer's text.
        rejected: The worse answer's text.
        source: Where the prompt comes from, for reports.
        origin: The row as ``file:line``, for messages.
        index: The row's position in what was read, dropped rows counted.
        user: Who judged; empty where the row does not say.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str
    origin: str
    index: int
    user: str = ""


class _Dropped(Exception):
    """A row that holds no preference; the message is the rule's name."""


def read(
    path: str,
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str = USER,
) -> tuple[list[PreferenceExample], Drops]:
    """Preference pairs of a file or a hub data set.

    Args:
        path: A .jsonl, .jsonl.gz, .json or .parquet file, or ``owner/name``.
        setting: The setting's name in the user's words, for messages.
        split: Split of a hub data set; a file has none.
        limit: Read only this many rows, from the first; None: all.
        user: Field of a row that says who judged.

    Returns:
        The pairs in order, and the rows that hold no preference.

    Raises:
        UserError: The data cannot be had, a row is broken or of no known form, or
            no pair is left.
    """
    examples, events = [], []
    found = itertools.islice(rows(path, setting=setting, split=split), limit)
    for index, (origin, row) in enumerate(found):
        try:
            examples.append(parse(row, origin=origin, index=index, user=user))
        except _Dropped as drop:
            events.append((str(drop), origin))
    drops = Drops.count(events)
    if not examples:
        reasons = "; ".join(drops.lines()) or "it has no rows"
        raise UserError(
            f"{setting} = {path!r} holds no preference pair, expected at least one:"
            f" {reasons}. Give rows with a prompt and two different answers."
        )
    return examples, drops


def rows(path: str, *, setting: str, split: str | None) -> Iterator[tuple[str, Any]]:
    """Each row of a file or a hub data set with its origin, as ``file:line``.

    Args:
        path: As in ``read``.
        setting: The setting's name in the user's words, for messages.
        split: Split of a hub data set.

    Raises:
        UserError: The data cannot be had, or a row is broken.
    """
    if not sources.exists(path):
        if path.endswith(SUFFIXES) or not sources.is_hub_id(path):
            raise UserError(_missing_file(path, setting))
        return _hub(path, setting=setting, split=split)
    local = Path(path).expanduser()
    if local.is_file():
        name = local.name
        if name.endswith((".jsonl", ".jsonl.gz")):
            return _json_lines(local)
        if name.endswith(".json"):
            return _json_list(local)
        if name.endswith(".parquet"):
            return _parquet(local)
        raise UserError(
            f"{setting} = {path!r} must end in {', '.join(SUFFIXES)}, got {name!r}."
            " Convert or rename the file."
        )
    kind = "a folder" if local.is_dir() else "a device or pipe"
    raise UserError(
        f"{setting} = {path!r} is {kind}, expected a file ending in"
        f" {', '.join(SUFFIXES)}. Name the file inside it."
    )


def _missing_file(path: str, setting: str) -> str:
    folder, name = Path(path).parent, Path(path).name
    names = []
    if sources.exists(str(folder)) and folder.expanduser().is_dir():
        names = [file.name for file in folder.expanduser().iterdir()]
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"Did you mean {str(folder / near[0])!r}?" if near else "Check the path."
    return (
        f"{setting} = {path!r}: no such file, and not a hub id of the form owner/name."
        f" {hint}"
    )


def _json_lines(file: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with file.open("rb") as packed:
            zipped = file.suffix == ".gz"
            lines = gzip.GzipFile(fileobj=packed) if zipped else packed
            unpacked = 0
            while line := lines.readline(LONGEST_LINE + 1):
                number, unpacked = number + 1, unpacked + len(line)
                where = f"{file}:{number}"
                if len(line) > LONGEST_LINE:
                    raise UserError(
                        f"{where}: expected one pair a line, of at most"
                        f" {LONGEST_LINE:,} bytes, got a longer line. Write one object"
                        " a line, or remove it."
                    )
                _check_ratio(where, unpacked, packed.tell())
                if line.strip():
                    yield f"{file.name}:{number}", _decode(line, where)
    except (gzip.BadGzipFile, EOFError, zlib.error) as e:
        raise UserError(
            f"{file}:{number + 1}: expected gzip data, got a broken or truncated file"
            f" ({untrusted.shown(e)}). Fetch or compress the file again."
        ) from e


def _check_ratio(where: str, unpacked: int, packed: int) -> None:
    if unpacked > max(UNPACKED_FREELY, MOST_UNPACKED * packed):
        raise UserError(
            f"{where}: expected text, which unpacks to at most {MOST_UNPACKED} times"
            f" its size, got {unpacked:,} bytes out of {packed:,}. The file may be made"
            " to exhaust the memory: unpack it yourself if you trust it."
        )


def _decode(text: bytes, where: str) -> Any:
    try:
        return untrusted.parse_json(text, repeats=True)
    except json.JSONDecodeError as e:
        raise UserError(
            # Some of the messages end in "at" themselves.
            f"{where}: expected JSON, got {e.msg.removesuffix(' at')} at line"
            f" {e.lineno}, column {e.colno}."
            " Mend or remove it."
        ) from e
    except UnicodeDecodeError as e:
        raise UserError(
            f"{where}: expected UTF-8 text, got byte {text[e.start]:#04x} at {e.start}."
            " Save the file as UTF-8."
        ) from e
    except ValueError as e:
        raise UserError(
            f"{where}: expected JSON, got a text that is {untrusted.shown(e)}. Mend or"
            " remove it."
        ) from e


def _json_list(file: Path) -> Iterator[tuple[str, Any]]:
    size = file.stat().st_size
    if size > LARGEST_JSON:
        raise UserError(
            f"{file}: a .json file is read whole and must have at most"
            f" {LARGEST_JSON:,} bytes, got {size:,}. Write one object a line in a"
            " .jsonl file, which is read line by line."
        )
    items = _decode(file.read_bytes(), str(file))
    if not isinstance(items, list):
        raise UserError(
            f"{file} must hold a list of rows, got {type(items).__name__}. Write it as"
            " [{...}, {...}], or one object a line in a .jsonl file."
        )
    for number, item in enumerate(items, 1):
        yield f"{file.name}:{number}", item


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    number = unpacked = 0
    packed = file.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for group in range(table.num_row_groups):
                announced = table.metadata.row_group(group).total_byte_size
                _check_ratio(str(file), announced, packed)
            for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
                unpacked += sum(_decoded_bytes(column) for column in batch.columns)
                _check_ratio(f"{file}:{number + 1}", unpacked, packed)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file.name}:{number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as e:
        reason = next(iter(str(e).splitlines()), type(e).__name__)
        raise UserError(
            f"{file}: expected a parquet file, got a broken or truncated one after row"
            f" {number} ({untrusted.shown(reason)}). Fetch or write the file again."
        ) from e


def _decoded_bytes(column: pyarrow.Array) -> int:
    """Bytes of a batch's column, each row counted by itself."""
    if isinstance(column, pyarrow.DictionaryArray):
        return column.dictionary_decode().nbytes
    return column.nbytes


def _hub(path: str, *, setting: str, split: str | None) -> Iterator[tuple[str, Any]]:
    try:
        table = sources.download(
            lambda: datasets.load_dataset(path, split=split),
            path,
            setting=setting,
            kind=sources.DATA_SET,
            failures=(*sources.FAILURES, dataset_errors.DatasetsError),
        )
    except UserError:
        raise
    except (ValueError, RuntimeError) as e:  # the latter: a data set that is a script
        raise UserError(
            f"{setting} = {path!r} could not be loaded with {setting}_split ="
            f" {split!r}: {e}"
        ) from e
    if not isinstance(table, datasets.Dataset):
        raise UserError(
            f"{setting} = {path!r} has the splits {', '.join(map(str, table))}, and"
            f" none is named. Name one with --{setting}-split."
        )
    for number, row in enumerate(table, 1):
        yield f"{path}/{split}:{number}", row


def parse(row: Any, *, origin: str, index: int, user: str = USER) -> PreferenceExample:
    """One row of any known form as a pair.

    Args:
        row: An object with ``chosen``, ``rejected``, and ``prompt`` where its form
            has one; an optional ``source`` is kept.
        origin: The row as ``file:line``, for messages.
        index: The row's position in what was read.
        user: Field that says who judged.

    Raises:
        UserError: The row is of no known form.
    """
    if not isinstance(row, dict):
        raise UserError(
            f"{origin}: expected an object with prompt, chosen and rejected, got"
            f" {type(row).__name__}. Write one object a row."
        )
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise UserError(
                f"{origin}: the field {name!r} is missing; expected prompt, chosen and"
                f" rejected, got {untrusted.shown(', '.join(row)) or 'none'}. Add it or"
                " remove the row."
            )
    kinds = tuple(type(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    if kinds == (list, list, list):
        prompt, chosen, rejected = _explicit(row, origin)
    elif kinds in ((type(None), list, list), (str, list, list)):
        prompt, chosen, rejected = _implied(row, origin)
    elif kinds == (str, str, str):
        prompt, chosen, rejected = _plain(row)
    elif kinds == (type(None), str, str):
        raise UserError(
            f"{origin}: the field 'prompt' is missing; expected prompt, chosen and"
            f" rejected, got {untrusted.shown(', '.join(row))}. Add it or remove the"
            " row."
        )
    else:
        seen = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items())
        raise UserError(
            f"{origin}: not a known form of preference pair. Expected {_FORMS}; got"
            f" {untrusted.shown(seen)}. Convert the row to one of these."
        )
    source = row.get("source")
    source = source if isinstance(source, str) and source else NO_SOURCE
    judge = row.get(user)
    judge = str(judge) if isinstance(judge, str | int) else ""
    for message in (*prompt, chosen, rejected):
        _require_characters(origin, *message.values())
    _require_characters(origin, source, judge)
    _require_preference(prompt, chosen, rejected)
    return PreferenceExample(
        prompt=tuple(prompt),
        chosen=chosen["content"],
        rejected=rejected["content"],
        source=source,
        origin=origin,
        index=index,
        user=judge,
    )


def parse_prompt(row: Any, *, origin: str) -> list[Message]:
    """The conversation of a row that asks for an answer.

    Args:
        row: ``prompt`` as a text or a list of messages, ``messages``, or
            ``instruction`` as AlpacaEval has it; the last message is the user's.
        origin: ``file:line``, for messages.

    Raises:
        UserError: A row of no such form.
    """
    names = ("prompt", "messages", "instruction")
    name = next((n for n in names if isinstance(row, dict) and n in row), None)
    if name is None:
        raise UserError(
            f"{origin}: expected an object with {' or '.join(names)}, got"
            f" {untrusted.shown(repr(row), most=80)}. Mend or remove the row."
        )
    value = row[name]
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and name != "instruction":
        messages = _messages(value, name, origin)
    else:
        raise UserError(
            f"{origin}: {name} must be a text or a list of messages, got"
            f" {untrusted.shown(repr(value), most=80)}. Mend or remove the row."
        )
    if not messages or messages[-1]["role"] != "user":
        raise UserError(
            f"{origin}: {name} must end with a message of the user, got"
            f" {untrusted.shown(repr(value), most=80)}. Mend or remove the row."
        )
    _require_characters(origin, *(message["content"] for message in messages))
    return messages


def _require_characters(origin: str, *texts: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as e:
            raise UserError(
                f"{origin}: expected text, got {text[e.start]!r} at {e.start}, half of"
                f" a pair that stands for one character:"
                f" {untrusted.shown(text[max(0, e.start - 20) : e.end + 20])}. It may"
                " have been cut there: mend or remove the row."
            ) from e


def _require_preference(
    prompt: list[Message], chosen: Message, rejected: Message
) -> None:
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise _Dropped(NOT_ASSISTANT)
    if not prompt or prompt[-1]["role"] != "user":
        raise _Dropped(NO_USER_TURN)
    if not chosen["content"].strip() or not rejected["content"].strip():
        raise _Dropped(EMPTY)
    if chosen["content"] == rejected["content"]:
        raise _Dropped(EQUAL)


def _explicit(
    row: dict[str, Any], origin: str
) -> tuple[list[Message], Message, Message]:
    """``prompt`` is a list of messages; ``chosen``, ``rejected`` one message each."""
    answers = [_messages(row[name], name, origin) for name in ("chosen", "rejected")]
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if len(answer) != 1:
            raise UserError(
                f"{origin}: beside a prompt list, {name} must hold one message, the"
                f" assistant's answer, got {len(answer)}. Move earlier turns to prompt,"
                " or leave prompt out to give two full transcripts."
            )
    return _messages(row["prompt"], "prompt", origin), answers[0][0], answers[1][0]


def _implied(
    row: dict[str, Any], origin: str
) -> tuple[list[Message], Message, Message]:
    """``chosen`` and ``rejected`` are full transcripts; what they share is the prompt.

    A string ``prompt`` beside them repeats the first user turn and is not used.
    """
    chosen = _messages(row["chosen"], "chosen", origin)
    rejected = _messages(row["rejected"], "rejected", origin)
    if not chosen or not rejected:
        raise _Dropped(EMPTY)
    if chosen[:-1] != rejected[:-1]:
        raise _Dropped(EARLY_SPLIT)
    return chosen[:-1], chosen[-1], rejected[-1]


def _plain(row: dict[str, Any]) -> tuple[list[Message], Message, Message]:
    """Three strings: one user message and two answers."""
    return (
        [{"role": "user", "content": row["prompt"]}],
        {"role": "assistant", "content": row["chosen"]},
        {"role": "assistant", "content": row["rejected"]},
    )


def _messages(items: list[Any], name: str, origin: str) -> list[Message]:
    for number, item in enumerate(items, 1):
        if not (
            isinstance(item, dict)
            and isinstance(item.get("role"), str)
            and isinstance(item.get("content"), str)
        ):
            raise UserError(
                f"{origin}: message {number} of {name} must be an object with the"
                f" strings role and content, got"
                f" {untrusted.shown(repr(item), most=80)}. Mend or remove the row."
            )
    return [{"role": item["role"], "content": item["content"]} for item in items]
