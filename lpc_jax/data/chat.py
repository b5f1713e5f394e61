"""Turns preference pairs into token ids: chat template, tokenizer, truncation.

Knows nothing of rows, batches or devices.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """Three token strings that share a beginning: prompt, and two answers after it.

    Attributes:
        prompt: Ids of everything not scored: BOS if the tokenizer has one, the
            conversation, the assistant's header.
        chosen: Scored ids of the better answer, ending in the end-of-turn token
            unless ``cut_chosen``.
        rejected: Scored ids of the worse answer, likewise.
        source: Where the pair's prompt comes from, for reports.
        id: The pair's position in the list that was read, unique in it.
        cut_prompt: Whether the prompt's start was cut away.
        cut_chosen: Whether the chosen answer's end was cut away.
        cut_rejected: Whether the rejected answer's end was cut away.
    """

    prompt: Int[np.ndarray, " prompt_tokens"]
    chosen: Int[np.ndarray, " chosen_tokens"]
    rejected: Int[np.ndarray, " rejected_tokens"]
    source: str
    id: int
    cut_prompt: bool
    cut_chosen: bool
    cut_rejected: bool
