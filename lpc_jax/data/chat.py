"""Turns preference pairs into token ids: chat template, tokenizer, common prefix.

The assistant's header belongs to the prompt and is not scored, as in TRL; an answer's
scored tokens end with the token that ends the turn. Lengths alone say what is scored,
so padding may equal EOS.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jinja2
import numpy as np

from lpc_jax.data import faults, templates
from lpc_jax.data import truncation as truncations
from lpc_jax.data.examples import Dropped, Message, PreferenceExample, strings
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.report import Drops, Report, Tally, measured
from lpc_jax.data.tokenizer import TEMPLATE_REMEDY, Tokenizer, opens_with_bos
from lpc_jax.data.truncation import Ids, Truncation
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted

PrefixMismatch = Literal["cut", "error"]
CONTROL_TEXT = "text spells a control token"
# Examples tokenized at a time: bounds the memory of token lists in Python.
_CHUNK = 1024


class _Encoder:
    """A tokenizer, its chat template, and the control tokens that they write."""

    def __init__(self, tokenizer: Tokenizer, date: str | None = None) -> None:
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
        special = {index: str(token) for index, token in added if token.special}
        self._special = {*tokenizer.all_special_ids, *special}
        texts = map(str, {*tokenizer.all_special_tokens, *special.values()})
        spelled = "|".join(re.escape(text) for text in texts if text.strip())
        self._control_text = re.compile(spelled or "(?!)")
        template = templates.default(tokenizer.chat_template)
        plain = (str(token) for _, token in added if not token.special)
        self._written = [text for text in plain if text.strip() and text in template]
        self.is_plain = templates.is_plain(tokenizer.chat_template)
        self._date = date or templates.today().isoformat()
        self._closes = functools.cache(self._may_close)

    def _may_close(self, token: int) -> bool:
        """Whether a template may write it after an answer: special or white space."""
        return (
            token in self._special or not str(self._tokenizer.decode([token])).strip()
        )

    def _require_plain(self, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        for text in strings([*messages, tools]):
            if self._control_text.search(text):
                raise Dropped(CONTROL_TEXT)

    def text(
        self,
        messages: Sequence[Message],
        *,
        header: bool = False,
        tools: Sequence[Any] = (),
    ) -> str:
        """The templated conversation; ``header`` opens the next answer."""
        text = self._rendered(messages, header, tools)
        if any(message.get("tool_calls") for message in messages):
            objects = templates.with_objects(messages, text)
            text = self._rendered(objects, header, tools)
        return text

    def _rendered(
        self, messages: Sequence[Message], header: bool, tools: Sequence[Any]
    ) -> str:
        own = list(tools) or None
        try:
            template = self._tokenizer.get_chat_template(tools=own)
            if templates.DATE in template:
                template = templates.dated(template, self._date)
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages),
                    tools=own,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=header,
                )
            )
        except (
            *(jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError),
            *(ArithmeticError, RecursionError),
        ) as e:
            # Templates run in jinja's sandbox, which raises at a way out of it; the
            # rest is what their expressions raise, such as ''.index('a').
            reason = f"refused by the chat template: {untrusted.shown(e)}"
            raise Dropped(reason) from e

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Any], notes: list[str]
    ) -> str:
        """The templated prompt with the assistant's header; ``notes`` gets its gaps."""
        self._require_plain(messages, tools)
        text = self.text(messages, header=True, tools=tools)
        notes += templates.require_messages(text, messages)
        if tools and self.text(messages, header=True) == text:
            raise Dropped(f"{templates.NOT_WRITTEN} the tools")
        return text

    def texts(self, example: PreferenceExample, notes: list[str]) -> list[str]:
        """The templated prompt with the assistant's header, and both conversations."""
        eos = str(self._tokenizer.eos_token)
        # An answer's text may end in EOS, as some data sets write it.
        answers = example.answers(
            *(
                a.rstrip().removesuffix(eos) if a.rstrip().endswith(eos) else a
                for a in (example.chosen, example.rejected)
            )
        )
        self._require_plain(answers, ())
        prompt = self.prompt(example.prompt, example.tools, notes)
        whole = [[*example.prompt, answer] for answer in answers]
        texts = [self.text(messages, tools=example.tools) for messages in whole]
        for answer, text, messages in zip(answers, texts, whole, strict=True):
            templates.require_answer(text, answer, prompt)
            templates.require_calls(text, messages)
        notes += self._unread(whole, texts, example.tools)
        contents = list(strings(whole))
        for token in self._written:
            if any(token in content for content in contents):
                notes.append(f"text spells {token}, which the chat template writes too")
        return [prompt, *texts]

    def _unread(
        self, whole: list[list[Message]], texts: list[str], tools: Sequence[Any]
    ) -> Iterator[str]:
        """Notes of messages' fields without which the texts are the same."""
        fields = {name for messages in whole for m in messages for name in m}
        for name in sorted(fields - {"role", "content"}):
            without = [
                [
                    {k: x for k, x in message.items() if k != name}
                    for message in messages
                ]
                for messages in whole
            ]
            try:
                if [self.text(m, tools=tools) for m in without] != texts:
                    continue
            except Dropped:  # it cannot do without
                continue
            if name == "tool_calls":
                raise Dropped(f"{templates.NOT_WRITTEN} tool_calls")
            yield f"not read: {untrusted.shown(name)} of messages"

    def ids(self, texts: Sequence[str]) -> list[Ids]:
        """Token ids of templated texts, each with exactly one BOS or none."""
        if self.is_plain and self.bos is not None:
            # Some tokenizers part text behind a BOS in it otherwise than at a start.
            bos = str(self._tokenizer.bos_token)
            texts = [text.removeprefix(bos) for text in texts]
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
    tally = Tally(list(drops.events))
    for example in examples:
        roles = ", ".join(message["role"] for message in example.prompt)
        tally.meet(example.unread, f"{example.origin}: a prompt of {roles}")
    pairs = [pair for pair, _ in encode(examples, tokenizer, tally, **rules)]
    if not pairs:
        raise none_left(tally)
    cuts = [(p.cut_prompt, p.cut_chosen, p.cut_rejected) for p in pairs]
    return pairs, measured(
        np.asarray([(len(p.prompt), len(p.chosen), len(p.rejected)) for p in pairs]),
        cuts=np.asarray(cuts),
        different=len({pair.key() for pair in pairs}),
        sources=[pair.source for pair in pairs],
        tally=tally,
    )


def none_left(tally: Tally) -> UserError:
    """For pairs of which tokenizing keeps none."""
    drops = Drops(tally.events)
    first = f" First row, {tally.first}." if tally.first else ""
    return UserError(
        f"No preference pair is left of {drops.total}, expected at least one:"
        f" {'; '.join(drops.lines()) or 'none came in'}. Raise data.max_length and"
        " packing.row_length, change data.truncation or model.chat_template, or"
        " mend the data."
        f"{first}"
    )


def encode(
    examples: Iterable[PreferenceExample],
    tokenizer: Tokenizer,
    tally: Tally,
    *,
    max_length: int,
    max_prompt_length: int,
    row_length: int | None = None,
    truncation: Truncation,
    prefix_mismatch: PrefixMismatch,
    date: str | None = None,
) -> Iterator[tuple[TokenizedPair, PreferenceExample]]:
    """Tokenizes pairs in order, a few at a time; drops and notes go to ``tally``.

    Args:
        max_length: Most tokens of prompt plus one answer.
        max_prompt_length: Most prompt tokens once truncation touches a pair.
        row_length: Most tokens of prompt, chosen and rejected together, if any.
        truncation: For a pair over ``max_length``: ``drop`` it; ``cut_prompt`` at its
            start, BOS kept, and drop it if still too long; or after that cut the
            answers' ends, which then have no end-of-turn token.
        prefix_mismatch: When the prompt's tokens are no prefix of prompt plus answer:
            ``cut`` it to the prefix common to both answers, or ``error``.
        date: The day that a template writes as today, ``YYYY-MM-DD``.

    Returns:
        Each pair and its text.

    Raises:
        UserError: A prompt is no prefix under ``error``, or a conversation where text
            is read as it stands.
    """
    encoder, seen = _Encoder(tokenizer, date), set[int]()
    fit = functools.partial(
        truncations.fit,
        max_length=max_length,
        max_prompt_length=max_prompt_length,
        # Both answers share one prompt, so twice the length holds any pair.
        row_length=row_length or 2 * max_length,
        truncation=truncation,
        starts_with_bos=encoder.bos is not None,
    )
    for example, ids in _token_strings(examples, encoder, tally):
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
            tally.events.append((str(drop), example.origin))
            continue
        cuts = (
            len(part) < len(before) for part, before in zip(kept, whole, strict=True)
        )
        about = example.source, example.index
        tally.mismatches += mismatch
        prompt, chosen, rejected = (part.tobytes() for part in kept)
        seen.add(hash((prompt, chosen, rejected)))
        if hash((prompt, rejected, chosen)) in seen:
            tally.notes.append((faults.REVERSED, example.origin))
        yield TokenizedPair(*kept, *about, *cuts, user=example.user), example


def encode_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, tools: Sequence[Any] = ()
) -> Ids:
    """A conversation as a prompt's ids; ``UserError`` if the template refuses it."""
    encoder = _Encoder(tokenizer)
    try:
        text = encoder.prompt([dict(message) for message in messages], tools, notes=[])
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
    tally: Tally,
) -> Iterator[tuple[PreferenceExample, list[Ids]]]:
    """Ids of the prompt and of prompt plus either answer."""
    every = iter(examples)
    while part := list(itertools.islice(every, _CHUNK)):
        kept, texts = [], []
        for example in part:
            if encoder.is_plain and not example.is_text:
                raise UserError(
                    f"{example.origin}: data.template=None reads texts as they stand,"
                    " got messages or a system text. Give prompt, chosen and rejected"
                    ' as texts, or use data.template="chat".'
                )
            known = example.faults
            of_pair = [x for x in known if x != faults.TURNS or not encoder.is_plain]
            try:
                texts += encoder.texts(example, of_pair)
            except Dropped as drop:
                tally.events.append((str(drop), example.origin))
            else:
                kept.append(example)
                notes = dict.fromkeys(of_pair)
                tally.notes += ((note, example.origin) for note in notes)
        ids = encoder.ids(texts) if texts else []
        for index, example in enumerate(kept):
            yield example, ids[3 * index : 3 * index + 3]


def _common_prefix(a: Ids, b: Ids) -> int:
    shorter = min(len(a), len(b))
    return int(np.logical_and.accumulate(a[:shorter] == b[:shorter]).sum())
