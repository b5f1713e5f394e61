"""The training loop: updates in order; logs, evaluations and checkpoints between."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lpc_jax import config as cfg
from lpc_jax.evaluation import preference
from lpc_jax.generation import samples
from lpc_jax.metrics import Sums, values
from lpc_jax.runtime import checkpoint
from lpc_jax.training import health
from lpc_jax.training.log import EVALUATION, TRAIN, RunLog
from lpc_jax.training.run import Update

# Updates before a trace begins: the first ones compile and warm up.
_UNPROFILED = 2
# Exit statuses: 128 + SIGTERM, as in a shell, and one that nothing else has.
TERMINATED, NONFINITE = 143, 3


class StoppedError(Exception):
    """A resumable end before the last step; the command exits with ``status``."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def _due(every: int | None, done: int, total: int) -> bool:
    return done == total or (every is not None and done % every == 0)


@runtime_checkable
class Trainable(Protocol):
    """What the loop drives: a ``Run``, or another source of updates."""

    config: cfg.Config
    total_steps: int
    state: Any  # what a checkpoint keeps
    prepare: Callable[[], None]  # packs the next step's pairs
    update: Callable[[], Update]
    add: Callable[[Sums, Sums], Sums]  # two updates' metric sums
    schedules: Callable[[int], dict[str, float]]  # their values at an update
    evaluate: Callable[[], preference.Evaluation]  # on all held-out pairs
    answers: Callable[[], list[samples.Sample]]  # to sampled held-out prompts

    @property
    def done(self) -> int:
        """Updates done."""
        ...

    @property
    def held_out(self) -> Sized:
        """Pairs to evaluate on."""
        ...


@dataclasses.dataclass
class Loop:
    """Drives a run's updates; iterate it for the metrics of every log line."""

    run: Trainable
    log: RunLog
    checkpoints: checkpoint.Checkpoints | None = None
    # Saved with each checkpoint.
    manifest: dict[str, Any] = dataclasses.field(default_factory=dict)
    ends_after: Callable[[int], bool] = lambda done: False  # whether to stop there
    # Message when too many updates are skipped: the last one, its number, how many.
    report: Callable[[Update, int, int], str] = lambda *_: "gradients are not finite"
    trace: Path | None = None  # where a profile goes
    before: preference.Evaluation | None = None  # before the first update
    after: preference.Evaluation | None = None  # after the last

    def __post_init__(self) -> None:
        self._warned: set[str] = set()
        self._skipped_in_a_row = 0
        self._restart()

    def _restart(self) -> None:
        self._sums: Sums = {}  # over the steps since the last line
        self._finite: list[jax.Array] = []  # likewise, of each
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._tokens, self._pairs = time.perf_counter(), 0, 0

    def __iter__(self) -> Iterator[dict[str, float]]:
        """Yields the metrics of every log line as updates are made."""
        run, training, total = self.run, self.run.config.training, self.run.total_steps
        first = run.done
        if first:
            self.log.say(f"resumed after step {first}")
        elif len(run.held_out):
            self.before = self._evaluate(0)
        self._restart_clock()
        profiled = self._profiled(first)
        if first < total:
            run.prepare()
        for done in range(first + 1, total + 1):
            if profiled and done - 1 == profiled.start:
                jax.profiler.start_trace(str(self.trace))
            update = run.update()
            self._count(update)
            if done - 1 in profiled and done in (profiled.stop, total):
                jax.block_until_ready(run.state)
                jax.profiler.stop_trace()
                self.log.say(f"step {done}: trace in {self.trace}")
            metrics = evaluation = None
            if _due(training.log_every, done, total):
                metrics = self._log(done, update)
            if len(run.held_out) and _due(training.eval_every, done, total):
                evaluation = self.after = self._evaluate(done)
                self._restart_clock()
            self._save(done, evaluation)
            if metrics is not None:
                yield {"step": done} | metrics
        if self.checkpoints is not None:
            self.checkpoints.wait()

    def _profiled(self, first: int) -> range:
        begin = first + _UNPROFILED
        count = 0 if self.trace is None else self.run.config.run.profile or 0
        if count and begin >= self.run.total_steps:
            self.log.say(
                f"run.profile: nothing is traced, since {_UNPROFILED} updates go before"
                f" a trace and the run has {self.run.total_steps - first} left"
            )
        return range(begin, begin + count)

    def _count(self, update: Update) -> None:
        more = update.sums
        self._sums = self.run.add(self._sums, more) if self._sums else more
        self._finite.append(update.finite)
        self._tokens += update.tokens
        self._pairs += update.pairs

    def _log(self, done: int, update: Update) -> dict[str, float]:
        """Logs the updates since the last line, waiting for them; may end the run."""
        metrics = values(self._sums) | self.run.schedules(done - 1)
        elapsed = time.perf_counter() - self._since
        finite = jax.device_get(self._finite)
        for made in finite:
            self._skipped_in_a_row = 0 if made else self._skipped_in_a_row + 1
        skipped = 1.0 - float(np.mean(finite))
        metrics |= {
            "gradient/skipped": skipped,
            "gradient/norm": float(update.norm),
            "speed/tokens_per_second": self._tokens / elapsed,
            "speed/pairs_per_second": self._pairs / elapsed,
        }
        if not len(self.run.held_out):
            metrics |= health.over_start(metrics, self.log.first(TRAIN) or metrics)
        self.log.train(done, metrics)
        if skipped:
            self.log.say(
                f"step {done}: {skipped:.0%} of updates skipped: gradient not finite"
            )
        self._warn(done, metrics, {})
        self._restart()
        if self._skipped_in_a_row >= self.run.config.training.max_skipped:
            text = self.report(update, done - 1, self._skipped_in_a_row)
            raise self._stopped(text, NONFINITE)
        return metrics

    def _stopped(self, text: str, status: int) -> StoppedError:
        if self.checkpoints is not None:
            self.checkpoints.wait()
        return StoppedError(text, status)

    def _warn(
        self, done: int, metrics: Mapping[str, float], start: Mapping[str, Any]
    ) -> None:
        latent = self.run.config.latent
        num_codes = None if latent is None else latent.num_codes
        for warning in health.warnings(metrics, start, num_codes):
            if warning not in self._warned:
                self._warned.add(warning)
                self.log.say(f"step {done}: warning: {warning}")

    def _evaluate(self, done: int) -> preference.Evaluation:
        evaluation = self.run.evaluate()
        answers = self.run.answers()
        metrics = evaluation.metrics
        start = self.log.first(EVALUATION) if done else metrics
        metrics.update(samples.measure(answers))
        metrics.update(health.over_start(metrics, start))
        self.log.evaluation(done, metrics, evaluation.accuracy_by_source)
        self.log.samples(answers)
        self._warn(done, metrics, start)
        return evaluation

    def _save(self, done: int, evaluation: preference.Evaluation | None) -> None:
        """Saves a checkpoint when due; ends the run when it was asked to."""
        total, every = self.run.total_steps, self.run.config.training.checkpoint_every
        ended = done < total and self.ends_after(done)
        if self.checkpoints is not None and (ended or _due(every, done, total)):
            metrics = None if evaluation is None else evaluation.metrics
            self.checkpoints.save(
                done, self.run.state, meta=self.manifest, metrics=metrics
            )
        if ended:
            text = f"terminated after step {done} of {total}, which is saved: --resume"
            raise self._stopped(f"{text} continues from there.", TERMINATED)
