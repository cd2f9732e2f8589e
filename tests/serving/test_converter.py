"""Whole conversions: every type and shape, read back as the model it was, and run by llama.cpp where it can."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import wrinklefree
from wrinklefree.models.artifact import Artifact, read_artifact, write_artifact
from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec, Placement, RopeScaling
from wrinklefree.models.gguf_weights import load_gguf_model
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.serving import converter
from wrinklefree.serving.converter import WEIGHT_TYPES, ConversionOptions, convert
from wrinklefree.utils.errors import CheckpointError, ConfigError, EngineError
from wrinklefree.utils.gguf import read_gguf
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
TERNARY_TYPES = ("TQ2_0", "TQ1_0", "Q2_0", "Q4_0")
LLAMA = Architecture(
    family="llama",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
QWEN2 = LLAMA.model_copy(update={"family": "qwen2", "attention_bias": True, "rms_norm_eps": 1e-6, "rope_theta": 1e6})
QWEN3 = LLAMA.model_copy(
    update={"family": "qwen3", "qk_norm": True, "head_dim": 128, "rms_norm_eps": 1e-6, "rope_theta": 1e6}
)
RELU2 = LLAMA.model_copy(update={"hidden_act": "relu2"})
SMOLLM2_SHAPE = LLAMA.model_copy(
    update={
        "vocab_size": 4100,
        "hidden_size": 192,
        "intermediate_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
    }
)
"""SmolLM2-135M in small: blocks of 256 want 192 to grow to 256, 384 to 512, and one group of heads more."""
SCALED_ROPE = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.from_folder(TINY)


def random_model(architecture: Architecture, placement: Placement | None, *, seed: int = 0) -> CausalLM:
    """Weights, gains and biases that all matter; ternary unless there is no placement."""
    torch.manual_seed(seed)
    spec = None if placement is None else BitNetSpec(placement=placement, gain="ones", quantization_lambda=1.0)
    model = CausalLM(architecture, spec).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
            elif parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def artifact_of(tmp_path_factory: pytest.TempPathFactory, tokenizer: TextTokenizer) -> Callable[..., Artifact]:
    made: dict[Any, Artifact] = {}

    def make(
        architecture: Architecture, placement: Placement | None, change: Callable[[CausalLM], None] | None = None
    ) -> Artifact:
        key = (architecture.model_dump_json(), placement, change)
        if key not in made:
            model = random_model(architecture, placement)
            if change is not None:
                change(model)
            lineage = {"stage": "stage3", "base": {"name": "random"}, "tokens": 7}
            made[key] = write_artifact(tmp_path_factory.mktemp("model") / "artifact", model, tokenizer, lineage)
        return made[key]

    return make


def options(artifact: Artifact, tmp_path: Path, **changes: Any) -> ConversionOptions:
    return replace(ConversionOptions(artifact.folder, tmp_path / "model.gguf"), **changes)


@torch.no_grad()
def logits(model: CausalLM, ids: Tensor) -> Tensor:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return model(Batch(ids, torch.full_like(ids, IGNORE), positions, torch.ones_like(ids))).logits()


def some_ids(vocab_size: int = 4096) -> Tensor:
    return torch.randint(vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


def check_is_the_same_model(path: Path, artifact: Artifact, *, tolerance: float) -> CausalLM:
    loaded, tokenizer = load_gguf_model(path)
    model = artifact.load_model().eval()
    assert loaded.architecture == artifact.architecture
    assert loaded.bitnet == artifact.bitnet
    assert tokenizer.fingerprint == artifact.load_tokenizer().fingerprint
    for ours, theirs in zip(model.modules(), loaded.modules(), strict=True):
        if isinstance(ours, BitLinear):
            assert isinstance(theirs, BitLinear)
            codes, scale = ours.weight_codes(torch.float32)
            their_codes, their_scale = theirs.weight_codes(torch.float32)
            assert torch.equal(codes, their_codes)
            assert float(their_scale) == pytest.approx(float(scale), rel=2**-11 if tolerance > 1e-3 else 0)
    # Where scales or tables are rounded, an activation may round the other way now and then.
    difference = (logits(model, some_ids()) - logits(loaded.eval(), some_ids())).abs()
    assert float(difference.max()) < tolerance
    return loaded


SHAPES: list[Any] = [
    pytest.param(LLAMA, "output", "bitnet", id="llama-subln"),
    pytest.param(SMOLLM2_SHAPE, "output", "bitnet", id="smollm2-subln"),
    pytest.param(LLAMA, "none", "llama", id="llama"),
    pytest.param(QWEN2, "none", "qwen2", id="qwen2"),
    pytest.param(QWEN2, "output", "wrinklefree", id="qwen2-subln"),
    pytest.param(QWEN3, "none", "qwen3", id="qwen3"),
    pytest.param(QWEN3, "output", "wrinklefree", id="qwen3-subln"),
    pytest.param(QWEN3, "per_projection", "wrinklefree", id="qwen3-per-projection"),
    pytest.param(RELU2, "output", "wrinklefree", id="relu2"),
    pytest.param(RELU2, "none", "wrinklefree", id="relu2-plain"),
]


@pytest.mark.parametrize("weight_type", TERNARY_TYPES)
@pytest.mark.parametrize(("architecture", "placement", "name"), SHAPES)
def test_every_ternary_type_holds_every_shape_without_loss(
    architecture: Architecture,
    placement: Placement,
    name: str,
    weight_type: str,
    artifact_of: Callable[..., Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("wrinklefree.serving.verification.is_installed", lambda: False)
    artifact = artifact_of(architecture, placement)
    made = convert(options(artifact, tmp_path, weight_type=weight_type))
    assert made.row.name == name == read_gguf(made.path).text("general.architecture")
    assert made.verification is not None
    assert made.verification.ternary_tensors == 14
    assert made.verification.largest_scale_error <= 2**-11
    assert (made.verification.runtime, made.verification.runtime_skipped) == (
        None,
        "llama.cpp does not run wrinklefree files"
        if name == "wrinklefree"
        else "the package xllamacpp is not installed",
    )
    check_is_the_same_model(made.path, artifact, tolerance=1.0)


@pytest.mark.parametrize("cpu", ["x86", "arm"])
@pytest.mark.parametrize(
    ("architecture", "placement"),
    [(LLAMA, "output"), (SMOLLM2_SHAPE, "output"), (QWEN3, "output"), (QWEN3, "per_projection")],
)
def test_i2_s_files_keep_float32_scales_and_load_as_exactly_the_model(
    architecture: Architecture, placement: Placement, cpu: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of(architecture, placement)
    wanted = options(artifact, tmp_path, weight_type="I2_S", target="bitnet.cpp", cpu=cpu, embedding_type="F32")
    made = convert(wanted)
    assert read_gguf(made.path).text("wrinklefree.i2_s_layout") == cpu
    assert made.row.name == ("qwen3" if architecture is QWEN3 else "bitnet")
    padded = architecture is SMOLLM2_SHAPE and cpu == "x86"  # 192 is a multiple of 64, not of 128
    assert made.padding.is_none == (not padded)
    check_is_the_same_model(made.path, artifact, tolerance=1e-4)


@pytest.mark.parametrize(("architecture", "placement", "name"), SHAPES)
def test_float32_twins_load_as_the_model(
    architecture: Architecture, placement: Placement, name: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of(architecture, placement)
    made = convert(options(artifact, tmp_path, weight_type="F32", verify=False))
    # BitNet.cpp's qwen3 holds these in F32; for other types only I2_S is known to be read there.
    expected = "qwen3" if architecture is QWEN3 else name
    assert (made.row.name, made.table_type, made.verification) == (expected, "F32", None)
    check_is_the_same_model(made.path, artifact, tolerance=1e-4)


LLAMA_WITH_HEAD = LLAMA.model_copy(update={"tie_word_embeddings": False, "head_dim": 32, "rope_scaling": SCALED_ROPE})


@pytest.mark.parametrize(
    ("architecture", "placement", "name"),
    [
        pytest.param(LLAMA, "output", "bitnet", id="bitnet"),
        pytest.param(SMOLLM2_SHAPE, "output", "bitnet", id="bitnet-192"),
        pytest.param(LLAMA_WITH_HEAD, None, "llama", id="llama3"),
        pytest.param(QWEN2, "none", "qwen2", id="qwen2"),
        pytest.param(QWEN3, None, "qwen3", id="qwen3"),
    ],
)
def test_llama_cpp_computes_the_float32_twin_s_logits(
    architecture: Architecture, placement: Placement, name: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    artifact = artifact_of(architecture, placement)
    made = convert(options(artifact, tmp_path, weight_type="F32"))
    assert made.row.name == name
    assert made.verification is not None
    runtime = made.verification.runtime
    assert runtime is not None
    assert (runtime.positions, runtime.same_first_choice) == (3, 3)
    assert runtime.largest_difference < 1e-3


@pytest.mark.parametrize("weight_type", ["TQ2_0", "TQ1_0", "Q2_0", "Q4_0"])
def test_llama_cpp_runs_padded_and_unpadded_ternary_files(
    weight_type: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    artifact = artifact_of(SMOLLM2_SHAPE, "output")
    made = convert(options(artifact, tmp_path, weight_type=weight_type))
    assert made.padding.is_none == (weight_type in ("Q2_0", "Q4_0"))
    assert made.verification is not None
    assert made.verification.runtime is not None
    assert made.verification.runtime.divergence < 1e-3


def test_a_wrong_order_of_rows_is_found_by_running_the_file(
    artifact_of: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")
    artifact = artifact_of(LLAMA, "none")
    monkeypatch.setattr("wrinklefree.models.gguf_names.join_rotary_pairs", lambda values, heads: values)
    wanted = options(artifact, tmp_path, weight_type="F32")
    with pytest.raises(CheckpointError, match=r"gives other answers in llama\.cpp .* differ by up to"):
        convert(wanted)
    assert not wanted.output.exists()


def test_a_damaged_file_is_found_by_reading_it_back(
    artifact_of: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(LLAMA, "output")
    write = converter.write_gguf

    def write_and_damage(path: Path, metadata: Any, tensors: Any) -> None:
        write(path, metadata, tensors)
        info = read_gguf(path).tensors["blk.1.ffn_up.weight"]
        content = bytearray(path.read_bytes())
        content[info.offset] = 0xAA if content[info.offset] == 0x55 else 0x55  # four zeros or four ones
        path.write_bytes(content)

    monkeypatch.setattr(converter, "write_gguf", write_and_damage)
    wanted = options(artifact, tmp_path)
    with pytest.raises(CheckpointError, match=r"of blk\.1\.ffn_up\.weight differ from the checkpoint's"):
        convert(wanted)
    assert not wanted.output.exists()


def test_metadata_says_what_the_model_is_and_where_it_comes_from(
    artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of(SMOLLM2_SHAPE, "output")
    made = convert(options(artifact, tmp_path, verify=False))
    file = read_gguf(made.path)
    expected = {
        "general.name": "random stage3",
        "general.file_type": 37,
        "bitnet.embedding_length": 256,
        "bitnet.feed_forward_length": 512,
        "bitnet.attention.head_count": 9,
        "wrinklefree.unpadded.embedding_length": 192,
        "wrinklefree.unpadded.feed_forward_length": 384,
        "wrinklefree.activation_bits": 8,
        "wrinklefree.subln.placement": "output",
        "wrinklefree.hidden_act": "silu",
        "wrinklefree.family": "llama",
        "wrinklefree.source.fingerprint": artifact.fingerprint,
    }
    del expected["bitnet.attention.head_count"]
    assert {key: file.metadata[key] for key in expected} == expected
    assert file.integer("bitnet.attention.head_count") * 32 == file.integer("bitnet.embedding_length")
    assert json.loads(file.text("wrinklefree.source.lineage"))["tokens"] == 7
    assert file.number("bitnet.attention.layer_norm_rms_epsilon") == pytest.approx(1e-5 * 192 / 256)


def test_tables_may_have_a_type_of_their_own(artifact_of: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = artifact_of(LLAMA.model_copy(update={"tie_word_embeddings": False}), "output")
    made = convert(options(artifact, tmp_path, embedding_type="Q8_0"))
    types = {name: info.type for name, info in read_gguf(made.path).tensors.items()}
    assert (types["token_embd.weight"], types["output.weight"], types["blk.0.attn_norm.weight"]) == (
        "Q8_0",
        "Q8_0",
        "F32",
    )
    stored = read_gguf(made.path).tensor("token_embd.weight")
    table = artifact.load_model().model.embed_tokens.weight.detach().numpy()
    step = np.abs(table).reshape(-1, 32).max(1).repeat(32).reshape(table.shape) / 127
    assert (np.abs(stored - table) <= 0.51 * step + 127 * 2.0**-11 * step).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: set_quantization(model, 0.25), "quantization lambda 0.25 and SubLN strength 1, and"),
        (lambda model: set_subln_strength(model, 0.5), "quantization lambda 1 and SubLN strength 0.5, and"),
    ],
)
def test_unfinished_warm_ups_are_refused(
    change: Callable[[CausalLM], None], message: str, artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of(LLAMA, "output", change=change)
    with pytest.raises(CheckpointError, match=message):
        convert(options(artifact, tmp_path))


@pytest.mark.parametrize(
    ("architecture", "placement", "changes", "message"),
    [
        (
            LLAMA,
            None,
            {"weight_type": "TQ2_0"},
            "holds a full-precision model and TQ2_0 stores ternary weights; use --type F16",
        ),
        (
            QWEN3,
            "output",
            {"target": "llama.cpp"},
            r"llama.cpp does not run this model: it has norms on q and k, .* use --target bitnet.cpp or "
            "--target wrinklefree",
        ),
        (RELU2, "output", {"target": "llama.cpp"}, r"squared ReLU instead of SiLU.* use --target wrinklefree"),
        (LLAMA, "output", {"target": "llama.cpp", "weight_type": "I2_S"}, "does not read type I2_S in a bitnet file"),
        (
            SMOLLM2_SHAPE,
            "output",
            {"weight_type": "TQ2_0", "pad": "never"},
            "type TQ2_0 stores 256 weights a block and the model has rows of 192, 384; use --type Q2_0 or Q4_0, or --pad auto",
        ),
        (LLAMA, "output", {"weight_type": "Q5_K"}, "type 'Q5_K' is not one of TQ2_0"),
        (LLAMA, "output", {"embedding_type": "Q4_0"}, "embedding type 'Q4_0' is not one of F16"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(
    architecture: Architecture,
    placement: Placement | None,
    changes: dict[str, Any],
    message: str,
    artifact_of: Callable[..., Artifact],
    tmp_path: Path,
) -> None:
    wanted = options(artifact_of(architecture, placement), tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        convert(wanted)
    assert not wanted.output.exists()


def test_nan_in_a_weight_is_refused(artifact_of: Callable[..., Artifact], tmp_path: Path) -> None:
    def poison(model: CausalLM) -> None:
        with torch.no_grad():
            model.blocks[1].mlp.up_proj.weight[3, 4] = float("nan")

    wanted = options(artifact_of(LLAMA, "output", change=poison), tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN or infinity"):
        convert(wanted)
    assert list(tmp_path.glob("*.gguf*")) == []


def test_without_a_type_the_first_that_fits_is_taken(artifact_of: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = artifact_of(SMOLLM2_SHAPE, "output")
    assert convert(options(artifact, tmp_path, verify=False)).weight_type == "TQ2_0"
    assert convert(options(artifact, tmp_path, verify=False, pad="never")).weight_type == "Q2_0"
    assert convert(options(artifact, tmp_path, verify=False, target="bitnet.cpp")).weight_type == "I2_S"
    assert set(TERNARY_TYPES) | {"I2_S", "F16", "BF16", "F32"} == set(WEIGHT_TYPES)


def test_an_input_without_an_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist; pass an artifact"):
        convert(ConversionOptions(tmp_path / "absent", tmp_path / "model.gguf"))
    (tmp_path / "plain").mkdir()
    with pytest.raises(ConfigError, match="is a folder; --output names the file"):
        convert(ConversionOptions(tmp_path / "absent", tmp_path / "plain"))
    with pytest.raises(CheckpointError, match="is no artifact"):
        read_artifact(tmp_path / "plain")


def test_the_checkpoint_and_what_is_no_file_are_never_written_to(
    artifact_of: Callable[..., Artifact], tmp_path: Path
) -> None:
    artifact = artifact_of(LLAMA, "output")
    before = sorted(path.name for path in artifact.folder.iterdir())
    for name in ("model.safetensors", "model.gguf", "inner/model.gguf"):
        with pytest.raises(ConfigError, match="lies inside the checkpoint"):
            convert(options(artifact, tmp_path, output=artifact.folder / name))
    link = tmp_path / "link.gguf"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="is a link or a device"):
        convert(options(artifact, tmp_path, output=link))
    assert link.is_symlink()
    assert sorted(path.name for path in artifact.folder.iterdir()) == before


def test_a_file_that_fails_its_check_never_gets_its_name(
    artifact_of: Callable[..., Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = artifact_of(LLAMA, "output")
    older = convert(options(artifact, tmp_path)).path
    content = older.read_bytes()
    (tmp_path / f"{older.name}.tmp-0123").write_bytes(b"what a killed conversion left")

    def refuse(*_: object, **__: object) -> None:
        raise EngineError("llama.cpp refuses it")

    monkeypatch.setattr("wrinklefree.serving.converter.verify", refuse)
    with pytest.raises(EngineError):
        convert(options(artifact, tmp_path))
    assert older.read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == [older.name]
