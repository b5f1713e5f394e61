"""A dump of a step whose updates were skipped, one after the other."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpc_jax import sharding
from lpc_jax.files import whole
from lpc_jax.runtime import processes
from lpc_jax.training.run import Run, Update

# How many pairs and parameters a message names before it only counts.
_NAMED = 5


def report(run: Run, update: Update, number: int, in_a_row: int) -> str:
    """Writes ``nonfinite/`` in the run folder and returns a message about it.

    ``step-N.json`` has the pairs of every micro-batch with a non-finite gradient, each
    scored alone, and the names of non-finite parameters and gradients. ``step-N.npz``
    has the micro-batches as packed. ``number`` counts from 0, N from 1.
    """
    rows = run.pack(run.step_indices(number))
    frozen, state = run.policy.frozen, run.state
    companions = run.companions(update.batches)
    gradients: set[str] = set()
    suspects: list[int] = []
    for packed, batch in zip(rows, update.batches, strict=True):
        # Draws are seeded by the step.
        zeros = run.programs.zeros(state.params)
        gradient, _ = run.programs.gradients(
            zeros, state.params, frozen, batch, state.key, state.step - 1, companions
        )
        if wrong := _not_finite(gradient):
            gradients |= set(wrong)
            suspects += packed.pair_id[packed.pair_mask].tolist()
    # In a row together one pair's NaN becomes all others', so each is scored alone.
    pairs = [_scored_alone(run, pair_id) for pair_id in sorted(suspects)]
    parameters = _not_finite(state.params | frozen)
    assert run.folder is not None
    file = run.folder / "nonfinite" / f"step-{number + 1}.json"
    if processes.is_main():
        contents = {
            "step": number + 1,
            "skipped_in_a_row": in_a_row,
            "parameters_not_finite": parameters,
            "gradients_not_finite": sorted(gradients),
            "pairs": sorted(pairs, key=lambda pair: pair["finite"]),
        }
        whole.write(file, json.dumps(contents, indent=1) + "\n")
        arrays = {
            f"{index}/{name}": value
            for index, batch in enumerate(rows)
            for name, value in dataclasses.asdict(batch).items()
            if value is not None
        }
        np.savez(file.with_suffix(".npz"), **arrays)
    named = [p["pair"] for p in pairs if not p["finite"]] or sorted(suspects)
    also = f" Parameters not finite: {_listed(parameters)}." if parameters else ""
    return (
        f"step {number + 1}: {in_a_row} updates in a row were skipped, since their"
        f" gradients were not finite; stopped. Pairs: {_listed(named)}.{also} Look at"
        f" {file.parent}; lower optimizer.learning_rate, compute in float32, or remove"
        " the pairs, and start a new run, or go on from the latest checkpoint with"
        " --resume."
    )


def _scored_alone(run: Run, pair_id: int) -> dict[str, Any]:
    """A pair's loss and rewards; numbers as text since JSON has no NaN."""
    train = run.train.tokens
    index = next(i for i, pair in enumerate(train) if pair.id == pair_id)
    (batch,) = run.pack(np.asarray([index]))
    placed = sharding.place_batch(batch, run.policy.mesh)
    arguments = (run.state.params, run.policy.frozen, placed, run.state.key)
    by_pair = jax.device_get(run.programs.evaluate(*arguments)[1])
    loss, *rewards = map(float, (by_pair["loss"][0, 0], *by_pair["rewards"][0, 0]))
    return {
        "pair": pair_id,
        "source": train[index].source,
        "finite": bool(np.isfinite([loss, *rewards]).all()),
        "loss": str(loss),
        "rewards": [str(reward) for reward in rewards],
    }


def _not_finite(tree: Any) -> list[str]:
    finite = jax.device_get(_all_finite(tree))
    return [path for path, whole in sharding.by_path(finite).items() if not whole]


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _listed(items: Sequence[Any]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return (", ".join(map(str, items[:_NAMED])) or "none") + more
