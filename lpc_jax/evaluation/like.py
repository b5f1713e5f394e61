"""z from a handful of one reader's judgements.

What LPC can do that no plain loss can: of codes that were learnt from many readers'
pairs, the mix that speaks to the reader who judged these. Knows nothing of who that is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import scipy.special
from jaxtyping import Float

from lpc_jax import config as cfg
from lpc_jax import sources
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops
from lpc_jax.evaluation import pairs
from lpc_jax.evaluation.codes import look
from lpc_jax.evaluation.steering import Steering, require_codes
from lpc_jax.evaluation.system import System

By = Literal["posterior", "bayes"]
BY: tuple[By, ...] = ("posterior", "bayes")


@dataclasses.dataclass(frozen=True)
class Examples:
    """Judged pairs of one reader, read and not yet used.

    Attributes:
        name: Of the file.
        found: The pairs.
        drops: Rows that hold none.
        by: How the mix is found.
    """

    name: str
    found: list[PreferenceExample]
    drops: Drops
    by: By


def read(file: str, by: By, latent: cfg.Latent | None, name: str) -> Examples:
    """The examples of a file, before anything is loaded or computed.

    Args:
        file: Of preference pairs, in any form that training reads.
        by: One of ``BY``.
        latent: Of the system that is to be asked under their z.
        name: Of that system.

    Raises:
        UserError: It has no codes, or the file no pair.
    """
    num_codes = None if latent is None else latent.num_codes
    require_codes(num_codes, f"--like {file}", name)
    hub = cfg.Hub()
    retry = sources.Retry(hub.retries, hub.wait)
    found, drops = pairs.read([file], split="train", limit=None, retry=retry)
    return Examples(file, found, drops, by)


def steering(system: System, examples: Examples) -> Steering:
    """The mix of codes that examples call for.

    Args:
        system: With codes.
        examples: From ``read``.

    Raises:
        UserError: No example is left as tokens.
    """
    some, _ = pairs.tokenize(
        examples.found, system.tokenizer, examples.drops, data=system.config.data
    )
    return mix(weights(evidence(system, some, examples.by), examples.by))


def mix(given: Float[np.ndarray, "C"]) -> Steering:
    """Steering by given weights of all codes."""
    return Steering("mix", tuple(enumerate(given.tolist())))


def evidence(
    system: System, some: Sequence[TokenizedPair], by: By
) -> Float[np.ndarray, "B C"]:
    """What each judged pair says for each code.

    Args:
        system: With codes.
        some: Pairs in its tokens.
        by: ``posterior``: the posterior's logits (LPC eq. 8). ``bayes``: the
            log-likelihood of the judgement under that code alone, log sigmoid(margin)
            (Rafailov et al. 2023, eq. 1); the margin is beta times what the code adds
            to the chosen answer's log-prob, per token where the loss is, less what it
            adds to the rejected one's.
    """
    if by == "posterior":
        beliefs = look.believe(system, some, on_progress=lambda _: None)
        return beliefs.posterior.astype(np.float64)
    latent = system.latent
    assert latent is not None
    every = np.concatenate([np.zeros((1, latent.num_codes)), np.eye(latent.num_codes)])
    logp = pairs.score_under(system, some, every, on_progress=lambda _: None)
    reward = pairs.reward(None, system.config.loss)
    alone = dataclasses.replace(reward, over_reference=False)
    rewards = np.stack([alone.of(x, pairs.lengths(some), None) for x in logp])
    added = rewards[1:] - rewards[:1]
    return -np.logaddexp(0, added[..., 1] - added[..., 0]).T


def weights(evidence: Float[np.ndarray, "B C"], by: By) -> Float[np.ndarray, "C"]:
    """The mix that the evidence of some pairs calls for.

    Args:
        evidence: Of the pairs of one reader.
        by: ``posterior``: the softmax of the mean logits, as training with
            ``latent.pool = "user"`` pools them. ``bayes``: the softmax of the summed
            log-likelihoods, Bayes' rule from a uniform belief over codes.
    """
    pooled = evidence.mean(axis=0) if by == "posterior" else evidence.sum(axis=0)
    return scipy.special.softmax(pooled)
