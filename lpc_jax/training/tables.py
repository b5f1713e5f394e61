"""A run's final tables and plot; any metric may be absent."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.special
from jaxtyping import Float
from rich.table import Table
from rich.text import Text

from lpc_jax.files import untrusted

# Prefix of the held-out accuracy of one source of pairs.
SOURCE_ACCURACY = "reward/accuracy/"
# Rows of the final table: metric, what to call it.
_ROWS = {
    "reward/accuracy": "preference accuracy",
    SOURCE_ACCURACY: "",
    "reward/margin": "reward margin",
    "loss/preference": "preference loss",
    "logp_per_token/chosen": "log-prob per chosen token",
    "latent/kl": "KL(posterior || prior)",
    "latent/effect": "KL(under z || without)",
    "code/perplexity": "codes in use (perplexity)",
    "code/source_nmi": "NMI of code and source",
    "answers/ended": "answers that ended",
    "answers/circle": "answers in a circle",
    "answers/tokens": "tokens an answer",
    "answers/length_ratio": "  over the chosen's",
}
_CODES_SHOWN = 3
# Panels of the plot: metric, its axis.
_PANELS = {
    "loss/preference": "preference loss",
    "reward/accuracy": "preference accuracy",
}
# From this many log lines on, the plot shows a running mean over this share of them.
_SMOOTHED_FROM, _WINDOW_SHARE = 40, 0.05
_TRAIN_COLOUR, _HELD_OUT_COLOUR = "#4c72b0", "#dd8452"


def summary(before: Mapping[str, Any], after: Mapping[str, float]) -> Table:
    """Held-out metrics before and after training, and their change."""
    table = Table(title="Held-out pairs", title_justify="left")
    table.add_column("metric", no_wrap=True)
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in changes(before, after):
        table.add_row(*row)
    return table


def changes(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, str, str, str]]:
    """Rows of held-out metrics: what it is, before, after and change."""
    rows = []
    for path, label in _ROWS.items():
        names = {path: label} if path in after else {}
        if path == SOURCE_ACCURACY:
            sources = sorted(name for name in after if name.startswith(path))
            names = {name: f"  {name.removeprefix(path)}" for name in sources}
        for name, shown in names.items():
            old, change = "-", "-"
            if name in before:
                old = f"{before[name]:.4f}"
                change = f"{after[name] - before[name]:+.4f}"
            rows.append((shown, old, f"{after[name]:.4f}", change))
    return rows


def usage(usage_by_source: Mapping[str, Float[np.ndarray, "C"]]) -> Table:
    """The prior's mean code usage for each source of prompts."""
    table = Table(title="Code usage by source", title_justify="left")
    table.add_column("source", no_wrap=True)
    table.add_column("codes in use", justify="right")
    table.add_column("most used: code (share)")
    for source, used in sorted(usage_by_source.items()):
        shares = used / used.sum()
        perplexity = math.exp(scipy.special.entr(shares).sum())
        top = np.argsort(-shares, kind="stable")[:_CODES_SHOWN]
        table.add_row(
            Text(untrusted.shown(source)),
            f"{perplexity:.1f} of {len(shares)}",
            ", ".join(f"{code} ({shares[code]:.0%})" for code in top),
        )
    return table


def plot(
    path: Path,
    title: str,
    train: Sequence[Mapping[str, Any]],
    held_out: Sequence[Mapping[str, Any]],
) -> None:
    """Draws preference loss and accuracy by ``step`` as a PNG file."""
    # Slow to import, and only needed once, at the end.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), _PANELS, strict=True):
        steps, values = _series(train, name)
        window = max(2, round(len(steps) * _WINDOW_SHARE))
        colour, label = {"color": _TRAIN_COLOUR}, "training"
        if len(steps) >= _SMOOTHED_FROM:
            axes.plot(steps, values, alpha=0.25, linewidth=1, **colour)
            label = f"training, mean of {window} log lines"
            axes.plot(steps, _running_mean(values, window), label=label, **colour)
        elif len(steps):
            axes.plot(steps, values, ".-", label=label, **colour)
        steps, values = _series(held_out, name)
        if len(steps):
            axes.plot(steps, values, "o-", color=_HELD_OUT_COLOUR, label="held out")
        if name == "reward/accuracy":
            axes.axhline(0.5, color="grey", linestyle=":", label="chance")
            axes.set_ylim(-0.02, 1.02)
        axes.set_xlabel("step")
        axes.set_ylabel(_PANELS[name])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


def _series(
    records: Sequence[Mapping[str, Any]], name: str
) -> tuple[Float[np.ndarray, "n"], Float[np.ndarray, "n"]]:
    points = [(record["step"], record[name]) for record in records if name in record]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
    return steps, values


def _running_mean(
    values: Float[np.ndarray, "n"], window: int
) -> Float[np.ndarray, "n"]:
    """Mean of each value and up to ``window - 1`` before it, without NaN."""
    ends = range(1, len(values) + 1)
    windows = [values[max(end - window, 0) : end] for end in ends]
    finite = [part[np.isfinite(part)] for part in windows]
    return np.array([part.mean() if len(part) else np.nan for part in finite])
