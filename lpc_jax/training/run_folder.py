"""The folder of a run: locked while the run lives, replaced only on request."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from lpc_jax import config as cfg
from lpc_jax.data import templates
from lpc_jax.data.tokenizer import Tokenizer
from lpc_jax.errors import UserError
from lpc_jax.files import whole
from lpc_jax.runtime import processes
from lpc_jax.training.log import METRICS_FILE
from lpc_jax.training.trackers import require_logins

MANIFEST = "manifest.json"


def dated(config: cfg.Config, tokenizer: Tokenizer, folder: Path) -> cfg.Config:
    """The config with the date that its chat template writes, if it writes today's.

    A resumed run keeps its own; ``UserError`` for a date that is never written.
    """
    date = config.data.date
    if templates.day(tokenizer.chat_template, date) is None:
        if date is not None:
            raise UserError(
                f"data.date = {date!r} must be None: the chat template calls no"
                f" {templates.DATE}. Leave it out."
            )
        return config

    def kept() -> str:
        file = folder / MANIFEST
        if config.run.resume and file.exists():
            settings = json.loads(file.read_text(encoding="utf-8"))["settings"]
            return settings.get("data.date") or templates.today().isoformat()
        return templates.today().isoformat()

    date = date or processes.from_main(kept)
    data = dataclasses.replace(config.data, date=date)
    return dataclasses.replace(config, data=data)


def _has_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).exists()


def make(config: cfg.Config, folder: Path) -> None:
    """Makes the run's folder; a run to be replaced is removed only here."""

    def replace() -> None:
        if _has_run(folder) and not config.run.resume:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)

    processes.from_main(replace)


@contextlib.contextmanager
def locked(config: cfg.Config) -> Iterator[Path]:
    """The run's folder, locked for this run; the main process holds it for all.

    The system's lock ends with the process, however that ends. A folder with an ended
    run is a ``UserError`` without ``run.resume`` or ``run.overwrite``.
    """
    processes.from_main(lambda: _require_outside(config))
    folder = Path(config.run.folder) / config.name
    continued = config.run.resume or config.run.overwrite
    if processes.from_main(lambda: _has_run(folder)) and not continued:
        raise UserError(
            f"run folder {folder} must be new, got one that holds a run. Continue it"
            " with --resume, choose another --name, or replace it with"
            " --run.overwrite."
        )
    descriptors: list[int] = []
    file = folder.with_name(f".{folder.name}.lock")
    processes.from_main(lambda: descriptors.append(_lock(file, folder)))
    try:
        yield folder
    finally:
        for descriptor in descriptors:
            file.unlink(missing_ok=True)
            os.close(descriptor)


def _require_outside(config: cfg.Config) -> None:
    """Asks trackers and folders now, not when hours of work are to go there."""
    folders = {
        "run.folder": config.run.folder,
        "run.compilation_cache": config.run.compilation_cache,
        "reference.cache": config.loss.needs_reference and config.reference.cache,
        "model.states_cache": config.decoder == "frozen" and config.model.states_cache,
    }
    for setting, folder in folders.items():
        if folder:
            whole.require_writable(Path(folder), setting)
    require_logins(config.run.trackers)


def _lock(file: Path, folder: Path) -> int:
    """Locks the file and returns its descriptor; closing that unlocks."""
    file.parent.mkdir(parents=True, exist_ok=True)
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = _holder(descriptor)
            os.close(descriptor)
            raise UserError(
                f"run folder {folder} must be of no other live run, got one in use by"
                f" {holder}. Wait for it or stop it, or choose another --name."
            ) from error
        # The holder before may have removed the file between the two lines above.
        if file.exists() and os.fstat(descriptor).st_ino == file.stat().st_ino:
            break
        os.close(descriptor)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": now}
    os.truncate(descriptor, 0)
    os.write(descriptor, json.dumps(holder).encode())
    return descriptor


def _holder(descriptor: int) -> str:
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:  # it has the lock and has not yet written who it is
        return "another process"
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"
