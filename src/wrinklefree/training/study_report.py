"""What a study says: a Markdown section with tables, claims, rates and failures, and plots with error bars.

Written from the records alone, so it can be made again anywhere, while the study still runs or after its checkout is gone.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from wrinklefree.training.comparison import (
    SMALLEST_GAP_ACCURACY,
    SMALLEST_GAP_BITS,
    GapClosure,
    Interval,
    gap_closure_over_seeds,
    over_seeds,
    paired_difference,
)
from wrinklefree.training.plots import Bar, Points, draw_bars, draw_points
from wrinklefree.training.study_config import StudyCommand, StudyConfig
from wrinklefree.training.study_results import ArmResult, Measure, RateTrial, read_results, read_trials
from wrinklefree.training.tables import render_markdown
from wrinklefree.utils.errors import ConfigError, DataError
from wrinklefree.utils.storage import atomic_write

logger = logging.getLogger(__name__)

IMAGES = "images"
"""Folder beside a document that takes the plots of its sections."""
CLOSURE_TARGETS = (0.50, 0.80, 0.95)

ByArm = dict[str, dict[int, Measure]]
"""Arm -> seed -> score, for one metric."""


@dataclass(frozen=True)
class ArmRow:
    """An arm over its seeds, on one metric."""

    arm: str
    seeds: tuple[int, ...]
    value: float
    interval: Interval
    closure: GapClosure | None


@dataclass(frozen=True)
class ClaimRow:
    """A comparison of two arms on one metric; positive means that the first is better."""

    claim: str
    better: str
    than: str
    metric: str
    value: float
    interval: Interval
    seeds: int

    @property
    def verdict(self) -> str:
        """What the interval says of the claim."""
        if self.interval.low > 0:
            return "holds"
        return "reversed" if self.interval.high < 0 else "not shown"


def write_study_report(command: StudyCommand, study: StudyConfig) -> Path:
    """Write section.md and the plots into the study's folder, and into `command.document` where one is given.

    Raises:
        DataError: the study has no results yet.
    """
    results = [result for result in read_results(command.folder) if result.arm in study.arms]
    if not results:
        raise DataError(f"{command.folder} has no results of study {study.name}; run it first, without report=true")
    plots = draw_plots(study, results, command.folder)
    section = render_section(study, results, read_trials(command.folder), [plot.name for plot in plots])
    path = command.folder / "section.md"
    atomic_write(path, section + "\n")
    logger.info("report: %s", path)
    if command.document is not None:
        document = Path(command.document)
        images = draw_plots(study, results, document.parent / IMAGES)
        trials = read_trials(command.folder)
        section = render_section(study, results, trials, [f"{IMAGES}/{image.name}" for image in images])
        insert_section(document, study.name, section)
        logger.info("wrote the section of %s into %s", study.name, document)
    return path


def insert_section(document: Path, name: str, section: str) -> None:
    """Replace what stands between the study's markers.

    Raises:
        ConfigError: the document lacks the markers, or is not there.
    """
    begin, end = f"<!-- study {name}: begin -->", f"<!-- study {name}: end -->"
    try:
        text = document.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"document={document} cannot be read ({error.strerror})") from error
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"{document} has no lines {begin} and {end}; add them where the section belongs")
    atomic_write(document, f"{before}{begin}\n\n{section}\n\n{end}{after}")


def metrics_of(results: Sequence[ArmResult]) -> list[str]:
    """Names of the metrics that are made of items, in the order of the records."""
    names = (m.metric for result in results for m in result.measures if m.items)
    return list(dict.fromkeys(names))


def by_arm(results: Sequence[ArmResult], metric: str) -> ByArm:
    """The completed scores of one metric."""
    found: ByArm = {}
    for result in results:
        measure = result.measure(metric)
        if result.status == "completed" and measure is not None:
            found.setdefault(result.arm, {})[result.seed] = measure
    return found


def summarize_arms(study: StudyConfig, scores: ByArm) -> list[ArmRow]:
    """One row an arm in the study's order, gap closure where it has a control."""
    rows: list[ArmRow] = []
    for name in study.arms:
        if name not in scores:
            continue
        measures = [scores[name][seed] for seed in sorted(scores[name])]
        value, interval = over_seeds([m.value for m in measures], [Interval(m.low, m.high) for m in measures])
        closure = close_gap(study, scores, name)
        rows.append(ArmRow(name, tuple(sorted(scores[name])), value, interval, closure))
    return rows


def close_gap(study: StudyConfig, scores: ByArm, arm: str) -> GapClosure | None:
    """Gap closure of an arm over the seeds that it, its control and the baseline share; None where it has no meaning."""
    control = study.arms[arm].control
    if control is None or study.baseline is None or arm == study.baseline:
        return None
    shared = _shared_seeds(scores, [arm, control, study.baseline])
    if not shared:
        return GapClosure(None, "undefined: the arm, its control and the baseline share no finished seed")

    def errors(name: str) -> list[Sequence[float]]:
        return [scores[name][seed].errors for seed in shared]

    first = scores[arm][shared[0]]
    smallest = SMALLEST_GAP_BITS if first.lower_is_better else SMALLEST_GAP_ACCURACY
    return gap_closure_over_seeds(
        errors(study.baseline), errors(arm), errors(control), first.weights, smallest_gap=smallest
    )


def check_claims(study: StudyConfig, results: Sequence[ArmResult]) -> list[ClaimRow]:
    """Every comparison on every metric: paired by seed, and by item within a single seed."""
    rows: list[ClaimRow] = []
    for metric in metrics_of(results):
        scores = by_arm(results, metric)
        for comparison in study.comparisons:
            shared = _shared_seeds(scores, [comparison.better, comparison.than])
            if not shared:
                continue
            # Errors: the worse minus the better one, so that positive means that the claim is right.
            differences = [
                paired_difference(
                    scores[comparison.than][seed].errors,
                    scores[comparison.better][seed].errors,
                    scores[comparison.better][seed].weights,
                )
                for seed in shared
            ]
            value, interval = over_seeds([d.value for d in differences], [d.interval for d in differences])
            rows.append(
                ClaimRow(comparison.claim, comparison.better, comparison.than, metric, value, interval, len(shared))
            )
    return rows


def reached_at(points: Sequence[tuple[float, float]], target: float) -> float | None:
    """Where a curve of (x, gap closure) first reaches `target`, on a logarithmic x axis; None if it never does."""
    ordered = sorted(points)
    for (x0, y0), (x1, y1) in pairwise(ordered):
        if y0 < target <= y1:
            share = (target - y0) / (y1 - y0)
            return float(np.exp(np.log(x0) + share * (np.log(x1) - np.log(x0))))
    return ordered[0][0] if ordered and ordered[0][1] >= target else None


def render_section(
    study: StudyConfig, results: Sequence[ArmResult], trials: Sequence[RateTrial], plots: Sequence[str]
) -> str:
    """The Markdown section."""
    done = [result for result in results if result.status == "completed"]
    commits = sorted({result.commit[:12] for result in done})
    parts = [
        f"- **Question**: {study.question}",
        f"- **Command**:\n\n```bash\nuv run python scripts/run_study.py study={study.name} threads=1\n```",
        f"- **Setting**: seeds {', '.join(map(str, study.seeds))}; commit {', '.join(commits) or 'none'}; test data is "
        "read only by the tables below, rates were chosen on validation data. Every score is at lambda = 1 and full SubLN "
        "strength. Intervals are 95%: Student's t over seeds, a bootstrap over items where an arm has one seed.",
        "- **Result**:",
    ]
    for metric in metrics_of(results):
        parts += [f"**{metric}**", _arm_table(study, results, metric)]
    series = _series_table(study, results)
    claims = check_claims(study, results)
    parts += [text for text in (series, _claim_table(claims) if claims else "", _missing(study, results)) if text]
    if trials:
        parts += ["Rates tried on the first seed, by validation score (the chosen one in bold):", _rate_table(trials)]
        edges = _at_the_edge(trials)
        if edges:
            parts.append(f"The best rate lies at the end of its grid for: {', '.join(edges)}.")
    parts += [f"![{Path(plot).stem}]({plot})" for plot in plots]
    if study.reading:
        parts.append(f"- **Reading**: {study.reading}")
    return "\n\n".join(parts)


def _arm_table(study: StudyConfig, results: Sequence[ArmResult], metric: str) -> str:
    scores = by_arm(results, metric)
    facts = {result.arm: result for result in results if result.status == "completed"}
    digits = _formatter(metric)
    lines: list[Sequence[str]] = []
    for row in summarize_arms(study, scores):
        result = facts[row.arm]
        rates = ", ".join(f"{step} {rate:g}" for step, rate in result.rates.items() if step == study.arms[row.arm].step)
        lines.append(
            [
                row.arm,
                f"{result.tokens:,}",
                str(len(row.seeds)),
                f"{digits(row.value)} [{digits(row.interval.low)}, {digits(row.interval.high)}]",
                _closure_text(row.closure),
                rates.rpartition(" ")[2],
            ]
        )
    return render_markdown(["arm", "tokens", "seeds", metric, "gap closure", "rate"], lines)


def _closure_text(closure: GapClosure | None) -> str:
    if closure is None:
        return ""
    if closure.value is None:
        return closure.reason
    ends = closure.interval
    interval = "" if ends is None else f" [{100 * ends.low:.0f}, {100 * ends.high:.0f}]"
    return f"{100 * closure.value:.0f}%{interval}"


def _claim_table(claims: Sequence[ClaimRow]) -> str:
    lines = [
        [c.claim, c.better, c.than, c.metric, _signed(c.value, c.interval, c.metric), str(c.seeds), c.verdict]
        for c in claims
    ]
    head = ["claim", "better", "than", "metric", "difference", "seeds", "verdict"]
    return "Claims (a positive difference is in the claim's favour):\n\n" + render_markdown(head, lines)


def _series_table(study: StudyConfig, results: Sequence[ArmResult]) -> str:
    """Tokens at which each curve reaches the targets, for studies of a quantity."""
    lines: list[Sequence[str]] = []
    for metric in metrics_of(results):
        for name, rows in _closures_by_series(study, by_arm(results, metric)).items():
            points = [(x, closure.value) for x, closure in rows if closure.value is not None]
            if not points:
                lines.append([metric, name, *["undefined"] * len(CLOSURE_TARGETS), ""])
                continue
            reached = [reached_at(points, target) for target in CLOSURE_TARGETS]
            at, largest = max(points, key=lambda point: point[1])
            cells = ("not reached" if x is None else f"{x:,.0f}" for x in reached)
            lines.append([metric, name, *cells, f"{100 * largest:.0f}% at {at:,.0f}"])
    if not lines:
        return ""
    head = ["metric", "series", *(f"{100 * target:.0f}% at" for target in CLOSURE_TARGETS), "largest"]
    return f"Gap closure along {study.x_label}, interpolated between the points:\n\n" + render_markdown(head, lines)


def _closures_by_series(study: StudyConfig, scores: ByArm) -> dict[str, list[tuple[float, GapClosure]]]:
    found: dict[str, list[tuple[float, GapClosure]]] = {}
    for name, arm in study.arms.items():
        closure = close_gap(study, scores, name) if name in scores else None
        if arm.series is not None and arm.at is not None and closure is not None:
            found.setdefault(arm.series, []).append((arm.at, closure))
    return found


def _missing(study: StudyConfig, results: Sequence[ArmResult]) -> str:
    """Arms that failed or were not run."""
    seen = {(result.arm, result.seed): result for result in results}
    lines: list[Sequence[str]] = []
    for name in study.arms:
        for seed in study.seeds_of(name):
            result = seen.get((name, seed))
            if result is None:
                lines.append([name, str(seed), "not run"])
            elif result.status == "failed":
                lines.append([name, str(seed), f"failed: {result.error}"])
    return "" if not lines else "Missing:\n\n" + render_markdown(["arm", "seed", "why"], lines)


def _rate_table(trials: Sequence[RateTrial]) -> str:
    lines: list[Sequence[str]] = []
    for step in dict.fromkeys(trial.step for trial in trials):
        mine = [trial for trial in trials if trial.step == step]
        cells = [
            ("**{}**" if t.chosen else "{}").format(f"{t.rate:g}: {'failed' if t.value is None else f'{t.value:.4f}'}")
            for t in mine
        ]
        lines.append([step, mine[0].metric, "; ".join(cells)])
    return render_markdown(["step", "score", "rate: result"], lines)


def _at_the_edge(trials: Sequence[RateTrial]) -> list[str]:
    found: list[str] = []
    for step in dict.fromkeys(trial.step for trial in trials):
        rates = sorted(trial.rate for trial in trials if trial.step == step)
        chosen = [trial.rate for trial in trials if trial.step == step and trial.chosen]
        if len(rates) > 1 and chosen and chosen[0] in (rates[0], rates[-1]):
            found.append(step)
    return found


def draw_plots(study: StudyConfig, results: Sequence[ArmResult], folder: Path) -> list[Path]:
    """One plot a metric: curves for studies of a quantity, bars otherwise."""
    paths: list[Path] = []
    for metric in metrics_of(results):
        scores = by_arm(results, metric)
        rows = {row.arm: row for row in summarize_arms(study, scores)}
        path = folder / f"{study.name}_{metric.replace(' ', '_')}.png"
        curves: dict[str, list[tuple[float, ArmRow]]] = {}
        for name, arm in study.arms.items():
            if arm.series is not None and arm.at is not None and name in rows:
                curves.setdefault(arm.series, []).append((arm.at, rows[name]))
        if curves:
            points = [
                Points(
                    series,
                    [x for x, _ in sorted(found, key=lambda p: p[0])],
                    [row.value for _, row in sorted(found, key=lambda p: p[0])],
                    [row.interval.low for _, row in sorted(found, key=lambda p: p[0])],
                    [row.interval.high for _, row in sorted(found, key=lambda p: p[0])],
                )
                for series, found in curves.items()
            ]
            draw_points(path, points, x_label=study.x_label, y_label=metric, title=study.name)
        else:
            bars = [Bar(row.arm, row.value, row.interval.low, row.interval.high) for row in rows.values()]
            draw_bars(path, bars, y_label=metric, title=study.name)
        paths.append(path)
    return paths


def _formatter(metric: str) -> Callable[[float], str]:
    if metric.endswith("bits_per_byte"):
        return lambda value: f"{value:.4f}"
    return lambda value: f"{100 * value:.1f}"


def _signed(value: float, interval: Interval, metric: str) -> str:
    digits = _formatter(metric)
    return f"{'+' if value >= 0 else ''}{digits(value)} [{digits(interval.low)}, {digits(interval.high)}]"


def _shared_seeds(scores: ByArm, arms: Sequence[str]) -> list[int]:
    if any(arm not in scores for arm in arms):
        return []
    return sorted(set.intersection(*(set(scores[arm]) for arm in arms)))
