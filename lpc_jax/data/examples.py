"""Parses rows into pairs and prompts: one without a preference is a counted drop."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

from lpc_jax.data import rows
from lpc_jax.data.ranked import Ranked, rows_of
from lpc_jax.data.report import Drops
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Message = dict[str, str]
_Parts = tuple[list[Message], Message, Message]  # prompt, chosen, rejected
_ANSWERS = ("chosen", "rejected")
COLUMNS = ("prompt", *_ANSWERS)
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


class Dropped(Exception):
    """A pair that cannot be trained on; the message is the rule's name."""


def read(
    path: str,
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str = USER,
    ranked: Ranked = "all",
) -> tuple[list[PreferenceExample], Drops]:
    """Pairs of the first ``limit`` rows and drops; ``UserError`` if no pair is left."""
    events: list[tuple[str, str]] = []
    every = rows.read(path, setting=setting, split=split, columns=COLUMNS)
    examples = list(stream(every, limit=limit, user=user, ranked=ranked, events=events))
    drops = Drops(events)
    if not examples:
        raise none_in(path, setting, drops)
    return examples, drops


def stream(
    every: rows.Rows,
    *,
    limit: int | None,
    user: str,
    ranked: Ranked,
    events: list[tuple[str, str]],
) -> Iterator[PreferenceExample]:
    """Pairs of the first ``limit`` rows, one by one; dropped rows go to ``events``."""
    index = itertools.count()
    for origin, row in itertools.islice(every, limit):
        for pair in rows_of(row, origin=origin, ranked=ranked, events=events):
            try:
                example = parse(pair, origin=origin, index=next(index), user=user)
            except Dropped as drop:
                events.append((str(drop), origin))
            else:
                yield example


def none_in(path: str, setting: str, drops: Drops) -> UserError:
    """For data of which no row is a pair."""
    reasons = "; ".join(drops.lines()) or "it has no rows"
    return UserError(
        f"{setting} = {path!r} holds no preference pair, expected at least one:"
        f" {reasons}. Give rows with a prompt and two different answers."
    )


def parse(row: Any, *, origin: str, index: int, user: str = USER) -> PreferenceExample:
    """One row as a pair; ``UserError`` where its form is not known."""
    if not isinstance(row, dict):
        raise _wrong(origin, "expected an object with chosen and rejected", row)
    prompt, chosen, rejected = _parts(row, origin)
    source, judge = row.get("source"), row.get(user)
    pair = PreferenceExample(
        prompt=tuple(prompt),
        chosen=chosen["content"],
        rejected=rejected["content"],
        source=source if isinstance(source, str) and source else NO_SOURCE,
        origin=origin,
        index=index,
        user=str(judge) if isinstance(judge, str | int) else "",
    )
    texts = [text for m in (*prompt, chosen, rejected) for text in m.values()]
    _require_characters(origin, *texts, pair.source, pair.user)
    _require_preference(prompt, chosen, rejected)
    return pair


def _parts(row: dict[str, Any], origin: str) -> _Parts:
    match row.get("prompt"), row.get("chosen"), row.get("rejected"):
        case (str(prompt), str(chosen), str(rejected)):
            answers = [{"role": "assistant", "content": c} for c in (chosen, rejected)]
            return [{"role": "user", "content": prompt}], answers[0], answers[1]
        case (list(prompt), list(), list()):
            chosen, rejected = (_answer(row, name, origin) for name in _ANSWERS)
            return _messages(prompt, "prompt", origin), chosen, rejected
        # A string beside two transcripts repeats the first user turn and is not used.
        case (None | str(), list(), list()):
            return _implied(row, origin)
    fields = dict.fromkeys(("prompt", *_ANSWERS)) | row
    types = ", ".join(
        f"{name} ({'missing' if value is None else type(value).__name__})"
        for name, value in fields.items()
    )
    raise UserError(
        f"{origin}: expected prompt, chosen and rejected as three strings, or prompt as"
        " a list of messages and each answer as a list of one, or two full transcripts"
        f" (lists of messages) as chosen and rejected; got {untrusted.shown(types)}."
        " Convert or remove the row."
    )


def _answer(row: dict[str, Any], name: str, origin: str) -> Message:
    messages = _messages(row[name], name, origin)
    if len(messages) != 1:
        raise UserError(
            f"{origin}: beside a prompt list, {name} must hold one message, got"
            f" {len(messages)}. Move earlier turns to prompt, or leave prompt out."
        )
    return messages[0]


def _implied(row: dict[str, Any], origin: str) -> _Parts:
    """Two full transcripts; what they share is the prompt."""
    chosen, rejected = (_messages(row[name], name, origin) for name in _ANSWERS)
    if not chosen or not rejected:
        raise Dropped(EMPTY)
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("transcripts differ before the last answer")
    return chosen[:-1], chosen[-1], rejected[-1]


def _messages(items: list[Any], name: str, origin: str) -> list[Message]:
    messages = []
    for number, item in enumerate(items, 1):
        match item:
            case {"role": str(role), "content": str(content)}:
                messages.append({"role": role, "content": content})
            case _:
                form = "must be an object with the strings role and content"
                raise _wrong(origin, f"message {number} of {name} {form}", item)
    return messages


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
            around = text[max(0, e.start - 20) : e.end + 20]
            raise _wrong(origin, "expected no half of a surrogate pair", around) from e


def _require_preference(
    prompt: list[Message], chosen: Message, rejected: Message
) -> None:
    if chosen["role"] != "assistant" or rejected["role"] != "assistant":
        raise Dropped("answer is not the assistant's")
    if not prompt or prompt[-1]["role"] != "user":
        raise Dropped("prompt does not end with the user's turn")
    if not chosen["content"].strip() or not rejected["content"].strip():
        raise Dropped(EMPTY)
    if chosen["content"] == rejected["content"]:
        raise Dropped(EQUAL)


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
