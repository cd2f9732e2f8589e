"""`report.html` of a run: one file that says what was run, how it went and what came of it.

It is made of what lies in the run's folder (`metrics.jsonl`, `samples.json`, the run's record and lineage), so it is the
same for a run that finished, was interrupted or failed, and a resumed run's page starts at step 1. No script and no
request to anything outside the file: it opens from a disk, in a mail, in a year.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from wrinklefree.training.callbacks import (
    DATA_WAIT,
    METRICS_FILE,
    MFU,
    VISIBLE_WAIT,
    Callback,
    RunInfo,
    StepReport,
    format_duration,
    loss_panels,
    read_metrics,
)
from wrinklefree.training.plots import Curve, Panel
from wrinklefree.training.run_report_charts import line_chart, short_number
from wrinklefree.training.run_report_page import (
    charts,
    configuration,
    entries,
    facts,
    heading,
    notes,
    page,
    samples,
    section,
    table,
    version_list,
)
from wrinklefree.training.run_report_samples import read_samples
from wrinklefree.utils.audit_logger import scrub
from wrinklefree.utils.remote_run import METADATA
from wrinklefree.utils.storage import atomic_write

logger = logging.getLogger(__name__)

RUN_PAGE = "report.html"
TABLE_ROWS = 24
LOWER_IS_BETTER = ("bits_per_byte", "perplexity")
PAST_BEST = 1.01
"""A last validation that is this factor above the best one is worth a word."""
WASTED = 0.1
"""So is padding from this share of all positions on."""

_GRADIENT, _SPEED = "gradient norm (before clipping)", "tokens a second"
_PANELS = (
    (_GRADIENT, ("grad_norm",)),
    ("warm-up of quantization and SubLN", ("quantization_lambda", "subln_strength")),
    (_SPEED, ("tokens_per_second",)),
)
_NOISY = ("loss", _GRADIENT, _SPEED)
_TELEMETRY = (
    ("quantization/flips", "codes that flipped since the last look"),
    ("quantization/zeros", "codes that are zero"),
    ("quantization/near_threshold", "weights near a threshold"),
    ("quantization/scale", "mean scale"),
    (MFU, "model FLOP utilization"),
    (DATA_WAIT, "waited for data, share of the step"),
    ("padding_share", "padding, share of all positions"),
)

Line = Mapping[str, Any]
"""A line of `metrics.jsonl`."""


class RunPage(Callback):
    """Writes the page at every validation, so that a run has one also when it is killed; its end is `run.py`'s to write.

    Stands behind `MetricsFile`, whose lines it draws.
    """

    def __init__(self, lineage: Mapping[str, Any]) -> None:
        self._lineage = lineage
        self._folder: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        """Remember the folder."""
        self._folder = run.run_dir

    def on_evaluation(self, report: StepReport) -> None:
        """Write."""
        assert self._folder is not None, "on_start comes first"
        write_run_page(self._folder, self._lineage)


def write_run_page(folder: Path, lineage: Mapping[str, Any]) -> Path | None:
    """Write the page of the run in `folder`; None where that fails, which is logged and harms nothing.

    Args:
        folder: The run's own folder.
        lineage: What its artifact is, or was to be, made from (`run.lineage_record`).
    """
    try:
        path = folder / RUN_PAGE
        atomic_write(path, render_run_page(folder, lineage).encode("utf-8", errors="replace"))
    except Exception as error:  # noqa: BLE001 (a page is worth nothing beside the run that it is about)
        reason = " ".join(str(error).split())[:300]
        logger.warning("%s was not written (%s: %s)", folder / RUN_PAGE, type(error).__name__, reason)
        return None
    return path


def render_run_page(folder: Path, lineage: Mapping[str, Any]) -> str:
    """The page as text; see `write_run_page`."""
    record, lineage = scrub(read_record(folder)), scrub(dict(lineage))
    lines = read_metrics(folder / METRICS_FILE)
    steps = [line for line in lines if line["event"] == "step"]
    validations = [line for line in lines if line["event"] == "evaluation"]
    name = f"{lineage['base']['name']}, {lineage['stage']}"
    said = [(sample.source, sample.prompt, sample.continuation) for sample in read_samples(folder)]
    subtitle = f"run {str(lineage['fingerprint'])[:8]} on {_data(lineage)}"
    return page(
        name,
        [
            heading(name, str(record.get("status", "unknown")), subtitle),
            notes(findings(steps, validations, record)),
            facts(summary(steps, validations, record)),
            section("Curves", draw(panels(lines, steps), steps)),
            section("Evaluation", evaluation_table(validations)),
            section("Samples (greedy)", samples(said)),
            section("Telemetry", telemetry_table(steps)),
            section("Lineage", *_lineage(folder, record, lineage)),
            section("Configuration", configuration(lineage["config"])),
        ],
    )


def panels(lines: Sequence[Line], steps: Sequence[Line]) -> list[Panel]:
    """All curves: losses, validations and rate; then gradients, warm-ups, the quantizer's telemetry, speed, and the rest."""
    found = loss_panels([dict(line) for line in lines]) if steps else []
    for label, keys in _PANELS:
        values = {key: [number_or_nan(line.get(key)) for line in steps] for key in keys}
        if "quantization_lambda" in keys and all(value >= 1 for column in values.values() for value in column):
            continue
        found.append(Panel(label, [Curve(key, _steps(steps), column) for key, column in values.items()]))
    named: dict[str, str] = dict(_TELEMETRY)
    present: dict[str, None] = dict.fromkeys(key for line in steps for key in line["metrics"])
    for key in [*(key for key in named if key in present), *(key for key in present if key not in named)]:
        seen = [line for line in steps if key in line["metrics"]]
        curve = Curve(key, _steps(seen), [number_or_nan(line["metrics"][key]) for line in seen])
        if any(curve.y):
            found.append(Panel(named.get(key) or key, [curve]))
    return found


def draw(found: Sequence[Panel], steps: Sequence[Line]) -> str:
    """The panels as charts over the same steps."""
    if not steps:
        return ""
    x_range = (float(steps[0]["step"]), float(steps[-1]["step"]))
    return charts([line_chart(panel, x_range=x_range, smooth=panel.y_label in _NOISY) for panel in found])


def summary(steps: Sequence[Line], validations: Sequence[Line], record: Mapping[str, Any]) -> dict[str, str]:
    """The figures that one looks for first."""
    found: dict[str, str] = {}
    if steps:
        found["steps"] = f"{steps[-1]['step']:,}"
        found["trained tokens"] = f"{steps[-1]['tokens']:,}"
        losses = [line["loss"] for line in steps if line["loss"] is not None]
        if losses:
            found["loss, first to last"] = f"{losses[0]:.4g} to {losses[-1]:.4g}"
        found["tokens a second (median)"] = short_number(median(line["tokens_per_second"] for line in steps))
    if validations:
        found |= {f"validation {name}": f"{value:.4g}" for name, value in _scores(validations[-1]).items()}
    if "seconds" in record:
        found["working time"] = format_duration(record["seconds"])
    resolved = record.get("resolved", {})
    found |= {key: str(resolved[key]) for key in ("device", "dtype", "optimizer", "attention") if key in resolved}
    return found


def findings(steps: Sequence[Line], validations: Sequence[Line], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(bad or warn, a sentence) about what may need a hand."""
    found: list[tuple[str, str]] = []
    if record.get("error"):
        found.append(("bad", f"It failed: {record['error']}"))
    if record.get("status") == "interrupted":
        found.append(("warn", "It was interrupted; the same command resumes it."))
    skipped = [line["step"] for line in steps if line["skipped"]]
    if skipped:
        which = ", ".join(map(str, skipped[:8])) + (", ..." if len(skipped) > 8 else "")
        found.append(("bad", f"{len(skipped)} updates were skipped because something was not finite: steps {which}."))
    # The first step fills the pipeline.
    waits = [line["metrics"].get(DATA_WAIT) or 0.0 for line in steps[1:]]
    if waits and sum(waits) / len(waits) >= VISIBLE_WAIT:
        share = sum(waits) / len(waits)
        found.append(
            ("warn", f"Steps waited {share:.0%} of their time for data: raise data.num_workers, or prepare the text.")
        )
    padding = steps[-1]["metrics"].get("padding_share") if steps else None
    if padding is not None and padding >= WASTED:
        found.append(
            ("warn", f"{padding:.0%} of all positions were padding: use packing.packer=best_fit, or shorter rows.")
        )
    for name in LOWER_IS_BETTER:
        scores = [(_scores(line)[name], line["step"]) for line in validations if name in _scores(line)]
        if scores and scores[-1][0] > min(scores)[0] * PAST_BEST:
            value, step = min(scores)
            found.append(
                ("warn", f"Validation {name} was best at step {step} ({value:.4g}) and ended at {scores[-1][0]:.4g}.")
            )
            break
    if record.get("git_dirty"):
        found.append(("warn", "It was run from a checkout with uncommitted changes."))
    return found


def evaluation_table(validations: Sequence[Line]) -> str:
    """Every validation, or `TABLE_ROWS` of them."""
    names = list(dict.fromkeys(name for line in validations for name in _scores(line)))
    rows = [
        [f"{line['step']:,}", f"{line['tokens']:,}", *(_cell(_scores(line).get(name)) for name in names)]
        for line in spread(validations, TABLE_ROWS)
    ]
    return table(["step", "tokens", *names], rows)


def telemetry_table(steps: Sequence[Line]) -> str:
    """Steps with telemetry, `TABLE_ROWS` of them; of a full-precision run any steps."""
    looked = [line for line in steps if any(name.startswith("quantization/") for name in line["metrics"])] or steps
    columns: list[tuple[str, Callable[[Line], Any]]] = [
        ("step", lambda line: f"{line['step']:,}"),
        ("loss", lambda line: line["loss"]),
        ("learning rate", lambda line: line["learning_rate"]),
        ("gradient norm", lambda line: line["grad_norm"]),
        ("lambda", lambda line: line["quantization_lambda"]),
        ("flips", lambda line: line["metrics"].get("quantization/flips")),
        ("zeros", lambda line: line["metrics"].get("quantization/zeros")),
        ("near threshold", lambda line: line["metrics"].get("quantization/near_threshold")),
        ("scale", lambda line: line["metrics"].get("quantization/scale")),
        ("tokens/s", lambda line: line["tokens_per_second"]),
        ("waits", lambda line: line["metrics"].get(DATA_WAIT)),
    ]
    present = [(name, get) for name, get in columns if any(get(line) is not None for line in looked)]
    rows = [[_cell(get(line)) for _, get in present] for line in spread(looked, TABLE_ROWS)]
    return table([name for name, _ in present], rows)


def spread(lines: Sequence[Line], count: int) -> list[Line]:
    """At most `count` of the lines, evenly spread, the first and the last among them."""
    if len(lines) <= count:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (count - 1))] for index in range(count)]


def _lineage(folder: Path, record: Mapping[str, Any], lineage: Mapping[str, Any]) -> list[str]:
    """What it was made from, and on what."""
    base = lineage["base"]
    commit = str(lineage["git_commit"])[:16] if lineage["git_commit"] else "not a git checkout"
    found = {
        "fingerprint": str(lineage["fingerprint"]),
        "base model": f"{base['name']} from {base['source']} {base['from'] or ''}".strip(),
        "data": f"{_data(lineage)}, {str(lineage['data']['fingerprint'])[:16]}",
        "seed": str(lineage["seed"]),
        "git commit": commit + (" with uncommitted changes" if lineage["git_dirty"] else ""),
        "host": str(record.get("host", "unknown")),
        "started": str(record.get("created_at", "unknown")),
        "last written": str(record.get("updated_at", "unknown")),
        "folder": str(folder),
        "versions": version_list(record.get("versions", lineage["versions"])),
    }
    parents = table(
        ["made from", "stage", "fingerprint", "path"],
        [[p["role"], p["stage"], str(p["fingerprint"])[:16], str(p["path"])] for p in lineage["parents"]],
    )
    return [entries(found), parents]


def read_record(folder: Path) -> dict[str, Any]:
    """What `metadata.json` says: status, step, error, times, versions; nothing where it is not there."""
    try:
        return dict(json.loads((folder / METADATA).read_bytes()))
    except (OSError, ValueError, TypeError):
        return {}


def _data(lineage: Mapping[str, Any]) -> str:
    return str(lineage["data"]["name"])


def _scores(line: Line) -> Mapping[str, float]:
    return {name: value for name, value in line["evaluation"].items() if value is not None}


def _steps(lines: Sequence[Line]) -> list[float]:
    return [float(line["step"]) for line in lines]


def number_or_nan(value: float | None) -> float:
    """A value as it stands in `metrics.jsonl`, where null is what was not finite."""
    return math.nan if value is None else float(value)


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.4g}"
