"""Whether a written GGUF file is the model: decoded again, and, where llama.cpp is at hand, run.

First every tensor is read back and compared with the checkpoint: all codes, the scale, and every other value after the
one rounding that its type means. Then llama.cpp and this library's decoder read the same tokens, and their next-token
log-probabilities are compared. llama.cpp quantizes activations by blocks of a row and not by token, so the decoder does
the same here; what is left are float sums in another order and, now and then, an activation that rounds the other way.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

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

LARGEST_DIFFERENCE = {"F32": 0.01, "F16": 0.1, "BF16": 1.0}
"""Bound on a log-probability's difference for types without quantized activations."""

LARGEST_DIVERGENCE = 0.02
"""Bound on KL(decoder || llama.cpp) in nats, for every type. Two faithful int8 engines stay far below; a wrong row order,
activation or epsilon goes far beyond."""

_Q8_K, _Q8_0 = 256, 32
_ACTIVATION_BLOCKS = {"TQ1_0": _Q8_K, "TQ2_0": _Q8_K, "Q2_0": 64, "Q4_0": _Q8_0, "Q8_0": _Q8_0}
"""Weight type -> activations that share a scale in llama.cpp."""

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


def verify(path: Path, artifact: Artifact, plan: ExportPlan, source: TensorSource) -> Verification:
    """Compare a written file with its checkpoint.

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
    skipped = _why_not_run(artifact, plan)
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
        EngineError: llama.cpp does not load the file.
    """
    from wrinklefree.serving.engine.llama_cpp import LlamaCppEngine
    from wrinklefree.serving.engine.protocol import Sampling

    ids = tokenizer.encode(PROBE_TEXT)
    lengths = sorted({min(length, len(ids)) for length in PROBE_LENGTHS})
    ours = reference_logits(model, ids[: lengths[-1]], plan).log_softmax(-1)
    engine = LlamaCppEngine(path, tokenizer, name=path.stem, context_length=max(lengths) + 8, slots=1, threads=1)
    try:
        differences: list[Tensor] = []
        divergence, same = 0.0, 0
        for length in lengths:
            [token] = engine.stream(
                ids[:length], Sampling(max_tokens=1, temperature=0, logprobs=model.architecture.vocab_size)
            )
            indices = torch.tensor([index for index, _ in token.alternatives])
            theirs = torch.tensor([logprob for _, logprob in token.alternatives])
            mine = ours[length - 1][indices]
            differences.append((mine - theirs).abs())
            divergence = max(divergence, float((mine.exp() * (mine - theirs)).sum()))
            same += int(token.id == int(ours[length - 1].argmax()))
    finally:
        engine.close()
    everything = torch.cat(differences)
    return RuntimeComparison(len(lengths), float(everything.max()), float(everything.mean()), divergence, same)


@torch.no_grad()
def reference_logits(model: CausalLM, ids: list[int], plan: ExportPlan) -> Tensor:
    """Logits [T, V] of the decoder with the file's roundings and llama.cpp's activation blocks."""
    set_quantization(model, 1.0)
    weight_type = plan.weight_format.name
    block = _ACTIVATION_BLOCKS.get(weight_type)
    for module in model.modules():
        if isinstance(module, BitLinear):
            ternary = ternarize(module.weight)
            module.weight.copy_(latent_weight(ternary.codes, _stored_scale(plan.weight_format, float(ternary.scale))))
            module.activation_bits = None
        elif isinstance(module, nn.Embedding) or module is model.lm_head:
            weight = module.weight
            assert isinstance(weight, Tensor)
            weight.copy_(_rounded(weight, plan.table_type.name))
        elif isinstance(module, nn.Linear):
            module.weight.copy_(_rounded(module.weight, weight_type))
    row = torch.tensor([ids])
    batch = Batch(row, torch.full_like(row, IGNORE), torch.arange(len(ids))[None], torch.ones_like(row))
    with _quantized_inputs(model, block):
        output = model(batch)
    hidden = output.hidden[0]
    if plan.table_type.name in _ACTIVATION_BLOCKS:
        hidden = quantize_blocks(hidden, _ACTIVATION_BLOCKS[plan.table_type.name])
    return hidden @ output.head_weight.T


def quantize_blocks(x: Tensor, block: int) -> Tensor:
    """Activations rounded to 8 bits by blocks of a row, each with its own scale, as ggml's dot products do."""
    width = x.shape[-1]
    padded = nn.functional.pad(x, (0, -width % block))
    blocks = padded.unflatten(-1, (-1, block))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 0, blocks / scale, torch.zeros_like(blocks)).round()
    return (codes * scale).flatten(-2)[..., :width]


@contextmanager
def _quantized_inputs(model: CausalLM, block: int | None) -> Iterator[None]:
    """Let every BitLinear see its input rounded by blocks."""

    def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert block is not None
        return (quantize_blocks(inputs[0], block), *inputs[1:])

    handles = []
    if block is not None:
        layers = [module for module in model.modules() if isinstance(module, BitLinear)]
        handles = [layer.register_forward_pre_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    if importlib.util.find_spec("xllamacpp") is None:
        return "the package xllamacpp is not installed"
    parameters = (artifact.folder / "model.safetensors").stat().st_size  # at least two bytes each
    needed = 4 * parameters
    available = psutil.virtual_memory().available
    if needed > _MEMORY_SHARE * available:
        return f"running the model takes about {format_size(needed)}, {format_size(available)} are available"
    return None


def _check_runtime(path: Path, plan: ExportPlan, found: RuntimeComparison) -> None:
    bound = LARGEST_DIFFERENCE.get(plan.weight_format.name, np.inf)
    if found.largest_difference > bound or not found.divergence <= LARGEST_DIVERGENCE:
        raise CheckpointError(
            f"{path} gives other answers in llama.cpp than the checkpoint here: log-probabilities differ by up to "
            f"{found.largest_difference:.3g} (KL {found.divergence:.3g} nats); please report it, and use "
            "--target wrinklefree meanwhile"
        )
