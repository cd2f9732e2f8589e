"""Compile the engine's C sources into one shared library.

The wheel's build hook and developers call the same function. Nothing here imports the rest of the package: the hook runs
before it is installed. Every instruction set is compiled into one library and chosen when it runs, so the target is a
plain CPU and never the building machine's.
"""

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "csrc"
LIBRARY_NAME = "libwrinklefree.so"
FLAGS = (
    "-std=gnu11", "-O3", "-g0", "-fPIC", "-shared", "-pthread", "-fvisibility=hidden", "-Wno-psabi",
    # A product and a sum become one instruction only where the source says so: all compilers then give the same bits.
    "-ffp-contract=off",
)  # fmt: skip
SANITIZERS = ("-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
"""What finds errors that tests cannot see; for programs, as Python itself is not built with them."""
ZIG_TARGETS = {
    ("Linux", "x86_64"): "x86_64-linux-gnu.2.17",
    ("Linux", "aarch64"): "aarch64-linux-gnu.2.17",
    ("Darwin", "x86_64"): "x86_64-macos.11.0",
    ("Darwin", "arm64"): "aarch64-macos.11.0",
}


class BuildError(Exception):
    """No compiler, or one that failed; the message is one line."""


def find_compiler(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The command that starts a C compiler: $CC, else zig from the `ziglang` package, else cc, gcc or clang.

    Zig comes before the machine's own compiler because its output does not depend on the machine.

    Raises:
        BuildError: there is none.
    """
    if environment.get("CC"):
        return shlex.split(environment["CC"])
    target = ZIG_TARGETS.get((platform.system(), platform.machine()))
    if target is not None and _has_zig():
        return [sys.executable, "-m", "ziglang", "cc", "-target", target, "-mcpu=baseline"]
    for name in ("cc", "gcc", "clang"):
        if shutil.which(name):
            return [name]
    raise BuildError("found no C compiler: no ziglang package, no cc, gcc or clang on PATH, and CC is not set")


def compile_library(
    output: Path,
    compiler: Sequence[str],
    extra_flags: Sequence[str] = (),
    *,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Compile all sources into `output`, which appears when it is complete.

    Args:
        output: The library.
        compiler: Command that starts the compiler.
        extra_flags: Flags beyond `FLAGS`; the last of two that contradict each other counts.
        environment: Of the compiler; None: this process's.

    Raises:
        BuildError: the compiler is missing or refused; the message ends with its first complaint.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.{os.getpid()}.tmp")
    sources = sorted(str(path) for path in SOURCES.glob("*.c"))
    command = [
        *compiler,
        *FLAGS,
        f"-DWF_SOURCES={source_number()}",
        *extra_flags,
        *sources,
        "-o",
        str(temporary),
        "-lm",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except OSError as error:
        raise BuildError(f"cannot start {compiler[0]}: {error.strerror}") from error
    if done.returncode != 0:
        temporary.unlink(missing_ok=True)
        complaints = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{shlex.join(compiler)} failed: {complaints[0]}")
    temporary.replace(output)


def source_number() -> int:
    """31 bits of a hash of the sources: a library carries it, so that one of other sources is never taken for it."""
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return int.from_bytes(digest.digest()[:4], "little") >> 1


def _has_zig() -> bool:
    from importlib.util import find_spec

    return find_spec("ziglang") is not None
