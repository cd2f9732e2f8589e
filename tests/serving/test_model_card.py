"""Model cards: what is recorded is said, what is not is left out."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.serving.model_card import base_model_of, figures_from_report, render_card
from wrinklefree.utils.errors import ConfigError

ARCHITECTURE = Architecture(
    family="qwen3",
    vocab_size=270,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    qk_norm=True,
)
SPEC = BitNetSpec(placement="output", gain="median", quantization_lambda=1.0)
RUN = "b4a492ba10849657"


def lineage(**changes: Any) -> dict[str, Any]:
    return {
        "stage": "stage3",
        "fingerprint": RUN,
        "parents": [
            {"role": "init", "stage": "stage2", "fingerprint": "61c17646", "path": "/somewhere/private"},
            {"role": "teacher", "stage": "fp_sft", "fingerprint": "2e9f32d4", "path": "/somewhere/private"},
        ],
        "ancestors": [["stage1", "9b8702a2c66d"], ["stage2", "61c17646499c"], ["stage3", RUN]],
        "base": {"name": "qwen3_4b", "source": "hub", "from": "Qwen/Qwen3-4B-Base", "fingerprint": "hub:x@abc"},
        "data": {"name": "sst2", "fingerprint": "00"},
        "tokens": 1234567,
        "seed": 42,
        "git_commit": "0eba5c7a",
        "git_dirty": True,
        "resolved": {"optimizer": "adamw_8bit", "device": "cuda"},
        "versions": {"torch": "2.15.0"},
        "config": {
            "training": {"lr": 5e-05, "batch_size": 8, "gradient_accumulation_steps": 4, "max_seq_length": 512},
            "distillation": {"lambda_logits": 10.0, "gamma_attention": "auto", "logits": {"temperature": 5.0}},
            "data": {
                "task": "sst2",
                "replay": {
                    "sources": [
                        {"kind": "hub", "path": "HuggingFaceFW/fineweb-edu", "name": "sample-10BT", "weight": 3.0},
                        {"kind": "local", "path": "/private/folder/notes.txt", "weight": 1.0},
                    ]
                },
            },
        },
        **changes,
    }


def test_the_card_says_what_was_recorded() -> None:
    card = render_card(lineage(), ARCHITECTURE, SPEC, {"held-out bits per byte": "0.912 [0.900, 0.924]"})
    for line in (
        "# qwen3_4b ternary",
        "made from [Qwen/Qwen3-4B-Base](https://huggingface.co/Qwen/Qwen3-4B-Base)",
        "1. stage 2: continued pretraining, run `61c17646`",
        "| teacher | fp_sft, 2e9f32d4 |",
        "| commit | 0eba5c7a, with uncommitted changes |",
        "| data | task sst2, HuggingFaceFW/fineweb-edu/sample-10BT (75%), local file notes.txt (25%) |",
        "| tokens trained on in this stage | 1,234,567 |",
        "| rows x accumulation | 8 x 4 |",
        "| optimizer | adamw_8bit |",
        "| temperature | 5.0 |",
        "| held-out bits per byte | 0.912 [0.900, 0.924] |",
        "SubLN norms before the output projections",
        "activations have 8-bit codes",
    ):
        assert line in card
    assert "private" not in card


def test_the_front_matter_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card(lineage(), ARCHITECTURE, SPEC, {}, library="transformers")).data.to_dict()
    assert data == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "apache-2.0",
        "base_model": "Qwen/Qwen3-4B-Base",
        "base_model_relation": "quantized",
        "tags": ["wrinklefree", "bitnet", "ternary", "1.58-bit"],
    }


def test_an_unknown_base_gets_no_licence() -> None:
    unknown = lineage(base={"name": "own", "source": "path", "from": "somewhere/else", "fingerprint": "folder:1"})
    data = ModelCard(render_card(unknown, ARCHITECTURE, None, {})).data.to_dict()
    assert "license" not in data
    assert "base_model" not in data
    assert data["tags"] == ["wrinklefree"]
    tiny = lineage(base={"name": "tiny", "source": "package", "from": "tiny", "fingerprint": "x"})
    assert ModelCard(render_card(tiny, ARCHITECTURE, SPEC, {})).data.license == "mit"


def test_packaged_weights_are_named_as_what_they_are() -> None:
    packaged = lineage(base={"name": "smollm2_135m", "source": "package", "from": "smollm2_135m_instruct"})
    assert base_model_of(packaged) == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "packaged 4-bit file, dequantized" in render_card(packaged, ARCHITECTURE, SPEC, {})


@pytest.mark.parametrize("record", [{}, {"stage": "stage2", "tokens": 12, "parents": ["ab"]}, {"base": "x", "data": 3}])
def test_what_is_not_recorded_is_left_out(record: dict[str, Any]) -> None:
    card = render_card(record, ARCHITECTURE, SPEC, {})
    assert "None" not in card
    assert "Nothing was measured on this model yet." in card
    assert "| seed |" not in card


def row(name: str) -> dict[str, Any]:
    interval = {"low": 0.9, "high": 1.1}
    return {
        "name": name, "bits_per_byte": 1.0, "bits_interval": interval, "task_value": 0.93, "task_interval": interval,
    }  # fmt: skip


def test_figures_come_from_the_report_of_the_job(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(json.dumps({"paths": {"stage3": f"outputs/runs/{RUN[:8]}/artifact"}, "rows": [row("BitDistill")]}))
    assert figures_from_report(file, lineage()) == {
        "BitDistill: held-out bits per byte": "1.0000 [0.9000, 1.1000]",
        "BitDistill: task": "93.0% [90.0, 110.0]",
    }
    with pytest.raises(ConfigError, match="reports on other models than ffffffff"):
        figures_from_report(file, lineage(fingerprint="ffffffff00"))
    with pytest.raises(ConfigError, match="which records no fingerprint"):
        figures_from_report(file, {})


@pytest.mark.parametrize("content", ["", "[]", '{"paths": {}}', '{"paths": [], "rows": []}'])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match="is no report of a pipeline"):
        figures_from_report(file, lineage())
    with pytest.raises(ConfigError, match="is no report of a pipeline"):
        figures_from_report(tmp_path / "absent.json", lineage())
