"""Before a run's first update: manifest, description, compilation, memory."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from lpc_jax import config as cfg
from lpc_jax import loss_table, sharding
from lpc_jax.data import packing, tokenizer
from lpc_jax.data.pairs import Pairs
from lpc_jax.runtime import processes
from lpc_jax.training import memory

if TYPE_CHECKING:
    from lpc_jax.training.run import Run


def require_one_run(config: cfg.Config, digests: dict[str, str]) -> None:
    """Refuses processes with another config, data or JAX before any waits for them."""
    settings = cfg.flat(config.of_all_processes())
    processes.require_agreement(
        settings | digests | {"jax": jax.__version__},
        "Start every process with the same command, code and data.",
    )


def digests(
    of_tokenizer: tokenizer.Tokenizer, train: Pairs, held_out: Pairs
) -> dict[str, str]:
    """SHA-256 digests of the tokenizer and of each set's token ids."""
    return {
        "tokenizer_digest": tokenizer.digest(of_tokenizer),
        "data_digest": train.digest(),
        "held_out_digest": held_out.digest(),
    }


def manifest(run: Run, reference_digest: str) -> dict[str, Any]:
    """A checkpoint's record of its run: settings, digests, versions."""
    packages = (
        *("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers"),
    )
    return {
        "settings": cfg.flat(run.config.of_all_processes()),
        "weights_digest": run.policy.source.digest,
        "reference_digest": reference_digest,
        **digests(run.policy.tokenizer, run.train, run.held_out),
        "train_pairs": len(run.train),
        "held_out_pairs": len(run.held_out),
        "devices": [device.device_kind for device in jax.devices()],
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
    }


def describe(run: Run) -> None:
    """Says the model, mesh, batch and objective."""
    config, policy, shape = run.config, run.policy, run.shape
    count, trained, latent = (
        sum(leaf.size for leaf in jax.tree.leaves(tree))
        for tree in (policy.whole, policy.params, policy.whole.get("latent", {}))
    )
    share = "" if trained == count else f", {trained / 1e6:.2f} M trained"
    mesh = policy.mesh
    axes = " ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    run.say(
        f"model: {config.model.path}, {count / 1e6:.1f} M parameters"
        f" ({latent / 1e6:.2f} M latent{share}), compute"
        f" {policy.compute.dtype.name}\n"
        f"mesh: {mesh.size} x {mesh.devices.flat[0].device_kind}, {axes};"
        f" attention: {policy.compute.attention}; remat: {config.model.remat}\n"
        f"batch: {config.packing.pairs_per_step} pairs a step in micro-batches of"
        f" {shape.rows} rows x {' or '.join(map(str, shape.row_lengths))} tokens,"
        f" {shape.scored} scored a row; {run.total_steps} steps\n"
        f"{loss_table.formula(config.loss, config.latent)}"
    )


def compile_ahead(run: Run) -> int:
    """Compiles the run's programs, reports their memory; returns the peak in bytes."""
    config, shape, mesh = run.config, run.shape, run.policy.mesh
    state = run.abstract_state()
    frozen = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=leaf.sharding
        ),
        run.policy.frozen,
    )
    companions = run.companions([])  # as updates pass them, or it compiles once more
    compiled: dict[str, Any] = {}
    for length in shape.row_lengths:
        batch = sharding.abstract_batch(
            packing.empty_batch(
                shape,
                length,
                with_reference=run.reference is not None,
                states=run.train.tokens[0].states,
            ),
            mesh,
        )
        compiled[f"gradients {length}"] = run.programs.gradients.lower(
            state.params, frozen, batch, state.key, state.step, companions
        ).compile()
        if len(run.held_out):
            compiled[f"evaluate {length}"] = run.programs.evaluate.lower(
                state.params, frozen, batch, state.key
            ).compile()
    pairs = np.int32(config.packing.pairs_per_step)
    compiled["update"] = run.programs.update.lower(
        state, state.params, pairs, frozen
    ).compile()
    tokens = float(packing.pair_lengths(run.train.tokens).sum(axis=1).mean())
    in_a_step = min(config.packing.pairs_per_step, len(run.train)) * tokens
    prediction = memory.predict(
        compiled,
        params=state.params,
        frozen=frozen,
        opt_state=state.opt_state,
        several_micro_batches=in_a_step > shape.rows * max(shape.row_lengths),
        saves_between_updates=config.training.checkpoint_every is not None,
    )
    for line in memory.lines(prediction, _remedies(config, mesh.shape)):
        run.say(line)
    return prediction.peak


def _remedies(config: cfg.Config, mesh: Any) -> list[str]:
    remedies = []
    if config.model.remat != "block":
        remedies.append("Set model.remat to block.")
    ways = mesh["data"] * mesh["fsdp"]
    if config.packing.rows > ways:
        remedies.append(
            f"Lower packing.rows to {ways} (the result does not depend on it)."
        )
    if mesh["data"] > 1:
        remedies.append(
            "Give mesh.data's devices to mesh.fsdp, which splits parameters."
        )
    if config.trains_decoder:
        remedies.append("Train adapters=Adapters() over a frozen decoder.")
    return [*remedies, "Use more devices, or lower packing.row_length."]
