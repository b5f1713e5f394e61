"""Before a run's first update: pairs, shape of rows, manifest, programs, memory."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import jax
import numpy as np
from jaxtyping import Int

from lpc_jax import config as cfg
from lpc_jax import loss_table, sharding
from lpc_jax.data import packing, pairs, tokenizer
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.data.pairs import Pairs
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.runtime import fit, processes
from lpc_jax.runtime.policy import described
from lpc_jax.training import memory

if TYPE_CHECKING:
    from lpc_jax.training.run import Run

# Row lengths are chosen on the run's first steps of so many pairs.
_PLANNED_PAIRS = 2048
# Micro-batches of the longest rows that take as long as compiling one more length: 3 s
# for 1.5 s each on a CPU (docs/performance.md), many of a fast device's.
_CPU_COMPILED_ROWS, _COMPILED_ROWS = 2, 50
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")


def read_pairs(
    config: cfg.Config, of_tokenizer: Tokenizer
) -> tuple[Pairs, Pairs | None]:
    """Training pairs, and held-out pairs or None."""
    data, row_length = config.data, config.packing.row_length

    def read(name: Literal["train", "eval"]) -> Pairs:
        about = {"seed": config.training.seed, "row_length": row_length}
        return pairs.load(data, name, of_tokenizer, setting=f"data.{name}", **about)

    train = read("train")
    users(config, train.tokens)  # refused before the held-out pairs are read
    return train, None if data.eval is None else read("eval")


def row_shape(run: Run) -> packing.RowShape:
    """The shape of a micro-batch that all pairs of a run fit."""
    packed, compute = run.config.packing, run.policy.compute
    lengths = packing.pair_lengths(pairs.joined(run.train.tokens, run.held_out.tokens))
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
    steps = [run.step_indices(i) for i in range(min(planned, run.total_steps))]
    rows = _CPU_COMPILED_ROWS if compute.platform == "cpu" else _COMPILED_ROWS
    return packing.choose_row_lengths(
        longest,
        lengths,
        steps,
        choices=packed.length_choices,
        unit=compute.row_unit,
        least_saved=rows * packed.row_length * len(steps) / run.total_steps,
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
    path = cfg.in_words(data.train)
    names = [pair.user for pair in train]
    nameless = names.count("")
    if nameless:
        raise UserError(
            "latent.pool='user' needs a user in every row, named by data.user ="
            f" {data.user!r}, got {nameless} of {len(names)} pairs of {path}"
            " without. Add the field, name another with --data.user, or use"
            " latent.pool='pair'."
        )
    _, numbers, counts = np.unique(names, return_inverse=True, return_counts=True)
    alone = int(np.sum(counts == 1))
    if alone:
        raise UserError(
            "latent.pool='user' needs at least two pairs of every user, got"
            f" {alone} of {len(counts)} users of {path} with one. Leave these"
            " out, or use latent.pool='pair'."
        )
    return numbers.astype(np.int32)


def total_steps(config: cfg.Config, pairs: int) -> int:
    """Updates of a run over this many training pairs."""
    size = config.packing.pairs_per_step
    epoch = packing.steps_per_epoch(pairs, pairs_per_step=size)
    return config.training.steps or config.training.epochs * epoch


def digests(of_tokenizer: Tokenizer, train: Pairs, held_out: Pairs) -> dict[str, str]:
    """SHA-256 digests of the tokenizer and of each set's token ids."""
    return {
        "tokenizer_digest": tokenizer.digest(of_tokenizer),
        "data_digest": train.digest(),
        "held_out_digest": held_out.digest(),
    }


def manifest(run: Run, reference_digest: str) -> dict[str, Any]:
    """A checkpoint's record of its run: settings, digests, versions."""
    return {
        "settings": cfg.flat(run.config.of_all_processes()),
        "weights_digest": run.policy.source.digest,
        "reference_digest": reference_digest,
        "architecture": described(run.policy.architecture),
        **digests(run.policy.tokenizer, run.train, run.held_out),
        "train_pairs": len(run.train),
        "held_out_pairs": len(run.held_out),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }


def describe(run: Run) -> None:
    """Says the model, mesh, batch and objective."""
    config, policy, shape = run.config, run.policy, run.shape
    count, trained, latent = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (policy.whole, policy.params, policy.whole.get("latent", {}))
    )
    share = "" if trained == count else f", {trained / 1e6:.2f} M trained"
    mesh, reason = policy.mesh, policy.compute.reason
    reason = f" ({reason})" if reason else ""
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    run.say(
        f"model: {config.model.path}, {count / 1e6:.1f} M parameters"
        f" ({latent / 1e6:.2f} M latent{share}), compute"
        f" {policy.compute.precision}\n"
        f"mesh: {mesh.size} x {mesh.devices.flat[0].device_kind}, {axes};"
        f" attention: {policy.compute.attention}{reason}; remat:"
        f" {config.model.remat}\n"
        f"batch: {config.packing.pairs_per_step} pairs a step in micro-batches of"
        f" {shape.rows} rows x {' or '.join(map(str, shape.row_lengths))} tokens,"
        f" {shape.scored} scored a row; {run.total_steps} steps\n"
        f"{loss_table.formula(config.loss, config.latent)}"
    )
    if processes.is_main():
        fit.warn_of_length(
            pairs.joined(run.train.tokens, run.held_out.tokens),
            policy.architecture.context_length,
            max_length=config.data.max_length,
        )


def compile_ahead(run: Run) -> int:
    """Compiles the run's largest programs, reports their memory; returns the peak.

    Shorter rows, which take less, are compiled when the first of them comes.
    """
    config, shape, mesh = run.config, run.shape, run.policy.mesh
    state, frozen, programs = run.state, run.policy.frozen, run.programs
    companions = run.companions([])  # as updates pass them, or it compiles once more
    batch = packing.empty_batch(
        shape,
        shape.row_lengths[-1],
        reference_columns=config.loss.reference_columns,
        states=run.train.tokens[0].states,
    )
    arguments = (state.params, frozen, sharding.abstract_batch(batch, mesh))
    of_step = (state.key, state.step, companions)
    gradients = programs.gradients.lower(state.params, *arguments, *of_step)
    compiled = {"gradients": gradients.compile()}
    if len(run.held_out):
        compiled["evaluate"] = programs.evaluate.lower(*arguments, state.key).compile()
    pairs = np.int32(config.packing.pairs_per_step)
    compiled["update"] = programs.update.lower(
        state, state.params, pairs, frozen
    ).compile()
    prediction = memory.predict(
        compiled,
        params=state.params,
        frozen=frozen,
        opt_state=state.opt_state,
        saves_between_updates=config.training.checkpoint_every is not None,
    )
    for line in memory.lines(prediction, _remedies(config, mesh.shape)):
        run.say(line)
    return prediction.peak


def _remedies(config: cfg.Config, mesh: Any) -> list[str]:
    ways = mesh["data"] * mesh["fsdp"]
    remedies = {
        "Set model.remat to block.": config.model.remat != "block",
        f"Lower packing.rows to {ways} (the result does not depend on it).": (
            config.packing.rows > ways
        ),
        "Give mesh.data's devices to mesh.fsdp, which splits parameters.": (
            mesh["data"] > 1
        ),
        "Train adapters=Adapters() over a frozen decoder.": config.trains_decoder,
        "Set adapters.base to int8.": (
            config.adapters is not None and config.base == "compute"
        ),
        "Use more devices, or lower packing.row_length.": True,
    }
    return [text for text, applies in remedies.items() if applies]
