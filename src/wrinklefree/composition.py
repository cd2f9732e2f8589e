"""From command-line overrides to a `RunConfig`: Hydra composes the YAML tree, pydantic types it. Imports no torch.

Hydra's own check of keys is switched off (every `key=value` is sent as `++key=value`), because it neither knows types
nor guesses what was meant; `decode` checks the composed tree instead. So `skip_recovery=true` and `+skip_recovery=true`
both work, as do keys that only one optimizer has.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wrinklefree.training.config import STAGE_CLASSES, PipelineConfig, RunConfig
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError

HYDRA_VERSION_BASE = "1.3"
_OVERRIDE = re.compile(r"^(?P<prefix>\+{0,2}|~)(?P<key>[A-Za-z_][\w./@]*)(?:=(?P<value>.*))?$", re.DOTALL)
_PLAIN_CHOICE = re.compile(r"^[\w/.-]+$")


class Composition(NamedTuple):
    """What a command asks for."""

    config: RunConfig
    tree: dict[str, Any]
    """The same as a plain tree, interpolations resolved: what artifacts store and fingerprints hash."""


def compose(overrides: Sequence[str] = ()) -> Composition:
    """Compose and decode the configuration of a command, given what is typed after `train.py`.

    Works inside a running Hydra application too.

    Raises:
        ConfigError: in one line for each mistake.
    """
    tree = compose_tree(overrides)
    return Composition(decode(RunConfig, tree), tree)


def compose_step(step: Sequence[str], command: Sequence[str]) -> Composition:
    """Compose one step of a pipeline: the step's overrides, and behind them the overrides of the pipeline's command.

    What the command says about its own steps stays behind: the choice of `training`, `seeds`, and keys of `training`
    that the step's stage does not have (a learning rate, for stage 1). What it says about `data` goes to the steps
    whose data is of the same kind: `data.task=boolq` to fine-tuning, `data=falcon` to pretraining.
    """
    command = [override for override in command if _key(override) not in {"training", "seeds"}]
    shared = [override for override in command if not _is_about(override, "data")]
    pipeline_data = compose_tree(command)["data"]["kind"] if len(shared) < len(command) else None
    tree = compose_tree([*step, *shared])
    if pipeline_data == tree["data"]["kind"]:
        tree = compose_tree([*step, *command])
    for name in PipelineConfig.model_fields:
        if name != "stage" and name not in STAGE_CLASSES[tree["training"]["stage"]].model_fields:
            tree["training"].pop(name, None)
    return Composition(decode(RunConfig, tree), tree)


def compose_tree(overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Compose to a plain, resolved tree that is not decoded yet."""
    checked = normalize_overrides(overrides)
    try:
        with _own_global_hydra(), initialize_config_dir(str(config_directory()), version_base=HYDRA_VERSION_BASE):
            composed = hydra_compose("config", overrides=checked)
        tree = OmegaConf.to_container(composed, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(describe_hydra_error(error)) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{config_directory() / 'config.yaml'} is not a mapping of keys")
    return _without_unset({str(key): value for key, value in tree.items()})


def config_directory() -> Path:
    """Return the folder of config.yaml: `wrinklefree/configs` in a wheel, `configs` of the repository in a checkout."""
    package = Path(__file__).resolve().parent
    for candidate in (package / "configs", package.parents[1] / "configs"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise ConfigError(f"no configs/config.yaml beside {package}: reinstall wrinklefree")


def groups() -> dict[str, list[str]]:
    """Return the options of every group: `{"model": ["llama_3b", ...], ...}`."""
    # A study is no group: it composes many runs.
    folders = sorted(folder for folder in config_directory().iterdir() if folder.is_dir() and folder.name != "study")
    return {
        folder.name: sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
        for folder in folders
    }


def normalize_overrides(overrides: Sequence[str]) -> list[str]:
    """Return overrides in the form that Hydra always takes, having checked the choices of groups.

    `key=value` and `+key=value` become `++key=value`; a group's choice loses its `+`; `hydra.*` stays.
    """
    options = groups()
    return [_normalize(override, options) for override in overrides]


def _normalize(override: str, options: dict[str, list[str]]) -> str:
    match = _OVERRIDE.match(override)
    if match is None or (match["value"] is None and match["prefix"] != "~"):
        raise ConfigError(f"{override!r} is not an override: write key=value, for example training.batch_size=4")
    key, value = match["key"], match["value"]
    if match["prefix"] == "~" or key.split(".")[0].split("/")[0] == "hydra" or "@" in key:
        return override
    if key not in options:
        return f"++{key}={value}"
    known = options[key]
    if value in {"", "null"}:
        raise ConfigError(f"{key}={value} chooses nothing; choose one of {', '.join(known)}, or leave {key} out")
    for choice in value.split(","):
        if known and _PLAIN_CHOICE.match(choice) and choice not in known:
            close = difflib.get_close_matches(choice, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"{key}: expected one of {', '.join(known)}, given {choice!r}{meant}")
    return f"{key}={value}"


def describe_hydra_error(error: HydraException | OmegaConfBaseException) -> str:
    """Return an error of Hydra or OmegaConf as one line."""
    if isinstance(error, OverrideParseException):
        reason = str(error).splitlines()[0].rstrip(".")
        typed = error.override.removeprefix("++")
        return f"{typed!r} cannot be read ({reason}): put quotes around text that holds brackets, commas, colons or ="
    return " ".join(str(error).split())


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def _is_about(override: str, group: str) -> bool:
    return _key(override) == group or _key(override).startswith(f"{group}.")


def _without_unset(tree: dict[str, Any]) -> dict[str, Any]:
    """Drop keys that the YAML leaves to the user (`???`), so that `decode` reports them as missing."""
    return {key: _pruned(value) for key, value in tree.items() if value != "???"}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_unset(value)
    return [_pruned(item) for item in value] if isinstance(value, list) else value


@contextmanager
def _own_global_hydra() -> Iterator[None]:
    """Put a running Hydra application aside while we compose: there is one global one."""
    outer = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    finally:
        GlobalHydra.instance().clear()
        GlobalHydra.instance().hydra = outer
