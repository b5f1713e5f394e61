"""Runs a policy from a file's weights: its logits, updates and TRL's trajectories.

Knows nothing of where the numbers that these are compared with come from.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lpc_jax import config as cfg
from lpc_jax import objective, sharding
from lpc_jax.data import packing
from lpc_jax.data.pair import TokenizedPair
from lpc_jax.metrics import values
from lpc_jax.models import leaves, network, weights
from lpc_jax.training import optimizer as optimizers
from lpc_jax.training import step
from tests import tiny

# The losses of golden/make_trl_trajectories.py's runs.
TRL_LOSSES = {
    "dpo": cfg.Dpo(beta=0.1),
    "ipo": cfg.Ipo(beta=0.1, reduction="mean"),
    "simpo": cfg.Simpo(beta=2.0, gamma=1.0),
    "dpo_accumulated": cfg.Dpo(beta=0.1),
    "dpo_sft": cfg.Dpo(beta=0.1, sft_weight=0.5),
    "dpo_ld": cfg.Dpo(beta=0.1, ld_alpha=0.4),
    "hinge": cfg.Hinge(beta=0.1),
    "robust": cfg.Robust(beta=0.1, label_smoothing=0.1),
    "sigmoid_norm": cfg.SigmoidNorm(beta=5.0),
    "apo_zero": cfg.ApoZero(beta=0.1),
    "apo_down": cfg.ApoDown(beta=0.1),
    "exo_pair": cfg.ExoPair(beta=0.1, label_smoothing=1e-3),
    "nca_pair": cfg.NcaPair(beta=0.1),
    "sppo_hard": cfg.SppoHard(beta=0.05),
    "orpo": cfg.Orpo(beta=0.5),
    "cpo": cfg.Cpo(beta=0.1),
}
_SCORE_CHUNK = 32


class Harness:
    """The programs of a step on a mesh, from given parameters."""

    def __init__(self, graph, params, config, *, steps, devices=1, tensor=1):
        self.config = config
        self.mesh = sharding.make_mesh(
            data=1, fsdp=-1, tensor=tensor, devices=jax.devices()[:devices]
        )
        shapes = jax.eval_shape(lambda: params)
        shardings = leaves.shardings(shapes, self.mesh)
        optimizer = optimizers.build(config, shapes, steps)
        with jax.set_mesh(self.mesh):
            placed = jax.tree.map(jax.device_put, params, shardings)
            # A copy, since the state is donated and device_put may alias.
            placed = jax.tree.map(jnp.copy, placed)
            layout = step.state_shardings(placed, optimizer, self.mesh)
            self.programs = step.build(
                config,
                graph,
                layout,
                optimizer,
                steps,
                chunk=config.model.score_chunk or 128,
            )
            key = jax.random.key(1)
            self.state = step.initial_state(placed, optimizer, key, layout)

    def update(self, batches, pairs):
        placed = [sharding.place_batch(batch, self.mesh) for batch in batches]
        gradients, sums = self.programs.summed_gradients(self.state, {}, placed)
        self.state, norm, finite = self.programs.update(
            self.state, gradients, jnp.asarray(pairs), {}
        )
        return values(sums), float(norm), bool(finite)


def load_policy(path: Path, *, remat: str = "none") -> tuple[nnx.GraphDef, Any]:
    """Graph and parameters, in fp32, of a plain policy with a file's weights."""
    architecture = weights.read_architecture(path)
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    decoder = weights.load(
        path, architecture, dtype_of=lambda _: jnp.float32, sharding_of=lambda _: here
    )
    graph, _ = nnx.split(
        nnx.eval_shape(
            lambda: network.build(
                architecture,
                compute_dtype=jnp.dtype("float32"),
                attention_backend="blocks",
                remat=remat,
                adapters=None,
                latent=None,
                key=jax.random.key(0),
            )
        )
    )
    return graph, {"decoder": decoder}


def logits(graph: nnx.GraphDef, params: Any, tokens: Any) -> tuple[Any, Any]:
    """Hidden states and logits of plain sequences, each one prompt."""
    tokens = jnp.asarray(tokens)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    zeros = jnp.zeros_like(tokens)
    model = nnx.merge(graph, params)
    hidden = model.decoder(tokens, positions, zeros, zeros)
    return hidden, hidden @ model.decoder.head_weight.T


def pairs_of_ids(rows: Sequence[dict[str, list[int]]]) -> list[TokenizedPair]:
    """Pairs from lists of ids, numbered from 0."""
    found = []
    for index, row in enumerate(rows):
        ids = (np.asarray(row[p], np.int32) for p in ("prompt", "chosen", "rejected"))
        found.append(TokenizedPair(*ids, "", index, False, False, False))
    return found


def logp_of(
    score: Callable[[Any], Any], pairs: list[TokenizedPair], shape: packing.RowShape
) -> np.ndarray:
    """Log-probability of each answer, in the order of the pairs."""
    index = {pair.id: i for i, pair in enumerate(pairs)}
    found = np.zeros((len(pairs), 2), np.float32)
    for batch in packing.micro_batches(pairs, shape, reference_logp=None):
        mask = batch.pair_mask
        where = [index[i] for i in batch.pair_id[mask].tolist()]
        found[where] = np.asarray(score(batch))[mask]
    return found


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """What a run did.

    Attributes:
        losses: Of each step.
        norms: Of each step's gradient, before clipping.
        logp: [steps, pairs in a step, 2], chosen and rejected, before each update.
        held_out_logp: [pairs, 2], after the last update.
        micro_batches: In each step.
    """

    losses: np.ndarray
    norms: np.ndarray
    logp: np.ndarray
    held_out_logp: np.ndarray
    micro_batches: list[int]


def _both(numbers: dict[str, Any]) -> np.ndarray:
    return np.stack([numbers["chosen_logp"], numbers["rejected_logp"]], axis=1)


def recorded(run: dict[str, Any]) -> Trajectory:
    """TRL's run as golden/make_trl_trajectories.py records it."""
    steps = run["steps"]
    micro_batches = run["settings"].get("gradient_accumulation_steps", 1)
    return Trajectory(
        losses=np.array([step["loss"] for step in steps]),
        norms=np.array([step["grad_norm"] for step in steps]),
        logp=np.stack([_both(step) for step in steps]),
        held_out_logp=_both(run["held_out_after"]),
        micro_batches=[micro_batches] * len(steps),
    )


@functools.partial(jax.jit, static_argnums=0)
def _score(graph, params, batch):
    return objective.score_inference(
        nnx.merge(graph, params),
        batch,
        steering=None,
        key=jax.random.key(0),
        chunk=_SCORE_CHUNK,
    ).logp


def follow(
    folder: Path,
    rows: Sequence[dict[str, list[int]]],
    run: dict[str, Any],
    loss: cfg.Loss,
    settings: dict[str, Any],
) -> Trajectory:
    """Our run over the rows that TRL's steps saw, from the same weights.

    Args:
        folder: The model before the first step.
        rows: Ids of every pair.
        run: As golden/make_trl_trajectories.py records it.
        loss: In our words.
        settings: TRL's, shared by every run.
    """
    config = tiny.config(
        loss=loss,
        latent=None,
        optimizer=cfg.Optimizer(
            learning_rate=settings["learning_rate"],
            options={
                "b1": settings["adam_beta1"],
                "b2": settings["adam_beta2"],
                "eps": settings["adam_epsilon"],
                "weight_decay": settings["weight_decay"],
            },
            schedule="constant",
            warmup_fraction=0.0,
            clip_norm=settings["max_grad_norm"],
        ),
    )
    graph, params = load_policy(folder, remat="block")
    every = pairs_of_ids(rows)
    # Accumulated: rows so short that 4 pairs need at least two micro-batches.
    accumulated = "gradient_accumulation_steps" in run["settings"]
    shape = packing.row_shape(
        packing.pair_lengths(every),
        rows=1 if accumulated else 4,
        row_length=160,
        pairs_per_row=4,
        score_chunk=_SCORE_CHUNK,
    )
    harness = Harness(graph, params, config, steps=len(run["steps"]))

    def logp(indices, pairs=every):
        some = [pairs[i] for i in indices]
        params = harness.state.params
        return logp_of(lambda batch: _score(graph, params, batch), some, shape)

    losses, norms, logps, micro_batches = [], [], [], []
    with jax.set_mesh(harness.mesh):
        reference, numbers = None, range(len(every))
        if loss.needs_reference:
            reference = logp(numbers)
        if loss.ld_alpha < 1:
            shared = logp(numbers, [pair.shared() for pair in every])
            reference = np.concatenate([reference, shared], axis=1)
        for expected in run["steps"]:
            indices = expected["rows"]
            logps.append(logp(indices))
            column = None if reference is None else reference[indices]
            some = [every[i] for i in indices]
            batches = packing.micro_batches(some, shape, reference_logp=column)
            metrics, norm, _ = harness.update(batches, len(some))
            losses.append(metrics["loss/total"])
            norms.append(norm)
            micro_batches.append(len(batches))
        held_out = logp(run["held_out_after"]["rows"])
    return Trajectory(
        losses=np.array(losses),
        norms=np.array(norms),
        logp=np.stack(logps),
        held_out_logp=held_out,
        micro_batches=micro_batches,
    )
