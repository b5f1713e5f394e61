"""Rows of public sets under their own fields' names, as pairs or ranked answers here.

What the fields mean, each set's page and its trainer's documentation say.
"""

from __future__ import annotations

import re
from typing import Any

from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

# The better and the worse answer by other names.
_PAIRS = (
    ("chosen_response", "rejected_response"),  # Argilla
    ("response", "rejected_response"),  # ms-swift
    ("response_j", "response_k"),  # StackExchange paired
    ("text_chosen", "text_rejected"),  # the alignment handbook
    ("preferred_output", "non_preferred_output"),  # OpenAI
)
_WINNER = {"model_a": 1, "model_b": -1, "tie": 0, "tie (bothbad)": 0}
# Two answers and what judges them -> by how much the first one is better.
_JUDGED = {
    # PKU-SafeRLHF, SHP, HelpSteer3, WebGPT, Chatbot Arena
    ("response_0", "response_1", "better_response_id"): lambda better: 0.5 - better,
    ("human_ref_A", "human_ref_B", "labels"): lambda first: first - 0.5,
    ("response1", "response2", "overall_preference"): lambda second: -second,
    ("answer_0", "answer_1", "score_0", "score_1"): lambda a, b: a - b,
    ("conversation_a", "conversation_b", "winner"): _WINNER.__getitem__,
}
_KTO = (
    "It judges one answer (KTO): join rows of one prompt, an answer of true as chosen"
    " and one of false as rejected."
)
_ONE = "It has one answer, as for fine-tuning; a pair has chosen and rejected."
# Fields that tell a form which is not read -> how to convert it.
_TO_CONVERT = {
    ("completions",): "Convert it: python scripts/prepare_ultrafeedback.py --input FILE"
    " --output PAIRS.jsonl",
    ("summaries", "choice"): "Give answers as a list of texts, the chosen one first,"
    " and the post as prompt.",
    ("messages", "rejected_response"): "Give all but the last message as prompt, the"
    " last one as chosen and rejected_response as rejected.",
    ("completion", "label"): _KTO,
    ("kto_tag",): _KTO,
    ("response", "helpfulness"): "It scores one answer: join the rows of one prompt to"
    " prompt, answers and scores, both lists.",
    ("response_a", "response_b"): "Give the better answer as chosen, the other one as"
    " rejected.",
    ("messages",): _ONE,
    ("conversations",): _ONE,
}
_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]""")
_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):[ ]?")  # of HH-RLHF


def known(row: dict[str, Any], origin: str) -> dict[str, Any]:
    """The row under the names that are read here; as it is where none else is known.

    Raises:
        UserError: A judgement that is none.
    """
    row = {n: _spelt(n, value, origin) for n, value in _unwrapped(row).items()}
    answers = [row.get("chosen"), row.get("rejected")]
    if answers != [None, None]:
        parted = [turns(answer) for answer in answers]
        if row.get("prompt") is None and all(parted):
            return row | {"chosen": parted[0], "rejected": parted[1]}
        return row
    for names in _PAIRS:
        if row.keys() >= {*names}:
            pair = {"chosen": row[names[0]], "rejected": row[names[1]]}
            return _without(row, *names) | pair
    for names, better in _JUDGED.items():
        if row.keys() >= {*names}:
            judged = [row[name] for name in names]
            try:
                scores = [float(better(*judged[2:])), 0.0]
            except (TypeError, LookupError) as e:
                raise wrong(origin, f"{names[2]} must judge", judged[2]) from e
            return _without(row, *names) | {"answers": judged[:2], "scores": scores}
    return row


def _spelt(name: str, value: Any, origin: str) -> Any:
    """A value, or the messages that it spells as JSON, as tables of texts have them."""
    if not isinstance(value, str) or not _MESSAGES.match(value):
        return value
    try:
        return untrusted.parse_json(value.encode(), repeats=True)
    except ValueError as e:
        if name not in ("prompt", "messages", "chosen", "rejected"):
            return value
        raise UserError(
            f"{origin}: expected text, or messages as JSON, got"
            f" {untrusted.shown(value, most=60)}, messages as Python prints them. Save"
            " the data as parquet or JSON lines, which hold lists."
        ) from e


def _unwrapped(row: dict[str, Any]) -> dict[str, Any]:
    """The row without what other sets wrap around prompts and ranked answers."""
    match row:
        case {"input": {"messages": list()} as inner}:  # OpenAI
            return _without(row, "input") | inner
        case {"question": {"full_text": text}}:  # WebGPT
            return row | {"question": text}
        case {"history": str(text), "human_ref_A": _}:  # SHP
            return _without(row, "history") | {"prompt": text}
        case {"answers": [{"answer": _, "rank": _}, *_] as items}:  # Nectar
            prompt = turns(row.get("prompt")) or row.get("prompt")
            ranks = [-item["rank"] for item in items]
            answers = [item["answer"] for item in items]
            return row | {"prompt": prompt, "answers": answers, "scores": ranks}
        case {"generations": list(answers)} if not row.get("chosen"):  # distilabel
            scores = "ratings" if "ratings" in row else "rating"
            ranked = {"answers": answers, "scores": row.get(scores)}
            return _without(row, "generations", scores) | ranked
        case _:
            return row


def _without(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def turns(text: Any) -> list[dict[str, str]]:
    """The messages of a transcript as HH-RLHF writes them; [] for what is none."""
    before, *parts = _TURN.split(text) if isinstance(text, str) else [""]
    if before.strip() or not parts:
        return []
    messages = [
        {"role": role, "content": content}
        for role, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    # An empty turn of the assistant opens its answer.
    return messages[: len(messages) - (not messages[-1]["content"].strip())]


def in_words(row: Any) -> str:
    """The fields of a row and what they hold, with the roles of messages, in words."""
    if not isinstance(row, dict):
        return f"no fields ({type(row).__name__})"
    fields = ", ".join(f"{name} ({_kind(value)})" for name, value in row.items())
    return untrusted.shown(fields)


def _kind(value: Any) -> str:
    match value:
        case None:
            return "missing"
        case str():
            return "text"
        case [{"role": _} | {"from": _}, *_]:
            roles = (str(m.get("role", m.get("from"))) for m in value if m)
            return f"messages of {', '.join(dict.fromkeys(roles))}"
        case _:
            return type(value).__name__


def remedy(row: dict[str, Any]) -> str:
    """How to convert a row whose form is not read."""
    told = (words for names, words in _TO_CONVERT.items() if row.keys() >= {*names})
    return next(told, "Convert or remove the row.")


def wrong(origin: str, expected: str, value: Any) -> UserError:
    """For a row with a value of another form than expected."""
    got = untrusted.shown(repr(value), most=80)
    return UserError(f"{origin}: {expected}, got {got}. Mend or remove the row.")
