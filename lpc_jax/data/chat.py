"""Turns preference pairs into token ids: chat template, tokenizer, common prefix.

The assistant's header belongs to the prompt and is not scored, as in TRL; an answer's
scored tokens end with the token that ends the turn. Lengths alone say what is scored,
so padding may equal EOS.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jinja2
import numpy as np
from jaxtyping import Float

from lpc_jax.data import truncation as truncations
from lpc_jax.data.examples import Dropped, Message, PreferenceExample
from lpc_jax.data.report import Drops, Report, measured
from lpc_jax.data.tokenizer import TEMPLATE_REMEDY, Tokenizer, opens_with_bos
from lpc_jax.data.truncation import Ids, Truncation
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

PrefixMismatch = Literal["cut", "error"]
CONTROL_TEXT = "text spells the BOS or EOS token"
# Examples tokenized at a time: bounds the memory of token lists in Python.
_CHUNK = 1024
# Templates run in jinja's sandbox, which raises at a way out of it; the rest is what
# their expressions raise, such as ''.index('a').
_TEMPLATE_ERRORS = (
    *(jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError),
    *(ArithmeticError, RecursionError),
)


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """Three token strings that share a beginning: prompt, and two answers after it."""

    prompt: Ids  # not scored: BOS if there is one, the turns, the assistant's header
    chosen: Ids  # scored; ends in the end-of-turn token unless it is cut
    rejected: Ids  # likewise
    source: str  # where the prompt comes from, for reports
    id: int  # position in what was read, unique in it
    cut_prompt: bool  # at its start
    cut_chosen: bool  # at its end
    cut_rejected: bool
    user: str = ""  # who judged, where known
    # A frozen decoder's, of the prompt's last token and of both answers' tokens.
    states: Float[np.ndarray, "_ D"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def key(self) -> bytes:
        """SHA-1 digest of the three token strings and their lengths."""
        content = hashlib.sha1(usedforsecurity=False)
        for ids in (self.prompt, self.chosen, self.rejected):
            content.update(len(ids).to_bytes(8, "little"))
            content.update(np.asarray(ids, "<i4").tobytes())
        return content.digest()


class _Encoder:
    """A tokenizer, its chat template, and the control tokens that they write."""

    def __init__(self, tokenizer: Tokenizer) -> None:
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
        self._tokenizer = tokenizer
        # BOS starts every sequence once, where there is one; EOS ends an answer.
        bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self.bos = bos if opens_with_bos(tokenizer) else None
        added = tokenizer.added_tokens_decoder.items()
        self._special = {
            *tokenizer.all_special_ids,
            *(index for index, token in added if token.special),
        }
        named = (tokenizer.bos_token, tokenizer.eos_token)
        self._control_texts = [str(token) for token in named if token is not None]
        self._closes = functools.cache(self._may_close)

    def _may_close(self, token: int) -> bool:
        """Whether a template may write it after an answer: special or white space."""
        return (
            token in self._special or not str(self._tokenizer.decode([token])).strip()
        )

    def _require_plain(self, *texts: str) -> None:
        if any(control in text for text in texts for control in self._control_texts):
            raise Dropped(CONTROL_TEXT)

    def text(self, messages: list[Message], *, header: bool = False) -> str:
        """The templated conversation; ``header`` opens the next answer."""
        if header:
            self._require_plain(*(message["content"] for message in messages))
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=header
                )
            )
        except _TEMPLATE_ERRORS as e:
            reason = f"refused by the chat template: {untrusted.shown(e)}"
            raise Dropped(reason) from e

    def texts(self, example: PreferenceExample) -> list[str]:
        """The templated prompt with the assistant's header, and both conversations."""
        eos = str(self._tokenizer.eos_token)
        # An answer's text may end in EOS, as some data sets write it.
        answers = [
            a.rstrip().removesuffix(eos) if a.rstrip().endswith(eos) else a
            for a in (example.chosen, example.rejected)
        ]
        self._require_plain(*answers)
        prompt = list(example.prompt)
        texts = [self.text(prompt, header=True)]
        turns = [{"role": "assistant", "content": answer} for answer in answers]
        return texts + [self.text([*prompt, turn]) for turn in turns]

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of templated texts, each with exactly one BOS or none."""
        lists = self._tokenizer(
            list(texts),
            add_special_tokens=False,  # the template writes BOS itself
            return_attention_mask=False,
            verbose=False,  # of texts longer than the model's context
        )["input_ids"]
        return [self._with_one_bos(np.asarray(ids, np.int32)) for ids in lists]  # pyright: ignore[reportGeneralTypeIssues] -- a batch gives a list of lists

    def _with_one_bos(self, ids: Ids) -> Ids:
        if self.bos is None:
            return ids
        after_first = np.logical_or.accumulate(ids != self.bos)
        return np.append(np.asarray(self.bos, np.int32), ids[after_first])

    def split(self, prompt: Ids, *answers: Ids) -> tuple[Ids, Ids, Ids]:
        """Prompt and answers, parted where the tokens that all three share end."""
        shared = min(_common_prefix(prompt, answer) for answer in answers)
        # Copies: a view would keep each answer's copy of the prompt in memory.
        chosen, rejected = (self.until_end(a[shared:].copy()) for a in answers)
        return prompt[:shared], chosen, rejected

    def until_end(self, answer: Ids) -> Ids:
        """Up to its EOS, else its template's end of turn, else with EOS added."""
        # Only the closing tokens: ChatML writes a line feed after its EOS.
        tail = len(answer)
        while tail > 0 and self._closes(int(answer[tail - 1])):
            tail -= 1
        closing = answer[tail:].tolist()
        special = (token for token in closing if token in self._special)
        end = self._eos if self._eos in closing else next(special, None)
        if end is None:
            return np.append(answer, np.int32(self._eos))
        return answer[: tail + closing.index(end) + 1]


def tokenize(
    examples: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    drops: Drops,
    **rules: Any,
) -> tuple[list[TokenizedPair], Report]:
    """Tokenizes pairs in order; the report counts those dropped and cut.

    Args:
        drops: Rows that reading left out, for the report.
        **rules: As ``encode`` takes them.

    Raises:
        UserError: As ``encode``, or no pair is left.
    """
    events: list[tuple[str, str]] = []
    encoded = list(encode(examples, tokenizer, events, **rules))
    drops += Drops(events)
    pairs = [pair for pair, _, _ in encoded]
    if not pairs:
        raise none_left(drops)
    return pairs, report_of(pairs, drops, sum(mismatch for _, _, mismatch in encoded))


def none_left(drops: Drops) -> UserError:
    """For pairs of which tokenizing keeps none."""
    return UserError(
        f"No preference pair is left of {drops.total}, expected at least one:"
        f" {'; '.join(drops.lines()) or 'none came in'}. Raise data.max_length and"
        " packing.row_length, choose another data.truncation, or mend the data."
    )


def encode(
    examples: Iterable[PreferenceExample],
    tokenizer: Tokenizer,
    events: list[tuple[str, str]],
    *,
    max_length: int,
    max_prompt_length: int,
    row_length: int | None = None,
    truncation: Truncation,
    prefix_mismatch: PrefixMismatch,
) -> Iterator[tuple[TokenizedPair, PreferenceExample, bool]]:
    """Tokenizes pairs in order, a few at a time; drops go to ``events``.

    Args:
        max_length: Most tokens of prompt plus one answer.
        max_prompt_length: Most prompt tokens once truncation touches a pair.
        row_length: Most tokens of prompt, chosen and rejected together, if any.
        truncation: For a pair over ``max_length``: ``drop`` it; ``cut_prompt`` at its
            start, BOS kept, and drop it if still too long; or after that cut the
            answers' ends, which then have no end-of-turn token.
        prefix_mismatch: When the prompt's tokens are no prefix of prompt plus answer:
            ``cut`` it to the prefix common to both answers, or ``error``.

    Returns:
        Each pair, its text, and whether the prompt was no prefix.

    Raises:
        UserError: A prompt is no prefix under ``error``.
    """
    encoder = _Encoder(tokenizer)
    fit = functools.partial(
        truncations.fit,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        # Both answers share one prompt, so twice the length holds any pair.
        row_length=row_length or 2 * max_length,
        truncation=truncation,
        starts_with_bos=encoder.bos is not None,
    )
    for example, ids in _token_strings(examples, encoder, events):
        whole = encoder.split(*ids)
        mismatch = len(whole[0]) < len(ids[0])
        if mismatch and prefix_mismatch == "error":
            raise UserError(
                f"{example.origin}: prompt plus answer must start with the prompt's"
                f" {len(ids[0])} tokens, got only the first {len(whole[0])}. Use"
                " data.prefix_mismatch = 'cut', or a chat template that writes the"
                " prompt alike with and without an answer."
            )
        try:
            kept = fit(*whole)
        except Dropped as drop:
            events.append((str(drop), example.origin))
            continue
        cuts = (
            len(part) < len(before) for part, before in zip(kept, whole, strict=True)
        )
        about = example.source, example.index
        yield TokenizedPair(*kept, *about, *cuts, user=example.user), example, mismatch


def template_writes(tokenizer: Tokenizer) -> str:
    """A fixed conversation as the chat template writes it now, its date included."""
    try:
        turn = [{"role": "user", "content": "a"}]
        return str(tokenizer.apply_chat_template(turn, tokenize=False))
    except _TEMPLATE_ERRORS as e:
        return f"refused: {e}"


def encode_prompt(messages: Sequence[Message], tokenizer: Tokenizer) -> Ids:
    """A conversation as a prompt's ids; ``UserError`` if the template refuses it."""
    encoder = _Encoder(tokenizer)
    try:
        text = encoder.text([dict(message) for message in messages], header=True)
    except Dropped as drop:
        raise UserError(f"this conversation cannot be a prompt: {drop}.") from drop
    (ids,) = encoder.ids([text])
    return ids


def end_of_answer(tokenizer: Tokenizer) -> int:
    """The token that an answer's scored tokens end with."""
    encoder = _Encoder(tokenizer)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        (ids,) = encoder.ids([encoder.text(turns)])
    except Dropped as drop:
        raise UserError(f"the chat template cannot be used: {drop}.") from drop
    return int(encoder.until_end(ids)[-1])


def _token_strings(
    examples: Iterable[PreferenceExample],
    encoder: _Encoder,
    events: list[tuple[str, str]],
) -> Iterator[tuple[PreferenceExample, list[Ids]]]:
    """Ids of the prompt and of prompt plus either answer; drops go to ``events``."""
    every = iter(examples)
    while part := list(itertools.islice(every, _CHUNK)):
        kept, texts = [], []
        for example in part:
            try:
                texts += encoder.texts(example)
            except Dropped as drop:
                events.append((str(drop), example.origin))
            else:
                kept.append(example)
        ids = encoder.ids(texts) if texts else []
        for index, example in enumerate(kept):
            yield example, ids[3 * index : 3 * index + 3]


def _common_prefix(a: Ids, b: Ids) -> int:
    shorter = min(len(a), len(b))
    return int(np.logical_and.accumulate(a[:shorter] == b[:shorter]).sum())


def report_of(pairs: Sequence[TokenizedPair], drops: Drops, mismatches: int) -> Report:
    """The report of these pairs."""
    cuts = [(p.cut_prompt, p.cut_chosen, p.cut_rejected) for p in pairs]
    return measured(
        np.asarray([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]),
        cuts=np.asarray(cuts),
        different=len({pair.key() for pair in pairs}),
        sources=[pair.source for pair in pairs],
        drops=drops,
        mismatches=mismatches,
    )
