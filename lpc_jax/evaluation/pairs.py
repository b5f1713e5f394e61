"""What of two answers is compared: a loss's reward, or plain log-probabilities."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from lpc_jax import config as cfg
from lpc_jax import objective

REWARDS = ("simpo", "dpo", "ipo", "mean_logp", "logp")


@dataclasses.dataclass(frozen=True)
class Reward:
    """What of two answers is compared.

    Attributes:
        name: One of ``REWARDS``.
        beta: Its scale, which moves margins and no accuracy.
        per_token: Whether it is divided by the answer's length in tokens.
        over_reference: Whether it is a log-ratio to a reference.
    """

    name: str
    beta: float
    per_token: bool
    over_reference: bool

    def of(
        self,
        logp: Float[np.ndarray, "B 2"],
        lengths: Int[np.ndarray, "B 2"],
        reference_logp: Float[np.ndarray, "B 2"] | None,
    ) -> Float[np.ndarray, "B 2"]:
        """Rewards of the chosen and the rejected answers.

        Args:
            logp: Summed log-probabilities of the answers.
            lengths: Their scored tokens.
            reference_logp: As ``logp``, under the reference; None where the reward
                reads none.
        """
        found = logp.astype(np.float64)
        if self.over_reference:
            assert reference_logp is not None
            found = found - reference_logp
        if self.per_token:
            found = found / lengths
        return self.beta * found

    def formula(self, *, codes: bool) -> str:
        """In symbols, for a system with or without codes."""
        text = f"log pi(y|{'x, z' if codes else 'x'})"
        if self.over_reference:
            text = f"({text} - log pi_ref(y|x))"
        if self.per_token:
            text += "/|y|"
        return text if self.beta == 1 else f"{self.beta:g} * {text}"


def reward(name: str | None, loss: cfg.Loss | None) -> Reward:
    """The reward of a name, or of a run's loss as training logs it.

    Args:
        name: One of ``REWARDS``; ``simpo``, ``dpo`` and ``ipo`` take beta and reduction
            of the run's loss where it is of that kind, else the defaults. None: the
            loss's own; without a loss ``mean_logp``.
        loss: Of a run; None for a model that is none.
    """
    kinds = {"simpo": cfg.Simpo(gamma=0.0), "dpo": cfg.Dpo(), "ipo": cfg.Ipo()}
    if name is None:
        of_loss = {type(kind): known for known, kind in kinds.items()}
        name = "mean_logp" if loss is None else of_loss[type(loss)]
    if name not in kinds:
        return Reward(name, 1.0, name == "mean_logp", False)
    if not isinstance(loss, type(kinds[name])):
        loss = kinds[name]
    assert loss is not None
    per_token = isinstance(loss, cfg.Simpo) or (
        isinstance(loss, cfg.Ipo) and loss.reduction == "mean"
    )
    return Reward(name, loss.beta, per_token, objective.needs_reference(loss))
