"""What to look at when updates are skipped one after the other: a dump of one step.

Knows nothing of when a run gives up.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lpc_jax import processes, sharding
from lpc_jax.training.trainer import Trainer
from lpc_jax.types import Batch, TrainState

# How many pairs and parameters a message names before it only counts.
_NAMED = 5


def report(
    trainer: Trainer,
    state: TrainState,
    batches: Sequence[Batch],
    number: int,
    in_a_row: int,
) -> str:
    """Writes ``nonfinite/`` in the run folder and says what is there.

    ``step-N.json`` has every pair of the step with its source and losses, and which
    parameters and gradients hold a number that is not finite; ``step-N.npz`` the
    step's micro-batches as they were scored.

    Args:
        trainer: Of the run.
        state: After the skipped update, its parameters those of before.
        batches: The step's micro-batches, on the mesh.
        number: The step's, counted from 0.
        in_a_row: Updates skipped up to this one.
    """
    pairs: list[dict[str, Any]] = []
    gradients: set[str] = set()
    sources = {pair.id: pair.source for pair in trainer.pairs.train}
    places = trainer.step_rows(number)
    for packed, batch in zip(places, batches, strict=True):
        frozen = trainer.start.frozen
        step = jax.tree.map(lambda x: x - 1, state.step)  # draws are seeded by it
        found, _ = trainer.programs.gradients(
            state.params, frozen, batch, state.key, step
        )
        wrong = _not_finite(found)
        gradients |= set(wrong)
        _, by_pair = trainer.programs.evaluate(state.params, frozen, batch, state.key)
        by_pair = jax.device_get(by_pair)
        for place in zip(*np.nonzero(packed.pair_mask), strict=True):
            pair_id = int(packed.pair_id[place])
            loss = float(by_pair["loss"][place])
            rewards = [float(x) for x in by_pair["rewards"][place]]
            finite = bool(np.isfinite([loss, *rewards]).all())
            pairs.append(
                {
                    "pair": pair_id,
                    "source": sources[pair_id],
                    "finite": finite,
                    "loss": str(loss),
                    "rewards": [str(x) for x in rewards],
                    "in_a_micro_batch_with_a_finite_gradient": not wrong,
                }
            )
    folder = trainer.folder / "nonfinite"
    contents = {
        "step": number + 1,
        "skipped_in_a_row": in_a_row,
        "parameters_not_finite": _not_finite(state.params | trainer.start.frozen),
        "gradients_not_finite": sorted(gradients),
        "pairs": sorted(pairs, key=lambda pair: (pair["finite"], pair["pair"])),
    }
    if processes.is_main():
        folder.mkdir(exist_ok=True)
        file = folder / f"step-{number + 1}.json"
        file.write_text(json.dumps(contents, indent=1) + "\n")
        arrays = {
            f"{index}/{name}": value
            for index, batch in enumerate(places)
            for name, value in dataclasses.asdict(batch).items()
            if value is not None
        }
        np.savez(file.with_suffix(".npz"), **arrays)
    suspects = [pair["pair"] for pair in pairs if not pair["finite"]] or [
        pair["pair"]
        for pair in pairs
        if not pair["in_a_micro_batch_with_a_finite_gradient"]
    ]
    bad = contents["parameters_not_finite"]
    parameters = f" Parameters not finite: {_listed(bad)}." if bad else ""
    return (
        f"step {number + 1}: {in_a_row} updates in a row were skipped, since their"
        f" gradients were not finite; stopped. Pairs: {_listed(sorted(suspects))}."
        f"{parameters} Look at {folder}; lower optimizer.learning_rate, compute in"
        " float32, or remove the pairs, and start a new run, or go on from the latest"
        " checkpoint with --resume."
    )


def _not_finite(tree: Any) -> list[str]:
    """Paths of leaves that hold a number that is not finite."""
    finite = jax.device_get(_all_finite(tree))
    return [
        sharding.path_name(path)
        for path, whole in jax.tree_util.tree_flatten_with_path(finite)[0]
        if not whole
    ]


@jax.jit
def _all_finite(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.isfinite(x).all(), tree)


def _listed(items: Sequence[Any]) -> str:
    more = f" and {len(items) - _NAMED} more" if len(items) > _NAMED else ""
    return (", ".join(map(str, items[:_NAMED])) or "none") + more
