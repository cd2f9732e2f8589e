"""A command that is killed, and typed again until it completes, writes what it would have written undisturbed."""

import hashlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STEPS = 36
WORDS = ("the", "a", "old", "new", "red", "sea", "ship", "wind", "sails", "turns", "sleeps", "harbour", "lamp", "river")
pytestmark = [pytest.mark.reliability, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Generated sentences: enough variety for a vocabulary and a held-out split."""
    generator = random.Random(7)
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(200):
        sentences = [" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(8)]
        (folder / f"{number}.txt").write_text(". ".join(sentences) + ".\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def frozen_source(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The commands run a copy of the source: a file edited meanwhile would, rightly, make the next run another run."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("src", "configs", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(copy / "src"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("MKL_NUM_THREADS", "1")
        patch.chdir(copy)
        yield


def command(corpus: Path, output: Path) -> list[str]:
    return [
        sys.executable,
        "scripts/train.py",
        "model=tiny",
        "training=fp_pretrain",
        "training.from_scratch=true",
        "data=local",
        f"data.sources=[{{kind: local, path: '{corpus}'}}]",
        "model.architecture.vocab_size=288",
        "model.architecture.hidden_size=64",
        "model.architecture.intermediate_size=128",
        "model.architecture.num_hidden_layers=2",
        "model.architecture.num_attention_heads=4",
        "model.architecture.num_key_value_heads=2",
        "model.architecture.head_dim=16",
        "training.max_seq_length=64",
        "training.batch_size=8",
        "training.gradient_accumulation_steps=2",
        f"training.max_steps={STEPS}",
        "training.checkpoint.save_interval=3",
        "training.evaluation.interval=10",
        "training.evaluation.max_tokens=500",
        "audit.enabled=false",
        f"output_dir={output}",
    ]


def start(corpus: Path, output: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(command(corpus, output), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(corpus: Path, output: Path) -> str:
    process = start(corpus, output)
    log, _ = process.communicate(timeout=800)
    assert process.returncode == 0, log
    return log


def weights(output: Path) -> str:
    pointer = output / "bitdistill_tiny_fp_pretrain" / "checkpoint"
    return hashlib.sha256((pointer / "model.safetensors").read_bytes()).hexdigest()


def saved_steps(output: Path) -> set[str]:
    # No recursion into a folder that the run may rename meanwhile.
    return {path.name for path in output.glob("*/runs/*/checkpoints/step_*") if "tmp" not in path.name}


def end_after_new_checkpoint(corpus: Path, output: Path, sign: signal.Signals, delay: float) -> int | None:
    """Send `sign` some time after the next checkpoint appears; the exit code, or None if the run was faster."""
    before = saved_steps(output)
    process = start(corpus, output)
    deadline = time.monotonic() + 600
    try:
        while process.poll() is None and not saved_steps(output) - before:
            assert time.monotonic() < deadline, "no checkpoint within 600 s"
            time.sleep(0.005)
        time.sleep(delay)
        if process.poll() is not None:
            return None
        process.send_signal(sign)
        process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
    return process.returncode


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    output = tmp_path_factory.mktemp("undisturbed")
    finish(corpus, output)
    return weights(output)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_four_kills_change_no_weight(
    seed: int, corpus: Path, undisturbed: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    generator = random.Random(seed)
    kills = 0
    for _ in range(8):
        if kills == 4:
            break
        kills += (
            end_after_new_checkpoint(corpus, tmp_path, signal.SIGKILL, generator.uniform(0, 0.3)) == -signal.SIGKILL
        )
    assert kills == 4, f"every run of seed {seed} ended before its kill"
    finish(corpus, tmp_path)
    assert weights(tmp_path) == undisturbed, f"seed {seed}"
    assert "complete" in finish(corpus, tmp_path), "a completed run is skipped"
    record_property("sigkills", kills)


def test_terminated_run_saves_and_resumes(corpus: Path, undisturbed: str, tmp_path: Path) -> None:
    code = end_after_new_checkpoint(corpus, tmp_path, signal.SIGTERM, delay=0.0)
    assert code == 128 + signal.SIGTERM
    assert saved_steps(tmp_path)
    [page] = tmp_path.rglob("report.html")
    assert "the same command resumes it" in page.read_text(encoding="utf-8")
    finish(corpus, tmp_path)
    assert weights(tmp_path) == undisturbed
    assert "the same command resumes it" not in page.read_text(encoding="utf-8")


def test_damaged_newest_checkpoint_is_passed_over(corpus: Path, undisturbed: str, tmp_path: Path) -> None:
    for _ in range(2):
        end_after_new_checkpoint(corpus, tmp_path, signal.SIGKILL, delay=0.05)
    folders = sorted(tmp_path.glob("**/step_*"), key=lambda path: int(path.name.removeprefix("step_")))
    assert len(folders) >= 2
    largest = max(folders[-1].glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    finish(corpus, tmp_path)
    assert weights(tmp_path) == undisturbed
