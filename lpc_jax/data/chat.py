"""Turns preference pairs into token ids: chat template, tokenizer, truncation.

Knows nothing of rows' layout, batches or devices. The assistant's header belongs to
the prompt and is not scored, as in TRL; an answer's scored tokens end with the token
that ends the turn. Nothing here looks at padding: lengths alone say what is scored.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import jinja2
import numpy as np
from jaxtyping import Float, Int32

from lpc_jax.data.examples import EMPTY, PreferenceExample
from lpc_jax.data.report import Drops, Report, quantiles
from lpc_jax.data.tokenizer import TEMPLATE_REMEDY, Tokenizer, opens_with_bos
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

Ids = Int32[np.ndarray, "_"]
Truncation = Literal["drop", "cut_prompt", "cut_prompt_then_answer"]
PrefixMismatch = Literal["cut", "error"]

REFUSED = "refused by the chat template"
CONTROL_TEXT = "text spells the BOS or EOS token"
NO_PREFIX = "prompt and answers share no tokens"
TOO_LONG = "longer than data.max_length"
TOO_LONG_CUT = "longer than data.max_length with its prompt cut"
NO_ROOM = "prompt leaves an answer no room in data.max_length"
SAME_TOKENS = "chosen equals rejected in tokens"
PROMPT_OVER_ROW = "prompt longer than packing.row_length"
PAIR_OVER_ROW = "prompt, chosen and rejected longer than packing.row_length"

# Examples tokenized at a time: bounds the memory of token lists in Python.
_CHUNK = 1024


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """Three token strings that share a beginning: prompt, and two answers after it.

    Attributes:
        prompt: Ids of everything not scored: BOS if the tokenizer has one, the
            conversation, the assistant's header.
        chosen: Scored ids of the better answer, ending in the end-of-turn token
            unless ``cut_chosen``.
        rejected: Scored ids of the worse answer, likewise.
        source: Where the pair's prompt comes from, for reports.
        id: The pair's position in the list that was read, unique in it.
        cut_prompt: Whether the prompt's start was cut away.
        cut_chosen: Whether the chosen answer's end was cut away.
        cut_rejected: Whether the rejected answer's end was cut away.
        user: Who judged; empty where nobody says.
        states: A frozen decoder's hidden states of the prompt's last token and of both
            answers' tokens, one after the other; None where it has to read the pair.
    """

    prompt: Ids
    chosen: Ids
    rejected: Ids
    source: str
    id: int
    cut_prompt: bool
    cut_chosen: bool
    cut_rejected: bool
    user: str = ""
    states: Float[np.ndarray, "_ D"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def key(self) -> bytes:
        """Digest of the three token strings and where they end (20 bytes)."""
        content = hashlib.sha1(usedforsecurity=False)
        for ids in (self.prompt, self.chosen, self.rejected):
            content.update(len(ids).to_bytes(8, "little"))
            content.update(np.asarray(ids, "<i4").tobytes())
        return content.digest()


class _Dropped(Exception):
    """A pair that cannot be trained on; the message is the rule's name."""


@dataclasses.dataclass(frozen=True)
class _Control:
    """A tokenizer's control tokens.

    Attributes:
        bos: The token every sequence starts with once, or None.
        eos: The token that ends an answer.
        closes: Whether a token is special or only white space: what a template may
            write after an answer.
        special: Whether a token is special.
        spelled: Texts that the tokenizer reads as BOS or EOS.
    """

    bos: int | None
    eos: int
    closes: Callable[[int], bool]
    special: Callable[[int], bool]
    spelled: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Control:
        if not tokenizer.chat_template:
            raise UserError(
                "The tokenizer must have a chat template to turn conversations into"
                f" tokens, got none. {TEMPLATE_REMEDY}"
            )
        if not isinstance(tokenizer.eos_token_id, int):
            raise UserError(
                "The tokenizer must have an EOS token to end answers, got none. Set"
                " eos_token in its tokenizer_config.json."
            )
        special = {
            *tokenizer.all_special_ids,
            *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special),
        }

        @functools.cache
        def closes(token: int) -> bool:
            return token in special or not str(tokenizer.decode([token])).strip()

        named = (tokenizer.bos_token, tokenizer.eos_token)
        return cls(
            bos=tokenizer.bos_token_id if opens_with_bos(tokenizer) else None,  # pyright: ignore[reportArgumentType] -- one id for one token
            eos=tokenizer.eos_token_id,
            closes=closes,
            special=special.__contains__,
            spelled=tuple(str(token) for token in named if token is not None),
        )


def tokenize(
    examples: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    *,
    drops: Drops,
    max_length: int,
    max_prompt_length: int,
    row_length: int,
    truncation: Truncation,
    prefix_mismatch: PrefixMismatch,
) -> tuple[list[TokenizedPair], Report]:
    """Pairs as token ids, and what became of them.

    Args:
        examples: Pairs as text.
        tokenizer: A tokenizer with a chat template.
        drops: Rows that reading left out, for the report.
        max_length: Most tokens of prompt plus one answer.
        max_prompt_length: Most prompt tokens once truncation touches a pair.
        row_length: Most tokens of prompt, chosen and rejected together.
        truncation: For a pair over ``max_length``: ``drop`` it; ``cut_prompt`` at its
            start, BOS kept, and drop it if still too long; or after that cut the
            answers' ends, which then have no end-of-turn token.
        prefix_mismatch: When the prompt's tokens are no prefix of prompt plus answer:
            ``cut`` it to the prefix common to both answers, or ``error``.

    Returns:
        The kept pairs in order, and the report.

    Raises:
        UserError: The tokenizer has no chat template or no EOS, a prompt is no
            prefix under ``error``, or no pair is left.
    """
    control = _Control.of(tokenizer)
    pairs: list[TokenizedPair] = []
    events: list[tuple[str, str]] = []
    mismatches = 0
    for example, ids in _token_strings(examples, tokenizer, control, events):
        try:
            pair = _split(example, ids, control)
            mismatch = len(pair.prompt) < len(ids[0])
            if mismatch and prefix_mismatch == "error":
                raise UserError(_mismatch_text(example, ids, len(pair.prompt)))
            _require_answers(pair)
            pair = _truncate(
                pair,
                max_length=max_length,
                max_prompt_length=max_prompt_length,
                truncation=truncation,
                bos=control.bos,
            )
            _require_row(pair, row_length=row_length)
        except _Dropped as drop:
            events.append((str(drop), example.origin))
            continue
        pairs.append(pair)
        mismatches += mismatch
    drops = drops + Drops.count(events)
    if not pairs:
        raise UserError(
            f"No preference pair is left of {drops.total}, expected at least one:"
            f" {'; '.join(drops.lines()) or 'none came in'}. Raise data.max_length and"
            " packing.row_length, choose another data.truncation, or mend the data."
        )
    return pairs, _report(pairs, drops, mismatches)


def encode_prompt(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> Ids:
    """A conversation and the assistant's header as the ids of a pair's prompt.

    Args:
        messages: Roles and contents, the last one the user's.
        tokenizer: A tokenizer with a chat template.

    Raises:
        UserError: The template refuses it, or a text spells the BOS or EOS token.
    """
    control = _Control.of(tokenizer)
    try:
        text = _header([dict(message) for message in messages], tokenizer, control)
    except _Dropped as drop:
        raise UserError(f"this conversation cannot be a prompt: {drop}.") from drop
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return _with_one_bos(np.asarray(ids, np.int32), control.bos)


def end_of_answer(tokenizer: Tokenizer) -> int:
    """The token that an answer's scored tokens end with.

    Raises:
        UserError: The tokenizer has no chat template or no EOS token.
    """
    control = _Control.of(tokenizer)
    messages = [{"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "b"}
    try:
        text = _templated([*messages, answer], tokenizer)
    except _Dropped as drop:
        raise UserError(f"the chat template cannot be used: {drop}.") from drop
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return int(_until_end(np.asarray(ids, np.int32), control)[-1])


def _token_strings(
    examples: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    control: _Control,
    events: list[tuple[str, str]],
) -> Iterator[tuple[PreferenceExample, tuple[Ids, Ids, Ids]]]:
    """Ids of the prompt and of prompt plus either answer; drops go to ``events``."""
    for start in range(0, len(examples), _CHUNK):
        rendered = []
        for example in examples[start : start + _CHUNK]:
            try:
                rendered.append((example, _render(example, tokenizer, control)))
            except _Dropped as drop:
                events.append((str(drop), example.origin))
        if not rendered:
            continue
        # The template writes BOS itself; the tokenizer must not add another.
        ids = tokenizer(
            [text for _, texts in rendered for text in texts],
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            padding=False,
            truncation=False,
            verbose=False,
        )["input_ids"]
        strings = [_with_one_bos(np.asarray(i, np.int32), control.bos) for i in ids]  # pyright: ignore[reportGeneralTypeIssues] -- a batch gives a list of lists
        for index, (example, _) in enumerate(rendered):
            prompt, chosen, rejected = strings[3 * index : 3 * index + 3]
            yield example, (prompt, chosen, rejected)


def _render(
    example: PreferenceExample, tokenizer: Tokenizer, control: _Control
) -> tuple[str, str, str]:
    """Texts of the prompt with the assistant's header, and of both conversations."""
    eos = str(tokenizer.eos_token)
    # An answer's text may end in EOS, as some data sets write it.
    answers = [
        a.rstrip().removesuffix(eos) if a.rstrip().endswith(eos) else a
        for a in (example.chosen, example.rejected)
    ]
    if any(token in answer for token in control.spelled for answer in answers):
        raise _Dropped(CONTROL_TEXT)
    prompt = list(example.prompt)
    header = _header(prompt, tokenizer, control)
    chosen, rejected = (
        _templated([*prompt, {"role": "assistant", "content": answer}], tokenizer)
        for answer in answers
    )
    return header, chosen, rejected


def _header(
    messages: list[dict[str, str]], tokenizer: Tokenizer, control: _Control
) -> str:
    """Text of a conversation with the assistant's header."""
    texts = [message["content"] for message in messages]
    if any(token in text for token in control.spelled for text in texts):
        raise _Dropped(CONTROL_TEXT)
    return _templated(messages, tokenizer, header=True)


def _templated(
    messages: list[dict[str, str]], tokenizer: Tokenizer, *, header: bool = False
) -> str:
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=header
            )
        )
    except (
        *(jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError),
        *(ArithmeticError, RecursionError),
    ) as e:
        # Templates run in jinja's sandbox, which raises at a way out of it; the rest
        # is what their expressions raise, such as ''.index('a').
        raise _Dropped(f"{REFUSED}: {untrusted.shown(e)}") from e


def _with_one_bos(ids: Ids, bos: int | None) -> Ids:
    """The ids with exactly one BOS in front, or as they are if there is none."""
    if bos is None:
        return ids
    other = np.flatnonzero(ids != bos)
    start = int(other[0]) if len(other) else len(ids)
    return np.concatenate([np.asarray([bos], np.int32), ids[start:]])


def _split(
    example: PreferenceExample, ids: tuple[Ids, Ids, Ids], control: _Control
) -> TokenizedPair:
    """Prompt and answers, parted where the tokens that all three start with end."""
    prompt, *answers = ids
    shared = min(_common_prefix(prompt, answer) for answer in answers)
    # Copies: a view would keep each answer's copy of the prompt in memory.
    chosen, rejected = (
        _until_end(answer[shared:].copy(), control) for answer in answers
    )
    return TokenizedPair(
        prompt=prompt[:shared],
        chosen=chosen,
        rejected=rejected,
        source=example.source,
        id=example.index,
        cut_prompt=False,
        cut_chosen=False,
        cut_rejected=False,
        user=example.user,
    )


def _common_prefix(a: Ids, b: Ids) -> int:
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _until_end(answer: Ids, control: _Control) -> Ids:
    """The answer up to its EOS, else its template's end of turn, else with EOS added.

    Only special tokens and white space at the very end are searched. ChatML writes a
    line feed after its EOS: that is removed.
    """
    tail = len(answer)
    while tail > 0 and control.closes(int(answer[tail - 1])):
        tail -= 1
    rest = [int(token) for token in answer[tail:]]
    ends = [i for i, token in enumerate(rest) if token == control.eos]
    ends += [i for i, token in enumerate(rest) if control.special(token)]
    if ends:
        return answer[: tail + ends[0] + 1]
    return np.append(answer, np.int32(control.eos))


def _mismatch_text(
    example: PreferenceExample, ids: tuple[Ids, Ids, Ids], shared: int
) -> str:
    return (
        f"{example.origin}: with data.prefix_mismatch = 'error' the {len(ids[0])}"
        " tokens of the prompt must start prompt plus answer, got only the first"
        f" {shared}. Use data.prefix_mismatch = 'cut', or a chat template that writes"
        " the prompt alike with and without an answer."
    )


def _require_answers(pair: TokenizedPair) -> None:
    if not len(pair.prompt):
        raise _Dropped(NO_PREFIX)
    # One token is the end of turn alone.
    if min(len(pair.chosen), len(pair.rejected)) < 2:
        raise _Dropped(EMPTY)


def _truncate(
    pair: TokenizedPair,
    *,
    max_length: int,
    max_prompt_length: int,
    truncation: Truncation,
    bos: int | None,
) -> TokenizedPair:
    """The pair within ``max_length``, by the named policy."""
    prompt, longest = pair.prompt, max(len(pair.chosen), len(pair.rejected))
    if len(prompt) + longest > max_length:
        if truncation == "drop":
            raise _Dropped(TOO_LONG)
        if len(prompt) > max_prompt_length:
            first = prompt[:1] if bos is not None else prompt[:0]
            kept = max_prompt_length - len(first)
            prompt = np.concatenate([first, prompt[len(prompt) - kept :]])
        room = max_length - len(prompt)
        if longest > room and truncation == "cut_prompt":
            raise _Dropped(TOO_LONG_CUT)
        if room < 1:
            raise _Dropped(NO_ROOM)
        pair = dataclasses.replace(
            pair,
            prompt=prompt,
            chosen=pair.chosen[:room],
            rejected=pair.rejected[:room],
            cut_prompt=len(prompt) < len(pair.prompt),
            cut_chosen=len(pair.chosen) > room,
            cut_rejected=len(pair.rejected) > room,
        )
    if np.array_equal(pair.chosen, pair.rejected):
        raise _Dropped(SAME_TOKENS)
    return pair


def _require_row(pair: TokenizedPair, *, row_length: int) -> None:
    if len(pair.prompt) > row_length:
        raise _Dropped(PROMPT_OVER_ROW)
    if len(pair.prompt) + len(pair.chosen) + len(pair.rejected) > row_length:
        raise _Dropped(PAIR_OVER_ROW)


def _report(pairs: list[TokenizedPair], drops: Drops, mismatches: int) -> Report:
    prompt = np.asarray([len(pair.prompt) for pair in pairs])
    chosen = np.asarray([len(pair.chosen) for pair in pairs])
    rejected = np.asarray([len(pair.rejected) for pair in pairs])
    strings = {
        (p.prompt.tobytes(), p.chosen.tobytes(), p.rejected.tobytes()) for p in pairs
    }
    lengths = {
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "pair": prompt + chosen + rejected,
    }
    return Report(
        read=len(pairs) + drops.total,
        kept=len(pairs),
        drops=drops,
        cut_prompts=sum(pair.cut_prompt for pair in pairs),
        cut_chosen=sum(pair.cut_chosen for pair in pairs),
        cut_rejected=sum(pair.cut_rejected for pair in pairs),
        prefix_mismatches=mismatches,
        duplicates=len(pairs) - len(strings),
        lengths={name: quantiles(values) for name, values in lengths.items()},
        chosen_longer=float(np.mean(chosen > rejected)),
        same_length=float(np.mean(chosen == rejected)),
        sources=dict(collections.Counter(pair.source for pair in pairs).most_common()),
    )
