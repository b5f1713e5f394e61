"""Parses rows into pairs and prompts: one without a preference is a counted drop."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from lpc_jax.data import faults, forms, rows
from lpc_jax.data.forms import wrong as _wrong
from lpc_jax.data.ranked import Ranked, rows_of
from lpc_jax.data.report import Drops, Tally
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

# Role and content, and what more a template may read, such as tool_calls.
Message = dict[str, Any]
_Parts = tuple[list[Message], Message, Message]  # prompt, chosen, rejected
_ANSWERS = ("chosen", "rejected")
# Fields that can hold the prompt, of which the first that is there does.
_PROMPTS = (
    *("prompt", "messages", "conversations", "instruction", "question", "query"),
    *("context", "context_messages", "text_prompt", "input"),
)
_SYSTEMS = ("system", "system_prompt")  # likewise the system message
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
_ROLES = {
    **{role: role for role in ("system", "user", "assistant", "tool")},
    **dict.fromkeys(("human", "prompter"), "user"),
    **dict.fromkeys(("gpt", "model", "bot", "chatbot"), "assistant"),
    **dict.fromkeys(("function", "observation"), "tool"),
}
_CALL = "function_call"  # LLaMA-Factory's role, and a field of OpenAI's older messages
_EMPTY = (None, "", [], {})
_TEXT_PARTS = ("text", "input_text", "output_text")
NO_SOURCE = "unknown"
USER = "user"  # the field of a row that says who judged
# Rules that drop a pair in more than one place.
EMPTY = "empty answer"
EQUAL = "chosen equals rejected"


@dataclasses.dataclass(frozen=True)
class PreferenceExample:
    """A conversation and two answers to its last turn, which is the user's."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    source: str  # where the prompt comes from, for reports
    origin: str  # the row as file:line, for messages
    index: int  # of the row in what was read, dropped rows counted
    user: str = ""  # who judged, where the row says so
    more: tuple[Message, Message] = ({}, {})  # the answers' fields besides their text
    tools: tuple[Any, ...] = ()  # that the assistant may call
    is_text: bool = False  # prompt and answers were texts, not messages
    unread: tuple[str, ...] = ()  # fields of the row that nothing reads
    faults: tuple[str, ...] = ()  # known ones, which reports count

    def answers(self, *texts: str) -> list[Message]:
        """Both answers as messages, with other texts if these are given."""
        pairs = zip(texts or (self.chosen, self.rejected), self.more, strict=True)
        return [{"role": "assistant", "content": text} | more for text, more in pairs]


class Dropped(Exception):
    """A pair that cannot be trained on; the message is the rule's name."""


def read(
    source: str | Sequence[Any],
    *,
    setting: str,
    split: str | None,
    limit: int | None,
    user: str = USER,
    ranked: Ranked = "all",
) -> tuple[list[PreferenceExample], Drops]:
    """Pairs of the first ``limit`` rows and drops; ``UserError`` if no pair is left.

    ``source`` is a path, or rows in memory.
    """
    tally = Tally()
    every = ((f"{setting}:{number}", row) for number, row in enumerate(source, 1))
    if isinstance(source, str):
        every = rows.read(source, setting=setting, split=split)
    examples = list(stream(every, tally, limit=limit, user=user, ranked=ranked))
    if not examples:
        path = f" = {source!r}" if isinstance(source, str) else ""
        raise none_in(f"{setting}{path}", tally)
    return examples, Drops(tally.events)


def stream(
    every: rows.Rows, tally: Tally, *, limit: int | None, user: str, ranked: Ranked
) -> Iterator[PreferenceExample]:
    """Pairs of the first ``limit`` rows, one by one; dropped rows go to ``tally``."""
    index, events = itertools.count(), tally.events
    for origin, row in itertools.islice(every, limit):
        unread: tuple[str, ...] = ()
        tally.first = tally.first or f"{origin}: {forms.in_words(row)}"
        for pair in rows_of(row, origin=origin, ranked=ranked, events=events):
            try:
                example = parse(pair, origin=origin, index=next(index), user=user)
            except Dropped as drop:
                events.append((str(drop), origin))
            else:
                unread = example.unread
                yield example
        tally.meet(unread)


def none_in(source: str, tally: Tally) -> UserError:
    """For data of which no row is a pair."""
    reasons = "; ".join(Drops(tally.events).lines()) or "it has no rows"
    first = f" First row, {tally.first}." if tally.first else ""
    return UserError(
        f"{source} holds no preference pair, expected at least one: {reasons}. Give"
        f" rows with a prompt and two different answers.{first}"
    )


def parse(row: Any, *, origin: str, index: int, user: str = USER) -> PreferenceExample:
    """One row as a pair; ``UserError`` where its form is not known."""
    if not isinstance(row, dict):
        raise _wrong(origin, "expected an object with chosen and rejected", row)
    (prompt, chosen, rejected), names = _parts(row, origin)
    prompt, source = _introduced(row, prompt, origin), row.get("source")
    judge, name = row.get(user), _first(row, _PROMPTS)
    unread = _unread(row, names | {*_ANSWERS, "source", user}, origin)
    own = tools(row, origin)
    texts = strings([*prompt, chosen, rejected, own, source, judge])
    _require_characters(origin, *texts)
    _require_preference(prompt, chosen, rejected)
    return PreferenceExample(
        prompt=tuple(prompt),
        chosen=chosen["content"] or "",
        rejected=rejected["content"] or "",
        source=source if isinstance(source, str) and source else NO_SOURCE,
        origin=origin,
        index=index,
        user=str(judge) if isinstance(judge, str | int) else "",
        more=(_more(chosen), _more(rejected)),
        tools=own,
        is_text=len(prompt) == 1
        and {type(row.get(name)), type(row["chosen"])} == {str},
        unread=unread,
        faults=tuple(faults.of(row, prompt, chosen, rejected)),
    )


def _more(answer: Message) -> Message:
    """What a message holds besides its role and text."""
    left_out = {"role"} if answer["content"] is None else {"role", "content"}
    return {name: value for name, value in answer.items() if name not in left_out}


def strings(value: Any) -> Iterator[str]:
    """Every text in nested lists and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from strings(part)


def _first(row: dict[str, Any], names: Sequence[str]) -> str:
    """The first of these fields that holds something, else that is there."""
    there = [name for name in names if row.get(name) is not None]
    filled = [name for name in there if row[name] not in _EMPTY]
    return (*filled, *there, *names)[0]


def _unread(row: dict[str, Any], read: set[str], origin: str) -> tuple[str, ...]:
    """Names of fields that hold something and are not read."""
    read |= {_first(row, _SYSTEMS), "history", "tools"}
    filled = [name for name, x in row.items() if x not in _EMPTY]
    for name in filled:
        if name in _MEDIA:
            raise _wrong(origin, f"{name} cannot be read, text alone can", row[name])
    return tuple(name for name in filled if name not in read)


def _parts(row: dict[str, Any], origin: str) -> tuple[_Parts, set[str]]:
    """Prompt, chosen and rejected, and the fields that hold the prompt."""
    name = _first(row, _PROMPTS)
    value, sides = row.get(name), [row.get(side) for side in _ANSWERS]
    texts = [isinstance(side, str) for side in sides]
    if all(isinstance(side, str | list | dict) for side in sides) and (
        isinstance(value, str | list) or (value is None and not any(texts))
    ):
        return _in_one_form(row, name, sides, origin)
    if row.keys() >= {*_ANSWERS} and any(x is None or x != x for x in sides):
        raise Dropped(EMPTY)  # null, or NaN as pandas writes it
    got = forms.in_words(dict.fromkeys(("prompt", *_ANSWERS)) | row)
    raise UserError(
        f"{origin}: expected prompt, chosen and rejected as three strings, or prompt as"
        " a list of messages and each answer as a list of one, or two full transcripts"
        f" (lists of messages) as chosen and rejected; got {got}. {forms.remedy(row)}"
    )


def _in_one_form(
    row: dict[str, Any], name: str, sides: Sequence[Any], origin: str
) -> tuple[_Parts, set[str]]:
    """The same of a row whose answers are texts, messages or lists of these."""
    answers = []
    for side, value in zip(_ANSWERS, sides, strict=True):
        texts = isinstance(value, str)
        item = {"role": "assistant", "content": value} if texts else value
        items = item if isinstance(item, list) else [item]
        answers.append(_messages(items, side, origin))
    begin = row.get(name)
    if name == "prompt" and isinstance(begin, list):
        begin = _messages(begin, name, origin)
        # A transcript may repeat the prompt.
        answers = [x[-1:] if x[:-1] == begin else x for x in answers]
        if (most := max(map(len, answers))) > 1:
            raise UserError(
                f"{origin}: beside a prompt list, an answer must hold one message, or"
                f" the prompt and one, got {most}. Move earlier turns to prompt, or"
                " leave prompt out."
            )
    if begin is not None and list(map(len, answers)) == [1, 1]:
        prompt, names = _prompt(row, name, origin)
        return (prompt, answers[0][0], answers[1][0]), names
    parts = _implied(*answers)
    # A text beside two transcripts repeats a turn, or is not read.
    repeats = any(begin == message["content"] for message in parts[0])
    return parts, {name} if repeats else set()


def _implied(chosen: list[Message], rejected: list[Message]) -> _Parts:
    """Two full transcripts; what they share is the prompt."""
    if not chosen or not rejected:
        raise Dropped(EMPTY)
    if chosen[:-1] != rejected[:-1]:
        raise Dropped("transcripts differ before the last answer")
    return chosen[:-1], chosen[-1], rejected[-1]


def _prompt(
    row: dict[str, Any], name: str, origin: str
) -> tuple[list[Message], set[str]]:
    """The prompt in a field, and the fields that it was read from."""
    value, more = row[name], row.get("input")
    if isinstance(value, list):
        return _messages(value, name, origin), {name}
    if not isinstance(value, str):
        raise _wrong(origin, f"{name} must be a text or a list of messages", value)
    names = {name}
    if name == "instruction" and isinstance(more, str) and more:
        # As LLaMA-Factory joins the two fields of Alpaca's rows.
        value, names = f"{value}\n{more}", {name, "input"}
    return [{"role": "user", "content": value}], names


def _introduced(
    row: dict[str, Any], prompt: list[Message], origin: str
) -> list[Message]:
    """The prompt behind the row's system message and its history, if it has them."""
    history, before = row.get("history"), []
    if history is not None and not isinstance(history, list):
        raise _wrong(origin, "history must be a list of turns", history)
    for turn in history or ():
        match turn:
            case [str(question), str(answer)]:
                before += [{"role": "user", "content": question}]
                before += [{"role": "assistant", "content": answer}]
            case _:
                before += _messages([turn], "history", origin)
    name = _first(row, _SYSTEMS)
    system, whole = row.get(name), [*before, *prompt]
    if not system:
        return whole
    if not isinstance(system, str):
        raise _wrong(origin, f"{name} must be a text", system)
    message = {"role": "system", "content": system}
    if any(turn["role"] == "system" and turn != message for turn in whole):
        raise _wrong(origin, f"beside {name}, expected no other system message", whole)
    return whole if message in whole else [message, *whole]


def tools(row: Any, origin: str) -> tuple[Any, ...]:
    """The tools that a row names, as objects or as JSON, as TRL takes them."""
    value = row.get("tools") if isinstance(row, dict) else None
    if isinstance(value, str) and value:
        value = _spelled(value, "tools must be a list or JSON of one", origin)
    if value and not (
        isinstance(value, list) and all(isinstance(tool, dict) for tool in value)
    ):
        raise _wrong(origin, "tools must be a list of objects", value)
    return tuple(value or ())


def _spelled(text: str, expected: str, origin: str) -> Any:
    """The value that a text spells as JSON."""
    try:
        return untrusted.parse_json(text.encode(), repeats=True)
    except ValueError as e:
        raise _wrong(origin, expected, text) from e


def _messages(items: list[Any], name: str, origin: str) -> list[Message]:
    messages = []
    for number, item in enumerate(items, 1):
        where = f"message {number} of {name}"
        match item:
            case {"role": str(role), **fields}:
                pass
            case {"from": str(role), "value": value, **fields}:
                fields |= {"content": value}
            case _:
                role, fields = None, {}
        content = _content(fields.pop("content", None), where, origin)
        calls = fields.pop(_CALL, None)
        if role == _CALL and content is not None:
            calls = _spelled(content, f"{where} must be JSON", origin)
            role, content = "assistant", ""
        if calls:
            calls = calls if isinstance(calls, list) else [calls]
            fields["tool_calls"] = [{"type": "function", "function": c} for c in calls]
        if role is None or (content is None and not fields.get("tool_calls")):
            form = "must be an object with the strings role and content"
            raise _wrong(origin, f"{where} {form}", item)
        filled = {n: x for n, x in fields.items() if x not in _EMPTY}
        role = _ROLES.get(role.strip().lower(), role)
        messages.append({"role": role, "content": content} | filled)
    return messages


def _content(value: Any, where: str, origin: str) -> str | None:
    """The text of a message, its parts joined; None for what is no text."""
    if not isinstance(value, list):
        return value if isinstance(value, str) else None
    texts = []
    for part in value:
        match part:
            case str(text):
                texts.append(text)
            case {"type": kind, "text": str(text)} if kind in _TEXT_PARTS:
                texts.append(text)
            case _:
                raise _wrong(origin, f"{where} must be of text parts alone", part)
    return "".join(texts)


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
    if not prompt or prompt[-1]["role"] not in ("user", "tool"):
        raise Dropped("prompt does not end with the user's turn")
    for answer in (chosen, rejected):
        if not (answer["content"] or "").strip() and not answer.get("tool_calls"):
            raise Dropped(EMPTY)
    if chosen == rejected:
        raise Dropped(EQUAL)


def parse_prompt(row: Any, *, origin: str) -> list[Message]:
    """The messages of a row's prompt, with its system message and history."""
    known = forms.known(row, origin) if isinstance(row, dict) else {}
    if known.get(name := _first(known, _PROMPTS)) is None:
        names = " or ".join(_PROMPTS)
        raise _wrong(origin, f"expected an object with {names}", row)
    _unread(known, set(), origin)
    messages = _introduced(known, _prompt(known, name, origin)[0], origin)
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        raise _wrong(origin, f"{name} must end with a message of the user", known[name])
    _require_characters(origin, *strings(messages))
    return messages
