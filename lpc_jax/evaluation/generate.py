"""Answers to prompts, token by token, under z of each prompt.

z is chosen once, at the prompt's end, and added before the head at every position of
the answer, as in training (Gong et al. 2025, eq. 10). Knows nothing of conversations or
files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Int32

from lpc_jax import axes
from lpc_jax.data import chat
from lpc_jax.errors import UserError
from lpc_jax.evaluation.steering import Steering
from lpc_jax.evaluation.system import System
from lpc_jax.files import untrusted
from lpc_jax.models.cached import Cache, CachedDecoder
from lpc_jax.models.latent import LatentHead
from lpc_jax.types import HostOrDevice

Ids = Int32[np.ndarray, "_"]
# NumPy's as the host has it, JAX's inside jit.
Scalar = np.float32 | Array

# Tokens of a prompt that are read at a time; a prompt is padded to a multiple of the
# last.
_CHUNKS = (256, 32)
# Tokens between two looks at what was written, for stop strings.
_LOOK = 32
# Slots of the cache are a multiple of it, so that few programs serve all lengths.
_SLOTS = 128

_GENERATION_CONFIG = "generation_config.json"
_LARGEST_CONFIG = 1 << 20

# What a cut UTF-8 character is decoded to.
_UNFINISHED = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Most tokens of an answer, its end included.
        temperature: Logits are divided by it; 0 takes the largest (greedy).
        top_k: Only so many of the likeliest tokens; None: all.
        top_p: Only the likeliest tokens that together have this probability (Holtzman
            et al. 2020), after top_k; 1: all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Refuses values that mean nothing.

        Raises:
            UserError: Naming the flag.
        """
        for name, holds, expected in (
            ("max-new-tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top-k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top-p", 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not holds:
                got = getattr(self, name.replace("-", "_"))
                raise UserError(f"--{name} must be {expected}, got {got:g}.")


@dataclasses.dataclass(frozen=True)
class Completion:
    """One answer.

    Attributes:
        tokens: Ids, without the token that ended it.
        text: Decoded, without special tokens; ends before a stop string.
        reason: ``end``: the model ended it; ``stop``: a stop string; ``length``:
            ``max_new_tokens``; ``context``: the model's context is full.
        prior: The prior's probability of each code, or None without a latent.
        weights: Of the codes in z, likewise.
    """

    tokens: Ids
    text: str
    reason: str
    prior: Float[np.ndarray, "C"] | None
    weights: Float[np.ndarray, "C"] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """Answers that are being written.

    Attributes:
        cache: Of prompts and answers.
        first: The slot of each row's first token.
        slot: Of the token to be read next.
        tokens: Written so far.
        count: How many.
        done: Which rows have ended.
        vector: z of each row, or None.
        keys: A row's own randomness.
    """

    cache: Cache
    first: Int[Array, "R"]
    slot: Int[Array, ""]
    tokens: Int[Array, "R T"]
    count: Int[Array, ""]
    done: Bool[HostOrDevice, "R"]
    vector: Float[Array, "R D"] | None
    keys: Any


class Generator:
    """Writes answers with one system.

    Args:
        system: Its decoder's layers are laid apart, which takes their memory once more.
        batch: Most prompts that are answered at a time.

    Attributes:
        system: As given.
        ends: Tokens that end an answer; from ``end_tokens``.
    """

    def __init__(self, system: System, *, batch: int) -> None:
        self.system, self._batch = system, batch
        with jax.set_mesh(system.mesh):
            self._graph, self._params = _laid_apart(system.graph, system.params)
        self.ends = end_tokens(system)

    def require_room(self, prompts: Sequence[Ids]) -> None:
        """Refuses prompts that leave no room for an answer.

        Raises:
            UserError: Naming the first of them.
        """
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
        """An answer to each prompt, in their order.

        What a prompt is answered depends neither on the batch that it is in nor on the
        other prompts, beyond rounding.

        Args:
            prompts: Token ids, as ``chat.encode_prompt`` gives them.
            sampling: How tokens are chosen.
            steering: How z is chosen; not read without a latent.
            stop: An answer ends before the first of these.
            seed: Of tokens and of draws of z.

        Raises:
            UserError: A prompt that leaves no room.
        """
        self.require_room(prompts)
        found: dict[int, Completion] = {}
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
        for begin in range(0, len(order), self._batch):
            numbers = order[begin : begin + self._batch]
            answers = _Answers(self, numbers, prompts, sampling, steering, stop, seed)
            while not answers.ended:
                answers.write(_LOOK)
            found |= dict(zip(numbers, answers.completions(), strict=True))
        return [found[i] for i in range(len(prompts))]

    def stream(
        self,
        prompt: Ids,
        *,
        sampling: Sampling,
        steering: Steering,
        stop: Sequence[str] = (),
        seed: int = 0,
        every: int = 1,
    ) -> Iterator[Completion]:
        """The answer to one prompt as it grows, last of all whole.

        Args:
            prompt: Token ids.
            sampling: How tokens are chosen.
            steering: How z is chosen.
            stop: The answer ends before the first of these.
            seed: Of tokens and of a draw of z.
            every: Tokens between two looks.

        Yields:
            Completions whose text each begins with the one before; ``reason`` is empty
            but for the last.
        """
        self.require_room([prompt])
        answers = _Answers(self, [0], [prompt], sampling, steering, stop, seed)
        yield from answers.completions()
        while not answers.ended:
            answers.write(every)
            yield from answers.completions()


def _laid_apart(graph: Any, params: Any) -> tuple[Any, Any]:
    """Decoder and latent for ``nnx.merge``, the decoder's layers apart."""

    def make(params: Any) -> tuple[CachedDecoder, LatentHead | None]:
        network = nnx.merge(graph, params)
        return CachedDecoder(network.decoder), network.latent

    apart, _ = nnx.split(nnx.eval_shape(make, params))
    return apart, jax.jit(lambda params: nnx.split(make(params))[1])(params)


class _Answers:
    """The answers to one batch of prompts."""

    def __init__(
        self,
        generator: Generator,
        numbers: Sequence[int],
        prompts: Sequence[Ids],
        sampling: Sampling,
        steering: Steering,
        stop: Sequence[str],
        seed: int,
    ) -> None:
        self._generator, self._stop = generator, tuple(stop)
        self._tokenizer = generator.system.tokenizer
        chosen = [prompts[i] for i in numbers]
        context = generator.system.architecture.context_length
        # A whole batch may write only as much as its longest prompt leaves room for.
        self._most = [min(sampling.max_new_tokens, context - len(p)) for p in chosen]
        self._asked = sampling.max_new_tokens
        self._limit = max(self._most)
        rows = min(generator._batch, len(prompts))
        padded = _round_up(max(map(len, chosen)), _CHUNKS[-1])
        tokens = np.zeros((rows, padded), np.int32)
        first = np.full(rows, padded - 1, np.int32)  # of a row without a prompt
        for row, prompt in enumerate(chosen):
            first[row] = padded - len(prompt)
            tokens[row, first[row] :] = prompt
        self._rows = [_Row() for _ in chosen]
        picking = _Picking(
            greedy=sampling.temperature == 0,
            top_k=sampling.top_k,
            nucleus=sampling.top_p < 1,
            ends=generator.ends,
        )
        # NumPy's: every process of several hands in the same.
        self._scales = (
            np.float32(sampling.temperature or 1.0),
            np.float32(sampling.top_p),
        )
        ids = np.zeros(rows, np.int32)
        ids[: len(chosen)] = numbers
        with jax.set_mesh(generator.system.mesh):
            self._state, prior, weights = _begin(
                generator,
                tokens,
                first,
                np.uint32(seed),
                ids,
                len(chosen),
                self._limit,
                steering,
                picking,
                self._scales,
            )
        self._picking = picking
        self._prior, self._weights = (
            None if x is None else np.asarray(jax.device_get(x))
            for x in (prior, weights)
        )
        self._look()

    @property
    def ended(self) -> bool:
        """Whether every answer is whole."""
        return all(row.reason for row in self._rows)

    def write(self, count: int) -> None:
        """Adds up to so many tokens to each answer."""
        generator = self._generator
        limit = min(int(self._state.count) + count, self._limit)
        with jax.set_mesh(generator.system.mesh):
            self._state = _write(
                generator._graph,
                generator._params,
                self._state,
                np.int32(limit),
                self._scales,
                picking=self._picking,
            )
        self._look()

    def _look(self) -> None:
        """Reads what was written and ends what has come to an end."""
        tokens, count, done = jax.device_get(
            (self._state.tokens, self._state.count, self._state.done)
        )
        done = np.array(done)
        for number, row in enumerate(self._rows):
            if row.reason:
                continue
            written = tokens[number, : min(int(count), self._most[number])]
            ends = np.flatnonzero(np.isin(written, self._generator.ends))
            if len(ends):
                row.tokens, row.reason = written[: ends[0]], "end"
            else:
                row.tokens = written
                if len(written) == self._most[number]:
                    short = self._most[number] < self._asked
                    row.reason = "context" if short else "length"
            row.text = str(self._tokenizer.decode(row.tokens, skip_special_tokens=True))
            found = [row.text.find(s) for s in self._stop if s in row.text]
            if found:
                row.text, row.reason = row.text[: min(found)], "stop"
            done[number] |= bool(row.reason)
        self._state = dataclasses.replace(self._state, done=done)

    def completions(self) -> list[Completion]:
        """The answers so far; what may not stay in a text is held back from it."""
        return [
            Completion(
                tokens=np.asarray(row.tokens, np.int32),
                text=row.text if row.reason else self._settled(row.text),
                reason=row.reason,
                prior=None if self._prior is None else self._prior[number],
                weights=None if self._weights is None else self._weights[number],
            )
            for number, row in enumerate(self._rows)
        ]

    def _settled(self, text: str) -> str:
        """Without half a character, or what may become a stop string, at its end."""
        text = text.rstrip(_UNFINISHED)
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    text = text[:-length]
                    break
        return text


@dataclasses.dataclass
class _Row:
    """How far one answer is; without a reason it goes on."""

    tokens: Any = ()
    text: str = ""
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class _Picking:
    """What of the choice of tokens is compiled in."""

    greedy: bool
    top_k: int | None
    nucleus: bool
    ends: tuple[int, ...]


def _begin(
    generator: Generator,
    tokens: Int[np.ndarray, "R T"],
    first: Int[np.ndarray, "R"],
    seed: Any,
    ids: Int[np.ndarray, "R"],
    used: int,
    limit: int,
    steering: Steering,
    picking: _Picking,
    scales: tuple[Scalar, Scalar],
) -> tuple[_State, Array | None, Array | None]:
    """Reads the prompts, chooses z and the first token."""
    graph, params = generator._graph, generator._params
    slots = _round_up(tokens.shape[1] + limit, _SLOTS)
    cache = _empty_cache(graph, params, rows=tokens.shape[0], slots=slots)
    start, hidden = 0, None
    while start < tokens.shape[1]:
        left = tokens.shape[1] - start
        length = next(size for size in _CHUNKS if size <= left)
        hidden, cache = _read(
            graph,
            params,
            tokens[:, start : start + length],
            cache,
            np.int32(start),
            first,
        )
        start += length
    assert hidden is not None
    return _choose_z(
        graph,
        params,
        hidden,
        cache,
        first,
        np.int32(tokens.shape[1]),
        np.arange(tokens.shape[0]) >= used,
        seed,
        ids,
        scales,
        limit=_round_up(limit, _SLOTS),
        steering=steering,
        picking=picking,
    )


@functools.partial(jax.jit, static_argnums=0, static_argnames=("rows", "slots"))
def _empty_cache(graph: Any, params: Any, *, rows: int, slots: int) -> Cache:
    decoder, _ = nnx.merge(graph, params)
    return decoder.empty_cache(rows, slots)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _read(
    graph: Any,
    params: Any,
    tokens: Int[Array, "R T"],
    cache: Cache,
    start: Int[Array, ""],
    first: Int[Array, "R"],
) -> tuple[Float[Array, "R D"], Cache]:
    """The last hidden state of the next tokens of all prompts."""
    decoder, _ = nnx.merge(graph, params)
    assert isinstance(decoder, CachedDecoder)
    hidden, cache = decoder(tokens, cache, start=start, first=first)
    return hidden[:, -1], cache


@functools.partial(
    jax.jit,
    static_argnums=0,
    static_argnames=("limit", "steering", "picking"),
    donate_argnums=3,
)
def _choose_z(
    graph: Any,
    params: Any,
    hidden: Float[Array, "R D"],
    cache: Cache,
    first: Int[Array, "R"],
    slot: Int[Array, ""],
    unused: Bool[Array, "R"],
    seed: Any,
    ids: Int[Array, "R"],
    scales: tuple[Scalar, Scalar],
    *,
    limit: int,
    steering: Steering,
    picking: _Picking,
) -> tuple[_State, Float[Array, "R C"] | None, Float[Array, "R C"] | None]:
    decoder, latent = nnx.merge(graph, params)
    keys = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(ids)
    prior = weights = vector = None
    if latent is not None:
        assert isinstance(latent, LatentHead)
        logits = latent.prior(hidden)
        of_z = jax.vmap(lambda key: jax.random.fold_in(key, limit))(keys)
        weights = jax.vmap(steering.weights)(logits, of_z)
        vector = latent.codes(logits, weights).vector
        prior = jax.nn.softmax(logits, axis=-1)
    state = _State(
        cache=cache,
        first=first,
        slot=slot,
        tokens=jnp.zeros((hidden.shape[0], limit), jnp.int32),
        count=jnp.int32(0),
        done=unused,
        vector=vector,
        keys=keys,
    )
    written = _written(decoder, state, hidden, scales, picking)
    return written, _everywhere(prior), _everywhere(weights)


@functools.partial(
    jax.jit, static_argnums=0, static_argnames="picking", donate_argnums=2
)
def _write(
    graph: Any,
    params: Any,
    state: _State,
    limit: Int[Array, ""],
    scales: tuple[Scalar, Scalar],
    *,
    picking: _Picking,
) -> _State:
    """Tokens, until there are ``limit`` of them or every row has ended."""
    decoder, _ = nnx.merge(graph, params)
    assert isinstance(decoder, CachedDecoder)

    def goes_on(state: _State) -> Array:
        return (state.count < limit) & ~jnp.all(state.done)

    def add(state: _State) -> _State:
        last = jax.lax.dynamic_slice_in_dim(state.tokens, state.count - 1, 1, axis=1)
        hidden, cache = decoder(last, state.cache, start=state.slot, first=state.first)
        state = dataclasses.replace(state, cache=cache, slot=state.slot + 1)
        return _written(decoder, state, hidden[:, 0], scales, picking)

    return jax.lax.while_loop(goes_on, add, state)


def _written(
    decoder: CachedDecoder,
    state: _State,
    hidden: Float[Array, "R D"],
    scales: tuple[Scalar, Scalar],
    picking: _Picking,
) -> _State:
    """With one more token in each row: pi(y_t | x, y_<t, z) = softmax(head (h + z))."""
    if state.vector is not None:
        hidden = hidden + state.vector.astype(hidden.dtype)
    logits = jnp.einsum(
        "RD,VD->RV",
        hidden,
        decoder.head_weight.astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    logits = axes.constrain(logits, "R V")
    keys = jax.vmap(lambda key: jax.random.fold_in(key, state.count))(state.keys)
    token = _pick(logits, keys, scales, picking)
    token = jnp.where(state.done, picking.ends[0], token)
    ended = jnp.isin(token, jnp.asarray(picking.ends))
    tokens = jax.lax.dynamic_update_slice_in_dim(
        state.tokens, token[:, None], state.count, axis=1
    )
    tokens, count, done = map(
        _everywhere, (tokens, state.count + 1, state.done | ended)
    )
    return dataclasses.replace(state, tokens=tokens, count=count, done=done)


def _everywhere(x: Any) -> Any:
    """Whole on every device, so that every process can read it."""
    if x is None or jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())


def _pick(
    logits: Float[Array, "R V"],
    keys: Any,
    scales: tuple[Scalar, Scalar],
    picking: _Picking,
) -> Int[Array, "R"]:
    if picking.greedy:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    temperature, top_p = scales
    kept = keep_likeliest(
        logits / temperature,
        top_k=picking.top_k,
        top_p=top_p if picking.nucleus else None,
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)


def keep_likeliest(
    logits: Float[Array, "R V"],
    *,
    top_k: int | None,
    top_p: float | Scalar | None,
) -> Float[Array, "R V"]:
    """Logits with all but the likeliest tokens at minus infinity.

    Args:
        logits: Divided by the temperature.
        top_k: Most tokens to keep; equals of the last are kept too. None: all.
        top_p: Keep the fewest of the likeliest, of those that top_k keeps, that
            together have at least this probability. None: all.
    """
    if top_k is not None and top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p is not None:
        ordered = -jnp.sort(-logits, axis=-1)
        shares = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(shares, axis=-1) - shares
        # The likeliest always stays, whatever rounding makes of its share.
        needed = jnp.where((before < top_p).at[:, 0].set(True), ordered, jnp.inf)
        logits = jnp.where(
            logits < needed.min(axis=-1, keepdims=True), -jnp.inf, logits
        )
    return logits


def end_tokens(system: System) -> tuple[int, ...]:
    """The tokens that end an answer.

    The tokenizer's end of sequence, those that the model's generation config names, and
    with a chat template, what an answer's scored tokens end with in training.

    Raises:
        UserError: There is none, or a generation config that is broken.
    """
    tokenizer = system.tokenizer
    named: list[Any] = [tokenizer.eos_token_id]
    if tokenizer.chat_template:
        named.append(chat.end_of_answer(tokenizer))
    file = None
    if system.source.path.is_dir():
        file = untrusted.own_file(system.source.path, _GENERATION_CONFIG)
    if file is not None:
        try:
            said = untrusted.read_json(file, most=_LARGEST_CONFIG)
        except ValueError as error:
            raise UserError(
                f"{file}: broken JSON ({untrusted.shown(error)}). Download it again."
            ) from error
        ends = said.get("eos_token_id") if isinstance(said, dict) else None
        named += ends if isinstance(ends, list) else [ends]
    vocabulary = system.architecture.vocabulary
    ends = {n for n in named if type(n) is int and 0 <= n < vocabulary}
    if not ends:
        raise UserError(
            f"{system.name} must have a token that ends an answer, got none. Set"
            " eos_token in its tokenizer_config.json."
        )
    return tuple(sorted(ends))


def _round_up(count: int, unit: int) -> int:
    return count + -count % unit
