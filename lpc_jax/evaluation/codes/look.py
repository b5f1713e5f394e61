"""Which prompts call for each code, and which tokens each code raises.

Prior statistics count each prompt once, posterior statistics each pair.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops, Report
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.evaluation.codes import map as maps
from lpc_jax.evaluation.codes import measures
from lpc_jax.evaluation.codes.measures import Measures
from lpc_jax.runtime import reading
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
    system: Policy,
    rows: Sequence[PreferenceExample],
    drops: Drops,
    *,
    pairs: str,
    seed: int,
    on_progress: Callable[[int], None],
) -> Look:
    """Reads prior, posterior and z of every pair of a policy with codes.

    ``index`` of a row is its place in what was read; ``pairs`` names the data; ``seed``
    is of the shuffled sources and of t-SNE; ``on_progress`` gets the pairs read.
    """
    rules = pair_data.rules(system.config.data)
    kept, report = pair_data.tokenize(rows, system.tokenizer, drops, **rules)
    beliefs = reading.believe(system, kept, on_progress=on_progress)
    first, counts = unique_prompts(kept)
    by_index = {example.index: example for example in rows}
    prompts = [by_index[kept[i].id] for i in first]
    sources = [example.source for example in prompts]
    prior = measures.softmax(beliefs.prior[first])
    largest = np.argmax(prior, axis=1).tolist()
    places = maps.places(beliefs.vector[first], seed=seed)
    codes, average = _codes(system, prior, sources)
    return Look(
        system=system.name,
        pairs=pairs,
        pairs_digest=pair_data.digest(rows),
        report=report,
        sources=measures.count_sources(sources),
        prompts=tuple(
            Prompt(prompt_text(x), x.source, count, code, place)
            for x, count, code, place in zip(
                prompts, counts, largest, places, strict=True
            )
        ),
        codes=codes,
        average_effect=average,
        measures=measures.measure(
            prior, sources, beliefs.prior, beliefs.posterior, seed=seed
        ),
        seed=seed,
    )


def _codes(
    system: Policy, prior: Float[np.ndarray, "prompts C"], sources: Sequence[str]
) -> tuple[tuple[Code, ...], Effect]:
    usage, by_source = prior.mean(axis=0), measures.usage_by_source(prior, sources)
    often = np.bincount(np.argmax(prior, axis=1), minlength=prior.shape[1])
    effects = _effects(system)
    average = usage @ effects
    codes = tuple(
        Code(
            index=index,
            usage=float(usage[index]),
            usage_by_source={
                n: float(shares[index]) for n, shares in by_source.items()
            },
            largest_share=float(often[index] / len(prior)),
            prompts=measures.callers(prior[:, index], most=PROMPTS_SHOWN),
            effect=extremes(effect, system.tokenizer),
            likeness=cosine(effect, average),
            own_effect=extremes(effect - average, system.tokenizer),
        )
        for index, effect in enumerate(effects)
    )
    return codes, extremes(average, system.tokenizer)


def prompt_text(example: PreferenceExample) -> str:
    """A conversation as text; a single message goes without its role."""
    if len(example.prompt) == 1:
        return example.prompt[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in example.prompt)


def unique_prompts(pairs: Sequence[TokenizedPair]) -> tuple[list[int], list[int]]:
    """Each prompt's first pair, by source, and how many pairs share it."""
    places: dict[tuple[bytes, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        places.setdefault((pair.prompt.tobytes(), pair.source), []).append(i)
    return [at[0] for at in places.values()], [len(at) for at in places.values()]


@jax.jit
def token_effects(
    codebook: Float[Array, "C D"], head: Float[Array, "V D"]
) -> Float[Array, "C V"]:
    """Logits that each code alone adds to every token, less their mean over tokens.

    LMHead(h + e_k) = LMHead(h) + LMHead(e_k) (LPC eq. 10). A constant over the
    vocabulary cancels in the softmax, so each code's mean is taken out.
    """
    logits = jnp.einsum("CD,VD->CV", codebook, head, precision="highest")
    return logits - jnp.mean(logits, axis=-1, keepdims=True)


def _effects(system: Policy) -> Float[np.ndarray, "C known"]:
    """``token_effects`` of the tokenizer's tokens; the head may have more rows."""
    with jax.set_mesh(system.mesh):
        network = system.network
        assert network.latent is not None
        codebook = network.latent.codebook[...]
        effects = token_effects(codebook, network.decoder.head_weight)
    # Special tokens stay: a code that raises the turn's end asks for shorter answers.
    known = len(system.tokenizer)
    return np.asarray(jax.device_get(effects), np.float64)[:, :known]


def cosine(a: Float[np.ndarray, "known"], b: Float[np.ndarray, "known"]) -> float:
    """Cosine of the angle between two effects; 0 where either is zero."""
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm > 0 else 0.0


def extremes(effect: Float[np.ndarray, "known"], tokenizer: Tokenizer) -> Effect:
    """The tokens with the largest and with the smallest effects."""
    orders = (np.argsort(sign * effect, kind="stable") for sign in (-1, 1))
    raised, lowered = (
        tuple(
            Token(i, tokenizers.token_text(tokenizer, i), float(effect[i]))
            for i in order[:TOKENS_SHOWN].tolist()
        )
        for order in orders
    )
    return Effect(raised, lowered)
