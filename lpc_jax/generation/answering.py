"""Answers to prompts, each under its own z: batches, streams and stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jaxtyping import Float

from lpc_jax.errors import UserError
from lpc_jax.generation import decode
from lpc_jax.generation.decode import Ids
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import ends
from lpc_jax.runtime.policy import Policy

# Tokens between two checks for stop strings.
_LOOK = 32
# What an incomplete UTF-8 character decodes to.
_UNFINISHED = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Completion:
    """An answer, finished or being written."""

    tokens: Ids  # without the one that ended it
    text: str  # without special tokens, and up to a stop string
    reason: str  # end, stop, length or context (full); empty while written
    prior: Float[np.ndarray, "C"] | None  # probabilities; None without a latent
    weights: Float[np.ndarray, "C"] | None  # of the codes in z, likewise


class Generator:
    """Writes answers to ``batch`` prompts at a time; copies the decoder's layers."""

    def __init__(self, system: Policy, *, batch: int) -> None:
        self.system, self._batch = system, batch
        with jax.set_mesh(system.mesh):
            self._graph, self._params = decode.lay_apart(system.graph, system.params)
        self.ends = ends.end_tokens(system)

    def require_room(self, prompts: Sequence[Ids]) -> None:
        """Raises ``UserError`` for a prompt that leaves no room for an answer."""
        longest = self.system.architecture.context_length - 1
        for number, prompt in enumerate(prompts, start=1):
            if not 0 < len(prompt) <= longest:
                raise UserError(
                    f"prompt {number} must have 1 to {longest} tokens, as the model's"
                    f" context has {longest + 1}, got {len(prompt)}. Shorten it."
                )

    def generate(
        self,
        prompts: Sequence[Ids],
        *,
        sampling: Sampling,
        steering: Steering,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[Completion]:
        """An answer to each prompt, whatever the other prompts are, beyond rounding.

        Args:
            prompts: Token ids, as ``chat.encode_prompt`` gives them.
            sampling: How tokens are chosen.
            steering: How z is chosen; not read without a latent.
            stop: An answer ends before the first of these.
            seed: Of tokens, with the prompt's number, and of z, with the prompt itself.
        """
        self.require_room(prompts)
        answers: dict[int, Completion] = {}
        # Longest first, so that a batch pads little.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), self._batch):
            numbers = order[begin : begin + self._batch]
            part = {number: prompts[number] for number in numbers}
            rows = min(self._batch, len(prompts))
            growing = self._write(part, rows, sampling, steering, stop, seed, _LOOK)
            for completions in growing:
                answers |= dict(zip(numbers, completions, strict=True))
        return [answers[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Ids,
        *,
        sampling: Sampling,
        steering: Steering,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[Completion]:
        """The growing answer to one prompt; ``reason`` is empty but for the last."""
        self.require_room([prompt])
        growing = self._write({0: prompt}, 1, sampling, steering, stop, seed, 1)
        for (completion,) in growing:
            yield completion

    def _write(
        self,
        prompts: Mapping[int, Ids],
        rows: int,
        sampling: Sampling,
        steering: Steering,
        stop: Sequence[str],
        seed: int,
        every: int,
    ) -> Iterator[list[Completion]]:
        """Yields a batch's answers after ``every`` tokens, the last time complete."""
        wanted = sampling.max_new_tokens
        # A whole batch may write only as much as its longest prompt leaves room for.
        context = self.system.architecture.context_length
        most = [min(wanted, context - len(prompt)) for prompt in prompts.values()]
        full = ["length" if count == wanted else "context" for count in most]
        with jax.set_mesh(self.system.mesh):
            state, *of_z = decode.start(
                self._graph,
                self._params,
                prompts,
                rows=rows,
                limit=max(most),
                seed=seed,
                steering=steering,
                choice=sampling.choice,
                ends=self.ends,
            )
        prior, weights = ([None] * rows if x is None else np.asarray(x) for x in of_z)
        none = np.zeros(0, np.int32)
        answers = [
            Completion(none, "", "", prior[row], weights[row])
            for row in range(len(prompts))
        ]
        while True:
            written = state.tokens, state.count, state.done
            # Copied: `done` is written to below.
            tokens, count, done = map(np.array, jax.device_get(written))
            for row, answer in enumerate(answers):
                if not answer.reason:
                    own = tokens[row, : min(int(count), most[row])]
                    reason = full[row] if len(own) == most[row] else ""
                    answers[row] = self._read(answer, own, stop, reason)
                    done[row] |= bool(answers[row].reason)
            yield list(answers)
            if all(answer.reason for answer in answers):
                return
            state = dataclasses.replace(state, done=done)
            limit = np.int32(min(int(count) + every, max(most)))
            with jax.set_mesh(self.system.mesh):
                state = decode.write(self._graph, self._params, state, limit)

    def _read(
        self, answer: Completion, tokens: Ids, stop: Sequence[str], full: str
    ) -> Completion:
        """``answer`` with all ``tokens``; ``full``: the reason if no more fit."""
        ends = np.flatnonzero(np.isin(tokens, self.ends))
        reason = "end" if len(ends) else full
        tokens = tokens[: ends[0]] if len(ends) else tokens
        tokenizer = self.system.tokenizer
        text = str(tokenizer.decode(tokens, skip_special_tokens=True))
        stops = [text.find(s) for s in stop if s in text]
        if stops:
            text, reason = text[: min(stops)], "stop"
        elif not reason:
            text = _settled(text, stop)
        return dataclasses.replace(answer, tokens=tokens, text=text, reason=reason)


def _settled(text: str, stop: Sequence[str]) -> str:
    """Cuts half a character, or what may become a stop string, from the end."""
    text = text.rstrip(_UNFINISHED)
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), 0, -1):
            if text.endswith(string[:length]):
                text = text[:-length]
                break
    return text
