"""Compiled blocks: one graph for all blocks, all batches and both warm-ups; values and gradients of the plain blocks."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch, Wants
from wrinklefree.models.subln import set_subln_strength

pytestmark = [
    # Dynamo itself asks a block's input, which is no leaf, for its gradient.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # PyTorch's own compiler uses what PyTorch's own schedule removes.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

LENGTH = 32
ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def clean_compiler() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(*, strength: float = 1.0) -> CausalLM:
    torch.manual_seed(0)
    spec = BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0, subln_strength=strength)
    return CausalLM(ARCHITECTURE, spec).train()


def make_batch(*documents: int, rows: int = 2) -> Batch:
    """Rows of documents that are so long; what is left is padding."""
    ids = torch.randint(0, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(sum(documents)))
    document_ids, positions = torch.zeros(rows, LENGTH, dtype=torch.int64), torch.arange(LENGTH).repeat(rows, 1)
    start = 0
    for number, length in enumerate(documents, 1):
        document_ids[:, start : start + length] = number
        positions[:, start : start + length] = torch.arange(length)
        start += length
    return Batch(ids, ids.roll(-1, 1), positions, document_ids)


def counted(model: CausalLM, backend: str = "aot_eager", rows: int = 2) -> CompileCounterWithBackend:
    """Compile the blocks; the counter says how many graphs were made."""
    counter: Any = CompileCounterWithBackend(backend)
    model.compile_blocks(rows, LENGTH, gradients=True, compiler=counter)
    return counter


def gradients(model: CausalLM, batch: Batch) -> list[torch.Tensor]:
    """The final hidden states, and all gradients of a sum of them and of one block's states."""
    model.zero_grad()
    output = model(batch, Wants(qkv_layer=1))
    assert output.qkv is not None
    slope = torch.linspace(-1, 1, output.hidden.numel()).view_as(output.hidden)
    ((output.hidden * slope).sum() + output.qkv.value.square().sum()).backward()
    return [output.hidden.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_equal(mine: list[torch.Tensor], theirs: list[torch.Tensor], tolerance: float = 2e-5) -> None:
    """Up to roundings of the largest value of all."""
    largest = max(float(value.abs().max()) for value in theirs)
    for left, right in zip(mine, theirs, strict=True):
        torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance * largest)


def test_one_graph_serves_all_blocks_and_every_way_of_packing() -> None:
    model, plain = make_model(), make_model()
    counter = counted(model)
    for documents in ((LENGTH,), (10, 22), (3, 4, 5, 6), (30,), (1, 1, 1)):
        assert_equal(gradients(model, make_batch(*documents)), gradients(plain, make_batch(*documents)))
    assert counter.frame_count == 1


def test_two_graphs_serve_a_warm_up_of_lambda_and_what_follows() -> None:
    model, plain = make_model(), make_model()
    counter = counted(model)
    for step in range(1, 9):
        for one in (model, plain):
            set_quantization(one, min(1.0, step / 5))
        batch = make_batch(step, LENGTH - step)
        assert_equal(gradients(model, batch), gradients(plain, batch))
    assert counter.frame_count == 2


def test_both_warm_ups_together_make_one_more_graph_for_the_first_step() -> None:
    model, plain = make_model(strength=0.0), make_model(strength=0.0)
    counter = counted(model)
    for step in range(6):
        for one in (model, plain):
            set_quantization(one, min(1.0, step / 4))
            set_subln_strength(one, min(1.0, step / 4))
        assert_equal(gradients(model, make_batch(9, 9)), gradients(plain, make_batch(9, 9)))
    assert counter.frame_count == 3


def test_codes_inside_a_graph_follow_the_weight() -> None:
    model, plain = make_model(), make_model()
    counter = counted(model)
    batch = make_batch(20)
    optimizers = [torch.optim.SGD(one.parameters(), lr=1e-4) for one in (model, plain)]
    for _ in range(3):
        for one, optimizer in zip((model, plain), optimizers, strict=True):
            gradients(one, batch)
            optimizer.step()
    assert not torch.equal(model.blocks[2].mlp.up_proj.weight, make_model().blocks[2].mlp.up_proj.weight)
    assert_equal(gradients(model, batch), gradients(plain, batch))
    with torch.no_grad():
        for one in (model, plain):
            layer = one.blocks[0].mlp.up_proj
            layer.weight.copy_(layer.weight.flip(0))
    assert_equal(gradients(model, batch), gradients(plain, batch))
    assert counter.frame_count == 1


def test_a_graph_rounds_no_weight_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    ternary = BitLinear.ternary

    def count(layer: BitLinear) -> Any:
        nonlocal calls
        calls += 1
        return ternary(layer)

    monkeypatch.setattr(BitLinear, "ternary", count)
    model = make_model()
    counted(model)
    set_quantization(model, 1.0)
    for _ in range(4):  # micro-batches of one step
        gradients(model, make_batch(12, 12))
    assert calls == 7 * 3


def test_other_shapes_and_evaluation_run_uncompiled() -> None:
    model, plain = make_model(), make_model()
    counter = counted(model)
    other = make_batch(8, rows=3)
    assert_equal(gradients(model, other), gradients(plain, other), 0)
    with torch.no_grad():
        assert torch.equal(model(make_batch(8)).hidden, plain(make_batch(8)).hidden)
    assert counter.frame_count == 0
    gradients(model.eval(), make_batch(8))
    assert counter.frame_count == 0
    model.train()
    with model.uncompiled():
        gradients(model, make_batch(8))
    assert counter.frame_count == 0
    model.forget_compiled()
    gradients(model, make_batch(8))
    assert counter.frame_count == 0


def test_checkpointed_blocks_compile_too() -> None:
    model, plain = make_model(), make_model()
    model.activation_checkpointing = "full"
    counter = counted(model)
    assert_equal(gradients(model, make_batch(8, 9)), gradients(plain, make_batch(8, 9)))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_the_real_compiler_makes_the_same_values_in_bfloat16_and_float32() -> None:
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        model, plain = make_model(), make_model()
        model.compile_blocks(2, LENGTH, gradients=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            mine, theirs = gradients(model, make_batch(5, 20)), gradients(plain, make_batch(5, 20))
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(mine, theirs, strict=True)]
        assert max(errors) < tolerance
