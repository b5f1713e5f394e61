"""The settings of each loss; ``loss_table`` says what they compute."""

from __future__ import annotations

import dataclasses
from typing import Annotated, ClassVar, Literal

from lpc_jax.config.checks import Bound, NonNegativeFloat, PositiveFloat, Settings

Smoothing = Annotated[
    float,
    Bound(
        lambda x: 0 <= x < 0.5, "must lie in [0, 0.5)", "At 0.5 a label says nothing."
    ),
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loss(Settings, section="loss."):
    """What is minimised. A new loss is a subclass and a row of ``loss_table``."""

    needs_reference: ClassVar[bool] = True
    """Whether it reads log-probabilities of a reference."""
    kinds: ClassVar[tuple[type[Loss], ...]] = ()
    """Of ``Loss``, every loss there is; of a loss, itself."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's mean negative log-likelihood per token."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__(section=Loss.section)
        cls.kinds = (cls,)
        Loss.kinds += cls.kinds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dpo(Loss):
    """Direct Preference Optimization (Rafailov et al. 2023, eq. 7)."""

    label_smoothing: Smoothing = 0.0
    """cDPO: the assumed rate of flipped labels, below 0.5."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ipo(Loss):
    """Identity Preference Optimization (Azar et al. 2023, eq. 17)."""

    beta: PositiveFloat = 0.1
    """The regulariser, tau in its paper."""
    reduction: Literal["mean", "sum"] = "mean"
    """Log-ratios per token (as TRL) or summed over the answer (as OpenRLHF)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Simpo(Loss):
    """Simple Preference Optimization (Meng et al. 2024, eq. 6): no reference."""

    needs_reference: ClassVar[bool] = False

    beta: PositiveFloat = 2.0
    """Scale of the length-normalised log-probabilities."""
    gamma: float | None = None
    """Target margin; give this or gamma_beta_ratio."""
    gamma_beta_ratio: float | None = None
    """gamma / beta, the form in which SimPO's settings are published."""
    label_smoothing: Smoothing = 0.0
    """The assumed rate of flipped labels, below 0.5."""

    def _check(self) -> None:
        self._require(
            (self.gamma is None) != (self.gamma_beta_ratio is None),
            "gamma",
            f"must be {'a number' if self.gamma is None else 'None'}"
            f" when loss.gamma_beta_ratio is {self.gamma_beta_ratio!r}",
            "Give one of the two and None for the other.",
        )

    @property
    def target_margin(self) -> float:
        """The resolved gamma."""
        ratio = self.gamma_beta_ratio or 0.0
        return ratio * self.beta if self.gamma is None else self.gamma
