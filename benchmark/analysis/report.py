"""`analysis.json`, `report.md` and what a terminal shows at the end."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmark.analysis.figures import (
    LOSS,
    MEASURES,
    OBJECTIVE,
    Comparison,
    Effect,
    as_tree,
    best_record,
    by_optimizer,
    compare_best,
    default_noise,
    effects,
    measured,
    pareto_front,
    spread,
)
from benchmark.analysis.plots import draw_all
from benchmark.config.settings import Settings
from benchmark.core.job import spelled
from benchmark.core.metrics import BenchmarkMetrics, TrialRecord
from wrinklefree.utils.storage import atomic_write

ANALYSIS, REPORT, PLOTS = "analysis.json", "report.md", "plots"


def write_analysis(folder: Path, records: Sequence[TrialRecord], settings: Settings) -> str:
    """Write analysis.json, report.md and the plots into `folder`; the summary for the terminal."""
    tree = analyse(records, settings)
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / ANALYSIS, json.dumps(_finite(tree), indent=2) + "\n")
    plots = draw_all(folder / PLOTS, records, settings)
    atomic_write(folder / REPORT, render(records, settings, [f"{PLOTS}/{path.name}" for path in plots]))
    return summary(records, settings)


def analyse(records: Sequence[TrialRecord], settings: Settings) -> dict[str, Any]:
    """All figures as a plain tree."""
    best = best_record([record for record in records if record.kind == "search"])
    noise = default_noise(records)
    return {
        "trials": {kind: sum(record.kind == kind for record in records) for kind in ("default", "search", "confirm")},
        "failed": [
            {
                "kind": record.kind,
                "index": record.index,
                "reason": record.failure.reason,
                "failure": record.failure.kind,
            }
            for record in records
            if record.failure is not None
        ],
        "best": None if best is None or best.metrics is None else _trial(best, best.metrics),
        "default": {name: {"count": s.count, "mean": s.mean, "deviation": s.deviation} for name, s in noise.items()},
        "best_over_default": {name: as_tree(compare_best(records, measure)) for name, measure in MEASURES.items()},
        "effects": {name: [_effect(effect) for effect in effects(records, settings, name)] for name in MEASURES},
        "optimizers": {name: _group(found) for name, found in by_optimizer(records, settings).items() if found},
        "pareto_front": [_trial(r, r.metrics) for r in pareto_front(_searched(records)) if r.metrics is not None],
    }


def summary(records: Sequence[TrialRecord], settings: Settings) -> str:
    """The best configuration and the optimizers, for a terminal."""
    best = best_record(_searched(records))
    if best is None or best.metrics is None:
        return "no trial was completed"
    lines = ["=== Best Configuration ==="]
    lines += [f"  {name}: {_value(value)}" for name, value in best.parameters.items()]
    lines += ["", f"  Performance: {best.metrics.efficiency:,.0f} tokens/sec/GB"]
    comparison = compare_best(records, MEASURES[OBJECTIVE])
    if comparison is not None:
        lines.append(f"  Measured again: {_ratio(comparison)} of the default's")
    lines += ["", "=== Optimizer Comparison ==="]
    for name, found in by_optimizer(records, settings).items():
        if found:
            group = _group(found)
            lines.append(
                f"  {name + ':':13}avg={group['efficiency']:,.0f} tok/s/GB, mem={group['peak_gigabytes']:.2f} GB "
                f"({group['trials']} trials)"
            )
    return "\n".join(lines) + "\n"


def render(records: Sequence[TrialRecord], settings: Settings, plots: Sequence[str]) -> str:
    """The report in Markdown."""
    parts = ["# Benchmark\n", _about(records, settings), _best(records, settings), _moves(records, settings)]
    parts += [_optimizer_table(records, settings), _pareto(records), _failures(records), _table(records, settings)]
    parts += [f"![{Path(plot).stem.replace('_', ' ')}]({plot})\n" for plot in plots]
    return "\n".join(part for part in parts if part)


def _about(records: Sequence[TrialRecord], settings: Settings) -> str:
    told = settings.benchmark
    found = measured(records)
    memory, loss = "no trial was completed", ""
    if found:
        metrics = found[0][1]
        loss = f"Loss after the trial: {metrics.loss_is}, nats a token. "
        memory = f"peak of the tensors on the GPU ({metrics.measured_on})"
        if metrics.memory_is == "process":
            memory = (
                f"peak of the whole process, interpreter and libraries included ({metrics.measured_on}); that constant part is "
                "large, so on a CPU differences of memory count for less than on a GPU"
            )
    data = "generated text" if told.use_synthetic_data else "the run's own data"
    defaults = sum(record.kind == "default" for record in records)
    return (
        f"{len(_searched(records))} configurations chosen by Ax, {defaults} runs of the default configuration in between. "
        f"Objective: tokens a second for each 10^9 bytes of peak memory. Memory: {memory}. {loss}"
        f"Every trial trains on {data}, on the tokens of {told.unmeasured_steps + told.measurement_steps} micro-batches of the "
        f"default size and {told.sequence_length} positions, of which the first {told.unmeasured_steps} are not measured; what "
        f"is given for a run of {told.reference_steps:,} steps is scaled down to that.\n\n"
        f"Trials run `scripts/train.py {' '.join(settings.training_overrides)}`.\n"
    )


def _best(records: Sequence[TrialRecord], settings: Settings) -> str:
    best = best_record(_searched(records))
    if best is None or best.metrics is None:
        return "## Best configuration\n\nNo trial was completed.\n"
    lines = ["## Best configuration\n", "| knob | value | override |", "|---|---|---|"]
    for name, value in best.parameters.items():
        knob = settings.knobs[name]
        override = f"{knob.key}={spelled(value)}" if not isinstance(value, float) else f"{knob.key}={value:.6g}"
        note = f" (of a run of {settings.benchmark.reference_steps:,} steps)" if knob.scaled else ""
        lines.append(f"| {name} | {_value(value)}{note} | `{override}` |")
    lines.append(f"\nIn its trial: {_figures(best.metrics)}.\n")
    rows = [(name, compare_best(records, measure)) for name, measure in MEASURES.items()]
    if rows[0][1] is not None:
        lines += [f"Measured again, {rows[0][1].pairs} times by turns with the default:\n"]
        lines += ["| measure | best / default | 95% interval |", "|---|---|---|"]
        lines += [f"| {name} | {c.ratio:.3f} | {_interval(c.low, c.high)} |" for name, c in rows if c is not None]
        lines.append("\nThe best of many noisy trials looks better than it is: only the repeated measurement counts.\n")
    return "\n".join(lines)


def _moves(records: Sequence[TrialRecord], settings: Settings) -> str:
    noise = default_noise(records)
    lines = ["## What moves what\n", "Deviation of the default's repeats: "]
    lines[-1] += ", ".join(f"{name} {s.share:.1%}" for name, s in noise.items() if s.count > 1) or "not known"
    lines[-1] += (
        ". A knob counts as moving a measure if the 95% interval of its effect excludes 0 and the effect is larger than twice "
        "that deviation.\n"
    )
    found = {name: effects(records, settings, name) for name in (OBJECTIVE, LOSS)}
    if not any(found.values()):
        return "\n".join([*lines, "Too few completed trials to tell.\n"])
    for name, rows in found.items():
        moving = [row.knob for row in rows if row.beyond_noise]
        lines.append(f"**{name}** is moved by: {', '.join(dict.fromkeys(moving)) or 'nothing beyond the noise'}.\n")
        lines += [f"| knob | from | to | change of {name} | 95% interval | beyond noise |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {row.knob} | {_value(row.from_value)} | {_value(row.to_value)} | {row.change:+.1%} | "
            f"{row.low:+.1%} to {row.high:+.1%} | {'yes' if row.beyond_noise else 'no'} |"
            for row in rows
        ]
        lines.append("")
    return "\n".join(lines)


def _optimizer_table(records: Sequence[TrialRecord], settings: Settings) -> str:
    lines = [
        "## Optimizers\n",
        "| optimizer | trials | tokens/s per GB | tokens/s | peak GB | loss |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in by_optimizer(records, settings).items():
        if found:
            g = _group(found)
            lines.append(
                f"| {name} | {g['trials']} | {g['efficiency']:,.0f} | {g['tokens_per_second']:,.0f} | "
                f"{g['peak_gigabytes']:.2f} | {g['loss']:.3f} |"
            )
    lines.append("\nMeans over trials whose other knobs differ.\n")
    return "\n".join(lines)


def _pareto(records: Sequence[TrialRecord]) -> str:
    front = pareto_front(_searched(records))
    lines = ["## Efficiency against loss\n", "Trials that no other one beats in both:\n"]
    lines += ["| trial | tokens/s per GB | loss | knobs |", "|---|---|---|---|"]
    for record in front:
        if record.metrics is not None:
            lines.append(
                f"| {record.index} | {record.metrics.efficiency:,.0f} | {record.metrics.loss:.3f} | {_knobs(record)} |"
            )
    return "\n".join(lines) + "\n" if front else ""


def _failures(records: Sequence[TrialRecord]) -> str:
    failed = [record for record in records if record.failure is not None]
    if not failed:
        return ""
    lines = ["## Failed\n", "| trial | kind | reason | knobs |", "|---|---|---|---|"]
    for record in failed:
        assert record.failure is not None
        reason = record.failure.reason.replace("|", "/")
        lines.append(f"| {record.kind} {record.index} | {record.failure.kind} | {reason} | {_knobs(record)} |")
    return "\n".join(lines) + "\n"


def _table(records: Sequence[TrialRecord], settings: Settings) -> str:
    lines = ["## All trials\n", "| trial | chosen by | tokens/s per GB | tokens/s | peak GB | loss | knobs |"]
    lines.append("|---|---|---|---|---|---|---|")
    for record in records:
        m = record.metrics
        figures = "failed | | |" if m is None else (
            f"{m.efficiency:,.0f} | {m.tokens_per_second:,.0f} | {m.peak_gigabytes:.2f} | {m.loss:.3f}"
        )  # fmt: skip
        lines.append(f"| {record.kind} {record.index} | {record.method} | {figures} | {_knobs(record)} |")
    return "\n".join(lines) + "\n"


def _searched(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.kind == "search"]


def _trial(record: TrialRecord, metrics: BenchmarkMetrics) -> dict[str, Any]:
    return {
        "trial": record.index,
        "parameters": record.parameters,
        **{name: measure(metrics) for name, measure in MEASURES.items()},
    }


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "knob": effect.knob, "from": effect.from_value, "to": effect.to_value, "change": effect.change,
        "low": effect.low, "high": effect.high, "beyond_noise": effect.beyond_noise,
    }  # fmt: skip


def _group(found: Sequence[BenchmarkMetrics]) -> dict[str, Any]:
    return {
        "trials": len(found),
        "efficiency": spread([metrics.efficiency for metrics in found]).mean,
        "tokens_per_second": spread([metrics.tokens_per_second for metrics in found]).mean,
        "peak_gigabytes": spread([metrics.peak_gigabytes for metrics in found]).mean,
        "loss": spread([metrics.loss for metrics in found]).mean,
    }


def _figures(m: BenchmarkMetrics) -> str:
    speed = f"{m.efficiency:,.0f} tokens/s per GB, {m.tokens_per_second:,.0f} tokens/s"
    return f"{speed}, {m.peak_gigabytes:.2f} GB, loss {m.loss:.3f}"


def _knobs(record: TrialRecord) -> str:
    return ", ".join(f"{name}={_value(value)}" for name, value in record.parameters.items()) or "default"


def _value(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else spelled(value)  # type: ignore[arg-type]


def _ratio(comparison: Comparison) -> str:
    return f"{comparison.ratio:.3f} times {_interval(comparison.low, comparison.high)}"


def _interval(low: float, high: float) -> str:
    return f"[{low:.3f}, {high:.3f}]" if math.isfinite(low) else "unknown (one pair)"


def _finite(value: Any) -> Any:
    """NaN has no place in JSON."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
