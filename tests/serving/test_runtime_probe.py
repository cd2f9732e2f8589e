"""llama.cpp in a child process: what it cannot load is an error here, never the end of this process."""

from pathlib import Path

import numpy as np
import pytest

from wrinklefree.serving import runtime_probe
from wrinklefree.serving.gguf_writer import TensorPlan, write_gguf
from wrinklefree.serving.runtime_probe import ask_llama_cpp
from wrinklefree.utils.errors import EngineError

pytest.importorskip("xllamacpp", reason="needs the package xllamacpp")


def test_a_file_that_llama_cpp_does_not_load_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "odd.gguf"
    write_gguf(
        path,
        {"general.architecture": "wrinklefree"},
        [TensorPlan("w", (1, 1), "F32", lambda: np.zeros(4, dtype=np.uint8))],
    )
    with pytest.raises(EngineError, match=r"llama\.cpp does not run .*odd\.gguf \(exit code \d+\): "):
        ask_llama_cpp(path, [[1]], [], vocab_size=1, plain_token=0)


def test_a_child_that_takes_too_long_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_probe, "SECONDS", 0.01)
    with pytest.raises(EngineError, match="did not answer for .* within 0 s"):
        ask_llama_cpp(tmp_path / "absent.gguf", [[1]], [], vocab_size=1, plain_token=0)
