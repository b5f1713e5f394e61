"""z from a few judgements of one reader: the mix of codes that ranks them right."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import scipy.special
from jaxtyping import Float

from lpc_jax import config as cfg
from lpc_jax import loss_table
from lpc_jax.data import pairs as pair_data
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import reading
from lpc_jax.runtime.policy import Policy
from lpc_jax.runtime.steering import require_codes

By = Literal["posterior", "bayes"]
BY: tuple[By, ...] = get_args(By)


def read(
    file: str, by: By, latent: cfg.Latent | None, name: str
) -> Callable[[Policy], Steering]:
    """Reads pairs, in any form that training reads, before a policy is loaded.

    ``latent`` and ``name`` are the policy's, which must have codes. Returns how its z
    is chosen once it is loaded.
    """
    codes = None if latent is None else latent.num_codes
    require_codes(codes, f"--like {file}", name)
    texts, drops = pair_data.read([file], split="train", limit=None)

    def steering(policy: Policy) -> Steering:
        rules = pair_data.rules(policy.config.data)
        judged, _ = pair_data.tokenize(texts, policy.tokenizer, drops, **rules)
        return of_pairs(policy, judged, by)

    return steering


def of_pairs(policy: Policy, judged: Sequence[TokenizedPair], by: By) -> Steering:
    """The mix of codes that judged pairs call for."""
    mix = weights(evidence(policy, judged, by), by)
    return Steering("mix", tuple(enumerate(mix.tolist())))


def evidence(
    policy: Policy, judged: Sequence[TokenizedPair], by: By
) -> Float[np.ndarray, "B C"]:
    """Evidence of each judged pair for each code.

    By ``posterior`` the posterior's logits (LPC eq. 8). By ``bayes`` the log-likelihood
    of the judgement under that code alone, log sigmoid(margin) (Rafailov et al. 2023,
    eq. 1); the margin is beta times what the code adds to the chosen answer's log-prob,
    per token where the loss is, less what it adds to the rejected one's.
    """
    if by == "posterior":
        return reading.believe(policy, judged).posterior.astype(np.float64)
    assert policy.latent is not None
    count = policy.latent.num_codes
    mixes = np.eye(count + 1, count, -1)  # no code, then each
    logp = reading.score_under(policy, judged, mixes)
    # A reference would cancel: it is the same with and without the code.
    reward = dataclasses.replace(
        loss_table.reward(None, policy.config.loss), over_reference=False
    )
    lengths = pair_data.lengths(judged)
    none, *each = (reward.of(under, lengths, None) for under in logp)
    added = np.stack(each) - none
    # log sigmoid(m) = -log(1 + exp(-m)), which logaddexp gives without overflow.
    return -np.logaddexp(0, added[..., 1] - added[..., 0]).T


def weights(evidence: Float[np.ndarray, "B C"], by: By) -> Float[np.ndarray, "C"]:
    """The mix that the evidence of one reader's pairs calls for.

    By ``posterior`` as ``latent.pool = "user"`` pools in training; by ``bayes`` Bayes'
    rule from a uniform prior over codes.
    """
    pool = {"posterior": np.mean, "bayes": np.sum}[by]
    return scipy.special.softmax(pool(evidence, axis=0))
