"""Whether the CPU engine computes what was trained: its logits against the PyTorch student's, on real text.

    uv run python -m benchmark.engine_parity outputs/checkpoint-final --tokens 12000
    uv run python -m benchmark.engine_parity outputs/checkpoint-final --tokens 12000 --blocks

The text is the language reference that Python carries with it. The same text goes through the PyTorch model at lambda = 1 in
windows of 256 tokens, and through the engine with each precision of head and cache. A token whose two best logits are closer
than 0.02 is a near-tie. The first row is the yardstick: a value that two correct programs compute with other last bits may
round to another activation code, and a model amplifies that; PyTorch differs from itself on other vector instructions.
`--blocks` takes the amplification away: every block alone, on the hidden states that PyTorch's own block read.
"""

import argparse
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from benchmark import engine_blocks
from benchmark.engine_blocks import WINDOW
from wrinklefree.models.artifact import Artifact, read_artifact, resolve_artifact
from wrinklefree.models.bitlinear import set_products, set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.serving.engine.native.model import CacheType, HeadType, NativeModel, NativeOptions, PackedModel

NEAR_TIE = 0.02
PRECISIONS: tuple[tuple[HeadType, CacheType], ...] = (
    ("f32", "f32"), ("f16", "f16"), ("int8", "f32"), ("int8", "f16"), ("int8", "int8"), ("int4", "f16"),
)  # fmt: skip


@torch.inference_mode()
def reference(model: CausalLM, ids: list[int]) -> NDArray[np.float32]:
    """Logits [T, V] of one window."""
    row = torch.tensor([ids])
    return model(Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))).logits()[0].numpy()


def other_instructions() -> str:
    """What PyTorch is held to for the yardstick: AVX2, or no vectors where AVX2 is what it has."""
    return "avx2" if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else "default"


def on_other_instructions(artifact: Path, arguments: Sequence[str]) -> NDArray[np.float32]:
    """What `--save` writes when PyTorch is held to other vector instructions: other widths, other last bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.npy"
        command = [sys.executable, "-m", "benchmark.engine_parity", str(artifact), *arguments, "--save", str(path)]
        subprocess.run(command, check=True, env=os.environ | {"ATEN_CPU_CAPABILITY": other_instructions()})
        return np.load(path)


class Comparison:
    """What one precision's logits had to do with PyTorch's, window by window."""

    def __init__(self) -> None:
        self.tokens = self.agree = self.clear = self.clear_agree = 0
        self.errors: list[NDArray[np.float32]] = []
        self.losses: list[float] = []

    def add(self, found: NDArray[np.float32], expected: NDArray[np.float32], ids: list[int]) -> None:
        """One window."""
        ordered = np.sort(np.partition(expected, -2, axis=1)[:, -2:], axis=1)
        clear = ordered[:, 1] - ordered[:, 0] >= NEAR_TIE
        same = found.argmax(axis=1) == expected.argmax(axis=1)
        self.tokens += len(ids)
        self.agree += int(same.sum())
        self.clear += int(clear.sum())
        self.clear_agree += int(same[clear].sum())
        self.errors.append(np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1))
        self.losses.append(cross_entropy(found, ids))

    def row(self, label: str) -> str:
        """A row of the table."""
        errors = np.concatenate(self.errors)
        perplexity = np.exp(sum(self.losses) / (self.tokens - len(self.losses)))
        return (
            f"| {label} | {self.tokens} | {100 * self.agree / self.tokens:.3f} % | {self.clear - self.clear_agree} of "
            f"{self.clear} | {np.median(errors):.1e} | {errors.mean():.1e} | {errors.max():.1e} | {perplexity:.4f} |"
        )


def cross_entropy(logits: NDArray[np.float32], ids: list[int]) -> float:
    """Sum over the window's next tokens, in nats."""
    values = torch.from_numpy(logits[:-1]).double()
    return float(torch.nn.functional.cross_entropy(values, torch.tensor(ids[1:]), reduction="sum"))


def read_text(artifact: Artifact, tokens: int) -> list[list[int]]:
    """The text's first tokens, in windows."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = artifact.load_tokenizer().encode(text[: 10 * tokens])[:tokens]
    return [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]


def compare_logits(model: CausalLM, windows: list[list[int]], folder: Path) -> None:
    """Print the table of the whole model."""
    count = sum(map(len, windows))
    expected = [reference(model, window) for window in windows]
    loss = sum(cross_entropy(logits, window) for logits, window in zip(expected, windows, strict=True))
    sys.stdout.write(
        "| head, cache | tokens | same best token | differ, near-ties aside | median relative error | mean | largest | "
        f"perplexity (PyTorch {np.exp(loss / (count - len(windows))):.4f}) |\n|---|---|---|---|---|---|---|---|\n"
    )
    itself = Comparison()
    others = np.split(on_other_instructions(folder, ["--tokens", str(count)]), _ends(windows))
    for window, found, logits in zip(windows, others, expected, strict=True):
        itself.add(found, logits, window)
    sys.stdout.write(itself.row(f"PyTorch itself, held to {other_instructions()}") + "\n")
    for head, cache in PRECISIONS:
        native = NativeModel(PackedModel.from_model(model, head), NativeOptions(WINDOW, max_tokens=WINDOW, cache=cache))
        comparison = Comparison()
        for window, logits in zip(windows, expected, strict=True):
            comparison.add(native.logits(window), logits, window)
        sys.stdout.write(comparison.row(f"{head}, {cache}") + "\n")
        sys.stdout.flush()


def compare_blocks(model: CausalLM, windows: list[list[int]], folder: Path) -> None:
    """Print the table of the blocks, each alone."""
    states = [engine_blocks.hidden_states(model, window) for window in windows]
    sys.stdout.write(engine_blocks.HEADER + "\n")
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "states.npy"
        np.save(path, np.concatenate(states, axis=1))
        saved = on_other_instructions(folder, ["--tokens", str(sum(map(len, windows))), "--states", str(path)])
    itself = engine_blocks.errors(states, np.split(saved, _ends(windows), axis=1))
    label = f"PyTorch itself, held to {other_instructions()}"
    sys.stdout.write("\n".join(engine_blocks.rows(label, itself)) + "\n")
    sys.stdout.flush()
    sys.stdout.write("\n".join(engine_blocks.rows("the engine", engine_blocks.engine_errors(model, states))) + "\n")


def _ends(windows: list[list[int]]) -> NDArray[np.int64]:
    return np.cumsum([len(window) for window in windows])[:-1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=12000)
    parser.add_argument("--blocks", action="store_true", help="compare every block alone, not the whole model")
    parser.add_argument("--save", type=Path, default=None, help="write what PyTorch computes to this file and stop")
    parser.add_argument("--states", type=Path, default=None, help="with --save: hidden states that the blocks read")
    given = parser.parse_args(arguments)
    artifact = read_artifact(resolve_artifact(given.artifact))
    model = artifact.load_model().eval()
    set_quantization(model, 1.0)
    set_products(model, "float", "exact")  # with the engine's kernels it would be compared with itself
    set_subln_strength(model, 1.0)
    windows = read_text(artifact, given.tokens)
    if given.save is not None and given.states is not None:
        states = np.split(np.load(given.states), _ends(windows), axis=1)
        np.save(given.save, np.concatenate([engine_blocks.torch_outputs(model, part) for part in states], axis=1))
    elif given.save is not None:
        np.save(given.save, np.concatenate([reference(model, window) for window in windows]))
    elif given.blocks:
        compare_blocks(model, windows, given.artifact)
    else:
        compare_logits(model, windows, given.artifact)
    return 0


if __name__ == "__main__":
    sys.exit(main())
