"""What a system's codes are: which prompts call for them, which tokens they raise.

Of the prior everything is over prompts, of which each counts once however many pairs
share it: the prior reads nothing else. Of the posterior everything is over pairs.
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
    """A prompt of so many pairs. One of two sources is two prompts.

    Attributes:
        code: The prior's largest code.
        place: On the map of z, or None where it is not on it.
    """

    text: str
    source: str
    pairs: int
    code: int
    place: tuple[float, float] | None


@dataclasses.dataclass(frozen=True)
class Token:
    """A token for a person, and what is added to its logit, less the vocabulary's mean.

    In ``text`` white space and lone bytes are visible.
    """

    id: int
    text: str
    logit: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """The tokens that some z raises and lowers most, the most first."""

    raised: tuple[Token, ...]
    lowered: tuple[Token, ...]


@dataclasses.dataclass(frozen=True)
class Code:
    """One code.

    Attributes:
        index: Its row of the codebook.
        usage: Mean prior probability over prompts.
        usage_by_source: The same over the prompts of each source.
        largest_share: Share of prompts whose largest code it is.
        prompts: Those that call for it most, as their index and its probability.
        effect: What it does to the vocabulary.
        likeness: Cosine of its effect and the average mix's, over the vocabulary.
        own_effect: Its effect less the average mix's: what sets it apart.
    """

    index: int
    usage: float
    usage_by_source: dict[str, float]
    largest_share: float
    prompts: tuple[tuple[int, float], ...]
    effect: Effect
    likeness: float
    own_effect: Effect


@dataclasses.dataclass(frozen=True)
class Look:
    """Everything that is known of the codes of a system on some pairs.

    Attributes:
        pairs_digest: SHA-256 over their texts and sources.
        report: What became of the pairs.
        sources: Prompts of each source, the most first.
        prompts: In the order of their first pairs.
        codes: By index.
        average_effect: Of the mix of all codes, each by its usage. z is this and, by
            how far a prompt's mix departs from it, the codes' own effects.
        seed: Of the random deals and of the map.
    """

    system: str
    pairs: str
    pairs_digest: str
    report: Report
    sources: dict[str, int]
    prompts: tuple[Prompt, ...]
    codes: tuple[Code, ...]
    average_effect: Effect
    measures: Measures
    seed: int

    @property
    def likeness(self) -> float:
        """Cosine of a code's effect and the average mix's, in the mean by usage."""
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
    """Reads prior, posterior and z of every pair, and sums up.

    Args:
        system: With codes.
        rows: The pairs, ``index`` their place in what was read.
        drops: What reading left out.
        pairs: Their name.
        seed: Of the random deals and of the map.
        on_progress: Told how many pairs were read.

    Raises:
        UserError: scikit-learn is not installed, no pair can be had in the system's
            tokens, or it believes something that is not finite.
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
    """Every code, and the effect of the average mix."""
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
    """A conversation for a person: one message alone without its role."""
    if len(example.prompt) == 1:
        return example.prompt[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in example.prompt)


def unique_prompts(pairs: Sequence[TokenizedPair]) -> tuple[list[int], list[int]]:
    """The first pair of each prompt of a source, and how many pairs share it."""
    places: dict[tuple[bytes, str], list[int]] = {}
    for i, pair in enumerate(pairs):
        places.setdefault((pair.prompt.tobytes(), pair.source), []).append(i)
    return [at[0] for at in places.values()], [len(at) for at in places.values()]


@jax.jit
def token_effects(
    codebook: Float[Array, "C D"], head: Float[Array, "V D"]
) -> Float[Array, "C V"]:
    """What all weight on a code adds to each token's logit, less the mean over tokens.

    LMHead(h + e_k) = LMHead(h) + LMHead(e_k) (LPC eq. 10). A constant over the
    vocabulary changes nothing under the softmax, so that each code's mean is taken out.
    """
    logits = jnp.einsum("CD,VD->CV", codebook, head, precision="highest")
    return logits - jnp.mean(logits, axis=-1, keepdims=True)


def _effects(system: Policy) -> Float[np.ndarray, "C known"]:
    """``token_effects`` of the tokens that the tokenizer knows; the head may have more.

    Special tokens stay: a code that raises the turn's end asks for shorter answers.
    """
    with jax.set_mesh(system.mesh):
        network = system.network
        assert network.latent is not None
        codebook = network.latent.codebook[...]
        effects = token_effects(codebook, network.decoder.head_weight)
    known = len(system.tokenizer)
    return np.asarray(jax.device_get(effects), np.float64)[:, :known]


def cosine(a: Float[np.ndarray, "known"], b: Float[np.ndarray, "known"]) -> float:
    """Of the angle between two effects; 0 where either is none."""
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
