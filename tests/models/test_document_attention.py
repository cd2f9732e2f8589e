"""One operator for attention within documents: the loop's values and gradients, whatever the documents are."""

import pytest
import torch
from torch import Tensor

from wrinklefree.models.attention import AttentionPlan, attend, document_mask
from wrinklefree.models.document_attention import attend_documents
from wrinklefree.models.runs import MAX_KEYS_FOR_FLOAT32, find_runs

# The check itself asks tensors that are no leaves for their gradients.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")

LENGTH = MAX_KEYS_FOR_FLOAT32 + 60


def make_states(dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """Query of four heads, key and value of two, and a slope."""
    generator = torch.Generator().manual_seed(seed)
    heads = (4, 2, 2, 4)
    return [torch.randn(2, count, LENGTH, 16, generator=generator).to(dtype) for count in heads]


def make_documents() -> Tensor:
    """A row of documents, one longer than where bfloat16 begins and padding at its end; and a row of one document."""
    ids = torch.ones(2, LENGTH, dtype=torch.int64)
    ids[0, :5] = 3
    ids[0, LENGTH - 20 :] = 2
    ids[0, LENGTH - 9 :] = 0
    return ids


def results(states: list[Tensor], plan: AttentionPlan) -> list[Tensor]:
    """The output and the three gradients."""
    *inputs, slope = states
    leaves = [state.clone().requires_grad_() for state in inputs]
    query, key, value = leaves
    output = attend(query, key, value, plan)
    (output.float() * slope).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1.6e-2)])
def test_the_operator_equals_the_loop_over_documents(dtype: torch.dtype, tolerance: float) -> None:
    states, ids = make_states(dtype), make_documents()
    loop = results(states, AttentionPlan(rows=find_runs(ids)))
    for mine, theirs in zip(results(states, AttentionPlan(document_ids=ids)), loop, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_the_operator_equals_a_mask() -> None:
    states, ids = make_states(torch.float32), make_documents()
    masked = results(states, AttentionPlan(mask=document_mask(ids, LENGTH)))
    for mine, theirs in zip(results(states, AttentionPlan(document_ids=ids)), masked, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_operator_keeps_to_what_a_compiler_is_told() -> None:
    query, key, value, _ = (state.requires_grad_() for state in make_states(torch.float32))
    torch.library.opcheck(attend_documents, (query, key, value, make_documents()))
