from typing import Self

import torch
from torch import Tensor, nn

from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.records import Batch, ModelOutput, Wants


class Bigram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(37, 16)
        self.norm = nn.RMSNorm(16)
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("offset", torch.ones(16))
        self.seen: list[Wants] = []

    def forward(self, batch: Batch, wants: Wants) -> ModelOutput:
        self.seen.append(wants)
        hidden = self.dropout(self.embedding(batch.input_ids)) + self.offset
        return ModelOutput(self.norm(hidden), self.embedding.weight, self.norm, {0: hidden @ torch.eye(16)})


def test_frozen_in_eval_mode_and_without_gradients(make) -> None:
    model = Bigram().train()
    teacher = Teacher(model)
    batch = make.batch([[12]], 12)
    model.train()
    first, second = teacher(batch, Wants((0,))), teacher(batch, Wants((0,)))
    torch.testing.assert_close(first.hidden, second.hidden, rtol=0, atol=0)
    assert not first.hidden.requires_grad
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.seen == [Wants((0,))] * 2


def test_a_student_cannot_adopt_its_parameters() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.teacher = Teacher(Bigram())

    assert list(Student().parameters()) == []


def test_runs_under_the_callers_autocast(make) -> None:
    teacher, batch = Teacher(Bigram()), make.batch([[12]], 12)
    assert teacher(batch, Wants((0,))).hidden_states[0].dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher(batch, Wants((0,))).hidden_states[0].dtype == torch.bfloat16


def test_the_logit_lens_differentiates_through_its_norm(make) -> None:
    teacher = Teacher(Bigram())
    output = teacher(make.batch([[12]], 12), Wants())
    state = torch.randn(1, 12, 16, requires_grad=True)
    (output.final_norm(state) @ output.head_weight.T).square().sum().backward()
    assert state.grad is not None
    assert state.grad.abs().max() > 0
    assert output.head_weight.grad is None


class Counting(Tensor):
    """A tensor that counts its moves, to see offloading on a machine with one device."""

    moves = 0

    def to(self, *args, **kwargs) -> Self:
        Counting.moves += 1
        return super().to(*args, **kwargs).clone()


def test_offload_loads_once_a_step_and_restores_the_same_memory(make) -> None:
    model = Bigram()
    kept = [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())]
    expected = Teacher(Bigram())
    expected.model.load_state_dict(model.state_dict())
    batch = make.batch([[12]], 12)
    wanted = expected(batch, Wants()).hidden

    teacher = Teacher(model, offload=True)
    teacher._rest = [(tensor, host.as_subclass(Counting)) for tensor, host in teacher._rest]
    Counting.moves = 0
    for _ in range(2):
        torch.testing.assert_close(teacher(batch, Wants()).hidden.as_subclass(Tensor), wanted, rtol=0, atol=0)
    assert Counting.moves == len(kept)
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] != kept
    teacher.release()
    assert [tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())] == kept
    teacher(batch, Wants())
    assert Counting.moves == 2 * len(kept)


class Deep(Bigram):
    """With a block, whose weights losses do not read."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(16, 16)])

    def forward(self, batch: Batch, wants: Wants) -> ModelOutput:
        output = super().forward(batch, wants)
        return ModelOutput(self.blocks[0](output.hidden), output.head_weight, self.norm, output.hidden_states)


def test_blocks_are_sent_for_each_forward_pass_and_the_rest_once_a_step(make) -> None:
    model, batch = Deep(), make.batch([[12]], 12)
    wanted = Teacher(Deep().eval())
    wanted.model.load_state_dict(model.state_dict())
    expected = wanted(batch, Wants()).hidden
    homes = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    teacher = Teacher(model, offload=True)
    for pairs in (teacher._blocks, teacher._rest):
        pairs[:] = [(tensor, host.as_subclass(Counting)) for tensor, host in pairs]
    Counting.moves = 0
    for _ in range(3):
        torch.testing.assert_close(teacher(batch, Wants()).hidden.as_subclass(Tensor), expected, rtol=0, atol=0)
        assert {name for name, tensor in model.state_dict().items() if tensor.data_ptr() == homes[name]} == {
            "blocks.0.weight",
            "blocks.0.bias",
        }
    assert Counting.moves == 3 * 2 + len(homes) - 2
    teacher.release()
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == homes
