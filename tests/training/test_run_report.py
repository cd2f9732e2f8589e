"""The page of a run: what it says of runs that finished, stopped or failed, and that nothing on it can act."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from wrinklefree.training.callbacks import MetricsFile, RunInfo, StepReport
from wrinklefree.training.run_report import RunPage, findings, render_run_page, spread, summary, write_run_page

HOSTILE = '<script>alert("x")</script><img src="http://example.com/x.png">&amp;'


class Page(HTMLParser):
    """Tags, attributes and text of a page; whatever is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in {"meta", "link", "line", "circle", "rect", "path"}:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in {"line", "circle", "rect", "path"}:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def lineage(**changes: Any) -> dict[str, Any]:
    record = {
        "stage": "stage2",
        "fingerprint": "ab" * 32,
        "parents": [{"role": "init", "stage": "stage1", "fingerprint": "cd" * 32, "path": "runs/1/artifact"}],
        "base": {"name": "tiny", "source": "package", "from": "tiny", "fingerprint": "ef" * 32},
        "data": {"name": "packaged", "fingerprint": "12" * 32},
        "seed": 7,
        "git_commit": "34" * 20,
        "git_dirty": False,
        "versions": {"torch": "2.13"},
        "config": {"training": {"lr": 0.001}, "gcs": {"api_key": "hunter2"}},
    }
    return record | changes


def step(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "event": "step", "step": number, "loss": 5.0 - 0.1 * number, "terms": {"cross_entropy": 5.0 - 0.1 * number},
        "weights": {"cross_entropy": 1.0}, "learning_rate": 1e-4, "grad_norm": 1.25, "tokens": number * 2048,
        "tokens_per_second": 4000.0 + number, "step_seconds": 0.5, "quantization_lambda": 1.0, "subln_strength": 1.0,
        "skipped": False, "metrics": {"data_wait_share": 0.0, "padding_share": 0.0},
    }  # fmt: skip
    return line | changes


def evaluation(number: int, **scores: float | None) -> dict[str, Any]:
    return {"event": "evaluation", "step": number, "tokens": number * 2048, "evaluation": scores}


def make_run(folder: Path, lines: list[dict[str, Any]], **record: Any) -> Path:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (folder / "metadata.json").write_text(json.dumps({"status": "completed"} | record), encoding="utf-8")
    return folder


def test_a_finished_run_in_full(tmp_path: Path) -> None:
    lines = [step(number, metrics={"quantization/flips": 0.001 * number}) for number in range(1, 31)]
    lines += [evaluation(10, bits_per_byte=2.5), evaluation(30, bits_per_byte=2.25)]
    resolved = {"device": "cuda", "optimizer": "muon"}
    make_run(tmp_path, lines, seconds=3725, host="box", versions={"torch": "9.9"}, resolved=resolved)
    (tmp_path / "samples.json").write_text(
        json.dumps([{"source": "text", "prompt": "A ship", "continuation": " sails"}])
    )
    path = write_run_page(tmp_path, lineage())
    assert path is not None
    assert path == tmp_path / "report.html"
    page = Page(path.read_text(encoding="utf-8"))
    for words in (
        "tiny, stage2 completed run abababab on packaged",
        "steps 30 trained tokens 61,440 loss, first to last 4.9 to 2",
        "validation bits_per_byte 2.25 working time 1:02:05 device cuda optimizer muon",
        "codes that flipped since the last look , last 0.03",
        "30 61,440 2.25",
        "text A ship sails",
        "init stage1 cdcdcdcdcdcdcdcd runs/1/artifact",
        "base model tiny from package tiny",
        "seed 7 git commit 3434343434343434 host box",
        "versions torch 9.9",
        "lr: 0.001",
    ):
        assert words in page.text, words
    assert page.tags.count("svg") == 6  # loss, validation, rate, gradient, speed, flips
    assert "hunter2" not in path.read_text(encoding="utf-8")


def test_nothing_on_a_page_can_act_or_load(tmp_path: Path) -> None:
    lines = [step(1, metrics={HOSTILE: 1.0}, terms={HOSTILE: 1.0, "b": 2.0}), evaluation(1, **{HOSTILE: 1.0})]
    make_run(tmp_path, lines, error=HOSTILE, host=HOSTILE, status="failed", versions={HOSTILE: HOSTILE})
    sample = {"source": HOSTILE, "prompt": HOSTILE, "continuation": HOSTILE + "\x00\x1b\ud800"}
    (tmp_path / "samples.json").write_text(json.dumps([sample]))
    parents = [{"role": HOSTILE, "stage": HOSTILE, "fingerprint": HOSTILE, "path": HOSTILE}]
    hostile = lineage(
        stage=HOSTILE, parents=parents, data={"name": HOSTILE, "fingerprint": ""}, config={HOSTILE: HOSTILE}
    )
    path = write_run_page(tmp_path, hostile)
    assert path is not None
    page = Page(path.read_text(encoding="utf-8"))
    assert not {"script", "img", "iframe", "object", "embed", "form", "base"} & set(page.tags)
    assert [value for name, value in page.attributes if name in {"src", "href"}] == ["data:,"]
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    policy = next(value for _, value in page.attributes if value.startswith("default-"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert page.text.count('alert("x")') >= 9
    assert not re.search(r"url\(|@import", path.read_text(encoding="utf-8"))


def test_a_run_that_stopped_says_what_to_do(tmp_path: Path) -> None:
    make_run(tmp_path, [step(1), step(2)], status="interrupted", step=2)
    text = Page(render_run_page(tmp_path, lineage())).text
    assert "tiny, stage2 interrupted" in text
    assert "the same command resumes it" in text


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    """Stage 1, which trains nothing; and a run that failed before its record was written."""
    make_run(tmp_path, [], seconds=2)
    page = Page(render_run_page(tmp_path, lineage(git_commit=None)))
    assert "svg" not in page.tags
    assert "not a git checkout" in page.text
    assert "made from stage fingerprint path init stage1" in page.text
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "tiny, stage2 unknown" in Page(render_run_page(empty, lineage())).text


def test_a_page_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path, [step(1)])
    assert write_run_page(tmp_path, {"stage": "stage2"}) is None
    assert "report.html was not written (KeyError:" in caplog.text
    assert not (tmp_path / "report.html").exists()


def test_findings_name_what_needs_a_hand() -> None:
    assert findings([step(1), step(2)], [], {"status": "completed"}) == []
    steps = [step(1, metrics={"data_wait_share": 0.9}), step(2, metrics={"data_wait_share": 0.2}, skipped=True)]
    steps.append(step(3, metrics={"data_wait_share": 0.1, "padding_share": 0.25}))
    scores = [evaluation(1, bits_per_byte=2.0), evaluation(2, bits_per_byte=1.5), evaluation(3, bits_per_byte=1.75)]
    said = findings(steps, scores, {"status": "failed", "error": "OutOfMemory: 3 GiB", "git_dirty": True})
    assert said == [
        ("bad", "It failed: OutOfMemory: 3 GiB"),
        ("bad", "1 updates were skipped because something was not finite: steps 2."),
        ("warn", "Steps waited 15% of their time for data: raise data.num_workers, or prepare the text."),
        ("warn", "25% of all positions were padding: use packing.packer=best_fit, or shorter rows."),
        ("warn", "Validation bits_per_byte was best at step 2 (1.5) and ended at 1.75."),
        ("warn", "It was run from a checkout with uncommitted changes."),
    ]
    # Within a hundredth of the best is no finding.
    assert findings([step(1)], [evaluation(1, perplexity=10.0), evaluation(2, perplexity=10.05)], {}) == []


def test_figures_that_callbacks_add_have_charts_and_constant_zeros_have_none(tmp_path: Path) -> None:
    added = {"mfu": 0.25, "mixture/web": 0.5, "padding_share": 0.0, "data_wait_share": 0.0}
    make_run(tmp_path, [step(number, metrics=added) for number in (1, 2)])
    text = Page(render_run_page(tmp_path, lineage())).text
    assert "model FLOP utilization , last 0.25" in text
    assert "mixture/web , last 0.5" in text
    assert "padding, share" not in text


def test_losses_that_were_not_finite_are_left_out_of_the_summary() -> None:
    found = summary([step(1, loss=None), step(2), step(3, loss=None)], [evaluation(3, bits_per_byte=None)], {})
    assert found["loss, first to last"] == "4.8 to 4.8"
    assert "validation bits_per_byte" not in found


def test_a_spread_holds_both_ends() -> None:
    lines = [step(number) for number in range(1, 101)]
    picked = [line["step"] for line in spread(lines, 5)]
    assert picked == [1, 26, 51, 75, 100]
    assert spread(lines[:3], 5) == lines[:3]


def test_a_long_run_is_a_small_page(tmp_path: Path) -> None:
    make_run(tmp_path, [step(number, loss=3 + (number * 7 % 11) / 10) for number in range(1, 20_001)])
    assert len(render_run_page(tmp_path, lineage())) < 200_000


def test_the_page_is_there_at_every_validation(tmp_path: Path) -> None:
    """A run that is killed has the page of its last validation."""
    info = RunInfo("stage2", tmp_path, 20, 0)
    report = StepReport(
        step=1, total_steps=20, loss=3.5, terms={"ce": 3.5}, weights={"ce": 1.0}, learning_rate=1e-3, grad_norm=1.0,
        tokens=1024, tokens_per_second=100.0, step_seconds=0.5, eta_seconds=10.0, evaluation={"bits_per_byte": 2.0},
    )  # fmt: skip
    callbacks = [MetricsFile(), RunPage(lineage())]
    for callback in callbacks:
        callback.on_start(info)
    (tmp_path / "metadata.json").write_text('{"status": "running"}')
    for callback in callbacks:
        callback.on_step(report)
    assert not (tmp_path / "report.html").exists()
    for callback in callbacks:
        callback.on_evaluation(report)
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "tiny, stage2 running" in text
    assert "validation bits_per_byte 2" in text
