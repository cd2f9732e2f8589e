"""What an export to GGUF keeps, weighs and costs: tables for the documentation.

    uv run python -m benchmark.export_table --shapes                    lossless? every type, five shapes, random weights
    uv run python -m benchmark.export_table --artifact FOLDER           sizes, and logits in llama.cpp, of one model
    uv run python -m benchmark.export_table --perplexity FOLDER         perplexity in llama.cpp beside PyTorch's
    uv run python -m benchmark.export_table --memory qwen3_4b           peak anonymous memory of converting that size

Logits are compared over whole texts, with a float32 key-value cache. Every table is Markdown.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics

import torch
from torch import Tensor

import wrinklefree
from benchmark.llama_cpp_library import LlamaCpp
from wrinklefree.composition import compose
from wrinklefree.models.artifact import CONFIG, LINEAGE, WEIGHTS, Artifact, read_artifact
from wrinklefree.models.config import Architecture, BitNetSpec, Placement
from wrinklefree.models.gguf_weights import load_gguf_model
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.padding import plan_padding
from wrinklefree.serving.converter import WEIGHT_TYPES, ConversionOptions, convert, file_metadata, make_plan
from wrinklefree.serving.export_plan import ExportPlan, TensorSource
from wrinklefree.serving.gguf_writer import TensorPlan, write_gguf
from wrinklefree.serving.runtime_probe import ask_llama_cpp
from wrinklefree.serving.verification import ACTIVATION_BLOCKS, Activations, logits_with_activations, round_as_stored
from wrinklefree.utils.checkpoint import TensorEntry, stream_tensors
from wrinklefree.utils.errors import ConfigError
from wrinklefree.utils.manifest import write_manifest
from wrinklefree.utils.storage import format_size
from wrinklefree.utils.tokenizer import TextTokenizer

TINY = Path(wrinklefree.__file__).parent / "assets" / "tiny"
SHAPES: dict[str, tuple[str, dict[str, object], Placement]] = {
    "tiny, SubLN": ("tiny", {}, "output"),
    "SmolLM2-135M, SubLN": ("smollm2_135m", {}, "output"),
    "Qwen2.5 (1024 wide), biases": (
        "qwen_7b",
        {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 8, "num_key_value_heads": 2},
        "none",
    ),
    "Qwen3-0.6B, SubLN": ("qwen3_0_6b", {}, "output"),
    "tiny, SubLN, ReLU²": ("tiny", {"hidden_act": "relu2"}, "output"),
}
"""Name -> model config, changes of its architecture, placement; four blocks of each."""

_LINES = 1000
_WINDOW = 256


def show(text: str) -> None:
    """A line of the table, at once."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def header(*columns: str) -> None:
    """The first lines of a table."""
    show(f"| {' | '.join(columns)} |")
    show("|" + "---|" * len(columns))


def random_artifact(folder: Path, architecture: Architecture, placement: Placement) -> Artifact:
    """A ternary model of random weights, made one tensor at a time in bf16, with the tiny model's tokenizer."""
    spec = BitNetSpec(placement=placement, gain="ones", quantization_lambda=1.0)
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in CausalLM(architecture, spec).named_parameters()}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.05

    def load(name: str) -> Tensor:
        shape = shapes[name]
        count = int(torch.tensor(shape).prod())
        start = zlib.crc32(name.encode()) % len(noise)
        values = torch.roll(noise, start).repeat(-(-count // len(noise)))[:count].reshape(shape)
        return values.abs() + 0.5 if name.endswith("norm.weight") else values

    folder.mkdir(parents=True)
    entries = [TensorEntry(name, torch.bfloat16, shape) for name, shape in shapes.items()]
    digest = stream_tensors(folder / WEIGHTS, entries, load)
    config = {"architecture": architecture.model_dump(), "bitnet": spec.model_dump()}
    (folder / CONFIG).write_text(json.dumps(config))
    (folder / LINEAGE).write_text(json.dumps({"stage": "random"}))
    TextTokenizer.from_folder(TINY).save(folder)
    write_manifest(folder, {"kind": "artifact"}, digests={WEIGHTS: digest})
    return read_artifact(folder)


def lossless_table(folder: Path) -> None:
    """Every type for every shape: what `convert` found when it read the file back; tokens of real lines in llama.cpp."""
    header("shape", "type", "file's architecture", "codes", "equal", "largest scale error", "padding", "linear weights")
    for name, (model, changes, placement) in SHAPES.items():
        base = compose([f"model={model}"]).config.model.architecture
        architecture = base.model_copy(update={"num_hidden_layers": 4, "vocab_size": 4096, **changes})
        artifact = random_artifact(folder / model / str(len(changes)), architecture, placement)
        for weight_type in ("TQ2_0", "TQ1_0", "Q2_0", "Q4_0", "I2_S"):
            made = convert(ConversionOptions(artifact.folder, folder / "m.gguf", weight_type=weight_type, run=False))
            assert made.verification is not None
            found = made.verification
            show(
                f"| {name} | {weight_type} | {made.row.name} ({made.row.target}) | {found.codes} | 100% | "
                f"{found.largest_scale_error:.1e} | {'none' if made.padding.is_none else made.padding.hidden_size} | "
                f"{format_size(made.projection_bytes)} |"
            )


def artifact_table(artifact: Artifact, folder: Path, text: str) -> None:
    """Sizes of every type, tokens of real lines, and logits in llama.cpp."""
    tokenizer = artifact.load_tokenizer()
    ids = tokenizer.encode(text)[:_WINDOW]
    header(
        "type", "linear weights", "of F16", "file", "of F16", "padding", "largest / mean logit difference", "same top-1"
    )
    made = None
    for weight_type in WEIGHT_TYPES:
        options = ConversionOptions(artifact.folder, folder / "m.gguf", weight_type=weight_type, run=False)
        try:
            made = convert(options)
        except ConfigError as refusal:
            show(f"| {weight_type} | - | - | - | - | - | {refusal} | - |")
            continue
        row = (
            f"| {weight_type} | {format_size(made.projection_bytes)} | "
            f"{made.projection_bytes / made.projection_bytes_f16:.3f} | {format_size(made.file_bytes)} | "
            f"{made.file_bytes / made.file_bytes_f16:.3f} | {'no' if made.padding.is_none else 'yes'} | "
        )
        plan = make_plan(artifact.architecture, artifact.bitnet, options)
        show(row + (compared(made.path, artifact, plan, ids) if made.row.target == "llama.cpp" else "- | - |"))
    if artifact.bitnet is not None:
        padded_row(artifact, folder, ids)
    if made is not None and made.row.target == "llama.cpp":
        lines = [line for line in text.splitlines() if line.strip()][:_LINES]
        answer = ask_llama_cpp(
            made.path,
            [ids[:4]],
            lines,
            vocab_size=artifact.architecture.vocab_size,
            plain_token=tokenizer.encode("a")[0],
        )
        same = sum(a == b for a, b in zip(answer.tokens, tokenizer.encode_batch(lines), strict=True))
        show(f"\n{same} of {len(lines)} lines have the same tokens in llama.cpp and in the Hugging Face tokenizer.")


def padded_row(artifact: Artifact, folder: Path, ids: list[int]) -> None:
    """A float32 twin that was padded as TQ2_0 would be, against the unpadded model."""
    assert artifact.bitnet is not None
    options = ConversionOptions(artifact.folder, folder / "padded.gguf", weight_type="F32")
    plan = make_plan(artifact.architecture, artifact.bitnet, options)
    padding = plan_padding(artifact.architecture, artifact.bitnet.placement, 256, square=plan.row.square)
    if padding.is_none or plan.row.target != "llama.cpp":
        return
    plan = replace(plan, padding=padding)
    tensors = list(plan.tensors(TensorSource(artifact.folder / WEIGHTS)))
    metadata = file_metadata(artifact, plan, options)
    write_gguf(options.output, metadata, [TensorPlan(t.stored, t.shape, t.type, t.produce) for t in tensors])
    show(f"| F32, padded | - | - | - | - | yes | {compared(options.output, artifact, plan, ids)}")
    model, loaded = artifact.load_model().eval(), load_gguf_model(options.output)[0].eval()
    ours, theirs = (logits_with_activations(m, ids, "none", head_block=None) for m in (model, loaded))
    show(f"| F32, padded, read back | - | - | - | - | yes | {float((ours - theirs).abs().max()):.2g} | - |")


def compared(path: Path, artifact: Artifact, plan: ExportPlan, ids: list[int]) -> str:
    """Logits of llama.cpp against the decoder with the same activation blocks, over all positions."""
    model = artifact.load_model().eval()
    round_as_stored(model, plan)
    block: Activations = ACTIVATION_BLOCKS.get(plan.weight_format.name, "none")
    ours = logits_with_activations(model, ids, block, head_block=ACTIVATION_BLOCKS.get(plan.table_type.name))
    with closing(LlamaCpp(path, context=len(ids))) as runtime:
        theirs = torch.from_numpy(runtime.logits(ids))
    difference = (ours - theirs).abs()
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return f"{float(difference.max()):.2g} / {float(difference.mean()):.2g} | {same:.1%} |"


def perplexity_table(artifact: Artifact, folder: Path, text: str, count: int) -> None:
    """Perplexity of the same windows: PyTorch as trained, and llama.cpp with each ternary type."""
    tokenizer = artifact.load_tokenizer()
    ids = tokenizer.encode(text)[:count]
    windows = [ids[start : start + _WINDOW] for start in range(0, len(ids) - 1, _WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    model = artifact.load_model().eval()
    header("engine", "type", "perplexity", f"tokens (windows of {_WINDOW})", "seconds")
    targets = sum(len(window) - 1 for window in windows)
    started = time.perf_counter()
    trained = perplexity_of(
        windows, (logits_with_activations(model, window, "by_token", head_block=None) for window in windows)
    )
    show(f"| PyTorch | as trained | {trained:.3f} | {targets} | {time.perf_counter() - started:.0f} |")
    for weight_type in ("TQ2_0", "TQ1_0", "Q2_0", "Q4_0", "F16"):
        made = convert(ConversionOptions(artifact.folder, folder / "m.gguf", weight_type=weight_type, run=False))
        if made.row.target != "llama.cpp":
            show(f"| llama.cpp | {weight_type} | does not run {made.row.name} files | - | - |")
            continue
        started = time.perf_counter()
        with closing(LlamaCpp(made.path, context=_WINDOW)) as runtime:
            value = perplexity_of(windows, (torch.from_numpy(runtime.logits(window)) for window in windows))
        show(f"| llama.cpp | {weight_type} | {value:.3f} | {targets} | {time.perf_counter() - started:.0f} |")


def perplexity_of(windows: Sequence[list[int]], logits: Iterator[Tensor]) -> float:
    """The exponential of the mean negative log-likelihood of every token but the first of each window."""
    total, count = 0.0, 0
    for window, values in zip(windows, logits, strict=True):
        logprobs = values[:-1].log_softmax(-1)
        total -= float(logprobs.gather(1, torch.tensor(window[1:])[:, None]).sum(dtype=torch.float64))
        count += len(window) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def memory_table(model: str, folder: Path) -> None:
    """Peak RssAnon of converting a model of random weights, in a process of its own."""
    architecture = compose([f"model={model}"]).config.model.architecture
    started = time.perf_counter()
    artifact = random_artifact(folder / "artifact", architecture, "output")
    largest = architecture.vocab_size * architecture.hidden_size * 4
    show(
        f"{model}: {format_size((artifact.folder / WEIGHTS).stat().st_size)} written in {time.perf_counter() - started:.0f} s"
    )
    header("type", "seconds", "file", "largest tensor in F32", "peak RssAnon", "above the largest tensor")
    for weight_type in ("TQ2_0", "F16"):
        output = folder / "m.gguf"
        command = [sys.executable, "-c", "import sys; from wrinklefree.cli import main; sys.exit(main(sys.argv[1:]))"]
        command += ["convert", "--input", str(artifact.folder), "--output", str(output), "--type", weight_type]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            peak = peak_anonymous_memory(child)
            said = child.stdout.read() if child.stdout is not None else ""
        if child.returncode != 0:
            raise SystemExit(f"the conversion ended with code {child.returncode}")
        above = peak - largest
        show(
            f"| {weight_type} | {time.perf_counter() - started:.0f} | {format_size(output.stat().st_size)} | "
            f"{format_size(largest)} | {format_size(peak)} | {format_size(above) if above > 0 else 'below it'} |"
        )
        show("\n".join(f"    {line}" for line in said.splitlines()))


def peak_anonymous_memory(child: "subprocess.Popen[str]") -> int:
    """Largest RssAnon of a process until it ends, in bytes, looked at every 20 ms."""
    peak = 0
    status = Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            lines = status.read_text().splitlines()
        except OSError:
            break
        peak = max([peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    return peak


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description="tables about the export to GGUF")
    parser.add_argument("--shapes", action="store_true", help="losslessness of every type for five shapes")
    parser.add_argument("--artifact", type=Path, help="sizes and logits of this model")
    parser.add_argument("--perplexity", type=Path, metavar="ARTIFACT", help="perplexity of this model in llama.cpp")
    parser.add_argument(
        "--memory", metavar="MODEL", help="a model config, as qwen3_4b; needs about twice its size on disk"
    )
    parser.add_argument("--text", type=Path, help="text for logits, tokens and perplexity (default: CPython's topics)")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where temporary files go (default: the system's place)")
    arguments = parser.parse_args()
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else "\n".join(topics.values())
    torch.set_grad_enabled(False)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.shapes:
            lossless_table(folder)
        if arguments.artifact:
            artifact_table(read_artifact(arguments.artifact), folder, text)
        if arguments.perplexity:
            perplexity_table(read_artifact(arguments.perplexity), folder, text, arguments.tokens)
        if arguments.memory:
            memory_table(arguments.memory, folder)


if __name__ == "__main__":
    main()
