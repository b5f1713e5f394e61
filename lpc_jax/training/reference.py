"""The reference's log-probabilities: scored once, cached by content.

Keys are token ids and scored positions; files are per weights, architecture and
precision. A change of learning rate, beta or order finds them again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from lpc_jax import config as cfg
from lpc_jax.data import packing
from lpc_jax.data import pairs as pair_data
from lpc_jax.data import tokenizer as tokenizers
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.pairs import Pairs, of_every_length
from lpc_jax.errors import UserError
from lpc_jax.files import untrusted, whole
from lpc_jax.runtime import loading, processes, programs, reading
from lpc_jax.runtime.policy import Policy, decoder_digest
from lpc_jax.types import Batch

# Pairs re-scored live when a cache is found, and how far they may be off, in nats per
# token: bf16 rounding under another packing stays well below it, other weights don't.
CHECKED_PAIRS = 6
CHECK_TOLERANCE = 0.02
_LOG = logging.getLogger(__name__)
ScoreBatch = Callable[[Batch], Float[np.ndarray, "R P 2"]]


def score_pairs(
    score: ScoreBatch,
    pairs: Sequence[TokenizedPair],
    shape: packing.RowShape,
    on_progress: Callable[[int], None],
) -> Float[np.ndarray, "B 2"]:
    """Summed log-probabilities of every pair's answers, packed as in training."""

    def of_group(done: int) -> None:  # a line of the log for each, not for each batch
        if done % reading.GROUP == 0 or done == len(pairs):
            on_progress(done)

    logp = reading.each(pairs, shape, score, on_progress=of_group)
    return np.asarray(logp, np.float32)


class ReferenceCache:
    """Log-probabilities on disk for one decoder and one compute dtype."""

    def __init__(self, folder: Path, *, decoder_digest: str, compute_dtype: str):
        self.path = folder / f"{decoder_digest[:32]}-{compute_dtype}.npz"
        self._known: dict[bytes, np.ndarray] = {}
        processes.from_main(self._read)

    def _read(self) -> None:
        if not self.path.exists():
            return
        arrays = untrusted.read_arrays(self.path, {"keys": "u1", "logp": "f4"}) or {}
        keys, logp = arrays.get("keys", np.empty(0)), arrays.get("logp")
        if keys.ndim != 2 or logp is None or logp.shape != (len(keys), 2):
            raise UserError(
                f"reference cache {self.path} must be a whole .npz file, got a broken"
                " or truncated one. Delete the file to score again."
            )
        self._known = {k.tobytes(): v for k, v in zip(keys, logp, strict=True)}

    def _store(self) -> None:
        keys = np.frombuffer(b"".join(self._known), np.uint8)
        with whole.writing(self.path) as file:
            np.savez(
                file,
                keys=keys.reshape(len(self._known), -1),
                logp=np.stack(list(self._known.values())),
            )

    def column(
        self,
        score: ScoreBatch,
        pairs: Sequence[TokenizedPair],
        shape: packing.RowShape,
        on_progress: Callable[[int], None],
    ) -> tuple[Float[np.ndarray, "B 2"], int]:
        """The pairs' log-probabilities, and how many had to be scored.

        A few cached ones, of every length, are scored again; they must agree.
        """
        keys = pair_data.keys(pairs)
        unknown = np.full(2, np.nan, np.float32)
        column = np.stack([self._known.get(key, unknown) for key in keys])
        # One process's file decides what all of them score together.
        column = processes.array_from_main(column)
        missing = np.flatnonzero(np.isnan(column[:, 0]))
        cached = np.flatnonzero(~np.isnan(column[:, 0]))
        if len(cached):
            # A window or a stretch of RoPE shows in long pairs alone.
            spread = of_every_length(pair_data.at(pairs, cached), CHECKED_PAIRS)
            chosen = cached[spread]
            checked = pair_data.at(pairs, chosen)
            live = score_pairs(score, checked, shape, lambda _: None)
            off = np.abs(live - column[chosen]) / packing.pair_lengths(checked)[:, 1:]
            self._require_agreement(float(off.max()), len(checked))
        if len(missing):
            scored = score_pairs(
                score, pair_data.at(pairs, missing), shape, on_progress
            )
            _require_finite(scored)
            fresh = {keys[i]: logp for i, logp in zip(missing, scored, strict=True)}
            # By key: a pair that is there twice has one value, now and from the file.
            column[missing] = [fresh[keys[i]] for i in missing]
            self._known |= fresh
            try:
                processes.from_main(self._store)
            except OSError as e:  # the disk is full: what was scored is not lost for it
                _LOG.warning(f"reference.cache: what was scored cannot be kept: {e}")
        return column, len(missing)

    def _require_agreement(self, off: float, count: int) -> None:
        if not off <= CHECK_TOLERANCE:  # so written that NaN fails too
            raise UserError(
                f"reference cache {self.path} must agree with the reference to"
                f" {CHECK_TOLERANCE} nats per token, got {off:.3g} on"
                f" {count} pairs. Delete the file to score again."
            )


def _require_finite(scored: Float[np.ndarray, "B 2"]) -> None:
    bad = int(np.sum(~np.isfinite(scored).all(axis=1)))
    if bad:
        raise UserError(
            "the reference must give every answer a finite log-probability, got nan or"
            f" inf on {bad} of {len(scored)} pairs. Check reference.path or model.path,"
            " or compute in float32."
        )


def columns(
    config: cfg.Config,
    policy: Policy,
    train: Pairs,
    held_out: Pairs,
    shape: packing.RowShape,
    say: Callable[[str], None],
) -> tuple[Float[np.ndarray, "B _"], Float[np.ndarray, "H _"], str]:
    """``loss.reference_columns`` of both sets, and the reference's digest."""
    chunk = policy.compute.score_chunk
    program = programs.score(policy.graph, policy.mesh, chunk=chunk)
    run = reading.on_mesh(program, policy.params, policy.mesh)
    # What a run has trained is no longer what its files hold.
    digest = policy.source.digest if policy.run is None else policy.digest()
    cache = ReferenceCache(
        Path(config.reference.cache),
        decoder_digest=decoder_digest(digest, policy.architecture),
        compute_dtype=policy.compute.precision,
    )
    pairs = pair_data.joined(train.tokens, held_out.tokens)
    sets = [pairs]
    if config.loss.ld_alpha < 1:
        # Up to the shorter answer's length: pairs of their own, with keys of their own.
        sets.append([pair.shared() for pair in pairs])
    both = []
    for of_set in sets:
        column, scored = cache.column(
            lambda batch: np.asarray(jax.device_get(run(batch))),
            of_set,
            shape.of_one_length,
            lambda done: say(f"reference: {done} pairs scored"),
        )
        known = len(of_set) - scored
        say(f"reference: {scored} pairs scored, {known} found in {cache.path}")
        both.append(column)
    column = np.concatenate(both, axis=1)
    return column[: len(train)], column[len(train) :], digest


def outline(config: cfg.Config, policy: Policy) -> Policy | None:
    """The reference at ``reference.path`` without its arrays; None without a path.

    Raises:
        UserError: No such model, or one with other tokens than the policy.
    """
    if config.reference.path is None:
        return None
    settings = dataclasses.replace(
        config.model, path=config.reference.path, revision=None
    )
    model = loading.find_model(settings, setting="reference.path")
    if not tokenizers.is_beside(model.path):  # then it is the policy's
        own = config.model.tokenizer or str(policy.source.path)
        own = dataclasses.replace(settings, tokenizer=own)
        model = dataclasses.replace(model, model=own)
    made = loading.outline(
        model,
        mesh=policy.mesh,
        train_decoder=config.trains_decoder,
        row_length=config.packing.row_length,
        base=config.base,
    )
    policy.require_vocabulary(made, "Choose a reference.path of the same family.")
    return made
