"""Saves the best and the latest states of a run through Orbax.

A checkpoint is a flat dict from each leaf's path to its array, beside a JSON record: it
outlives the classes it was saved from, and is compared with the expected state before
any array is read. A checksum of every array reveals damage on disk.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lpc_jax import sharding
from lpc_jax.errors import UserError
from lpc_jax.runtime import damage, processes, reader, record

# Room for metadata, and for whoever else writes to the disk.
_MARGIN_SHARE = 0.05
_MARGIN_BYTES = 16 * 2**20
_KEPT = 2  # the latest, and one to go back to should it be damaged
# Where Orbax moves what is no longer kept, at once and whole, for us to delete: a kill
# amid the deletion leaves no half of a checkpoint behind.
_REMOVED = "removed"


class Checkpoints:
    """The checkpoints in one folder: the best and the two latest are kept.

    All processes of a run construct it and call its methods together. An unfinished
    checkpoint is never visible, and none is deleted before a newer one is complete.

    Args:
        best_metric: Its highest value is the best, a ``loss/`` metric's lowest; the
            later step of equals. None keeps only the latest.
        say: Told, in a sentence, of every damaged checkpoint.
    """

    def __init__(
        self, folder: Path, *, best_metric: str | None, say: Callable[[str], None]
    ) -> None:
        # Orbax wants an absolute path; messages keep the user's own.
        self._folder, self._best_metric, self._say = folder, best_metric, say
        for sentence in processes.from_main(lambda: damage.move_broken(folder)):
            say(sentence)
        self._delete_removed()
        rank, kept = None, [preservation_policy.LatestN(_KEPT)]
        if best_metric is not None:
            rank = functools.partial(_rank, best_metric)
            best = preservation_policy.BestN(
                get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False
            )
            kept = [*kept, best]
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(kept),
                best_fn=rank,
                cleanup_tmp_directories=True,  # what a killed run left half-written
                todelete_subdir=_REMOVED,
            ),
        )

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        meta: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts saving a state; once it returns, its arrays may be donated.

        ``meta`` must be JSON. ``metrics`` are of this very state; None: never the best.
        """
        self.wait()
        leaves = sharding.by_path(state)
        self.require_space(state)
        data = {
            path: jax.random.key_data(leaf) if record.is_key(leaf) else leaf
            for path, leaf in leaves.items()
        }
        sums = jax.device_get(record.checksums(data))
        described = {
            path: record.describe(leaf) | {"checksum": int(sums[path])}
            for path, leaf in leaves.items()
        }
        digest = record.digest(meta, described)
        parts = {
            damage.STATE: ocp.args.StandardSave(data),
            damage.RECORD: ocp.args.JsonSave(
                {"meta": meta, "leaves": described, "digest": digest}
            ),
        }
        tracked, name = None, self._best_metric
        if name is not None:  # the one that ranks, higher is better; NaN without one
            value = (metrics or {}).get(name, math.nan)
            tracked = {name: -value if name.startswith("loss/") else value}
        self._manager.save(
            step, args=ocp.args.Composite(**parts), metrics=tracked, force=True
        )

    def require_space(self, state: PyTree) -> None:
        """Raises ``UserError`` where the disk has no room for a state."""
        arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        needed = arrays + int(arrays * _MARGIN_SHARE) + _MARGIN_BYTES
        free = processes.from_main(lambda: shutil.disk_usage(self._folder).free)
        if free < needed:
            raise UserError(
                f"a checkpoint in {self._folder} needs"
                f" {_size(needed)} of disk space ({_size(arrays)} of arrays and a"
                f" margin), got {_size(free)} free. Nothing was written and older"
                " checkpoints are intact: make room, or move the run folder to a"
                " larger disk, and continue with --resume."
            )

    def steps(self) -> list[int]:
        """Steps of the checkpoints kept, ascending."""
        self.wait()
        return sorted(self._manager.all_steps())

    def latest(self) -> int | None:
        """Step of the latest checkpoint; None where there is none."""
        self.wait()
        return self._manager.latest_step()

    def restore_latest(
        self, abstract_state: PyTree, *, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[int, PyTree]:
        """Step and state of the latest whole checkpoint.

        A damaged one is moved to ``checkpoints.damaged`` and the one before is tried.
        ``accept`` is given the ``meta`` and raises where the run cannot go on from it.

        Raises:
            OSError: All were damaged.
            DamagedError: The latest was, in a run of several processes.
        """
        while (step := self.latest()) is not None:
            checkpoint = self._folder / str(step)
            try:
                accept(record.read(checkpoint)["meta"])
                return step, self.restore(step, abstract_state)
            except damage.DamagedError as error:
                message = (
                    f"the checkpoint of step {step} is damaged ({error}): moved to"
                    f" {damage.move(checkpoint)}."
                )
                if jax.process_count() > 1:  # the others may be waiting inside Orbax
                    raise damage.DamagedError(
                        f"{message} Start all processes again with --resume to continue"
                        " from the one before it."
                    ) from error
                self._say(message)
                self._manager.reload()
        raise OSError(
            f"no checkpoint in {self._folder} is whole; what is left of them is in"
            f" {damage.damaged(self._folder)}. Put a good copy back, or start again"
            " with --resume from the first step."
        )

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """The state of a step; layout and errors as those of ``reader.read``."""
        self.wait()
        checkpoint = self._folder / str(step)
        saved = record.read(checkpoint)["leaves"]
        arrays = reader.read(checkpoint, saved, sharding.by_path(abstract_state))
        return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays.values())

    def wait(self) -> None:
        """Returns when nothing is being written; ``OSError`` if a save has failed."""
        try:
            self._manager.wait_until_finished()
            self._delete_removed()
        except (OSError, ValueError, RuntimeError) as error:
            # Orbax has struck off the steps that a successful save would have deleted.
            self._manager.reload()
            raise OSError(
                f"saving a checkpoint in {self._folder} failed in the background:"
                f" {error}. Older checkpoints are intact: mend the cause and continue"
                " with --resume."
            ) from error

    def _delete_removed(self) -> None:
        if processes.is_main():
            shutil.rmtree(self._folder / _REMOVED, ignore_errors=True)

    def close(self) -> None:
        """Waits, then closes the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()


def _rank(best_metric: str, metrics: Mapping[str, float]) -> float:
    value = metrics.get(best_metric, math.nan)
    return -math.inf if math.isnan(value) else value


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
