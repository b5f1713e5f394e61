"""Types that all modules share, and the axis letters of their arrays.

B pairs in a step    R rows in a micro-batch   T row length
P pair slots in a row                          S scored positions in a row
D model width        N query heads             K key/value heads
H head width         F MLP width               L layers
V vocabulary         C codes (the paper's K)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Bool, Float, Int

HostOrDevice = Any  # NumPy arrays from packing, JAX arrays once on the mesh
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3  # values of Batch.branch
NO_PAIR = -1  # the value of Batch.pair on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch: R rows, each holding whole pairs with every prompt stored once.

    ``row = | prompt a | chosen a | rejected a | prompt b | chosen b | ... | padding |``

    A query attends to a key iff both are of the same pair, the key is not later in
    ``positions``, and the key is of the prompt or of the query's own answer. Padding is
    known from lengths, never from token ids.
    """

    tokens: Int[HostOrDevice, "R T"]  # 0 on padding
    positions: Int[HostOrDevice, "R T"]  # for RoPE; both answers continue the prompt's
    pair: Int[HostOrDevice, "R T"]  # pair slot in the row, NO_PAIR on padding
    branch: Int[HostOrDevice, "R T"]  # PROMPT, CHOSEN, REJECTED or PADDING
    score_from: Int[HostOrDevice, "R S"]  # index of the hidden state that predicts
    score_token: Int[HostOrDevice, "R S"]  # the token predicted there
    score_slot: Int[HostOrDevice, "R S"]  # 2 * pair slot + side: 0 chosen, 1 rejected
    score_mask: Bool[HostOrDevice, "R S"]  # False on padding
    prompt_end: Int[HostOrDevice, "R P"]  # the last prompt token, where the prior reads
    chosen_end: Int[HostOrDevice, "R P"]  # the last chosen token, for the posterior
    rejected_end: Int[HostOrDevice, "R P"]  # likewise
    pair_mask: Bool[HostOrDevice, "R P"]  # False where a slot is unused
    # The index in the data set; seeds a Gumbel draw, whatever packing and devices.
    pair_id: Int[HostOrDevice, "R P"]
    lengths: Int[HostOrDevice, "R P 2"]  # scored tokens of each answer; 1 on padding
    # Summed, if the loss reads it: of both answers (2), and with ld_alpha below 1 (4)
    # also of both up to the shorter one's length.
    reference_logp: Float[HostOrDevice, "R P _"] | None
    # Of a frozen decoder, read before; each prompt is then its last token alone.
    hidden: Float[HostOrDevice, "R T D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Companions:
    """What a posterior that pools over users reads of all pairs of a step."""

    judged: Float[HostOrDevice, "B inputs"]  # ``models.latent.judged``; no gradient
    user: Int[HostOrDevice, "B"]  # who judged, numbered
    pair_id: Int[HostOrDevice, "B"]  # as in Batch; -1 where there is no pair


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCodes:
    """A belief over codes, of prior or posterior, and the vector drawn from it."""

    logits: Float[Array, "*pairs C"]  # unnormalised
    weights: Float[Array, "*pairs C"]  # the draw or the mean, on the simplex
    vector: Float[Array, "*pairs D"]  # weights @ codebook


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training carries from step to step."""

    step: Int[Array, ""]  # updates done, int32
    params: dict[str, Any]  # the policy's, nested; fp32 masters
    opt_state: Any  # optax's
    key: Array  # the run's; each step folds in its number
