"""The run log: ``metrics.jsonl``, printed lines or a bar, and trackers.

``metrics.jsonl`` is always written; the plot is drawn from it alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from lpc_jax.errors import UserError
from lpc_jax.evaluation.preference import Evaluation
from lpc_jax.files import whole
from lpc_jax.generation import samples
from lpc_jax.generation.samples import Sample
from lpc_jax.training import tables
from lpc_jax.training.trackers import Tracker, require_trackers, start_tracker

METRICS_FILE, PLOT_FILE = "metrics.jsonl", "plot.png"
TRAIN, EVALUATION = "train", "eval"
# Metrics printed of a log line, with their formats; the bar has less room.
_SPEED = "speed/tokens_per_second"
_WATCHED = {
    "loss/total": "loss {:.4f}",
    "reward/accuracy": "accuracy {:.3f}",
    "reward/margin": "margin {:+.4f}",
    _SPEED: "{:,.0f} tokens/s",
}
_ON_THE_BAR = ("loss/total", "reward/accuracy", _SPEED)


class RunLog:
    """The log of one run; a context manager, closed on errors too.

    Without a folder nothing is left of it. Lines beyond ``resume_from`` updates are
    removed; None, a new run, removes all.
    """

    def __init__(
        self,
        folder: Path | None,
        *,
        name: str,
        project: str,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        total_steps: int,
        resume_from: int | None,
        console: Console | None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self._name, self._total, self._start = name, total_steps, resume_from or 0
        self._console = console or Console(quiet=True)
        # Prints a line, above the bar if there is one, unless told otherwise.
        self.say = say or functools.partial(print_plain, self._console)
        self._pace: tuple[int, float] | None = None  # step and time of the first line
        self._progress: Progress | None = None
        self._first: dict[str, dict[str, Any]] = {}  # record of each split
        self._trackers: list[Tracker] = []
        require_trackers(trackers)
        about = {"name": name, "project": project, "settings": settings}
        with contextlib.ExitStack() as on_error:
            if folder is None:
                folder = Path(on_error.enter_context(tempfile.TemporaryDirectory()))
            self._folder = folder
            folder.mkdir(parents=True, exist_ok=True)
            self._rewind(resume_from)
            samples.rewind(folder / samples.FILE, resume_from)
            file = (folder / METRICS_FILE).open("a", encoding="utf-8")
            self._file = on_error.enter_context(file)
            for tracker in trackers:
                started = start_tracker(tracker, folder, resume_from, **about)
                on_error.callback(started.close)
                self._trackers.append(started)
            self._closing = on_error.pop_all()

    def _rewind(self, resume_from: int | None) -> None:
        """Removes the lines of steps after ``resume_from``, all or none of them."""
        path, text = self._folder / METRICS_FILE, ""
        if resume_from is not None and path.exists():
            for line, record in _lines(path):
                if record["step"] <= resume_from:
                    text += f"{line}\n"
                    self._first.setdefault(record["split"], record)
        whole.write(path, text)

    def __enter__(self) -> RunLog:
        if self._console.is_terminal and not self._console.quiet:
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}", markup=False),
                console=self._console,
            )
            self._task = self._progress.add_task(
                self._name, total=self._total, completed=self._start, status="compiling"
            )
            self._progress.start()
            self._closing.callback(self._progress.stop)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """Records metrics of training after ``step`` updates."""
        self._record(step, TRAIN, metrics)
        status = self._remaining(step)
        if self._progress is not None:
            # What a narrow terminal cuts off comes last.
            text = "  ".join([*status, *_brief(metrics, *_ON_THE_BAR)])
            self._progress.update(self._task, completed=step, status=text, refresh=True)
        else:
            place = f"step {step:{len(str(self._total))}}/{self._total}"
            self.say("  ".join([place, *_brief(metrics, *_WATCHED), *status]))

    def _remaining(self, step: int) -> list[str]:
        """Time left, paced from the first line, which includes compilation."""
        now = time.monotonic()
        if self._pace is None:
            self._pace = (step, now)
            return []
        first_step, first_time = self._pace
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return [f"eta {datetime.timedelta(seconds=round(seconds))}"]

    def evaluation(
        self,
        step: int,
        metrics: Mapping[str, float],
        accuracy_by_source: Mapping[str, float] | None = None,
    ) -> None:
        """Records held-out metrics, by source as ``reward/accuracy/SOURCE``."""
        by_source = _named_by_source(accuracy_by_source or {})
        self._record(step, EVALUATION, {**metrics, **by_source})
        self.say(f"step {step}: held out: {', '.join(_brief(metrics, *_WATCHED))}")

    def samples(self, answers: Sequence[Sample]) -> None:
        """Records the answers of an evaluation."""
        if not answers:
            return
        samples.append(self._folder / samples.FILE, answers)
        rows = [dataclasses.asdict(answer) for answer in answers]
        for tracker in self._trackers:
            tracker.table(answers[0].step, f"{EVALUATION}/samples", rows)

    def first(self, split: str) -> dict[str, Any]:
        """The first record of a split, empty if there is none."""
        return self._first.get(split, {})

    def _record(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._first.setdefault(split, values)
        self._file.write(_line(step, split, time.time(), values) + "\n")
        self._file.flush()
        named = {f"{split}/{name}": value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(step, named)

    def finish(self, after: Evaluation | None) -> None:
        """Prints the held-out tables, first against ``after``; draws the plot."""
        if self._progress is not None:
            self._progress.stop()
        if after is not None:
            by_source = _named_by_source(after.accuracy_by_source)
            now = after.metrics | by_source
            self._console.print(tables.summary(self.first(EVALUATION), now))
            if after.usage_by_source:
                self._console.print(tables.usage(after.usage_by_source))
            answers = samples.read(self._folder / samples.FILE)
            for line in samples.before_and_after(answers) if answers else ():
                self.say(line)
        records, path = read(self._folder), self._folder / PLOT_FILE
        train, held_out = (
            [record for record in records if record["split"] == split]
            for split in (TRAIN, EVALUATION)
        )
        tables.plot(path, self._folder.resolve().name, train, held_out)
        self.say(f"plot: {path}")


def print_plain(console: Console, text: str) -> None:
    """Prints a text as it is."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _named_by_source(accuracies: Mapping[str, float]) -> dict[str, float]:
    return {f"{tables.SOURCE_ACCURACY}{n}": value for n, value in accuracies.items()}


def _brief(metrics: Mapping[str, float], *names: str) -> list[str]:
    return [_WATCHED[name].format(metrics[name]) for name in names if name in metrics]


def _line(step: int, split: str, when: float, metrics: Mapping[str, float]) -> str:
    """One JSON object; non-finite values are null and named under ``nonfinite``."""
    nonfinite = {n: str(v) for n, v in metrics.items() if not math.isfinite(v)}
    record: dict[str, Any] = {"step": step, "split": split, "time": when}
    record |= {n: None if n in nonfinite else v for n, v in metrics.items()}
    if nonfinite:
        record["nonfinite"] = nonfinite
    return json.dumps(record, allow_nan=False)


def read(folder: Path) -> list[dict[str, Any]]:
    """Records of ``metrics.jsonl``; non-finite values are restored."""
    return [record for _, record in _lines(folder / METRICS_FILE)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    lines = []
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: must be a JSON object, got {line[:60]!r}."
                " Mend or remove the line."
            ) from error
        nonfinite = record.pop("nonfinite", {})
        record |= {name: float(value) for name, value in nonfinite.items()}
        lines.append((line, record))
    return lines
