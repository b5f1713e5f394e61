"""Chat templates as texts: arguments, dates and plain text in them, what they lose."""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.meta

from lpc_jax.data.examples import Dropped, Message, strings
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Template = str | dict[str, str]  # one, or several by name
DATE = "strftime_now"  # the function by which a template writes today's date
NOT_WRITTEN = "the chat template does not write all of"
THOUGHTS = "earlier answers are written without their thoughts"
_END_OF_THOUGHTS = "</think>"
_PLAIN = "{#- text as it stands -#}"
# What stands before a template does not count as a line of its own: transformers
# renders with trim_blocks.
_SET = "{{% if {0} is not defined %}}{{% set {0} = {1} %}}{{% endif %}}\n"
_FILLED = {"messages", "tools", "documents", "add_generation_prompt"}
# Tags that transformers adds to Jinja.
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
_DIRECTIVES = [
    f"%{flag}{c}" for flag in ("", "-") for c in "aAbBcCdDeFgGhHIjklmMpPrRSTuUVwWxXyY"
]


def today() -> datetime.date:
    """The day on this machine's clock."""
    return datetime.datetime.now().astimezone().date()


def plain(*, bos: bool) -> str:
    """The template of text as it stands: a prompt, and EOS behind an answer."""
    refused = "{{ raise_exception('data.template=None reads one text as the prompt, got"
    return (
        f"{_PLAIN}{{% if messages[0].role != 'user' or messages | length > 2 %}}"
        f"{refused} a conversation') }}}}{{% endif %}}{'{{ bos_token }}' * bos}"
        "{% for message in messages %}{{ message.content }}"
        "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )


def is_plain(template: Template | None) -> bool:
    """Whether it is the template of text as it stands."""
    return isinstance(template, str) and template.startswith(_PLAIN)


def default(template: Template | None) -> str:
    """The one that conversations use; empty if there is none."""
    return template.get("default", "") if isinstance(template, dict) else template or ""


def day(template: Template | None, date: str | None) -> str | None:
    """The date, or today's, that some template writes; None where none asks for it."""
    texts = template.values() if isinstance(template, dict) else [default(template)]
    return date or today().isoformat() if any(DATE in text for text in texts) else None


def with_arguments(
    template: Template | None, arguments: Mapping[str, bool | int | float | str]
) -> Template:
    """The template with values for its variables, which it then carries everywhere.

    A value that ``apply_chat_template`` is given goes before these.

    Raises:
        UserError: A variable that no template reads, or that is filled for each row.
    """
    texts = template if isinstance(template, dict) else {"default": default(template)}
    read = set[str]().union(*map(_variables, texts.values())) - _FILLED
    read = {name for name in read if not name.endswith("_token")}
    for name in arguments:
        if name not in read:
            raise UserError(
                f"data.template_arguments: the chat template must read {name!r}, got"
                f" one that reads {', '.join(sorted(read)) or 'no arguments'}. Leave it"
                " out, or correct its name."
            )
    lines = "".join(_SET.format(name, repr(x)) for name, x in arguments.items())
    changed = {name: lines + text for name, text in texts.items()}
    return changed if isinstance(template, dict) else changed["default"]


def _variables(text: str) -> set[str]:
    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_GENERATION.sub("", text))
    except jinja2.TemplateError as e:
        raise UserError(
            f"the chat template must be Jinja, got one with {untrusted.shown(e)}. Set"
            " model.chat_template to a whole one."
        ) from e
    known = {"raise_exception", DATE, *environment.globals}
    return jinja2.meta.find_undeclared_variables(parsed) - known


@functools.lru_cache(maxsize=8)
def dated(template: str, day: str) -> str:
    """The template with today's date replaced by ``day``, ``YYYY-MM-DD``."""
    date = datetime.datetime.fromisoformat(day)
    written = "".join(f"|replace({d!r}, {date.strftime(d)!r})" for d in _DIRECTIVES)
    return (
        f"{{% macro {DATE}(format) %}}{{{{ format{written} }}}}{{% endmacro %}}\n"
        f"{template}"
    )


def require_messages(text: str, messages: Sequence[Message]) -> Iterator[str]:
    """Notes of what a prompt's text leaves out; ``Dropped`` for more than thoughts."""
    for message in _lost(text, messages):
        role, content = message["role"], str(message["content"])
        answer = content.rpartition(_END_OF_THOUGHTS)[2]
        if role != "assistant" or _lost(text, [{"content": answer}]):
            raise Dropped(f"{NOT_WRITTEN} a message of the {untrusted.shown(role)}")
        yield THOUGHTS


def require_answer(text: str, answer: Message, prompt: str) -> None:
    """``Dropped`` where a conversation's text does not end in the whole answer."""
    shared = len(prompt)
    if not text.startswith(prompt):
        columns = enumerate(zip(prompt, text, strict=False))
        shared = next((i for i, (a, b) in columns if a != b), len(text))
    # The header may write the answer's first characters.
    behind = text[max(0, shared - len(answer["content"] or "")) :]
    if _lost(behind, [answer]):
        raise Dropped(f"{NOT_WRITTEN} the answer")


def require_calls(text: str, messages: Sequence[Message]) -> None:
    """``Dropped`` where a text lacks a call's name or a text of its arguments."""
    for form in (messages, with_objects(messages)):
        parts = [(f.get("name"), f.get("arguments")) for f in _functions(form)]
        if not _lost(text, [{"content": part} for part in strings(parts)]):
            return
    raise Dropped(f"{NOT_WRITTEN} tool_calls")


def with_objects(
    messages: Sequence[Message], quoted: str | None = None
) -> Sequence[Message]:
    """The messages with their calls' arguments as objects, as most templates expect.

    With the text of a template only those that it quotes: of JSON, once more.
    """
    changed = copy.deepcopy(messages)
    for function in _functions(changed):
        arguments = function.get("arguments")
        if isinstance(arguments, str) and (
            quoted is None or json.dumps(arguments, ensure_ascii=False) in quoted
        ):
            with contextlib.suppress(ValueError):
                function["arguments"] = untrusted.parse_json(arguments.encode())
    return changed


def _functions(messages: Sequence[Message]) -> list[dict[str, Any]]:
    lists = [m["tool_calls"] for m in messages if isinstance(m.get("tool_calls"), list)]
    calls = [call for calls in lists for call in calls if isinstance(call, dict)]
    functions = [call.get("function", call) for call in calls]
    return [function for function in functions if isinstance(function, dict)]


def _lost(text: str, messages: Sequence[Message]) -> list[Message]:
    """Messages whose content does not stand in the text, white space aside."""
    contents = [(message.get("content") or "").strip() for message in messages]
    if any(content not in text for content in contents):
        text, contents = _squeezed(text), [_squeezed(c) for c in contents]
        # What a tool returns may be written as JSON.
        quoted = [json.dumps(c, ensure_ascii=False)[1:-1] for c in contents]
        contents = [
            c if c in text else q for c, q in zip(contents, quoted, strict=True)
        ]
    there = [c for c in contents if c in text]
    # One content may stand in another, and is then there once more.
    return [
        message
        for message, c in zip(messages, contents, strict=True)
        if c and (c not in text or text.count(c) < sum(o.count(c) for o in there))
    ]


def _squeezed(text: str) -> str:
    return "".join(text.split())
