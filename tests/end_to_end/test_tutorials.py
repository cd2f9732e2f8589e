"""The tutorial on one's own data, block by block: its Python runs, then its commands, in one folder."""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from wrinklefree import cli

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MAINS: dict[str, Callable[[Sequence[str]], int]] = {
    "scripts/train.py": cli.train_main,
    "scripts/prepare_data.py": cli.prepare_main,
    "scripts/run_evaluation.py": cli.evaluate_main,
}


@pytest.mark.slow
def test_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    ran = []
    for language, block in FENCE.findall((ROOT / "docs/tutorials/own_data.md").read_text()):
        if language == "python":
            exec(compile(block, "own_data.md", "exec"), {"__name__": "tutorial"})
        elif language == "bash":
            for line in block.replace("\\\n", " ").splitlines():
                program, *arguments = shlex.split(line)[3:]
                assert MAINS[program](arguments) == 0, line
                ran.append(program)
    assert ran.count("scripts/train.py") == 4
    assert "accuracy" in capsys.readouterr().out
    assert (tmp_path / "outputs/bitdistill_tiny_distillation/stage3_checkpoint").exists()
