"""`report.html` of a whole job: the table of arms, gap closure, samples, the curves of every step, and where all of it lies.

Made of the report and of what the steps left in their folders, so a job that stopped half-way has a page of what it did.
Curves of several seeds share a chart.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from wrinklefree.training.callbacks import METRICS_FILE, format_duration, read_metrics
from wrinklefree.training.pipeline import PipelinePlan
from wrinklefree.training.plan import StagePlan
from wrinklefree.training.plots import Bar, Curve, Panel
from wrinklefree.training.report import Report, Row, render_closure, summarize
from wrinklefree.training.run_report import LOWER_IS_BETTER, RUN_PAGE, number_or_nan, read_record
from wrinklefree.training.run_report_charts import bar_chart, line_chart
from wrinklefree.training.run_report_page import (
    charts,
    configuration,
    entries,
    facts,
    heading,
    notes,
    page,
    paragraphs,
    samples,
    section,
    table,
    version_list,
)
from wrinklefree.training.trainer import Interrupted
from wrinklefree.utils.audit_logger import scrub
from wrinklefree.utils.storage import atomic_write

logger = logging.getLogger(__name__)

NOTE = "Intervals are 95%. Ternary sizes count 2 bits a block weight and 16 bits elsewhere."
_PARTS = ("evaluation", "export")


@contextmanager
def page_if_it_stops(folder: Path, tree: Mapping[str, Any], plans: Sequence[PipelinePlan]) -> Iterator[None]:
    """Write the page of what was done when the block is interrupted or fails."""
    try:
        yield
    except Interrupted:
        write_pipeline_page(folder, tree, plans, status="interrupted")
        raise
    except Exception as error:
        write_pipeline_page(folder, tree, plans, status="failed", problem=f"{type(error).__name__}: {error}")
        raise


def write_pipeline_page(
    folder: Path,
    tree: Mapping[str, Any],
    plans: Sequence[PipelinePlan],
    *,
    status: str,
    report: Report | None = None,
    problem: str | None = None,
) -> Path | None:
    """Write the page into the job's report folder; None where that fails, which is logged and harms nothing.

    Args:
        folder: The report's folder.
        tree: The job's configuration.
        plans: The steps of each seed, run or not.
        status: completed, interrupted or failed.
        report: What the job found, once it has come so far.
        problem: What went wrong.
    """
    path = folder / RUN_PAGE
    try:
        text = render_pipeline_page(tree, plans, status=status, report=report, problem=problem)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, text.encode("utf-8", errors="replace"))
    except Exception as error:  # noqa: BLE001 (hours of training end here, and the page is not what they were for)
        reason = " ".join(str(error).split())[:300]
        logger.warning("%s was not written (%s: %s)", path, type(error).__name__, reason)
        return None
    logger.info("page: %s", path)
    return path


def render_pipeline_page(
    tree: Mapping[str, Any],
    plans: Sequence[PipelinePlan],
    *,
    status: str,
    report: Report | None = None,
    problem: str | None = None,
) -> str:
    """The page as text; see `write_pipeline_page`."""
    tree = scrub(dict(tree))
    steps = [
        (plan.seed, name, step, scrub(read_record(step.run_folder)))
        for plan in plans
        for name, step in plan.steps.items()
    ]
    done = sum(record.get("status") == "completed" for *_, record in steps)
    seeds = ", ".join(str(plan.seed) for plan in plans)
    model = next(iter(plans[0].steps.values())).config.model.name
    found = [("bad", problem)] if problem else []
    if status == "interrupted":
        found.append(("warn", "The job was interrupted; the same command resumes it."))
    title = f"{model}: from full precision to ternary"
    return page(
        title,
        [
            heading(title, status, f"seed {seeds}; {done} of {len(steps)} steps done"),
            notes([(kind, str(scrub(text))) for kind, text in found]),
            facts(_facts(report, steps)),
            *([] if report is None else _results(report)),
            section("Curves of the steps", charts(step_charts(plans))),
            section("Steps", _steps_table(steps)),
            section("Lineage", entries(_lineage(plans, steps))),
            section("Configuration", configuration(tree)),
        ],
    )


def step_charts(plans: Sequence[PipelinePlan]) -> list[str]:
    """For each step its loss, and those validation scores that make a curve; a curve a seed."""
    figures: list[str] = []
    for name in plans[0].steps:
        losses: list[Curve] = []
        scores: dict[str, list[Curve]] = {}
        for plan in plans:
            lines = read_metrics(plan.steps[name].run_folder / METRICS_FILE)
            seed = f"seed {plan.seed}"
            losses.append(_curve(seed, [(line["step"], line["loss"]) for line in lines if line["event"] == "step"]))
            validations = [line for line in lines if line["event"] == "evaluation"]
            for score in dict.fromkeys(score for line in validations for score in line["evaluation"]):
                seen = [line for line in validations if score in line["evaluation"]]
                curve = _curve(seed, [(line["step"], line["evaluation"][score]) for line in seen])
                scores.setdefault(score, []).append(curve)
        # Perplexity says what bits per byte say.
        hidden = LOWER_IS_BETTER[1] if LOWER_IS_BETTER[0] in scores else None
        longest = max((curve.x[-1] for curve in losses if curve.x), default=1.0)
        panels = [Panel(f"{name}: loss", losses)]
        panels += [
            Panel(f"{name}: validation {score}", curves, markers=True)
            for score, curves in scores.items()
            if score != hidden and any(len(curve.x) > 1 for curve in curves)
        ]
        figures += [line_chart(panel, x_range=(1.0, longest), smooth=not panel.markers) for panel in panels]
    return figures


def _curve(name: str, points: Sequence[tuple[int, float | None]]) -> Curve:
    return Curve(name, [float(step) for step, _ in points], [number_or_nan(value) for _, value in points])


def _results(report: Report) -> list[str]:
    """Table, gap closure, bars, file and samples."""
    rows = summarize(report.outcomes)
    task = report.outcomes[0].arms[-1].task
    bars = [
        bar_chart(
            [Bar(row.name, row.bits_per_byte, row.bits_interval.low, row.bits_interval.high) for row in rows],
            y_label="held-out bits per byte (lower is better)",
        ),
        bar_chart(
            [Bar(row.name, row.task_value, row.task_interval.low, row.task_interval.high) for row in rows],
            y_label=f"{task.task}, {task.metric} (higher is better)",
        ),
    ]
    said = [(arm, prompt, continuation) for arm, prompt, continuation in report.outcomes[-1].samples]
    parts = [
        section(
            "Results",
            _arms_table(rows, f"{task.task} {task.metric}"),
            paragraphs([*render_closure(rows).splitlines(), NOTE, f"ternary model: {report.paths['final']}"]),
            charts(bars),
        )
    ]
    if report.export is not None:
        made = [(f"{report.export.engine}, from the file", prompt, text) for prompt, text in report.export.samples]
        said += made
        parts.append(section("GGUF", paragraphs(report.export.lines())))
    return [*parts, section("Samples (greedy)", samples(said))]


def _arms_table(rows: Sequence[Row], task: str) -> str:
    head = ["model", "what it is", "trained tokens", "bits per byte", "95%", task, "95%", "linear MB", "all MB"]
    body = [
        [
            row.name,
            row.meaning,
            f"{row.tokens:,}",
            f"{row.bits_per_byte:.4f}",
            f"{row.bits_interval.low:.4f} to {row.bits_interval.high:.4f}",
            f"{row.task_value:.1%}",
            f"{row.task_interval.low:.1%} to {row.task_interval.high:.1%}",
            f"{row.size.linear / 1e6:.2f}",
            f"{row.size.total / 1e6:.2f}",
        ]
        for row in rows
    ]
    return table(head, body)


Step = tuple[int, str, StagePlan, dict[str, Any]]
"""Seed, name, plan, and what the step's record says."""


def _facts(report: Report | None, steps: Sequence[Step]) -> dict[str, str]:
    """The last arm, which is what the job is for, against the first; or how long it has worked."""
    if report is None:
        spent = sum(float(record.get("seconds", 0.0)) for *_, record in steps)
        return {"working time of the steps": format_duration(spent)}
    rows = summarize(report.outcomes)
    first, last = rows[0], rows[-1]
    task = report.outcomes[0].arms[-1].task
    return {
        "bits per byte": f"{last.bits_per_byte:.4f} ({first.name} {first.bits_per_byte:.4f})",
        f"{task.task} {task.metric}": f"{last.task_value:.1%} ({first.name} {first.task_value:.1%})",
        "linear layers": f"{last.size.linear / 1e6:.2f} MB ({first.name} {first.size.linear / 1e6:.2f})",
        "this command took": format_duration(report.total_seconds),
        **{f"of it {part}": format_duration(report.seconds[part]) for part in _PARTS if part in report.seconds},
    }


def _steps_table(steps: Sequence[Step]) -> str:
    body = [
        [
            str(seed),
            name,
            plan.stage.name,
            str(record.get("status", "not begun")),
            f"{record['tokens']:,}" if "tokens" in record else "",
            format_duration(record["seconds"]) if "seconds" in record else "",
            ", ".join(f"{score} {value:.4g}" for score, value in _last_validation(plan).items()),
            plan.source.stage + (f", taught by {plan.teacher.stage}" if plan.teacher is not None else ""),
            plan.fingerprint.value[:16],
            str(plan.run_folder),
        ]
        for seed, name, plan, record in steps
    ]
    head = [
        "seed",
        "step",
        "stage",
        "status",
        "tokens",
        "time",
        "last validation",
        "made from",
        "fingerprint",
        "folder",
    ]
    return table(head, body)


def _last_validation(plan: StagePlan) -> Mapping[str, float]:
    lines = read_metrics(plan.run_folder / METRICS_FILE)
    scores = next((line["evaluation"] for line in reversed(lines) if line["event"] == "evaluation"), {})
    return {score: value for score, value in scores.items() if value is not None and score != LOWER_IS_BETTER[1]}


def _lineage(plans: Sequence[PipelinePlan], steps: Sequence[Step]) -> dict[str, str]:
    step = next(iter(plans[0].steps.values()))
    model, identity = step.config.model, step.fingerprint
    where = {"hub": model.pretrained, "package": model.package, "path": model.path}[model.source]
    versions = next((record["versions"] for *_, record in reversed(steps) if "versions" in record), {})
    commit = identity.git_commit[:16] if identity.git_commit else "not a git checkout"
    return {
        "base model": f"{model.name} from {model.source} {where or ''}".strip(),
        "base fingerprint": step.base.fingerprint,
        "git commit": commit + (" with uncommitted changes" if identity.git_dirty else ""),
        "data": ", ".join(f"{plan.task} ({name})" for name, plan in plans[0].steps.items()),
        "versions": version_list(versions),
    }
