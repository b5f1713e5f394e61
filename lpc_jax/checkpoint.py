"""Keeps the best and the latest state of a run on disk, through Orbax.

A checkpoint is a flat dict from a leaf's path to its array, with a JSON record beside
it, so that it outlives the classes it was saved from and can be compared with what a
run expects before any array is read. The record holds a checksum of every array: what
was damaged on disk is told, named and passed over. Knows nothing of what the arrays
mean.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import PyTree
from orbax.checkpoint.checkpoint_managers import preservation_policy

from lpc_jax import processes
from lpc_jax.errors import UserError

# Beyond the arrays: their metadata, and room for whoever else writes to the disk.
_MARGIN_SHARE = 0.05
_MARGIN_BYTES = 16 * 2**20

_STATE, _RECORD = "state", "record"

# The latest, and one to go back to should it be damaged.
_KEPT = 2

# Where Orbax moves what is no longer kept, at once and whole, for us to delete: a kill
# amid the deletion leaves no half of a checkpoint behind.
_REMOVED = "removed"

# What Orbax writes into a checkpoint once it is whole, and into each part of it.
_COMMITTED = "commit_success.txt"
# Of a checkpoint's files those without which nothing of it can be read.
_NEEDED = ("_CHECKPOINT_METADATA", f"{_RECORD}/metadata", f"{_STATE}/manifest.ocdbt")

_METRICS = "metrics/metrics"

# How damage shows when Orbax reads a checkpoint's record.
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError)

# How many differing leaves a message lists before it only counts.
_LISTED = 20


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
        for found in processes.from_main(lambda: _move_broken(folder)):
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
                _STATE: ocp.StandardCheckpointHandler(),
                _RECORD: ocp.JsonCheckpointHandler(),
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
        leaves = _by_path(state)
        self.require_space(state)
        data = {
            path: jax.random.key_data(leaf) if _is_key(leaf) else leaf
            for path, leaf in leaves.items()
        }
        sums = jax.device_get(_checksums(data))
        described = {
            path: _describe(leaf) | {"checksum": int(sums[path])}
            for path, leaf in leaves.items()
        }
        record = {
            "meta": meta,
            "leaves": described,
            "digest": _record_digest(meta, described),
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{
                    _STATE: ocp.args.StandardSave(data),
                    _RECORD: ocp.args.JsonSave(record),
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
                step, args=ocp.args.Composite(**{_RECORD: ocp.args.JsonRestore()})
            )
            record = restored[_RECORD]
        except _DAMAGE as error:
            raise DamagedError(f"its record cannot be read: {_first(error)}") from error
        return _require_whole(record)

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
            except DamagedError as error:
                said = (
                    f"the checkpoint of step {step} is damaged ({error}): moved to"
                    f" {_move(self._folder / str(step))}."
                )
                if jax.process_count() > 1:  # the others may be waiting inside Orbax
                    raise DamagedError(
                        f"{said} Start all processes again with --resume to continue"
                        " from the one before it."
                    ) from error
                self._say(said)
                self._manager.reload()
        if found:
            raise OSError(
                f"no checkpoint in {self._folder} is whole; what is left of them is in"
                f" {_damaged(self._folder)}. Put a good copy back, or start again with"
                " --resume from the first step."
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
        expected = _by_path(abstract_state)
        _require_same_leaves(self._folder, step, described, expected)
        wanted = {
            path: _key_data_shape(leaf) if _is_key(leaf) else leaf
            for path, leaf in expected.items()
        }
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.StandardRestore(wanted)}),
            )[_STATE]
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # so plain is what Orbax raises for cut files
            raise DamagedError(f"its arrays cannot be read: {_first(error)}") from error
        _require_checksums(restored, described)
        leaves = [
            jax.random.wrap_key_data(restored[path], impl=described[path]["impl"])
            if _is_key(leaf)
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


class Reader:
    """The checkpoints of a run, which may be going on: nothing in it is changed.

    Args:
        folder: Where they are, as ``Checkpoints`` left them.

    Raises:
        UserError: There is no checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        # Orbax gives a checkpoint its name once it is whole.
        self.steps = sorted(int(name) for name in names if name.isdigit())
        if not self.steps:
            raise UserError(
                f"{folder} must hold a checkpoint, got none. Let the run reach its"
                " first one (training.checkpoint_every), or name another run."
            )

    def step(self, which: str) -> int:
        """The step that ``latest``, ``best`` or a number names.

        Args:
            which: ``best`` is the highest metric that the run ranked its checkpoints
                by, the later step of equals.

        Raises:
            UserError: No such checkpoint.
        """
        if which == "latest":
            return self.steps[-1]
        if which == "best":
            ranked = {step: self._rank(step) for step in self.steps}
            found = {step: rank for step, rank in ranked.items() if rank is not None}
            if found:
                return max(found, key=lambda step: (found[step], step))
        elif which.isdigit() and int(which) in self.steps:
            return int(which)
        raise UserError(
            f"--step must be latest, one of {', '.join(map(str, self.steps))}, or best"
            f" for a run with held-out pairs, got {which!r} for {self._folder}."
        )

    def _rank(self, step: int) -> float | None:
        file = self._folder / str(step) / _METRICS
        if not file.exists() or not _are_metrics(file):
            return None
        values = json.loads(file.read_bytes()).values()
        return next((float(value) for value in values if not math.isnan(value)), None)

    def meta(self, step: int) -> dict[str, Any]:
        """What ``Checkpoints.save`` was given as ``meta``.

        Raises:
            DamagedError: It cannot be read, or says something else than was saved.
        """
        return self._record(step)["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        try:
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader:
                record = reader.restore((self._folder / str(step) / _RECORD).absolute())
        except _DAMAGE as error:
            raise DamagedError(f"its record cannot be read: {_first(error)}") from error
        return _require_whole(record)

    def read(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """Some of a checkpoint's arrays, laid out as asked for; the rest is not read.

        Args:
            step: From ``step``.
            wanted: Shape, dtype and sharding by path, such as
                ``params/latent/codebook``.

        Raises:
            UserError: The checkpoint has other arrays under these paths, or none.
            DamagedError: It cannot be read, or says something else than was saved.
        """
        described = self._record(step)["leaves"]
        saved = {path: described[path] for path in wanted if path in described}
        _require_same_leaves(self._folder, step, saved, wanted)
        items = dict(wanted)
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
                restored = reader.restore(
                    (self._folder / str(step) / _STATE).absolute(),
                    args=ocp.args.PyTreeRestore(
                        items,
                        restore_args=ocp.checkpoint_utils.construct_restore_args(items),
                        partial_restore=True,
                    ),
                )
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise
        except Exception as error:  # so plain is what Orbax raises for cut files
            raise DamagedError(f"its arrays cannot be read: {_first(error)}") from error
        _require_checksums(restored, described)
        return restored


class DamagedError(UserError):
    """A checkpoint that is not what was saved."""


def _require_same_leaves(
    folder: Path,
    step: int,
    saved: Mapping[str, Mapping[str, Any]],
    expected: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
    now = {path: _text(_describe(leaf)) for path, leaf in expected.items()}
    then = {path: _text(leaf) for path, leaf in saved.items()}
    differences = {
        "missing": [f"{p} {now[p]}" for p in now if p not in then],
        "unexpected": [f"{p} {then[p]}" for p in then if p not in now],
        "mis-shaped": [
            f"{p} expected {now[p]}, got {then[p]}"
            for p in now
            if p in then and now[p] != then[p]
        ],
    }
    if any(differences.values()):
        listed = [
            f"  {kind}: {line}"
            for kind, lines in differences.items()
            for line in _shortened(lines)
        ]
        raise UserError(
            f"the checkpoint of step {step} in {folder} must hold the state"
            " that this config describes, got one of another config:\n"
            + "\n".join(listed)
            + "\nContinue with the config.py in its run folder, or start a new"
            " run with another --name."
        )


def _require_whole(record: Any) -> dict[str, Any]:
    whole = isinstance(record, dict) and (
        record.get("digest") == _record_digest(record.get("meta"), record.get("leaves"))
    )
    if not whole:
        raise DamagedError("its record is not what was saved")
    return record


def _require_checksums(
    restored: dict[str, jax.Array], described: Mapping[str, Mapping[str, Any]]
) -> None:
    found = jax.device_get(_checksums(restored))
    changed = [
        path
        for path, leaf in described.items()
        if path in found and int(found[path]) != leaf["checksum"]
    ]
    if changed:
        raise DamagedError(
            f"its arrays are not those that were saved: {', '.join(changed[:3])}"
            f"{' and more' if len(changed) > 3 else ''}"
        )


def _first(error: BaseException) -> str:
    """The first line of what a library says, at a readable length."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _record_digest(meta: Any, leaves: Any) -> str:
    """SHA-256, in hex, of what a record says."""
    text = json.dumps([meta, leaves], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _damaged(folder: Path) -> Path:
    return folder.with_name(folder.name + ".damaged")


def _move(checkpoint: Path) -> Path:
    """Moves a damaged checkpoint beside the folder of checkpoints; gives where to."""
    folder = _damaged(checkpoint.parent)
    folder.mkdir(exist_ok=True)
    to, number = folder / checkpoint.name, 1
    while to.exists():
        if not checkpoint.exists():  # another process was faster: it is the last there
            return _last_moved(folder, checkpoint.name)
        number += 1
        to = folder / f"{checkpoint.name}-{number}"
    try:
        checkpoint.rename(to)
    except FileNotFoundError:
        return _last_moved(folder, checkpoint.name)
    return to


def _last_moved(folder: Path, name: str) -> Path:
    """The newest of a step's damaged checkpoints."""
    found, number = folder / name, 2
    while (following := folder / f"{name}-{number}").exists():
        found, number = following, number + 1
    return found


def _move_broken(folder: Path) -> list[str]:
    """Moves checkpoints away that can be told to be broken by their files' names.

    Those whose saving was killed are none of them: Orbax gives a checkpoint its name
    once it is whole, and clears away what it had begun.
    """
    if not folder.is_dir():
        return []
    said = []
    for checkpoint in sorted(folder.iterdir()):
        if not checkpoint.name.isdigit():
            continue
        needed = [name for name in _NEEDED if not (checkpoint / name).is_file()]
        if (checkpoint / _RECORD / _COMMITTED).exists():  # this Orbax writes them
            needed += [_COMMITTED] * (not (checkpoint / _COMMITTED).is_file())
        if not _are_metrics(checkpoint / _METRICS):
            needed.append(f"readable {_METRICS}")
        if needed:
            said.append(
                f"the checkpoint of step {checkpoint.name} is damaged (it has no"
                f" {' and no '.join(needed)}): moved to {_move(checkpoint)}."
            )
    return said


def _are_metrics(file: Path) -> bool:
    """Whether a file holds what Orbax ranks a checkpoint by, if it is there."""
    if not file.exists():
        return True
    try:
        found = json.loads(file.read_bytes())
    except ValueError:  # JSON or UTF-8
        return False
    return isinstance(found, dict) and all(
        isinstance(value, int | float) for value in found.values()
    )


@jax.jit
def _checksums(data: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """A number for each array that any changed, lost or moved element changes.

    The sum, modulo 2^32, of its elements' bits, each times an odd number that depends
    on its place: the same on every mesh, whatever the order of summation.
    """

    def checksum(x: jax.Array) -> jax.Array:
        words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        if x.dtype == jnp.bool_:
            bits = x.astype(jnp.uint32)
        else:
            bits = jax.lax.bitcast_convert_type(x, words).astype(jnp.uint32)
        for axis in range(x.ndim):
            bits *= 2 * jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) + 1
        return jnp.sum(bits, dtype=jnp.uint32)

    return {path: checksum(leaf) for path, leaf in data.items()}


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to continue a run under other settings.

    Args:
        saved: Settings by dotted name, as the checkpoint has them.
        now: Settings by dotted name, as this run has them.

    Raises:
        UserError: Naming every setting that differs, with both values.
    """
    names = list(dict.fromkeys([*now, *saved]))
    lines = [
        f"  {name}: checkpoint {_value(saved, name)}, now {_value(now, name)}"
        for name in names
        if _value(saved, name) != _value(now, name)
    ]
    if lines:
        raise UserError(
            "a resumed run must have the settings, weights and data that it was started"
            " with; these differ:\n"
            + "\n".join(lines)
            + "\nDrop what overrides them, or start a new run with another --name."
        )


def _value(settings: Mapping[str, Any], name: str) -> str:
    return repr(settings[name]) if name in settings else "absent"


def _by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by their path, in the tree's order."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }
    assert len(named) == len(leaves), "two leaves of one path"
    return named


def _is_key(leaf: jax.Array | jax.ShapeDtypeStruct) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> dict[str, Any]:
    described: dict[str, Any] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
    if _is_key(leaf) and isinstance(leaf, jax.Array):
        described["impl"] = str(jax.random.key_impl(leaf))
    return described


def _text(described: Mapping[str, Any]) -> str:
    return f"{described['dtype']}[{','.join(map(str, described['shape']))}]"


def _key_data_shape(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    data = jax.eval_shape(jax.random.key_data, leaf)
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _shortened(lines: list[str]) -> list[str]:
    if len(lines) <= _LISTED:
        return lines
    return [*lines[:_LISTED], f"and {len(lines) - _LISTED} more"]


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
