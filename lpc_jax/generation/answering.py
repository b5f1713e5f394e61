"""Answers to prompts, each under its own z: batches, streams and stop strings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lpc_jax.errors import UserError
from lpc_jax.generation import decode
from lpc_jax.generation.decode import Ids, State
from lpc_jax.generation.sampling import Sampling
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import draws, ends
from lpc_jax.runtime.policy import Policy

# Tokens of a prompt read at a time; prompts are padded to a multiple of the last.
_CHUNKS = (256, 32)
# Slots of the cache are a multiple of it, so that few programs serve all lengths.
_SLOTS = 128
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

    def __init__(self, policy: Policy, *, batch: int) -> None:
        self.policy, self._batch = policy, batch
        with jax.set_mesh(policy.mesh):
            self._graph, self._params = decode.lay_apart(policy.graph, policy.params)
        self.ends = ends.end_tokens(policy)

    def require_room(self, prompts: Sequence[Ids]) -> None:
        """Raises ``UserError`` for a prompt that leaves no room for an answer."""
        longest = self.policy.architecture.context_length - 1
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
        rows = min(self._batch, len(prompts))
        # Longest first, so that a batch pads little.
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), self._batch):
            part = {i: prompts[i] for i in order[begin : begin + self._batch]}
            for written in self._write(
                part, rows, _LOOK, sampling, steering, stop=stop, seed=seed
            ):
                answers |= written
        return [answers[i] for i in range(len(prompts))]

    def stream(
        self, prompt: Ids, *, sampling: Sampling, steering: Steering, **options: Any
    ) -> Iterator[Completion]:
        """The growing answer to one prompt, by the arguments of ``generate``."""
        self.require_room([prompt])
        for written in self._write({0: prompt}, 1, 1, sampling, steering, **options):
            yield written[0]

    def _write(
        self,
        prompts: Mapping[int, Ids],
        rows: int,
        every: int,
        sampling: Sampling,
        steering: Steering,
        *,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> Iterator[dict[int, Completion]]:
        """Yields a batch's answers after ``every`` tokens, the last time complete."""
        context = self.policy.architecture.context_length
        most_new = sampling.max_new_tokens
        room = [min(most_new, context - len(prompt)) for prompt in prompts.values()]
        state, *of_z = self._start(prompts, rows, max(room), sampling, steering, seed)
        prior, weights = ([None] * rows if x is None else np.asarray(x) for x in of_z)
        while True:
            written = state.tokens, state.count, state.done
            # Copied: `done` is written to below.
            tokens, count, done = map(np.array, jax.device_get(written))
            answers = {}
            # A finished answer is read again as it was: only ends come after it.
            for row, (number, most) in enumerate(zip(prompts, room, strict=True)):
                full = "length" if most == most_new else "context"
                own = tokens[row, : min(int(count), most)]
                read = self._read(own, stop, full if len(own) == most else "")
                answers[number] = Completion(*read, prior[row], weights[row])
                done[row] |= bool(answers[number].reason)
            yield answers
            if all(answer.reason for answer in answers.values()):
                return
            state = dataclasses.replace(state, done=done)
            limit = np.int32(min(int(count) + every, max(room)))
            with jax.set_mesh(self.policy.mesh):
                state = decode.write(self._graph, self._params, state, limit)

    def _start(
        self,
        prompts: Mapping[int, Ids],
        rows: int,
        most: int,
        sampling: Sampling,
        steering: Steering,
        seed: int,
    ) -> tuple[State, Array | None, Array | None]:
        """Reads prompts into ``rows`` rows, with room for ``most`` tokens of answers.

        Also gives the prior's probabilities and the codes' weights in z [R C].
        """
        unused = rows - len(prompts)  # one token each, of which nothing is kept
        texts = [*prompts.values(), *[np.zeros(1, np.int32)] * unused]
        length = _round_up(max(map(len, texts)), _CHUNKS[-1])
        slots = _round_up(length + most, _SLOTS)
        # Padded on the left, so that all rows grow at one slot.
        first = np.asarray([length - len(text) for text in texts], np.int32)
        context = self.policy.architecture.context_length
        longest = [min(len(text) + sampling.max_new_tokens, context) for text in texts]
        longest = np.asarray(longest, np.int32)
        ids = np.stack([np.pad(text, (length - len(text), 0)) for text in texts])
        network, hidden, at = (self._graph, self._params), None, 0
        with jax.set_mesh(self.policy.mesh):
            # Not a host's array: `read` would be compiled for it and for the device's.
            cache = decode.empty_cache(*network, longest, slots=slots)
            while at < length:
                chunk = ids[:, at : at + next(n for n in _CHUNKS if n <= length - at)]
                cache, hidden = decode.read(*network, cache, chunk, np.int32(at), first)
                at += chunk.shape[1]
            state = State(
                cache=cache,
                first=first,
                slot=np.asarray(length, np.int32),
                # Room for as many tokens as the cache has slots: `most` is no shape.
                tokens=np.zeros((rows, slots), np.int32),
                count=np.asarray(0, np.int32),
                done=np.arange(rows) >= len(prompts),
                choice=sampling.choice,
                ends=self.ends,
            )
            numbers = np.asarray([*prompts, *[0] * unused], np.int32)
            key = np.uint32(seed), numbers, draws.seeds(texts)
            return decode.begin(*network, state, hidden, *key, steering=steering)

    def _read(
        self, tokens: Ids, stop: Sequence[str], reason: str
    ) -> tuple[Ids, str, str]:
        """An answer's tokens before their end, text, and reason; ``""``: may grow."""
        if len(ends := np.flatnonzero(np.isin(tokens, self.ends))):
            tokens, reason = tokens[: ends[0]], "end"
        text = str(self.policy.tokenizer.decode(tokens, skip_special_tokens=True))
        if stops := [text.find(s) for s in stop if s in text]:
            return tokens, text[: min(stops)], "stop"
        return tokens, text if reason else _settled(text, stop), reason


def _settled(text: str, stop: Sequence[str]) -> str:
    """Cuts half a character, or what may become a stop string, from the end."""
    text = text.rstrip(_UNFINISHED)
    begun = (n for s in stop for n in range(1, len(s)) if text.endswith(s[:n]))
    return text[: len(text) - max(begun, default=0)]


def _round_up(count: int, unit: int) -> int:
    return count + -count % unit
