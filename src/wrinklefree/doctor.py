"""What is here and what is missing on this machine, line by line, each with its fix: `scripts/doctor.py`.

A check looks, and changes nothing: it downloads nothing, compiles nothing, sends nothing but a knock at the hub. Whatever
a check raises becomes a line of its own, as the machine on which things fail is the one that this is for.
"""

import contextlib
import io
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "warning", "missing"]
NEEDED_SECTIONS = ("devices", "optimizers")
"""Where these checks break off, so does training: torch is installed and does not import, say."""
NEEDED_EXIT_CODE = 2
"""Something that training needs is missing."""


@dataclass(frozen=True)
class Check:
    """One line."""

    section: str
    name: str
    level: Level
    text: str
    """What was found."""
    fix: str = ""
    """What to do, where the level is not ok."""
    needed: bool = False
    """Whether nothing trains without it."""


@dataclass(frozen=True)
class Request:
    """What to look at besides the machine."""

    output_dir: Path = Path("outputs")
    bucket: str | None = None
    """A bucket to write a small object into, as a run with `gcs.enabled=true` would."""
    offline: bool = False
    """Knock at nothing."""


Checker = Callable[[Request], Iterator[Check]]
"""The checks of a section."""


def run_checks(request: Request) -> list[Check]:
    """All sections, in the order in which things build on each other."""
    from wrinklefree import doctor_machine, doctor_services

    sections: dict[str, Checker] = {
        "versions": doctor_machine.versions,
        "devices": doctor_machine.devices,
        "attention": doctor_machine.attention,
        "optimizers": doctor_machine.optimizers,
        "compilation": doctor_machine.compilation,
        "disk": doctor_machine.disk,
        "storage and credentials": doctor_services.storage,
        "assets": doctor_services.assets,
        "serving": doctor_services.serving,
    }
    return [check for name, checker in sections.items() for check in guarded(name, checker, request)]


def guarded(section: str, checker: Checker, request: Request) -> list[Check]:
    """The lines of a section; what it raises is its last line. Nothing that a library prints gets between them."""
    found: list[Check] = []
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        try:
            for check in checker(request):
                found.append(check)  # noqa: PERF402 (those before an exception are kept)
        except Exception as error:  # noqa: BLE001 (a broken installation raises anything)
            fix = "repair what it names, or report this line" + _reinstall(error)
            needed = section in NEEDED_SECTIONS
            level: Level = "missing" if needed else "warning"
            found.append(Check(section, f"check of {section}", level, f"broke off: {one_line(error)}", fix, needed))
    return found


def one_line(error: BaseException) -> str:
    """An exception's kind and first 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def works(checks: Sequence[Check]) -> bool:
    """Whether everything that training needs is here."""
    return not any(check.needed and check.level == "missing" for check in checks)


def render(checks: Sequence[Check]) -> str:
    """The lines as text, a section after the other, and a sentence at the end."""
    width = max((len(check.name) for check in checks), default=0)
    lines: list[str] = []
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ([""] if lines else []) + [section]
        lines.append(f"  {check.level:<8} {check.name:<{width}}  {check.text}")
        if check.fix:
            lines.append(f"  {'':<8} {'':<{width}}  -> {check.fix}")
    return "\n".join([*lines, "", conclusion(checks)])


def conclusion(checks: Sequence[Check]) -> str:
    """How many lines are what, and whether this machine can train."""
    counts = {level: sum(check.level == level for check in checks) for level in ("ok", "warning", "missing")}
    numbers = f"{counts['ok']} ok, {counts['warning']} to look at, {counts['missing']} missing"
    needed = [check.name for check in checks if check.needed and check.level == "missing"]
    if needed:
        return f"{numbers}. Training does not work here yet: it needs {', '.join(needed)}."
    return f"{numbers}. Training works here; what is missing is optional."


def record(checks: Sequence[Check], seconds: float) -> dict[str, Any]:
    """For `--json`."""
    return {
        "works": works(checks),
        "summary": conclusion(checks),
        "seconds": round(seconds, 2),
        "checks": [asdict(check) for check in checks],
    }


def examine(request: Request, *, as_json: bool) -> tuple[str, int]:
    """What `scripts/doctor.py` prints, and its exit code."""
    import json

    started = time.perf_counter()
    checks = run_checks(request)
    text = json.dumps(record(checks, time.perf_counter() - started), indent=2) if as_json else render(checks)
    return text, 0 if works(checks) else NEEDED_EXIT_CODE


def _reinstall(error: BaseException) -> str:
    return "; uv sync (or pip install --force-reinstall) often does" if isinstance(error, ImportError) else ""
