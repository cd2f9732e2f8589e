"""Stage 3's step: what distilling costs beyond its two models, and the whole step against one composed of others' parts.

    uv run python -m benchmark.distillation                       # SmolLM2-135M's shape, 1024 tokens in 4 documents
    uv run python -m benchmark.distillation --layers 6 --only parts --dtype float32

The first table: a distillation step (teacher forward, student forward, CE + KL in one chunked pass, backward) against the
sum of its parts (the teacher's forward pass with its logits, and the student's step with cross-entropy alone).

The second table: forward, backward and a fused AdamW update, ours against transformers' Llama (SDPA, packed by positions,
no cache) with its own `AutoBitLinear` layers (`online_quant`) and dense logits of both models. No relation loss in
either; the other has no SubLN. Peak: what the allocator holds at once beyond models and optimizer state.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmark.attention import packed_documents
from benchmark.peers import installed, naive
from benchmark.step import smollm2_shape
from benchmark.timing import MIB, allocated_peak, interleaved
from wrinklefree.distillation.head_losses import SoftTargets, head_losses
from wrinklefree.distillation.teacher import Teacher
from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch, ModelOutput, Wants
from wrinklefree.utils.allocator import keep_large_buffers

TEMPERATURE = 5.0


def autocast(dtype: torch.dtype) -> torch.autocast:
    """As in training: on for bfloat16."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


def packed_batch(tokens: int, documents: int, vocabulary: int) -> Batch:
    """One row of random documents."""
    ids = torch.randint(0, vocabulary, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    document_ids = packed_documents(tokens, documents)
    starts = functional.pad(document_ids[:, 1:] != document_ids[:, :-1], (1, 0), value=True)
    index = torch.arange(tokens)[None]
    positions = index - torch.where(starts, index, 0).cummax(1).values
    return Batch(ids[:, :-1], ids[:, 1:].clone(), positions, document_ids)


def dense_losses(logits: Tensor, taught: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy + mean KL of dense logits [N, V]."""
    hard = functional.cross_entropy(logits.float(), labels)
    soft = functional.kl_div(
        functional.log_softmax(logits.float() / TEMPERATURE, -1),
        functional.log_softmax(taught.float() / TEMPERATURE, -1),
        reduction="batchmean",
        log_target=True,
    )
    return hard + soft


class Distillation:
    """A student, a full-precision teacher of the same shape, one batch, autocast bfloat16 or none, float32 parameters."""

    def __init__(self, architecture: Architecture, batch: Batch, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.student = CausalLM(architecture, BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0))
        self.naive = naive(self.student)
        self.teacher = Teacher(CausalLM(architecture))
        self.batch = batch
        self.labels = batch.labels.flatten()

    def _backward(self, model: CausalLM, loss: Callable[[ModelOutput], Tensor]) -> None:
        model.zero_grad(set_to_none=True)
        if any(isinstance(module, BitLinear) for module in model.modules()):
            set_quantization(model, 1.0)
        with autocast(self.dtype):
            value = loss(model(self.batch))
        value.backward()

    def _heads(self, output: ModelOutput, soft: SoftTargets | None) -> Tensor:
        share = 1 / len(self.labels)
        return head_losses(
            output.hidden.flatten(0, 1), output.head_weight, self.labels, soft=soft, cross_entropy_factor=share,
            divergence_factor=share,
        ).total  # fmt: skip

    def teacher_forward(self) -> None:
        """The teacher's forward pass, with logits."""
        with autocast(self.dtype):
            output = self.teacher(self.batch, Wants())
            with torch.no_grad():
                functional.linear(output.hidden, output.head_weight)

    def student_step(self) -> None:
        """Forward, cross-entropy, backward."""
        self._backward(self.student, lambda output: self._heads(output, None))

    def step(self) -> None:
        """The distillation step."""
        with autocast(self.dtype):
            taught = self.teacher(self.batch, Wants())
        counted = torch.ones_like(self.labels, dtype=torch.bool)
        soft = SoftTargets(taught.hidden.flatten(0, 1), taught.head_weight, counted, TEMPERATURE, t_squared=False)
        self._backward(self.student, lambda output: self._heads(output, soft))

    def naive_step(self) -> None:
        """The same with layers of tensor operations and dense logits."""
        with autocast(self.dtype), torch.no_grad():
            taught = self.teacher(self.batch, Wants())
            logits = functional.linear(taught.hidden, taught.head_weight).flatten(0, 1)
        self._backward(
            self.naive,
            lambda output: dense_losses(
                functional.linear(output.hidden, output.head_weight).flatten(0, 1), logits, self.labels
            ),
        )


class Composed:
    """The step as one would put it together from transformers."""

    def __init__(self, architecture: Architecture, batch: Batch, dtype: torch.dtype) -> None:
        self.dtype = dtype
        transformers = import_module("transformers")
        layer = import_module("transformers.integrations.bitnet").AutoBitLinear
        config = transformers.LlamaConfig(
            vocab_size=architecture.vocab_size, hidden_size=architecture.hidden_size,
            intermediate_size=architecture.intermediate_size, num_hidden_layers=architecture.num_hidden_layers,
            num_attention_heads=architecture.num_attention_heads,
            num_key_value_heads=architecture.num_key_value_heads, head_dim=architecture.head_dim,
            max_position_embeddings=architecture.max_position_embeddings,
            tie_word_embeddings=architecture.tie_word_embeddings, attn_implementation="sdpa",
        )  # fmt: skip
        self.batch = batch
        self.teacher: nn.Module = transformers.LlamaForCausalLM(config).eval().requires_grad_(False)
        self.student: nn.Module = transformers.LlamaForCausalLM(config).train()
        for parent in list(self.student.get_submodule("model.layers").modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    made: Any = layer(child.in_features, child.out_features, bias=False, online_quant=True)
                    made.weight = child.weight
                    setattr(parent, name, made)

    def _logits(self, model: Any) -> Tensor:
        output = model(
            input_ids=self.batch.input_ids, position_ids=self.batch.position_ids, attention_mask=None, use_cache=False
        )
        return output.logits.flatten(0, 1)

    def step(self) -> None:
        """Teacher, student, dense losses, backward."""
        self.student.zero_grad(set_to_none=True)
        with autocast(self.dtype):
            with torch.no_grad():
                taught = self._logits(self.teacher)
            loss = dense_losses(self._logits(self.student), taught, self.batch.labels.flatten())
        loss.backward()


def with_update(model: nn.Module, step: Callable[[], None]) -> Callable[[], None]:
    """The step followed by an AdamW update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def run() -> None:
        step()
        optimizer.step()

    return run


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.distillation", description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="add ours with training.compile to the second table")
    parser.add_argument("--only", choices=("parts", "whole"))
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    architecture = smollm2_shape(arguments.layers, vocabulary=arguments.vocabulary)
    batch = packed_batch(arguments.tokens, arguments.documents, arguments.vocabulary)
    dtype = getattr(torch, arguments.dtype)
    ours = Distillation(architecture, batch, dtype)
    out = sys.stdout.write
    out(
        f"stage 3, {arguments.layers} blocks of SmolLM2-135M, {arguments.tokens} tokens in {arguments.documents} documents, "
        f"{arguments.vocabulary} words, {arguments.dtype}, {arguments.threads} thread(s), torch {torch.__version__}\n\n"
    )
    if arguments.only != "whole":
        times = interleaved(
            {
                "teacher forward": ours.teacher_forward,
                "student step (CE)": ours.student_step,
                "distillation step": ours.step,
                "naive layers, dense logits": ours.naive_step,
            },
            arguments.rounds,
        )
        cpu = times["teacher forward"].cpu + times["student step (CE)"].cpu
        wall = times["teacher forward"].wall + times["student step (CE)"].wall
        out("| step | CPU s | over its parts | wall s | over its parts |\n|---|---|---|---|---|\n")
        for name, timing in times.items():
            out(
                f"| {name} | {timing.cpu:.3f} | {timing.cpu / cpu:.3f} | {timing.wall:.3f} | {timing.wall / wall:.3f} |\n"
            )
        out("\n")
    if arguments.only != "parts":
        other = Composed(architecture, batch, dtype)
        steps = {
            f"transformers {installed('transformers')}, AutoBitLinear, dense KL": with_update(
                other.student, other.step
            ),
            "WrinkleFree": with_update(ours.student, ours.step),
        }
        models = dict(zip(steps, (other.student, ours.student), strict=True))
        if arguments.compiled:
            compiled = Distillation(architecture, batch, dtype)
            compiled.student.compile_blocks(1, arguments.tokens, gradients=True)
            teacher = compiled.teacher.model
            assert isinstance(teacher, CausalLM)
            teacher.compile_blocks(1, arguments.tokens, gradients=False)
            steps["WrinkleFree, training.compile"] = with_update(compiled.student, compiled.step)
            models["WrinkleFree, training.compile"] = compiled.student
        times = interleaved(steps, arguments.rounds)
        for model in models.values():
            model.zero_grad(set_to_none=True)
        peaks: dict[str, int] = {}
        for name, step in steps.items():
            peaks[name] = allocated_peak(step)
            models[name].zero_grad(set_to_none=True)
        base = next(iter(steps))
        out("| stage-3 step with update | CPU s | speed | wall s | tokens/s | speed | peak MiB | ratio |\n")
        out("|---|---|---|---|---|---|---|---|\n")
        for name, timing in times.items():
            out(
                f"| {name} | {timing.cpu:.3f} | {times[base].cpu / timing.cpu:.2f} | {timing.wall:.3f} | "
                f"{arguments.tokens / timing.wall:.0f} | {times[base].wall / timing.wall:.2f} | "
                f"{peaks[name] / MIB:.0f} | {peaks[name] / peaks[base]:.3f} |\n"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
