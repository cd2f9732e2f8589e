"""Warnings that outlive the terminal: a loud banner in the log, and a JSON file that is committed with the repository.

The folder ends up in a public history, so nothing secret may reach it: the environment is never recorded, and every
text is scrubbed of what looks like a credential.
"""

import json
import logging
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast

from wrinklefree.utils.errors import StorageError
from wrinklefree.utils.run_fingerprint import Fingerprint
from wrinklefree.utils.storage import LocalStorage

logger = logging.getLogger(__name__)

Severity = Literal["CRITICAL", "WARNING", "INFO"]

_BANNER_WIDTH = 72
_REMOVED = "[removed]"
_SECRET_NAME = (
    r"[\w-]*(?:password|passwd|secret|credential|authorization|cookie|(?:private|access|api|auth|signing)[_-]?key"
    r"|(?:access|auth|api|bearer|hf|hub|gh|github|refresh|session|wandb|id)[_-]?token)[\w-]*"
)
_SENSITIVE_KEY = re.compile(rf"(?:{_SECRET_NAME}|token)", re.IGNORECASE)
_SECRETS = tuple(
    re.compile(pattern, flags)
    for pattern, flags in (
        (r"-----BEGIN [^-]*-----.*?(?:-----END [^-]*-----|\Z)", re.DOTALL),
        (
            rf"(?<![\w-])({_SECRET_NAME}[\"']?\s*[=:]\s*)(?:\"[^\"]*\"|'[^']*'|(?:Bearer\s+|Basic\s+)?[^\s,;&\"']+)",
            re.IGNORECASE,
        ),
        (r"(:/{1,2})[^/\s]+(?=@)", 0),  # one slash is what a Path makes of a URL
        (r"([?&](?:\w*token|\w*key|sig|signature|\w*secret)=)[^&\s]+", re.IGNORECASE),
        (r"\b(Bearer\s+)[\w.~+/-]{8,}=*", re.IGNORECASE),
        (r"\b(token[\"']?\s*[=:]\s*[\"']?)[\w.-]{16,}", re.IGNORECASE),
        (r"\bhf_[A-Za-z0-9]{8,}", 0),
        (r"\bya29\.[\w-]+", 0),
        (r"\bAIza[\w-]{8,}", 0),
        (r"\b(?:gh[pousr]_|github_pat_|glpat-|pypi-)[\w-]{8,}", 0),
        (r"\bsk-[\w-]{8,}", 0),
        (r"\bxox[a-z]-[\w-]{8,}", 0),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{8,}", 0),
        (r"\beyJ[\w-]{8,}\.[\w-]+\.[\w-]*", 0),
    )
)


class AuditLogger:
    """Writes audit records into one folder.

    Args:
        directory: Usually `training_logs/warnings`; created with the first record.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def record(self, type: str, severity: Severity, **details: Any) -> Path | None:
        """Log a banner, write a record, and return its path.

        A record that cannot be written is logged as an error and costs nothing else: a full disk must not end the
        run whose trouble was to be recorded.

        Args:
            type: What happened, as an identifier (`dirty_git`); part of the file name.
            severity: How loud.
            details: JSON-able; `fingerprint`, when given, goes into the file name too.
        """
        clean: dict[str, Any] = {key: scrub(value, key) for key, value in details.items()}
        log_banner(type, severity, **clean)
        now = datetime.now(UTC)
        content = {"type": type, "severity": severity, "time": now.isoformat(timespec="seconds"), "details": clean}
        data = (json.dumps(content, indent=2, default=str) + "\n").encode()
        stem = f"{now:%Y-%m-%d_%H-%M-%S}_{type}_{str(clean.get('fingerprint', 'norun'))[:8]}"
        storage = LocalStorage(self.directory)
        name, count = f"{stem}.json", 1
        try:
            while not storage.create(name, data):
                count += 1
                name = f"{stem}_{count}.json"
        except StorageError as error:
            logger.error("AUDIT RECORD NOT WRITTEN (audit.directory=%s): %s", self.directory, error)
            return None
        return storage.path(name)

    def warn_dirty_git(self, fingerprint: Fingerprint) -> Path | None:
        """Record that a run trains with changes which no commit holds."""
        return self.record(
            "dirty_git",
            "CRITICAL",
            fingerprint=fingerprint.value,
            git_commit=fingerprint.git_commit,
            message="Training with uncommitted changes - results may not be reproducible",
        )


def log_banner(type: str, severity: Severity, **details: Any) -> None:
    """Log `banner` at the level that `severity` asks for."""
    levels = {"CRITICAL": logging.CRITICAL, "WARNING": logging.WARNING, "INFO": logging.INFO}
    logger.log(levels[severity], "\n%s", banner(type, severity, **details))


def banner(type: str, severity: Severity, **details: Any) -> str:
    """A box of 72 columns that cannot be overlooked: of X when critical, of exclamation marks otherwise."""
    mark = "X" if severity == "CRITICAL" else "!"
    edge, margin = mark * _BANNER_WIDTH, mark * 3
    title = type.replace("_", " ").upper()
    facts = (f"{margin} {key}: {_short(key, scrub(value, key))}" for key, value in details.items())
    return "\n".join([edge, f"{margin} {severity}: {title}", *facts, edge])


def scrub(value: Any, key: str = "") -> Any:
    """`value` without anything that looks like a credential; containers and `Path`s become JSON-able on the way."""
    if key and _SENSITIVE_KEY.fullmatch(key):
        return _REMOVED
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {scrub(str(name)): scrub(item, str(name)) for name, item in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [scrub(item) for item in cast("list[Any]", value)]
    if value is None or isinstance(value, bool | int | float):
        return value
    text = str(value)
    for pattern in _SECRETS:
        text = pattern.sub(lambda match: (match[1] if match.re.groups else "") + _REMOVED, text)
    return text


def _short(key: str, value: Any) -> str:
    """One line: identifiers cut to 8 characters, line breaks shown as blanks."""
    text = " ".join(str(value).split())
    return f"{text[:8]}..." if key in {"fingerprint", "git_commit"} and len(text) > 8 else text
