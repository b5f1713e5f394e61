"""Plots of the codes' usage and of the map of z, as PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from lpc_jax.evaluation.codes.look import Code, Look, Prompt
from lpc_jax.files import untrusted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_SOURCE = 24
# CSS pixels per inch, and PNG pixels per CSS pixel.
_INCH, _DENSITY = 100, 2
# Okabe & Ito 2008, safe for the colour-blind, without yellow, which is faint on white.
# With the markers, 56 sources look different.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "os^DvhPX"


class Picture(NamedTuple):
    """A PNG, and the size it is shown at, in CSS pixels."""

    base64: str
    width: int
    height: int


def shown_source(source: str) -> str:
    """A source's name, which is untrusted, short and printable."""
    return untrusted.shown(source, most=_LONGEST_SOURCE)


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # Slow to import; drawing needs no window.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _picture(figure: Figure) -> Picture:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_INCH * _DENSITY)
    width, height = (round(inches * _INCH) for inches in figure.get_size_inches())
    return Picture(base64.b64encode(file.getvalue()).decode(), width, height)


def _over_codes(drawn: Sequence[Code], height: float) -> tuple[Figure, Axes]:
    figure, axes = _figure(min(10.4, 3.0 + 0.2 * len(drawn)), height)
    labels = [str(code.index) for code in drawn]
    axes.set_xticks(range(len(drawn)), labels, fontsize=8 if len(drawn) < 40 else 6.5)
    axes.set_xlabel("code")
    return figure, axes


def usage(look: Look, drawn: Sequence[Code]) -> Picture:
    """Bars of each code's usage; points: share of prompts whose largest it is."""
    figure, axes = _over_codes(drawn, 3.2)
    bars = [100 * code.usage for code in drawn]
    largest = [100 * code.largest_share for code in drawn]
    uniform = 100 / len(look.codes)
    at = range(len(drawn))
    axes.bar(at, bars, 0.8, color=_COLOURS[0], label="usage")
    axes.plot(at, largest, "D", color=_COLOURS[1], markersize=4, label="largest code")
    axes.axhline(uniform, color="#59636e", linestyle="--", linewidth=1, label="uniform")
    axes.set_xlim(-0.7, len(drawn) - 0.3)
    axes.set_ylabel("% of prompts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return _picture(figure)


def by_source(look: Look, drawn: Sequence[Code]) -> Picture:
    """A heat map of each code's usage by source."""
    from matplotlib.colors import PowerNorm

    figure, axes = _over_codes(drawn, 1.4 + 0.32 * len(look.sources))
    shares = [[100 * code.usage_by_source[n] for code in drawn] for n in look.sources]
    image = axes.imshow(
        shares,
        aspect="auto",
        cmap="viridis",
        norm=PowerNorm(0.5, vmin=0, vmax=float(np.max(shares))),
        interpolation="nearest",
    )
    labels = [f"{shown_source(name)} ({count})" for name, count in look.sources.items()]
    # A source's name may have a dollar, which would begin a formula.
    axes.set_yticks(range(len(labels)), labels, parse_math=False)
    figure.colorbar(image, ax=axes, label="usage, %", pad=0.01)
    return _picture(figure)


def of_places(prompts: Sequence[Prompt], sources: Sequence[str]) -> Picture:
    """The map of z, coloured by source; each prompt has a place."""
    figure, axes = _figure(7.6, 6.2)
    handles, labels = [], []
    for number, source in enumerate(sources):
        places = [p.place for p in prompts if p.source == source and p.place]
        x, y = np.reshape(places, (-1, 2)).T
        marker = _MARKERS[number % len(_MARKERS)]
        colour = _COLOURS[number % len(_COLOURS)]
        look = {"alpha": 0.8, "linewidths": 0.3, "edgecolors": "white"}
        handles.append(axes.scatter(x, y, s=28, marker=marker, color=colour, **look))
        # The number first: a label that begins with _ would be left out.
        labels.append(f"{len(places)} {shown_source(source)}")
    axes.set_xticks([])
    axes.set_yticks([])
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=11
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _picture(figure)
