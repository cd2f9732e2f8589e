"""Small PNG plots: curves over steps, and bars with intervals for a final table.

matplotlib is imported when something is drawn, and its figures are used without pyplot, so there is no window, no
global state and no display needed.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wrinklefree.utils.storage import atomic_write

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120


@dataclass(frozen=True)
class Curve:
    """One line; NaN in `y` leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Panel:
    """Curves that share axes; panels of a figure share the step axis and stand one below the other."""

    y_label: str
    curves: Sequence[Curve]
    markers: bool = False
    """Draw the points too: few of them, or a single one, would be invisible as a line."""
    log: bool = False


@dataclass(frozen=True)
class Bar:
    """One bar, with the ends of its interval where there is one."""

    name: str
    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Points:
    """Measured points of one series, with the ends of their intervals."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def draw_curves(path: Path, panels: Sequence[Panel], *, title: str, x_label: str = "step") -> None:
    """Write the panels as one PNG, replacing an older one atomically."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 2.4 * len(panels)), layout="constrained")
    figure.suptitle(title)
    column = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(column, panels, strict=True):
        for curve in panel.curves:
            axes.plot(curve.x, curve.y, label=curve.name, linewidth=1.2, marker="o" if panel.markers else None)
        axes.set_ylabel(panel.y_label)
        axes.grid(alpha=0.3)
        if panel.log:
            axes.set_yscale("log")
        if len(panel.curves) > 1:
            axes.legend(fontsize="small")
    column[-1].set_xlabel(x_label)
    save_figure(figure, path)


def draw_bars(path: Path, bars: Sequence[Bar], *, y_label: str, title: str) -> None:
    """Write the bars as one PNG, each labelled with its value; an interval is drawn as an error bar.

    The axis starts at 0: a bar's length is its meaning.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(4.0, 1.5 * len(bars)), 4), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_ylabel(y_label)
    positions = range(len(bars))
    drawn = axes.bar(positions, [bar.value for bar in bars], color="tab:blue", alpha=0.8)
    axes.bar_label(drawn, labels=[f"{bar.value:.3f}" for bar in bars], label_type="center", color="white")
    for position, bar in zip(positions, bars, strict=True):
        if bar.low is not None and bar.high is not None:
            below, above = max(bar.value - bar.low, 0.0), max(bar.high - bar.value, 0.0)
            axes.errorbar(position, bar.value, yerr=[[below], [above]], color="black", capsize=4)
    axes.set_xticks(positions, [bar.name for bar in bars])
    save_figure(figure, path)


def draw_points(path: Path, series: Sequence[Points], *, x_label: str, y_label: str, title: str) -> None:
    """Write the series as one PNG: lines through the points, an error bar at each, a logarithmic x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    for line in series:
        below = [max(y - low, 0.0) for y, low in zip(line.y, line.low, strict=True)]
        above = [max(high - y, 0.0) for y, high in zip(line.y, line.high, strict=True)]
        axes.errorbar(line.x, line.y, yerr=[below, above], label=line.name, marker="o", capsize=3, linewidth=1.2)
    axes.legend(fontsize="small")
    save_figure(figure, path)


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, replacing an older file atomically."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DOTS_PER_INCH)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, picture.getvalue())
