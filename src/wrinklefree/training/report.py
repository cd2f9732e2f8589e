"""What a pipeline ends with: every arm on the same held-out data, gap closure, sizes, times, paths, samples."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wrinklefree.data.config import FinetuneData, PretrainData
from wrinklefree.data.finetune_dataset import task_examples
from wrinklefree.data.pretrain_dataset import held_out_documents, held_out_rows
from wrinklefree.data.tasks import get_task
from wrinklefree.data.tokens import start_token_id
from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import BitLinear
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.generate import generate
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.comparison import (
    SMALLEST_GAP_ACCURACY,
    SMALLEST_GAP_BITS,
    GapClosure,
    Interval,
    gap_closure,
    over_seeds,
)
from wrinklefree.training.config import PipelineConfig, RunConfig, StageConfig
from wrinklefree.training.device import choose_compute
from wrinklefree.training.evaluation import LanguageScore, TaskScore, fully_quantized, score_language, score_task
from wrinklefree.training.export import Export
from wrinklefree.training.plan import StagePlan
from wrinklefree.training.plots import Bar, draw_bars
from wrinklefree.utils.storage import atomic_write
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

SAMPLE_TOKENS = 40


@dataclass(frozen=True)
class ModelSize:
    """Bytes of a model as it would be stored."""

    linear: int
    """The linear layers of the blocks: 2 bits a weight when ternary, else 16."""
    total: int
    """Linear layers, and everything else in 16 bits."""


@dataclass(frozen=True)
class Arm:
    """One row of the table, for one seed."""

    name: str
    meaning: str
    tokens: int
    """Tokens that it was trained on after the pretrained model."""
    language: LanguageScore
    task: TaskScore
    size: ModelSize


@dataclass(frozen=True)
class Outcome:
    """All arms of one seed, and a sample of each end of the comparison."""

    seed: int
    arms: tuple[Arm, ...]
    samples: tuple[tuple[str, str, str], ...]
    """(arm, prompt, greedy continuation)."""
    distils_on_text: bool = True
    """Whether stage 3 trains on the text that bits per byte are measured on."""


@dataclass(frozen=True)
class Report:
    """What a pipeline has to say."""

    config: RunConfig
    outcomes: Sequence[Outcome]
    seconds: Mapping[str, float]
    total_seconds: float
    paths: Mapping[str, Path]
    export: Export | None = None


def model_size(model: CausalLM, *, ternary: bool) -> ModelSize:
    """Bytes of `model` with its block linears packed to 2 bits (`ternary`) or in 16 bits, the rest in 16 bits."""
    everything = sum(parameter.numel() for parameter in model.parameters())
    linear = sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("_proj.weight"))
    packed = -(-linear * 2 // 8) if ternary else linear * 2
    return ModelSize(linear=packed, total=packed + (everything - linear) * 2)


def evaluate_arms(config: RunConfig, steps: Mapping[str, StagePlan], tokens: Mapping[str, int]) -> Outcome:
    """Score every arm of one seed on the held-out test text and the task's test split."""
    assert isinstance(config.training, PipelineConfig)
    stage2, stage3 = steps["stage2"].config, steps["stage3"].config
    assert isinstance(stage2.data, PretrainData)
    assert isinstance(stage3.data, FinetuneData)
    # The text that stage 3 distils on, where it does: there the gap closes on text that all arms were trained for.
    text_data = stage3.data.replay or stage2.data
    assert isinstance(stage3.training, StageConfig)
    length = stage3.training.max_seq_length
    task = get_task(stage3.data.task)
    examples = task_examples(stage3.data, "test")
    tokenizer = read_artifact(steps["stage3"].artifact).load_tokenizer()
    held_out = held_out_rows(
        text_data, tokenizer,
        split="test", max_tokens=config.training.evaluation_tokens,
        max_seq_length=length, batch_size=16,
    )  # fmt: skip
    compute = choose_compute(stage3.training.dtype)
    text = held_out_documents(text_data, "test")[0]
    prompts = (text[:80], examples[0].prompt)

    arms: list[Arm] = []
    samples: list[tuple[str, str, str]] = []

    def evaluate(name: str, meaning: str, trained: int, model: CausalLM, *, sample: bool = False) -> None:
        model.to(compute.device)
        arm = Arm(
            name=name,
            meaning=meaning,
            tokens=trained,
            language=score_language(model, held_out, compute),
            task=score_task(model, tokenizer, task, examples, max_seq_length=length, compute=compute),
            size=model_size(model, ternary=any(isinstance(module, BitLinear) for module in model.modules())),
        )
        logger.info(
            "%-16s %.4f bits per byte, %s %.3f", name, arm.language.bits_per_byte, arm.task.metric, arm.task.value
        )
        arms.append(arm)
        if sample:
            samples.extend((name, prompt, _continue(model, tokenizer, prompt)) for prompt in prompts)

    def load(step: str) -> CausalLM:
        return read_artifact(steps[step].artifact).load_model()

    tuned = load("teacher")
    evaluate("full precision", "fine-tuned on the task; the teacher", tokens["teacher"], tuned, sample=True)
    if config.training.controls:
        evaluate(
            "control",
            "full precision given the same extra tokens",
            tokens["control_pretrain"] + tokens["control"],
            load("control"),
        )
        naive = to_bitnet(
            tuned.to("cpu"),
            placement="none",
            gain="ones",
            activation_bits=stage3.model.quantization.activation_bits,
            strength=1.0,
            calibration=[],
        )
        evaluate("naive ternary", "the fine-tuned model rounded, no training", tokens["teacher"], naive)
        evaluate("BitNet-SFT", "stage 1, then the task with cross-entropy", tokens["bitnet_sft"], load("bitnet_sft"))
    extra = sum(tokens[name] for name in ("stage1_9", "stage2", "stage3") if name in tokens)
    stages = "stages 1, 1.9, 2, 3" if "stage1_9" in tokens else "stages 1, 2, 3"
    evaluate("BitDistill", stages, extra, load("stage3"), sample=True)
    return Outcome(
        seed=steps["stage3"].config.seed,
        arms=tuple(arms),
        samples=tuple(samples),
        distils_on_text=stage3.data.replay is not None,
    )


def _continue(model: CausalLM, tokenizer: TextTokenizer, prompt: str) -> str:
    ids = [start_token_id(tokenizer), *tokenizer.encode(prompt)]
    with fully_quantized(model):
        [response] = generate(model, [ids], max_new_tokens=SAMPLE_TOKENS, eos_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(response)


@dataclass(frozen=True)
class Row:
    """An arm over all seeds."""

    name: str
    meaning: str
    tokens: int
    bits_per_byte: float
    bits_interval: Interval
    task_value: float
    task_interval: Interval
    bits_closure: GapClosure | None
    task_closure: GapClosure | None
    size: ModelSize


def summarize(outcomes: Sequence[Outcome]) -> list[Row]:
    """One row an arm; gap closure against BitNet-SFT and the control, where both were trained."""
    by_name = {arm.name: [o.arms[index] for o in outcomes] for index, arm in enumerate(outcomes[0].arms)}

    def bits(name: str) -> np.ndarray:
        return np.mean([arm.language.document_bits for arm in by_name[name]], axis=0)

    def errors(name: str) -> np.ndarray:
        return 1.0 - np.mean([arm.task.per_example for arm in by_name[name]], axis=0)

    rows = []
    for name, arms in by_name.items():
        on_bits: GapClosure | None = None
        on_task: GapClosure | None = None
        if name == "BitDistill" and "control" in by_name:
            sizes = [float(size) for size in arms[0].language.document_bytes]
            ones = [1.0] * len(arms[0].task.per_example)
            on_bits, on_task = (
                gap_closure(of("BitNet-SFT"), of(name), of("control"), weights, smallest_gap=smallest)
                for of, weights, smallest in ((bits, sizes, SMALLEST_GAP_BITS), (errors, ones, SMALLEST_GAP_ACCURACY))
            )
            if not all(outcome.distils_on_text for outcome in outcomes):
                on_bits = GapClosure(None, "undefined: stage 3 does not train on this text")
        value, interval = over_seeds([a.language.bits_per_byte for a in arms], [a.language.interval for a in arms])
        score, score_interval = over_seeds([a.task.value for a in arms], [a.task.interval for a in arms])
        rows.append(
            Row(
                name,
                arms[0].meaning,
                arms[0].tokens,
                value,
                interval,
                score,
                score_interval,
                on_bits,
                on_task,
                arms[0].size,
            )
        )
    return rows


def render_table(rows: Sequence[Row], task_name: str, metric: str) -> str:
    """The table, as aligned Markdown."""
    head = ["model", "trained tokens", "held-out bits/byte", f"{task_name} {metric}", "linear MB", "all MB"]
    body = [
        [
            row.name,
            f"{row.tokens:,}",
            f"{row.bits_per_byte:.4f} [{row.bits_interval.low:.4f}, {row.bits_interval.high:.4f}]",
            f"{100 * row.task_value:.1f}% [{100 * row.task_interval.low:.1f}, {100 * row.task_interval.high:.1f}]",
            f"{row.size.linear / 1e6:.2f}",
            f"{row.size.total / 1e6:.2f}",
        ]
        for row in rows
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(head), line(["-" * width for width in widths]), *map(line, body)])


def render_closure(rows: Sequence[Row]) -> str:
    """Gap closure in words, or why it is undefined."""
    lines = []
    for row in rows:
        for what, closure in (("bits per byte", row.bits_closure), ("the task", row.task_closure)):
            if closure is not None:
                value = closure.reason if closure.value is None else f"{100 * closure.value:.0f}% ({closure.reason})"
                lines.append(f"gap closure on {what}, BitNet-SFT to control: {value}")
    return "\n".join(lines)


def write_report(report: Report, folder: Path) -> None:
    """Write report.md, report.json, table.txt and the plots; print the table."""
    stage3 = report.outcomes[0].arms[-1]
    rows = summarize(report.outcomes)
    table = render_table(rows, stage3.task.task, stage3.task.metric)
    closure = render_closure(rows)
    seeds = ", ".join(str(outcome.seed) for outcome in report.outcomes)
    timing = "\n".join(f"| {name} | {seconds:.1f} |" for name, seconds in report.seconds.items())
    paths = "\n".join(f"- {name}: `{path}`" for name, path in report.paths.items())
    meanings = "\n".join(f"- **{row.name}**: {row.meaning}" for row in rows)
    samples = "\n\n".join(
        f"**{arm}**\n\n> {_quote(prompt)} **{_quote(continuation)}**"
        for arm, prompt, continuation in report.outcomes[-1].samples
    )
    folder.mkdir(parents=True, exist_ok=True)
    draw_bars(
        folder / "bits_per_byte.png",
        [Bar(row.name, row.bits_per_byte, row.bits_interval.low, row.bits_interval.high) for row in rows],
        y_label="held-out bits per byte",
        title="Language modelling (lower is better)",
    )
    draw_bars(
        folder / "task.png",
        [Bar(row.name, row.task_value, row.task_interval.low, row.task_interval.high) for row in rows],
        y_label=stage3.task.metric,
        title=f"{stage3.task.task} (higher is better)",
    )
    summary = f"{table}\n\n{closure}".rstrip()
    atomic_write(folder / "table.txt", summary + "\n")
    atomic_write(
        folder / "report.md",
        f"# {report.config.model.name}: from full precision to ternary\n\nSeeds: {seeds}. Intervals are 95%: bootstrap "
        "over documents and questions for one seed, Student's t over seeds for several. Every figure is at "
        "lambda = 1 and full SubLN strength. Ternary sizes count 2 bits a block weight and 16 bits elsewhere, full-"
        f"precision sizes 16 bits.\n\n{summary}\n\n{meanings}\n\n![bits per byte](bits_per_byte.png) ![task](task.png)"
        f"\n\n## Time\n\n| part | seconds |\n|---|---|\n{timing}\n| all | {report.total_seconds:.1f} |\n\n## Artifacts\n\n"
        f"{paths}\n\n{_render_export(report.export)}## Samples (greedy)\n\n{samples}\n",
    )
    atomic_write(folder / "report.json", json.dumps(_record(report, rows), indent=1) + "\n")
    for line in summary.splitlines():
        logger.info("%s", line)
    for arm, prompt, continuation in report.outcomes[-1].samples:
        logger.info("sample of %s: %s ... %s", arm, _quote(prompt), _quote(continuation))
    logger.info(
        "time: %s; all %.1f s",
        ", ".join(f"{name} {seconds:.1f} s" for name, seconds in report.seconds.items()),
        report.total_seconds,
    )
    logger.info("report: %s", folder / "report.md")
    logger.info("ternary model: %s", report.paths["final"])
    if report.export is not None:
        for prompt, continuation in report.export.samples:
            logger.info("sample of %s: %s ... %s", report.export.engine, _quote(prompt), _quote(continuation))
        for line in report.export.lines():
            logger.info("%s", line)


def _render_export(export: Export | None) -> str:
    """The section about the GGUF file; empty where none was written."""
    if export is None:
        return ""
    lines = "\n".join(f"- {line}" for line in export.lines())
    samples = "\n\n".join(f"> {_quote(prompt)} **{_quote(text)}**" for prompt, text in export.samples)
    return f"## GGUF\n\n{lines}\n\nGreedy, from {export.engine}:\n\n{samples}\n\n"


def _record(report: Report, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "rows": [asdict(row) for row in rows],
        "outcomes": [asdict(outcome) for outcome in report.outcomes],
        "seconds": dict(report.seconds),
        "total_seconds": report.total_seconds,
        "paths": {name: str(path) for name, path in report.paths.items()},
        "export": None if report.export is None else report.export.record(),
    }


def _quote(text: str) -> str:
    return " ".join(text.split())
