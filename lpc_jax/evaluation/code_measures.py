"""Measures of how codes are used: probabilities in, numbers out, all in float64.

Knows nothing of systems, tokens or pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lpc_jax import metrics
from lpc_jax.evaluation import preference
from lpc_jax.losses import latent as latent_losses

# How often sources are dealt out at random, and how many of these lie below `high`.
SHUFFLES, LEVEL = 200, 0.95


@dataclasses.dataclass(frozen=True)
class BesideChance:
    """A measure beside what it is where sources are dealt out to prompts at random.

    Attributes:
        value: The measure.
        mean: Its mean over random deals.
        high: What ``LEVEL`` of the deals do not exceed.
    """

    value: float
    mean: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """How codes are used.

    Attributes:
        perplexity: exp of the entropy of the usage: how many codes are in use.
        posterior_perplexity: The same of the mean posterior.
        codes_per_prompt: exp of the mean entropy of the prior: how many codes a prompt
            mixes.
        dead: Codes with less than ``metrics.DEAD_SHARE`` of a uniform code's usage.
        agreement: Share of pairs with one largest code of prior and posterior.
        agreement_by_chance: What it would be if the two had nothing to do with each
            other, each as often as it is.
        kl: Mean KL(posterior || prior) of the pairs, in nats.
        information: I(largest code; source), in nats.
        soft_information: I(code; source) with codes drawn from the prior, in nats.
        nmi: ``preference.normalized_mutual_information`` of largest code and source.
    """

    perplexity: float
    posterior_perplexity: float
    codes_per_prompt: float
    dead: tuple[int, ...]
    agreement: float
    agreement_by_chance: float
    kl: float
    information: BesideChance
    soft_information: BesideChance
    nmi: BesideChance


def measure(
    prior: Float[np.ndarray, "prompts C"],
    sources: Sequence[str],
    prior_logits: Float[np.ndarray, "B C"],
    posterior_logits: Float[np.ndarray, "B C"],
    *,
    seed: int,
) -> Measures:
    """Everything that can be said in one number.

    Args:
        prior: Probabilities, of each prompt once.
        sources: The prompts'.
        prior_logits: Of every pair.
        posterior_logits: Of every pair.
        seed: Of the random deals of sources.
    """
    usage, largest = prior.mean(axis=0), np.argmax(prior, axis=1)
    one_code = np.eye(prior.shape[1])[largest]
    posterior = softmax(posterior_logits)
    agreement, by_chance = agreements(softmax(prior_logits), posterior)
    kl = latent_losses.categorical_kl(
        jnp.asarray(posterior_logits), jnp.asarray(prior_logits)
    )

    def deal(measured: Callable[[Sequence[str]], float]) -> BesideChance:
        return beside_chance(measured, sources=sources, seed=seed)

    return Measures(
        perplexity=perplexity(usage),
        posterior_perplexity=perplexity(posterior.mean(axis=0)),
        codes_per_prompt=float(np.exp(np.mean([entropy(row) for row in prior]))),
        dead=dead_codes(usage),
        agreement=agreement,
        agreement_by_chance=by_chance,
        kl=float(np.mean(np.asarray(kl, np.float64))),
        information=deal(lambda dealt: mutual_information(one_code, dealt)),
        soft_information=deal(lambda dealt: mutual_information(prior, dealt)),
        nmi=deal(
            lambda dealt: preference.normalized_mutual_information(
                largest.tolist(), dealt
            )
        ),
    )


def softmax(logits: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
    """Probabilities in float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def entropy(shares: Float[np.ndarray, "_"]) -> float:
    """Of a categorical, in nats."""
    used = shares[shares > 0]
    return -float(np.sum(used * np.log(used)))


def perplexity(usage: Float[np.ndarray, "C"]) -> float:
    """As ``losses.latent.usage_perplexity``, in float64."""
    return float(np.exp(entropy(usage / usage.sum())))


def dead_codes(usage: Float[np.ndarray, "C"]) -> tuple[int, ...]:
    """Codes with less than ``metrics.DEAD_SHARE`` of a uniform code's usage."""
    least = metrics.DEAD_SHARE / len(usage)
    return tuple(np.flatnonzero(usage / usage.sum() < least).tolist())


def count_sources(sources: Sequence[str]) -> dict[str, int]:
    """How many prompts each source has, the most first, then by name."""
    names, counts = np.unique(sources, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[i]): int(counts[i]) for i in order}


def usage_by_source(
    prior: Float[np.ndarray, "prompts C"], sources: Sequence[str]
) -> dict[str, Float[np.ndarray, "C"]]:
    """Mean prior probability of each code over the prompts of each source."""
    source = np.asarray(sources)
    return {name: prior[source == name].mean(axis=0) for name in count_sources(sources)}


def callers(
    probability: Float[np.ndarray, "prompts"], *, most: int
) -> tuple[tuple[int, float], ...]:
    """The prompts that give a code most, as their index and its probability.

    Args:
        probability: Of the code, for each prompt.
        most: How many prompts.
    """
    first = np.argsort(-probability, kind="stable")[:most]
    return tuple((int(i), float(probability[i])) for i in first)


def agreements(
    prior: Float[np.ndarray, "B C"], posterior: Float[np.ndarray, "B C"]
) -> tuple[float, float]:
    """Share of pairs with one largest code of both, and what chance would give.

    Chance keeps how often each code is the largest of the prior, and of the posterior,
    and takes the two to be independent: sum_k P(prior's is k) P(posterior's is k).
    """
    num_codes = prior.shape[1]
    p, q = np.argmax(prior, axis=1), np.argmax(posterior, axis=1)
    often = [np.bincount(codes, minlength=num_codes) / len(p) for codes in (p, q)]
    return float(np.mean(p == q)), float(often[0] @ often[1])


def mutual_information(
    weights: Float[np.ndarray, "prompts C"], sources: Sequence[str]
) -> float:
    """I(code; source) in nats, between a prompt's code and its source.

    Args:
        weights: With what probability each prompt has which code: all on one, or the
            prior's.
        sources: The prompts' sources.

    Returns:
        sum_{k,s} p(k, s) log (p(k, s) / (p(k) p(s))), with p(k, s) the mean weight of
        code k over all prompts, counting those of source s alone. At least 0, to
        rounding, and at most the smaller of both entropies.
    """
    _, source = np.unique(sources, return_inverse=True)
    belongs = np.eye(source.max() + 1)[source]
    joint = belongs.T @ weights / len(weights)
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    used = joint > 0
    return float(np.sum(joint[used] * np.log(joint[used] / independent[used])))


def beside_chance(
    measure: Callable[[Sequence[str]], float],
    *,
    sources: Sequence[str],
    seed: int,
) -> BesideChance:
    """A measure of sources, and what it says of the same sources shuffled.

    With few prompts a code tells sources apart by accident: information is above 0
    where there is none.

    Args:
        measure: Of one source a prompt.
        sources: The prompts'.
        seed: Of the shuffles.
    """
    rng = np.random.default_rng(seed)

    def shuffled() -> list[int]:
        return rng.permutation(len(sources)).tolist()

    dealt = [measure([sources[i] for i in shuffled()]) for _ in range(SHUFFLES)]
    return BesideChance(
        value=measure(sources),
        mean=float(np.mean(dealt)),
        high=float(np.quantile(dealt, LEVEL)),
    )
