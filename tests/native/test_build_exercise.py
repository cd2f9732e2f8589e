"""The engine without Python (exercise.c): under sanitizers, and on a processor that an emulator provides.

Random models take random steps, right and wrong ones; the program itself compares instruction sets, schedules and refusals.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from wrinklefree.native.build import FLAGS, SANITIZERS, SOURCES

EXERCISE = Path(__file__).with_name("exercise.c")


def build(compiler: str, output: Path, *flags: str) -> None:
    shared = {"-shared", "-fPIC", "-fvisibility=hidden"}
    command = [compiler, *(flag for flag in FLAGS if flag not in shared), "-DWF_SOURCES=0", f"-I{SOURCES}", *flags]
    sources = [str(EXERCISE), *sorted(str(path) for path in SOURCES.glob("*.c"))]
    done = subprocess.run([*command, *sources, "-o", str(output), "-lm"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "warning" not in done.stderr


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def need(*names: str) -> None:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_no_sanitizer_objects(tmp_path: Path, seed: int) -> None:
    need("gcc")
    build("gcc", tmp_path / "exercise", "-Wall", "-Wextra", *SANITIZERS)
    assert run(str(tmp_path / "exercise"), str(seed), "100").endswith("plain done\n")


@pytest.mark.slow
def test_no_data_race(tmp_path: Path) -> None:
    need("gcc", "setarch")
    build("gcc", tmp_path / "exercise", "-O1", "-g", "-fsanitize=thread")
    # The race detector wants fixed addresses.
    assert run("setarch", "-R", str(tmp_path / "exercise"), "4", "10").endswith("plain done\n")


@pytest.mark.slow
def test_arm(tmp_path: Path) -> None:
    need("aarch64-linux-gnu-gcc", "qemu-aarch64-static")
    build("aarch64-linux-gnu-gcc", tmp_path / "exercise", "-Wall", "-Wextra", "-static")
    assert run("qemu-aarch64-static", str(tmp_path / "exercise"), "5", "40") == "neon-dotprod plain done\n"
