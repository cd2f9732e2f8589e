"""Build hook: compile the CPU engine into the wheel, or say in one line why not and go on without.

Every instruction set is inside and chosen at run time, so one wheel serves all CPUs of a platform. The compiler is $CC if
set, else zig (a requirement of the build only, so that nobody needs a compiler of their own), else cc, gcc or clang.
WRINKLEFREE_BUILD_ENGINE=0 leaves the engine and the requirement out.
"""

import importlib.util
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src") / "wrinklefree" / "native"
ZIG = "ziglang==0.17.1"
"""Exactly one version, as no lock file holds the requirements of a build."""
ASKING_SECONDS = 60.0


class EngineBuildHook(BuildHookInterface):
    """Adds the shared library to wheels, editable ones included."""

    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        """Zig, unless another compiler was named, no engine is wanted, or zig cannot be had."""
        if os.environ.get("CC") or not _wanted() or not _can_be_had(ZIG):
            return []
        return [ZIG]

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile next to the sources; hatch picks the library up as an artifact."""
        if self.target_name != "wheel":
            return
        build = _load_build_module(Path(self.root) / NATIVE / "build.py")
        library = Path(self.root) / NATIVE / build.LIBRARY_NAME
        library.unlink(missing_ok=True)
        if not _wanted():
            self.app.display_warning("wrinklefree: built without the CPU engine, as WRINKLEFREE_BUILD_ENGINE=0 says")
            return
        try:
            with tempfile.TemporaryDirectory() as cache:
                compiler = build.find_compiler()
                variables = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache}
                build.compile_library(library, compiler, environment=os.environ | variables)
        except (build.BuildError, OSError) as error:
            self.app.display_warning(f"wrinklefree: built without the CPU engine ({error}); other engines work")
            return
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{_platform_tag(with_zig='ziglang' in compiler)}"


def _wanted() -> bool:
    return os.environ.get("WRINKLEFREE_BUILD_ENGINE", "1") != "0"


def _can_be_had(requirement: str) -> bool:
    """Whether the installer finds a wheel of a requirement: one that it does not find would end the installation.

    uv tells its children where it is, and is asked first for what it keeps, then for what the network has. An installer
    that cannot be asked is expected to find it.
    """
    uv = os.environ.get("UV")
    if not uv:
        return True
    command = [uv, "pip", "compile", "--quiet", "--no-deps", "--only-binary", ":all:", "--python", sys.executable, "-"]
    impatient = {"UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}
    for more in (["--offline"], []):
        try:
            subprocess.run(
                [*command, *more], input=requirement, text=True, capture_output=True, check=True,
                timeout=ASKING_SECONDS, env=impatient | os.environ,
            )  # fmt: skip
        except (OSError, subprocess.SubprocessError):
            continue
        return True
    return False


def _platform_tag(*, with_zig: bool) -> str:
    machine = platform.machine()
    if platform.system() == "Darwin":
        return f"macosx_11_0_{machine}"
    # Zig links against glibc 2.17, whatever this machine has; another compiler against what is here.
    return f"{'manylinux2014' if with_zig else 'linux'}_{machine}"


def _load_build_module(path: Path) -> ModuleType:
    """The package's own build module: the package is not installed yet."""
    spec = importlib.util.spec_from_file_location("wrinklefree_native_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
