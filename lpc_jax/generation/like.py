"""z from a few judgements of one reader: the mix of codes that ranks them right."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal, assert_never, get_args

import numpy as np
import scipy.special
from jaxtyping import Float

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import reading
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import require_codes

By = Literal["posterior", "bayes"]
BY: tuple[By, ...] = get_args(By)


@dataclasses.dataclass(frozen=True)
class Examples:
    """Judged pairs of one reader; ``by``: how the mix follows from them."""

    judged: list[PreferenceExample]
    drops: Drops
    by: By


def read(file: str, by: By, latent: cfg.Latent | None, name: str) -> Examples:
    """The pairs of a file, in any form that training reads, before a policy is loaded.

    ``latent`` and ``name`` are the policy's, which must have codes.
    """
    codes = None if latent is None else latent.num_codes
    require_codes(codes, f"--like {file}", name)
    judged, drops = pair_data.read([file], split="train", limit=None)
    return Examples(judged, drops, by)


def steering(system: Policy, examples: Examples) -> Steering:
    """The mix of codes that examples from ``read`` call for."""
    rules = pair_data.rules(system.config.data)
    tokens, _ = pair_data.tokenize(
        examples.judged, system.tokenizer, examples.drops, **rules
    )
    return of_pairs(system, tokens, examples.by)


def of_pairs(system: Policy, judged: Sequence[TokenizedPair], by: By) -> Steering:
    """The mix of codes that judged pairs call for."""
    mix = weights(evidence(system, judged, by), by)
    return Steering("mix", tuple(enumerate(mix.tolist())))


def evidence(
    system: Policy, judged: Sequence[TokenizedPair], by: By
) -> Float[np.ndarray, "B C"]:
    """Evidence of each judged pair for each code.

    By ``posterior`` the posterior's logits (LPC eq. 8). By ``bayes`` the log-likelihood
    of the judgement under that code alone, log sigmoid(margin) (Rafailov et al. 2023,
    eq. 1); the margin is beta times what the code adds to the chosen answer's log-prob,
    per token where the loss is, less what it adds to the rejected one's.
    """
    if by == "posterior":
        return reading.believe(system, judged).posterior.astype(np.float64)
    assert system.latent is not None
    count = system.latent.num_codes
    mixes = np.concatenate([np.zeros((1, count)), np.eye(count)])  # none, then each
    logp = reading.score_under(system, judged, mixes)
    reward = loss_table.reward(None, system.config.loss)
    # A reference would cancel: it is the same with and without the code.
    alone = dataclasses.replace(reward, over_reference=False)
    rewards = np.stack([alone.of(x, pair_data.lengths(judged), None) for x in logp])
    added = rewards[1:] - rewards[:1]
    # log sigmoid(m) = -log(1 + exp(-m)), which logaddexp gives without overflow.
    return -np.logaddexp(0, added[..., 1] - added[..., 0]).T


def weights(evidence: Float[np.ndarray, "B C"], by: By) -> Float[np.ndarray, "C"]:
    """The mix that the evidence of one reader's pairs calls for.

    By ``posterior`` as ``latent.pool = "user"`` pools in training; by ``bayes`` Bayes'
    rule from a uniform prior over codes.
    """
    match by:
        case "posterior":
            return scipy.special.softmax(evidence.mean(axis=0))
        case "bayes":
            return scipy.special.softmax(evidence.sum(axis=0))
        case _:
            assert_never(by)
