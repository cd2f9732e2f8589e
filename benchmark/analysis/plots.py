"""The three plots of a benchmark."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.analysis.figures import LOSS, OBJECTIVE, Effect, by_optimizer, default_noise, effects, measured, spread
from benchmark.config.settings import Settings
from benchmark.core.metrics import TrialRecord
from wrinklefree.training.plots import save_figure

BLUE, ORANGE, GREY = "#2b6cb0", "#c05621", "#888888"


def draw_all(folder: Path, records: Sequence[TrialRecord], settings: Settings) -> list[Path]:
    """Write what can be drawn; the files."""
    drawn = []
    for name, draw in (
        ("optimization_trace.png", _trace),
        ("optimizer_comparison.png", _optimizers),
        ("parameter_importance.png", _importance),
    ):
        figure = draw(records, settings)
        if figure is not None:
            path = folder / name
            save_figure(figure, path)
            drawn.append(path)
    return drawn


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _trace(records: Sequence[TrialRecord], settings: Settings) -> Any:
    """Each trial, the best so far, and the default with its repeats' range."""
    searched = [record for record in records if record.kind == "search"]
    if not measured(records):
        return None
    figure = _figure(8, 4.5)
    axes = figure.subplots()
    place = {record.index: number for number, record in enumerate(searched, 1)}
    found = measured(searched)
    methods = list(dict.fromkeys(record.method for record in searched))
    for method, colour in zip(methods, (GREY, BLUE, ORANGE, "#2f855a"), strict=False):
        mine = [(place[record.index], metrics.efficiency) for record, metrics in found if record.method == method]
        axes.plot(*zip(*mine, strict=True), "o", color=colour, label=f"chosen by {method}") if mine else None
    best, trace = -math.inf, []
    for record, metrics in found:
        best = max(best, metrics.efficiency)
        trace.append((place[record.index], best))
    if trace:
        axes.step(*zip(*trace, strict=True), where="post", color=BLUE, linewidth=1.5, label="best so far")
    failed = [place[record.index] for record in searched if record.metrics is None]
    if failed and found:
        floor = min(metrics.efficiency for _, metrics in found)
        axes.plot(failed, [floor] * len(failed), "x", color="#c53030", markersize=9, label="failed")
    default = default_noise(records)[OBJECTIVE]
    if default.count:
        axes.axhline(default.mean, color=ORANGE, linestyle="--", label=f"default (mean of {default.count})")
        if default.count > 1:
            axes.axhspan(default.mean - default.deviation, default.mean + default.deviation, color=ORANGE, alpha=0.15)
    axes.set_xlabel("trial")
    axes.set_ylabel(f"{OBJECTIVE} (more is better)")
    axes.set_title("Trials, and the best so far; the band is the default's own spread")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def _optimizers(records: Sequence[TrialRecord], settings: Settings) -> Any:
    """Efficiency, memory and loss of each optimizer's trials."""
    groups = {name: found for name, found in by_optimizer(records, settings).items() if found}
    if not groups:
        return None
    figure = _figure(9, 3.6)
    panels = figure.subplots(1, 3)
    measures = (
        (OBJECTIVE, lambda metrics: metrics.efficiency),
        ("peak memory, GB", lambda metrics: metrics.peak_gigabytes),
        ("loss after the trial, nats", lambda metrics: metrics.loss),
    )
    for axes, (label, measure) in zip(panels, measures, strict=True):
        for position, found in enumerate(groups.values()):
            values = [measure(metrics) for metrics in found]
            middle = spread(values)
            offsets = [position + 0.24 * (2 * i / max(1, len(values) - 1) - 1) for i in range(len(values))]
            axes.plot(offsets, values, "o", color=BLUE, alpha=0.45, markersize=4)
            axes.hlines(middle.mean, position - 0.35, position + 0.35, color=ORANGE, linewidth=2)
        axes.set_xticks(
            range(len(groups)), [f"{name}\n{len(found)} trials" for name, found in groups.items()], fontsize=8
        )
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_title(label, fontsize=10)
        axes.grid(alpha=0.3, axis="y")
    figure.suptitle("Optimizers: every trial, and the mean (line)")
    return figure


def _importance(records: Sequence[TrialRecord], settings: Settings) -> Any:
    """What each knob does to the objective and to the loss, with intervals."""
    panels = [(measure, effects(records, settings, measure)) for measure in (OBJECTIVE, LOSS)]
    if not any(found for _, found in panels):
        return None
    rows = max(len(found) for _, found in panels)
    figure = _figure(10, 1.6 + 0.42 * rows)
    for axes, (measure, found) in zip(figure.subplots(1, 2), panels, strict=True):
        _draw_effects(axes, measure, found)
    figure.suptitle(
        "What a knob moves, from its low to its high end (95% interval; filled: beyond the noise of repeats)"
    )
    return figure


def _draw_effects(axes: Any, measure: str, found: Sequence[Effect]) -> None:
    for position, effect in enumerate(reversed(found)):
        colour = BLUE if effect.beyond_noise else GREY
        low, high = 100 * (effect.change - effect.low), 100 * (effect.high - effect.change)
        axes.errorbar(
            100 * effect.change, position, xerr=[[max(low, 0)], [max(high, 0)]], fmt="o", color=colour, capsize=3,
            markerfacecolor=colour if effect.beyond_noise else "white",
        )  # fmt: skip
    names = [f"{e.knob}\n{_short(e.from_value)} to {_short(e.to_value)}" for e in reversed(found)]
    axes.set_yticks(range(len(found)), names, fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    if found and math.isfinite(found[0].noise):
        axes.axvspan(-200 * found[0].noise, 200 * found[0].noise, color=ORANGE, alpha=0.15)
    axes.set_xlabel(f"change of {measure}, %")
    axes.grid(alpha=0.3, axis="x")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
