"""A training step with ternary projections against the same step with `nn.Linear`, and against the layers of others.

    uv run --with torchao==0.18.0 python -m benchmark.step                  # SmolLM2-135M's shape, 1024 tokens, bfloat16
    uv run python -m benchmark.step --micro-batches 8 --tokens 128          # the same tokens in eight micro-batches
    uv run python -m benchmark.step --compile --layers 6                    # blocks compiled
    uv run python -m benchmark.step --variants nn.Linear WrinkleFree "WrinkleFree, int8 backward"

A step is forward, cross-entropy (ours, for all) and backward of every micro-batch; no optimizer. As in training, weight
codes are forgotten before it. Columns: processor seconds and seconds by the clock, each the smallest of the rounds and
over `nn.Linear`'s; what one micro-batch's graph keeps; the error of all gradients against straight-through gradients of the
readable path in float32 (for nn.Linear: against its own in float32).
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmark.peers import PEERS, installed, plain, sharing_copy
from benchmark.timing import MIB, gradients, interleaved, relative_error, saved_bytes
from wrinklefree.distillation.head_losses import head_losses
from wrinklefree.models.bitlinear import BitLinear, set_products, set_quantization
from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.quantization.options import BackwardProducts, ForwardProducts
from wrinklefree.utils.allocator import keep_large_buffers

OURS = "WrinkleFree"


def with_products(forward: ForwardProducts, backward: BackwardProducts) -> Callable[[CausalLM], CausalLM]:
    """Makes our model with these `training.forward_products` and `training.backward_products`."""

    def make(model: CausalLM) -> CausalLM:
        changed = sharing_copy(model)
        set_products(changed, forward, backward)
        return changed

    return make


OWN: dict[str, Callable[[CausalLM], CausalLM]] = {
    OURS: sharing_copy,
    f"{OURS}, float forward": with_products("float", "exact"),
    f"{OURS}, int8 forward": with_products("int8", "exact"),
    f"{OURS}, int8 backward": with_products("auto", "int8"),
    f"{OURS}, fp8 backward": with_products("auto", "fp8"),
}
"""Our variants; those in bytes cost time on a CPU without int8 instructions, and are here for their errors."""


def smollm2_shape(layers: int, *, hidden: int = 576, vocabulary: int = 49152) -> Architecture:
    """SmolLM2-135M's, of so many blocks."""
    return Architecture(
        family="llama",
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=next(groups for groups in (3, 4, 2, 1) if (hidden // 64) % groups == 0),
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )


def random_batch(tokens: int, vocabulary: int, seed: int = 0) -> Batch:
    """One row, one document."""
    ids = torch.randint(0, vocabulary, (1, tokens + 1), generator=torch.Generator().manual_seed(seed))
    return Batch(ids[:, :-1], ids[:, 1:], torch.arange(tokens)[None], torch.ones(1, tokens, dtype=torch.int64))


class Step:
    """Forward and backward of some micro-batches through one model."""

    def __init__(self, model: CausalLM, batches: Sequence[Batch], dtype: torch.dtype) -> None:
        self.model, self.batches, self.dtype = model, batches, dtype
        self.has_codes = any(isinstance(module, BitLinear) for module in model.modules())

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of a micro-batch."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.model(batch)
            share = 1.0 / (batch.num_targets * len(self.batches))
            labels, hidden = batch.labels.flatten(), output.hidden.flatten(0, 1)
            return head_losses(hidden, output.head_weight, labels, cross_entropy_factor=share).total

    def __call__(self) -> None:
        """One step; the gradients stay."""
        self.model.zero_grad(set_to_none=True)
        if self.has_codes:
            set_quantization(self.model, 1.0)
        for batch in self.batches:
            self.loss(batch).backward()

    def kept(self) -> int:
        """Bytes that the graph of one micro-batch's blocks keeps."""
        batch = self.batches[0]

        def forward() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
                return self.model(batch).hidden

        return saved_bytes(forward, self.model)


def reference_gradients(model: CausalLM, batches: Sequence[Batch]) -> list[torch.Tensor]:
    """Gradients of the readable path, in float32."""
    readable = sharing_copy(model)
    readable.activation_checkpointing = "full"
    for module in readable.modules():
        if isinstance(module, BitLinear):
            module.forward = module.reference_forward  # pyright: ignore[reportAttributeAccessIssue]
            module.encode_input = lambda x: None  # pyright: ignore[reportAttributeAccessIssue]
    Step(readable, batches, torch.float32)()
    return gradients(list(readable.parameters()))


def build(
    names: Sequence[str], base: CausalLM, batches: Sequence[Batch], dtype: torch.dtype, *, compiled: bool
) -> tuple[dict[str, Step], list[str]]:
    """Steps by name, and remarks on those that are missing."""
    steps: dict[str, Step] = {}
    remarks: list[str] = []
    makers: dict[str, tuple[Callable[[CausalLM], CausalLM], str]] = {
        **PEERS,
        **{name: (make, "torch") for name, make in OWN.items()},
    }
    for name in names:
        make, package = makers[name]
        if installed(package) is None:
            remarks.append(f"{name}: {package} is not installed (uv run --with {package} ...)")
            continue
        model = make(base)
        if compiled:
            model.compile_blocks(*batches[0].input_ids.shape, gradients=True)
        steps[name] = Step(model, batches, dtype)
    return steps, remarks


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmark.step", description=__doc__)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens", type=int, default=1024, help="of a micro-batch")
    parser.add_argument("--micro-batches", type=int, default=1)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile every block")
    parser.add_argument("--variants", nargs="+", default=[*PEERS, *OWN])
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    keep_large_buffers()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    architecture = smollm2_shape(arguments.layers, hidden=arguments.hidden, vocabulary=arguments.vocabulary)
    base = CausalLM(architecture, BitNetSpec(placement="output", gain="ones", quantization_lambda=1.0))
    batches = [random_batch(arguments.tokens, arguments.vocabulary, seed) for seed in range(arguments.micro_batches)]
    steps, remarks = build(arguments.variants, base, batches, dtype, compiled=arguments.compile)

    ternary = reference_gradients(base, batches)
    full = Step(plain(base), batches, torch.float32)
    full()
    dense = gradients(list(full.model.parameters()))
    base.zero_grad(set_to_none=True)
    errors: dict[str, float] = {}
    kept: dict[str, int] = {}
    for name, step in steps.items():
        step()
        found = [parameter.grad for parameter in step.model.parameters() if parameter.grad is not None]
        errors[name] = relative_error(found, dense if name == "nn.Linear" else ternary)
        step.model.zero_grad(set_to_none=True)
        kept[name] = step.kept()
    del ternary, dense
    times = interleaved(steps, arguments.rounds)
    base_time, base_kept = times["nn.Linear"], kept["nn.Linear"]
    tokens = arguments.tokens * arguments.micro_batches
    out = sys.stdout.write
    out(
        f"torch {torch.__version__}, {arguments.threads} thread(s), {arguments.dtype}, {arguments.layers} blocks, width "
        f"{arguments.hidden}, {arguments.micro_batches} x {arguments.tokens} tokens, compiled: {arguments.compile}\n\n"
        "| layers | CPU s | ratio | wall s | ratio | tokens/s | kept MiB | ratio | gradient error |\n"
        "|---|---|---|---|---|---|---|---|---|\n"
    )
    for name, timing in times.items():
        label = name if name not in PEERS else f"{name} ({PEERS[name][1]} {installed(PEERS[name][1])})"
        out(
            f"| {label} | {timing.cpu:.3f} | {timing.cpu / base_time.cpu:.3f} | {timing.wall:.3f} | "
            f"{timing.wall / base_time.wall:.3f} | {tokens / timing.wall:.0f} | {kept[name] / MIB:.0f} | "
            f"{kept[name] / base_kept:.3f} | {errors[name]:.1e} |\n"
        )
    out("".join(f"\n{remark}\n" for remark in remarks))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
