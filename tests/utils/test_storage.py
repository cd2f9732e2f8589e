import errno
import os
import threading
from pathlib import Path

import pytest

from wrinklefree.utils.errors import StorageError
from wrinklefree.utils.storage import (
    LocalStorage,
    Storage,
    atomic_symlink,
    atomic_write,
    check_space,
    check_writable,
    format_size,
    free_bytes,
    remove_leftovers,
    replacing_file,
    write_all,
)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_local_storage_keeps_what_it_is_given(tmp_path: Path) -> None:
    storage: Storage = LocalStorage(tmp_path / "bucket")
    assert storage.list() == []
    storage.write_bytes("runs/a/metadata.json", b"one")
    storage.write_bytes("runs/a/metadata.json", b"two")
    storage.write_bytes("runs/b", b"")
    assert storage.read_bytes("runs/a/metadata.json") == b"two"
    assert storage.list() == ["runs/a/metadata.json", "runs/b"]
    assert storage.list("runs/a") == ["runs/a/metadata.json"]
    assert storage.exists("runs/b")
    storage.delete("runs/b")
    storage.delete("runs/b")
    assert not storage.exists("runs/b")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("runs/b")


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a//b", "../a", "a/../b", "a/."])
def test_no_name_leaves_the_root(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a storage name"):
        LocalStorage(tmp_path).write_bytes(name, b"x")


def test_of_many_that_create_a_name_one_wins(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for attempt in range(10):
        start = threading.Barrier(8)
        winners: list[int] = []

        def race(number: int, start: threading.Barrier, winners: list[int], name: str) -> None:
            start.wait()
            if storage.create(name, str(number).encode()):
                winners.append(number)

        threads = [
            threading.Thread(target=race, args=(number, start, winners, f"lease{attempt}")) for number in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert storage.read_bytes(f"lease{attempt}") == str(winners[0]).encode()
        assert len(winners) == 1
    assert len(list(tmp_path.iterdir())) == 10


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metadata.json"
    atomic_write(path, "old")

    def full(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError) as raised:
        atomic_write(path, "new and longer")
    message = str(raised.value)
    assert message.startswith(f"no space to write {path} (No space left on device): 14 bytes needed, ")
    assert "free. Free some space, or write elsewhere with output_dir=<folder>" in message
    assert "\n" not in message
    assert raised.value.exit_code == 74
    assert path.read_text() == "old"
    assert names_in(tmp_path) == ["metadata.json"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_a_refused_write_says_to_choose_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refused(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(StorageError, match=rf"may not write .*outputs \({os.strerror(code)}\).*output_dir=<folder>"):
        check_writable(tmp_path / "outputs")


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_check_writable_under_a_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"cannot write .*file/outputs \(Not a directory\)"):
        check_writable(tmp_path / "file" / "outputs")


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data[:3])))
    descriptor = os.open(tmp_path / "x", os.O_WRONLY | os.O_CREAT)
    write_all(descriptor, b"0123456789")
    os.close(descriptor)
    assert (tmp_path / "x").read_bytes() == b"0123456789"


def test_a_link_is_relative_and_replaced_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        atomic_symlink(tmp_path / "runs" / name, tmp_path / "stage1_checkpoint")
    link = tmp_path / "stage1_checkpoint"
    assert link.readlink() == Path("runs/two")
    moved = tmp_path.rename(tmp_path.with_name(tmp_path.name + "_moved"))
    assert (moved / "stage1_checkpoint").resolve() == (moved / "runs" / "two").resolve()
    assert names_in(moved) == ["runs", "stage1_checkpoint"]


def test_leftovers_go_and_the_rest_stays(tmp_path: Path) -> None:
    (tmp_path / "step_1.tmp-abc").mkdir()
    (tmp_path / "step_1.tmp-abc" / "part").write_text("x")
    (tmp_path / "metadata.json.tmp-def").write_text("x")
    (tmp_path / "metadata.json").write_text("x")
    (tmp_path / "link.tmp-1").symlink_to("nowhere")
    assert len(remove_leftovers(tmp_path)) == 3
    assert names_in(tmp_path) == ["metadata.json"]
    assert remove_leftovers(tmp_path / "absent") == []


def test_space_is_checked_with_a_fifth_to_spare(tmp_path: Path) -> None:
    check_space(tmp_path / "not" / "yet", 1000)
    with pytest.raises(StorageError, match=r"no space to write .*: 1200000\.0 TB needed, .* free"):
        check_space(tmp_path, 10**18)
    assert free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize(
    ("size", "text"), [(999, "999 bytes"), (1000, "1.0 kB"), (4_700_000, "4.7 MB"), (2 * 10**13, "20.0 TB")]
)
def test_sizes_read_well(size: int, text: str) -> None:
    assert format_size(size) == text


def test_a_replaced_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    with replacing_file(path) as descriptor:
        write_all(descriptor, b"one")
        assert not path.exists()
    assert path.read_bytes() == b"one"
    with pytest.raises(RuntimeError, match="stop"), replacing_file(path) as descriptor:
        write_all(descriptor, b"two")
        raise RuntimeError("stop")
    assert path.read_bytes() == b"one"
    assert names_in(path.parent) == ["file"]


def test_a_replaced_file_needs_a_folder_that_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*/file/x"), replacing_file(tmp_path / "file" / "x"):
        pytest.fail("nothing can be written there")
