"""Hugging Face export: what a fresh process loads computes what the artifact computes."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from wrinklefree.cli import export_main
from wrinklefree.models.artifact import Artifact, read_artifact, write_artifact
from wrinklefree.models.config import Architecture, BitNetSpec, RopeScaling
from wrinklefree.models.generate import generate, left_pad
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.weights import assemble
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.hf_export import Export, export_hf
from wrinklefree.serving.hf_layouts import LayoutName, LinearClass, Weights
from wrinklefree.serving.refusals import refuse_unfinished
from wrinklefree.utils.errors import CheckpointError, ConfigError
from wrinklefree.utils.manifest import verify_manifest
from wrinklefree.utils.tokenizer import SpecialTokens, TextTokenizer, train_tokenizer

LLAMA = Architecture(
    family="llama",
    vocab_size=270,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
QWEN2 = LLAMA.model_copy(update={"family": "qwen2", "attention_bias": True, "rope_theta": 1e6})
QWEN3 = LLAMA.model_copy(
    update={"family": "qwen3", "qk_norm": True, "head_dim": 16, "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
)
SCALED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
LLAMA3 = LLAMA.model_copy(
    update={"rope_scaling": SCALED, "rope_theta": 500000.0, "tie_word_embeddings": False, "hidden_act": "relu2"}
)
BIASES = LLAMA.model_copy(
    update={"attention_bias": True, "attention_output_bias": True, "mlp_bias": True, "intermediate_size": 46}
)
OUTPUT = BitNetSpec(placement="output", gain="median", quantization_lambda=1.0)
INSIDE = OUTPUT.model_copy(update={"placement": "per_projection"})
BARE = OUTPUT.model_copy(update={"placement": "none"})

PROMPTS = [[5, 9, 200, 17, 3, 88], [42, 7]]
NEW_TOKENS = 8
PACKED = "llama bitnet packed"
LINES = ["some words and 1234 more", " leading blank, ünïcode ☃", "<|endoftext|>after", "line\nbreaks\t"]
TEMPLATE = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"


@dataclass(frozen=True)
class Case:
    architecture: Architecture
    spec: BitNetSpec | None
    weights: Weights
    class_name: str
    layout: LayoutName | None = None
    rest: torch.dtype = torch.float32
    linear_class: LinearClass = "bitlinear"
    tolerance: float = 1e-5
    """Of the relative distance of logits; stock classes round activations in another order, so a code may differ."""


CASES = {
    "llama bitnet f32": Case(LLAMA, OUTPUT, "f32", "BitNetForCausalLM", tolerance=1e-2),
    "llama bitnet bf16": Case(LLAMA, OUTPUT, "bf16", "BitNetForCausalLM", tolerance=2e-2),
    "llama bitnet packed": Case(LLAMA, OUTPUT, "packed", "BitNetForCausalLM", tolerance=1e-2),
    "llama bitnet packed, unpacked at loading": Case(
        LLAMA, OUTPUT, "packed", "BitNetForCausalLM", linear_class="autobitlinear", tolerance=1e-2
    ),
    "llama3 rope, untied, ReLU2, bitnet packed": Case(LLAMA3, OUTPUT, "packed", "BitNetForCausalLM", tolerance=1e-2),
    "qwen2 bitnet f32, o_proj without bias": Case(QWEN2, OUTPUT, "f32", "BitNetForCausalLM", tolerance=1e-2),
    "qwen2 bitnet packed": Case(QWEN2, OUTPUT, "packed", "BitNetForCausalLM", tolerance=1e-2),
    "qwen3 inside its own class": Case(QWEN3, INSIDE, "f32", "Qwen3ForCausalLM", tolerance=1e-2),
    "qwen3 inside its own class, packed": Case(QWEN3, INSIDE, "packed", "Qwen3ForCausalLM", tolerance=1e-2),
    "llama without norms": Case(LLAMA, BARE, "packed", "LlamaForCausalLM", tolerance=1e-2),
    "qwen2 full precision": Case(QWEN2, None, "f32", "Qwen2ForCausalLM"),
    "llama ours f32": Case(LLAMA, OUTPUT, "f32", "WrinkleFreeForCausalLM", layout="wrinklefree"),
    "qwen2 ours packed": Case(QWEN2, OUTPUT, "packed", "WrinkleFreeForCausalLM", layout="wrinklefree"),
    "qwen3 ours bf16": Case(QWEN3, OUTPUT, "bf16", "WrinkleFreeForCausalLM", tolerance=2e-2),
    "qwen3 ours packed": Case(QWEN3, OUTPUT, "packed", "WrinkleFreeForCausalLM"),
    "qwen3 inside ours": Case(QWEN3, INSIDE, "packed", "WrinkleFreeForCausalLM", layout="wrinklefree"),
    "llama3 rope, ReLU2, ours": Case(LLAMA3, OUTPUT, "packed", "WrinkleFreeForCausalLM", layout="wrinklefree"),
    "all biases, odd rows, ours": Case(BIASES, OUTPUT, "packed", "WrinkleFreeForCausalLM"),
    "4-bit activations, ours": Case(
        LLAMA, OUTPUT.model_copy(update={"activation_bits": 4}), "packed", "WrinkleFreeForCausalLM"
    ),
    "no activation codes, ours": Case(
        LLAMA, BARE.model_copy(update={"activation_bits": None}), "f32", "WrinkleFreeForCausalLM"
    ),
}

RELOAD = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
jobs = torch.load(sys.argv[1])
results = {}
for name, folder in jobs["folders"].items():
    trust = AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "wrinklefree"
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=trust, dtype=torch.float32, output_loading_info=True
    )
    model.eval()
    with torch.no_grad():
        alone = [model(torch.tensor([prompt])).logits[0] for prompt in jobs["prompts"]]
    generated = model.generate(
        jobs["ids"], attention_mask=jobs["mask"], max_new_tokens=jobs["new"], do_sample=False, eos_token_id=None
    )
    config = model.generation_config
    results[name] = {
        "class": type(model).__name__,
        "problems": {key: sorted(map(str, value)) for key, value in info.items() if value},
        "logits": alone,
        "generated": generated[:, jobs["ids"].shape[1] :].tolist(),
        "ends": (config.bos_token_id, config.eos_token_id, config.pad_token_id),
        "tied": model.get_output_embeddings().weight.data_ptr() == model.get_input_embeddings().weight.data_ptr(),
    }
from safetensors.torch import load_file
from transformers.integrations.bitnet import unpack_weights
packed = load_file(jobs["folders"][jobs["packed"]] + "/model.safetensors")
results["unpacked"] = {
    name: unpack_weights(value, torch.int8) for name, value in packed.items() if value.dtype == torch.uint8
}
tokenizer = AutoTokenizer.from_pretrained(next(iter(jobs["folders"].values())))
results["tokenizer"] = {
    "ids": [tokenizer(line)["input_ids"] for line in jobs["lines"]],
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False),
    "padding_side": tokenizer.padding_side,
    "special": (tokenizer.eos_token, tokenizer.pad_token),
    "length": tokenizer.model_max_length,
}
torch.save(results, sys.argv[2])
"""


@dataclass(frozen=True)
class Reloaded:
    artifacts: dict[str, Artifact]
    exports: dict[str, Export]
    results: dict[str, Any]


def make_artifact(folder: Path, architecture: Architecture, spec: BitNetSpec | None) -> Artifact:
    """A random model in which no norm is 1 and no bias 0, so that none can be lost unnoticed."""
    torch.manual_seed(7)
    model = CausalLM(architecture, spec)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.normal_()
    special = SpecialTokens(eos="<|endoftext|>", chat_template=TEMPLATE)
    plain = train_tokenizer(["some words and some more words of text"] * 3, 262)
    tokenizer = TextTokenizer(plain._tokenizer, special)
    return write_artifact(folder, model, tokenizer, {"stage": "stage3", "tokens": 12})


def load_ours(artifact: Artifact, rest: torch.dtype) -> CausalLM:
    """Our model, with what is not ternary rounded to the export's type."""
    model = artifact.load_model().eval()
    tensors = (
        (name, parameter.detach() if name.endswith("_proj.weight") else parameter.detach().to(rest))
        for name, parameter in model.named_parameters()
    )
    return assemble(artifact.architecture, artifact.bitnet, tensors, source="the artifact").eval()


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory: pytest.TempPathFactory) -> Reloaded:
    """Every case exported, and loaded in one fresh process that knows nothing of wrinklefree."""
    root = tmp_path_factory.mktemp("exports")
    artifacts: dict[str, Artifact] = {}
    exports: dict[str, Export] = {}
    for number, (name, case) in enumerate(CASES.items()):
        artifacts[name] = make_artifact(root / f"artifact{number}", case.architecture, case.spec)
        exports[name] = export_hf(
            artifacts[name].folder, root / f"export{number}",
            layout=case.layout or "auto", weights=case.weights, rest=case.rest, linear_class=case.linear_class,
        )  # fmt: skip
    # The stock layers are compiled at their first call, which takes half a minute and changes nothing here.
    return Reloaded(artifacts, exports, reload(root, exports, {"TORCHDYNAMO_DISABLE": "1"}))


def reload(root: Path, exports: dict[str, Export], variables: dict[str, str]) -> dict[str, Any]:
    """What a fresh process makes of exports."""
    batch = left_pad(PROMPTS, torch.device("cpu"))
    jobs = {
        "folders": {name: str(export.folder) for name, export in exports.items()},
        "prompts": PROMPTS, "lines": LINES, "new": NEW_TOKENS, "packed": PACKED,
        "ids": batch.input_ids, "mask": (batch.document_ids != 0).long(),
    }  # fmt: skip
    torch.save(jobs, root / "jobs.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), **variables}
    outcome = subprocess.run(
        [sys.executable, "-c", RELOAD, str(root / "jobs.pt"), str(root / "results.pt")],
        env=environment, cwd=root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert outcome.returncode == 0, outcome.stderr[-3000:]
    return torch.load(root / "results.pt")


@torch.inference_mode()
def logits_alone(model: CausalLM, prompt: list[int]) -> Tensor:
    return model(left_pad([prompt], torch.device("cpu"))).logits()[0]


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_same(reloaded: Reloaded, name: str) -> None:
    case, result = CASES[name], reloaded.results[name]
    model = load_ours(reloaded.artifacts[name], case.rest)
    assert result["class"] == case.class_name
    assert result["problems"] == {}
    assert result["tied"] == case.architecture.tie_word_embeddings
    for prompt, theirs in zip(PROMPTS, result["logits"], strict=True):
        ours = logits_alone(model, prompt)
        assert float((theirs - ours).norm() / ours.norm()) <= case.tolerance
    ours = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, eos_token_id=None)
    assert result["generated"] == ours


@pytest.mark.slow
def test_compiled_layers_compute_the_same(reloaded: Reloaded, tmp_path: Path) -> None:
    names = ("llama bitnet f32", PACKED)
    results = reload(tmp_path, {name: reloaded.exports[name] for name in names}, {})
    for name in names:
        for compiled, plain in zip(results[name]["logits"], reloaded.results[name]["logits"], strict=True):
            assert float((compiled - plain).norm() / plain.norm()) <= 1e-2
        assert results[name]["generated"] == reloaded.results[name]["generated"]


def test_the_tokenizer_travels(reloaded: Reloaded) -> None:
    export = next(iter(reloaded.exports.values()))
    ours = TextTokenizer.from_folder(export.folder)
    theirs = reloaded.results["tokenizer"]
    assert theirs["ids"] == [ours.encode(line) for line in LINES]
    assert theirs["chat"] == "[user] hi\n"
    assert ours.chat_template == TEMPLATE
    assert theirs["padding_side"] == "left"
    assert theirs["special"] == ("<|endoftext|>", "<|endoftext|>")
    assert theirs["length"] == LLAMA.max_position_embeddings
    assert reloaded.results["llama bitnet bf16"]["ends"] == (None, ours.eos_token_id, ours.pad_token_id)


def test_transformers_unpacks_our_codes(reloaded: Reloaded) -> None:
    masters, unpacked = reloaded.artifacts[PACKED].load_model().state_dict(), reloaded.results["unpacked"]
    assert len(unpacked) == 7 * LLAMA.num_hidden_layers
    assert all(torch.equal(codes, ternarize(masters[name]).codes) for name, codes in unpacked.items())


@pytest.mark.parametrize(
    ("name", "multiplies"),
    [("llama bitnet packed, unpacked at loading", True), ("qwen3 ours packed", True), ("qwen2 bitnet packed", False)],
)
def test_the_scale_is_what_the_class_expects(reloaded: Reloaded, name: str, multiplies: bool) -> None:
    stored = load_file(reloaded.exports[name].folder / "model.safetensors")
    masters = reloaded.artifacts[name].load_model().state_dict()
    key = "model.layers.1.mlp.down_proj.weight"
    scale = ternarize(masters[key]).scale.reshape(1)
    expected = scale if multiplies else 1.0 / scale
    assert torch.equal(stored[key.replace(".weight", ".weight_scale")], expected)


def test_sizes_are_those_of_the_format(reloaded: Reloaded) -> None:
    per_block = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3
    packed = reloaded.exports["llama bitnet packed"]
    assert packed.linear_bytes == 2 * (per_block // 4 + 7 * 4)
    assert packed.total_bytes == packed.linear_bytes + 4 * (270 * 32 + 32 + 2 * (32 + 32 + 32 + 48))
    assert reloaded.exports["llama bitnet bf16"].linear_bytes == 2 * per_block * 2
    assert packed.scale_change == 0.0
    assert 0.0 < reloaded.exports["llama bitnet bf16"].scale_change < 1e-3


def test_the_folder_holds_what_it_needs_and_nothing_else(reloaded: Reloaded) -> None:
    common = {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json",
        "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    stock, ours = reloaded.exports["llama bitnet bf16"].folder, reloaded.exports["qwen3 ours bf16"].folder
    assert {path.name for path in stock.iterdir()} == common
    code = {"configuration_wrinklefree.py", "modeling_wrinklefree.py"}
    assert {path.name for path in ours.iterdir()} == common | code
    manifest = verify_manifest(ours)
    assert (manifest["kind"], manifest["source"]) == ("hf_export", reloaded.artifacts["qwen3 ours bf16"].fingerprint)
    assert "trust_remote_code=True" in (ours / "README.md").read_text()
    assert "trust_remote_code" not in (stock / "README.md").read_text()
    with safe_open(stock / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_large_models_are_split_with_an_index(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", QWEN3, OUTPUT)
    export = export_hf(artifact.folder, tmp_path / "out", weights="packed", shard_bytes=20_000)
    index = json.loads((export.folder / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    assert len(files) > 2
    found = {name: file for file in files for name in load_file(export.folder / file)}
    assert found == index["weight_map"]
    assert index["metadata"]["total_size"] == export.total_bytes
    whole = export_hf(artifact.folder, tmp_path / "whole", weights="packed")
    stored = load_file(whole.folder / "model.safetensors")
    assert all(torch.equal(load_file(export.folder / file)[name], stored[name]) for name, file in found.items())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (OUTPUT.model_copy(update={"quantization_lambda": 0.5}), "lambda 0.5 and SubLN strength 1"),
        (OUTPUT.model_copy(update={"subln_strength": 0.25}), "lambda 1 and SubLN strength 0.25"),
    ],
)
def test_a_model_in_a_warm_up_is_refused(tmp_path: Path, spec: BitNetSpec, message: str) -> None:
    artifact = make_artifact(tmp_path / "artifact", LLAMA, spec)
    with pytest.raises(CheckpointError, match=f"{message}, and an export needs 1 and 1: train it on"):
        export_hf(artifact.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_precision_has_no_warm_up() -> None:
    refuse_unfinished(None, source="x")
    refuse_unfinished(OUTPUT, source="x")


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    artifact = make_artifact(tmp_path / "artifact", LLAMA, OUTPUT)
    out = tmp_path / "deep" / "out"
    export_hf(artifact.folder, out, weights="packed")
    export_hf(artifact.folder, out, weights="f32")
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    with pytest.raises(ConfigError, match="lies inside the checkpoint"):
        export_hf(artifact.folder, artifact.folder / "hf")
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds other files \(notes.txt"):
        export_hf(artifact.folder, out)
    with pytest.raises(ConfigError, match="holds other files"):
        export_hf(artifact.folder, artifact.folder)
    assert read_artifact(artifact.folder).fingerprint == artifact.fingerprint
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="is a file or a link"):
        export_hf(artifact.folder, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert export_hf(artifact.folder, tmp_path / "empty").folder == tmp_path / "empty"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = make_artifact(tmp_path / "artifact", LLAMA, OUTPUT)

    def garble(packed: Tensor, rows: int) -> Tensor:
        return torch.zeros(rows, packed.shape[1], dtype=torch.int8)

    monkeypatch.setattr("wrinklefree.serving.hf_export.unpack_row_blocks", garble)
    with pytest.raises(CheckpointError, match="of 1024 codes differ from the artifact's"):
        export_hf(artifact.folder, tmp_path / "out", weights="packed")
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = CausalLM(LLAMA, OUTPUT)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    tokenizer = train_tokenizer(["some words and some more words of text"] * 3, 262)
    artifact = write_artifact(tmp_path / "artifact", model, tokenizer, {})
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight holds values that are not finite"):
        export_hf(artifact.folder, tmp_path / "out", weights="packed")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = make_artifact(tmp_path / "artifact", LLAMA, OUTPUT)
    arguments = ["--input", str(artifact.folder), "--output", str(tmp_path / "out"), "--weights", "packed"]
    assert export_main([*arguments, "--embedding-type", "f32", "--linear-class", "autobitlinear"]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["linear_class"] == "autobitlinear"
    assert export_main([*arguments, "--format", "plain"]) == 2
    assert capsys.readouterr().err == (
        "error: --format plain cannot hold this model: LlamaForCausalLM has no norm before o_proj and down_proj; "
        "take --format bitnet\n"
    )
    assert export_main(["--input", str(tmp_path / "absent"), "--output", str(tmp_path / "out")]) == 78
