"""prepare_data.py and inspect_data.py from the command line to what they leave or show."""

import json
from pathlib import Path

import pytest

from wrinklefree.cli import inspect_main, prepare_main


@pytest.fixture
def source(tmp_path: Path) -> str:
    rows = [
        {"text": f"Document {n} is about the {'sea' if n % 2 else 'wind'}, and ends after {n} words."}
        for n in range(60)
    ]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return f"data.sources=[{{kind: local, path: '{tmp_path / 'text.jsonl'}'}}]"


def test_prepare_verify_inspect_and_refuse(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert prepare_main([f"output={out}", "data=local", source, "filters.min_characters=10"]) == 0
    said = capsys.readouterr().out
    assert "0 of 60 dropped" in said
    folder = out / "0-text"
    assert f"path: {folder}, weight: 1" in said

    assert prepare_main([f"verify={folder}"]) == 0
    assert f"{folder}: intact; " in capsys.readouterr().out
    tokens = f"data.sources=[{{kind: tokens, path: '{folder}'}}]"
    assert inspect_main(["data=tokens", tokens, "rows=2", "training.max_seq_length=40", "packing.packer=best_fit"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("positions, ") == 2
    assert "is about the" in shown
    assert "padding so far" in shown

    shard = folder / "shard-00000.tokens"
    shard.write_bytes(b"\x01" + shard.read_bytes()[1:])
    assert prepare_main([f"verify={folder}"]) == 65
    assert "is corrupt: its SHA-256" in capsys.readouterr().err
    assert prepare_main([f"output={out}", "data=local", source]) == 74
    assert "0-text exists; remove it" in capsys.readouterr().err


def test_tokens_of_another_model_are_refused(tmp_path: Path, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare_main([f"output={tmp_path / 'out'}", "data=local", source, "filters.min_characters=10"]) == 0
    manifest = tmp_path / "out" / "0-text" / "manifest.json"
    from wrinklefree.data.token_shards import manifest_extra, read_record
    from wrinklefree.utils.manifest import write_manifest

    record = read_record(manifest.parent)
    object.__setattr__(record, "tokenizer", "0123456789abcdef")
    write_manifest(manifest.parent, manifest_extra(record, {}))
    tokens = f"data.sources=[{{kind: tokens, path: '{manifest.parent}'}}]"
    capsys.readouterr()
    assert inspect_main(["data=tokens", tokens]) == 65
    assert "was tokenized by another tokenizer (0123456789ab)" in capsys.readouterr().err


def test_inspecting_a_stage_without_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect_main(["training=stage1_subln"]) == 2
    assert "training.stage=stage1 reads no rows" in capsys.readouterr().err
