"""Whether the CPU engine computes what was trained: its logits against the PyTorch student's, on real text.

    uv run python -m benchmark.engine_parity outputs/checkpoint-final --tokens 12000

The text is the language reference that Python carries with it. The same text goes through the PyTorch model at lambda = 1 in
windows of 256 tokens, and through the engine with each precision of head and cache. A token whose two best logits are closer
than 0.02 is a near-tie. The first row is the yardstick: a value that two correct programs compute with other last bits may
round to another activation code, and a model amplifies that; PyTorch differs from itself on another CPU.
"""

import argparse
import os
import pydoc_data.topics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from wrinklefree.models.artifact import read_artifact
from wrinklefree.models.bitlinear import set_quantization
from wrinklefree.models.llama import CausalLM
from wrinklefree.models.records import Batch
from wrinklefree.models.subln import set_subln_strength
from wrinklefree.serving.engine.native.model import CacheType, HeadType, NativeModel, NativeOptions, PackedModel

WINDOW = 256
NEAR_TIE = 0.02
PRECISIONS: tuple[tuple[HeadType, CacheType], ...] = (("f32", "f32"), ("f16", "f16"), ("int8", "f32"), ("int8", "f16"))


@torch.inference_mode()
def reference(model: CausalLM, ids: list[int]) -> NDArray[np.float32]:
    """Logits [T, V] of one window."""
    row = torch.tensor([ids])
    return model(Batch(row, row, torch.arange(len(ids))[None], torch.ones_like(row))).logits()[0].numpy()


def on_another_cpu(artifact: Path, tokens: int, count: int) -> list[NDArray[np.float32]]:
    """The PyTorch model's own logits when PyTorch is held to AVX2: other widths, other last bits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "logits.npy"
        command = [sys.executable, "-m", "benchmark.engine_parity", str(artifact), "--tokens", str(tokens)]
        environment = os.environ | {"ATEN_CPU_CAPABILITY": "avx2"}
        subprocess.run([*command, "--save", str(path)], check=True, env=environment)
        return np.array_split(np.load(path), range(WINDOW, tokens, WINDOW))[:count]


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


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--tokens", type=int, default=12000)
    parser.add_argument("--save", type=Path, default=None, help="write PyTorch's logits to this file and stop")
    arguments = parser.parse_args()
    artifact = read_artifact(arguments.artifact)
    model = artifact.load_model().eval()
    set_quantization(model, 1.0)
    set_subln_strength(model, 1.0)
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = artifact.load_tokenizer().encode(text[: 10 * arguments.tokens])[: arguments.tokens]
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids) - 1, WINDOW)]
    expected = [reference(model, window) for window in windows]
    if arguments.save is not None:
        np.save(arguments.save, np.concatenate(expected))
        return
    loss = sum(cross_entropy(logits, window) for logits, window in zip(expected, windows, strict=True))
    sys.stdout.write(
        "| head, cache | tokens | same best token | differ, near-ties aside | median relative error | mean | largest | "
        f"perplexity (PyTorch {np.exp(loss / (len(ids) - len(windows))):.4f}) |\n|---|---|---|---|---|---|---|---|\n"
    )
    itself = Comparison()
    others = on_another_cpu(arguments.artifact, len(ids), len(windows))
    for window, found, logits in zip(windows, others, expected, strict=True):
        itself.add(found, logits, window)
    sys.stdout.write(itself.row("PyTorch itself, held to AVX2") + "\n")
    for head, cache in PRECISIONS:
        native = NativeModel(PackedModel.from_model(model, head), NativeOptions(WINDOW, max_tokens=WINDOW, cache=cache))
        comparison = Comparison()
        for window, logits in zip(windows, expected, strict=True):
            comparison.add(native.logits(window), logits, window)
        sys.stdout.write(comparison.row(f"{head}, {cache}") + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
