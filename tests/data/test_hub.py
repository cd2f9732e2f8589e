"""The hub: what is said when it is not there."""

import time

import pytest

from wrinklefree.data import hub
from wrinklefree.data.config import HubSource
from wrinklefree.data.hub import hub_revision, load_hub_split, open_hub_stream, text_of
from wrinklefree.utils.errors import DataError, NetworkError


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)


@pytest.mark.usefixtures("unreachable")
def test_no_network_names_what_is_missing_and_what_to_do() -> None:
    started = time.monotonic()
    expected = (
        r"the hub, which holds owner/set, cannot be reached; use data=packaged .* or data=local data\.sources\.0\.path="
    )
    with pytest.raises(NetworkError, match=expected):
        open_hub_stream(HubSource(path="owner/set"))
    with pytest.raises(
        NetworkError, match=r"which holds nyu-mll/glue, cannot be reached; use a task that needs no hub: recall"
    ):
        load_hub_split("nyu-mll/glue", "sst2", "train")
    with pytest.raises(NetworkError, match="which holds owner/set, cannot be reached"):
        hub_revision("owner/set", None)
    assert time.monotonic() - started < 5


def test_offline_without_a_cached_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(NetworkError, match="owner/no-such-set"):
        open_hub_stream(HubSource(path="owner/no-such-set"))


@pytest.mark.usefixtures("unreachable")
def test_a_commit_is_its_own_identity() -> None:
    assert hub_revision("owner/set", "c" * 40) == "c" * 40


def test_rows_without_text() -> None:
    with pytest.raises(
        DataError, match="set X has no column 'text'; its columns are title, body: set the source's text_column"
    ):
        text_of({"title": 1, "body": 2}, "text", "set X")
    with pytest.raises(DataError, match="set X: column 'text' holds None, not text"):
        text_of({"text": None}, "text", "set X")
