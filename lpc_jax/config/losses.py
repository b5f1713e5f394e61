"""The settings of each loss; ``loss_table`` says what they compute."""

from __future__ import annotations

import dataclasses
import re
from typing import Annotated, ClassVar, Literal

from lpc_jax.config.checks import (
    Bound,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    Settings,
)

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
    word: ClassVar[str] = ""
    """Its name on command lines: TRL's loss_type where TRL has it, but ``dpo``."""

    beta: PositiveFloat = 0.1
    """Strength of the pull to the reference."""
    sft_weight: NonNegativeFloat = 0.0
    """Weight of the chosen answer's mean negative log-likelihood per token."""
    ld_alpha: Fraction = 1.0
    """Weight in the loss of tokens beyond the shorter answer's length, in rewards 1:
    below 1 the loss is length-desensitised (LD-DPO, Liu et al. 2024)."""

    @property
    def reference_columns(self) -> int:
        """How many log-probabilities of the reference it reads of a pair."""
        return self.needs_reference * (2 if self.ld_alpha == 1 else 4)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__(section=Loss.section)
        cls.kinds = (cls,)
        cls.word = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hinge(Loss):
    """SLiC's hinge (Zhao et al. 2023) on log-ratios (RSO, Liu et al. 2023)."""

    beta: PositiveFloat = 0.05
    """Scale of the log-ratios, RSO's gamma; the margin is 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust(Loss):
    """Robust DPO (Chowdhury et al. 2024): unbiased where labels are flipped."""

    label_smoothing: Smoothing = 0.1
    """The known rate of flipped labels, below 0.5; 0 is DPO."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmoidNorm(Loss):
    """Length-normalised DPO (Tulu 3, Lambert et al. 2024): log-ratios per token."""

    beta: PositiveFloat = 5.0
    """Scale of the log-ratios per token; Tulu 3's."""


class ApoZero(Loss):
    """Anchored, chosen up and rejected down (D'Oosterlinck et al. 2024, eq. 7)."""


class ApoDown(Loss):
    """Anchored, both down, rejected more (D'Oosterlinck et al. 2024, eq. 8)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExoPair(Loss):
    """Efficient exact optimisation of pairs (Ji et al. 2024, eq. 16)."""

    label_smoothing: Annotated[
        float,
        Bound(lambda x: 0 < x < 0.5, "must lie between 0 and 0.5", "EXO takes 1e-3."),
    ] = 1e-3
    """Probability of the rejected answer under the labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class NcaPair(Loss):
    """Noise contrastive alignment of pairs (Chen et al. 2024, section 4.1)."""

    beta: PositiveFloat = 0.01
    """Scale of the log-ratios, alpha in its paper."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SppoHard(Loss):
    """Self-play preference optimisation, hard labels (Wu et al. 2024, eq. 4.7)."""

    beta: PositiveFloat = 0.001
    """1 / eta: log-ratios are drawn to 1 / (2 beta) and its negative."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Orpo(Loss):
    """Odds ratio preference optimisation (Hong et al. 2024, eq. 6): no reference."""

    needs_reference: ClassVar[bool] = False

    beta: PositiveFloat = 0.1
    """Weight of the odds ratio's term, lambda in its paper."""
    sft_weight: NonNegativeFloat = 1.0
    """As of any loss; 1 is ORPO's own. TRL's likelihood counts the prompt too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cpo(Loss):
    """Contrastive preference optimisation (Xu et al. 2024, eq. 3): no reference."""

    needs_reference: ClassVar[bool] = False

    sft_weight: NonNegativeFloat = 1.0
    """As of any loss; 1 is CPO's own, cpo_alpha in TRL."""
