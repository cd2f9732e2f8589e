"""What happens beside a training step, one concern each. Callbacks receive records, never the trainer.

Order matters in one way: `QuantizationTelemetry` adds to `StepReport.metrics` and so comes before `MetricsFile`, and
`LossPlot` draws what `MetricsFile` wrote and so comes after it.
"""

import json
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from torch import Tensor, nn

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.shards import is_sharded, rows_here
from wrinklefree.quantization.weight_quant import MIN_WEIGHT_SCALE, Ternary, round_to_codes
from wrinklefree.training.plots import Curve, Panel, draw_curves
from wrinklefree.utils.storage import atomic_write, explained

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
LOSS_PLOT = "loss.png"
DATA_WAIT = "data_wait_share"
MFU = "mfu"
VISIBLE_WAIT = 0.02
"""The progress line names the share of a step that waited for data from here on."""


@dataclass(frozen=True)
class RunInfo:
    """What is known before the first step."""

    stage: str
    run_dir: Path
    """Folder of the run."""
    total_steps: int
    first_step: int = 0
    """Steps already done: 0, or the step of the checkpoint that the run resumes from."""


@dataclass
class StepReport:
    """One update, in plain Python numbers: reading it never synchronises a device."""

    step: int
    """Updates done, this one included: 1 after the first."""
    total_steps: int
    loss: float
    terms: Mapping[str, float]
    """Name -> unweighted value; the loss is the sum of value times weight."""
    weights: Mapping[str, float]
    learning_rate: float
    grad_norm: float
    """Before clipping."""
    tokens: int
    """Positions trained on since the start of the run, across resumes."""
    tokens_per_second: float
    step_seconds: float
    eta_seconds: float
    quantization_lambda: float = 1.0
    subln_strength: float = 1.0
    skipped: bool = False
    """The loss or a gradient was not finite, and no weight was changed."""
    evaluation: Mapping[str, float] | None = None
    """Validation after this update, when there was one."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Further figures; a callback may add its own for those after it."""


class Callback(Protocol):
    """Hooks of `Trainer.fit`, called on rank 0 in the order of the list. A subclass overrides those it needs."""

    def on_start(self, run: RunInfo) -> None:
        """Before the first step, fresh or resumed."""

    def on_step(self, report: StepReport) -> None:
        """After every update."""

    def on_evaluation(self, report: StepReport) -> None:
        """After a validation; `report.evaluation` is set and `on_step` has seen the same step."""

    def on_end(self, report: StepReport | None) -> None:
        """After the last step and its validation; no report when the run was resumed at its end."""

    def close(self) -> None:
        """After the run however it ended, an error or a signal included; more than once does no harm."""


class WaitsForData(Protocol):
    """A stream that knows how long it was waited for."""

    seconds_waited: float
    """All calls of `next_batch` together."""

    @property
    def padding_share(self) -> float:
        """Share of all positions so far that were padding."""
        ...


class DataWait(Callback):
    """Adds `data_wait_share` (of the step's time) and `padding_share` (so far) to the metrics; sums up at the end."""

    def __init__(self, stream: WaitsForData) -> None:
        self._stream = stream
        self._seen = 0.0
        self._waits: list[float] = []
        """Of the first step, which fills the pipeline and would hide whether the others wait, and of all others."""
        self._seconds = 0.0

    def on_start(self, run: RunInfo) -> None:
        """Leave out what came before."""
        self._seen = self._stream.seconds_waited

    def on_step(self, report: StepReport) -> None:
        """Add the figures of the step."""
        waited, self._seen = self._stream.seconds_waited - self._seen, self._stream.seconds_waited
        report.metrics[DATA_WAIT] = waited / report.step_seconds
        report.metrics["padding_share"] = self._stream.padding_share
        if self._waits:
            self._waits[1] += waited
        else:
            self._waits = [waited, 0.0]
        self._seconds += report.step_seconds

    def on_end(self, report: StepReport | None) -> None:
        """Say what data and packing cost."""
        if report is not None and self._waits:
            first, others = self._waits
            logger.info(
                "data: steps waited %.2f s (%.2f s of it for the first batch), %.1f%% of their time; padding %.2f%%",
                first + others, first, 100 * (first + others) / self._seconds, 100 * self._stream.padding_share,
            )  # fmt: skip


class Utilization(Callback):
    """Adds `mfu` to the metrics: the model's arithmetic (6 N a token, 8 N with a teacher) over the device's peak.

    Attention and the head's repeated products are not counted, as is usual: the figure compares runs of a model.
    """

    def __init__(self, flops_per_token: float, peak: float) -> None:
        """`peak` in operations a second, of all devices together."""
        self._share_per_speed = flops_per_token / peak

    def on_step(self, report: StepReport) -> None:
        """Add the figure of the step."""
        report.metrics[MFU] = report.tokens_per_second * self._share_per_speed


class ProgressLine(Callback):
    """A live line on a terminal, a log line every `log_interval` steps elsewhere."""

    REDRAW_SECONDS = 0.1

    def __init__(self, log_interval: int, console: Console | None = None) -> None:
        self._log_interval = log_interval
        self._console = Console(stderr=True) if console is None else console
        self._stage = ""
        self._live: Live | None = None
        self._drawn_at = -math.inf
        self._line = ""

    def on_start(self, run: RunInfo) -> None:
        """Open the line."""
        self._stage = run.stage
        if run.first_step:
            logger.info("%s resumes after step %d of %d", run.stage, run.first_step, run.total_steps)
        if self._console.is_terminal:
            # Drawn by `on_step` alone: no thread, so nothing runs beside a fork or after an error.
            self._live = Live(Text(""), console=self._console, auto_refresh=False)
            self._live.start()

    def on_step(self, report: StepReport) -> None:
        """Draw or log the step."""
        last = report.step == report.total_steps
        if self._live is not None:
            self._line = describe_step(self._stage, report)
            if last or time.monotonic() - self._drawn_at >= self.REDRAW_SECONDS:
                self._draw(self._line)
        elif last or report.skipped or report.step == 1 or report.step % self._log_interval == 0:
            logger.info("%s", describe_step(self._stage, report))

    def on_evaluation(self, report: StepReport) -> None:
        """Log the validation; on a terminal it stays above the live line."""
        figures = " ".join(f"{name} {value:.4g}" for name, value in (report.evaluation or {}).items())
        line = f"{self._stage} step {report.step}/{report.total_steps} validation: {figures}"
        if self._live is None:
            logger.info("%s", line)
        else:
            self._console.print(Text(line))

    def on_end(self, report: StepReport | None) -> None:
        """Leave the last line standing."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._draw(self._line)
            self._live.stop()
            self._live = None

    def _draw(self, line: str) -> None:
        assert self._live is not None
        self._live.update(Text(line), refresh=True)
        self._drawn_at = time.monotonic()


def describe_step(stage: str, report: StepReport) -> str:
    """One line: step, loss, every term raw and, where its weight is not 1, weighted, speed and time left."""
    parts = [f"{stage} step {report.step}/{report.total_steps}", f"loss {report.loss:.4g}"]
    for name, value in report.terms.items():
        weight = report.weights[name]
        parts.append(f"{name} {value:.4g}" + ("" if weight == 1 else f" (x {weight:.3g} = {value * weight:.4g})"))
    parts += [f"lr {report.learning_rate:.3g}", f"grad {report.grad_norm:.3g}"]
    if report.quantization_lambda < 1:
        parts.append(f"lambda {report.quantization_lambda:.3f}")
    if report.subln_strength < 1:
        parts.append(f"subln {report.subln_strength:.3f}")
    parts += [f"{report.tokens_per_second:,.0f} tok/s", f"ETA {format_duration(report.eta_seconds)}"]
    if MFU in report.metrics:
        parts.append(f"MFU {report.metrics[MFU]:.1%}")
    if report.metrics.get(DATA_WAIT, 0.0) >= VISIBLE_WAIT and report.step > 1:
        parts.append(f"waits {report.metrics[DATA_WAIT]:.0%} for data")
    if report.skipped:
        parts.append("SKIPPED: not finite")
    return " | ".join(parts)


def format_duration(seconds: float) -> str:
    """Hours, minutes and seconds, as `1:02:03` or `2:03`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class MetricsFile(Callback):
    """Every step and validation as one JSON line of `metrics.jsonl` in the run's folder.

    A resumed run drops the lines after its checkpoint, so each step stands there once. A number that is not finite
    becomes null, which every JSON reader takes.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def on_start(self, run: RunInfo) -> None:
        """Keep the lines up to the resume step, none for a fresh run."""
        self._path = run.run_dir / METRICS_FILE
        kept = [line for line in read_metrics(self._path) if line["step"] <= run.first_step]
        with explained(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(self._path, "".join(json.dumps(line) + "\n" for line in kept))

    def on_step(self, report: StepReport) -> None:
        """Append the step."""
        self._append(
            {
                "event": "step",
                "step": report.step,
                "loss": report.loss,
                "terms": dict(report.terms),
                "weights": dict(report.weights),
                "learning_rate": report.learning_rate,
                "grad_norm": report.grad_norm,
                "tokens": report.tokens,
                "tokens_per_second": report.tokens_per_second,
                "step_seconds": report.step_seconds,
                "quantization_lambda": report.quantization_lambda,
                "subln_strength": report.subln_strength,
                "skipped": report.skipped,
                "metrics": report.metrics,
            }
        )

    def on_evaluation(self, report: StepReport) -> None:
        """Append the validation."""
        evaluation = dict(report.evaluation or {})
        self._append({"event": "evaluation", "step": report.step, "tokens": report.tokens, "evaluation": evaluation})

    def _append(self, line: Mapping[str, Any]) -> None:
        assert self._path is not None, "on_start comes first"
        # Opened for each line: nothing stays in a buffer when the process is killed, and nothing needs closing.
        with explained(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file, up to the first that a kill or a power cut left incomplete; none without a file."""
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            lines.append(json.loads(line if line.endswith("\n") else ""))
        except json.JSONDecodeError:
            break
    return lines


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class LossPlot(Callback):
    """`loss.png` in the run's folder: loss and terms, validation, learning rate. Drawn at validations and at the end.

    It draws the metrics file and keeps nothing itself, so a resumed run's plot starts at step 1.
    """

    def __init__(self) -> None:
        self._run: RunInfo | None = None

    def on_start(self, run: RunInfo) -> None:
        """Remember the folder."""
        self._run = run

    def on_evaluation(self, report: StepReport) -> None:
        """Draw."""
        self._draw()

    def on_end(self, report: StepReport | None) -> None:
        """Draw."""
        self._draw()

    def _draw(self) -> None:
        assert self._run is not None, "on_start comes first"
        panels = loss_panels(read_metrics(self._run.run_dir / METRICS_FILE))
        draw_curves(self._run.run_dir / LOSS_PLOT, panels, title=self._run.stage)


def loss_panels(lines: list[dict[str, Any]]) -> list[Panel]:
    """What a loss plot shows of a metrics file. Values that were not finite leave a gap."""
    steps = [line for line in lines if line["event"] == "step"]
    validations = [line for line in lines if line["event"] == "evaluation"]
    at = [line["step"] for line in steps]
    losses = [Curve("loss", at, [_number(line["loss"]) for line in steps])]
    terms = dict.fromkeys(name for line in steps for name in line["terms"])
    if len(terms) > 1:
        for name in terms:
            seen = [line for line in steps if name in line["terms"]]
            values = [_number(line["terms"][name]) for line in seen]
            losses.append(Curve(f"{name} (unweighted)", [line["step"] for line in seen], values))
    panels = [Panel("loss", losses, log=_spans_decades(losses))]
    for name in dict.fromkeys(name for line in validations for name in line["evaluation"]):
        seen = [line for line in validations if name in line["evaluation"]]
        values = [_number(line["evaluation"][name]) for line in seen]
        panels.append(Panel(f"validation {name}", [Curve(name, [line["step"] for line in seen], values)], markers=True))
    panels.append(Panel("learning rate", [Curve("rate", at, [_number(line["learning_rate"]) for line in steps])]))
    return panels


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _spans_decades(curves: list[Curve]) -> bool:
    """Whether a linear axis would flatten the smaller curves: all positive, and a factor above 30 between them."""
    values = [y for curve in curves for y in curve.y if math.isfinite(y)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 30


class QuantizationTelemetry(Callback):
    """How the ternary weights move, every `log_interval` steps (what arXiv:2510.13998 says stage 2 is for).

    Adds to `StepReport.metrics`, over all BitLinears:
    `quantization/zeros`: share of codes that are 0;
    `quantization/near_threshold`: share of weights with |W| / scale in 0.5 +- 0.1, which a small step can flip;
    `quantization/flips`: share of codes that differ from the last look (the first is at the run's start or resume);
    `quantization/scale`: mean scale of the layers.

    Shares are of every k-th weight of a layer, at most `SAMPLE` of them; scales and codes are of the whole weight. One
    transfer from the device each look. Of a sharded layer the first rank's rows are looked at: only that rank looks, so
    nothing can be asked of the others.
    """

    SAMPLE = 65_536
    HALF_WIDTH = 0.1

    def __init__(self, model: nn.Module, log_interval: int) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        self._log_interval = log_interval
        self._codes: list[Tensor] = []

    def on_start(self, run: RunInfo) -> None:
        """Take the first look."""
        self._look()

    def on_step(self, report: StepReport) -> None:
        """Look, every `log_interval` steps and at the end."""
        if self._layers and (report.step % self._log_interval == 0 or report.step == report.total_steps):
            report.metrics.update(self._look())

    @torch.no_grad()
    def _look(self) -> dict[str, float]:
        if not self._layers:
            return {}
        before, self._codes = self._codes, []
        counts: list[Tensor] = []
        for index, layer in enumerate(self._layers):
            weight, ternary = _ternary_here(layer)
            stride = -(-weight.numel() // self.SAMPLE)
            # A copy, or the sample would keep all codes of the layer in memory.
            codes = ternary.codes.flatten()[::stride].clone()
            self._codes.append(codes)
            ratio = weight.flatten()[::stride].float().abs() / ternary.scale
            near = (ratio - 0.5).abs() <= self.HALF_WIDTH
            flips = (codes != before[index]).sum() if before else torch.zeros((), device=codes.device)
            counts.append(torch.stack([(codes == 0).sum().float(), near.sum().float(), flips.float(), ternary.scale]))
        # Summed here: float32 on the device would stop counting exactly at 2^24 weights.
        zeros, near, flips, scale = (sum(column) for column in zip(*torch.stack(counts).tolist(), strict=True))
        sampled = sum(codes.numel() for codes in self._codes)
        return {
            "quantization/zeros": zeros / sampled,
            "quantization/near_threshold": near / sampled,
            "quantization/flips": flips / sampled,
            "quantization/scale": scale / len(self._layers),
        }


def _ternary_here(layer: BitLinear) -> tuple[Tensor, Ternary]:
    """The weights of a layer that this process holds, and their codes."""
    weight = rows_here(layer.weight).local
    if not is_sharded(layer.weight):
        return weight, layer.ternary()
    scale = layer.gathered_scale
    if scale is None:  # of these rows only, until codes are gathered
        scale = weight.abs().mean().clamp(min=MIN_WEIGHT_SCALE)
    return weight, Ternary(round_to_codes(weight, scale), scale)
