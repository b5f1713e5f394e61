"""Preference losses: log-probabilities of a pair in, one number per pair out."""

from __future__ import annotations

import chex
import jax
from jaxtyping import Array, Float, Num


def _smoothed_log_loss(
    logits: Float[Array, "B"], label_smoothing: float
) -> Float[Array, "B"]:
    """-(1 - e) log sigmoid(x) - e log sigmoid(-x)."""
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(
        logits
    ) - label_smoothing * jax.nn.log_sigmoid(-logits)


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
    arguments = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chex.assert_rank(arguments, 1)
    chex.assert_equal_shape(arguments)
    chosen = chosen_logp - jax.lax.stop_gradient(ref_chosen_logp)
    rejected = rejected_logp - jax.lax.stop_gradient(ref_rejected_logp)
    return _smoothed_log_loss(beta * (chosen - rejected), label_smoothing)


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
    arguments = (chosen_logp, rejected_logp, ref_chosen_logp, ref_rejected_logp)
    chex.assert_rank(arguments, 1)
    chex.assert_equal_shape(arguments)
    chosen = chosen_logp - jax.lax.stop_gradient(ref_chosen_logp)
    rejected = rejected_logp - jax.lax.stop_gradient(ref_rejected_logp)
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
