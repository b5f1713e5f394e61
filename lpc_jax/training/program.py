"""From a config to a finished run: its folder, start or resumption, and log."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich.console import Console

from lpc_jax import config as cfg
from lpc_jax import sharding
from lpc_jax.data.pairs import Pairs
from lpc_jax.data.tokenizer import rendering
from lpc_jax.errors import UserError
from lpc_jax.runtime import compute, loading, processes
from lpc_jax.runtime.checkpoint import Checkpoints
from lpc_jax.training import log as logs
from lpc_jax.training import memory, nonfinite, reference, run_folder, setup
from lpc_jax.training.loop import Loop
from lpc_jax.training.run import Run

# Settings that a resumed run may change: they alter no update.
FREE_ON_RESUME = (
    "run.",
    "hub.",
    "mesh.",
    "distributed.",
    "data.cache",
    "reference.cache",
    "model.states_cache",
    "training.log_every",
    "training.eval_every",
    "training.checkpoint_every",
    "training.max_skipped",
    "training.samples",
    "training.sample_tokens",
)


_ARCHITECTURE = "architecture."


def require_same(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses to resume under other settings; the error lists each with both values."""

    def value(settings: Mapping[str, Any], name: str) -> str:
        return repr(settings[name]) if name in settings else "absent"

    lines = [
        f"  {name}: checkpoint {value(saved, name)}, now {value(now, name)}"
        for name in {**now, **saved}
        if value(saved, name) != value(now, name)
        and (name in saved or not name.startswith(_ARCHITECTURE))
    ]
    if lines:
        raise UserError(
            "a resumed run must have the settings, weights and data that it was started"
            " with; these differ:\n"
            + "\n".join(lines)
            + "\nDrop what overrides them, or start a new run with another --name."
            + _further(saved, now)
        )


def _further(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """How a run of another day or length goes on; empty if it is of neither."""
    lengths, date = ("training.epochs", "training.steps"), saved.get("data.date")
    if date not in (None, now.get("data.date")):
        return f"\nThe template writes the date: lpc.read_pairs(..., date={date!r})."
    if all(saved.get(name) == now.get(name) for name in lengths):
        return ""
    plain = " --plain" * any(name.startswith("latent.") for name in saved)
    reference = saved.get("reference.path") or saved.get("model.path")
    return (
        f"\nTo train further: python scripts/export.py RUN FOLDER{plain}, then a new"
        " run with --model.path FOLDER and, if the loss has a reference,"
        f" --reference.path {reference}."
    )


def _fixed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The settings and digests that stay the same from start to end of a run."""
    # Through JSON, as a saved one went: tuples are lists on both sides.
    of_run = json.loads(json.dumps(manifest))
    # A setting that came after the checkpoint had its default then.
    whole = cfg.flat(cfg.from_flat(of_run["settings"]))
    settings = {
        name: value
        for name, value in (whole | of_run["settings"]).items()
        if not name.startswith(FREE_ON_RESUME)
    }
    # Of config.json or a GGUF file; absent in checkpoints of versions before.
    computed = of_run.get("architecture", {}).items()
    settings |= {f"{_ARCHITECTURE}{name}": value for name, value in computed}
    return settings | {n: of_run[n] for n in of_run if n.endswith("_digest")}


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
    sizes = dataclasses.asdict(config.mesh)
    mesh = sharding.make_mesh(**sizes, devices=jax.devices())
    sharding.require_rows_divide(config.packing.rows, mesh)
    if config.run.compilation_cache is not None:
        compute.keep_compiled(Path(config.run.compilation_cache))
    with (
        processes.together(),
        processes.Termination().watched() as termination,
        run_folder.locked(config) as folder,
        jax.set_mesh(mesh),
    ):
        run = prepare(config, mesh, folder, console)
        with looping(run, console, ends_after=termination.reached) as loop:
            for _ in loop:
                pass
        return loop


def prepare(config: cfg.Config, mesh: Mesh, folder: Path, console: Console) -> Run:
    """A run before its first update; cheap checks come first."""
    say = functools.partial(logs.print_plain, console)
    outline = loading.outline(
        dataclasses.replace(
            loading.find_model(config.model), rendering=rendering(config.data)
        ),
        mesh=mesh,
        latent=config.latent,
        adapters=config.adapters,
        train_decoder=config.trains_decoder,
        row_length=config.packing.row_length,
    )
    config = run_folder.dated(config, outline.tokenizer, folder)
    if config.data.date is not None:
        say(
            f"date: the chat template writes today's; this run's is {config.data.date}"
            " also when it is resumed. Exports and answers have the day's own."
        )
    compared = reference.outline(config, outline)
    train, held_out = setup.read_pairs(config, outline.tokenizer)
    # Another config, data or JAX is refused before any process waits for the others.
    digests = setup.digests(outline.tokenizer, train, held_out or Pairs([]))
    processes.require_agreement(
        cfg.flat(config.of_all_processes()) | digests | {"jax": jax.__version__},
        "Start every process with the same command, code and data.",
    )
    if train.report is not None:
        for line in train.report.lines():
            say(line)
        for table in train.report.tables()[1:]:  # lengths and sources
            console.print(table)
    policy = loading.start(outline, seed=config.training.seed)
    return Run(
        config,
        policy,
        train,
        held_out,
        reference_policy=compared and loading.start(compared, seed=0).plain(),
        folder=folder,
        say=say,
    )


@contextlib.contextmanager
def looping(
    run: Run,
    console: Console,
    *,
    ends_after: Callable[[int], bool] = lambda done: False,
) -> Iterator[Loop]:
    """The loop over a run's updates, from its start or its latest checkpoint.

    A run with a folder leaves everything there: when the loop has ended, the plot too.
    """
    with contextlib.ExitStack() as closing:
        if run.folder is None:
            run.begin()
            yield Loop(run, closing.enter_context(_log(run, None, console)))
            return
        folder, config = run.folder, run.config
        run_folder.make(config, folder)
        checkpoints = Checkpoints(
            folder / loading.CHECKPOINTS,
            best_metric=config.training.best if len(run.held_out) else None,
            say=run.say,
        )
        closing.callback(checkpoints.close)
        resume_from = _resume(run, checkpoints) if config.run.resume else None
        if resume_from is None:
            run.begin()
        predicted = setup.compile_ahead(run)
        checkpoints.require_space(run.state)  # now, not when the first hours are done
        if processes.is_main():
            (folder / "config.py").write_text(cfg.source(config.of_all_processes()))
            text = json.dumps(run.manifest, indent=1)
            (folder / run_folder.MANIFEST).write_text(text)
        log = closing.enter_context(_log(run, resume_from, console))
        loop = Loop(
            run,
            log,
            checkpoints=checkpoints,
            manifest=run.manifest,
            ends_after=ends_after,
            report=functools.partial(nonfinite.report, run),
            trace=folder / "profile",
        )
        yield loop
        peak = memory.real_peak()
        if peak is not None:
            sizes = f"{memory.size(peak)} at the peak, {memory.size(predicted)}"
            log.say(f"memory: {sizes} predicted")
        log.finish(loop.after)


def _resume(run: Run, checkpoints: Checkpoints) -> int | None:
    """Restores the latest whole checkpoint and returns its step; None without one."""
    if checkpoints.latest() is None:
        return None
    run.forget_start()
    step, run.state = checkpoints.restore_latest(
        run.abstract_state(),
        accept=lambda saved: require_same(_fixed(saved), _fixed(run.manifest)),
    )
    return step


def _log(run: Run, resume_from: int | None, console: Console) -> logs.RunLog:
    """The log in the run's folder; of no folder, or another process: unread."""
    read = run.folder is not None and processes.is_main()
    return logs.RunLog(
        run.folder if read else None,
        name=run.config.name,
        project=run.config.run.project,
        trackers=run.config.run.trackers if read else (),
        settings=run.manifest["settings"],
        total_steps=run.total_steps,
        resume_from=resume_from,
        console=console,
        say=run.say,
    )
