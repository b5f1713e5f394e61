"""Reads pairs with a policy, in rows as in training, and returns results in order."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from lpc_jax import sharding
from lpc_jax.data import packing
from lpc_jax.data.hidden_states import HiddenStates
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.errors import UserError
from lpc_jax.models.latent import Steering
from lpc_jax.runtime import fit, programs
from lpc_jax.runtime.policy import Policy, decoder_digest
from lpc_jax.types import Batch

Pairs = Sequence[TokenizedPair]
Program = Callable[..., Any]
Progress = Callable[[int], None]  # told how many pairs are done
# Rows of each device: one keeps a CPU busy and pads least, a few an accelerator.
_CPU_ROWS, _ROWS = 1, 4
# Pairs packed together: enough to fill rows, few enough to plan fast.
GROUP = 512


def _of_slot(arrays: Any, _: Batch, row: int, slot: int) -> Any:
    return jax.tree.map(lambda array: np.array(array[row, slot]), arrays)


def each(
    pairs: Pairs,
    shape: packing.RowShape,
    run: Callable[[Batch], Any],
    *,
    on_progress: Progress = lambda _: None,
    at_once: int | None = None,
    take: Callable[[Any, Batch, int, int], Any] = _of_slot,
) -> list[Any]:
    """A program's result for each pair, in the order of the pairs; ids may repeat.

    Args:
        run: From a micro-batch to arrays.
        at_once: Pairs packed together; None: ``GROUP``.
        take: A pair's part of the arrays, by its row and slot.
    """
    ids = np.asarray([pair.id for pair in pairs], np.int32)
    results: list[Any] = [None] * len(pairs)
    done, size = 0, at_once or GROUP
    for first in range(0, len(pairs), size):
        # Ids may repeat across data sets: while packed, pairs are known by their place.
        group = [
            dataclasses.replace(pair, id=first + i)
            for i, pair in enumerate(pairs[first : first + size])
        ]
        for batch in packing.micro_batches(group, shape, reference_logp=None):
            places, used = batch.pair_id, batch.pair_mask
            batch = dataclasses.replace(batch, pair_id=np.where(used, ids[places], 0))
            arrays = jax.device_get(run(batch))
            for row, slot in np.argwhere(used).tolist():
                results[places[row, slot]] = take(arrays, batch, row, slot)
            done += int(np.sum(used))
            on_progress(done)
    return results


def on_mesh(
    program: Program, params: Any, mesh: Mesh, *arrays: Any
) -> Callable[[Batch], Any]:
    """Binds a program to its parameters; it then takes micro-batches not yet placed."""

    def run(batch: Batch) -> Any:
        with jax.set_mesh(mesh):
            return program(params, sharding.place_batch(batch, mesh), *arrays)

    return run


def _read(
    policy: Policy, pairs: Pairs, program: Program, *arrays: Any, **options: Any
) -> list[Any]:
    run = on_mesh(program, policy.whole, policy.mesh, *arrays)
    return each(pairs, row_shape(policy, pairs), run, **options)


def row_shape(policy: Policy, pairs: Pairs) -> packing.RowShape:
    """The run's rows, or as long as the longest pair; no longer than all pairs."""
    packed, compute = policy.config.packing, policy.compute
    lengths = packing.pair_lengths(pairs)
    totals = lengths.sum(axis=1)
    row_length = min(max(packed.row_length, int(totals.max())), int(totals.sum()))
    ways = policy.mesh.shape["data"] * policy.mesh.shape["fsdp"]
    return packing.row_shape(
        lengths,
        rows=ways * (_CPU_ROWS if compute.platform == "cpu" else _ROWS),
        row_length=row_length + -row_length % compute.row_unit,
        pairs_per_row=packed.pairs_per_row,
        score_chunk=compute.score_chunk,
    )


def score(
    policy: Policy,
    pairs: Pairs,
    *,
    steering: Steering | None,
    seed: int = 0,
    on_progress: Progress = lambda _: None,
) -> Float[np.ndarray, "B 2"]:
    """Summed log-probabilities of both answers; ``steering`` is None without codes."""
    assert (steering is None) == (policy.latent is None)
    fit.warn_of_length(pairs, policy.architecture.context_length)
    chunk = policy.compute.score_chunk
    program = programs.score(
        policy.graph, policy.mesh, steering=steering, seed=seed, chunk=chunk
    )
    logp = np.asarray(_read(policy, pairs, program, on_progress=on_progress))
    _require_finite(policy, logp, "give every answer a finite log-probability")
    return logp


def score_under(
    policy: Policy, pairs: Pairs, mixes: Float[np.ndarray, "M C"]
) -> Float[np.ndarray, "M B 2"]:
    """Summed log-probabilities under each mix of the codes; weights of 0 mean no z."""
    program = programs.score_under(
        policy.graph, policy.mesh, chunk=policy.compute.score_chunk
    )
    logp = _read(policy, pairs, program, mixes.astype(np.float32))
    return np.moveaxis(np.asarray(logp), 1, 0)


class Beliefs(NamedTuple):
    """Logits of prior and posterior, and z of the prior's mean."""

    prior: Float[np.ndarray, "B C"]
    posterior: Float[np.ndarray, "B C"]
    vector: Float[np.ndarray, "B D"]


def believe(
    policy: Policy, pairs: Pairs, *, on_progress: Progress = lambda _: None
) -> Beliefs:
    """Prior, posterior and z of pairs, all finite."""
    program = programs.believe(policy.graph, policy.mesh)
    by_pair = _read(policy, pairs, program, on_progress=on_progress)
    beliefs = Beliefs(*(np.asarray(x, np.float32) for x in zip(*by_pair, strict=True)))
    joined = np.concatenate(beliefs, axis=1)
    _require_finite(policy, joined, "have finite beliefs over its codes")
    return beliefs


def _require_finite(
    policy: Policy, values: Float[np.ndarray, "B _"], duty: str
) -> None:
    bad = int(np.sum(~np.isfinite(values).all(axis=1)))
    if bad:
        raise UserError(
            f"{policy.name} must {duty}, got nan or inf on {bad} of {len(values)}"
            " pairs. Check its weights, or compute in float32."
        )


def kept_states(
    hidden: Float[np.ndarray, "R T D"], batch: Batch, row: int, slot: int
) -> Float[np.ndarray, "_ D"]:
    """A pair's hidden states from its prompt's last token on."""
    return hidden[row, batch.prompt_end[row, slot] : batch.rejected_end[row, slot] + 1]


def with_states(
    policy: Policy, pairs: Pairs, *, say: Callable[[str], None] = lambda _: None
) -> Pairs:
    """Pairs with the cached hidden states of a frozen decoder, else unchanged."""
    if policy.config.decoder != "frozen":
        return pairs
    states = HiddenStates(
        Path(policy.config.model.states_cache),
        decoder_digest=decoder_digest(policy.source.digest, policy.architecture),
        dtype=policy.compute.dtype,
        width=policy.architecture.width,
    )
    shape = row_shape(policy, pairs)
    program = programs.hidden(policy.graph, policy.mesh)
    run = on_mesh(program, policy.whole, policy.mesh)
    read = functools.partial(each, shape=shape, run=run, take=kept_states)
    return states.attach(pairs, read, say)
