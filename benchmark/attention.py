"""Attention over packed documents: ours against one kernel with a boolean mask, and plain causal attention (which leaks).

    uv run python -m benchmark.attention                     # 2048 positions, 7 documents, bfloat16
    uv run python -m benchmark.attention --dtype float32

Forward and backward of the attention itself, states ready. The mask is what `transformers` hands to the same kernel for
packed rows. Error: of the gradients of Q, K and V, against the mask in float32.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmark.timing import Variant, comparison
from wrinklefree.models.attention import attend, document_mask, plan_attention
from wrinklefree.utils.allocator import keep_large_buffers


def packed_documents(length: int, documents: int) -> Tensor:
    """Ids [1, T] of so many documents, of unequal lengths."""
    shares = torch.rand(documents, generator=torch.Generator().manual_seed(1)) + 0.3
    ends = (shares.cumsum(0) / shares.sum() * length).round().long()
    return (torch.bucketize(torch.arange(length), ends, right=True) + 1)[None]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.attention", description=__doc__)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--key-heads", type=int, default=8)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--documents", type=int, default=7)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    heads = (arguments.heads, arguments.key_heads, arguments.key_heads)
    states = [
        torch.randn(1, count, arguments.length, arguments.width, generator=generator).to(dtype).requires_grad_()
        for count in heads
    ]
    slope = torch.randn(1, arguments.heads, arguments.length, arguments.width, generator=generator).to(dtype)
    documents = packed_documents(arguments.length, arguments.documents)

    def sdpa(states: Sequence[Tensor], *, mask: Tensor | None) -> Tensor:
        return functional.scaled_dot_product_attention(
            *states, attn_mask=mask, is_causal=mask is None, enable_gqa=arguments.heads != arguments.key_heads
        )

    def masked(states: Sequence[Tensor]) -> Tensor:
        return sdpa(states, mask=document_mask(documents, arguments.length))

    def causal(states: Sequence[Tensor]) -> Tensor:
        return sdpa(states, mask=None)

    def ours(states: Sequence[Tensor]) -> Tensor:
        query, key, value = states
        return attend(query, key, value, plan_attention(documents, arguments.length))

    def variant(function: Callable[[Sequence[Tensor]], Tensor]) -> Variant:
        return Variant(lambda: (function(states) * slope).sum().backward(), states)

    exact = [state.detach().float().requires_grad_() for state in states]
    (masked(exact) * slope.float()).sum().backward()
    reference = [state.grad for state in exact if state.grad is not None]
    sys.stdout.write(
        f"attention: {arguments.length} positions, {arguments.documents} documents, {arguments.heads} heads of "
        f"{arguments.width}, {arguments.dtype}, {arguments.threads} thread(s), torch {torch.__version__}\n\n"
    )
    variants = {
        "boolean mask": variant(masked),
        "WrinkleFree": variant(ours),
        "plain causal (leaks)": variant(causal),
    }
    sys.stdout.write(comparison(variants, arguments.rounds, reference))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
