"""A model card: what a model is, where it comes from, what it was trained on, what was measured, how to load it.

Every sentence follows from the lineage record, the architecture, or figures that the caller measured. What is not recorded is
left out: a card never guesses. A lineage is a record of any version of this library, so a fact may be absent.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, cast

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.utils.errors import ConfigError

STAGE_TITLES = {
    "stage1": "stage 1: ternary linear layers and SubLN inserted",
    "stage1_9": "stage 1.9: hidden states aligned with the base model's",
    "stage2": "stage 2: continued pretraining",
    "stage3": "stage 3: distillation on a task",
    "fp_pretrain": "full-precision pretraining",
    "fp_sft": "full-precision fine-tuning",
    "bitnet_sft": "ternary fine-tuning with cross-entropy",
}

LICENSES = {
    "HuggingFaceTB/SmolLM2-135M": "apache-2.0",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "apache-2.0",
    "Qwen/Qwen2.5-7B": "apache-2.0",
    "Qwen/Qwen3-0.6B-Base": "apache-2.0",
    "Qwen/Qwen3-1.7B-Base": "apache-2.0",
    "Qwen/Qwen3-4B-Base": "apache-2.0",
    "meta-llama/Llama-2-7b-hf": "llama2",
    "meta-llama/Llama-3.2-3B": "llama3.2",
}
"""Licences of the base models that have a configuration here, as their own cards state them."""

PACKAGED_BASES = {"smollm2_135m_instruct": "HuggingFaceTB/SmolLM2-135M-Instruct"}
"""Packaged models that are copies of a model of the hub."""

ARTIFACT_LOADING = """\
```bash
uv run python scripts/convert_to_gguf.py --input <this folder> --output model.gguf
uv run python scripts/serve.py --model model.gguf --port 8080
uv run python scripts/export_hf.py --input <this folder> --output <a new folder>
```
"""
"""How to use a folder that a stage wrote."""


def render_card(
    lineage: Mapping[str, Any],
    architecture: Architecture,
    bitnet: BitNetSpec | None,
    figures: Mapping[str, str],
    *,
    loading: str = ARTIFACT_LOADING,
    library: str = "wrinklefree",
) -> str:
    """The card, as Markdown with YAML front matter.

    Args:
        lineage: What a stage recorded of the model.
        architecture: Of the model.
        bitnet: How it is ternary; None for full precision.
        figures: What was measured on this model -> value, as they are to be printed; empty where nothing was.
        loading: Markdown that says how to load this very folder.
        library: Library that loads it, for the front matter.
    """
    name = (
        f"{_text(lineage, 'base', 'name') or architecture.family} {'full precision' if bitnet is None else 'ternary'}"
    )
    sections = [
        _front_matter(lineage, bitnet, library),
        f"# {name}\n\n{_summary(lineage, architecture, bitnet)}",
        f"## Use\n\n{loading.strip()}",
        f"## Lineage\n\n{_lineage(lineage)}",
        _section("Training", _training(lineage)),
        f"## Measured\n\n{_figures(figures)}",
        f"## Limits\n\n{_limits(lineage, bitnet)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def figures_from_report(path: Path, lineage: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a pipeline's report.json, if one of its models is the one with this lineage.

    Raises:
        ConfigError: it is no report, or a report of other models.
    """
    try:
        report = json.loads(path.read_bytes())
        paths = [PurePath(value) for value in report["paths"].values()]
        lines = [_figure_of(row) for row in report["rows"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is no report of a pipeline ({error}); pass the report.json that it wrote") from error
    run = (_text(lineage, "fingerprint") or "")[:8]
    if not run or not any(run in path.parts for path in paths):
        raise ConfigError(
            f"{path} reports on other models than {run or 'this one, which records no fingerprint'}; "
            "pass the report of the job that made it"
        )
    return {key: value for line in lines for key, value in line.items()}


def _figure_of(row: Mapping[str, Any]) -> dict[str, str]:
    bits, task = row["bits_interval"], row["task_interval"]
    return {
        f"{row['name']}: held-out bits per byte": f"{row['bits_per_byte']:.4f} [{bits['low']:.4f}, {bits['high']:.4f}]",
        f"{row['name']}: task": f"{100 * row['task_value']:.1f}% [{100 * task['low']:.1f}, {100 * task['high']:.1f}]",
    }


def base_model_of(lineage: Mapping[str, Any]) -> str | None:
    """Hub id of the model that the chain of stages began with; None where it began elsewhere."""
    source, origin = _text(lineage, "base", "source"), _text(lineage, "base", "from")
    if source == "hub":
        return origin
    return PACKAGED_BASES.get(origin or "") if source == "package" else None


def _front_matter(lineage: Mapping[str, Any], bitnet: BitNetSpec | None, library: str) -> str:
    base = base_model_of(lineage)
    license_name = LICENSES.get(base) if base is not None else None
    if _text(lineage, "base", "from") == "tiny" and _text(lineage, "base", "source") == "package":
        license_name = "mit"
    lines = [f"library_name: {library}", "pipeline_tag: text-generation"]
    if license_name is not None:
        lines.append(f"license: {license_name}")
    if base is not None:
        lines += [f"base_model: {base}", f"base_model_relation: {'finetune' if bitnet is None else 'quantized'}"]
    tags = ["wrinklefree"] if bitnet is None else ["wrinklefree", "bitnet", "ternary", "1.58-bit"]
    return "\n".join(["---", *lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def _summary(lineage: Mapping[str, Any], architecture: Architecture, bitnet: BitNetSpec | None) -> str:
    a = architecture
    shape = (
        f"{a.num_hidden_layers} blocks, hidden size {a.hidden_size}, feed-forward {a.intermediate_size}, "
        f"{a.num_attention_heads} heads ({a.num_key_value_heads} for keys and values), vocabulary {a.vocab_size}, "
        f"context {a.max_position_embeddings}"
    )
    base = base_model_of(lineage)
    origin = f", made from [{base}](https://huggingface.co/{base})" if base is not None else ""
    if bitnet is None:
        return f"A full-precision decoder of the {a.family} family{origin}: {shape}."
    places = {
        "none": "no SubLN norms",
        "output": "SubLN norms before the output projections",
        "per_projection": "SubLN norms before all projections",
    }
    activations = (
        "activations are not quantized"
        if bitnet.activation_bits is None
        else f"activations have {bitnet.activation_bits}-bit codes, one scale a token"
    )
    return (
        f"A ternary decoder of the {a.family} family{origin}: {shape}.\n\nThe linear layers inside the blocks have weights "
        f"-1, 0 and 1 times one scale a matrix (BitNet b1.58); {activations}; {places[bitnet.placement]}. Embedding, head "
        "and norms are full precision. It was made with WrinkleFree, which follows "
        "[BitNet Distillation](https://arxiv.org/abs/2510.13998)."
    )


def _lineage(lineage: Mapping[str, Any]) -> str:
    lines: list[str] = []
    for stage, fingerprint in cast("Sequence[tuple[str, str]]", _at(lineage, "ancestors") or []):
        lines.append(f"1. {STAGE_TITLES.get(stage, stage)}, run `{fingerprint[:8]}`")
    if not lines and (stage := _text(lineage, "stage")) is not None:
        lines.append(f"1. {STAGE_TITLES.get(stage, stage)}")
    facts = {
        "fingerprint": _text(lineage, "fingerprint"),
        "base weights": _text(lineage, "base", "fingerprint"),
        "teacher": next(iter(_parents(lineage, "teacher")), None),
        "commit": _commit(lineage),
        "seed": _text(lineage, "seed"),
        "versions": _pairs(_at(lineage, "versions")),
        "device": _pairs(_at(lineage, "resolved")),
    }
    table = [f"| {name} | {value} |" for name, value in facts.items() if value]
    if table:
        lines += ["", "| | |", "|---|---|", *table]
    return "\n".join(lines) if lines else "No lineage was recorded."


def _training(lineage: Mapping[str, Any]) -> str:
    facts = {
        "data": _data(_at(lineage, "config", "data")) or _text(lineage, "data", "name"),
        "tokens trained on in this stage": _number(_at(lineage, "tokens")),
        "learning rate": _text(lineage, "config", "training", "lr"),
        "schedule": _text(lineage, "config", "training", "schedule", "type"),
        "rows x accumulation": _product(lineage),
        "tokens a row": _text(lineage, "config", "training", "max_seq_length"),
        "optimizer": _text(lineage, "resolved", "optimizer"),
        "weight decay": _text(lineage, "config", "optimizer", "weight_decay"),
    }
    if _text(lineage, "stage") == "stage3":
        facts |= {
            "logit distillation weight": _text(lineage, "config", "distillation", "lambda_logits"),
            "relation distillation weight": _text(lineage, "config", "distillation", "gamma_attention"),
            "temperature": _text(lineage, "config", "distillation", "logits", "temperature"),
        }
    rows = [f"| {name} | {value} |" for name, value in facts.items() if value]
    if not rows:
        return ""
    return "\n".join(["The last stage; the earlier ones have records of their own.", "", "| | |", "|---|---|", *rows])


def _figures(figures: Mapping[str, str]) -> str:
    if not figures:
        return "Nothing was measured on this model yet."
    rows = [f"| {name} | {value} |" for name, value in figures.items()]
    return "\n".join(["Brackets are 95% intervals.", "", "| | |", "|---|---|", *rows])


def _limits(lineage: Mapping[str, Any], bitnet: BitNetSpec | None) -> str:
    lines = ["- A language model repeats what its text taught it, errors and prejudice included."]
    if bitnet is not None:
        lines.append(
            "- It works as it was trained only where activations are quantized as above; a runtime with other activation "
            "codes gives slightly other logits."
        )
    if _text(lineage, "stage") in {"stage3", "fp_sft", "bitnet_sft"} and _text(lineage, "data", "name"):
        lines.append(f"- It was tuned on one task ({_text(lineage, 'data', 'name')}) and is not a general assistant.")
    if base_model_of(lineage) == PACKAGED_BASES["smollm2_135m_instruct"]:
        lines.append(
            "- Its base weights came from a packaged 4-bit file, dequantized, not from the original checkpoint."
        )
    return "\n".join(lines)


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _data(data: object) -> str | None:
    """One line for a `data` group: the task, and the sources of text with their shares."""
    if not isinstance(data, Mapping):
        return None
    group = cast("Mapping[str, Any]", data)
    parts = [f"task {group['task']}"] if "task" in group else []
    replay = group.get("replay")
    text = cast("Mapping[str, Any]", replay) if isinstance(replay, Mapping) else group
    sources = cast("Sequence[Mapping[str, Any]]", text.get("sources") or [])
    total = sum(float(source.get("weight", 1.0)) for source in sources)
    parts += [f"{_source(source)} ({float(source.get('weight', 1.0)) / total:.0%})" for source in sources]
    return ", ".join(parts) or None


def _source(source: Mapping[str, Any]) -> str:
    kind = source.get("kind")
    if kind == "hub":
        return str(source["path"]) if source.get("name") is None else f"{source['path']}/{source['name']}"
    if kind == "local":  # the name alone: a path says where somebody lives
        return f"local file {PurePath(str(source['path'])).name}"
    return "generated facts" if kind == "facts" else str(source.get("name", kind))


def _commit(lineage: Mapping[str, Any]) -> str | None:
    commit = _text(lineage, "git_commit")
    return f"{commit}, with uncommitted changes" if commit and _at(lineage, "git_dirty") is True else commit


def _parents(lineage: Mapping[str, Any], role: str) -> list[str]:
    parents = cast("Sequence[object]", _at(lineage, "parents") or [])
    found = [cast("Mapping[str, Any]", parent) for parent in parents if isinstance(parent, Mapping)]
    return [f"{parent['stage']}, {parent['fingerprint']}" for parent in found if parent.get("role") == role]


def _product(lineage: Mapping[str, Any]) -> str | None:
    rows = _text(lineage, "config", "training", "batch_size")
    times = _text(lineage, "config", "training", "gradient_accumulation_steps")
    return f"{rows} x {times}" if rows and times else None


def _pairs(value: object) -> str | None:
    if not isinstance(value, Mapping):
        return None
    pairs = cast("Mapping[str, object]", value)
    return ", ".join(f"{name} {version}" for name, version in pairs.items()) or None


def _number(value: object) -> str | None:
    return f"{value:,}" if isinstance(value, int) and value else None


def _at(record: Mapping[str, Any], *keys: str) -> object:
    """The value at a path of keys; None where the record ends earlier."""
    value: object = record
    for key in keys:
        if not isinstance(value, Mapping):
            return None
        value = cast("Mapping[str, object]", value).get(key)
    return value


def _text(record: Mapping[str, Any], *keys: str) -> str | None:
    value = _at(record, *keys)
    return None if value is None or isinstance(value, Mapping | list) else str(value)
