"""Artifacts: what is written is what is read, or an error that names the file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wrinklefree.models.artifact import Artifact, read_artifact, write_artifact
from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import set_subln_strength, subln_strength_of
from wrinklefree.models.weights import assemble
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

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
SPEC = BitNetSpec(placement="output", gain="median", quantization_lambda=0.25, subln_strength=0.5)
LINEAGE = {"stage": "stage2", "tokens": 12, "parents": ["ab"]}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(["some words and some more words of text"] * 3, 262)


@pytest.fixture
def model() -> CausalLM:
    torch.manual_seed(0)
    return CausalLM(ARCHITECTURE, SPEC)


@pytest.fixture
def artifact(tmp_path: Path, model: CausalLM, tokenizer: TextTokenizer) -> Artifact:
    return write_artifact(tmp_path / "runs" / "0123abcd" / "artifact", model, tokenizer, LINEAGE)


def some_batch() -> Batch:
    ids = torch.arange(20).reshape(2, 10)
    return Batch(ids, ids, torch.arange(10).expand(2, 10), torch.ones_like(ids))


def test_logits_before_saving_equal_logits_after_loading(artifact: Artifact, model: CausalLM) -> None:
    loaded = read_artifact(artifact.folder).load_model()
    assert torch.equal(loaded(some_batch()).logits(), model(some_batch()).logits())
    assert loaded.bitnet == SPEC
    assert artifact.lineage == LINEAGE
    assert artifact.architecture == ARCHITECTURE


def test_the_folder_holds_what_the_contract_lists(artifact: Artifact, tokenizer: TextTokenizer) -> None:
    names = {path.name for path in artifact.folder.iterdir()}
    assert names == {
        "config.json", "lineage.json", "manifest.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    config = json.loads((artifact.folder / "config.json").read_text())
    assert Architecture.model_validate(config["architecture"]) == ARCHITECTURE
    assert BitNetSpec.model_validate(config["bitnet"]) == SPEC
    assert artifact.load_tokenizer().fingerprint == tokenizer.fingerprint
    tensors = load_file(artifact.folder / "model.safetensors")
    assert tensors["model.layers.1.self_attn.attn_sub_norm.weight"].dtype == torch.float32
    assert [path.name for path in artifact.folder.parent.iterdir()] == ["artifact"]


def test_warm_ups_are_recorded_as_they_are_now(tmp_path: Path, model: CausalLM, tokenizer: TextTokenizer) -> None:
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
    written = write_artifact(tmp_path / "a", model, tokenizer, LINEAGE)
    assert written.bitnet == SPEC.model_copy(update={"quantization_lambda": 1.0, "subln_strength": 1.0})
    loaded = written.load_model()
    assert (quantization_of(loaded), subln_strength_of(loaded)) == (1.0, 1.0)


def test_fingerprint_follows_weights_and_not_lineage(
    tmp_path: Path, artifact: Artifact, model: CausalLM, tokenizer: TextTokenizer
) -> None:
    assert write_artifact(tmp_path / "b", model, tokenizer, {"other": 1}).fingerprint == artifact.fingerprint
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    assert write_artifact(tmp_path / "c", model, tokenizer, LINEAGE).fingerprint != artifact.fingerprint


def test_writing_again_replaces_the_artifact(artifact: Artifact, model: CausalLM, tokenizer: TextTokenizer) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(2.0)
    write_artifact(artifact.folder, model, tokenizer, LINEAGE)
    loaded = read_artifact(artifact.folder).load_model()
    assert torch.equal(loaded.model.norm.weight, torch.full((16,), 2.0))
    assert [path.name for path in artifact.folder.parent.iterdir()] == ["artifact"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "lineage.json"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "delete"])
def test_damage_to_any_file_names_that_file(artifact: Artifact, name: str, damage: str) -> None:
    path = artifact.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "delete":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        read_artifact(artifact.folder)


def test_a_stage_folder_stands_for_its_newest_artifact(artifact: Artifact) -> None:
    stage = artifact.folder.parents[2]
    (stage / "stage2_checkpoint").symlink_to(artifact.folder)
    assert read_artifact(stage).fingerprint == artifact.fingerprint
    assert read_artifact(stage / "stage2_checkpoint").fingerprint == artifact.fingerprint
    (stage / "checkpoint").symlink_to(artifact.folder)
    with pytest.raises(CheckpointError, match="several pointers: stage2_checkpoint, checkpoint"):
        read_artifact(stage)


def test_folders_that_are_none_are_refused(tmp_path: Path, artifact: Artifact) -> None:
    with pytest.raises(CheckpointError, match="absent does not exist"):
        read_artifact(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"is no artifact \(no config\.json\)"):
        read_artifact(artifact.folder.parents[1])
    shutil.copytree(artifact.folder, tmp_path / "bare")
    (tmp_path / "bare" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        read_artifact(tmp_path / "bare")


def test_another_model_than_expected_names_every_field(artifact: Artifact) -> None:
    assert read_artifact(artifact.folder, expect_architecture=ARCHITECTURE, expect_bitnet=True).bitnet == SPEC
    other = ARCHITECTURE.model_copy(update={"hidden_size": 32, "qk_norm": False})
    with pytest.raises(CheckpointError) as caught:
        read_artifact(artifact.folder, expect_architecture=other)
    assert "hidden_size is 16, model.architecture says 32; qk_norm is True, model.architecture says False" in str(
        caught.value
    )
    with pytest.raises(CheckpointError, match="holds a ternary model, a full precision one is needed"):
        read_artifact(artifact.folder, expect_bitnet=False)


def test_assemble_accounts_for_every_tensor(model: CausalLM) -> None:
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)  # a constant that old checkpoints store
    assemble(ARCHITECTURE, SPEC, tensors.items(), source="x")
    del tensors["model.layers.0.self_attn.attn_sub_norm.weight"], tensors["lm_head.weight"]
    tensors["extra"] = torch.zeros(1)
    tensors["model.norm.weight"] = torch.zeros(15)
    with pytest.raises(CheckpointError) as caught:
        assemble(ARCHITECTURE, SPEC, tensors.items(), source="x")
    assert str(caught.value) == (
        "x does not fit the model: 2 missing (model.layers.0.self_attn.attn_sub_norm.weight, lm_head.weight); "
        "1 unexpected (extra); 1 of another shape (model.norm.weight is [15], expected [16]); the SubLN placements differ: "
        "run training=stage1_subln again, or pass the artifact that it wrote"
    )


def test_a_redundant_head_must_equal_the_embedding() -> None:
    tied = ARCHITECTURE.model_copy(update={"tie_word_embeddings": True})
    tensors = {name: value.detach() for name, value in CausalLM(tied).named_parameters()}
    head = tensors["model.embed_tokens.weight"].clone()
    assert assemble(tied, None, [("lm_head.weight", head), *tensors.items()], source="x").lm_head is None
    head[0, 0] += 1
    with pytest.raises(CheckpointError, match=r"lm_head\.weight that differs .*tie_word_embeddings=false"):
        assemble(tied, None, [("lm_head.weight", head), *tensors.items()], source="x")
