"""Documents from files of one's own: .txt (a file is a document), .jsonl and .parquet (a row is a document).

Whole in memory (`load_local`), or file after file (`LocalStream`), at a position that can be saved.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from wrinklefree.data.config import LocalSource
from wrinklefree.utils.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".parquet")


def local_files(source: LocalSource) -> list[Path]:
    """The files that a source names, sorted.

    Raises:
        DataError: there are none.
    """
    path = Path(source.path).expanduser()
    if path.is_file():
        found = [path]
    elif path.is_dir():
        found = [file for file in path.rglob("*") if file.is_file()]
    else:
        pattern = path.relative_to(path.anchor).as_posix()
        found = [file for file in Path(path.anchor).glob(pattern) if file.is_file()] if pattern != "." else []
    files = sorted(file for file in found if file.suffix in SUFFIXES)
    if not files:
        raise DataError(
            f"no {', '.join(SUFFIXES)} file at data source path={source.path}"
            f"{' (it exists, with other endings)' if found else ' (nothing is there)'}; give a file, a folder or a glob"
        )
    return files


def load_local(source: LocalSource) -> list[str]:
    """All documents of a local source; blank ones are left out.

    Raises:
        DataError: a file that is missing, damaged, lacks the text column, or no document at all.
    """
    files = local_files(source)
    documents = [text for file in files for text in _documents(file, source.text_column) if text.strip()]
    if not documents:
        raise DataError(f"data source path={source.path} holds no text in its {len(files)} files; check the path")
    return documents


class LocalStream:
    """Rows of a local source in the order of its files, from any position; iterate once.

    Raises:
        DataError: there are no files; while iterating, one that is damaged or lacks the text column.
    """

    def __init__(self, source: LocalSource) -> None:
        self._files, self._column = local_files(source), source.text_column
        self._file = self._row = 0

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Rows from the loaded state on; a row of text only is `{text_column: text}`."""
        while self._file < len(self._files):
            for text in islice(_documents(self._files[self._file], self._column), self._row, None):
                self._row += 1
                yield {self._column: text}
            self._file, self._row = self._file + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """File, and rows of it that were handed out."""
        return {"file": self._file, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the iteration at a position."""
        self._file, self._row = state_dict["file"], state_dict["row"]


def local_fingerprint(source: LocalSource) -> str:
    """Hash of the files' contents and of the column read; names and places do not matter."""
    digest = hashlib.sha256(source.text_column.encode())
    for file in local_files(source):
        with file.open("rb") as content:
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _documents(file: Path, column: str) -> Iterator[str]:
    if file.suffix == ".txt":
        yield _read_text(file)
    elif file.suffix == ".jsonl":
        yield from _json_lines(file, column)
    else:
        yield from _parquet(file, column)


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text (byte {error.start}); convert it or leave it out") from error


def _json_lines(file: Path, column: str) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield _json_line(line, f"{file}, line {number}", column)


def _json_line(line: bytes, where: str, column: str) -> str:
    try:
        row: Any = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line); convert the file") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error.msg}); fix or remove the line") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a {type(row).__name__} instead of an object with a {column!r} key")
    if column not in row:
        raise _missing_column(where, column, list(row))
    return _checked(row[column], where, column)


def _parquet(file: Path, column: str) -> Iterator[str]:
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = list(table.schema_arrow.names)
            if column not in names:
                raise _missing_column(str(file), column, names)
            number = 0
            for batch in table.iter_batches(columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield _checked(value, f"{file}, row {number}", column)
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0][:150]
        raise DataError(f"{file} is not a readable parquet file ({reason}); write or download it again") from error


def _checked(value: object, where: str, column: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {value!r:.60}, not text; set text_column to a text column")
    return value


def _missing_column(where: str, column: str, present: list[str]) -> DataError:
    return DataError(
        f"{where}: there is no column {column!r}; the columns are {', '.join(present)}: set the source's text_column "
        "to one of them"
    )
