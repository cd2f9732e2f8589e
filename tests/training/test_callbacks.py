"""Callbacks: the words and numbers that they leave behind, on a terminal, in a log, in a file."""

import io
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.training.callbacks import (
    Callback,
    DataWait,
    LossPlot,
    MetricsFile,
    ProgressLine,
    QuantizationTelemetry,
    RunInfo,
    StepReport,
    Utilization,
    describe_step,
    format_duration,
    loss_panels,
    read_metrics,
)


def report(step: int, *, total: int = 20, loss: float = 3.5, **changes) -> StepReport:
    fields = {
        "terms": {"ce": 2.5, "logits": 0.1},
        "weights": {"ce": 1.0, "logits": 10.0},
        "learning_rate": 1e-3,
        "grad_norm": 0.75,
        "tokens": step * 1024,
        "tokens_per_second": 12345.6,
        "step_seconds": 0.5,
        "eta_seconds": 3723.0,
    }
    return StepReport(step=step, total_steps=total, loss=loss, **(fields | changes))


def start(callback: Callback, folder: Path, *, first_step: int = 0) -> None:
    callback.on_start(RunInfo("stage3", folder, 20, first_step))


def test_a_step_in_words():
    assert describe_step("stage3", report(2)) == (
        "stage3 step 2/20 | loss 3.5 | ce 2.5 | logits 0.1 (x 10 = 1) | lr 0.001 | grad 0.75 | 12,346 tok/s | "
        "ETA 1:02:03"
    )


def test_the_share_of_the_peak_is_a_metric_and_in_the_line():
    # 6 operations for each of 100 parameters, 12,345.6 times a second, of 20 million.
    told = report(2)
    Utilization(600.0, 2e7).on_step(told)
    assert told.metrics["mfu"] == pytest.approx(600 * 12345.6 / 2e7)
    assert "| MFU 37.0%" in describe_step("s", told)


def test_warmups_and_a_skipped_step_are_named():
    line = describe_step("s", report(2, quantization_lambda=0.25, subln_strength=0.5, skipped=True, loss=math.nan))
    assert "loss nan" in line
    assert "lambda 0.250 | subln 0.500" in line
    assert line.endswith("SKIPPED: not finite")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (59.6, "1:00"), (125, "2:05"), (90061, "25:01:01")])
def test_durations(seconds, text):
    assert format_duration(seconds) == text


def test_off_a_terminal_every_nth_first_last_and_skipped_step_is_logged(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    line = ProgressLine(5, Console(file=io.StringIO(), force_terminal=False))
    start(line, tmp_path)
    for step in range(1, 13):
        line.on_step(report(step, total=12, skipped=step == 7))
    line.on_evaluation(report(12, total=12, evaluation={"bits_per_byte": 1.83}))
    line.on_end(report(12, total=12))
    steps = [message.split(" | ")[0] for message in caplog.messages]
    assert steps[:-1] == [f"stage3 step {step}/12" for step in (1, 5, 7, 10, 12)]
    assert steps[-1] == "stage3 step 12/12 validation: bits_per_byte 1.83"


def test_a_resume_is_announced(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    start(ProgressLine(5, Console(file=io.StringIO(), force_terminal=False)), tmp_path, first_step=7)
    assert caplog.messages == ["stage3 resumes after step 7 of 20"]


def test_on_a_terminal_one_line_is_redrawn_and_the_last_one_stays(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    screen = io.StringIO()
    line = ProgressLine(5, Console(file=screen, force_terminal=True, width=200, _environ={}))
    start(line, tmp_path)
    for step in (1, 2, 3):
        line.on_step(report(step, total=3))
    line.on_evaluation(report(3, total=3, evaluation={"accuracy": 0.5}))
    line.on_end(report(3, total=3))
    drawn = screen.getvalue()
    assert caplog.messages == []
    assert "step 1/3" in drawn
    assert "step 2/3" not in drawn  # sooner than the eye sees
    assert drawn.index("validation: accuracy 0.5") < drawn.rindex("step 3/3 | loss 3.5")
    assert drawn.endswith("\x1b[?25h")  # the cursor is back


def test_after_an_error_close_gives_the_terminal_back(tmp_path):
    screen = io.StringIO()
    line = ProgressLine(5, Console(file=screen, force_terminal=True, width=200, _environ={}))
    start(line, tmp_path)
    line.on_step(report(1))
    line.close()
    line.close()
    assert screen.getvalue().count("\x1b[?25h") == 1


def test_metrics_hold_every_step_and_validation(tmp_path):
    metrics = MetricsFile()
    start(metrics, tmp_path / "run")
    metrics.on_step(report(1, metrics={"quantization/zeros": 0.25}))
    metrics.on_step(report(2, loss=math.inf, grad_norm=math.nan, skipped=True))
    metrics.on_evaluation(report(2, evaluation={"bits_per_byte": 1.75}))
    first, second, validation = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["loss"] == 3.5
    assert first["terms"] == {"ce": 2.5, "logits": 0.1}
    assert first["weights"] == {"ce": 1.0, "logits": 10.0}
    assert first["metrics"] == {"quantization/zeros": 0.25}
    assert (second["loss"], second["grad_norm"], second["skipped"]) == (None, None, True)
    assert validation == {"event": "evaluation", "step": 2, "tokens": 2048, "evaluation": {"bits_per_byte": 1.75}}


def test_a_resume_drops_the_lines_after_its_checkpoint_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile()
    start(metrics, tmp_path)
    for step in range(1, 6):
        metrics.on_step(report(step))
    metrics.on_evaluation(report(5, evaluation={"x": 1.0}))
    with path.open("a") as file:
        file.write('{"event": "step", "step": 6, "lo')

    resumed = MetricsFile()
    start(resumed, tmp_path, first_step=3)
    for step in range(4, 7):
        resumed.on_step(report(step))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_a_fresh_run_starts_an_empty_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    start(MetricsFile(), tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_line_without_its_end_is_not_read(tmp_path):
    (tmp_path / "m").write_text('{"step": 1}\n{"step": 2}')
    assert read_metrics(tmp_path / "m") == [{"step": 1}]
    assert read_metrics(tmp_path / "absent") == []


def test_the_plot_shows_what_the_metrics_file_says(tmp_path):
    metrics, plot = MetricsFile(), LossPlot()
    for callback in (metrics, plot):
        start(callback, tmp_path)
    metrics.on_step(report(1))
    metrics.on_step(report(2, loss=math.nan, terms={"ce": math.nan, "logits": 0.05}, learning_rate=5e-4))
    last = report(2, evaluation={"bits_per_byte": 1.75})
    metrics.on_evaluation(last)
    plot.on_evaluation(last)

    loss, validation, rate = loss_panels(read_metrics(tmp_path / "metrics.jsonl"))
    assert [curve.name for curve in loss.curves] == ["loss", "ce (unweighted)", "logits (unweighted)"]
    assert loss.log  # 3.5 beside 0.05
    assert loss.curves[0].y[0] == 3.5
    assert math.isnan(loss.curves[0].y[1])
    assert (validation.y_label, validation.curves[0].x, validation.curves[0].y) == (
        "validation bits_per_byte",
        [2],
        [1.75],
    )
    assert rate.curves[0].y == [1e-3, 5e-4]

    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "loss.png").unlink()
    plot.on_end(None)
    assert (tmp_path / "loss.png").exists()


def telemetry_model(weights: list[float]) -> tuple[nn.Module, BitLinear]:
    layer = BitLinear(len(weights), 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([weights]))
    return nn.Sequential(layer, nn.Linear(1, 1)), layer


def test_telemetry_counts_zeros_near_threshold_weights_and_flips(tmp_path):
    # mean |W| = 1, so these are the ratios themselves: codes 0, 0, 1, -1, 1; 0.45 and 0.55 lie near 0.5.
    model, layer = telemetry_model([0.0, 0.45, 0.55, -2.0, 2.0])
    telemetry = QuantizationTelemetry(model, log_interval=2)
    start(telemetry, tmp_path)

    seen = report(1)
    telemetry.on_step(seen)
    assert seen.metrics == {}

    with torch.no_grad():  # 0.45 <-> 0.55: two of five codes flip, all else stays
        layer.weight[0, 1], layer.weight[0, 2] = 0.55, 0.45
    seen = report(2)
    telemetry.on_step(seen)
    assert seen.metrics == pytest.approx(
        {
            "quantization/zeros": 2 / 5,
            "quantization/near_threshold": 2 / 5,
            "quantization/flips": 2 / 5,
            "quantization/scale": 1.0,
        }
    )

    seen = report(4)
    telemetry.on_step(seen)
    assert seen.metrics["quantization/flips"] == 0.0


def test_telemetry_samples_large_layers_but_scales_by_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setattr(QuantizationTelemetry, "SAMPLE", 2)
    model, _ = telemetry_model([0.0, 4.0, 0.0, 4.0])  # every second weight: the zeros
    telemetry = QuantizationTelemetry(model, log_interval=1)
    start(telemetry, tmp_path)
    seen = report(1)
    telemetry.on_step(seen)
    assert seen.metrics["quantization/zeros"] == 1.0
    assert seen.metrics["quantization/scale"] == 2.0


def test_telemetry_of_a_full_precision_model_adds_nothing(tmp_path):
    telemetry = QuantizationTelemetry(nn.Linear(2, 2), log_interval=1)
    start(telemetry, tmp_path)
    seen = report(1)
    telemetry.on_step(seen)
    assert seen.metrics == {}


def test_a_callback_may_override_as_little_as_it_needs(tmp_path):
    class Counter(Callback):
        steps = 0

        def on_step(self, report: StepReport) -> None:
            self.steps += 1

    counter = Counter()
    start(counter, tmp_path)
    counter.on_step(report(1))
    counter.on_evaluation(report(1))
    counter.on_end(report(1))
    counter.close()
    assert counter.steps == 1


class StreamStandIn:
    seconds_waited = 5.0
    padding_share = 0.125


def test_waiting_for_data_is_a_share_of_the_step(tmp_path, caplog):
    stream = StreamStandIn()
    callback = DataWait(stream)
    start(callback, tmp_path)
    reports = [report(step, step_seconds=2.0, metrics={}) for step in (1, 2)]
    for each, waited in zip(reports, (1.0, 0.1), strict=True):
        stream.seconds_waited += waited
        callback.on_step(each)
    assert [each.metrics["data_wait_share"] for each in reports] == pytest.approx([0.5, 0.05])
    assert reports[1].metrics["padding_share"] == 0.125
    assert "waits 5% for data" in describe_step("stage2", reports[1])
    assert "waits" not in describe_step("stage2", reports[0])
    with caplog.at_level("INFO"):
        callback.on_end(reports[1])
    assert "steps waited 1.10 s (1.00 s of it for the first batch), 27.5% of their time; padding 12.50%" in caplog.text
