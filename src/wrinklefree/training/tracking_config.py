"""The root key `tracking`, and the check that its tracker can be used. Imports neither torch nor a tracker."""

import configparser
import netrc
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from wrinklefree.utils.config import Config
from wrinklefree.utils.errors import ConfigError, CredentialsError

TrackerName = Literal["none", "tensorboard", "trackio", "wandb"]

WANDB_URL = "https://api.wandb.ai"


class TrackingConfig(Config):
    """The `tracking` group: where a run's figures can be watched besides its own folder."""

    name: TrackerName = "none"
    project: str = "wrinklefree"
    """trackio and wandb: the project that runs are listed under."""
    folder: str | None = None
    """Where the tracker's files go; null: the run's own folder, and for trackio the folder that `trackio show` reads."""
    offline: bool = False
    """wandb: only write files, for `wandb sync` to send later. The other trackers are local in any case."""


def check_tracking(config: TrackingConfig) -> None:
    """Refuse a tracker that is not installed or, online, has no credentials: in milliseconds, before any work.

    Raises:
        ConfigError: the package is missing.
        CredentialsError: wandb is to send runs, and no key is found.
    """
    if config.name == "none":
        return
    if find_spec(config.name) is None:
        raise ConfigError(
            f"tracking={config.name} needs the package {config.name}, which is not installed: uv sync --extra track "
            "(pip install 'wrinklefree[track]'), or tracking=none"
        )
    if config.name == "wandb" and not config.offline and wandb_sends() and not has_wandb_key():
        raise CredentialsError(
            f"tracking=wandb found no API key for {_wandb_host()}: run `wandb login`, set WANDB_API_KEY, or write files "
            "only with tracking.offline=true"
        )


def wandb_sends() -> bool:
    """Whether wandb's own environment lets it send anything."""
    return os.environ.get("WANDB_MODE", "online") in {"", "online", "shared"}


def has_wandb_key() -> bool:
    """Whether wandb would find a key: in the environment, or in the netrc file that `wandb login` writes."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = _wandb_host()
    for path in _netrc_files():
        try:
            if path.is_file() and netrc.netrc(str(path)).authenticators(host) is not None:
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _netrc_files() -> list[Path]:
    given = os.environ.get("NETRC")
    return [Path(given).expanduser()] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]


def _wandb_host() -> str:
    """Host of the server: WANDB_BASE_URL, else what `wandb login --host` stored, else the public one."""
    url = os.environ.get("WANDB_BASE_URL")
    if not url:
        folder = os.environ.get("WANDB_CONFIG_DIR")
        stored = (Path(folder) if folder else Path.home() / ".config" / "wandb") / "settings"
        settings = configparser.ConfigParser(interpolation=None)
        try:
            settings.read(stored)
            url = settings.get("default", "base_url", fallback="")
        except (OSError, configparser.Error, UnicodeDecodeError):
            url = ""
    return urlsplit(url or WANDB_URL).hostname or WANDB_URL
