"""The build hook: what it asks for, what it does without a compiler, and real builds with each."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NATIVE = Path("src") / "wrinklefree" / "native"
ZIG = ["ziglang==0.17.1"]


class Hook:
    """What the build system's base class gives a hook."""

    def __init__(self, root: Path, target_name: str) -> None:
        self.root, self.target_name = str(root), target_name
        self.warnings: list[str] = []
        self.app = SimpleNamespace(display_warning=self.warnings.append)


@pytest.fixture
def hook_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The hook, loaded without the build system, which is no part of an environment."""
    interface = ModuleType("hatchling.builders.hooks.plugin.interface")
    interface.BuildHookInterface = Hook  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, interface.__name__, interface)
    for name in ("CC", "UV", "WRINKLEFREE_BUILD_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder with the sources that the hook compiles."""
    shutil.copytree(ROOT / NATIVE, tmp_path / NATIVE, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return tmp_path


def installer(folder: Path, answer: str) -> str:
    """A stand-in for uv that answers what the hook asks."""
    path = folder / "uv"
    path.write_text(f"#!/bin/sh\n{answer}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("exit 0", ZIG),
        ("exit 1", []),
        ('case "$*" in *--offline*) exit 1;; esac; exit 0', ZIG),  # only the network has it
        ('case "$*" in *--offline*) exit 0;; esac; exit 1', ZIG),  # only the installer's cache has it
        ('grep -qx "ziglang==0.17.1"', ZIG),
    ],
)
def test_zig_is_required_where_it_can_be_had(
    hook_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, expected: list[str]
) -> None:
    monkeypatch.setenv("UV", installer(tmp_path, answer))
    assert hook_module.EngineBuildHook(tmp_path, "wheel").dependencies() == expected


def test_an_installer_that_cannot_be_asked_gets_the_requirement(hook_module: ModuleType, tmp_path: Path) -> None:
    assert hook_module.EngineBuildHook(tmp_path, "wheel").dependencies() == ZIG


@pytest.mark.parametrize(("name", "value"), [("CC", "gcc"), ("WRINKLEFREE_BUILD_ENGINE", "0")])
def test_zig_is_not_required_when_it_is_not_used(
    hook_module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    assert hook_module.EngineBuildHook(tmp_path, "wheel").dependencies() == []


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"CC": "no-such-cc"}, "built without the CPU engine (cannot start no-such-cc: No such file or directory)"),
        ({"CC": "false"}, "built without the CPU engine (false failed: ?)"),
        ({"WRINKLEFREE_BUILD_ENGINE": "0"}, "built without the CPU engine, as WRINKLEFREE_BUILD_ENGINE=0 says"),
    ],
)
def test_a_build_without_the_engine_says_so_and_goes_on(
    hook_module: ModuleType,
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    line: str,
) -> None:
    (project / NATIVE / "libwrinklefree.so").write_bytes(b"of an earlier build")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    hook, data = hook_module.EngineBuildHook(project, "wheel"), dict[str, Any]()
    hook.initialize("standard", data)
    assert data == {}
    assert len(hook.warnings) == 1
    assert line in hook.warnings[0]
    assert "\n" not in hook.warnings[0]
    assert list((project / NATIVE).glob("*.so*")) == []


def test_a_compiled_library_makes_the_wheel_one_of_this_platform(
    hook_module: ModuleType, project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwhile [ "$1" != "-o" ]; do shift; done\necho made > "$2"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(hook_module.platform, "system", lambda: "Linux")
    monkeypatch.setattr(hook_module.platform, "machine", lambda: "aarch64")
    hook, data = hook_module.EngineBuildHook(project, "wheel"), dict[str, Any]()
    hook.initialize("editable", data)
    assert data == {"pure_python": False, "tag": "py3-none-linux_aarch64"}
    assert (project / NATIVE / "libwrinklefree.so").read_text() == "made\n"
    assert hook_module._platform_tag(with_zig=True) == "manylinux2014_aarch64"
    assert hook.warnings == []


def test_a_source_distribution_holds_no_library(hook_module: ModuleType, project: Path) -> None:
    hook_module.EngineBuildHook(project, "sdist").initialize("standard", {})
    assert list((project / NATIVE).glob("*.so")) == []


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what an installation reads."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("src", "configs", "extern/cheapertraining"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE", "uv.lock"):
        shutil.copy2(ROOT / name, folder / name)
    return folder


def install(checkout: Path, folder: Path, variables: dict[str, str], *, network: bool = True) -> tuple[str, Path]:
    """Editable, as `uv sync` installs it; the log, and where the library should be then."""
    uv = shutil.which("uv")
    assert uv is not None
    # A PATH without compilers, unless one is named.
    environment = {name: value for name, value in os.environ.items() if name not in ("CC", "WRINKLEFREE_BUILD_ENGINE")}
    environment |= variables if "CC" in variables else {"PATH": str(folder), **variables}
    command = [uv, "pip", "install", "-v", "--no-deps", "--target", str(folder / "site"), "--python", sys.executable]
    command += ["--reinstall", "--editable", str(checkout)]
    if not network:
        command = ["/usr/bin/unshare", "-rn", *command, "--offline"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=checkout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, checkout / NATIVE / "libwrinklefree.so"


def loaded(checkout: Path) -> str:
    """The library that this checkout's package loads."""
    program = "from wrinklefree.native.library import load_library; print(load_library()._name)"
    environment = {**os.environ, "PYTHONPATH": str(checkout / "src"), "CC": "no-such-cc"}
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


needs_uv = pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
@needs_uv
def test_an_installation_without_any_compiler_has_the_engine(checkout: Path, tmp_path: Path) -> None:
    _, library = install(checkout, tmp_path, {})
    assert b"clang version" in library.read_bytes()
    assert loaded(checkout) == str(library)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
@needs_uv
def test_an_installation_with_cc_needs_no_zig(checkout: Path, tmp_path: Path) -> None:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("needs gcc or cc")
    log, library = install(checkout, tmp_path, {"CC": compiler})
    assert "ziglang" not in log
    assert loaded(checkout) == str(library)


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.timeout(900)
@needs_uv
def test_an_installation_with_neither_compiler_nor_network_goes_on_without_the_engine(
    checkout: Path, tmp_path: Path
) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], check=False).returncode:
        pytest.skip("needs unshare, to take the network away")
    cache = {"UV_CACHE_DIR": str(tmp_path / "cache")}
    install(checkout, tmp_path, cache | {"WRINKLEFREE_BUILD_ENGINE": "0"})  # the build system, and no zig, in the cache
    log, library = install(checkout, tmp_path, cache, network=False)
    assert "built without the CPU engine (found no C compiler: no ziglang package, no cc, gcc or clang on PATH" in log
    assert not library.exists()
