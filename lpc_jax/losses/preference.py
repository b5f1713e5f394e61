"""Preference losses: log-probabilities of a pair in, one number per pair out."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Concatenate, ParamSpec

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num

Logp = Float[Array, "B"]
_Settings = ParamSpec("_Settings")
# Means per token above this are taken for it: the odds of probability 1 are infinite.
_MOST_LOGP = -1e-6


def _smoothed_log_loss(logits: Logp, label_smoothing: float) -> Logp:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        logits
    ) - label_smoothing * jax.nn.log_sigmoid(-logits)


def _log_ratios(
    chosen_logp: Logp,
    rejected_logp: Logp,
    ref_chosen_logp: Logp,
    ref_rejected_logp: Logp,
) -> tuple[Logp, Logp]:
    """log pi(y|x) - log pi_ref(y|x) of both answers; no gradient in the reference."""
    arguments = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chex.assert_rank(arguments, 1)
    chex.assert_equal_shape(arguments)
    chosen = chosen_logp - jax.lax.stop_gradient(ref_chosen_logp)
    rejected = rejected_logp - jax.lax.stop_gradient(ref_rejected_logp)
    return chosen, rejected


def _over_reference(
    arithmetic: Callable[Concatenate[Logp, Logp, _Settings], Logp],
) -> Callable[Concatenate[Logp, Logp, Logp, Logp, _Settings], Logp]:
    """From a loss of r_w and r_l, log-ratios as in ``dpo``, to one of log-probs."""

    @functools.wraps(arithmetic)
    def loss(
        chosen_logp: Logp,
        rejected_logp: Logp,
        ref_chosen_logp: Logp,
        ref_rejected_logp: Logp,
        *args: _Settings.args,
        **settings: _Settings.kwargs,
    ) -> Logp:
        four = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
        return arithmetic(*_log_ratios(*four), *args, **settings)

    four = inspect.signature(_log_ratios).parameters.values()
    own = inspect.signature(arithmetic).parameters.values()
    # What help() shows and callers write: log-probs by name, then the settings.
    shown = [*four, *(p for p in own if p.kind is p.KEYWORD_ONLY)]
    vars(loss)["__signature__"] = inspect.Signature(shown)
    return loss


def dpo(
    chosen_logp: Float[Array, "B"],
    rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Direct Preference Optimization: -log sigmoid(beta (r_w - r_l)).

    With ``r = log pi(y|x) - log pi_ref(y|x)`` in nats, summed over answer tokens
    (Rafailov et al. 2023, eq. 7); no gradient flows into the reference. Labels flipped
    at a rate e in [0, 0.5), ``label_smoothing``, give conservative DPO (Mitchell 2023):
    ``-(1 - e) log sigmoid(beta D) - e log sigmoid(-beta D)``, D = r_w - r_l.
    """
    four = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chosen, rejected = _log_ratios(*four)
    return _smoothed_log_loss(beta * (chosen - rejected), label_smoothing)


@_over_reference
def hinge(r_w: Logp, r_l: Logp, *, beta: float) -> Logp:
    """max(0, 1 - beta (r_w - r_l)) (Zhao et al. 2023; of ratios Liu et al. 2023)."""
    return jax.nn.relu(1 - beta * (r_w - r_l))


@_over_reference
def robust(r_w: Logp, r_l: Logp, *, beta: float, label_smoothing: float) -> Logp:
    """DPO's loss, unbiased where labels are flipped at a rate e < 0.5.

    ``(-(1 - e) log sigmoid(beta D) + e log sigmoid(-beta D)) / (1 - 2 e)``, D = r_w -
    r_l, e = ``label_smoothing`` (Chowdhury et al. 2024, section 3.1); DPO at e = 0.
    """
    logits, e = beta * (r_w - r_l), label_smoothing
    clean, flipped = jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    return (e * flipped - (1 - e) * clean) / (1 - 2 * e)


@_over_reference
def apo_zero(r_w: Logp, r_l: Logp, *, beta: float) -> Logp:
    """1 - sigmoid(beta r_w) + sigmoid(beta r_l): chosen up, rejected down.

    D'Oosterlinck et al. 2024, eq. 7, and the constant 1 as in TRL.
    """
    return jax.nn.sigmoid(-beta * r_w) + jax.nn.sigmoid(beta * r_l)


@_over_reference
def apo_down(r_w: Logp, r_l: Logp, *, beta: float) -> Logp:
    """sigmoid(beta r_w) + 1 - sigmoid(beta (r_w - r_l)): both down, rejected more.

    D'Oosterlinck et al. 2024, eq. 8, and the constant 1 as in TRL.
    """
    return jax.nn.sigmoid(beta * r_w) + jax.nn.sigmoid(-beta * (r_w - r_l))


@_over_reference
def exo_pair(r_w: Logp, r_l: Logp, *, beta: float, label_smoothing: float) -> Logp:
    """KL of the pair's softmax of beta r from the labels' (1 - e, e).

    ``q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e)``, q = sigmoid(beta (r_w -
    r_l)), e = ``label_smoothing`` in (0, 0.5) (Ji et al. 2024, eq. 16).
    """
    logits, e = beta * (r_w - r_l), label_smoothing
    chosen = jax.nn.log_sigmoid(logits) - jnp.log1p(-e)
    rejected = jax.nn.log_sigmoid(-logits) - jnp.log(e)
    return jax.nn.sigmoid(logits) * chosen + jax.nn.sigmoid(-logits) * rejected


@_over_reference
def nca_pair(r_w: Logp, r_l: Logp, *, beta: float) -> Logp:
    """-log sigmoid(beta r_w) - (log sigmoid(-beta r_w) + log sigmoid(-beta r_l)) / 2.

    Chen et al. 2024, section 4.1, for a pair.
    """
    noise = jax.nn.log_sigmoid(-beta * r_w) + jax.nn.log_sigmoid(-beta * r_l)
    return -jax.nn.log_sigmoid(beta * r_w) - noise / 2


@_over_reference
def sppo_hard(r_w: Logp, r_l: Logp, *, beta: float) -> Logp:
    """(r_w - 1 / (2 beta))^2 + (r_l + 1 / (2 beta))^2, beta being 1 / eta.

    Wu et al. 2024, eq. 4.7, the chosen answer winning with probability 1.
    """
    return (r_w - 1 / (2 * beta)) ** 2 + (r_l + 1 / (2 * beta)) ** 2


def sigmoid_norm(
    chosen_logp: Logp,
    rejected_logp: Logp,
    ref_chosen_logp: Logp,
    ref_rejected_logp: Logp,
    chosen_length: Num[Array, "B"],
    rejected_length: Num[Array, "B"],
    *,
    beta: float,
) -> Logp:
    """-log sigmoid(beta (r_w/|y_w| - r_l/|y_l|)), r as in ``dpo``.

    Length-normalised DPO (Lambert et al. 2024, Tulu 3).
    """
    four = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chosen, rejected = _log_ratios(*four)
    margin = chosen / chosen_length - rejected / rejected_length
    return -jax.nn.log_sigmoid(beta * margin)


def ipo(
    chosen_logp: Float[Array, "B"],
    rejected_logp: Float[Array, "B"],
    ref_chosen_logp: Float[Array, "B"],
    ref_rejected_logp: Float[Array, "B"],
    *,
    beta: float,
    chosen_length: Num[Array, "B"] | None = None,
    rejected_length: Num[Array, "B"] | None = None,
) -> Float[Array, "B"]:
    """Identity Preference Optimization: (r_w - r_l - 1 / (2 beta))^2.

    Azar et al. 2023, eq. 17, where beta is tau; LPC eq. 13. ``r`` is as in ``dpo``: its
    mean over the answer's tokens with lengths (TRL), its sum without (OpenRLHF).

    Raises:
        ValueError: One length is given without the other.
    """
    four = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chosen, rejected = _log_ratios(*four)
    if (chosen_length is None) != (rejected_length is None):
        raise ValueError(
            "ipo takes chosen_length and rejected_length together (mean) or neither"
            " (sum), got one of them."
        )
    if chosen_length is not None and rejected_length is not None:
        chosen, rejected = chosen / chosen_length, rejected / rejected_length
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(
    chosen_logp: Float[Array, "B"],
    rejected_logp: Float[Array, "B"],
    chosen_length: Num[Array, "B"],
    rejected_length: Num[Array, "B"],
    *,
    beta: float,
    gamma: float,
    label_smoothing: float = 0.0,
) -> Float[Array, "B"]:
    """Simple Preference Optimization, without a reference or a likelihood term.

    ``-log sigmoid(beta (log pi(y_w|x)/|y_w| - log pi(y_l|x)/|y_l|) - gamma)`` (Meng et
    al. 2024, eq. 6; LPC eq. 12), smoothed as ``dpo``. Lengths count scored tokens;
    gamma is the target margin itself, not its ratio to beta.
    """
    arguments = (chosen_logp, rejected_logp, chosen_length, rejected_length)
    chex.assert_rank(arguments, 1)
    chex.assert_equal_shape(arguments)
    margin = chosen_logp / chosen_length - rejected_logp / rejected_length
    return _smoothed_log_loss(beta * margin - gamma, label_smoothing)


def orpo(
    chosen_logp: Logp,
    rejected_logp: Logp,
    chosen_length: Num[Array, "B"],
    rejected_length: Num[Array, "B"],
    *,
    beta: float,
) -> Logp:
    """ORPO's odds ratio term, beta L_OR; its likelihood term is the caller's.

    ``-beta log sigmoid(log(p_w / (1 - p_w)) - log(p_l / (1 - p_l)))``, log p = log
    pi(y|x)/|y| (Hong et al. 2024, eqs. 4, 6 and 7, where beta is lambda).
    """

    def log_odds(logp: Logp, length: Num[Array, "B"]) -> Logp:
        mean = jnp.minimum(logp / length, _MOST_LOGP)
        return mean - jax.nn.log1mexp(-mean)

    odds = log_odds(chosen_logp, chosen_length)
    ratio = odds - log_odds(rejected_logp, rejected_length)
    return -beta * jax.nn.log_sigmoid(ratio)


def cpo(chosen_logp: Logp, rejected_logp: Logp, *, beta: float) -> Logp:
    """-log sigmoid(beta (log pi(y_w|x) - log pi(y_l|x))), summed over answer tokens.

    CPO's preference term (Xu et al. 2024, eq. 3), without its likelihood term.
    """
    return -jax.nn.log_sigmoid(beta * (chosen_logp - rejected_logp))
