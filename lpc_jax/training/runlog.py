"""What a run says while it goes, and what it leaves to read: lines, table, plot.

``metrics.jsonl`` is always written and is the only source of the plot; trackers are
told the same numbers. Knows nothing of how a number was made: metrics are names and
floats, and any of them may be absent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib
import json
import math
import os
import time
import types
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from lpc_jax import untrusted
from lpc_jax.errors import UserError
from lpc_jax.evaluation.preference import Evaluation
from lpc_jax.generation import samples
from lpc_jax.generation.samples import Sample

METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "plot.png"

TRAIN, EVALUATION = "train", "eval"

# Fields of a line of metrics.jsonl that are no metrics.
_STEP, _SPLIT, _TIME, _NONFINITE = "step", "split", "time", "nonfinite"

# A held-out accuracy of one source of pairs is this path with the source's name.
_SOURCE_ACCURACY = "reward/accuracy/"

_SPEED = "speed/tokens_per_second"

# What is printed of a log line, and how.
_WATCHED = {
    "loss/total": "loss {:.4f}",
    "reward/accuracy": "accuracy {:.3f}",
    "reward/margin": "margin {:+.4f}",
    _SPEED: "{:,.0f} tokens/s",
}

# Rows of the final table: metric, what to call it.
_TABLE = (
    ("reward/accuracy", "preference accuracy"),
    (_SOURCE_ACCURACY, ""),
    ("reward/margin", "reward margin"),
    ("loss/preference", "preference loss"),
    ("logp_per_token/chosen", "log-prob per chosen token"),
    ("latent/kl", "KL(posterior || prior)"),
    ("latent/effect", "KL(under z || without)"),
    ("code/source_nmi", "NMI of code and source"),
    ("answers/ended", "answers that ended"),
    ("answers/circle", "answers in a circle"),
    ("answers/tokens", "tokens an answer"),
    ("answers/length_ratio", "  over the chosen's"),
)

_CODES_SHOWN = 3

# From this many log lines on, the plot shows a running mean over this share of them.
_SMOOTHED_FROM = 40
_WINDOW_SHARE = 0.05
_TRAIN_COLOUR, _HELD_OUT_COLOUR = "#4c72b0", "#dd8452"


@runtime_checkable
class Tracker(Protocol):
    """Where numbers go besides ``metrics.jsonl``."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of one step, named ``train/...`` or ``eval/...``."""
        ...

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes rows of texts and numbers, such as answers."""
        ...

    def close(self) -> None:
        """Writes out what is left."""
        ...


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder."""

    def __init__(
        self,
        module: types.ModuleType,
        folder: Path,
        settings: Mapping[str, Any],
        resume_from: int | None,
    ) -> None:
        # What an earlier attempt logged from purge_step on is hidden by TensorBoard.
        purge_step = 0 if resume_from is None else resume_from + 1
        self._writer = module.SummaryWriter(
            str(folder / "tensorboard"), purge_step=purge_step
        )
        text = json.dumps(settings, indent=1)
        self._writer.add_text("settings", f"```\n{text}\n```", resume_from or 0)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds scalars."""
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


class WeightsAndBiases:
    """A W&B run; a resumed run continues under the id kept in ``wandb_id``."""

    def __init__(
        self,
        module: types.ModuleType,
        folder: Path,
        settings: Mapping[str, Any],
        resume_from: int | None,
        *,
        name: str,
        project: str,
    ) -> None:
        kept = folder / "wandb_id"
        if resume_from is None or not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        self._module = module
        self._run = module.init(
            project=project,
            name=name,
            dir=str(folder),
            config=dict(settings),
            id=kept.read_text(),
            resume="allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs; W&B ignores steps that the earlier attempt had already reached."""
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table."""
        data = [list(row.values()) for row in rows]
        table = self._module.Table(columns=list(rows[0]), data=data)
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Ends the W&B run."""
        self._run.finish()


class Trackio:
    """A trackio run; a resumed run continues under its name."""

    def __init__(
        self,
        module: types.ModuleType,
        settings: Mapping[str, Any],
        resume_from: int | None,
        *,
        name: str,
        project: str,
    ) -> None:
        self._module = module
        self._run = module.init(
            project=project,
            name=name,
            config=dict(settings),
            resume="never" if resume_from is None else "allow",
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs."""
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs a table."""
        data = [list(row.values()) for row in rows]
        table = self._module.Table(columns=list(rows[0]), data=data)
        self._run.log({name: table}, step=step)

    def close(self) -> None:
        """Ends the trackio run."""
        self._run.finish()


# The package behind each tracker; the extra that installs it has the tracker's name.
_PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def _tracker_package(tracker: str) -> types.ModuleType:
    if tracker not in _PACKAGES:
        raise UserError(
            f"run.trackers must be of {', '.join(_PACKAGES)}, got {tracker!r}."
        )
    package = _PACKAGES[tracker]
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


def require_trackers(trackers: Sequence[str]) -> None:
    """Refuses trackers that cannot be had, before anything is computed.

    Raises:
        UserError: A tracker is unknown, or its package not installed.
    """
    for tracker in trackers:
        _tracker_package(tracker)


class RunLog:
    """The log of one run; a context manager, closed on errors too.

    Args:
        folder: The run folder; ``metrics.jsonl``, ``plot.png`` and trackers' files go
            there.
        name: The run's name, for trackers.
        project: The project's name, for trackers.
        trackers: Any of ``tensorboard``, ``wandb``, ``trackio``.
        settings: The run's settings by dotted name, for trackers.
        total_steps: Updates of the whole run.
        resume_from: Updates done before, or None for a new run. Lines of an earlier
            attempt beyond them are removed; of a new run, all.
        console: Where a person reads; None says nothing.

    Raises:
        UserError: A tracker's package is not installed, or ``metrics.jsonl`` is
            broken. Nothing was changed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        project: str,
        trackers: Sequence[str],
        settings: Mapping[str, Any],
        total_steps: int,
        resume_from: int | None,
        console: Console | None,
    ) -> None:
        self._folder, self._name = folder, name
        self._total, self._start = total_steps, resume_from or 0
        self._console = console if console is not None else Console(quiet=True)
        self._pace: tuple[int, float] | None = None  # step and time of the first line
        self._progress: Progress | None = None
        self._first: dict[str, dict[str, Any]] = {}
        packages = {tracker: _tracker_package(tracker) for tracker in trackers}
        folder.mkdir(parents=True, exist_ok=True)
        _rewind(folder / METRICS_FILE, resume_from)
        samples.rewind(folder / samples.FILE, resume_from)
        self._closing = contextlib.ExitStack()
        self._trackers: list[Tracker] = []
        with contextlib.ExitStack() as on_error:
            self._file = on_error.enter_context(
                (folder / METRICS_FILE).open("a", encoding="utf-8")
            )
            for tracker, package in packages.items():
                made = self._tracker(
                    tracker, package, settings, resume_from, name=name, project=project
                )
                on_error.callback(made.close)
                self._trackers.append(made)
            self._closing = on_error.pop_all()

    def _tracker(
        self,
        tracker: str,
        package: types.ModuleType,
        settings: Mapping[str, Any],
        resume_from: int | None,
        *,
        name: str,
        project: str,
    ) -> Tracker:
        if tracker == "tensorboard":
            return TensorBoard(package, self._folder, settings, resume_from)
        if tracker == "wandb":
            return WeightsAndBiases(
                package,
                self._folder,
                settings,
                resume_from,
                name=name,
                project=project,
            )
        return Trackio(package, settings, resume_from, name=name, project=project)

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
                self._name,
                total=self._total,
                completed=self._start,
                status="compiling",
            )
            self._progress.start()
            self._closing.callback(self._progress.stop)
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def say(self, text: str) -> None:
        """A plain line, above the bar where there is one."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def train(self, step: int, metrics: Mapping[str, float]) -> None:
        """One log line of training: to the file, the trackers and the bar.

        Args:
            step: Updates done, this one included.
            metrics: By path.
        """
        self._record(step, TRAIN, metrics)
        remaining = self._remaining(step)
        status = [] if remaining is None else [f"eta {remaining}"]
        if self._progress is not None:
            # What a narrow terminal cuts off comes last.
            status += _brief(metrics, "loss/total", "reward/accuracy", _SPEED)
            self._progress.update(
                self._task, completed=step, status="  ".join(status), refresh=True
            )
        else:
            status = [*_brief(metrics, *_WATCHED), *status]
            width = len(str(self._total))
            self.say("  ".join([f"step {step:{width}}/{self._total}", *status]))

    def _remaining(self, step: int) -> datetime.timedelta | None:
        """Time left at the pace since the first line, which paid for compilation."""
        now = time.monotonic()
        if self._pace is None:
            self._pace = (step, now)
        first_step, first_time = self._pace
        if step == first_step:
            return None
        seconds = (now - first_time) / (step - first_step) * (self._total - step)
        return datetime.timedelta(seconds=round(seconds))

    def evaluation(
        self,
        step: int,
        metrics: Mapping[str, float],
        accuracy_by_source: Mapping[str, float] | None = None,
    ) -> None:
        """Metrics of the held-out pairs after a step; step 0 is before training.

        Args:
            step: Updates done.
            metrics: By path.
            accuracy_by_source: Recorded as ``reward/accuracy/SOURCE``.
        """
        by_source = _named_by_source(accuracy_by_source or {})
        self._record(step, EVALUATION, {**metrics, **by_source})
        self.say(f"step {step}: held out: {', '.join(_brief(metrics, *_WATCHED))}")

    def samples(self, answers: Sequence[Sample]) -> None:
        """Keeps the answers of an evaluation."""
        if not answers:
            return
        samples.append(self._folder / samples.FILE, answers)
        rows = [dataclasses.asdict(one) for one in answers]
        for tracker in self._trackers:
            tracker.table(answers[0].step, f"{EVALUATION}/samples", rows)

    def first(self, split: str) -> dict[str, Any]:
        """The first record of a split, or nothing where there is none yet."""
        if split not in self._first:
            records = (r for r in read(self._folder) if r[_SPLIT] == split)
            found = next(records, None)
            if found is None:
                return {}
            self._first[split] = found
        return self._first[split]

    def _record(self, step: int, split: str, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(_line(step, split, time.time(), values) + "\n")
        self._file.flush()
        named = {f"{split}/{name}": value for name, value in values.items()}
        for tracker in self._trackers:
            tracker.log(step, named)

    def finish(self, *, before: Evaluation | None, after: Evaluation | None) -> None:
        """Prints the final tables and draws ``plot.png``.

        Args:
            before: Held-out pairs before training; None (a resumed run) takes the
                first evaluation in ``metrics.jsonl``.
            after: Held-out pairs after training; None where there are none.
        """
        if self._progress is not None:
            self._progress.stop()
        if after is not None:
            first = _all_metrics(before) if before is not None else None
            if first is None:
                first = self.first(EVALUATION)
            self._console.print(summary_table(first, _all_metrics(after)))
            if after.usage_by_source:
                self._console.print(usage_table(after.usage_by_source))
            answers = samples.read(self._folder / samples.FILE)
            for line in samples.before_and_after(answers) if answers else ():
                self.say(line)
        self.say(f"plot: {plot(self._folder)}")


def _named_by_source(accuracies: Mapping[str, float]) -> dict[str, float]:
    return {f"{_SOURCE_ACCURACY}{name}": value for name, value in accuracies.items()}


def _all_metrics(evaluation: Evaluation) -> dict[str, float]:
    return evaluation.metrics | _named_by_source(evaluation.accuracy_by_source)


def _brief(metrics: Mapping[str, float], *names: str) -> list[str]:
    """What a person watches, of what is there."""
    return [_WATCHED[name].format(metrics[name]) for name in names if name in metrics]


def _line(step: int, split: str, when: float, metrics: Mapping[str, float]) -> str:
    """One JSON object; floats as Python writes them, which reads back exactly.

    JSON has no NaN or infinity: they are null, and named under ``nonfinite``.
    """
    nonfinite = {n: str(v) for n, v in metrics.items() if not math.isfinite(v)}
    record: dict[str, Any] = {_STEP: step, _SPLIT: split, _TIME: when}
    record |= {n: None if n in nonfinite else v for n, v in metrics.items()}
    if nonfinite:
        record[_NONFINITE] = nonfinite
    return json.dumps(record, allow_nan=False)


def read(folder: Path) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``: step, split, time and metrics; NaN is NaN again.

    Raises:
        UserError: A line that is not JSON, by file and line number. A last line cut
            off by a crash is passed over.
    """
    return [record for _, record in _lines(folder / METRICS_FILE)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found = []
    *whole, _cut_off = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(whole, 1):
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: must be a JSON object, got {line[:60]!r}."
                " Mend or remove the line."
            ) from error
        nonfinite = record.pop(_NONFINITE, {})
        record |= {name: float(value) for name, value in nonfinite.items()}
        found.append((line, record))
    return found


def _rewind(path: Path, resume_from: int | None) -> None:
    """Removes the lines of steps that will be done again, all or none of them."""
    kept: list[str] = []
    if resume_from is not None and path.exists():
        kept = [line for line, record in _lines(path) if record[_STEP] <= resume_from]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def summary_table(before: Mapping[str, Any], after: Mapping[str, float]) -> Table:
    """Held-out metrics before and after training, and how far they moved."""
    table = Table(title="Held-out pairs", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for path, label in _TABLE:
        names = {path: label} if path in after else {}
        if path == _SOURCE_ACCURACY:
            names = {
                name: f"  {name.removeprefix(path)}"
                for name in sorted(after)
                if name.startswith(path)
            }
        for name, shown in names.items():
            old, new = before.get(name), after[name]
            table.add_row(
                shown,
                "-" if old is None else f"{old:.4f}",
                f"{new:.4f}",
                "-" if old is None else f"{new - old:+.4f}",
            )
    return table


def usage_table(usage_by_source: Mapping[str, Float[np.ndarray, "C"]]) -> Table:
    """Which codes the prior uses for which source of prompts.

    Args:
        usage_by_source: Mean prior probability of each code, by source.
    """
    table = Table(title="Code usage by source", title_justify="left")
    table.add_column("source", no_wrap=True)
    table.add_column("codes in use", justify="right")
    table.add_column("most used: code (share)")
    for source, usage in sorted(usage_by_source.items()):
        shares = usage / usage.sum()
        used = shares[shares > 0]
        perplexity = math.exp(-float((used * np.log(used)).sum()))
        top = np.argsort(-shares, kind="stable")[:_CODES_SHOWN]
        table.add_row(
            Text(untrusted.shown(source)),
            f"{perplexity:.1f} of {len(shares)}",
            ", ".join(f"{code} ({shares[code]:.0%})" for code in top),
        )
    return table


def plot(folder: Path) -> Path:
    """Draws loss and accuracy over steps from ``metrics.jsonl`` alone.

    The loss is the preference loss, which training and held-out pairs have in common.

    Returns:
        The path of ``plot.png``.
    """
    # Slow to import, and only needed once, at the end.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read(folder)
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    names = ("loss/preference", "reward/accuracy")
    for axes, name, label in zip(
        panels, names, ("preference loss", "preference accuracy"), strict=True
    ):
        steps, values = _series(records, TRAIN, name)
        if len(steps) >= _SMOOTHED_FROM:
            window = max(2, round(len(steps) * _WINDOW_SHARE))
            axes.plot(steps, values, color=_TRAIN_COLOUR, alpha=0.25, linewidth=1)
            axes.plot(
                steps,
                _running_mean(values, window),
                color=_TRAIN_COLOUR,
                label=f"training, mean of {window} log lines",
            )
        elif len(steps):
            axes.plot(steps, values, ".-", color=_TRAIN_COLOUR, label="training")
        steps, values = _series(records, EVALUATION, name)
        if len(steps):
            axes.plot(steps, values, "o-", color=_HELD_OUT_COLOUR, label="held out")
        if name == "reward/accuracy":
            axes.axhline(0.5, color="grey", linestyle=":", label="chance")
            axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(folder.resolve().name)
    path = folder / PLOT_FILE
    figure.savefig(path, dpi=120)
    return path


def _series(
    records: Sequence[Mapping[str, Any]], split: str, name: str
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    points = [
        (float(record[_STEP]), float(record[name]))
        for record in records
        if record[_SPLIT] == split and name in record
    ]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _running_mean(
    values: Float[np.ndarray, "n"], window: int
) -> Float[np.ndarray, "n"]:
    """Mean of each value and up to ``window - 1`` before it, NaN passed over."""
    finite = np.isfinite(values)
    sums = np.cumsum(np.where(finite, values, 0.0))
    counts = np.cumsum(finite).astype(float)
    for total in (sums, counts):
        total[window:] -= total[:-window].copy()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
