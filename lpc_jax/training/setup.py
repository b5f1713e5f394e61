"""A run's pairs, and the shape of the rows that they are packed into."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from lpc_jax import config as cfg
from lpc_jax.data import packing, pairs
from lpc_jax.data.chat import TokenizedPair
from lpc_jax.data.pairs import Pairs
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.runtime.compute import Compute

# Row lengths are chosen on the run's first steps of so many pairs.
_PLANNED_PAIRS = 2048


def read_pairs(config: cfg.Config, tokenizer: Tokenizer) -> tuple[Pairs, Pairs | None]:
    """Training pairs, and held-out pairs or None."""
    data = config.data
    rules = {
        **pairs.rules(data),
        "user": data.user,
        "row_length": config.packing.row_length,
    }

    def read(path: str, setting: str, split: str, limit: int | None) -> Pairs:
        return pairs.load(
            path, tokenizer, setting=setting, split=split, limit=limit, **rules
        )

    train = read(data.train, "data.train", data.train_split, data.limit)
    users(config, train.tokens)  # refused before the held-out pairs are read
    if data.eval is None:
        return train, None
    return train, read(data.eval, "data.eval", data.eval_split, data.eval_limit)


def shape(
    config: cfg.Config,
    train: Sequence[TokenizedPair],
    held_out: Sequence[TokenizedPair],
    users: Int[np.ndarray, "_"] | None,
    compute: Compute,
) -> packing.RowShape:
    """The shape of a micro-batch that all pairs fit."""
    packed = config.packing
    lengths = packing.pair_lengths([*train, *held_out])
    longest = packing.row_shape(
        lengths,
        rows=packed.rows,
        row_length=packed.row_length,
        pairs_per_row=packed.pairs_per_row,
        score_chunk=compute.score_chunk,
    )
    if packed.length_choices == 1:
        return longest
    planned = -(-_PLANNED_PAIRS // packed.pairs_per_step)
    steps = [
        step_indices(config, len(train), number, users)
        for number in range(min(planned, total_steps(config, len(train))))
    ]
    return packing.choose_row_lengths(
        longest, lengths, steps, choices=packed.length_choices, unit=compute.row_unit
    )


def step_indices(
    config: cfg.Config, pairs: int, number: int, users: Int[np.ndarray, "_"] | None
) -> Int[np.ndarray, "B"]:
    """Which of so many training pairs a step takes; ``number`` counts from 0."""
    return packing.step_indices(
        pairs,
        step=number,
        pairs_per_step=config.packing.pairs_per_step,
        seed=config.training.seed,
        users=users,
    )


def users(
    config: cfg.Config, train: Sequence[TokenizedPair]
) -> Int[np.ndarray, "B"] | None:
    """The user of each pair, numbered, if the latent pools over users; else None.

    Raises:
        UserError: A pair without a user, or a user with one pair.
    """
    if config.latent is None or config.latent.pool != "user":
        return None
    data = config.data
    names = [pair.user for pair in train]
    nameless = names.count("")
    if nameless:
        raise UserError(
            "latent.pool='user' needs a user in every row, named by data.user ="
            f" {data.user!r}, got {nameless} of {len(names)} pairs of {data.train}"
            " without. Add the field, name another with --data.user, or use"
            " latent.pool='pair'."
        )
    _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    alone = int(np.sum(counts == 1))
    if alone:
        raise UserError(
            "latent.pool='user' needs at least two pairs of every user, got"
            f" {alone} of {len(counts)} users of {data.train} with one. Leave these"
            " out, or use latent.pool='pair'."
        )
    return numbers.astype(np.int32)


def total_steps(config: cfg.Config, pairs: int) -> int:
    """Updates of a run over this many training pairs."""
    size = config.packing.pairs_per_step
    epoch = packing.steps_per_epoch(pairs, pairs_per_step=size)
    return config.training.steps or config.training.epochs * epoch
