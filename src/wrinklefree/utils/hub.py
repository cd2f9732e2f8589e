"""Folders of the Hugging Face hub, and a quick answer when it cannot be reached.

The hub's client retries for most of a minute without a network. One probe of two seconds comes first; when it fails, the
local cache is still searched, and then the error names what is missing.
"""

import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from wrinklefree.utils.errors import NetworkError

logger = logging.getLogger(__name__)

PROBE_SECONDS = 2.0
_TRUE = frozenset({"1", "ON", "YES", "TRUE"})


def hub_is_reachable() -> bool:
    """Whether the hub answers within two seconds; false when `HF_HUB_OFFLINE` is set. Probed once a process."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() not in _TRUE and _probe()


@cache
def _probe() -> bool:
    answered = threading.Event()

    def ask() -> None:
        from huggingface_hub import constants

        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
        except urllib.error.HTTPError:
            answered.set()  # a refusal is an answer
        except OSError as error:
            logger.debug("the hub does not answer: %s", error)
        else:
            answered.set()

    # A thread, because resolving a name has no time limit of its own.
    thread = threading.Thread(target=ask, name="hub-probe", daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1.0)
    return answered.is_set()


def snapshot(repo_id: str, patterns: Sequence[str], *, alternatives: str, revision: str | None = None) -> Path:
    """Local folder with a hub repository's files that match `patterns`; the folder's name is the commit.

    Args:
        repo_id: owner/name.
        patterns: shell patterns of the files wanted.
        alternatives: what the user can do without the hub; the end of the error message.
        revision: branch, tag or commit; the default branch when absent.

    Raises:
        NetworkError: the hub cannot be reached, refuses, or has no such repository, and the local cache lacks the files.
    """
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType] - its tqdm is untyped
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    online = hub_is_reachable()
    try:
        folder = snapshot_download(
            repo_id, revision=revision, allow_patterns=list(patterns), local_files_only=not online
        )
    except LocalEntryNotFoundError as error:
        state = "the hub broke off" if online else "the hub cannot be reached (or HF_HUB_OFFLINE is set)"
        raise NetworkError(f"{repo_id} is not in the local cache and {state}; {alternatives}") from error
    except (HfHubHTTPError, HTTPError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise NetworkError(
            f"the hub did not give {repo_id} ({reason}); check the name and your token, or {alternatives}"
        ) from error
    except HFValidationError as error:
        raise NetworkError(f"{repo_id!r} is not a hub id of the form owner/name; {alternatives}") from error
    return Path(folder)
