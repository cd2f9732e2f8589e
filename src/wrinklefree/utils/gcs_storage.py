"""A Google Cloud Storage bucket as a `Storage`: runs that outlive the machine they began on.

What a bucket promises and a folder does not: a write of one object is atomic, and can be made conditional on the
generation (version) that it replaces. That is all we use. Every write is one request with its CRC32C, never a resumable
one when it is conditional: servers were seen to ignore conditions on those. Large blobs lie under names of their own
content and need no condition.

The client library is imported with the first use: credentials are checked in seconds, before torch.
"""

import os
import threading
from collections.abc import Callable, Generator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from wrinklefree.utils.errors import CredentialsError, NetworkError, StorageError

CONNECT_SECONDS, READ_SECONDS = 5.0, 120.0
RETRY_SECONDS = 60.0
"""How long one operation repeats what failed for a passing reason (429, 5xx, a broken connection)."""
PIECE_BYTES = 64 * 2**20
"""Pieces of an unconditional upload: what a broken connection repeats, and what is held in memory."""

Result = TypeVar("Result")


class GcsStorage:
    """Objects of one bucket whose names start with `prefix/`.

    Args:
        bucket: Its name, without `gs://`.
        prefix: For example `experiments/<fingerprint>`.
        client: A `google.cloud.storage.Client`; made from the environment's credentials when absent.
        retry_seconds: How long to repeat an operation that failed for a passing reason.
    """

    def __init__(
        self, bucket: str, prefix: str, *, client: Any | None = None, retry_seconds: float = RETRY_SECONDS
    ) -> None:
        self.url = f"gs://{bucket}/{prefix}"
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._client = make_client() if client is None else client
        self._bucket: Any = self._client.bucket(bucket)
        self._retry_seconds = retry_seconds

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def read_bytes(self, name: str) -> bytes:
        """Content of `name`, checked against the checksum that the server sends along."""
        return self._call(name, lambda blob, options: cast("bytes", blob.download_as_bytes(**options)))

    def read_versioned(self, name: str) -> tuple[bytes, str]:
        """Content of `name` and its generation."""

        def read(blob: Any, options: dict[str, Any]) -> tuple[bytes, str]:
            content = cast("bytes", blob.download_as_bytes(**options))
            return content, str(blob.generation)

        return self._call(name, read)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Create or replace `name`."""
        self._call(name, lambda blob, options: _upload(blob, data, options), writes=True)

    def create(self, name: str, data: bytes) -> bool:
        """Write `name` only if it does not exist; of many racing callers exactly one gets True."""
        return self._write_if(name, data, generation=0)

    def replace(self, name: str, data: bytes, version: str) -> bool:
        """Write `name` only if its generation is still `version`; of many racing callers exactly one gets True."""
        return self._write_if(name, data, generation=int(version))

    def exists(self, name: str) -> bool:
        """Whether `name` is there."""
        return self._call(name, lambda blob, options: bool(blob.exists(**options)))

    def list(self, prefix: str = "") -> list[str]:
        """Names that start with `prefix`, sorted."""
        from google.api_core.exceptions import GoogleAPIError

        with _explained(f"{self.url}/{prefix}", GoogleAPIError):
            blobs = self._client.list_blobs(self._bucket, prefix=self._prefix + prefix, **self._options())
            return sorted(cast("str", blob.name).removeprefix(self._prefix) for blob in blobs)

    def delete(self, name: str) -> None:
        """Remove `name`; nothing happens when there is none."""

        def remove(blob: Any, options: dict[str, Any]) -> None:
            from google.api_core.exceptions import NotFound

            try:
                blob.delete(**options)
            except NotFound:
                return

        self._call(name, remove)

    def upload(self, name: str, path: Path) -> None:
        """Create or replace `name` from a file, piece by piece; for blobs that lie under the name of their content."""

        def send(blob: Any, options: dict[str, Any]) -> None:
            if path.stat().st_size > PIECE_BYTES:
                blob.chunk_size = PIECE_BYTES
            blob.upload_from_filename(str(path), checksum="crc32c", **options)

        self._call(name, send, writes=True)

    def download(self, name: str, path: Path) -> None:
        """Write the content of `name` to the new file `path`; a failure leaves no file."""
        try:
            self._call(name, lambda blob, options: blob.download_to_filename(str(path), checksum="crc32c", **options))
        except BaseException:
            path.unlink(missing_ok=True)
            raise

    def _write_if(self, name: str, data: bytes, *, generation: int) -> bool:
        from google.api_core.exceptions import PreconditionFailed

        def write(blob: Any, options: dict[str, Any]) -> bool:
            try:
                _upload(blob, data, {**options, "if_generation_match": generation})
            except PreconditionFailed:
                # The reply to an earlier try of ours may have been lost after the server had obeyed it.
                return self._holds(name, data)
            return True

        return self._call(name, write, writes=True)

    def _holds(self, name: str, data: bytes) -> bool:
        try:
            return self.read_bytes(name) == data
        except FileNotFoundError:
            return False

    def _call(self, name: str, operation: Callable[[Any, dict[str, Any]], Result], *, writes: bool = False) -> Result:
        from google.api_core.exceptions import GoogleAPIError, NotFound

        with _explained(f"{self.url}/{name}", GoogleAPIError):
            try:
                return operation(self._bucket.blob(self._prefix + name), self._options())
            except NotFound as error:
                if writes:
                    raise  # only the bucket can be missing
                raise FileNotFoundError(f"{self.url}/{name}") from error

    def _options(self) -> dict[str, Any]:
        from google.cloud.storage.retry import DEFAULT_RETRY  # pyright: ignore[reportMissingTypeStubs]

        retry = DEFAULT_RETRY.with_timeout(self._retry_seconds).with_delay(initial=0.2, maximum=8.0)
        return {"retry": retry, "timeout": (CONNECT_SECONDS, READ_SECONDS)}


def make_client() -> Any:
    """A client with the environment's credentials.

    Raises:
        CredentialsError: there are none, or their file cannot be used; says the three ways to mend it.
    """
    from google.auth.exceptions import GoogleAuthError
    from google.cloud import storage  # pyright: ignore[reportMissingTypeStubs]

    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return storage.Client(project="emulated")
    found: list[Any] = []

    def search() -> None:
        try:
            found.append(storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "unnamed")))
        except (GoogleAuthError, OSError, ValueError) as error:
            found.append(error)

    # A thread, because off Google's machines the search can hang on the metadata server's name.
    thread = threading.Thread(target=search, name="credentials", daemon=True)
    thread.start()
    thread.join(10.0)
    client = found[0] if found else TimeoutError("the search for credentials did not end within 10 seconds")
    if isinstance(client, Exception):
        reason = " ".join(str(client).split()) or type(client).__name__
        raise CredentialsError(
            f"gcs.enabled=true, and there are no usable Google Cloud credentials ({reason}). Set "
            "GOOGLE_APPLICATION_CREDENTIALS to a service account's key file, or run `gcloud auth application-default "
            "login`, or leave the bucket out with gcs.enabled=false."
        ) from client
    return client


def check_access(bucket: str, prefix: str) -> None:
    """Find out in seconds whether this process may write to the bucket.

    Raises:
        CredentialsError: no credentials, or they may not write there.
        StorageError: there is no such bucket.
        NetworkError: it cannot be reached.
    """
    with closing(GcsStorage(bucket, prefix, retry_seconds=8.0)) as probe:
        probe.write_bytes("access_check", b"written at the start of a run to see that it may write")


def _upload(blob: Any, data: bytes, options: dict[str, Any]) -> None:
    blob.upload_from_string(data, content_type="application/octet-stream", checksum="crc32c", **options)


@contextmanager
def _explained(url: str, api_error: type[Exception]) -> Generator[None]:
    """Turn the client's errors into ours."""
    from google.api_core.exceptions import Forbidden, NotFound, RetryError, ServerError, TooManyRequests, Unauthorized
    from google.auth.exceptions import GoogleAuthError
    from google.cloud.storage.exceptions import DataCorruption  # pyright: ignore[reportMissingTypeStubs]
    from requests.exceptions import RequestException

    passing = (RetryError, ServerError, TooManyRequests, RequestException, ConnectionError, TimeoutError)
    try:
        yield
    except (Unauthorized, Forbidden, GoogleAuthError) as error:
        raise CredentialsError(
            f"these Google Cloud credentials may not use {url} ({_reason(error)}). Give them the role "
            "roles/storage.objectAdmin on the bucket, or use others (GOOGLE_APPLICATION_CREDENTIALS)."
        ) from error
    except NotFound as error:
        raise StorageError(
            f"{url}: there is no such bucket ({_reason(error)}); create it, or set gcs.bucket"
        ) from error
    except DataCorruption as error:
        raise StorageError(f"{url} arrived garbled ({_reason(error)}); try again") from error
    except passing as error:
        raise NetworkError(
            f"{url} cannot be reached ({_reason(error)}). What this run saved is on the local disk; the same command "
            "uploads it when the bucket answers."
        ) from error
    except api_error as error:
        raise StorageError(f"{url}: the bucket refuses ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    cause = error.__cause__ if error.__cause__ is not None else error
    return " ".join(str(cause).split())[:300] or type(cause).__name__
