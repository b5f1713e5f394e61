"""From a config to a finished run: its folder, start or resumption, and log."""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data.pairs import Pairs
from lpc_jax.errors import UserError
from lpc_jax.runtime import checkpoint, compute, loading, processes
from lpc_jax.training import memory, nonfinite, outset, reference, run_folder, setup
from lpc_jax.training.log import RunLog
from lpc_jax.training.loop import Loop
from lpc_jax.training.run import Run
from lpc_jax.training.trackers import require_trackers

# Settings that a resumed run may change: they alter no update.
FREE_ON_RESUME = (
    "run.",
    "hub.",
    "mesh.",
    "distributed.",
    "reference.cache",
    "model.states_cache",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.max_skipped",
    "training.samples",
    "training.sample_tokens",
)


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume under other settings; the error lists each with both values."""
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


def _require_resumable(saved: dict[str, Any], now: dict[str, Any]) -> None:
    def fixed(manifest: dict[str, Any]) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in manifest["settings"].items()
            if not name.startswith(FREE_ON_RESUME)
        }
        digests = [name for name in manifest if name.endswith("_digest")]
        return kept | {name: manifest[name] for name in digests}

    # Through JSON, as the saved one went: tuples are lists on both sides.
    require_same(fixed(saved), fixed(json.loads(json.dumps(now))))


def train(config: cfg.Config, console: Console) -> Loop:
    """Trains what a config describes and leaves everything in the run folder.

    Processes that have joined call it alike; only the main one prints.

    Raises:
        UserError: A frozen decoder with several processes.
    """
    if not processes.is_main():
        console = Console(quiet=True)
    if config.decoder == "frozen" and jax.process_count() > 1:
        raise UserError(
            f"decoder='frozen' runs in one process, got {jax.process_count()}. Start"
            " one, with all devices that it can have."
        )
    mesh = sharding.make_mesh(
        data=config.mesh.data,
        fsdp=config.mesh.fsdp,
        tensor=config.mesh.tensor,
        devices=jax.devices(),
    )
    sharding.require_rows_divide(config.packing.rows, mesh)
    require_trackers(config.run.trackers)
    if config.run.compilation_cache is not None:
        compute.keep_compiled(Path(config.run.compilation_cache))
    with (
        processes.together(),
        processes.Termination().watched() as termination,
        run_folder.held(config) as folder,
        jax.set_mesh(mesh),
    ):
        return _train(prepare(config, mesh, folder, console), console, termination)


def prepare(config: cfg.Config, mesh: Mesh, folder: Path, console: Console) -> Run:
    """A run before its first update; cheap checks come first."""

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    found = loading.find_model(config.model)
    outline = loading.outline(
        found,
        mesh=mesh,
        latent=config.latent,
        adapters=config.adapters,
        train_decoder=config.trains_decoder,
        row_length=config.packing.row_length,
    )
    train, held_out = setup.read_pairs(config, outline.tokenizer)
    outset.require_one_run(
        config, outset.digests(outline.tokenizer, train, held_out or Pairs([]))
    )
    if train.report is not None:
        for line in train.report.lines():
            say(line)
        for table in train.report.tables()[1:]:  # lengths and sources
            console.print(table)
    started = loading.start(outline, seed=config.training.seed)
    return Run(
        config,
        started,
        train,
        held_out,
        reference_policy=reference.load(config, started),
        folder=folder,
        say=say,
    )


def _train(run: Run, console: Console, termination: processes.Termination) -> Loop:
    config, folder = run.config, run.folder
    assert folder is not None
    run_folder.make(config, folder)
    with contextlib.ExitStack() as closing:
        kept = checkpoint.Checkpoints(
            folder / loading.CHECKPOINTS,
            best_metric=config.training.best if len(run.held_out) else None,
            say=run.say,
        )
        closing.callback(kept.close)
        resume_from = resume(run, kept) if config.run.resume else None
        if resume_from is None:
            run.begin()
        predicted = outset.compile_ahead(run)
        kept.require_space(run.state)  # now, and not when the first hours are done
        if processes.is_main():
            (folder / "config.py").write_text(cfg.source(config.of_all_processes()))
            text = json.dumps(run.manifest, indent=1)
            (folder / "manifest.json").write_text(text)
        log = closing.enter_context(
            open_log(
                run,
                folder if processes.is_main() else None,
                resume_from=resume_from,
                console=console,
            )
        )
        loop = Loop(
            run,
            log,
            checkpoints=kept,
            manifest=run.manifest,
            ends_after=termination.reached,
            report=functools.partial(nonfinite.report, run),
            trace=folder / "profile",
        )
        for _ in loop:
            pass
        peak = memory.real_peak()
        if peak is not None:
            log.say(
                f"memory: {memory.size(peak)} at the peak,"
                f" {memory.size(predicted)} predicted"
            )
        log.finish(before=loop.before, after=loop.after)
    return loop


def resume(run: Run, kept: checkpoint.Checkpoints) -> int | None:
    """Restores the latest whole checkpoint and returns its step; None without one."""
    if kept.latest() is None:
        return None
    run.forget_start()
    restored = kept.restore_latest(
        run.abstract_state(),
        accept=lambda saved: _require_resumable(saved, run.manifest),
    )
    assert restored is not None, "there is a latest"
    step, run.state = restored
    return step


@contextlib.contextmanager
def open_log(
    run: Run, folder: Path | None, *, resume_from: int | None, console: Console
) -> Iterator[RunLog]:
    """The run's log in a folder, or unread in a temporary one."""
    config = run.config
    with contextlib.ExitStack() as closing:
        if folder is None:
            unread = tempfile.TemporaryDirectory()
            folder, trackers = Path(closing.enter_context(unread)), ()
        else:
            trackers = config.run.trackers
        yield closing.enter_context(
            RunLog(
                folder,
                name=config.name,
                project=config.run.project,
                trackers=trackers,
                settings=run.manifest["settings"],
                total_steps=run.total_steps,
                resume_from=resume_from,
                console=console,
            )
        )
