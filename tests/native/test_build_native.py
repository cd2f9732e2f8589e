"""Which compiler is taken, what a failed build says, and that a library of other sources is not used."""

import ctypes
import platform
import sys
from pathlib import Path

import pytest

from wrinklefree.native import build, library
from wrinklefree.native.build import BuildError, compile_library, find_compiler, source_number
from wrinklefree.utils.errors import EngineError


def test_cc_comes_first() -> None:
    assert find_compiler({"CC": "ccache gcc-12 -m64"}) == ["ccache", "gcc-12", "-m64"]


def test_zig_comes_before_the_machines_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_has_zig", lambda: True)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    command = find_compiler({})
    assert command[:4] == [sys.executable, "-m", "ziglang", "cc"]
    assert "aarch64-linux-gnu.2.17" in command


def test_without_zig_the_path_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_has_zig", lambda: False)
    monkeypatch.setattr(build.shutil, "which", lambda name: "/bin/clang" if name == "clang" else None)
    assert find_compiler({}) == ["clang"]
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(BuildError, match="found no C compiler"):
        find_compiler({})


def test_a_compiler_that_is_missing_or_refuses(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot start no-such-cc: No such file"):
        compile_library(tmp_path / "x.so", ["no-such-cc"])
    with pytest.raises(BuildError, match=r"^false failed: "):
        compile_library(tmp_path / "x.so", ["false"])
    assert list(tmp_path.iterdir()) == []


def test_the_number_follows_the_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = source_number()
    assert 0 <= before < 2**31
    (tmp_path / "a.c").write_text("int x;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    first = source_number()
    (tmp_path / "a.c").write_text("int y;")
    assert len({before, first, source_number()}) == 3


def test_a_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.load_library()._name
    monkeypatch.setenv("WRINKLEFREE_ENGINE_LIBRARY", path)
    monkeypatch.setattr(library, "source_number", lambda: 1)
    with pytest.raises(EngineError, match="is of another version; install wrinklefree again"):
        library.load_library.__wrapped__()


def test_what_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "engine.so").write_bytes(b"no")
    monkeypatch.setenv("WRINKLEFREE_ENGINE_LIBRARY", str(tmp_path / "engine.so"))
    with pytest.raises(EngineError, match="cannot load the CPU engine"):
        library.load_library.__wrapped__()


def test_no_library_and_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WRINKLEFREE_ENGINE_LIBRARY", raising=False)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr(library, "user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(library, "find_compiler", lambda: find_compiler({"CC": "no-such-cc"}))
    with pytest.raises(EngineError, match=r"was not built \(cannot start no-such-cc.*choose another engine"):
        library.load_library.__wrapped__()


def test_records_have_the_layout_of_the_header(tmp_path: Path) -> None:
    """The compiler's sizes of the three records, against ctypes'."""
    import subprocess

    (tmp_path / "sizes.c").write_text(
        '#include <stdio.h>\n#include "engine.h"\n'
        'int main(void) { printf("%zu %zu %zu\\n", sizeof(WfLinear), sizeof(WfLayer), sizeof(WfConfig)); }\n'
    )
    try:
        compiler = find_compiler()
    except BuildError as error:
        pytest.skip(str(error))
    program = tmp_path / "sizes"
    subprocess.run([*compiler, f"-I{build.SOURCES}", str(tmp_path / "sizes.c"), "-o", str(program)], check=True)
    sizes = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.split()
    ours = [ctypes.sizeof(record) for record in (library.LinearRecord, library.LayerRecord, library.ConfigRecord)]
    assert [int(size) for size in sizes] == ours
