"""The engine's scores of text and label words are PyTorch's, and its table has the same items in every row."""

from pathlib import Path

import pytest
import torch

import wrinklefree
from benchmark.engine_tasks import engine_scores, main
from wrinklefree.models.artifact import read_artifact, write_artifact
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.convert import to_bitnet
from wrinklefree.models.llama import CausalLM
from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions, PackedModel
from wrinklefree.training.device import Compute
from wrinklefree.training.evaluation import choice_scores
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def model() -> CausalLM:
    """The shipped tiny model, rounded."""
    rounded = to_bitnet(
        read_artifact(TINY).load_model(),
        placement="output",
        gain="ones",
        activation_bits=8,
        strength=1.0,
        calibration=[],
    )
    set_quantization(rounded, 1.0)
    return rounded.eval()


def test_choices_of_one_and_of_several_tokens(model: CausalLM) -> None:
    encoded = [([1, 2, 3, 4], [[5], [6], [7]]), ([8, 9], [[10, 11, 12], [13, 14]])]
    native = NativeModel(PackedModel.from_model(model, "f32"), NativeOptions(32, cache="f32"))
    expected = choice_scores(
        model, [prompt for prompt, _ in encoded], [words for _, words in encoded], pad_token_id=0,
        compute=Compute(torch.device("cpu"), torch.float32),
    )  # fmt: skip
    for found, row in zip(engine_scores(native, encoded), expected, strict=True):
        assert found == pytest.approx(row, rel=2e-2)


def test_every_runtime_scores_the_same_items_alike(
    model: CausalLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "artifact"
    write_artifact(folder, model, TextTokenizer.from_folder(TINY), {})
    text = "data.sources=[{kind: packaged, name: python_docs}]"
    assert main([str(folder), text, "--task", "recall", "--every", "10", "--tokens", "2000"]) == 0
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    runtimes, tokens, bits, _, examples, _, _, same = zip(*rows, strict=True)
    assert len(runtimes) == 5
    assert len(set(tokens)) == 1
    assert len(set(examples)) == 1
    assert [float(value) for value in bits] == pytest.approx([float(bits[0])] * 5, rel=5e-3)
    assert int(same[0]) == int(examples[0])
    assert min(map(int, same)) >= 0.9 * int(examples[0])
