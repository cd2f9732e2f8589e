"""Datasets of the Hugging Face hub: streams for pretraining, whole splits for tasks.

The hub's client retries for most of a minute before it gives up, so one short probe comes first. `datasets` is imported
late: it takes a second that no other source needs.
"""

import logging
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from wrinklefree.data.config import HubSource
from wrinklefree.utils.errors import DataError, NetworkError
from wrinklefree.utils.hub import hub_is_reachable

if TYPE_CHECKING:
    from datasets import IterableDataset

logger = logging.getLogger(__name__)

ALTERNATIVES = "use data=packaged (text inside packages) or data=local data.sources.0.path=<your files>"
TASK_ALTERNATIVES = "use a task that needs no hub: recall, movie_reviews, news_topic, boolq, xsum"


class ResumableStream(Protocol):
    """The part of `datasets.IterableDataset` that we need."""

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        """Rows from the loaded state on."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position after the last row handed out."""
        ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next iteration at a position."""
        ...


def open_hub_stream(source: HubSource) -> "IterableDataset":
    """Rows of a hub dataset, downloaded as they are read, in the order of its files.

    Raises:
        NetworkError: the hub cannot be reached.
        DataError: there is no such dataset, subset or split.
    """
    return _load(source.path, source.name, source.split, source.revision, streaming=True, alternatives=ALTERNATIVES)


def load_hub_split(path: str, name: str | None, split: str) -> list[dict[str, Any]]:
    """All rows of one split of a hub dataset, from the hub's own cache after the first time.

    Raises:
        NetworkError: the hub cannot be reached.
        DataError: there is no such dataset, subset or split.
    """
    return list(_load(path, name, split, None, streaming=False, alternatives=TASK_ALTERNATIVES))


def hub_revision(path: str, revision: str | None, *, alternatives: str = ALTERNATIVES) -> str:
    """The commit of a dataset; a revision that is already a commit is returned as it is.

    Raises:
        NetworkError: the hub cannot be reached.
    """
    if revision is not None and len(revision) == 40:
        return revision
    from httpx2 import HTTPError
    from huggingface_hub import dataset_info
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    _require_hub(path, alternatives)
    if _is_offline():
        logger.warning("HF_HUB_OFFLINE is set: the commit of %s is unknown, its name stands in the fingerprint", path)
        return f"offline:{revision}"
    try:
        return dataset_info(path, revision=revision, timeout=10).sha or "unknown"
    except RepositoryNotFoundError as error:
        raise DataError(
            f"the hub has no dataset {path!r}, or it is private; check its name, or {alternatives}"
        ) from error
    except (HfHubHTTPError, HTTPError, OSError) as error:
        raise NetworkError(f"the hub did not answer for {path} ({_first_line(error)}); {alternatives}") from error


def text_of(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text of a row.

    Raises:
        DataError: the row has no such column, or it holds something else than text.
    """
    if column not in row:
        raise DataError(
            f"{where} has no column {column!r}; its columns are {', '.join(row)}: set the source's "
            "text_column to one of them"
        )
    value = row[column]
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column!r} holds {value!r:.60}, not text; set text_column to a text column")
    return value


def _load(path: str, name: str | None, split: str, revision: str | None, *, streaming: bool, alternatives: str) -> Any:
    _require_hub(path, alternatives)
    import datasets
    from datasets import exceptions
    from httpx2 import HTTPError

    try:
        return datasets.load_dataset(path, name, split=split, revision=revision, streaming=streaming)
    except exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"the hub has no dataset {path!r} ({_first_line(error)}); check its name, or {alternatives}"
        ) from error
    except ValueError as error:
        raise DataError(f"hub dataset {path}, subset {name}, split {split}: {_first_line(error)}") from error
    except (OSError, HTTPError, exceptions.DatasetGenerationError) as error:
        raise NetworkError(f"cannot read {path} from the hub ({_first_line(error)}); {alternatives}") from error


def _require_hub(path: str, alternatives: str) -> None:
    if not _is_offline() and not hub_is_reachable():
        raise NetworkError(
            f"the hub, which holds {path}, cannot be reached; {alternatives}, or set HF_HUB_OFFLINE=1 if it is in the "
            "hub's cache here"
        )


def _is_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
