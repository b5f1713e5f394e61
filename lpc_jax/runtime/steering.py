"""How z is chosen when there is no judged pair: from the prior, or by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from lpc_jax import config as cfg
from lpc_jax import objective
from lpc_jax.errors import UserError
from lpc_jax.models.latent import Steering

# A mix given by hand must sum to 1 within this.
_TOLERANCE = 1e-3


def of_settings(
    latent: cfg.Latent, how: Literal["mean", "sample", "argmax"] | None = None
) -> Steering:
    """As a run evaluates, or another way from its prior.

    ``sample`` draws at the temperature of the run's last step.
    """
    settings = objective.inference(latent)
    return dataclasses.replace(settings, how=how or settings.how)


def code(text: str, num_codes: int) -> Steering:
    """All weight on one code, as ``--code 7`` asks for; ``UserError`` if it is none."""
    return Steering("mix", ((_code(text, num_codes, f"--code {text}"), 1.0),))


def mix(text: str, num_codes: int) -> Steering:
    """Weights of some codes, as ``--mix 3:0.7,12:0.3`` asks for.

    Raises:
        UserError: No code, no weight, a code twice, or weights that don't sum to 1.
    """
    flag = f"--mix {text}"
    weights: dict[int, float] = {}
    for part in text.split(","):
        name, colon, number = part.partition(":")
        index = _code(name.strip(), num_codes, flag)
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not colon or not 0 <= weight <= 1:
            raise UserError(
                f"{flag}: expected CODE:WEIGHT with a weight in [0, 1], got {part!r}."
                " Write it as 3:0.7,12:0.3."
            )
        if index in weights:
            raise UserError(f"{flag}: code {index} is there twice. Give it once.")
        weights[index] = weight
    total = sum(weights.values())
    if abs(total - 1) > _TOLERANCE:
        raise UserError(
            f"{flag}: the weights must sum to 1, got {total:g}. z is a convex mix of"
            " codes."
        )
    return Steering("mix", tuple((c, w / total) for c, w in weights.items()))


def _code(text: str, num_codes: int, flag: str) -> int:
    if not text.isdecimal() or int(text) >= num_codes:
        raise UserError(
            f"{flag}: expected a code from 0 to {num_codes - 1}, got {text!r}."
        )
    return int(text)


def require_codes(num_codes: int | None, asked: str, name: str) -> int:
    """The number of codes, or ``UserError`` where a flag needs them and none are."""
    if num_codes is None:
        raise UserError(
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
    """How a system's z is chosen by ``--z``, ``--code`` and ``--mix``.

    Returns:
        None without codes, if none are asked for.

    Raises:
        UserError: Codes of a system without any, an unknown one, a mix that is none.
    """
    flags = {"z": how, "code": one, "mix": several}
    given = [f"--{flag} {value}" for flag, value in flags.items() if value is not None]
    if latent is None:
        if given:
            require_codes(None, given[0], name)
        return None
    if one is not None:
        return code(one, latent.num_codes)
    if several is not None:
        return mix(several, latent.num_codes)
    return of_settings(latent, how)
