import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from wrinklefree.utils.audit_logger import AuditLogger, banner, scrub
from wrinklefree.utils.run_fingerprint import Fingerprint

FINGERPRINT = Fingerprint(
    value="a3f7c2d1" + "0" * 56, git_commit="def45678" * 5, git_dirty=True, config_hash="", inputs={}
)

PEM = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBg\nq8fJ\n-----END PRIVATE KEY-----"
PLANTED = {
    "hub": ("login with hf_AbCdEfGhIjKlMnOpQrStUv failed", "hf_AbCdEfGhIjKlMnOpQrStUv"),
    "google": ("header ya29.a0AfH6SMBx_y-z1 expired", "a0AfH6SMBx_y-z1"),
    "maps": ("AIzaSyD-1234567890abcdef was refused", "SyD-1234567890abcdef"),
    "pem": (f"key file holds {PEM} and more", "q8fJ"),
    "json": ('{"type": "service_account", "private_key": "MIIEvQ\\nxyz", "a": 1}', "MIIEvQ"),
    "remote": ("origin https://robot:s3cr3t@host.example/repo.git", "s3cr3t"),
    "signed": ("GET https://host.example/x?X-Goog-Signature=1&token=abcdef0123 failed", "abcdef0123"),
    "github": ("remote said ghp_0123456789abcdefABCDEF", "0123456789abcdefABCDEF"),
    "environment": ("WANDB_API_KEY=0011223344556677 python train.py", "0011223344556677"),
    "bearer": ("Authorization: Bearer abc.def-ghi_jkl", "abc.def-ghi_jkl"),
    "amazon": ("AKIAIOSFODNN7EXAMPLE is not allowed", "IOSFODNN7EXAMPLE"),
    "password": ("cannot log in with password='open sesame'", "open sesame"),
}


def test_no_planted_secret_reaches_a_record_or_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, record_property: Callable[[str, object], None]
) -> None:
    audit = AuditLogger(tmp_path)
    texts = {name: text for name, (text, _) in PLANTED.items()}
    with caplog.at_level(logging.DEBUG):
        audit.record("failure", "CRITICAL", error=RuntimeError(str(texts)), fingerprint=FINGERPRINT.value)
        for name, text in texts.items():
            audit.record("failure", "WARNING", nested={"list": [text, Path(text)], text: name})
    audit.record("config", "INFO", tree={"hf_token": "plain-secret-1", "api_key": "plain-secret-2", "password": 3})
    written = "".join(path.read_text() for path in tmp_path.iterdir()) + caplog.text
    found = [name for name, (_, secret) in PLANTED.items() if secret in written]
    assert len(PLANTED) == 12
    assert found == []
    assert "plain-secret" not in written
    assert written.count("[removed]") >= 3 * len(PLANTED)
    record_property("planted_secrets", len(PLANTED))


@pytest.mark.parametrize(
    "text",
    [
        "total_tokens: 100000, tokens=5",
        "tokenizer=abc",
        "runs/a3f7c2d1/checkpoints/step_00000010 has 12 bytes, 13 were saved",
        "https://huggingface.co/Qwen/Qwen3-4B",
        "KeyError: 'keyword'",
        "lr=1e-4 key_value_heads: 4",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert scrub(text) == text


def test_scrubbing_keeps_numbers_and_makes_the_rest_json(tmp_path: Path) -> None:
    assert scrub({"step": 3, "loss": 1.5, "ok": True, "none": None, "path": tmp_path, "set": (1, "a")}) == {
        "step": 3,
        "loss": 1.5,
        "ok": True,
        "none": None,
        "path": str(tmp_path),
        "set": [1, "a"],
    }


def test_what_surrounds_a_secret_stays_readable() -> None:
    assert (
        scrub("origin https://robot:s3cr3t@host.example/repo.git") == "origin https://[removed]@host.example/repo.git"
    )
    assert scrub("HF_TOKEN=abc python train.py") == "HF_TOKEN=[removed] python train.py"


def test_dirty_git_is_recorded_and_shouted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = AuditLogger(tmp_path / "training_logs" / "warnings").warn_dirty_git(FINGERPRINT)
    assert path is not None
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_dirty_git_a3f7c2d1\.json", path.name)
    record = json.loads(path.read_text())
    assert record["type"] == "dirty_git"
    assert record["severity"] == "CRITICAL"
    assert record["details"]["fingerprint"] == FINGERPRINT.value
    assert record["details"]["git_commit"] == FINGERPRINT.git_commit
    assert caplog.records[0].levelno == logging.CRITICAL
    assert caplog.records[0].getMessage().splitlines() == [
        "",
        "X" * 72,
        "XXX CRITICAL: DIRTY GIT",
        "XXX fingerprint: a3f7c2d1...",
        "XXX git_commit: def45678...",
        "XXX message: Training with uncommitted changes - results may not be reproducible",
        "X" * 72,
    ]


def test_lesser_banners_exclaim() -> None:
    assert banner("slow_run", "WARNING", hours=30).splitlines() == [
        "!" * 72,
        "!!! WARNING: SLOW RUN",
        "!!! hours: 30",
        "!" * 72,
    ]


def test_two_records_of_one_second_are_two_files(tmp_path: Path) -> None:
    audit = AuditLogger(tmp_path)
    paths = {audit.record("event", "INFO", number=number) for number in range(5)}
    assert len(paths) == 5
    assert sorted(json.loads(path.read_text())["details"]["number"] for path in tmp_path.iterdir()) == [0, 1, 2, 3, 4]


def test_an_unwritable_folder_is_an_error_line_and_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert AuditLogger(tmp_path / "file" / "warnings").record("event", "INFO") is None
    assert "AUDIT RECORD NOT WRITTEN (audit.directory=" in caplog.text
