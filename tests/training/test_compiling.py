"""When blocks are compiled, what is refused, and the check that stands before a compiled run."""

import shutil
from typing import Any

import pytest
import torch

from wrinklefree.models.bitlinear import quantization_of, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.training import compiling
from wrinklefree.training.compiling import WORTH_COMPILING, choose_compile, compile_model, compiled_error
from wrinklefree.training.device import Compute
from wrinklefree.utils.errors import ConfigError

pytestmark = [
    # Dynamo itself asks a block's input, which is no leaf, for its gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # PyTorch's own compiler uses what PyTorch's own schedule removes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BFLOAT16 = Compute(torch.device("cpu"), torch.bfloat16)
FLOAT32 = Compute(torch.device("cpu"), torch.float32)


def make_model(**changes: Any) -> CausalLM:
    torch.manual_seed(0)
    architecture = Architecture(
        family="llama",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
    )
    return CausalLM(architecture, BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0, **changes))


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that can compile, whatever this one is."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(compiling.Path, "exists", lambda path: True)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("wanted", "compute", "flops", "compiles", "reason"),
    [
        ("auto", BFLOAT16, WORTH_COMPILING, True, "pays"),
        ("auto", BFLOAT16, WORTH_COMPILING * 0.99, False, "short"),
        ("auto", FLOAT32, 1e20, False, "float32"),
        (True, FLOAT32, 1.0, True, "true"),
        (False, BFLOAT16, 1e20, False, "false"),
        ("auto", Compute(torch.device("cuda"), torch.bfloat16), 1e20, False, ""),
    ],
)
def test_the_choice(wanted: Any, compute: Compute, flops: float, compiles: bool, reason: str) -> None:
    choice = choose_compile(wanted, model=make_model(), compute=compute, sharded=False, flops=flops)
    assert choice.compiles == compiles
    assert reason in choice.reason


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("change", "sharded", "text"),
    [
        ({}, True, "distributed=fsdp_*"),
        ({"activation_checkpointing": "selective"}, False, "activation_checkpointing=selective"),
        ({"attention_backend": "flex"}, False, "packing.attention=flex"),
    ],
)
def test_what_cannot_be_compiled_is_refused_if_asked_for(change: dict[str, Any], sharded: bool, text: str) -> None:
    model = make_model()
    for name, value in change.items():
        setattr(model, name, value)
    with pytest.raises(ConfigError, match=r"training\.compile=true does not work here") as error:
        choose_compile(True, model=model, compute=BFLOAT16, sharded=sharded, flops=1e20)
    assert text in str(error.value)
    choice = choose_compile("auto", model=model, compute=BFLOAT16, sharded=sharded, flops=1e20)
    assert not choice.compiles
    assert text in choice.reason


@pytest.mark.usefixtures("compiler")
def test_options_that_read_lambda_as_a_number_are_not_compiled() -> None:
    with pytest.raises(ConfigError, match="weight_scale"):
        choose_compile(True, model=make_model(dead_zone_bias=0.1), compute=BFLOAT16, sharded=False, flops=1.0)


def test_without_a_compiler_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    choice = choose_compile("auto", model=make_model(), compute=BFLOAT16, sharded=False, flops=1e20)
    assert not choice.compiles
    assert "no C++ compiler" in choice.reason


def use_backend(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    """Let `compile_blocks` take another compiler than the slow real one."""
    torch._dynamo.reset()
    compile_blocks = CausalLM.compile_blocks

    def compile_with(model: CausalLM, rows: int, length: int, *, gradients: bool) -> None:
        compile_blocks(model, rows, length, gradients=gradients, compiler=backend)

    monkeypatch.setattr(CausalLM, "compile_blocks", compile_with)


@pytest.mark.parametrize("gradients", [True, False])
def test_a_right_compiler_passes_the_check(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    use_backend(monkeypatch, "aot_eager")
    model = make_model()
    set_quantization(model, 0.25)
    assert compile_model(model, FLOAT32, 2, 24, gradients=gradients, warms_up=True) is None
    assert quantization_of(model) == 0.25
    assert all(parameter.grad is None for parameter in model.parameters())
    assert compiled_error(model, FLOAT32, 2, 24, gradients=gradients) < 1e-4
    torch._dynamo.reset()


def test_a_wrong_compiler_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def run(*values: Any) -> Any:
            return tuple(value * 1.5 if torch.is_tensor(value) else value for value in graph(*values))

        return run

    use_backend(monkeypatch, wrong)
    model = make_model()
    problem = compile_model(model, FLOAT32, 2, 24, gradients=True)
    assert problem is not None
    assert "differ from the plain block" in problem
    assert compiled_error(model, FLOAT32, 2, 24) == 0.0  # left uncompiled
    torch._dynamo.reset()


def test_a_compiler_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no such instruction")

    use_backend(monkeypatch, broken)
    problem = compile_model(make_model(), FLOAT32, 2, 24, gradients=True)
    assert problem is not None
    assert "no such instruction" in problem
    torch._dynamo.reset()
