"""The server process: opens the port at once, loads the model beside it, stops in order.

The first SIGTERM or Ctrl-C refuses new requests, lets running ones finish for a grace period, frees the engine and ends
with exit code 0; the second ends the process on the spot.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Literal

import uvicorn

from wrinklefree.serving.api import create_application
from wrinklefree.serving.engine.protocol import Engine
from wrinklefree.serving.engine.support import EngineName
from wrinklefree.serving.limits import LOOPBACK_NAMES, Guard, Limits, guarded_protocol
from wrinklefree.serving.metrics import Metrics
from wrinklefree.serving.service import Loaded, Service, ServiceSettings
from wrinklefree.utils.errors import ConfigError, CredentialsError, NetworkError

if TYPE_CHECKING:
    from wrinklefree.serving.engine.native.model import CacheType, HeadType

CLOSE_SECONDS = 30.0
"""Longest wait for an engine that is closed."""
KEY_VARIABLE = "WRINKLEFREE_API_KEY"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerSettings:
    """Where to listen, and the bounds."""

    host: str = "127.0.0.1"
    port: int = 8080
    """0 takes a free one; the log names it."""
    api_key: str | None = None
    grace_seconds: float = 30.0
    """How long running requests may go on after the first signal."""
    limits: Limits = field(default_factory=Limits)
    service: ServiceSettings = field(default_factory=ServiceSettings)


class Server(uvicorn.Server):
    """One engine behind one port."""

    def __init__(self, settings: ServerSettings, open_engine: Callable[[], Engine]) -> None:
        """Open the port; nothing is loaded yet.

        Raises:
            CredentialsError: the address can be reached from elsewhere and there is no API key.
            ConfigError: the address or the key cannot be used.
            NetworkError: the port is taken, or the address is not of this machine.
        """
        if settings.api_key is not None and (
            not settings.api_key.isprintable() or settings.api_key.split() != [settings.api_key]
        ):
            raise ConfigError("the API key is empty or holds blanks or control characters; choose another one")
        self.socket = _bind(settings)
        host, port = self.socket.getsockname()[:2]
        self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        """The server's URL, such as http://127.0.0.1:8080."""
        self.service = Service(settings.service, Metrics())
        self.failure: BaseException | None = None
        self._grace_seconds = settings.grace_seconds
        self._open_engine = open_engine
        self.loader = threading.Thread(target=self._load, name="load-model", daemon=True)
        loopback = ipaddress.ip_address(host).is_loopback
        guard = Guard(
            create_application(self.service),
            limits=settings.limits,
            api_key=settings.api_key,
            hosts=LOOPBACK_NAMES | {settings.host.lower()} if loopback else None,
            metrics=self.service.metrics,
        )
        super().__init__(
            uvicorn.Config(
                guard,  # pyright: ignore[reportArgumentType] - uvicorn spells out each message of the protocol
                http=guarded_protocol(settings.limits),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=settings.limits.idle_seconds,
                timeout_graceful_shutdown=int(settings.grace_seconds) + 5,
            )
        )

    def run_until_stopped(self) -> int:
        """Serve until a signal; returns the exit code.

        Raises:
            WrinkleFreeError: the model could not be loaded.
        """
        logger.info("listening on %s; loading the model", self.address)
        asyncio.run(self.serve(sockets=[self.socket]))
        if self.failure is not None:
            raise self.failure
        return 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop in order at the first signal, at once at the second."""
        del frame
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then load."""
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self.loader.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Turn away new requests, wait for running ones, free the engine."""
        self.service.stop()
        running = self.service.slots.used
        if running:
            logger.info("stopping: %d running requests have %g s to finish", running, self._grace_seconds)
        abort = asyncio.get_running_loop().call_later(self._grace_seconds, self.service.slots.abort)
        await super().shutdown(sockets)
        abort.cancel()
        closing = threading.Thread(target=self.service.close, name="close-engine", daemon=True)
        closing.start()
        deadline = time.monotonic() + CLOSE_SECONDS
        while closing.is_alive() and time.monotonic() < deadline:
            await asyncio.sleep(0.02)
        logger.info("stopped")

    def _load(self) -> None:
        started = time.monotonic()
        try:
            engine = self._open_engine()
            try:
                loaded = Loaded.of(engine)
            except BaseException:
                engine.close()
                raise
        except BaseException as error:  # noqa: BLE001 - raised again where the command ends
            self.failure = error
            self._in_loop(lambda: setattr(self, "should_exit", True))
            return
        info = engine.info
        if not self._in_loop(lambda: self.service.ready(loaded)):
            engine.close()
            return
        logger.info(
            "serving %s with %s: context %d tokens, %d at a time, loaded in %.1f s; chat page %s/",
            info.model, info.engine, info.context_length, info.slots, time.monotonic() - started, self.address,
        )  # fmt: skip

    def _in_loop(self, call: Callable[[], None]) -> bool:
        """Call in the event loop's thread; false when it has ended."""
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            return False
        return True


def serve(
    model: Path,
    settings: ServerSettings,
    *,
    engine: EngineName | Literal["auto"] = "auto",
    context_length: int | None = None,
    slots: int = 4,
    threads: int | None = None,
    cache: "CacheType | None" = None,
    head: "HeadType | None" = None,
) -> int:
    """Serve a GGUF file or a checkpoint folder until a signal; returns the exit code.

    Raises:
        WrinkleFreeError: it cannot be served; the message says why.
    """
    if not model.exists():
        raise ConfigError(f"{model} does not exist; give a GGUF file or a checkpoint folder")

    def open_model() -> Engine:
        from wrinklefree.serving.engine.choose import open_engine

        return open_engine(
            model,
            engine=engine,
            context_length=context_length,
            slots=slots,
            threads=threads,
            cache=cache,
            head=head,
        )

    server = Server(settings, open_model)
    code = server.run_until_stopped()
    if server.loader.is_alive():
        # Stopped while loading: an import or a native library in that thread would not survive the interpreter's end.
        logging.shutdown()
        os._exit(code)
    return code


def _bind(settings: ServerSettings) -> socket.socket:
    where = f"port {settings.port} of {settings.host}"
    if not 0 <= settings.port < 2**16:
        raise ConfigError(f"the port is {settings.port}; give one from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ConfigError(f"the host {settings.host!r} has no address ({error}); give --host 127.0.0.1") from error
    if not ipaddress.ip_address(address[0]).is_loopback and settings.api_key is None:
        raise CredentialsError(
            f"{settings.host} can be reached from other machines: set an API key ({KEY_VARIABLE}=... or --api-key), "
            "or leave --host at 127.0.0.1"
        )
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        opened.close()
        raise NetworkError(f"{where} cannot be opened ({error.strerror}); choose another one with --port") from error
    return opened
