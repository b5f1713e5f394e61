"""Pictures of a look at the codes, as PNG.

Knows nothing of pages.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from lpc_jax.evaluation.codes import Code, Look, Prompt
from lpc_jax.files import untrusted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LONGEST_SOURCE = 24

# CSS pixels of an inch, and how many of the picture's own each of them has.
_INCH, _DENSITY = 100, 2

# Okabe & Ito 2008, which the colour-blind can tell apart, less yellow, which white
# paper swallows. With the markers, 56 sources look different.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "os^DvhPX"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A PNG, and the size it is shown at, in CSS pixels."""

    base64: str
    width: int
    height: int


def shown_source(source: str) -> str:
    """A source's name, which others wrote, in a few printable characters."""
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


def _code_axis(axes: Axes, drawn: Sequence[Code]) -> None:
    labels = [str(code.index) for code in drawn]
    axes.set_xticks(range(len(drawn)), labels, fontsize=8 if len(drawn) < 40 else 6.5)
    axes.set_xlabel("code")


def _code_width(count: int) -> float:
    """Inches that so many codes side by side take, as wide as the page at most."""
    return min(10.4, 3.0 + 0.2 * count)


def usage(look: Look, drawn: Sequence[Code]) -> Picture:
    """Bars of each code's usage, beside the prompts whose largest code it is.

    Args:
        look: Where uniform usage is known from.
        drawn: The codes, in order.
    """
    figure, axes = _figure(_code_width(len(drawn)), 3.2)
    places = np.arange(len(drawn))
    usage = [100 * code.usage for code in drawn]
    largest = [100 * code.largest_share for code in drawn]
    axes.bar(places, usage, 0.8, color=_COLOURS[0], label="usage")
    axes.plot(
        places, largest, "D", color=_COLOURS[1], markersize=4, label="largest code"
    )
    uniform = 100 / len(look.codes)
    axes.axhline(uniform, color="#59636e", linestyle="--", linewidth=1, label="uniform")
    axes.set_xlim(-0.7, len(drawn) - 0.3)
    axes.set_ylabel("% of prompts")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    _code_axis(axes, drawn)
    return _picture(figure)


def by_source(look: Look, drawn: Sequence[Code]) -> Picture:
    """A heat map of each code's usage by source.

    Args:
        look: Where the sources are known from.
        drawn: The codes, in order.
    """
    from matplotlib.colors import PowerNorm

    height = 1.4 + 0.32 * len(look.sources)
    figure, axes = _figure(_code_width(len(drawn)), height)
    shares = [
        [100 * code.usage_by_source[name] for code in drawn] for name in look.sources
    ]
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
    _code_axis(axes, drawn)
    return _picture(figure)


def of_places(some: Sequence[Prompt], sources: Sequence[str]) -> Picture:
    """The map of z, coloured by source.

    Args:
        some: Prompts with a place.
        sources: In the order of the legend.
    """
    figure, axes = _figure(7.6, 6.2)
    handles, labels = [], []
    for number, source in enumerate(sources):
        places = _places_of(some, source)
        marker = _MARKERS[number % len(_MARKERS)]
        handles.append(
            axes.scatter(
                places[:, 0],
                places[:, 1],
                s=28,
                marker=marker,
                color=_COLOURS[number % len(_COLOURS)],
                alpha=0.8,
                linewidths=0.3,
                edgecolors="white",
            )
        )
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


def _places_of(some: Sequence[Prompt], source: str) -> Float[np.ndarray, "points 2"]:
    places = [prompt.place for prompt in some if prompt.source == source]
    return np.asarray(places, np.float64).reshape(-1, 2)
