"""The summary of a conversion, as the command prints it."""

from pathlib import Path

import pytest

import wrinklefree
from wrinklefree import cli
from wrinklefree.models.config import Architecture
from wrinklefree.models.padding import Padding, plan_padding
from wrinklefree.serving.conversion_report import describe
from wrinklefree.serving.converter import Conversion
from wrinklefree.serving.gguf_architectures import ARCHITECTURES
from wrinklefree.serving.verification import RuntimeComparison, Verification

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
SMOLLM2 = Architecture(
    family="llama",
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    max_position_embeddings=8192,
)


def conversion(padding: Padding, verification: Verification | None) -> Conversion:
    return Conversion(
        path=Path("my model.gguf"),
        row=ARCHITECTURES[0],
        weight_type="TQ2_0",
        table_type="F16",
        padding=padding,
        epsilon_changes=padding.epsilon_changes("output"),
        projection_bytes=30_000_000,
        projection_bytes_f16=240_000_000,
        file_bytes=86_000_000,
        file_bytes_f16=300_000_000,
        notes=["something to know"],
        verification=verification,
    )


def test_a_summary_says_what_was_written_and_checked() -> None:
    runtime = RuntimeComparison(3, 0.0513, 0.0123, 4e-5, 3, 1e-3)
    found = Verification(272, 210, 106168320, 2.9e-4, runtime, None)
    lines = describe(conversion(plan_padding(SMOLLM2, "output", 256, square=True), found)).splitlines()
    assert lines == [
        "wrote         my model.gguf, 86.0 MB",
        "architecture  bitnet, for llama.cpp",
        "types         projections TQ2_0, embedding and head F16, norms F32",
        "padding       hidden 576 to 768, FFN 1536 to 2048, heads 9 to 12, key-value heads 3 to 4; the function is exactly "
        "the same",
        "sizes         projections 30.0 MB (F16: 240.0 MB, 8.0x), file 86.0 MB (F16: 300.0 MB)",
        "verified      272 tensors read back; all 106168320 codes equal, scales within 2.9e-04; llama.cpp against this "
        "library: same tokens, log-probabilities within 0.051 (mean 0.01), KL 4e-05 nats, same likeliest token at 3 of 3 "
        "positions",
        "note          something to know",
        "serve         uv run python scripts/serve.py --model 'my model.gguf' --port 8080",
    ]


def test_an_epsilon_that_does_not_fit_is_announced_with_its_bound() -> None:
    odd = SMOLLM2.model_copy(update={"intermediate_size": 1500})
    padding = plan_padding(odd, "output", 256, square=True)
    assert padding.intermediate_size == 1536
    line = describe(conversion(padding, None)).splitlines()[3]
    # 1e-5 * (576 / 768) / (1500 / 1536); at a mean square of 0.01 half of the difference over it.
    assert "ffn_sub_norm works with epsilon 7.68e-06 instead of 1e-05" in line
    assert "at most 1.2e-04 of its size for inputs of RMS 0.1 or more, 14.1% for vanishing ones" in line


def test_no_verification_is_said() -> None:
    assert "verified      no (--no-verify)" in describe(conversion(Padding.none(SMOLLM2), None))


def test_the_command_converts_a_full_precision_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tiny.gguf"
    assert cli.convert_main(["--input", str(TINY), "--output", str(output), "--type", "F16", "--name", "mine"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"wrote         {output}, 8.5 MB\narchitecture  llama, for llama.cpp\n")
    assert "same likeliest token at 3 of 3 positions" in printed


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--input", str(TINY), "--output", str(tmp_path / "t.gguf"), "--type", "TQ2_0"]
    assert cli.convert_main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        f"error: {TINY} holds a full-precision model and TQ2_0 stores ternary weights; use --type F16"
    )
    assert error.count("\n") == 1
