"""The table of losses: their values, rewards and formulas.

A new loss is a function of ``losses.preference``, a ``config.Loss`` and a row here.
Rewards are over a reference where the loss has one.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float, Int

from lpc_jax import config as cfg
from lpc_jax.losses import preference

Both = Float[Array, "B 2"]  # chosen, rejected
Losses = Float[Array, "B"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A loss, given its settings."""

    default: cfg.Loss  # to rank with where a run has no loss of this kind
    values: Callable[..., Losses]  # settings, logp, reference, lengths
    per_token: Callable[[Any], bool]  # whether it compares means over tokens
    formula: Callable[[Any, str], tuple[str, str]]  # settings, given: loss, note


def _rule(kind: type[cfg.Loss], per_token: bool, formula: str) -> Rule:
    """Of a loss whose function has its name, and parameters named as its settings."""
    value = getattr(preference, kind.word)
    names = inspect.signature(value).parameters

    def values(loss: Any, logp: Both, reference: Both | None, lengths: Both) -> Losses:
        arrays = {"{}_logp": logp, "ref_{}_logp": reference, "{}_length": lengths}
        columns = {
            name.format(side): column
            for name, both in arrays.items()
            if both is not None
            for side, column in zip(("chosen", "rejected"), both.T, strict=True)
        }
        return value(
            **{k: columns[k] if k in columns else vars(loss)[k] for k in names}
        )

    def written(loss: Any, given: str) -> tuple[str, str]:
        text, *notes = formula.format(given=given).split("; ")
        notes.append(f"b = {loss.beta:g}")
        if "label_smoothing" in names:
            notes.append(f"e = {loss.label_smoothing:g}")
        notes.append(_ratio(given) if kind.needs_reference else "no reference")
        return text, "; ".join(notes)

    return Rule(kind(), values, lambda _: per_token, written)


def _simpo(loss: cfg.Simpo, logp: Both, _: Both | None, lengths: Both) -> Losses:
    settings = {"gamma": loss.target_margin, "label_smoothing": loss.label_smoothing}
    return preference.simpo(*logp.T, *lengths.T, beta=loss.beta, **settings)


def _simpo_formula(loss: cfg.Simpo, given: str) -> tuple[str, str]:
    gamma, ratio = loss.target_margin, loss.target_margin / loss.beta
    difference = f"log pi(y_w|{given})/|y_w| - log pi(y_l|{given})/|y_l|"
    margin = f"{loss.beta:g} * ({difference}) - {gamma:g}"
    note = f"gamma = {gamma:g}, gamma/beta = {ratio:g}; no reference"
    return _log_sigmoid(margin, loss.label_smoothing), note


def _dpo(loss: cfg.Dpo, logp: Both, reference: Both, _: Both) -> Losses:
    settings = {"beta": loss.beta, "label_smoothing": loss.label_smoothing}
    return preference.dpo(*logp.T, *reference.T, **settings)


def _dpo_formula(loss: cfg.Dpo, given: str) -> tuple[str, str]:
    margin = f"{loss.beta:g} * (r_w - r_l)"
    return _log_sigmoid(margin, loss.label_smoothing), _ratio(given)


def _ipo(loss: cfg.Ipo, logp: Both, reference: Both, lengths: Both) -> Losses:
    chosen, rejected = lengths.T if loss.reduction == "mean" else (None, None)
    divisors = {"chosen_length": chosen, "rejected_length": rejected}
    return preference.ipo(*logp.T, *reference.T, beta=loss.beta, **divisors)


def _ipo_formula(loss: cfg.Ipo, given: str) -> tuple[str, str]:
    target = 1 / (2 * loss.beta)
    mean = loss.reduction == "mean"
    difference = "r_w/|y_w| - r_l/|y_l|" if mean else "r_w - r_l"
    note = f"{_ratio(given)}; 1/(2 beta) = {target:g}"
    return f"({difference} - {target:g})^2", note


def _ratio(given: str) -> str:
    return f"r = log pi(y|{given}) - log pi_ref(y|x), summed over answer tokens"


def _log_sigmoid(margin: str, smoothing: float) -> str:
    if not smoothing:
        return f"-log sigmoid({margin})"
    right = f"-{1 - smoothing:g} log sigmoid(m)"
    return f"{right} - {smoothing:g} log sigmoid(-m), m = {margin}"


_ROWS = (  # a loss, whether its rewards are per token, and its formula
    (cfg.Hinge, False, "max(0, 1 - b (r_w - r_l))"),
    (
        cfg.Robust,
        False,
        "(e log sigmoid(-m) - (1 - e) log sigmoid(m)) / (1 - 2 e); m = b (r_w - r_l)",
    ),
    (cfg.SigmoidNorm, True, "-log sigmoid(b (r_w/|y_w| - r_l/|y_l|))"),
    (cfg.ApoZero, False, "1 - sigmoid(b r_w) + sigmoid(b r_l)"),
    (cfg.ApoDown, False, "sigmoid(b r_w) + 1 - sigmoid(b (r_w - r_l))"),
    (
        cfg.ExoPair,
        False,
        "q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e);"
        " q = sigmoid(b (r_w - r_l))",
    ),
    (
        cfg.NcaPair,
        False,
        "-log sigmoid(b r_w) - (log sigmoid(-b r_w) + log sigmoid(-b r_l)) / 2",
    ),
    (cfg.SppoHard, False, "(r_w - 1/(2 b))^2 + (r_l + 1/(2 b))^2"),
    (
        cfg.Orpo,
        True,
        "-b log sigmoid(log(p_w/(1 - p_w)) - log(p_l/(1 - p_l)));"
        " log p = log pi(y|{given})/|y|",
    ),
    (cfg.Cpo, False, "-log sigmoid(b (log pi(y_w|{given}) - log pi(y_l|{given})))"),
)
RULES: dict[type[cfg.Loss], Rule] = {
    cfg.Simpo: Rule(cfg.Simpo(gamma=0.0), _simpo, lambda _: True, _simpo_formula),
    cfg.Dpo: Rule(cfg.Dpo(), _dpo, lambda _: False, _dpo_formula),
    cfg.Ipo: Rule(cfg.Ipo(), _ipo, lambda loss: loss.reduction == "mean", _ipo_formula),
    **{row[0]: _rule(*row) for row in _ROWS},
}


def pair_losses(
    loss: cfg.Loss,
    logp: Float[Array, "*B 2"],
    reference_logp: Float[Array, "*B 2"] | None,
    lengths: Float[Array, "*B 2"],
    *,
    shared: tuple[Float[Array, "*B 2"], Float[Array, "*B 2"] | None] | None = None,
) -> tuple[Float[Array, "*B"], Float[Array, "*B 2"]]:
    """The loss of each pair, and the implicit rewards of its two answers.

    A reward is beta times what is compared: log-probabilities or log-ratios to the
    reference, summed or per token.

    Args:
        shared: Of ``logp`` and ``reference_logp`` the part up to the shorter answer's
            length; read by a loss whose ``ld_alpha`` is below 1.

    Raises:
        ValueError: The loss needs a reference or shared parts and there are none.
    """
    rule = RULES[type(loss)]
    compared = logp
    if loss.needs_reference:
        if reference_logp is None:
            raise ValueError(
                f"{type(loss).__name__} needs batch.reference_logp, got None. Score"
                " the pairs with the reference first."
            )
        compared = logp - reference_logp
    rewards = loss.beta * compared
    rewards = rewards / lengths if rule.per_token(loss) else rewards
    if loss.ld_alpha < 1:
        if shared is None:
            raise ValueError(f"ld_alpha = {loss.ld_alpha} needs shared, got None.")
        part, ref_part = shared
        logp = loss.ld_alpha * logp + (1 - loss.ld_alpha) * part
        if reference_logp is not None and ref_part is not None:
            reference_logp = (
                loss.ld_alpha * reference_logp + (1 - loss.ld_alpha) * ref_part
            )
    columns = (logp, reference_logp, lengths)
    flat = [None if x is None else x.reshape(-1, 2) for x in columns]
    return rule.values(loss, *flat).reshape(logp.shape[:-1]), rewards


def formula(loss: cfg.Loss, latent: cfg.Latent | None) -> str:
    """The resolved objective (LPC eq. 7) in symbols, to check before the run."""
    given = "x" if latent is None else "x, z"
    text, note = RULES[type(loss)].formula(loss, given)
    if loss.sft_weight:
        text += f" - {loss.sft_weight:g} log pi(y_w|{given})/|y_w|"
    if loss.ld_alpha < 1:
        note += f"; tokens beyond the shorter answer's length weigh {loss.ld_alpha:g}"
    if latent is None:
        return f"loss = {text}\n       {note}; no latent"
    kl = f"max(KL(q||p), {latent.free_bits:g})" if latent.free_bits else "KL(q||p)"
    share = {"linear": "g: 0 -> 1 linearly", "zero": "g = 0", "one": "g = 1"}
    return (
        f"loss = {text} + {latent.kl_weight:g} {kl}\n       {note};"
        f" z = (1 - g) z_posterior + g z_prior, {share[latent.prior_share]},"
        f" {latent.num_codes} codes"
    )


@dataclasses.dataclass(frozen=True)
class Reward:
    """What is compared of two answers where nothing is trained."""

    name: str  # one of ``reward_names()``
    beta: float  # scales margins, moves no accuracy
    per_token: bool  # divided by the answer's tokens
    over_reference: bool  # a log-ratio to the reference

    def of(
        self,
        logp: Float[np.ndarray, "B 2"],
        lengths: Int[np.ndarray, "B 2"],
        reference_logp: Float[np.ndarray, "B 2"] | None,
    ) -> Float[np.ndarray, "B 2"]:
        """Rewards from summed log-probabilities and counts of tokens."""
        rewards = logp.astype(np.float64)
        if self.over_reference:
            assert reference_logp is not None
            rewards = rewards - reference_logp
        return self.beta * (rewards / lengths if self.per_token else rewards)

    def formula(self, *, codes: bool) -> str:
        """In symbols, for a policy with or without codes."""
        text = f"log pi(y|{'x, z' if codes else 'x'})"
        if self.over_reference:
            text = f"({text} - log pi_ref(y|x))"
        if self.per_token:
            text += "/|y|"
        return text if self.beta == 1 else f"{self.beta:g} * {text}"


def reward_names() -> tuple[str, ...]:
    """Every loss's, and two of log-probabilities that need no run."""
    return (*(kind.word for kind in cfg.Loss.kinds), "mean_logp", "logp")


def reward(name: str | None, loss: cfg.Loss | None) -> Reward:
    """The reward of a name; of None the run's own, or ``mean_logp`` without a run.

    Settings are those of the run's loss where it is of that kind, else the defaults.
    """
    if name is None:
        name = "mean_logp" if loss is None else loss.word
    rule = {kind.word: rule for kind, rule in RULES.items()}.get(name)
    if rule is None:
        return Reward(name, 1.0, name == "mean_logp", False)
    if not isinstance(loss, type(rule.default)):
        loss = rule.default
    return Reward(name, loss.beta, rule.per_token(loss), loss.needs_reference)
