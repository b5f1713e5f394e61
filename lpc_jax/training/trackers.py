"""Trackers of a run's metrics: TensorBoard, W&B, trackio; imported when used."""

from __future__ import annotations

import importlib
import json
import os
import types
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lpc_jax.errors import UserError
from lpc_jax.files import upload

# The package behind each tracker; the extra that installs it has the tracker's name.
PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    def __init__(
        self, folder: Path, settings: Mapping[str, Any], resume_from: int | None
    ) -> None:
        # What an earlier attempt logged from purge_step on is hidden by TensorBoard.
        purge_step = 0 if resume_from is None else resume_from + 1
        self._writer = _package("tensorboard").SummaryWriter(
            str(folder / "tensorboard"), purge_step=purge_step
        )
        text = json.dumps(settings, indent=1)
        self._writer.add_text("settings", f"```\n{text}\n```", resume_from or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step's metrics as scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds a text for each row."""
        for number, row in enumerate(rows):
            text = "  \n".join(f"**{key}**: {value}" for key, value in row.items())
            self._writer.add_text(f"{name}/{number}", text, step)
        self._writer.flush()

    def close(self) -> None:
        """Closes the event file."""
        self._writer.close()


class Hosted:
    """A run of W&B, or of trackio, which has the same interface."""

    def __init__(self, tracker: str, **options: Any) -> None:
        self._module = _package(tracker)
        self._run = self._module.init(**options)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs a step; W&B ignores steps that an earlier attempt reached."""
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table."""
        data = [list(row.values()) for row in rows]
        table = self._module.Table(columns=list(rows[0]), data=data)
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Ends the hosted run."""
        self._run.finish()


Tracker = TensorBoard | Hosted


def start_tracker(
    tracker: str,
    folder: Path,
    resume_from: int | None,
    *,
    settings: Mapping[str, Any],
    **about: str,
) -> Tracker:
    """A tracker of the run; a resumed run continues under its id or name.

    ``about`` has ``name`` and ``project``.
    """
    if tracker == "tensorboard":
        return TensorBoard(folder, settings, resume_from)
    resumed = resume_from is not None
    options = {"resume": "allow" if resumed else "never"}
    if tracker == "wandb":
        id_file = folder / "wandb_id"
        if not resumed or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        options = {"dir": str(folder), "id": id_file.read_text(), "resume": "allow"}
    return Hosted(tracker, config=dict(settings), **about, **options)


def require_trackers(trackers: Sequence[str]) -> None:
    """Refuses trackers whose packages are missing before anything is computed."""
    for tracker in trackers:
        _package(tracker)


def require_logins(trackers: Sequence[str]) -> None:
    """Refuses, besides, W&B or trackio's space where the login is not taken."""
    require_trackers(trackers)
    space = os.environ.get("TRACKIO_SPACE_ID")
    if "trackio" in trackers and space:
        upload.require_access(space, setting="run.trackers trackio, TRACKIO_SPACE_ID")
    if "wandb" in trackers:
        wandb = _package("wandb")
        try:
            wandb.login()  # asks at a terminal, and nothing where W&B is offline
        except wandb.Error as error:
            raise UserError(
                f"run.trackers wandb: {error} Run: wandb login, or set"
                " WANDB_MODE=offline, or leave it out."
            ) from error


def _package(tracker: str) -> types.ModuleType:
    package = PACKAGES[tracker]
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:  # it is there, but something that it needs is not
            raise
        raise UserError(
            f"run.trackers asks for {tracker!r}, which needs the package {package},"
            f" and that is not installed. Run: pip install 'lpc-jax[{tracker}]', or"
            " leave it out."
        ) from error
