"""Keeps the best and the latest state of a run on disk, through Orbax.

A checkpoint is a flat dict from a leaf's path to its array, with a JSON record beside
it, so that it outlives the classes it was saved from and can be compared with what a
run expects before any array is read. The record holds a checksum of every array: what
was damaged on disk is told, named and passed over. Knows nothing of what the arrays
mean.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lpc_jax.errors import UserError
from lpc_jax.runtime import damage, processes, record

# Beyond the arrays: their metadata, and room for whoever else writes to the disk.
_MARGIN_SHARE = 0.05
_MARGIN_BYTES = 16 * 2**20

# The latest, and one to go back to should it be damaged.
_KEPT = 2

# Where Orbax moves what is no longer kept, at once and whole, for us to delete: a kill
# amid the deletion leaves no half of a checkpoint behind.
_REMOVED = "removed"


class Checkpoints:
    """The checkpoints in one folder: the best and the two latest are kept.

    All processes of a run make it together and call its methods alike; they share the
    folder. Saving copies the arrays to the host and returns; writing goes on in the
    background, so the caller may donate them at once. An unfinished checkpoint is never
    visible, and no older one is deleted before a newer one is complete.

    Args:
        folder: Where they are, or will be.
        best_metric: Name of the metric whose highest value, or of a loss whose lowest,
            is the best (the later step of equals); None keeps only the latest.
        say: Told, in a sentence, of every damaged checkpoint.
    """

    def __init__(
        self, folder: Path, *, best_metric: str | None, say: Callable[[str], None]
    ) -> None:
        # Orbax wants an absolute path; messages keep the user's own.
        self._folder, self._best_metric, self._say = folder, best_metric, say
        for found in processes.from_main(lambda: damage.move_broken(folder)):
            say(found)
        self._delete_removed()
        policies: list[preservation_policy.PreservationPolicy] = [
            preservation_policy.LatestN(_KEPT)
        ]
        if best_metric is not None:
            policies.append(
                preservation_policy.BestN(
                    get_metric_fn=self._rank,
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
                best_fn=None if best_metric is None else self._rank,
                cleanup_tmp_directories=True,  # what a killed run left half-written
                todelete_subdir=_REMOVED,
            ),
            item_handlers={
                damage.STATE: ocp.StandardCheckpointHandler(),
                damage.RECORD: ocp.JsonCheckpointHandler(),
            },
        )

    def _rank(self, metrics: Mapping[str, float] | None) -> float:
        assert metrics is not None
        assert self._best_metric is not None
        value = metrics.get(self._best_metric, math.nan)
        return -math.inf if math.isnan(value) else value

    def _tracked(self, metrics: Mapping[str, float] | None) -> dict[str, float] | None:
        """What Orbax ranks a checkpoint by; NaN, the lowest, where nothing is known."""
        name = self._best_metric
        if name is None:
            return None
        value = (metrics or {}).get(name, math.nan)
        # Kept so that more is better, whatever reads it.
        return {name: -value if name.startswith("loss/") else value}

    def save(
        self,
        step: int,
        state: PyTree,
        *,
        meta: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts saving a state; returns once its arrays may be changed.

        Args:
            step: Updates done so far; names the checkpoint.
            state: A pytree of ``jax.Array``, typed PRNG keys included.
            meta: What JSON can hold, given back by ``meta``.
            metrics: Of this very state; None: never the best.

        Raises:
            OSError: An earlier save failed in the background.
            UserError: Too little free disk space, or no ``best_metric`` in
                ``metrics``. Nothing was written.
        """
        self.wait()
        if metrics is not None and self._best_metric not in (None, *metrics):
            raise UserError(
                f"metrics of the checkpoint at step {step} must hold"
                f" {self._best_metric!r}, got {sorted(metrics)}. Pass None where"
                " there was no evaluation."
            )
        leaves = record.by_path(state)
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
        saved = {
            "meta": meta,
            "leaves": described,
            "digest": record.record_digest(meta, described),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    damage.STATE: ocp.args.StandardSave(data),
                    damage.RECORD: ocp.args.JsonSave(saved),
                }
            ),
            metrics=self._tracked(metrics),
            force=True,
        )

    def require_space(self, state: PyTree) -> None:
        """Refuses a state that the disk has no room for; ``save`` does so itself.

        Raises:
            UserError: Too little free disk space.
        """
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
        """Step of the latest checkpoint, or None where there is none."""
        self.wait()
        return self._manager.latest_step()

    def best(self) -> int | None:
        """Step of the checkpoint with the highest metric; None where it is unknown."""
        self.wait()
        step = None if self._best_metric is None else self._manager.best_step()
        if step is None or self._rank(self._manager.metrics(step)) == -math.inf:
            return None
        return step

    def meta(self, step: int) -> dict[str, Any]:
        """What ``save`` was given as ``meta``."""
        return self._record(step)["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        if step not in self.steps():
            raise UserError(
                f"step must be one of the checkpoints in {self._folder}, got {step}."
                f" There: {', '.join(map(str, self.steps())) or 'none'}."
            )
        try:
            restored = self._manager.restore(
                step, args=ocp.args.Composite(**{damage.RECORD: ocp.args.JsonRestore()})
            )
            saved = restored[damage.RECORD]
        except damage.DAMAGE as error:
            raise damage.DamagedError(
                f"its record cannot be read: {damage.first_line(error)}"
            ) from error
        return record.require_whole(saved)

    def restore_latest(
        self, abstract_state: PyTree, *, accept: Callable[[dict[str, Any]], None]
    ) -> tuple[int, PyTree] | None:
        """The latest whole checkpoint's step and state; None where there is none.

        A damaged one is named, moved out of the way to ``checkpoints.damaged`` and
        passed over for the one before.

        Args:
            abstract_state: As ``restore`` takes it.
            accept: Given the checkpoint's ``meta``; raises where the run cannot go on
                from it.

        Raises:
            UserError: As ``accept`` and ``restore`` do.
            OSError: All were damaged.
            DamagedError: With several processes, which can't read another before they
                meet again: the latest was. It is moved all the same.
        """
        found = False
        while (step := self.latest()) is not None:
            found = True
            try:
                accept(self.meta(step))
                return step, self.restore(step, abstract_state)
            except damage.DamagedError as error:
                said = (
                    f"the checkpoint of step {step} is damaged ({error}): moved to"
                    f" {damage.move(self._folder / str(step))}."
                )
                if jax.process_count() > 1:  # the others may be waiting inside Orbax
                    raise damage.DamagedError(
                        f"{said} Start all processes again with --resume to continue"
                        " from the one before it."
                    ) from error
                self._say(said)
                self._manager.reload()
        if found:
            raise OSError(
                f"no checkpoint in {self._folder} is whole; what is left of them is in"
                f" {damage.damaged(self._folder)}. Put a good copy back, or start again"
                " with --resume from the first step."
            )
        return None

    def restore(self, step: int, abstract_state: PyTree) -> PyTree:
        """The state of a step, bit by bit, laid out as asked for.

        Args:
            step: One of the checkpoints'.
            abstract_state: A pytree of ``jax.ShapeDtypeStruct`` with shardings, on any
                mesh; of the structure that was saved.

        Raises:
            UserError: The checkpoint holds other leaves; all differences are listed
                and no array was read.
            DamagedError: It cannot be read, or says something else than was saved.
        """
        described: dict[str, dict[str, Any]] = self._record(step)["leaves"]
        expected = record.by_path(abstract_state)
        record.require_same_leaves(self._folder, step, described, expected)
        wanted = {
            path: record.key_data_shape(leaf) if record.is_key(leaf) else leaf
            for path, leaf in expected.items()
        }
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    **{damage.STATE: ocp.args.StandardRestore(wanted)}
                ),
            )[damage.STATE]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # so plain is what Orbax raises for cut files
            raise damage.DamagedError(
                f"its arrays cannot be read: {damage.first_line(error)}"
            ) from error
        record.require_checksums(restored, described)
        leaves = [
            jax.random.wrap_key_data(restored[path], impl=described[path]["impl"])
            if record.is_key(leaf)
            else restored[path]
            for path, leaf in expected.items()
        ]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves)

    def wait(self) -> None:
        """Returns when nothing is being written.

        Raises:
            OSError: A save failed in the background; older checkpoints are intact.
        """
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
        """Waits and lets go of the folder.

        Raises:
            OSError: As ``wait`` does.
        """
        try:
            self.wait()
        finally:
            self._manager.close()


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
