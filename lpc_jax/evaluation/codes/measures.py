"""Measures of how codes are used, from probabilities, in float64 and in nats."""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, Num
from scipy import special

from lpc_jax.losses import latent as latent_losses
from lpc_jax.metrics import DEAD_SHARE

# Permutations of the sources, and the quantile of them that is `high`.
SHUFFLES, LEVEL = 200, 0.95


@dataclasses.dataclass(frozen=True)
class BesideChance:
    """A measure, with its mean and ``LEVEL`` quantile over shuffled sources."""

    value: float
    mean: float
    high: float


@dataclasses.dataclass(frozen=True)
class Measures:
    """How codes are used; the usage is the prior's mean over prompts."""

    perplexity: float  # exp of the usage's entropy: codes in use
    posterior_perplexity: float  # the same of the mean posterior
    codes_per_prompt: float  # exp of the prior's mean entropy: codes a prompt mixes
    dead: tuple[int, ...]  # with less than DEAD_SHARE of a uniform code's usage
    agreement: float  # share of pairs with one largest code in prior and posterior
    agreement_by_chance: float  # the same if both were independent
    kl: float  # mean KL(posterior || prior) over pairs
    information: BesideChance  # I(largest code; source)
    soft_information: BesideChance  # I(code; source), codes drawn from the prior
    nmi: BesideChance  # of largest code and source


def measure(
    prior: Float[np.ndarray, "prompts C"],
    sources: Sequence[str],
    prior_logits: Float[np.ndarray, "B C"],
    posterior_logits: Float[np.ndarray, "B C"],
    *,
    seed: int,
) -> Measures:
    """All measures: ``prior`` and ``sources`` are of prompts, the logits of pairs."""
    usage, largest = prior.mean(axis=0), np.argmax(prior, axis=1)
    one_hot = np.eye(prior.shape[1])
    beside = functools.partial(beside_chance, sources=sources, seed=seed)
    # The largest code of each pair, and how often each code is it.
    p, q = (np.argmax(logits, axis=1) for logits in (prior_logits, posterior_logits))
    p_share, q_share = (one_hot[codes].mean(axis=0) for codes in (p, q))
    kl = latent_losses.categorical_kl(
        jnp.asarray(posterior_logits), jnp.asarray(prior_logits)
    )
    return Measures(
        perplexity=perplexity(usage),
        posterior_perplexity=perplexity(softmax(posterior_logits).mean(axis=0)),
        codes_per_prompt=float(np.exp(np.mean(entropy(prior)))),
        dead=tuple(np.flatnonzero(usage < DEAD_SHARE / len(usage)).tolist()),
        agreement=float(np.mean(p == q)),
        agreement_by_chance=float(p_share @ q_share),
        kl=float(np.mean(np.asarray(kl, np.float64))),
        information=beside(functools.partial(mutual_information, one_hot[largest])),
        soft_information=beside(functools.partial(mutual_information, prior)),
        nmi=beside(functools.partial(normalized_mutual_information, largest)),
    )


def softmax(logits: Float[np.ndarray, "B C"]) -> Float[np.ndarray, "B C"]:
    """Probabilities in float64."""
    return special.softmax(logits.astype(np.float64), axis=1)


def perplexity(usage: Float[np.ndarray, "C"]) -> float:
    """exp of the entropy: ``losses.latent.usage_perplexity``, in float64."""
    return float(np.exp(entropy(usage)))


def entropy(weights: Num[np.ndarray, "*B C"]) -> Any:
    """Entropies [*B] in nats of weights, or counts, that are made to sum to 1."""
    # Not scipy.stats.entropy: that module takes 0.4 s to import, in every run.
    return special.entr(weights / weights.sum(axis=-1, keepdims=True)).sum(axis=-1)


def count_sources(sources: Sequence[str]) -> dict[str, int]:
    """Prompts of each source, the most first, then by name."""
    return dict(collections.Counter(sorted(sources)).most_common())


def usage_by_source(
    prior: Float[np.ndarray, "prompts C"], sources: Sequence[str]
) -> dict[str, Float[np.ndarray, "C"]]:
    """Mean prior probability of each code over the prompts of each source."""
    source = np.asarray(sources)
    return {name: prior[source == name].mean(axis=0) for name in count_sources(sources)}


def callers(
    probability: Float[np.ndarray, "prompts"], *, most: int
) -> tuple[tuple[int, float], ...]:
    """Index and probability of the ``most`` prompts that give a code most."""
    first = np.argsort(-probability, kind="stable")[:most]
    return tuple((int(i), float(probability[i])) for i in first)


def mutual_information(
    weights: Float[np.ndarray, "prompts C"],
    sources: Sequence[str] | Int[np.ndarray, "prompts"],
) -> float:
    """I(code; source) = sum_{k,s} p(k, s) log (p(k, s) / (p(k) p(s))).

    p(k, s) is the mean over all prompts of code k's weight, 0 outside source s;
    ``weights`` are probabilities of codes: one-hot, or the prior's.
    """
    _, source = np.unique(sources, return_inverse=True)
    joint = np.eye(source.max() + 1)[source].T @ weights / len(weights)
    independent = np.outer(joint.sum(axis=1), joint.sum(axis=0))
    return float(special.rel_entr(joint, independent).sum())


def normalized_mutual_information(
    codes: Sequence[int] | Int[np.ndarray, "B"],
    sources: Sequence[str] | Int[np.ndarray, "B"],
) -> float:
    """I(code; source) / sqrt(H(code) H(source)) (Strehl & Ghosh 2002, eq. 3).

    From 0 (independent) to 1 (each determines the other); 0 where either is constant.
    """
    counts = (np.unique(x, return_counts=True)[1] for x in (codes, sources))
    bound = float(np.sqrt(np.prod([entropy(of_each) for of_each in counts])))
    one_code = np.eye(max(codes) + 1)[np.asarray(codes)]
    return mutual_information(one_code, sources) / bound if bound > 0 else 0.0


def beside_chance(
    measure: Callable[[Int[np.ndarray, "prompts"]], float],
    *,
    sources: Sequence[str],
    seed: int,
) -> BesideChance:
    """``measure`` of the sources' numbers, and of ``SHUFFLES`` shuffles of them."""
    rng = np.random.default_rng(seed)
    _, source = np.unique(sources, return_inverse=True)
    # With few prompts codes tell sources apart by accident: information is above 0 even
    # where they are independent.
    by_chance = [measure(rng.permutation(source)) for _ in range(SHUFFLES)]
    mean, high = np.mean(by_chance), np.quantile(by_chance, LEVEL)
    return BesideChance(measure(source), float(mean), float(high))
