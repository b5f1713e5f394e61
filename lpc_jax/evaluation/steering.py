"""How z is chosen when there is no judged pair: from the prior, or by hand.

Knows nothing of decoders, tokens or files.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lpc_jax import config as cfg
from lpc_jax import objective
from lpc_jax.models import latent as latent_models

# A mix given by hand must sum to 1 within this.
_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Steering:
    """Where the weights of a prompt's codes come from.

    Attributes:
        how: ``mean``: the prior's probabilities (the default of LPC at inference);
            ``sample``: a Gumbel-softmax draw from it; ``argmax``: its largest code;
            ``mix``: the same given weights for every prompt.
        mix: Of ``mix``: the weight of each code that has one.
        temperature: tau of ``sample``.
    """

    how: Literal["mean", "sample", "argmax", "mix"]
    mix: tuple[tuple[int, float], ...] = ()
    temperature: float = 1.0

    def weights(
        self, prior_logits: Float[Array, "*pairs C"], key: Array
    ) -> Float[Array, "*pairs C"]:
        """Each prompt's weights of the codes, on the simplex.

        Args:
            prior_logits: The prior's, of each prompt.
            key: Seeds the noise of ``sample``; the others don't read it.
        """
        if self.how == "mix":
            given = jnp.zeros(prior_logits.shape[-1])
            for code, weight in self.mix:
                given = given.at[code].set(weight)
            return jnp.broadcast_to(given, prior_logits.shape)
        if self.how == "argmax":
            return latent_models.one_code(prior_logits)
        if self.how == "sample":
            noise = jax.random.gumbel(key, prior_logits.shape)
            return latent_models.gumbel_softmax(
                prior_logits, noise, temperature=self.temperature
            )
        return jax.nn.softmax(prior_logits, axis=-1)

    def said(self) -> str:
        """In words, for a person."""
        if self.how == "mix":
            return "codes " + ", ".join(
                f"{code}: {weight:g}" for code, weight in self.mix
            )
        return {
            "mean": "the prior's mean",
            "sample": f"a draw from the prior (tau {self.temperature:g})",
            "argmax": "the prior's largest code",
        }[self.how]


def of_settings(
    latent: cfg.Latent, how: Literal["mean", "sample", "argmax"] | None = None
) -> Steering:
    """As a run evaluates, or another way from its prior.

    Args:
        latent: The run's settings.
        how: None: what they say; ``sample`` draws at the last step's temperature.
    """
    tau = float(objective.temperature(latent, jnp.asarray(1.0)))
    return Steering(how or latent.inference, temperature=tau)


def code(text: str, num_codes: int) -> Steering:
    """All weight on one code, as ``--code 7`` asks for.

    Raises:
        ValueError: It is no code.
    """
    return Steering("mix", ((_code(text, num_codes, f"--code {text}"), 1.0),))


def mix(text: str, num_codes: int) -> Steering:
    """Weights of some codes, as ``--mix 3:0.7,12:0.3`` asks for.

    Raises:
        ValueError: Something that is no code or no weight, a code twice, or weights
            that don't sum to 1.
    """
    said = f"--mix {text}"
    found: dict[int, float] = {}
    for part in text.split(","):
        name, colon, weight = part.partition(":")
        index = _code(name.strip(), num_codes, said)
        try:
            value = float(weight)
        except ValueError:
            value = math.nan
        if not colon or not 0 <= value <= 1:
            raise ValueError(
                f"{said}: expected CODE:WEIGHT with a weight in [0, 1], got {part!r}."
                " Write it as 3:0.7,12:0.3."
            )
        if index in found:
            raise ValueError(f"{said}: code {index} is there twice. Give it once.")
        found[index] = value
    total = sum(found.values())
    if abs(total - 1) > _TOLERANCE:
        raise ValueError(
            f"{said}: the weights must sum to 1, got {total:g}. z is a convex mix of"
            " codes."
        )
    return Steering("mix", tuple((c, w / total) for c, w in found.items()))


def _code(text: str, num_codes: int, said: str) -> int:
    if not text.isdecimal() or int(text) >= num_codes:
        raise ValueError(
            f"{said}: expected a code from 0 to {num_codes - 1}, got {text!r}."
        )
    return int(text)


def require_codes(num_codes: int | None, asked: str, name: str) -> int:
    """The number of codes, where codes are asked for.

    Args:
        num_codes: Of the system, or None without a latent.
        asked: The flag that asks, in the user's words.
        name: Of the system.

    Raises:
        ValueError: It has none.
    """
    if num_codes is None:
        raise ValueError(
            f"{asked} needs codes, got {name}, which has none (latent=None or a plain"
            " model). Leave it out, or name an LPC run."
        )
    return num_codes


def choose(
    how: Literal["mean", "sample", "argmax"] | None,
    one: str | None,
    several: str | None,
    latent: cfg.Latent | None,
    name: str,
) -> Steering | None:
    """How a system's z is chosen; None without codes, if none are asked for.

    Args:
        how: As ``--z``.
        one: As ``--code``.
        several: As ``--mix``.
        latent: Of the system.
        name: Of the system.

    Raises:
        ValueError: Codes of a system without any, an unknown one, a mix that is none.
    """
    flags = {"z": how, "code": one, "mix": several}
    flag = next((f"--{f} {v}" for f, v in flags.items() if v is not None), None)
    if flag is None:
        return None if latent is None else of_settings(latent)
    num_codes = None if latent is None else latent.num_codes
    num_codes = require_codes(num_codes, flag, name)
    assert latent is not None
    if one is not None:
        return code(one, num_codes)
    if several is not None:
        return mix(several, num_codes)
    return of_settings(latent, how)
