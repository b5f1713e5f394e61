"""A run that computes nothing: what the training loop does with any source of updates.

An update takes microseconds, and its metrics are given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from lpc_jax import config as cfg
from lpc_jax import metrics
from lpc_jax.evaluation.preference import Evaluation
from lpc_jax.generation.samples import Sample
from lpc_jax.runtime import checkpoint
from lpc_jax.training import log as logs
from lpc_jax.training import loop
from lpc_jax.training.run import Update
from tests.runs import config as config_of_a_run

PAIRS, TOKENS = 2, 10  # of an update


class Saves(checkpoint.Checkpoints):
    """Notes what would be saved: step, state, record and metrics."""

    def __init__(self, calls: list[str]) -> None:
        self.saved: list[tuple[int, Any, dict[str, Any], dict[str, float] | None]] = []
        self._calls = calls

    def save(
        self,
        step: int,
        state: Any,
        *,
        meta: dict[str, Any],
        metrics: dict[str, float] | None,
    ) -> None:
        self.saved.append((step, state, meta, metrics))

    def wait(self) -> None:
        self._calls.append("wait")


class Log(logs.RunLog):
    """A log that is kept, with all that it said and when it was written."""

    def __init__(self, folder: Path, calls: list[str], **settings: Any) -> None:
        self.said: list[str] = []
        super().__init__(
            folder,
            name="fake",
            project="tests",
            trackers=(),
            settings={},
            console=None,
            say=self.said.append,
            **settings,
        )
        self._calls = calls

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        self._calls.append("log")
        super().train(step, metrics)


@dataclasses.dataclass
class Fake:
    """What a loop drives, and what it made of it.

    Attributes:
        updates: Metrics of each update, from the first; its length is the run's.
        evaluations: Of each evaluation, in order; without any nothing is held out.
        skipped: Updates, counted from 1, whose gradients were not finite.
        done: Updates done.
        calls: Names of the loop's calls, in order.
    """

    folder: Path
    updates: Sequence[dict[str, float]]
    evaluations: Sequence[dict[str, float]] = ()
    skipped: Sequence[int] = ()
    done: int = 0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    run: dict[str, Any] = dataclasses.field(default_factory=dict)
    calls: list[str] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        changes: dict[str, Any] = {"training": self.training, "run": self.run}
        if not self.evaluations:
            changes["data"] = {"eval": None}
        self.config: cfg.Config = config_of_a_run(self.folder, **changes)
        self.total_steps = len(self.updates)
        self.held_out = range(bool(self.evaluations))
        self._evaluations = iter(self.evaluations)
        self.log = Log(
            self.folder / "log",
            self.calls,
            total_steps=self.total_steps,
            resume_from=self.done or None,
        )
        self.checkpoints = Saves(self.calls)
        self.loop = loop.Loop(self, self.log, checkpoints=self.checkpoints)

    @property
    def state(self) -> str:
        """Names the updates done."""
        return f"after {self.done}"

    def prepare(self) -> None:
        """Notes the call."""
        self.calls.append("prepare")

    def update(self) -> Update:
        """The next update."""
        self.calls.append("update")
        self.done += 1
        return Update(
            {
                name: (jnp.float32(value * PAIRS), jnp.float32(PAIRS))
                for name, value in self.updates[self.done - 1].items()
            },
            norm=jnp.float32(self.done),
            finite=jnp.asarray(self.done not in self.skipped),
            batches=[],
            pairs=PAIRS,
            tokens=TOKENS,
        )

    def add(self, sums: metrics.Sums, more: metrics.Sums) -> metrics.Sums:
        """Added up."""
        return {
            name: (total + more[name][0], count + more[name][1])
            for name, (total, count) in sums.items()
        }

    def schedules(self, number: int) -> dict[str, float]:
        """The update's own number."""
        return {"schedule/learning_rate": float(number)}

    def evaluate(self) -> Evaluation:
        """The next evaluation."""
        self.calls.append("evaluate")
        return Evaluation(
            metrics=dict(next(self._evaluations)),
            accuracy_by_source={"facts": 0.5},
            usage_by_source={"facts": np.ones(1, np.float32)},
            margins={0: 1.0},
        )

    def answers(self) -> list[Sample]:
        """None."""
        return []

    def drive(self, **settings: Any) -> list[dict[str, float]]:
        """Runs the loop to its end; returns what it yields."""
        for name, value in settings.items():
            setattr(self.loop, name, value)
        return list(self.loop)

    def lines(self, split: str) -> list[dict[str, Any]]:
        """Log lines of training or evaluation."""
        return [r for r in logs.read(self.folder / "log") if r["split"] == split]
