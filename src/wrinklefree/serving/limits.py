"""What stands between the network and the API: who may ask, how much, and how slowly.

Two places are needed. `GuardedProtocol` sees the connection: headers that never end, clients that do not read, too many
connections. `Guard` sees the request: its host, its key, its size, a body that never ends. uvicorn has no limit for any of
these but the size of the headers.
"""

import asyncio
import hmac
import json
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from wrinklefree.serving.api_replies import error_body
from wrinklefree.serving.metrics import Metrics

Scope = MutableMapping[str, Any]
ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN_PATHS = frozenset({"/", "/health"})
"""Usable without the key: the page holds no secret and asks for the key, and a load balancer must see the state."""
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
DRAIN_SECONDS = 2.0
DRAIN_BYTES = 64 * 2**20
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


@dataclass(frozen=True)
class Limits:
    """Bounds on what clients may do."""

    max_body_bytes: int = 2**20
    read_seconds: float = 15.0
    """Longest time for a request's headers, and again for its body."""
    write_seconds: float = 60.0
    """Longest time that a client may leave the answer unread."""
    idle_seconds: int = 30
    """How long an unused connection stays open."""
    max_connections: int = 512


class Guard:
    """Checks host, key, type and size of a request, reads its body in bounded time, and counts the answer."""

    def __init__(
        self,
        application: Application,
        *,
        limits: Limits,
        api_key: str | None,
        hosts: frozenset[str] | None,
        metrics: Metrics,
    ) -> None:
        """Guard an application.

        Args:
            application: What answers the requests that pass.
            limits: Bounds.
            api_key: The key that requests must bear; None asks for none.
            hosts: Names that the Host header may hold, without a port; None allows any. A page of another site that
                makes its own name point to this machine (DNS rebinding) is stopped here.
            metrics: Where answers are counted.
        """
        self._application = application
        self._limits = limits
        self._key = None if api_key is None else api_key.encode()
        self._hosts = hosts
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._application(scope, receive, send)
            return
        counted = False

        async def counting_send(message: ASGIMessage) -> None:
            nonlocal counted
            if message["type"] == "http.response.start":
                # A new message: the application may send the same one again.
                message = {**message, "headers": [*message.get("headers", ()), *SECURITY_HEADERS]}
                if not counted:
                    counted = True
                    self._metrics.answered(scope["method"], scope["path"], message["status"])
            await send(message)

        refusal = self._refuse(scope)
        if refusal is not None:
            await _send_error(counting_send, receive, *refusal, drain=not _expects_continue(scope))
            return
        try:
            async with asyncio.timeout(self._limits.read_seconds):
                body = await self._read(receive)
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.read_seconds:g} s"
            await _send_error(counting_send, receive, 408, message, drain=False)
            return
        if body is None:
            return  # the client left
        if len(body) > self._limits.max_body_bytes:
            await _send_error(counting_send, receive, 413, self._too_large(), drain=True)
            return
        await self._application(scope, _replay(body, receive), counting_send)

    def _refuse(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
        if self._hosts is not None and name not in self._hosts:
            return 421, f"the host {host[:100]!r} is not served here; use http://127.0.0.1 or http://localhost"
        if self._key is not None and scope["path"] not in OPEN_PATHS:
            kind, _, given = headers.get(b"authorization", b"").partition(b" ")
            if kind.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
                given_what = "is wrong" if given else "is missing"
                return 401, f"the API key {given_what}; send it as Authorization: Bearer KEY"
        length = headers.get(b"content-length")
        if length is not None and int(length) > self._limits.max_body_bytes:
            return 413, self._too_large()
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if scope["method"] == "POST" and kind != b"application/json":
            # Also what keeps other sites' pages out: a browser sends JSON across sites only if we allowed it.
            return 415, f"the content type is {kind.decode('latin-1')[:100]!r}; send application/json"
        return None

    def _too_large(self) -> str:
        return f"the body is larger than {self._limits.max_body_bytes} bytes; send less"

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or a little more than is allowed of it; None when the client left."""
        body = bytearray()
        while len(body) <= self._limits.max_body_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if not message.get("more_body", False):
                break
        return bytes(body)


class GuardedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 connection with deadlines, and errors in the API's shape.

    Made through `guarded_protocol`, which sets the limits.
    """

    limits = Limits()
    _header_deadline: asyncio.TimerHandle | None = None
    _write_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take a connection, unless there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self._refuse(503, f"{self.limits.max_connections} connections are open; try again later")
            return
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clocks."""
        super().connection_lost(exc)
        for deadline in (self._header_deadline, self._write_deadline):
            if deadline is not None:
                deadline.cancel()

    def data_received(self, data: bytes) -> None:
        """Take bytes; the clock of unfinished headers is started once and not by every byte."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        self._watch_header()

    def pause_writing(self) -> None:
        """The client does not read: give it a while."""
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP; h11 knows when it is headers that are too long."""
        error = sys.exc_info()[1]
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self._refuse(status, str(error) or msg)

    def _watch_header(self) -> None:
        waiting = self.conn.their_state is h11.IDLE and not self.transport.is_closing()
        if waiting and self._header_deadline is None:
            self._header_deadline = self.loop.call_later(self.limits.read_seconds, self._header_late)
        elif not waiting and self._header_deadline is not None:
            self._header_deadline.cancel()
            self._header_deadline = None

    def _header_late(self) -> None:
        self._refuse(408, f"the request's headers did not arrive within {self.limits.read_seconds:g} s")

    def _refuse(self, status: int, message: str) -> None:
        """Answer for the application and close; where an answer is under way already, only close."""
        if self.transport.is_closing():
            return
        if self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
            return
        body = json.dumps(error_body(status, message)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        headers += [("retry-after", "1")] if status == 503 else []
        for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def guarded_protocol(bounds: Limits) -> type[GuardedProtocol]:
    """A connection class with these limits, for uvicorn's `http=`."""

    class Protocol(GuardedProtocol):
        limits = bounds

    return Protocol


def _replay(body: bytes, receive: Receive) -> Receive:
    """A body that was read already, then what happens to the connection."""
    given = False

    async def replay() -> ASGIMessage:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _expects_continue(scope: Scope) -> bool:
    return any(name == b"expect" for name, _ in scope["headers"])


async def _send_error(send: Send, receive: Receive, status: int, message: str, *, drain: bool) -> None:
    """Answer and close; with `drain`, read on for a moment, or a client in the middle of sending never sees the answer."""
    body = json.dumps(error_body(status, message)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] + ([(b"www-authenticate", b"Bearer")] if status == 401 else [])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": drain})
    if drain:
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                await _drain(receive)
        except TimeoutError:
            pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _drain(receive: Receive) -> None:
    dropped = 0
    while dropped < DRAIN_BYTES:
        message = await receive()
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return
        dropped += len(message.get("body", b""))
