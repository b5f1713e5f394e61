"""Cuts pairs that are too long, and drops those that cannot be trained on."""

from __future__ import annotations

import typing
from typing import Literal

import numpy as np
from jaxtyping import Int32

from lpc_jax.data.examples import EMPTY, Dropped

Ids = Int32[np.ndarray, "_"]
Truncation = Literal["drop", "cut_prompt", "cut_prompt_then_answer"]


def fit(
    prompt: Ids,
    chosen: Ids,
    rejected: Ids,
    *,
    max_length: int,
    max_prompt_length: int,
    row_length: int,
    truncation: Truncation,
    starts_with_bos: bool,
) -> tuple[Ids, Ids, Ids]:
    """The pair cut to ``chat.tokenize``'s lengths; ``Dropped`` if it cannot be."""
    if not len(prompt):
        raise Dropped("prompt and answers share no tokens")
    # One token is the end of turn alone.
    if min(len(chosen), len(rejected)) < 2:
        raise Dropped(EMPTY)
    longest = max(len(chosen), len(rejected))
    if len(prompt) + longest > max_length:
        if truncation != "drop" and len(prompt) > max_prompt_length:
            # BOS, and the end of the rest.
            end = len(prompt) - max_prompt_length + starts_with_bos
            prompt = np.append(prompt[:starts_with_bos], prompt[end:])
        room = max_length - len(prompt)
        match truncation:
            case "drop":
                raise Dropped("longer than data.max_length")
            case "cut_prompt":
                if longest > room:
                    raise Dropped("longer than data.max_length with its prompt cut")
            case "cut_prompt_then_answer":
                if room < 1:
                    raise Dropped("prompt leaves an answer no room in data.max_length")
                chosen, rejected = chosen[:room], rejected[:room]
            case _:
                typing.assert_never(truncation)
    if np.array_equal(chosen, rejected):
        raise Dropped("chosen equals rejected in tokens")
    if len(prompt) > row_length:
        raise Dropped("prompt longer than packing.row_length")
    if len(prompt) + len(chosen) + len(rejected) > row_length:
        raise Dropped("prompt, chosen and rejected longer than packing.row_length")
    return prompt, chosen, rejected
