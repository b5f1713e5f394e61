"""A preference pair as token ids."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np
from jaxtyping import Float

from lpc_jax.data.truncation import Ids


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """Three token strings that share a beginning: prompt, and two answers after it."""

    prompt: Ids  # not scored: BOS if there is one, the turns, the assistant's header
    chosen: Ids  # scored; ends in the end-of-turn token unless it is cut
    rejected: Ids  # likewise
    source: str  # where the prompt comes from, for reports
    id: int  # position in what was read, unique in it
    cut_prompt: bool  # at its start
    cut_chosen: bool  # at its end
    cut_rejected: bool
    user: str = ""  # who judged, where known
    # A frozen decoder's, of the prompt's last token and of both answers' tokens.
    states: Float[np.ndarray, "_ D"] | None = dataclasses.field(
        default=None, compare=False, repr=False
    )

    def shared(self) -> TokenizedPair:
        """Both answers cut to the shorter one's length."""
        most, states = min(len(self.chosen), len(self.rejected)), self.states
        if states is not None:  # the first is the prompt's
            chosen, rejected = np.split(states[1:], [len(self.chosen)])
            states = np.concatenate([states[:1], chosen[:most], rejected[:most]])
        cut = {"chosen": self.chosen[:most], "rejected": self.rejected[:most]}
        return dataclasses.replace(self, **cut, states=states)

    def key(self) -> bytes:
        """SHA-1 digest of the three token strings and their lengths."""
        content = hashlib.sha1(usedforsecurity=False)
        for ids in (self.prompt, self.chosen, self.rejected):
            content.update(len(ids).to_bytes(8, "little"))
            content.update(np.asarray(ids, "<i4").tobytes())
        return content.digest()
