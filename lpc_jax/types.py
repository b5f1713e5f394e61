"""The nouns every room shares, and the letters of their axes.

Knows nothing of files, models or devices. The only axis letters used anywhere:

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

# NumPy arrays as packing makes them, JAX arrays once they are on the mesh.
HostOrDevice = Any

# Values of Batch.branch.
PROMPT, CHOSEN, REJECTED, PADDING = 0, 1, 2, 3

# Values of Batch.pair on padding.
NO_PAIR = -1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One micro-batch: R rows, each holding whole pairs with every prompt stored once.

    ``row = | prompt a | chosen a | rejected a | prompt b | chosen b | ... | padding |``

    A query attends to a key iff both are of the same pair, the key is not later in
    ``positions``, and the key is of the prompt or of the query's own answer. Padding
    is known from lengths, never from token ids.

    Attributes:
        tokens: Token ids; 0 on padding.
        positions: RoPE positions; both answers continue from the prompt's end.
        pair: Pair slot of each token in its row, ``NO_PAIR`` on padding.
        branch: ``PROMPT``, ``CHOSEN``, ``REJECTED`` or ``PADDING``.
        score_from: Index in the row of the hidden state that predicts.
        score_token: The token predicted there.
        score_slot: ``2 * pair slot + side``, side 0 for chosen and 1 for rejected.
        score_mask: False where a scored position is padding.
        prompt_end: Index of the last prompt token, where the prior reads.
        chosen_end: Index of the last chosen token, where the posterior reads.
        rejected_end: Index of the last rejected token, likewise.
        pair_mask: False where a pair slot is unused.
        pair_id: The pair's index in its data set; seeds its Gumbel draw, so that the
            draw depends neither on packing nor on devices.
        lengths: Scored tokens of the chosen and the rejected answer; 1 on padding.
        reference_logp: Summed log-probabilities under the reference, or None for a
            loss that has no reference.
        hidden: The decoder's last hidden states, where it is frozen and they were read
            before; of each prompt a row then holds the last token alone.
    """

    tokens: Int[HostOrDevice, "R T"]
    positions: Int[HostOrDevice, "R T"]
    pair: Int[HostOrDevice, "R T"]
    branch: Int[HostOrDevice, "R T"]
    score_from: Int[HostOrDevice, "R S"]
    score_token: Int[HostOrDevice, "R S"]
    score_slot: Int[HostOrDevice, "R S"]
    score_mask: Bool[HostOrDevice, "R S"]
    prompt_end: Int[HostOrDevice, "R P"]
    chosen_end: Int[HostOrDevice, "R P"]
    rejected_end: Int[HostOrDevice, "R P"]
    pair_mask: Bool[HostOrDevice, "R P"]
    pair_id: Int[HostOrDevice, "R P"]
    lengths: Int[HostOrDevice, "R P 2"]
    reference_logp: Float[HostOrDevice, "R P 2"] | None
    hidden: Float[HostOrDevice, "R T D"] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Companions:
    """What the posterior reads of all pairs of a step, for one that pools over users.

    Attributes:
        judged: As ``models.latent.judged``; no gradient flows into it.
        user: Who judged, numbered.
        pair_id: As in ``Batch``; -1 where there is no pair.
    """

    judged: Float[HostOrDevice, "B inputs"]
    user: Int[HostOrDevice, "B"]
    pair_id: Int[HostOrDevice, "B"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentCodes:
    """A belief over codes and the vector drawn from it, of prior or posterior alike.

    Attributes:
        logits: Unnormalised log-weights.
        weights: The draw (or the mean): a point on the simplex.
        vector: ``weights @ codebook``, added to hidden states before the head.
    """

    logits: Float[Array, "*pairs C"]
    weights: Float[Array, "*pairs C"]
    vector: Float[Array, "*pairs D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything a step changes.

    Attributes:
        step: Updates done so far, an int32 scalar.
        params: Nested dict of the policy's parameters, fp32 masters.
        opt_state: What optax keeps.
        key: The run's PRNG key; a step's randomness is folded from it and ``step``.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    opt_state: Any
    key: Array
