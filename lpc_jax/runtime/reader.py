"""Reads a run's checkpoints while it may still be training; changes nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lpc_jax.errors import UserError
from lpc_jax.runtime import damage, record


class Reader:
    """The checkpoints in a folder, read only; ``UserError`` where there are none."""

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
        """The step of ``latest``, ``best`` (the later of equals) or a number."""
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
        file = self._folder / str(step) / damage.METRICS
        if not file.exists() or not damage.are_metrics(file):
            return None
        values = json.loads(file.read_bytes()).values()
        return next((float(value) for value in values if not math.isnan(value)), None)

    def meta(self, step: int) -> dict[str, Any]:
        """The ``meta`` given to ``Checkpoints.save``."""
        return self._record(step)["meta"]

    def _record(self, step: int) -> dict[str, Any]:
        with (
            damage.reading_record(),
            ocp.Checkpointer(ocp.JsonCheckpointHandler()) as reader,
        ):
            saved = reader.restore(
                (self._folder / str(step) / damage.RECORD).absolute()
            )
        return record.require_whole(saved)

    def read(
        self, step: int, wanted: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        """The wanted arrays alone, by path, such as ``params/latent/codebook``."""
        described = self._record(step)["leaves"]
        saved = {path: described[path] for path in wanted if path in described}
        record.require_same_leaves(self._folder, step, saved, wanted)
        items = dict(wanted)
        with (
            damage.reading_arrays(),
            ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader,
        ):
            restored = reader.restore(
                (self._folder / str(step) / damage.STATE).absolute(),
                args=ocp.args.PyTreeRestore(
                    items,
                    restore_args=ocp.checkpoint_utils.construct_restore_args(items),
                    partial_restore=True,
                ),
            )
        record.require_checksums(restored, described)
        return restored
