"""Which prompts call for each code, and which tokens each code raises.

Prior statistics count each prompt once, posterior statistics each pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float

from lpc_jax.data import examples
from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.report import Report
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.evaluation.codes import map as maps
from lpc_jax.evaluation.codes import measures
from lpc_jax.evaluation.codes.measures import Measures
from lpc_jax.runtime import programs, reading
from lpc_jax.runtime.policy import Policy

PROMPTS_SHOWN, TOKENS_SHOWN = 8, 16


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and its number of pairs; in two sources it counts as two prompts."""

    text: str
    source: str
    pairs: int
    code: int  # largest of the prior
    place: tuple[float, float] | None  # on the map of z; None if not drawn


@dataclasses.dataclass(frozen=True)
class Token:
    """A token in printable form; ``logit``: its change less the vocabulary's mean."""

    id: int
    text: str
    logit: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """The tokens whose logits a z raises and lowers most, the largest first."""

    raised: tuple[Token, ...]
    lowered: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """One code: its prior probability over prompts and its effect on the logits."""

    index: int  # row of the codebook
    usage: float  # mean prior probability over prompts
    usage_by_source: dict[str, float]  # the same over each source's prompts
    largest_share: float  # share of prompts whose most probable code it is
    prompts: tuple[tuple[int, float], ...]  # (index, probability), largest first
    effect: Effect
    likeness: float  # cosine of its effect and the average mix's
    own_effect: Effect  # its effect less the average mix's


@dataclasses.dataclass(frozen=True)
class Look:
    """Measures, prompts and effects of a policy's codes on a set of pairs."""

    system: str  # the policy's name
    pairs: str  # name of the data
    pairs_digest: str  # SHA-256 over texts and sources
    report: Report  # what was dropped and cut
    sources: dict[str, int]  # prompts of each, the most first
    prompts: tuple[Prompt, ...]  # in the order of their first pairs
    codes: tuple[Code, ...]  # by index
    average_effect: Effect  # of all codes, weighted by usage
    measures: Measures
    seed: int  # of the shuffled sources and of t-SNE

    @property
    def likeness(self) -> float:
        """Usage-weighted mean of the codes' ``likeness``."""
        return sum(code.usage * code.likeness for code in self.codes)


def look(
    policy: Policy, pairs: str, *, split: str | None, limit: int | None, seed: int
) -> Look:
    """Reads prior, posterior and z of every pair of a policy with codes.

    ``pairs`` is a file or a hub data set with a ``split``, of which the first ``limit``
    rows are read; ``seed`` is of the shuffled sources and of t-SNE.
    """
    texts, drops = examples.read(
        pairs,
        setting="--pairs",
        split=split,
        limit=limit,
        ranked=policy.config.data.ranked,
    )
    rules = pair_data.rules(policy.config.data)
    kept, report = pair_data.tokenize(texts, policy.tokenizer, drops, **rules)
    beliefs = reading.believe(policy, kept)
    by_prompt = _by_prompt(kept)
    first = [places[0] for places in by_prompt]
    by_index = {text.index: text for text in texts}
    prompts = [by_index[kept[i].id] for i in first]
    sources = [text.source for text in prompts]
    prior = measures.softmax(beliefs.prior[first])
    largest = np.argmax(prior, axis=1).tolist()
    on_map = maps.places(beliefs.vector[first], seed=seed)
    codes, average = _codes(policy, prior, sources)
    return Look(
        system=policy.name,
        pairs=pairs,
        pairs_digest=pair_data.digest(texts),
        report=report,
        sources=measures.count_sources(sources),
        prompts=tuple(
            Prompt(_text(prompt), prompt.source, len(places), code, place)
            for prompt, places, code, place in zip(
                prompts, by_prompt, largest, on_map, strict=True
            )
        ),
        codes=codes,
        average_effect=average,
        measures=measures.measure(
            prior, sources, beliefs.prior, beliefs.posterior, seed=seed
        ),
        seed=seed,
    )


def _by_prompt(pairs: Sequence[TokenizedPair]) -> list[list[int]]:
    """Places of the pairs of each prompt of a source, in the order of their first."""
    places: dict[tuple[bytes, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        places.setdefault((pair.prompt.tobytes(), pair.source), []).append(i)
    return list(places.values())


def _text(example: PreferenceExample) -> str:
    """A conversation as text; a single message goes without its role."""
    if len(example.prompt) == 1:
        return example.prompt[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content'] or ''}" for m in example.prompt)


def _codes(
    policy: Policy, prior: Float[np.ndarray, "prompts C"], sources: Sequence[str]
) -> tuple[tuple[Code, ...], Effect]:
    """Every code, and the effect of all by their usage."""
    usage, by_source = prior.mean(axis=0), measures.usage_by_source(prior, sources)
    largest = np.eye(len(usage))[np.argmax(prior, axis=1)].mean(axis=0)
    effects = _effects(policy)
    average = usage @ effects
    lengths = np.linalg.norm(effects, axis=1) * np.linalg.norm(average)
    # 0 where an effect is zero.
    likeness = effects @ average / np.where(lengths > 0, lengths, 1.0)
    codes = tuple(
        Code(
            index=index,
            usage=float(usage[index]),
            usage_by_source={name: float(u[index]) for name, u in by_source.items()},
            largest_share=float(largest[index]),
            prompts=measures.callers(prior[:, index], most=PROMPTS_SHOWN),
            effect=extremes(effect, policy.tokenizer),
            likeness=float(likeness[index]),
            own_effect=extremes(effect - average, policy.tokenizer),
        )
        for index, effect in enumerate(effects)
    )
    return codes, extremes(average, policy.tokenizer)


def _effects(policy: Policy) -> Float[np.ndarray, "C known"]:
    """Each code's effect on the tokenizer's tokens; the head may have more rows."""
    with jax.set_mesh(policy.mesh):
        logits = programs.code_bias(policy.graph, policy.mesh)(policy.whole)
    effects = np.asarray(jax.device_get(logits), np.float64)
    # A constant over the vocabulary cancels in the softmax.
    effects -= effects.mean(axis=-1, keepdims=True)
    # Special tokens stay: a code that raises the turn's end asks for shorter answers.
    return effects[:, : len(policy.tokenizer)]


def extremes(effect: Float[np.ndarray, "known"], tokenizer: Tokenizer) -> Effect:
    """The tokens with the largest and with the smallest effects."""

    def first(order: Float[np.ndarray, "known"]) -> tuple[Token, ...]:
        ids = np.argsort(order, kind="stable")[:TOKENS_SHOWN].tolist()
        texts = [tokenizers.token_text(tokenizer, i) for i in ids]
        return tuple(map(Token, ids, texts, effect[ids].tolist()))

    return Effect(raised=first(-effect), lowered=first(effect))
