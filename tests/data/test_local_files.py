"""Local sources: what is read, and what each error says."""

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from wrinklefree.data.config import LocalSource
from wrinklefree.data.local_files import LocalStream, load_local, local_fingerprint
from wrinklefree.utils.errors import DataError


def source(path: Path | str, text_column: str = "text") -> LocalSource:
    return LocalSource(path=str(path), text_column=text_column)


def write_jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def test_a_folder_mixes_the_three_formats_in_path_order(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": " "}, {"text": "two\u2028lines"}])
    pyarrow.parquet.write_table(pyarrow.table({"n": [1, 2], "text": ["three", "four"]}), tmp_path / "b" / "c.parquet")
    (tmp_path / "d.txt").write_text("five\nsix", encoding="utf-8")
    (tmp_path / "e.csv").write_text("text\nno", encoding="utf-8")
    assert load_local(source(tmp_path)) == ["one", "two\u2028lines", "three", "four", "five\nsix"]


def test_a_glob_and_a_file(tmp_path: Path) -> None:
    for name in ("x1.txt", "x2.txt", "y.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert load_local(source(tmp_path / "x*.txt")) == ["x1.txt", "x2.txt"]
    assert load_local(source(tmp_path / "y.txt")) == ["y.txt"]


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no \.txt, \.jsonl, \.parquet file at data source path=.*nope \(nothing is there\)"
    ):
        load_local(source(tmp_path / "nope"))


def test_other_endings(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"it exists, with other endings"):
        load_local(source(tmp_path))


def test_missing_column_names_the_columns_present(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"title": "t", "body": "b"}])
    with pytest.raises(
        DataError, match=r"a\.jsonl, line 2: there is no column 'text'; the columns are title, body: set"
    ):
        load_local(source(file))
    table = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"title": ["t"], "body": ["b"]}), table)
    with pytest.raises(DataError, match=r"b\.parquet: there is no column 'text'; the columns are title, body: set"):
        load_local(source(table))


def test_bad_json_names_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "one"}\n\n{"text": \n', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.jsonl, line 3: not valid JSON"):
        load_local(source(file))


def test_a_line_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: a list instead of an object with a 'text' key"):
        load_local(source(write_jsonl(tmp_path / "a.jsonl", [["x"]])))


def test_a_value_that_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1: column 'text' holds 5, not text"):
        load_local(source(write_jsonl(tmp_path / "a.jsonl", [{"text": 5}])))


def test_truncated_parquet_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["one"] * 100}), file)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet is not a readable parquet file"):
        load_local(source(file))


def test_wrong_encoding_names_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        load_local(source(file))


def test_only_blank_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("  \n", encoding="utf-8")
    with pytest.raises(DataError, match=r"holds no text in its 1 files"):
        load_local(source(tmp_path))


def test_the_fingerprint_is_of_contents_not_places(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.txt").write_text("same", encoding="utf-8")
    first = local_fingerprint(source(tmp_path / "one"))
    assert first == local_fingerprint(source(tmp_path / "two"))
    assert first != local_fingerprint(source(tmp_path / "one", "body"))
    (tmp_path / "two" / "two.txt").write_text("different", encoding="utf-8")
    assert first != local_fingerprint(source(tmp_path / "two"))


def test_a_stream_of_files_continues_at_any_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("whole file", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["three", "four"], "other": [1, 2]}), tmp_path / "c.parquet")
    source = LocalSource(path=str(tmp_path), stream=True)
    everything = [row["text"] for row in LocalStream(source)]
    assert everything == ["whole file", "one", "two", "three", "four"]
    for stop in range(6):
        first, second = LocalStream(source), LocalStream(source)
        rows = iter(first)
        taken = [next(rows)["text"] for _ in range(stop)]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert taken + [row["text"] for row in second] == everything
