"""What a system says of preference pairs: log-probs, lengths, and rewards of these.

The answers are scored in training's packed batch, so that a run's numbers are those
that it logged. Knows nothing of intervals or tables.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from lpc_jax import assembly, objective, sharding
from lpc_jax import config as cfg
from lpc_jax.data import chat, examples, packing
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.examples import PreferenceExample
from lpc_jax.data.report import Drops, Report
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.evaluation.steering import Steering
from lpc_jax.evaluation.system import System
from lpc_jax.models import weights
from lpc_jax.types import Batch

# Rows of each device: one keeps a CPU busy and wastes least, a few an accelerator.
_CPU_ROWS, _ROWS = 1, 4

# Pairs packed together: enough to fill rows, few enough to plan fast.
_GROUP = 512


def read(
    paths: Sequence[str],
    *,
    split: str | None,
    limit: int | None,
    user: str = examples.USER,
) -> tuple[list[PreferenceExample], Drops]:
    """The pairs of some files or hub data sets, one after the other.

    Args:
        paths: As ``--pairs`` names them.
        split: Of hub data sets.
        limit: Read only so many rows of each, from the first; None: all.
        user: Field of a row that says who judged.

    Returns:
        The pairs, ``index`` their place in the list, and rows that hold none.

    Raises:
        UserError: Data that cannot be had or read, or that holds no pair.
    """
    found: list[PreferenceExample] = []
    drops = Drops.count([])
    for path in paths:
        some, dropped = examples.read(
            path, setting="pairs", split=split, limit=limit, user=user
        )
        found += some
        drops += dropped
    placed = [dataclasses.replace(one, index=i) for i, one in enumerate(found)]
    return placed, drops


def prompt_key(example: PreferenceExample) -> str:
    """The same for pairs of the same conversation, whatever file they are of."""
    text = json.dumps([sorted(message.items()) for message in example.prompt])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def digest(some: Sequence[PreferenceExample]) -> str:
    """SHA-256 over the texts and sources of pairs, in order."""
    content = hashlib.sha256()
    for one in some:
        row = (one.prompt, one.chosen, one.rejected, one.source)
        content.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return content.hexdigest()


def tokenize(
    some: Sequence[PreferenceExample],
    tokenizer: Tokenizer,
    drops: Drops,
    *,
    data: cfg.Data,
) -> tuple[list[TokenizedPair], Report]:
    """Pairs as token ids, by a run's rules; ``id`` is the place that ``read`` gave.

    Args:
        some: From ``read``.
        tokenizer: Of the system that is asked.
        drops: From ``read``.
        data: Lengths and truncation.

    Raises:
        UserError: As ``chat.tokenize``.
    """
    return chat.tokenize(
        some,
        tokenizer,
        drops=drops,
        max_length=data.max_length,
        max_prompt_length=data.max_prompt_length,
        # A row is made as long as the longest pair: the prompt is there once.
        row_length=2 * data.max_length,
        truncation=data.truncation,
        prefix_mismatch=data.prefix_mismatch,
    )


def tokens_digest(some: Sequence[TokenizedPair]) -> bytes:
    """SHA-256 over the token ids of pairs, in order."""
    content = hashlib.sha256()
    for pair in some:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            content.update(len(ids).to_bytes(8, "little"))
            content.update(np.asarray(ids, "<i4").tobytes())
    return content.digest()


def lengths(some: Sequence[TokenizedPair]) -> Int[np.ndarray, "B 2"]:
    """Scored tokens of the chosen and the rejected answers."""
    return packing.pair_lengths(some)[:, 1:]


def score(
    system: System,
    some: Sequence[TokenizedPair],
    *,
    steering: Steering | None,
    seed: int,
    on_progress: Callable[[int], None],
) -> Float[np.ndarray, "B 2"]:
    """Summed log-probabilities of every pair's chosen and rejected answer.

    Args:
        system: What is asked.
        some: Pairs in the system's tokens.
        steering: How z is chosen; None for a system without codes.
        seed: Of ``sample``; each pair folds in its own id.
        on_progress: Told how many pairs are done.

    Raises:
        UserError: The system gives an answer no finite log-probability.
    """
    assert (steering is None) == (system.latent is None)
    program = _program(system, steering, seed)
    shape = row_shape(system, some)
    found = np.full((len(some), 2), np.nan, np.float32)
    place = {pair.id: i for i, pair in enumerate(some)}
    with jax.set_mesh(system.mesh):
        for first in range(0, len(some), _GROUP):
            group = some[first : first + _GROUP]
            done = first
            for batch in packing.micro_batches(group, shape, reference_logp=None):
                mask = np.asarray(batch.pair_mask)
                logp = program(system.params, sharding.place_batch(batch, system.mesh))
                at = [place[i] for i in np.asarray(batch.pair_id)[mask].tolist()]
                found[at] = np.asarray(jax.device_get(logp))[mask]
                done += int(mask.sum())
                on_progress(done)
    bad = int(np.sum(~np.isfinite(found).all(axis=1)))
    if bad:
        raise UserError(
            f"{system.name} must give every answer a finite log-probability, got nan or"
            f" inf on {bad} of {len(some)} pairs. Check its weights, or compute in"
            " float32."
        )
    return found


def score_under(
    system: System,
    some: Sequence[TokenizedPair],
    mixes: Float[np.ndarray, "M C"],
    *,
    on_progress: Callable[[int], None],
) -> Float[np.ndarray, "M B 2"]:
    """Summed log-probabilities of answers under each of some mixes of the codes.

    Decoder and head meet every pair once.

    Args:
        system: With codes.
        some: Pairs in its tokens.
        mixes: Weights of the codes; all 0 is no z.
        on_progress: Told how many pairs are done.
    """
    chunk = assembly.score_chunk(system.config, sharding.platform(system.mesh))

    @functools.partial(
        jax.jit, out_shardings=NamedSharding(system.mesh, PartitionSpec())
    )
    def program(params: dict[str, Any], batch: Batch, mixes: Array) -> Array:
        policy = nnx.merge(system.graph, params)
        return objective.logp_under(policy, batch, mixes, chunk=chunk)

    shape = row_shape(system, some)
    found = np.full((len(mixes), len(some), 2), np.nan, np.float32)
    place = {pair.id: i for i, pair in enumerate(some)}
    done = 0
    with jax.set_mesh(system.mesh):
        for first in range(0, len(some), _GROUP):
            group = some[first : first + _GROUP]
            for batch in packing.micro_batches(group, shape, reference_logp=None):
                mask = np.asarray(batch.pair_mask)
                placed = sharding.place_batch(batch, system.mesh)
                logp = program(system.params, placed, mixes.astype(np.float32))
                at = [place[i] for i in np.asarray(batch.pair_id)[mask].tolist()]
                found[:, at] = np.asarray(jax.device_get(logp))[:, mask]
                done += int(mask.sum())
                on_progress(done)
    return found


def with_states(
    system: System, some: Sequence[TokenizedPair]
) -> Sequence[TokenizedPair]:
    """Pairs with the decoder's hidden states where a run has kept them, else as given.

    Raises:
        UserError: As ``HiddenStates``.
    """
    config, mesh = system.config, system.mesh
    if config.decoder != "frozen":
        return some
    digest = weights.digest(system.source.path)
    platform = sharding.platform(mesh)
    kept = assembly.kept_states(config, system.architecture, digest, platform)
    read = assembly.hidden_reader(system.graph, system.params, mesh)
    with jax.set_mesh(mesh):
        return kept.attach(some, read, row_shape(system, some), lambda _: None)


def _program(
    system: System, steering: Steering | None, seed: int
) -> Callable[[dict[str, Any], Batch], Array]:
    """Jitted: parameters and a placed micro-batch to log-probabilities."""
    chunk = assembly.score_chunk(system.config, sharding.platform(system.mesh))

    # Whole on every device: few numbers, read at once.
    @functools.partial(
        jax.jit, out_shardings=NamedSharding(system.mesh, PartitionSpec())
    )
    def program(params: dict[str, Any], batch: Batch) -> Array:
        scores = objective.score_inference(
            nnx.merge(system.graph, params),
            batch,
            steering=steering,
            key=jax.random.key(seed),
            chunk=chunk,
        )
        return scores.logp

    return program


def row_shape(system: System, some: Sequence[TokenizedPair]) -> packing.RowShape:
    """Rows as the run has them, or as long as the longest pair; no longer than all."""
    config, mesh = system.config, system.mesh
    platform = sharding.platform(mesh)
    of_pairs = packing.pair_lengths(some)
    totals = of_pairs.sum(axis=1)
    wanted = max(config.packing.row_length, int(totals.max()))
    wanted = min(wanted, int(totals.sum()))
    wanted += -wanted % assembly.row_unit(config, platform)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    return packing.row_shape(
        of_pairs,
        rows=ways * (_CPU_ROWS if platform == "cpu" else _ROWS),
        row_length=wanted,
        pairs_per_row=config.packing.pairs_per_row,
        score_chunk=assembly.score_chunk(config, platform),
    )
