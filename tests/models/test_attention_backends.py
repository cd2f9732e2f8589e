"""Kernels that are told borders: how they are called is checked with stand-ins on a CPU, what they compute on a GPU."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from wrinklefree.models import attention_backends
from wrinklefree.models.attention import attend, document_mask, plan_attention
from wrinklefree.models.attention_backends import AttentionBackend, choose_backend, difference_from_mask, kernel_of
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch, find_borders
from wrinklefree.utils.errors import ConfigError

IDS = torch.tensor([[1, 1, 1, 2, 2, 3], [1, 1, 1, 1, 0, 0]])
CPU = torch.device("cpu")


def by_documents(query: Tensor, key: Tensor, value: Tensor, borders: list[int]) -> Tensor:
    """What a varlen kernel promises, written out: [P, n, d] with [P, n_kv, d]."""
    parts = []
    for first, end in zip(borders, borders[1:], strict=False):
        q, k, v = (states[first:end].transpose(0, 1)[None] for states in (query, key, value))
        parts.append(
            functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
        )
    return torch.cat(parts)


@pytest.fixture(autouse=True)
def _fresh_kernels() -> Iterator[None]:
    kernel_of.cache_clear()
    yield
    kernel_of.cache_clear()


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages whose functions have the real signatures."""

    def varlen_attn(
        query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
        window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert window_size == (-1, 0)
        assert enable_gqa == (query.shape[1] != key.shape[1])
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert max_q == max_k == int(cu_seq_q.diff().max())
        return by_documents(query, key, value, cu_seq_q.tolist())

    def flash_attn_varlen_func(
        query: Tensor, key: Tensor, value: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, causal: bool = False,
    ) -> Tensor:  # fmt: skip
        assert causal
        return by_documents(query, key, value, cu_seqlens_q.tolist())

    modules = {
        "torch.nn.attention.varlen": SimpleNamespace(varlen_attn=varlen_attn),
        "flash_attn": SimpleNamespace(flash_attn_varlen_func=flash_attn_varlen_func),
    }
    monkeypatch.setattr(attention_backends, "import_module", modules.__getitem__)
    monkeypatch.setattr(attention_backends, "_HALF", (torch.float32, torch.bfloat16))


def test_borders_by_hand() -> None:
    borders = find_borders(IDS)
    assert borders.cumulative.tolist() == [0, 3, 5, 6, 10, 12]
    assert borders.cumulative.dtype == torch.int32
    assert borders.longest == 4
    again = find_borders(torch.tensor([[1, 2, 1]]))
    assert again.cumulative.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("backend", ["varlen", "flash"])
@pytest.mark.parametrize("key_heads", [1, 4])
def test_a_kernel_with_borders_equals_the_mask(stand_ins: None, backend: AttentionBackend, key_heads: int) -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 6, 8, generator=generator)
    key, value = (torch.randn(2, key_heads, 6, 8, generator=generator) for _ in range(2))
    plan = plan_attention(IDS, 6, backend=backend, borders=find_borders(IDS))
    assert plan.backend == backend
    masked = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=document_mask(IDS, queries=6), enable_gqa=True
    )
    real = (IDS != 0)[:, None, :, None]
    torch.testing.assert_close(attend(query, key, value, plan) * real, masked * real, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_equals_the_mask() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 4, 6, 16, generator=generator)
    key, value = (torch.randn(2, 2, 6, 16, generator=generator) for _ in range(2))
    plan = plan_attention(IDS, 6, backend="flex")
    masked = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=document_mask(IDS, queries=6), enable_gqa=True
    )
    real = (IDS != 0)[:, None, :, None]
    with torch.no_grad():
        found = attend(query, key, value, plan)
    torch.testing.assert_close(found * real, masked * real, rtol=1e-5, atol=1e-5)


def test_the_check_tells_a_right_kernel_from_one_that_leaks(stand_ins: None, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = {"device": CPU, "dtype": torch.float32, "heads": (4, 2), "head_dim": 16}
    assert difference_from_mask("varlen", **arguments) < 1e-5
    monkeypatch.setattr(
        attention_backends, "kernel_of", lambda _: lambda q, k, v, b: by_documents(q, k, v, [0, len(q)])
    )
    assert difference_from_mask("varlen", **arguments) > 10 * attention_backends.CHECK_TOLERANCE


def test_a_model_hands_its_borders_on(stand_ins: None) -> None:
    torch.manual_seed(0)
    model = CausalLM(
        Architecture(
            family="llama", vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
        )
    )  # fmt: skip
    tokens = torch.arange(12).reshape(2, 6) % 11
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]])
    batch = Batch(tokens, tokens, positions, IDS)
    expected = model(batch).hidden
    model.attention_backend = "varlen"
    real = IDS != 0
    torch.testing.assert_close(model(batch).hidden[real], expected[real], rtol=1e-5, atol=1e-5)


def choose(wanted: str, **changes: object) -> attention_backends.ChosenBackend:
    arguments = {"device": CPU, "dtype": torch.bfloat16, "heads": (4, 2), "head_dim": 16} | changes
    return choose_backend(wanted, **arguments)  # pyright: ignore[reportArgumentType]


def test_a_cpu_has_one_way() -> None:
    assert choose("auto").name == choose("sdpa").name == "sdpa"
    with pytest.raises(ConfigError, match=r"attention=varlen does not work here \(varlen: needs a CUDA device"):
        choose("varlen")


def test_what_fails_or_differs_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"varlen": 0.5, "flash": 0.001}
    monkeypatch.setattr(attention_backends, "difference_from_mask", lambda name, **_: found[name])
    gpu = torch.device("cuda")
    assert choose("auto", device=gpu).name == "flash"
    found["flash"] = float("nan")
    chosen = choose("auto", device=gpu)
    assert chosen.name == "sdpa"
    assert (
        chosen.reason == "varlen: differs from the masked kernel by 0.5; flash: differs from the masked kernel by nan"
    )

    def fails(name: str, **_: object) -> float:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(attention_backends, "difference_from_mask", fails)
    assert choose("auto", device=gpu).reason.startswith("varlen: RuntimeError: no kernel; flash:")
    assert "computes in 16 bit, training.dtype is float32" in choose("auto", device=gpu, dtype=torch.float32).reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["varlen", "flex"])
@pytest.mark.parametrize(("heads", "head_dim"), [((9, 3), 64), ((32, 8), 128), ((4, 4), 32)])
def test_kernels_of_a_gpu_equal_the_mask(backend: AttentionBackend, heads: tuple[int, int], head_dim: int) -> None:
    arguments = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "heads": heads, "head_dim": head_dim}
    assert difference_from_mask(backend, **arguments) <= attention_backends.CHECK_TOLERANCE
