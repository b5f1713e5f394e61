"""What a system's codes are: which prompts call for them, which tokens they raise.

Of the prior everything is over prompts, of which each counts once however many pairs
share it: the prior reads nothing else. Of the posterior everything is over pairs.
Knows nothing of losses, and nothing of how a report looks.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops, Report
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.evaluation import code_measures as measures
from lpc_jax.evaluation.code_measures import Measures
from lpc_jax.runtime import reading, steering
from lpc_jax.runtime.policy import Policy

PROMPTS_SHOWN, TOKENS_SHOWN = 8, 16

# t-SNE takes a minute for so many prompts; a picture shows no more of them apart.
MAPPED = 3000
# van der Maaten & Hinton 2008, section 2, call 5 to 50 typical; scikit-learn's default.
_NEIGHBOURS = 30.0
# Fewer points have no neighbourhoods to keep.
FEWEST_MAPPED = 5


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of some pairs.

    Attributes:
        text: The conversation.
        source: Where it comes from. A prompt of two sources is two prompts.
        pairs: How many pairs share it.
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
    """A token whose logit z changes.

    Attributes:
        id: Of the vocabulary.
        text: For a person: white space and lone bytes are visible.
        logit: What is added to its logit, less the mean over the vocabulary.
    """

    id: int
    text: str
    logit: float


@dataclasses.dataclass(frozen=True)
class Effect:
    """What some z does to the vocabulary.

    Attributes:
        raised: Tokens that it raises most, the most first.
        lowered: Tokens that it lowers most, the most first.
    """

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
    """Everything that is known of the codes.

    Attributes:
        system: Its name.
        pairs: Name of the pairs.
        pairs_digest: SHA-256 over their texts and sources.
        report: What became of the pairs.
        sources: Prompts of each source, the most first.
        prompts: In the order of their first pairs.
        codes: By index.
        average_effect: Of the mix of all codes, each by its usage. z is this and, by
            how far a prompt's mix departs from it, the codes' own effects.
        measures: Of how the codes are used.
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
    some: Sequence[PreferenceExample],
    drops: Drops,
    *,
    pairs: str,
    seed: int,
    on_progress: Callable[[int], None],
) -> Look:
    """Reads prior, posterior and z of every pair, and sums up.

    Args:
        system: With codes.
        some: The pairs, ``index`` their place in what was read.
        drops: What reading left out.
        pairs: What the pairs are, for a person.
        seed: Of the random deals and of the map.
        on_progress: Told how many pairs were read.

    Raises:
        UserError: The system has no codes, scikit-learn is not installed, no pair can
            be had in the system's tokens, or it believes something that is not finite.
    """
    num_codes = None if system.latent is None else system.latent.num_codes
    steering.require_codes(num_codes, "--codes", system.name)
    require_map()
    kept, report = pair_data.tokenize(
        some, system.tokenizer, drops, **pair_data.rules(system.config.data)
    )
    beliefs = reading.believe(system, kept, on_progress=on_progress)
    first, counts = unique_prompts(kept)
    by_index = {example.index: example for example in some}
    asked = [by_index[kept[i].id] for i in first]
    sources = [example.source for example in asked]
    prior = measures.softmax(beliefs.prior[first])
    largest = np.argmax(prior, axis=1).tolist()
    places = _places(beliefs.vector[first], seed=seed)
    codes, average = _codes(system, prior, sources)
    return Look(
        system=system.name,
        pairs=pairs,
        pairs_digest=pair_data.digest(some),
        report=report,
        sources=measures.count_sources(sources),
        prompts=tuple(
            Prompt(prompt_text(example), example.source, pairs_of_it, code, place)
            for example, pairs_of_it, code, place in zip(
                asked, counts, largest, places, strict=True
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
                name: float(shares[index]) for name, shares in by_source.items()
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
    """``token_effects`` of all tokens that the tokenizer knows.

    The head may have more rows. Special tokens stay: a code that raises the end of the
    turn asks for shorter answers.
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

    def first(order: Int[np.ndarray, "known"]) -> tuple[Token, ...]:
        return tuple(
            Token(i, tokenizers.token_text(tokenizer, i), float(effect[i]))
            for i in order[:TOKENS_SHOWN].tolist()
        )

    return Effect(
        first(np.argsort(-effect, kind="stable")),
        first(np.argsort(effect, kind="stable")),
    )


def require_map() -> Any:
    """scikit-learn's manifold module.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module("sklearn.manifold")
    except ModuleNotFoundError as error:
        raise UserError(
            "--codes needs the package 'scikit-learn' for its map of z, which is not"
            " installed. Run: pip install 'lpc-jax[eval]'."
        ) from error


def neighbours(points: int) -> float:
    """t-SNE's perplexity: of few points it is a third, more make no neighbourhood."""
    return min(_NEIGHBOURS, (points - 1) / 3)


def draw_map(
    vectors: Float[np.ndarray, "prompts D"], *, seed: int
) -> Float[np.ndarray, "prompts 2"] | None:
    """A plane where like z lie near each other: t-SNE (van der Maaten & Hinton 2008).

    Args:
        vectors: z of each prompt.
        seed: Of its start.

    Returns:
        Places, or None where there are too few prompts, or all have one z.
    """
    centred = vectors.astype(np.float64) - vectors.mean(axis=0, dtype=np.float64)
    spread = centred.std()
    if len(vectors) < FEWEST_MAPPED or spread < 1e-6 * np.abs(vectors).max():
        return None
    sne = require_map().TSNE(
        perplexity=neighbours(len(vectors)),
        init="pca" if vectors.shape[1] > 1 else "random",
        random_state=seed,
    )
    # One thread: more make the sums' order, hence the map, depend on the machine, and
    # wait for each other in a thousand short steps.
    with importlib.import_module("threadpoolctl").threadpool_limits(1):
        # At unit scale: the search for each point's bandwidth starts at 1.
        return np.asarray(sne.fit_transform(centred / spread), np.float64)


def _places(
    vectors: Float[np.ndarray, "prompts D"], *, seed: int
) -> list[tuple[float, float] | None]:
    """Each prompt's place on the map; of very many prompts a random part has one."""
    places: list[tuple[float, float] | None] = [None] * len(vectors)
    some = np.arange(len(vectors))
    if len(vectors) > MAPPED:
        rng = np.random.default_rng(seed)
        some = np.sort(rng.choice(len(vectors), MAPPED, replace=False))
    drawn = draw_map(vectors[some], seed=seed)
    if drawn is not None:
        for i, (x, y) in zip(some.tolist(), drawn.tolist(), strict=True):
            places[i] = (x, y)
    return places
