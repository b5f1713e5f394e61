"""A system as lm-eval-harness asks models: texts in, numbers and texts out.

How a text becomes tokens follows the harness's own ``hf`` model, so that scores are
comparable. Needs nothing of the harness: ``lm_eval_model.py`` joins the two. Knows
nothing of tasks or metrics.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from lpc_jax.errors import UserError
from lpc_jax.evaluation.scoring import Ids, Request, Scorer
from lpc_jax.files import untrusted
from lpc_jax.generation.answering import Generator
from lpc_jax.generation.sampling import Sampling
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import Steering

# Of an answer, where a task does not say: as the hf model has it.
MAX_NEW_TOKENS = 256
# Prompts answered at a time.
_GENERATED_AT_ONCE = 8

# What a task may call the length of an answer; the first that it sets counts.
_LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens")
_SAMPLING_NAMES = ("until", "do_sample", "temperature", "top_k", "top_p")

Done = Callable[[int], None]


def _ignore(count: int) -> None:
    """For whoever does not want to know of progress."""


class TextModel:
    """Answers a harness's three kinds of request.

    Args:
        system: What is asked.
        steering: How z is chosen from the prior; not read without a latent.
        max_length: Most tokens read at a time; None: the model's context length.
        seed: Of draws of z and of tokens.

    Attributes:
        cut: Requests whose context was cut at its start so far.

    Raises:
        UserError: A ``max_length`` that the model does not have, or a tokenizer with
            neither BOS nor EOS.
    """

    def __init__(
        self,
        system: Policy,
        *,
        steering: Steering,
        max_length: int | None = None,
        seed: int = 0,
    ) -> None:
        longest = system.architecture.context_length
        if max_length is not None and not 2 <= max_length <= longest:
            raise UserError(
                f"--max-length must be from 2 to the model's {longest} positions, got"
                f" {max_length}."
            )
        self.system, self.tokenizer = system, system.tokenizer
        self.max_length = max_length or longest
        self.prefix_token = _prefix_token(system)
        self.cut = 0
        self._steering, self._seed = steering, seed
        self._prefix_text = str(self.tokenizer.decode([self.prefix_token]))

    @functools.cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.system, steering=self._steering, seed=self._seed)

    @functools.cached_property
    def _generator(self) -> Generator:
        # Made where it is needed: it lays the decoder's layers apart.
        return Generator(self.system, batch=_GENERATED_AT_ONCE)

    def encode(self, text: str, *, special: bool | None = None) -> list[int]:
        """A text's ids, as the hf model makes them.

        Args:
            text: Any.
            special: Whether the tokenizer adds its special tokens; None: as it is set
                up to, but no second BOS before a text that starts with one.
        """
        if special is None and text.startswith(self._prefix_text):
            special = False
        options: dict[str, Any] = {"verbose": False}  # what is too long is cut later
        if special is not None:
            options["add_special_tokens"] = special
        return list(self.tokenizer(text, **options)["input_ids"])

    def request(self, context: str, continuation: str) -> Request:
        """A context and its continuation as one request.

        White space at the context's end is scored with the continuation, as the harness
        has it, since it may be part of the continuation's first token. Where it is not,
        as after a chat template's header, it stays of the context for the prior, which
        reads its last token as in training.

        Args:
            context: Read before; empty: BOS, or EOS without one, in its place.
            continuation: What is scored.

        Raises:
            UserError: A continuation of no tokens, or too long for the model.
        """
        if not context:
            scored = self.encode(continuation, special=False)
            first = [self.prefix_token]
            if scored[:1] == first:
                scored = scored[1:]
            return self._fitted(first, scored, 0, continuation)
        kept = context.rstrip()
        whole, read = self.encode(context + continuation), self.encode(kept)
        lead = 0
        if read and kept != context:
            full = self.encode(context)
            if len(read) < len(full) < len(whole) and whole[: len(full)] == full:
                lead, read = len(full) - len(read), full
        scored = whole[len(read) :]
        return self._fitted(read or [self.prefix_token], scored, lead, continuation)

    def _fitted(
        self, context: list[int], scored: list[int], lead: int, text: str
    ) -> Request:
        """Cut at its start to what the model can read."""
        if not scored or len(scored) + lead > self.max_length:
            raise UserError(
                f"a continuation must have 1 to {self.max_length} tokens, got"
                f" {len(scored) + lead}: {untrusted.shown(repr(text))}. Only a context"
                " can be cut: leave the task out, or raise --max-length."
            )
        # The last scored id is not read.
        room = self.max_length + 1 - len(scored)
        self.cut += len(context) > room
        return Request(
            np.asarray(context[-room:], np.int32), np.asarray(scored, np.int32), lead
        )

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], *, done: Done = _ignore
    ) -> list[tuple[float, bool]]:
        """Of each (context, continuation) the log-likelihood, and if it is greedy.

        Args:
            pairs: Texts.
            done: Told how many more requests are answered; likewise below.

        Raises:
            UserError: As ``request``, before anything is computed.
        """
        requests = [self.request(*pair) for pair in pairs]
        scores = self._scorer.score(requests, done=done)
        return [(score.logp, score.greedy) for score in scores]

    def loglikelihood_rolling(
        self, texts: Sequence[str], *, done: Done = _ignore
    ) -> list[float]:
        """Of each text the log-likelihood, in windows where it is long.

        Each window is a request of its own: z comes from the prior at the token before
        the first that the window scores, for a text's first window the prefix token.

        Args:
            texts: Whole.
            done: Told how many more windows are scored.
        """
        windows = [
            (number, window)
            for number, text in enumerate(texts)
            for window in rolling_windows(
                self.encode(text), prefix=self.prefix_token, most=self.max_length
            )
        ]
        scores = self._scorer.score([w for _, w in windows], done=done)
        totals = [0.0] * len(texts)
        for (number, _), score in zip(windows, scores, strict=True):
            totals[number] += score.logp
        return totals

    def generate_until(
        self,
        asked: Sequence[tuple[str, Mapping[str, Any]]],
        *,
        done: Done = _ignore,
    ) -> list[str]:
        """A text after each context, up to the first of its stop strings.

        Args:
            asked: Contexts, each with a task's generation settings.
            done: Told how many more requests are answered.

        Raises:
            UserError: As ``sampling``, before anything is computed.
        """
        groups: dict[tuple[Sampling, tuple[str, ...]], list[int]] = {}
        for number, (_, settings) in enumerate(asked):
            groups.setdefault(self.sampling(settings), []).append(number)
        found = [""] * len(asked)
        for (chosen, stop), numbers in groups.items():
            room = self.max_length - chosen.max_new_tokens
            prompts = {i: self._prompt(asked[i][0], room) for i in numbers}
            numbers.sort(key=lambda i: -len(prompts[i]))
            # In parts, so that progress can be told.
            for start in range(0, len(numbers), _GENERATED_AT_ONCE):
                part = numbers[start : start + _GENERATED_AT_ONCE]
                completions = self._generator.generate(
                    [prompts[i] for i in part],
                    sampling=chosen,
                    steering=self._steering,
                    stop=stop,
                    seed=self._seed + start,
                )
                for number, completion in zip(part, completions, strict=True):
                    found[number] = completion.text
                done(len(part))
        return found

    def _prompt(self, context: str, room: int) -> Ids:
        ids = self.encode(context) or [self.prefix_token]
        self.cut += len(ids) > room
        return np.asarray(ids[-room:], np.int32)

    def sampling(self, settings: Mapping[str, Any]) -> tuple[Sampling, tuple[str, ...]]:
        """A task's generation settings as ours, and its stop strings.

        Raises:
            UserError: A setting that we do not have, or an answer that would take the
                model's whole context.
        """
        unknown = sorted(set(settings) - {*_LENGTH_NAMES, *_SAMPLING_NAMES})
        if unknown:
            raise UserError(
                "a task's generation_kwargs may set"
                f" {', '.join((*_LENGTH_NAMES, *_SAMPLING_NAMES))}, got also"
                f" {', '.join(unknown)}. Leave the task out, or change it."
            )
        lengths = [settings[n] for n in _LENGTH_NAMES if settings.get(n) is not None]
        length = int(lengths[0]) if lengths else MAX_NEW_TOKENS
        if length >= self.max_length:
            raise UserError(
                f"a task asks for answers of {length} tokens, expected less than the"
                f" {self.max_length} that are read at a time. Raise --max-length, or"
                " leave the task out."
            )
        temperature = float(settings.get("temperature") or 0.0)
        samples = settings.get("do_sample")
        if samples and not temperature:
            temperature = 1.0
        until = settings.get("until") or ()
        stop = (until,) if isinstance(until, str) else tuple(until)
        return (
            Sampling(
                max_new_tokens=length,
                temperature=0.0 if samples is False else temperature,
                top_k=settings.get("top_k") or None,
                top_p=float(settings.get("top_p") or 1.0),
            ),
            tuple(text for text in stop if text),
        )

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, str]], *, header: bool
    ) -> str:
        """A conversation as text.

        Args:
            messages: Roles and contents.
            header: Whether the assistant's header follows; else the last message, the
                assistant's own, is left open to go on.

        Raises:
            UserError: The template refuses it.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    tokenize=False,
                    add_generation_prompt=header,
                    continue_final_message=not header,
                )
            )
        except jinja2.TemplateError as error:
            raise UserError(
                "--apply-chat-template: the model's chat template refuses a"
                f" conversation with the roles {', '.join(m['role'] for m in messages)}"
                f" ({untrusted.shown(error)}). Leave out --system-instruction if that"
                " is it, or name another template with model.chat_template."
            ) from error


def rolling_windows(
    tokens: Sequence[int], *, prefix: int, most: int
) -> Iterator[Request]:
    """Windows that score each token once, each with as much context as it can have.

    Args:
        tokens: A text's.
        prefix: The token that stands before the text.
        most: Tokens read at a time. The first window scores so many; each later one
            goes on from there, and the last is as long as the others: what of it was
            scored before is its context.
    """
    text = np.asarray([prefix, *tokens], np.int32)
    scored = 1
    while scored < len(text):
        end = min(scored + most, len(text))
        start = max(end - 1 - most, 0)
        yield Request(text[start:scored], text[scored:end])
        scored = end


def _prefix_token(system: Policy) -> int:
    """What stands before a text without context: BOS, or EOS without one."""
    tokenizer = system.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if isinstance(token, int):
            return token
    raise UserError(
        f"{system.name}: the tokenizer must have a BOS or EOS token to stand before a"
        " text, got neither. Set one in its tokenizer_config.json."
    )
