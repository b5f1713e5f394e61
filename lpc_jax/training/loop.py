"""The training loop: log, evaluate, checkpoint, resume.

Knows nothing of how an update is made.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from lpc_jax import assembly, checkpoint, objective, processes, sharding
from lpc_jax import config as cfg
from lpc_jax.errors import UserError
from lpc_jax.evaluation import preference
from lpc_jax.generation import samples
from lpc_jax.training import health, memory, nonfinite, runfolder
from lpc_jax.training.runlog import EVALUATION, TRAIN, RunLog, require_trackers
from lpc_jax.training.trainer import Trainer
from lpc_jax.types import TrainState

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

# Updates before a trace begins.
_UNPROFILED = 2

# Exit statuses: as a shell has it, 128 + SIGTERM; and one that nothing else has.
TERMINATED, NONFINITE = 143, 3


class StoppedError(Exception):
    """A run that ended before its last step, and left what it needs to go on.

    Attributes:
        status: What the command exits with.
    """

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


@dataclasses.dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder and the first and last evaluations."""

    folder: Path
    before: preference.Evaluation | None
    after: preference.Evaluation | None
    state: TrainState


def _require_resumable(saved: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuses to continue under other settings, weights or data."""

    def fixed(manifest: dict[str, Any]) -> dict[str, Any]:
        kept = {
            name: value
            for name, value in manifest["settings"].items()
            if not name.startswith(FREE_ON_RESUME)
        }
        digests = [name for name in manifest if name.endswith("_digest")]
        return kept | {name: manifest[name] for name in digests}

    # Through JSON, as the saved one went: tuples are lists on both sides.
    checkpoint.require_same(fixed(saved), fixed(json.loads(json.dumps(now))))


def _profiled(config: cfg.Config, first: int) -> range:
    """The updates that are traced: not the first two, which are like no other."""
    begin = first + _UNPROFILED
    return range(begin, begin + (config.run.profile or 0))


def _due(every: int | None, done: int, total: int) -> bool:
    return done == total or (every is not None and done % every == 0)


@contextlib.contextmanager
def _checkpoints(trainer: Trainer) -> Iterator[checkpoint.Checkpoints]:
    kept = checkpoint.Checkpoints(
        trainer.folder / "checkpoints",
        best_metric=trainer.config.training.best if trainer.held_out else None,
        say=trainer.say,
    )
    try:
        yield kept
    finally:
        kept.close()


def train(config: cfg.Config, console: Console) -> Result:
    """Runs what a config asks for and leaves everything in the run folder.

    With several processes, which have joined before, all of them call it alike.

    Args:
        config: The run.
        console: Where to say what happens; plain lines when not a terminal. Only the
            main process says anything.

    Raises:
        UserError: Something that the user can mend, before any compute.
        OSError: A disk or a file that fails.
        StoppedError: The run was asked to end, or gradients stay non-finite.
        LostError: Another process of the run has ended.
        DamagedError: With several processes, the latest checkpoint was damaged; the
            next start goes on from the one before.
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
        assembly.keep_compiled(Path(config.run.compilation_cache))
    with (
        processes.together(),
        processes.Termination().watched() as termination,
        runfolder.held(config) as folder,
        jax.set_mesh(mesh),
    ):
        trainer = Trainer(config, folder, mesh, console)
        return _run(trainer, termination)


def _run(trainer: Trainer, termination: processes.Termination) -> Result:
    config, folder = trainer.config, trainer.folder
    runfolder.make(config, folder)
    with _checkpoints(trainer) as kept:
        restored = None
        if config.run.resume and kept.latest() is not None:
            trainer.forget_start()
            restored = kept.restore_latest(
                trainer.abstract_state(),
                accept=lambda saved: _require_resumable(saved, trainer.manifest),
            )
        resume_from, state = restored or (None, trainer.initial_state())
        trainer.compile()
        kept.require_space(state)  # now, and not when the first hours are done
        if processes.is_main():
            (folder / "config.py").write_text(cfg.source(config.of_all_processes()))
            text = json.dumps(trainer.manifest, indent=1)
            (folder / "manifest.json").write_text(text)
        with (
            _log_folder(folder) as log_folder,
            RunLog(
                log_folder,
                name=config.name,
                project=config.run.project,
                trackers=config.run.trackers if processes.is_main() else (),
                settings=trainer.manifest["settings"],
                total_steps=trainer.total_steps,
                resume_from=resume_from,
                console=trainer.console,
            ) as log,
        ):
            return _updates(trainer, kept, log, state, resume_from, termination)


@contextlib.contextmanager
def _log_folder(folder: Path) -> Iterator[Path]:
    """Where this process logs: the main one for people, others for nobody."""
    if processes.is_main():
        yield folder
    else:
        with tempfile.TemporaryDirectory() as unread:
            yield Path(unread)


def _updates(
    trainer: Trainer,
    kept: checkpoint.Checkpoints,
    log: RunLog,
    state: TrainState,
    resume_from: int | None,
    termination: processes.Termination,
) -> Result:
    config, total = trainer.config, trainer.total_steps
    codes = config.latent.num_codes if config.latent is not None else None
    before = after = None
    warned: set[str] = set()

    def warn(done: int, metrics: dict[str, float], start: dict[str, Any]) -> None:
        for warning in health.warnings(metrics, start, codes):
            if warning not in warned:
                warned.add(warning)
                log.say(f"step {done}: warning: {warning}")

    def evaluate(done: int) -> preference.Evaluation:
        found = trainer.evaluate(state)
        answers = trainer.answers(state)
        start = log.first(EVALUATION) if done else found.metrics
        found.metrics.update(samples.measure(answers))
        found.metrics.update(health.over_start(found.metrics, start))
        log.evaluation(done, found.metrics, found.accuracy_by_source)
        log.samples(answers)
        warn(done, found.metrics, start)
        return found

    if resume_from is not None:
        log.say(f"resumed after step {resume_from}")
    elif trainer.held_out:
        before = evaluate(0)
    since, tokens, pairs_done = time.perf_counter(), 0, 0
    logged: objective.Sums = {}  # over the steps since the last line
    finites: list[jax.Array] = []  # likewise, of each
    skipped_in_a_row = 0
    first = int(state.step)
    profiled = _profiled(config, first)
    if profiled and profiled.start >= total:
        log.say(
            f"run.profile: nothing is traced, since {_UNPROFILED} updates go before a"
            f" trace and the run has {total - first} left"
        )
    following = trainer.step_batches(first) if first < total else None
    for number in range(first, total):
        assert following is not None, "prepared in the step before"
        batches, pairs, step_tokens = following
        if profiled and number == profiled.start:
            jax.profiler.start_trace(str(trainer.folder / "profile"))
        state, sums, norm, finite = trainer.update(state, batches, pairs)
        # While the devices work; what is logged below waits for them.
        following = trainer.step_batches(number + 1) if number + 1 < total else None
        finites.append(finite)
        logged = trainer.programs.add(logged, sums) if logged else sums
        tokens, pairs_done = tokens + step_tokens, pairs_done + pairs
        done = number + 1
        if number in profiled and done in (profiled.stop, total):
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            log.say(f"step {done}: trace in {trainer.folder / 'profile'}")
        if done % config.training.log_every == 0 or done == total:
            metrics = objective.values(logged) | trainer.schedules(number)
            elapsed = time.perf_counter() - since
            for one in jax.device_get(finites):
                skipped_in_a_row = 0 if one else skipped_in_a_row + 1
            metrics |= {
                "gradient/skipped": 1.0 - float(np.mean(jax.device_get(finites))),
                "gradient/norm": float(norm),
                "speed/tokens_per_second": tokens / elapsed,
                "speed/pairs_per_second": pairs_done / elapsed,
            }
            if not trainer.held_out:
                metrics |= health.over_start(metrics, log.first(TRAIN) or metrics)
            log.train(done, metrics)
            if metrics["gradient/skipped"]:
                share = f"{metrics['gradient/skipped']:.0%}"
                log.say(f"step {done}: {share} of updates skipped: gradient not finite")
            warn(done, metrics, {})
            since, tokens, pairs_done = time.perf_counter(), 0, 0
            logged, finites = {}, []
            if skipped_in_a_row >= config.training.max_skipped:
                kept.wait()
                raise StoppedError(
                    nonfinite.report(trainer, state, batches, number, skipped_in_a_row),
                    NONFINITE,
                )
        evaluation = None
        if trainer.held_out and _due(config.training.eval_every, done, total):
            evaluation = after = evaluate(done)
            since, tokens, pairs_done = time.perf_counter(), 0, 0
        ended = done < total and termination.reached(done)
        if ended or _due(config.training.checkpoint_every, done, total):
            kept.save(
                done,
                state,
                meta=trainer.manifest,
                metrics=evaluation.metrics if evaluation is not None else None,
            )
        if ended:
            kept.wait()
            raise StoppedError(
                f"terminated after step {done} of {total}, which is saved: --resume"
                " continues from there.",
                TERMINATED,
            )
    kept.wait()
    peak = memory.real_peak()
    if peak is not None and trainer.predicted_peak is not None:
        log.say(
            f"memory: {memory.size(peak)} at the peak,"
            f" {memory.size(trainer.predicted_peak)} predicted"
        )
    log.finish(before=before, after=after)
    return Result(trainer.folder, before, after, state)
