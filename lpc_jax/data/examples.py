"""Parses rows into pairs and prompts: one without a preference is a counted drop."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from lpc_jax.data import rows
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Message = dict[str, str]
_Parts = tuple[list[Message], Message, Message]  # prompt, chosen, rejected
NO_SOURCE = "unknown"
USER = "user"  # the field of a row that says who judged
# Rules that drop a pair in more than one place.
EMPTY = "empty answer"
EQUAL = "chosen equals rejected"


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """A conversation and two answers to its last turn, which is the user's."""

    prompt: tuple[Message, ...]  # {"role", "content"} each
    chosen: str
    rejected: str
    source: str  # where the prompt comes from, for reports
    origin: str  # the row as file:line, for messages
    index: int  # of the row in what was read, dropped rows counted
    user: str = ""  # who judged, where the row says so


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
    """Pairs of the first ``limit`` rows and drops; ``UserError`` if no pair is left."""
    examples, events = [], []
    first = itertools.islice(rows.read(path, setting=setting, split=split), limit)
    for index, (origin, row) in enumerate(first):
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


def parse(row: Any, *, origin: str, index: int, user: str = USER) -> PreferenceExample:
    """One row as a pair; ``UserError`` where its form is not known."""
    if not isinstance(row, dict):
        raise UserError(
            f"{origin}: expected an object with prompt, chosen and rejected, got"
            f" {type(row).__name__}. Write one object a row."
        )
    prompt, chosen, rejected = _parts(row, origin)
    source = row.get("source")
    source = source if isinstance(source, str) and source else NO_SOURCE
    judge = row.get(user)
    judge = str(judge) if isinstance(judge, str | int) else ""
    texts = [text for m in (*prompt, chosen, rejected) for text in m.values()]
    _require_characters(origin, *texts, source, judge)
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


def _parts(row: dict[str, Any], origin: str) -> _Parts:
    match row.get("prompt"), row.get("chosen"), row.get("rejected"):
        case (list(), list(), list()):
            return _explicit(row, origin)
        # A string beside two transcripts repeats the first user turn and is not used.
        case (None | str(), list(), list()):
            return _implied(row, origin)
        case (str(prompt), str(chosen), str(rejected)):
            answers = [{"role": "assistant", "content": c} for c in (chosen, rejected)]
            return [{"role": "user", "content": prompt}], answers[0], answers[1]
        case (prompt, chosen, rejected):
            texts = isinstance(chosen, str) and isinstance(rejected, str)
            if chosen is None or rejected is None or (prompt is None and texts):
                names = ("chosen", "rejected", "prompt")
                missing = next(name for name in names if row.get(name) is None)
                raise UserError(
                    f"{origin}: the field {missing!r} is missing; expected prompt,"
                    " chosen and rejected, got"
                    f" {untrusted.shown(', '.join(row)) or 'none'}. Add it or remove"
                    " the row."
                )
    types = ", ".join(f"{k} ({type(v).__name__})" for k, v in row.items())
    raise UserError(
        f"{origin}: not a known form of preference pair. Expected chosen and rejected"
        " as two lists of messages with prompt as a list of messages, two full"
        " transcripts (lists of messages) without a prompt list, or prompt, chosen and"
        f" rejected as three strings; got {untrusted.shown(types)}. Convert the row to"
        " one of these."
    )


def _explicit(row: dict[str, Any], origin: str) -> _Parts:
    """``prompt`` is a list of messages, each answer a list of one."""
    answers = {n: _messages(row[n], n, origin) for n in ("chosen", "rejected")}
    for name, answer in answers.items():
        if len(answer) != 1:
            raise UserError(
                f"{origin}: beside a prompt list, {name} must hold one message, the"
                f" assistant's answer, got {len(answer)}. Move earlier turns to prompt,"
                " or leave prompt out to give two full transcripts."
            )
    (chosen,), (rejected,) = answers.values()
    return _messages(row["prompt"], "prompt", origin), chosen, rejected


def _implied(row: dict[str, Any], origin: str) -> _Parts:
    """Two full transcripts; what they share is the prompt."""
    chosen, rejected = (_messages(row[n], n, origin) for n in ("chosen", "rejected"))
    if not chosen or not rejected:
        raise _Dropped(EMPTY)
    if chosen[:-1] != rejected[:-1]:
        raise _Dropped("transcripts differ before the last answer")
    return chosen[:-1], chosen[-1], rejected[-1]


def _messages(items: list[Any], name: str, origin: str) -> list[Message]:
    for number, item in enumerate(items, 1):
        if not (
            isinstance(item, dict)
            and isinstance(item.get("role"), str)
            and isinstance(item.get("content"), str)
        ):
            form = "must be an object with the strings role and content"
            raise _wrong(origin, f"message {number} of {name} {form}", item)
    return [{"role": item["role"], "content": item["content"]} for item in items]


def _wrong(origin: str, expected: str, value: Any) -> UserError:
    return UserError(
        f"{origin}: {expected}, got {untrusted.shown(repr(value), most=80)}. Mend or"
        " remove the row."
    )


def _require_characters(origin: str, *texts: str) -> None:
    """Refuses half a surrogate pair, which JSON can spell but is no character."""
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
        raise _Dropped("answer is not the assistant's")
    if not prompt or prompt[-1]["role"] != "user":
        raise _Dropped("prompt does not end with the user's turn")
    if not chosen["content"].strip() or not rejected["content"].strip():
        raise _Dropped(EMPTY)
    if chosen["content"] == rejected["content"]:
        raise _Dropped(EQUAL)


def parse_prompt(row: Any, *, origin: str) -> list[Message]:
    """The messages of a row with ``prompt``, ``messages`` or ``instruction``."""
    names = ("prompt", "messages", "instruction")
    name = next((n for n in names if isinstance(row, dict) and n in row), None)
    if name is None:
        raise _wrong(origin, f"expected an object with {' or '.join(names)}", row)
    value = row[name]
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    elif isinstance(value, list) and name != "instruction":
        messages = _messages(value, name, origin)
    else:
        raise _wrong(origin, f"{name} must be a text or a list of messages", value)
    if not messages or messages[-1]["role"] != "user":
        raise _wrong(origin, f"{name} must end with a message of the user", value)
    _require_characters(origin, *(message["content"] for message in messages))
    return messages
