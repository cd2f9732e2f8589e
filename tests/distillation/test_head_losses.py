import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from wrinklefree.distillation.head_losses import CHUNK_BYTES, SoftTargets, head_losses, rows_a_chunk, select_rows
from wrinklefree.distillation.logits_loss import logits_kl
from wrinklefree.models.records import IGNORE

ROWS, HIDDEN, TEACHER_HIDDEN, VOCABULARY = 23, 12, 20, 41


def inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, HIDDEN, generator=generator).requires_grad_()
    head = torch.randn(VOCABULARY, HIDDEN, generator=generator).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (ROWS,), generator=generator)
    labels[::3] = IGNORE
    teacher_hidden = torch.randn(ROWS, TEACHER_HIDDEN, generator=generator)
    teacher_head = torch.randn(VOCABULARY, TEACHER_HIDDEN, generator=generator)
    soft_rows = torch.rand(ROWS, generator=generator) < 0.7
    return hidden, head, labels, teacher_hidden, teacher_head, soft_rows


def dense(
    hidden: Tensor, head: Tensor, labels: Tensor, teacher_logits: Tensor, soft_rows: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = hidden @ head.T
    cross_entropy = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")
    divergence = F.kl_div(
        F.log_softmax(logits[soft_rows] / temperature, -1),
        F.log_softmax(teacher_logits[soft_rows] / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    return cross_entropy, divergence


@pytest.mark.parametrize("chunk_rows", [1, 7, 23, 64])
@pytest.mark.parametrize(("temperature", "t_squared"), [(1.0, False), (5.0, False), (5.0, True)])
def test_chunks_equal_dense_values_and_gradients(chunk_rows: int, temperature: float, t_squared: bool) -> None:
    hidden, head, labels, teacher_hidden, teacher_head, soft_rows = inputs()
    cross_entropy, divergence = dense(hidden, head, labels, teacher_hidden @ teacher_head.T, soft_rows, temperature)
    divergence = divergence * (25.0 if t_squared else 1.0)
    expected = torch.autograd.grad(3.0 * (0.5 * cross_entropy + 2.0 * divergence), [hidden, head])

    soft = SoftTargets(teacher_hidden, teacher_head, soft_rows, temperature, t_squared)
    losses = head_losses(
        hidden, head, labels, soft=soft, cross_entropy_factor=0.5, divergence_factor=2.0, chunk_rows=chunk_rows
    )
    got = torch.autograd.grad(3.0 * losses.total, [hidden, head])

    torch.testing.assert_close(losses.cross_entropy, cross_entropy, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(losses.divergence, divergence, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).abs().max() / theirs.abs().max() < 1e-6


def test_no_gradient_is_made_without_need() -> None:
    hidden, head, labels, *_ = inputs()
    frozen = head_losses(hidden, head.detach(), labels, cross_entropy_factor=1.0)
    frozen.total.backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not head_losses(hidden, head, labels, cross_entropy_factor=1.0).total.requires_grad


def test_a_second_backward_is_refused() -> None:
    hidden, head, labels, *_ = inputs()
    total = head_losses(hidden, head, labels, cross_entropy_factor=1.0).total
    total.backward(retain_graph=True)
    with pytest.raises(TypeError):
        total.backward()


class LargestTensor(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_no_tensor_is_larger_than_one_block_of_logits() -> None:
    rows, hidden_size, vocabulary, chunk = 512, 8, 256, 32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, hidden_size, generator=generator).requires_grad_()
    head = torch.randn(vocabulary, hidden_size, generator=generator).requires_grad_()
    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    soft = SoftTargets(hidden.detach(), head.detach(), torch.ones(rows, dtype=torch.bool), 2.0, t_squared=False)
    with LargestTensor() as largest:
        losses = head_losses(
            hidden, head, labels, soft=soft, cross_entropy_factor=1.0, divergence_factor=1.0, chunk_rows=chunk
        )
        losses.total.backward()
    assert largest.elements == chunk * vocabulary


def test_bfloat16_products_keep_float32_softmax() -> None:
    hidden, head, labels, teacher_hidden, teacher_head, soft_rows = inputs()
    soft = SoftTargets(teacher_hidden, teacher_head, soft_rows, 5.0, t_squared=False)
    with torch.autocast("cpu", torch.bfloat16):
        losses = head_losses(hidden, head, labels, soft=soft, cross_entropy_factor=1.0, divergence_factor=1.0)
    rounded = (hidden.bfloat16() @ head.bfloat16().T).float()
    rounded_teacher = (teacher_hidden.bfloat16() @ teacher_head.bfloat16().T).float()
    expected = F.cross_entropy(rounded, labels, ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(losses.cross_entropy, expected, rtol=1e-6, atol=1e-5)
    expected = logits_kl(rounded, rounded_teacher, temperature=5.0)[soft_rows].sum()
    torch.testing.assert_close(losses.divergence, expected, rtol=1e-5, atol=1e-5)

    losses.total.backward()
    exact = torch.autograd.grad(
        sum(dense(hidden, head, labels, teacher_hidden @ teacher_head.T, soft_rows, 5.0)), [hidden, head]
    )
    assert hidden.grad is not None
    assert head.grad is not None
    assert head.grad.dtype == torch.float32
    for mine, theirs in zip([hidden.grad, head.grad], exact, strict=True):
        assert (mine - theirs).norm() / theirs.norm() < 0.02


def test_bfloat16_hidden_states_get_bfloat16_gradients() -> None:
    hidden, head, labels, *_ = inputs()
    low = hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        head_losses(low, head, labels, cross_entropy_factor=1.0).total.backward()
    assert low.grad is not None
    assert low.grad.dtype == torch.bfloat16


def test_no_rows_give_zero_and_zero_gradients() -> None:
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    head = torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    losses = head_losses(hidden, head, torch.zeros(0, dtype=torch.long), cross_entropy_factor=1.0)
    losses.total.backward()
    assert losses.total.item() == 0.0
    assert head.grad is not None
    assert head.grad.abs().max() == 0.0


def test_rows_are_picked_by_index_on_the_cpu_and_kept_where_counting_would_stall() -> None:
    mask = torch.tensor([True, False, True])
    picked = select_rows(mask, 2)
    assert picked is not None
    assert picked.tolist() == [0, 2]
    assert select_rows(mask.to("meta"), None) is None


def test_chunk_rows_follow_the_byte_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 64 * 2**20)
    assert rows_a_chunk("cpu", 49152) == 341
    assert rows_a_chunk("cuda", 151936) == 441
    assert rows_a_chunk("cpu", 10**9) == 16
