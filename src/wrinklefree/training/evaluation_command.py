"""Score a checkpoint on text and tasks, or two of them on the same items; what `scripts/run_evaluation.py` does."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wrinklefree.data.config import PretrainData
from wrinklefree.data.finetune_dataset import spread
from wrinklefree.data.pretrain_dataset import held_out_rows
from wrinklefree.data.tasks import get_task
from wrinklefree.models.artifact import POINTERS, read_artifact, resolve_artifact
from wrinklefree.models.bitlinear import set_products
from wrinklefree.models.config import ModelConfig
from wrinklefree.models.hf import architecture_from_hf, load_pretrained
from wrinklefree.models.llama import CausalLM
from wrinklefree.native.library import is_available
from wrinklefree.serving.packed_bitlinear import pack_bitlinears
from wrinklefree.training.comparison import Difference, Interval, paired_difference
from wrinklefree.training.config import RunConfig
from wrinklefree.training.device import Compute, choose_compute
from wrinklefree.training.evaluation import LanguageScore, TaskScore, score_generation, score_language, score_task
from wrinklefree.training.evaluation_config import TEXT, EvaluationCommand
from wrinklefree.training.study_config import BASE
from wrinklefree.training.tables import render_markdown
from wrinklefree.utils.errors import CheckpointError, ConfigError, DataError
from wrinklefree.utils.manifest import MANIFEST
from wrinklefree.utils.storage import atomic_write, explained
from wrinklefree.utils.tokenizer import TextTokenizer

logger = logging.getLogger(__name__)

DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Subject:
    """A model to score, and what to call it."""

    name: str
    kind: str
    """`ternary`, `full precision` or `packed`."""
    model: CausalLM
    tokenizer: TextTokenizer


@dataclass(frozen=True)
class Scores:
    """Everything that was measured of one checkpoint."""

    checkpoint: str
    kind: str
    language: LanguageScore | None
    tasks: tuple[TaskScore, ...]
    harness: Mapping[str, Any] | None


@dataclass(frozen=True)
class MetricRow:
    """One line of the table."""

    task: str
    metric: str
    value: float
    interval: Interval | None


def run_evaluation(command: EvaluationCommand, config: RunConfig) -> str:
    """Score, write the JSON, and return the table.

    Raises:
        CheckpointError: a path holds no model.
        ConfigError: an unknown task, or rows longer than the model's context.
        DataError: a split without examples.
        NotAvailableError: lm-eval tasks without the extra `eval`.
    """
    for task in command.own_tasks:
        get_task(task)
    if command.harness_tasks:
        from wrinklefree.training.lm_eval_bridge import require_lm_eval

        require_lm_eval()
    scores = [score_checkpoint(command.checkpoint, command, config)]
    differences: list[tuple[str, str, Difference]] = []
    if command.compare is not None:
        scores.append(score_checkpoint(command.compare, command, config))
        differences = compare_scores(*scores)
    text = render_scores(scores, differences)
    target = Path(command.output) if command.output is not None else Path(config.output_dir) / "evaluation.json"
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(target, json.dumps(record(command, scores, differences), indent=1) + "\n")
    logger.info("written: %s", target)
    return text


def score_checkpoint(path: str, command: EvaluationCommand, config: RunConfig) -> Scores:
    """Load a checkpoint and score it on everything that the command names."""
    compute = choose_compute(command.dtype)
    subject = load_subject(path, config)
    subject.model.to(compute.device)
    _choose_kernels(command, subject, compute)
    length = row_length(command, subject.model)
    logger.info("%s: %s, rows of %d tokens", subject.name, subject.kind, length)
    language = None
    if TEXT in command.tasks:
        language = _score_text(subject, command, config, length, compute)
    tasks = tuple(_score_task(subject, name, command, length, compute) for name in command.own_tasks)
    harness = None
    if command.harness_tasks:
        from wrinklefree.training.lm_eval_bridge import evaluate_harness

        harness = evaluate_harness(
            subject.model,
            subject.tokenizer,
            command.harness_tasks,
            compute=compute,
            max_seq_length=length,
            max_examples=command.max_examples,
            task_folder=Path(command.lm_eval_tasks) if command.lm_eval_tasks is not None else None,
        )
    return Scores(subject.name, subject.kind, language, tasks, harness)


def _choose_kernels(command: EvaluationCommand, subject: Subject, compute: Compute) -> None:
    """Let the CPU engine's kernels multiply the ternary layers, if they are there and compute the same.

    Raises:
        ConfigError: `kernels=packed` asks for what cannot be.
    """
    bitnet = subject.model.bitnet
    problem = None
    if compute.device.type != "cpu":
        problem = "they run on the CPU, and evaluation runs on the GPU"
    elif bitnet is None or not bitnet.is_plain:
        problem = f"{subject.name} is not a plain ternary model"
    elif command.kernels != "torch" and not is_available():
        problem = "the CPU engine was not built; install a C compiler or set CC, and install again"
    if command.kernels == "packed" and problem is not None:
        raise ConfigError(f"kernels=packed: {problem}; use kernels=auto")
    if command.kernels == "torch":
        set_products(subject.model, "float", "exact")
        return
    if problem is not None:
        return
    count = pack_bitlinears(subject.model)
    logger.info("%s: %d layers run on the CPU engine's kernels", subject.name, count)


def row_length(command: EvaluationCommand, model: CausalLM) -> int:
    """Tokens a row: as asked, else 512 or the context.

    Raises:
        ConfigError: longer than the model's context.
    """
    context = model.architecture.max_position_embeddings
    if command.max_seq_length is None:
        return min(DEFAULT_LENGTH, context)
    if command.max_seq_length > context:
        raise ConfigError(f"max_seq_length={command.max_seq_length} is longer than the model's context of {context}")
    return command.max_seq_length


def load_subject(path: str, config: RunConfig) -> Subject:
    """The model that a path means: `base`, a GGUF file, an artifact, a stage's folder, or a Hugging Face folder.

    Raises:
        CheckpointError: nothing of these.
    """
    if path == BASE:
        model, tokenizer = load_pretrained(config.model)
        return Subject(f"{BASE} ({config.model.name})", "full precision", model, tokenizer)
    place = Path(path).expanduser()
    if not place.exists():
        raise CheckpointError(f"checkpoint {path} does not exist; pass a folder, a GGUF file, or {BASE}")
    if place.is_file():
        return _load_packed(place)
    if (place / MANIFEST).is_file() or any((place / pointer).is_dir() for pointer in POINTERS):
        artifact = read_artifact(resolve_artifact(place))
        kind = "full precision" if artifact.bitnet is None else "ternary"
        return Subject(str(path), kind, artifact.load_model(), artifact.load_tokenizer())
    return _load_hf(place, config.model)


def _load_packed(file: Path) -> Subject:
    if file.suffix != ".gguf":
        raise CheckpointError(f"checkpoint {file} is a file and no GGUF; pass a folder, a GGUF file, or {BASE}")
    from wrinklefree.models.gguf_weights import load_gguf_model

    model, tokenizer = load_gguf_model(file)
    return Subject(str(file), "full precision" if model.bitnet is None else "packed", model, tokenizer)


def _load_hf(folder: Path, base: ModelConfig) -> Subject:
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint {folder} is neither an artifact nor a Hugging Face folder: it has no config.json"
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict) or "model_type" not in content:
        raise CheckpointError(f"{folder / 'config.json'} names no model_type; it is no Hugging Face folder")
    found = base.model_copy(
        update={"source": "path", "path": str(folder), "architecture": architecture_from_hf(content)}
    )
    model, tokenizer = load_pretrained(found)
    return Subject(str(folder), "full precision", model, tokenizer)


def _score_text(
    subject: Subject, command: EvaluationCommand, config: RunConfig, length: int, compute: Compute
) -> LanguageScore:
    if not isinstance(config.data, PretrainData):
        raise ConfigError(
            f"tasks has {TEXT}, and data={config.data.name} is a task; choose text, such as data=packaged"
        )
    held_out = held_out_rows(
        config.data, subject.tokenizer,
        split=command.split, max_tokens=command.max_tokens, max_seq_length=length, batch_size=16,
    )  # fmt: skip
    return score_language(subject.model, held_out, compute)


def _score_task(subject: Subject, name: str, command: EvaluationCommand, length: int, compute: Compute) -> TaskScore:
    task = get_task(name)
    examples = spread(task.load(command.split), command.max_examples)
    if task.kind == "classification":
        return score_task(subject.model, subject.tokenizer, task, examples, max_seq_length=length, compute=compute)
    if not examples:
        raise DataError(f"task {task.name} has no examples in this split")
    return score_generation(
        subject.model, subject.tokenizer, task, examples,
        max_seq_length=length, max_new_tokens=command.max_new_tokens, compute=compute,
    )  # fmt: skip


def compare_scores(first: Scores, second: Scores) -> list[tuple[str, str, Difference]]:
    """(task, metric, first minus second) wherever both were scored on the same items.

    Raises:
        DataError: the two read different documents.
    """
    found: list[tuple[str, str, Difference]] = []
    if first.language is not None and second.language is not None:
        # Another tokenizer stops after another number of documents; they come in one order, so the beginning is shared.
        count = min(len(first.language.document_bytes), len(second.language.document_bytes))
        sizes = first.language.document_bytes[:count]
        if sizes != second.language.document_bytes[:count]:
            raise DataError("the two checkpoints were scored on different documents and cannot be compared")
        difference = paired_difference(
            first.language.document_bits[:count], second.language.document_bits[:count], [float(size) for size in sizes]
        )
        found.append((TEXT, "bits_per_byte", difference))
    for mine, theirs in zip(first.tasks, second.tasks, strict=True):
        ones = [1.0] * len(mine.per_example)
        found.append((mine.task, mine.metric, paired_difference(mine.per_example, theirs.per_example, ones)))
    return found


def metric_rows(scores: Scores) -> list[MetricRow]:
    """The scores as lines: headline metrics and their companions."""
    rows: list[MetricRow] = []
    if scores.language is not None:
        language = scores.language
        rows.append(MetricRow(TEXT, "bits_per_byte", language.bits_per_byte, language.interval))
        rows.append(MetricRow(TEXT, "perplexity", language.perplexity, language.perplexity_interval))
    for task in scores.tasks:
        if task.rouge is not None:
            rows.extend(MetricRow(task.task, name, value, interval) for name, (value, interval) in task.rouge.items())
        else:
            rows.append(MetricRow(task.task, task.metric, task.value, task.interval))
        if task.macro_f1 is not None:
            rows.append(MetricRow(task.task, "macro_f1", task.macro_f1, task.macro_f1_interval))
    for name, metrics in (scores.harness or {}).items():
        rows.extend(
            MetricRow(f"lm_eval:{name}", metric, value, _harness_interval(metrics, metric))
            for metric, value in metrics.items()
            if isinstance(value, float | int) and "_stderr" not in metric
        )
    return rows


def _harness_interval(metrics: Mapping[str, Any], metric: str) -> Interval | None:
    """The harness reports standard errors (`acc,none` and `acc_stderr,none`)."""
    name, comma, rest = metric.partition(",")
    error = metrics.get(f"{name}_stderr{comma}{rest}")
    if not isinstance(error, float):
        return None
    value = float(metrics[metric])
    return Interval(value - 1.96 * error, value + 1.96 * error)


def render_scores(scores: Sequence[Scores], differences: Sequence[tuple[str, str, Difference]]) -> str:
    """The table of each checkpoint's scores, and of the paired differences."""
    head = ["task", "metric", *(f"{one.checkpoint} ({one.kind})" for one in scores)]
    lines: dict[tuple[str, str], list[str]] = {}
    for one in scores:
        for row in metric_rows(one):
            ends = "" if row.interval is None else f" [{row.interval.low:.4f}, {row.interval.high:.4f}]"
            lines.setdefault((row.task, row.metric), []).append(f"{row.value:.4f}{ends}")
    text = render_markdown(head, [[*key, *cells] for key, cells in lines.items()])
    if not differences:
        return text
    compared = [
        [
            task,
            metric,
            f"{d.value:+.4f} [{d.interval.low:+.4f}, {d.interval.high:+.4f}]",
            "yes" if d.excludes_zero else "no",
            "" if d.mcnemar is None else f"{d.mcnemar:.3g} ({d.only_first} against {d.only_second})",
        ]
        for task, metric, d in differences
    ]
    names = ["task", "metric", "first minus second", "interval excludes 0", "McNemar p"]
    return f"{text}\n\n{render_markdown(names, compared)}"


def record(
    command: EvaluationCommand, scores: Sequence[Scores], differences: Sequence[tuple[str, str, Difference]]
) -> dict[str, Any]:
    """What is written as JSON: the command, all scores with their items, the differences."""
    return {
        "command": command.model_dump(mode="json"),
        "scores": [asdict(one) for one in scores],
        "differences": [
            {"task": task, "metric": metric, **asdict(difference)} for task, metric, difference in differences
        ],
    }
