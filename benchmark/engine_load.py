"""How long the CPU engine takes to start, and the memory it then holds: the first start packs, later ones read what was kept.

    uv run python -m benchmark.engine_load --models 135m 1b 4b

Each model is written as a GGUF file of ours (TQ2_0 or Q2_0, random weights), then opened in processes of their own with an
empty cache and with what the first one left. Memory is what the process holds beyond an empty one that imported the same
modules: private memory and pages of files that it touched. `copy` is reading the file's bytes once, the least any start does.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil


def open_model(path: str) -> dict[str, float]:
    """Open a model in this process and run one token."""
    from wrinklefree.serving.engine.native.loading import load_packed
    from wrinklefree.serving.engine.native.model import NativeModel, NativeOptions

    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    packed, tokenizer = load_packed(Path(path))
    model = NativeModel(packed, NativeOptions(context_length=512))
    logits = model.step([1], [0], [0], [0])
    seconds = time.perf_counter() - started
    assert logits.shape[1] >= tokenizer.vocab_size
    peak = int(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
    return {"seconds": seconds, "held": process.memory_info().rss - before, "peak": 1024 * peak - before}


def measure(name: str, folder: Path) -> None:
    """Rows of one model."""
    from benchmark.engine_models import write_ours

    path = folder / f"{name}.gguf"
    write_ours(name, path)
    size = path.stat().st_size
    started = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 24)
        while file.readinto(buffer):
            pass
    _row(name, "copy", size, {"seconds": time.perf_counter() - started})
    environment = os.environ | {"WRINKLEFREE_PACKED_CACHE": str(folder / "cache")}
    command = [sys.executable, "-m", "benchmark.engine_load", "--open", str(path)]
    for label in ("first start", "later start", "later start"):
        answer = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
        _row(name, label, size, json.loads(answer.splitlines()[-1]))


def _row(name: str, label: str, size: int, found: dict[str, float]) -> None:
    memory = [f"{found[key] / size:.2f}" if key in found else "" for key in ("held", "peak")]
    sys.stdout.write(f"| {name} | {label} | {size / 1e6:.0f} | {found['seconds']:.2f} | {memory[0]} | {memory[1]} |\n")
    sys.stdout.flush()


def main() -> None:
    """Print a Markdown table, or open one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["135m", "1b"], choices=["135m", "1b", "4b"])
    parser.add_argument("--open")
    arguments = parser.parse_args()
    if arguments.open is not None:
        sys.stdout.write(json.dumps(open_model(arguments.open)) + "\n")
        return
    sys.stdout.write("| model | start | file, MB | seconds | held / file | peak / file |\n|---|---|---|---|---|---|\n")
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            measure(name, Path(folder))


if __name__ == "__main__":
    main()
