"""How z is chosen without a judged pair: from the prior, or by hand."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from lpc_jax import config as cfg
from lpc_jax import objective
from lpc_jax.errors import UserError
from lpc_jax.models.latent import Steering

_TOLERANCE = 1e-3  # of a mix's sum


def of_settings(
    latent: cfg.Latent, how: Literal["mean", "sample", "argmax"] | None = None
) -> Steering:
    """z as the run evaluates, or by ``how``, at the temperature of its last step."""
    evaluated = objective.inference(latent)
    return dataclasses.replace(evaluated, how=how or evaluated.how)


def code(text: str, num_codes: int) -> Steering:
    """All weight on one code, as ``--code 7`` asks for."""
    return Steering("mix", ((_code(text, num_codes, f"--code {text}"), 1.0),))


def mix(text: str, num_codes: int) -> Steering:
    """Weights of codes as in ``--mix 3:0.7,12:0.3``; ``UserError`` if not a mix."""
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


def require_codes(num_codes: int | None, flag: str, name: str) -> int:
    """The number of codes; ``UserError`` where a flag needs them and there are none."""
    if num_codes is None:
        raise UserError(
            f"{flag} needs codes, got {name}, which has none (latent=None or a plain"
            " model). Leave it out, or name an LPC run."
        )
    return num_codes


def choose(
    z: Literal["mean", "sample", "argmax"] | None,
    code_text: str | None,
    mix_text: str | None,
    latent: cfg.Latent | None,
    name: str,
) -> Steering | None:
    """z by ``--z``, ``--code`` or ``--mix``; None where the policy has no codes."""
    if latent is None:
        for flag, value in {"z": z, "code": code_text, "mix": mix_text}.items():
            if value is not None:
                require_codes(None, f"--{flag} {value}", name)
        return None
    if code_text is not None:
        return code(code_text, latent.num_codes)
    if mix_text is not None:
        return mix(mix_text, latent.num_codes)
    return of_settings(latent, z)
