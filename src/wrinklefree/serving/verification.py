"""Whether a written GGUF file is the model: decoded again, and, where llama.cpp is at hand, run.

First every tensor is read back and compared with the checkpoint: all codes, the scale, and every other value after the
one rounding that its type means. Then llama.cpp and this library's decoder read the same tokens, and their next-token
log-probabilities are compared. llama.cpp quantizes activations by blocks of a row and not by token, so the decoder does
the same here; what is left are float sums in another order and, now and then, an activation that rounds the other way.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from wrinklefree.models.artifact import Artifact
from wrinklefree.models.bitlinear import BitLinear, set_quantization
from wrinklefree.models.gguf_weights import codes_and_scale, latent_weight
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import IGNORE, Batch
from wrinklefree.quantization.packing import TernaryFormat
from wrinklefree.quantization.weight_quant import ternarize
from wrinklefree.serving.dense_types import DenseType
from wrinklefree.serving.export_plan import ExportPlan, PlannedTensor, TensorSource
from wrinklefree.serving.runtime_probe import ask_llama_cpp, is_installed
from wrinklefree.utils.errors import CheckpointError
from wrinklefree.utils.gguf import GGUFFile, read_gguf
from wrinklefree.utils.gguf_blocks import FORMATS_BY_NAME, decode_tensor
from wrinklefree.utils.storage import format_size
from wrinklefree.utils.tokenizer import TextTokenizer

PROBE_TEXT = (
    "A river carries sand to the sea. In 1847 the town built 3 bridges; two of them, though repaired, still stand, and "
    "the third was moved to a museum."
)
PROBE_LENGTHS = (4, 12, 24)
"""Tokens of the probe after which the next token's distribution is compared."""

TOKENIZED = (
    PROBE_TEXT,
    "  Two  spaces,\ttabs\n\nand blank lines \n",
    "It's 12345.67 (or $1,000) - they'll say \"we're done\"!?",
    "na\u00efve caf\u00e9, \u0440\u0435\u043a\u0430, \u5ddd, \U0001f600",
    "def f(x):\n    return x_1 + 0x2A  # comment\n",
)
"""Texts that both tokenizers must cut alike."""

LARGEST_DIFFERENCE = {"F32": 0.01}
"""Bound on a log-probability's difference where neither weights nor activations are rounded."""

LARGEST_DIVERGENCE = 0.02
"""Bound on KL(decoder || llama.cpp) in nats, where the model is not more sensitive than that by itself."""

NOISE_FACTOR = 3.0
"""How many times a model's own rounding noise the divergence may be. Its noise is the divergence between activations
quantized by token, as in training, and by blocks, as in llama.cpp, both in this library's decoder."""

_Q8_K, _Q8_0 = 256, 32
ACTIVATION_BLOCKS = {"TQ1_0": _Q8_K, "TQ2_0": _Q8_K, "Q2_0": _Q8_0, "Q4_0": _Q8_0, "Q8_0": _Q8_0}
"""Weight type -> activations that share a scale in llama.cpp."""

Activations = int | Literal["by_token", "none"]

_ROUNDINGS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_MEMORY_SHARE = 0.5
_CHUNK_VALUES = 1 << 24


@dataclass(frozen=True)
class RuntimeComparison:
    """llama.cpp against this library's decoder, on natural logarithms of next-token probabilities."""

    positions: int
    largest_difference: float
    mean_difference: float
    divergence: float
    """Largest KL(decoder || llama.cpp) of a position, in nats."""
    same_first_choice: int
    """Positions with the same likeliest token."""
    noise: float
    """Largest KL of a position between the decoder's two ways to quantize activations, in nats."""


@dataclass(frozen=True)
class Verification:
    """What was compared."""

    tensors: int
    ternary_tensors: int
    codes: int
    """Ternary codes compared; all were equal."""
    largest_scale_error: float
    """Relative; from the type's rounding of the scale."""
    runtime: RuntimeComparison | None
    runtime_skipped: str | None
    """Why llama.cpp was not asked."""

    def line(self) -> str:
        """The result for people."""
        text = f"{self.tensors} tensors read back"
        if self.ternary_tensors:
            text += f"; all {self.codes} codes equal, scales within {self.largest_scale_error:.1e}"
        found = self.runtime
        if found is None:
            return f"{text}; not run: {self.runtime_skipped}"
        return (
            f"{text}; llama.cpp against this library: same tokens, log-probabilities within {found.largest_difference:.2g} "
            f"(mean {found.mean_difference:.1g}), KL {found.divergence:.1g} nats, same likeliest token at "
            f"{found.same_first_choice} of {found.positions} positions"
        )


def verify(path: Path, artifact: Artifact, plan: ExportPlan, source: TensorSource, *, run: bool = True) -> Verification:
    """Compare a written file with its checkpoint; `run`: in llama.cpp too, where that holds it.

    Raises:
        CheckpointError: something differs: the tensor and by how much, or the log-probabilities.
    """
    file = read_gguf(path)
    planned = list(plan.tensors(source))
    missing = [tensor.stored for tensor in planned if tensor.stored not in file.tensors]
    if missing or len(planned) != len(file.tensors):
        raise CheckpointError(
            f"{path} holds {len(file.tensors)} tensors of {len(planned)} (missing: {', '.join(missing[:3])}); convert again"
        )
    codes, scale_error = 0, 0.0
    ternary = [tensor for tensor in planned if tensor.is_ternary]
    for tensor in planned:
        if tensor.is_ternary:
            scale_error = max(scale_error, _check_ternary(file, plan, source, tensor))
            codes += int(np.prod(tensor.shape))
        elif tensor.name is not None:
            _check_dense(file, plan, source, tensor)
    skipped = _why_not_run(artifact, plan) if run else "not asked to"
    runtime = None
    if skipped is None:
        runtime = compare_with_llama_cpp(path, artifact.load_model(), artifact.load_tokenizer(), plan)
        _check_runtime(path, plan, runtime)
    return Verification(len(planned), len(ternary), codes, scale_error, runtime, skipped)


def compare_with_llama_cpp(
    path: Path, model: CausalLM, tokenizer: TextTokenizer, plan: ExportPlan
) -> RuntimeComparison:
    """Log-probabilities after the first tokens of a fixed text, in llama.cpp and in the decoder.

    `model` is changed: it gets the roundings that the file's types mean, and full quantization.

    Raises:
        CheckpointError: llama.cpp cuts a text into other tokens.
        EngineError: llama.cpp does not run the file.
    """
    ids = tokenizer.encode(PROBE_TEXT)
    lengths = sorted({min(length, len(ids)) for length in PROBE_LENGTHS})
    rows = [length - 1 for length in lengths]
    answer = ask_llama_cpp(
        path,
        [ids[:length] for length in lengths],
        TOKENIZED,
        vocab_size=model.architecture.vocab_size,
        plain_token=tokenizer.encode("a")[0],
    )
    for text, theirs in zip(TOKENIZED, answer.tokens, strict=True):
        if theirs != tokenizer.encode(text):
            raise CheckpointError(
                f"{path}: llama.cpp cuts {text!r} into the tokens {theirs[:8]}..., the tokenizer into "
                f"{tokenizer.encode(text)[:8]}...; please report it with the model's tokenizer.json"
            )
    round_as_stored(model, plan)
    block = ACTIVATION_BLOCKS.get(plan.weight_format.name)
    head_block = ACTIVATION_BLOCKS.get(plan.table_type.name)

    def logprobs(activations: Activations) -> Tensor:
        logits = logits_with_activations(model, ids[: lengths[-1]], activations, head_block=head_block)
        return logits[rows].log_softmax(-1)

    ours = logprobs(block or "none")
    theirs = torch.from_numpy(answer.logprobs)
    difference = (ours - theirs).abs()
    return RuntimeComparison(
        positions=len(lengths),
        largest_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        divergence=_divergence(ours, theirs),
        same_first_choice=int((ours.argmax(-1) == theirs.argmax(-1)).sum()),
        noise=0.0 if block is None else _divergence(logprobs("by_token"), ours),
    )


@torch.no_grad()
def round_as_stored(model: CausalLM, plan: ExportPlan) -> None:
    """Give a model's parameters the values that the file's types leave of them, and full quantization."""
    set_quantization(model, 1.0)
    for module in model.modules():
        if isinstance(module, BitLinear):
            ternary = ternarize(module.weight)
            module.weight.copy_(latent_weight(ternary.codes, _stored_scale(plan.weight_format, float(ternary.scale))))
        elif isinstance(module, nn.Embedding) or module is model.lm_head:
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.copy_(_rounded(weight, plan.table_type.name))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(_rounded(module.weight, plan.weight_format.name))


@torch.no_grad()
def logits_with_activations(
    model: CausalLM, ids: list[int], activations: Activations, *, head_block: int | None
) -> Tensor:
    """Logits [T, V] with the inputs of all BitLinears quantized in one of three ways.

    Args:
        model: At full quantization.
        ids: Tokens.
        activations: by_token, as trained; none; or the number of channels that share a scale.
        head_block: Channels of the head's input that share a scale; None: not quantized.
    """
    layers = [module for module in model.modules() if isinstance(module, BitLinear)]
    trained: dict[BitLinear, Literal[4, 8] | None] = {layer: layer.activation_bits for layer in layers}
    if activations != "by_token":
        for layer in layers:
            layer.activation_bits = None
    row = torch.tensor([ids])
    batch = Batch(row, torch.full_like(row, IGNORE), torch.arange(len(ids))[None], torch.ones_like(row))
    try:
        with _quantized_inputs(layers, activations if isinstance(activations, int) else None):
            output = model(batch)
    finally:
        for layer in layers:
            layer.activation_bits = trained[layer]
    hidden = output.hidden[0]
    if head_block is not None:
        hidden = quantize_blocks(hidden, head_block)
    return hidden @ output.head_weight.T


def quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Activations rounded to 8 bits by blocks of a row, as ggml's dot products do: the scale of 32 is kept in fp16."""
    width = x.shape[-1]
    blocks = nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks)).round()
    kept = scale.half().float() if block == _Q8_0 else scale
    return (codes * kept).flatten(-2)[..., :width]


@contextmanager
def _quantized_inputs(layers: list[BitLinear], block: int | None) -> Iterator[None]:
    """Let layers see their input rounded by blocks; None: as it is."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert block is not None
        return (quantize_blocks(inputs[0], block), *inputs[1:])

    handles = [] if block is None else [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _divergence(ours: Tensor, theirs: Tensor) -> float:
    """Largest KL(ours || theirs) over positions, of log-probabilities [positions, V]; rounding may leave -1e-9."""
    return max(0.0, float((ours.exp() * (ours - theirs)).sum(-1).max()))


def _check_ternary(file: GGUFFile, plan: ExportPlan, source: TensorSource, tensor: PlannedTensor) -> float:
    """Compare codes and scale; returns the relative error that the type's rounding left in the scale."""
    assert tensor.name is not None
    expected, scale = plan.expected(source, tensor.name)
    codes, stored = codes_and_scale(file, tensor.stored)
    wrong = int((codes != expected).sum())
    if wrong:
        raise CheckpointError(
            f"{file.path}: {wrong} of {codes.size} codes of {tensor.stored} differ from the checkpoint's"
        )
    error = abs(stored - scale)
    # A tensor of zeros that is written out leaves no trace of its scale.
    allowed = _scale_spacing(plan.weight_format, scale) if expected.any() else np.inf
    if error > allowed:
        raise CheckpointError(f"{file.path}: the scale of {tensor.stored} is {stored:g}, the checkpoint's {scale:g}")
    return error / scale if expected.any() else 0.0


def _check_dense(file: GGUFFile, plan: ExportPlan, source: TensorSource, tensor: PlannedTensor) -> None:
    """Compare values after the type's rounding, some rows at a time."""
    name = tensor.name
    assert name is not None
    block = FORMATS_BY_NAME[tensor.type]
    raw = file.raw(tensor.stored)
    rows = tensor.shape[0] if len(tensor.shape) == 2 else 1
    columns = tensor.shape[-1]
    row_bytes = len(raw) // rows
    step = max(1, _CHUNK_VALUES // columns)
    whole = None if _is_table(name) else plan.values(source, name).reshape(rows, columns)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        stored = decode_tensor(block, raw[start * row_bytes : stop * row_bytes], (stop - start, columns))
        if whole is not None:
            values = torch.from_numpy(whole[start:stop])
        else:
            values = plan.padding.pad(name, source.rows(name, start, stop).to(torch.float32))
        if not _agrees(stored, values, tensor.type):
            worst = float(np.abs(stored - values.numpy()).max())
            raise CheckpointError(f"{file.path}: {tensor.stored} differs from the checkpoint by up to {worst:g}")


def _agrees(stored: NDArray[np.float32], values: Tensor, kind: str) -> bool:
    """Whether decoded values are the rounded ones; Q8_0's codes may be off by half a step and the scale's rounding."""
    if kind in _ROUNDINGS:
        return torch.equal(torch.from_numpy(stored), values.to(_ROUNDINGS[kind]).to(torch.float32))
    blocks = values.reshape(-1, _Q8_0)
    largest = blocks.abs().amax(1, keepdim=True)
    error = (torch.from_numpy(stored).reshape(-1, _Q8_0) - blocks).abs()
    return bool((error <= largest * (0.5 / 127 + 2.0**-10) + 2.0**-24 * 127).all())


def _is_table(name: str) -> bool:
    return name in ("model.embed_tokens.weight", "lm_head.weight")


def _stored_scale(form: TernaryFormat | DenseType, scale: float) -> float:
    if isinstance(form, TernaryFormat):
        return float(form.stored_scale(scale))
    return float(torch.tensor(scale, dtype=torch.float32).to(_ROUNDINGS[form.name]))


def _scale_spacing(form: TernaryFormat | DenseType, scale: float) -> float:
    """One unit in the last place of the scale in its type."""
    if form.name in ("F32", "I2_S_X86", "I2_S_ARM"):
        return 0.0
    if form.name == "BF16":
        return scale * 2.0**-8
    return float(np.spacing(np.float16(scale)))


def _rounded(values: Tensor, kind: str) -> Tensor:
    """Values after a dense type's rounding, on the way through that type."""
    if kind in _ROUNDINGS:
        return values.to(_ROUNDINGS[kind]).to(values.dtype)
    if kind == "Q8_0":
        return quantize_blocks(values, _Q8_0)
    return values


def _why_not_run(artifact: Artifact, plan: ExportPlan) -> str | None:
    """Why llama.cpp and the decoder are not run side by side; None: they are."""
    if plan.row.target != "llama.cpp":
        return f"llama.cpp does not run {plan.row.target} files"
    if not is_installed():
        return "the package xllamacpp is not installed"
    parameters = (artifact.folder / "model.safetensors").stat().st_size  # at least two bytes each
    needed = 4 * parameters
    available = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * available:
        return f"running the model takes about {format_size(needed)}, {format_size(available)} are available"
    return None


def _check_runtime(path: Path, plan: ExportPlan, found: RuntimeComparison) -> None:
    difference = LARGEST_DIFFERENCE.get(plan.weight_format.name, np.inf)
    divergence = max(LARGEST_DIVERGENCE, NOISE_FACTOR * found.noise)
    if found.largest_difference > difference or not found.divergence <= divergence:
        raise CheckpointError(
            f"{path} gives other answers in llama.cpp than the checkpoint here: log-probabilities differ by up to "
            f"{found.largest_difference:.3g} (KL {found.divergence:.3g} nats); please report it, and use "
            "--target wrinklefree meanwhile"
        )
