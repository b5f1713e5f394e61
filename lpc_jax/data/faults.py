"""Known faults of public pairs, which are counted by these names; the pairs are kept.

Sources: OpenBMB/UltraFeedback issue 8, the cards of Argilla's cleaned sets, and rows of
HH-RLHF, SHP and UltraFeedback.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

TRUTHFUL = "truthful_qa"
BENCHMARK = f"from {TRUTHFUL}, whose questions a benchmark asks"
TURNS = "text spells turns that the template does not know"
REVERSED = "both answers the other way round in an earlier pair"
_PLACEHOLDERS = {"nan", "none", "null", "n/a", "undefined", "[deleted]", "[removed]"}
_SCORES = ("score", "rating", "reward")
_ROLES = {"system", "user", "assistant", "tool"}
# What a text spells -> what that tells of it.
_SPELT = {
    TURNS: (
        *("\n\nHuman:", "\n\nAssistant:", "[INST]", "### Instruction:"),
        *("### Response:", "<|im_start|>", "<start_of_turn>", "<|start_header_id|>"),
    ),
    "text was decoded wrongly": ("\ufffd", "â€", "Ã©", "Ã¨", "Ã¼", "Ã¶", "Ã¤"),
}
_HEADERS = ("Assistant:", "Human:", "User:", "ASSISTANT:", "AI:")


def of(
    row: dict[str, Any],
    prompt: Sequence[dict[str, Any]],
    chosen: dict[str, Any],
    rejected: dict[str, Any],
) -> Iterator[str]:
    """Names of the faults of a pair, each once."""
    texts = [message["content"] or "" for message in (*prompt, chosen, rejected)]
    *_, turn, better, worse = texts
    answers = better.strip(), worse.strip()
    if row.get("source") == TRUTHFUL:
        yield BENCHMARK
    yield from _of_scores(row)
    for fault, marks in _SPELT.items():
        if any(mark in text for text in texts for mark in marks):
            yield fault
    if any(answer.startswith(_HEADERS) for answer in answers):
        yield "answer begins with a speaker's name"
    if any(answer.lower() in _PLACEHOLDERS for answer in answers):
        yield "answer is a placeholder, such as nan or [deleted]"
    if not turn.strip():
        yield "the prompt's last turn is empty"
    elif len(turn.split()) > 1 and all(a.startswith(turn.strip()) for a in answers):
        yield "both answers begin with the prompt"
    if better != worse and better.split() == worse.split():
        yield "answers differ in white space alone"
    for role in sorted({message["role"] for message in prompt} - _ROLES):
        yield f"a message has the role {role!r:.40}"


def _of_scores(row: dict[str, Any]) -> Iterator[str]:
    for name, better in row.items():
        worse = row.get(name.replace("chosen", "rejected"))
        if "chosen" not in name or not any(word in name for word in _SCORES):
            continue
        if isinstance(better, int | float) and isinstance(worse, int | float):
            if better == worse:
                yield f"both answers have the same {name}"
            elif better < worse:
                yield f"rejected has more of {name}"
