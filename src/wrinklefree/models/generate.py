"""Text generation with a key-value cache: greedy, or sampled with temperature, top-k and top-p."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wrinklefree.models.attention import KVCache
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch


def left_pad(prompts: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Prompts of any length as one batch that ends where each prompt ends; padding has document id 0."""
    length = max(len(prompt) for prompt in prompts)
    pads = [length - len(prompt) for prompt in prompts]
    input_ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
    position_ids = [[0] * pad + list(range(length - pad)) for pad in pads]
    document_ids = [[0] * pad + [1] * (length - pad) for pad in pads]
    ids = torch.tensor(input_ids, device=device)
    return Batch(
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        position_ids=torch.tensor(position_ids, device=device),
        document_ids=torch.tensor(document_ids, device=device),
    )


def choose_token(
    logits: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """One token a row from logits [B, V]; temperature 0 takes the largest.

    top_k keeps the k largest; top_p then keeps the smallest set whose probability reaches p (at least one token).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p is not None:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        unwanted = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        unwanted.scatter_(1, order[:, :1], False)
        logits = logits.masked_fill(unwanted, -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


@torch.inference_mode()
def generate(
    model: CausalLM,
    input_ids_list: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int | None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """New tokens for each prompt: without the prompt, and ending before `eos_token_id` where it was produced.

    All prompts run as one left-padded batch. The caller opens autocast, and checks that prompts are not empty.
    """
    device = model.head_weight.device
    batch = left_pad(input_ids_list, device)
    rows, length = batch.input_ids.shape
    cache = KVCache(rows, length + max_new_tokens)
    positions = batch.position_ids[:, -1:]
    documents = torch.ones_like(positions)
    finished = torch.zeros(rows, dtype=torch.bool, device=device)
    columns: list[Tensor] = []
    for _ in range(max_new_tokens):
        output = model(batch, cache=cache)
        logits = output.hidden[:, -1] @ output.head_weight.to(output.hidden.dtype).T
        chosen = choose_token(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        columns.append(chosen)
        if eos_token_id is not None:
            finished |= chosen == eos_token_id
            if bool(finished.all()):
                break
        positions = positions + 1
        batch = Batch(chosen[:, None], torch.full_like(positions, IGNORE), positions, documents)
    new_tokens = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in range(rows)]
    if eos_token_id is None:
        return new_tokens
    return [tokens[: tokens.index(eos_token_id)] if eos_token_id in tokens else tokens for tokens in new_tokens]
