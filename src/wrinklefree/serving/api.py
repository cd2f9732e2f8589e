"""The HTTP API: OpenAI's completions and chat completions over one engine, its state, its metrics and a chat page.

The routes exist before the model is loaded and say 503 until then. Bodies are decoded by `api_types`, become work in
`service`, and answers are built by `api_replies`; a client that leaves ends its work in the engine.
"""

import asyncio
import base64
import hashlib
import json
import re
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from importlib import resources

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from wrinklefree.serving.api_replies import Choice, Json, Reply, error_body
from wrinklefree.serving.generations import in_background
from wrinklefree.serving.limits import Receive, Scope, Send
from wrinklefree.serving.service import LOADING_RETRY_SECONDS, ApiError, Event, Kind, Loaded, Plan, Service, explain
from wrinklefree.serving.text_stream import Finish, Piece

KEEP_ALIVE_SECONDS = 10.0
"""A stream without text says so this often, so that proxies do not take it for dead."""


class _Answer(Response):
    """One request's answer, whole or as events; ends its work when the client leaves."""

    def __init__(self, service: Service, kind: Kind, body: bytes) -> None:
        super().__init__()
        self._service = service
        self._kind: Kind = kind
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = asyncio.create_task(self._answer(scope, receive, send))
        leaving = asyncio.create_task(_until_disconnect(receive))
        try:
            await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (answering, leaving):
                task.cancel()
            results = await asyncio.gather(answering, leaving, return_exceptions=True)
        if isinstance(results[0], Exception):
            raise results[0]

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        arrived = time.monotonic()
        started = False
        try:
            loaded = self._service.loaded
            async with self._service.planning:
                plan = await asyncio.to_thread(self._service.plan, self._kind, self._body)
            reply = Reply(
                plan.kind,
                model=loaded.engine.info.model,
                fingerprint=loaded.fingerprint,
                token_bytes=loaded.token_bytes,
                logprobs=plan.sampling.logprobs is not None,
            )
            async with aclosing(self._items(loaded, plan, arrived)) as items:
                if not plan.stream:
                    await JSONResponse(await _whole(reply, plan, items))(scope, receive, send)
                    return
                async with aclosing(_streamed(reply, plan, items)) as events:
                    async for event in events:
                        if not started:
                            started = True
                            await send(_EVENT_STREAM_START)
                        await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except Exception as error:  # noqa: BLE001 - every failure has an answer
            failure = explain(error, self._service)
            if started:
                await send({"type": "http.response.body", "body": _event(failure.body), "more_body": False})
            else:
                await failure.response()(scope, receive, send)

    async def _items(self, loaded: Loaded, plan: Plan, arrived: float) -> AsyncGenerator[Event | None, None]:
        """The engine's work, counted."""
        service = self._service
        deadline = asyncio.get_running_loop().time() + service.settings.request_seconds
        first: float | None = None
        started = False
        finished = unfinished = 0
        """Tokens of the choices that are whole, with those that a stop string cut off, and of the one under way."""
        try:
            async with in_background(
                service.slots,
                lambda work: service.events(loaded, plan, work),
                deadline=deadline,
                tick_seconds=KEEP_ALIVE_SECONDS,
            ) as items:
                started = True
                async for item in items:
                    event = None if item is None else item[1]
                    if isinstance(event, Finish):
                        finished, unfinished = finished + event.tokens, 0
                    elif isinstance(event, Piece):
                        unfinished += len(event.tokens)
                        if first is None and event.tokens:
                            first = time.monotonic()
                            service.metrics.first_text(first - arrived)
                    yield item
        finally:
            if started:
                service.metrics.generated(
                    prompt_tokens=plan.prompt_tokens,
                    completion_tokens=finished + unfinished,
                    seconds=0.0 if first is None else time.monotonic() - first,
                )


def create_application(service: Service) -> FastAPI:
    """The routes over a service; `limits.Guard` goes around it."""
    application = FastAPI(title="WrinkleFree", docs_url=None, redoc_url=None, openapi_url=None)
    page, page_headers = _chat_page()

    @application.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return error.response()

    @application.exception_handler(HTTPException)
    async def not_routed(request: Request, error: HTTPException) -> Response:
        reasons = {404: f"there is nothing at {request.url.path[:200]}", 405: f"{request.method} is not possible here"}
        body = error_body(error.status_code, reasons.get(error.status_code, str(error.detail)))
        return JSONResponse(body, error.status_code, dict(error.headers or {}))

    @application.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return explain(error, service).response()

    @application.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return _Answer(service, "chat", await request.body())

    @application.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return _Answer(service, "completion", await request.body())

    @application.get("/v1/models")
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model_card(service.loaded)]})

    @application.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != service.loaded.engine.info.model:
            raise ApiError(
                404, f"the model {name[:200]!r} is not served here", parameter="model", code="model_not_found"
            )
        return JSONResponse(_model_card(service.loaded))

    @application.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        body: Json = {"status": "ok" if service.state == "ready" else service.state}
        if service.state == "ready":
            return JSONResponse(body)
        return JSONResponse(body, 503, {"retry-after": str(LOADING_RETRY_SECONDS)})

    @application.get("/metrics")
    async def metrics() -> Response:
        text, kind = service.metrics.render()
        return Response(text, headers={"content-type": kind})

    @application.api_route("/", methods=["GET", "HEAD"])
    async def chat_page() -> Response:
        return Response(page, headers=page_headers)

    return application


async def _whole(reply: Reply, plan: Plan, items: AsyncIterator[Event | None]) -> Json:
    choices = [Choice() for _ in plan.prompts]
    produced = 0
    async for event in items:
        if event is None:
            continue
        choice, item = choices[event[0]], event[1]
        if isinstance(item, Finish):
            choice.finish = item.reason
            produced += item.tokens
        else:
            choice.text += item.text
            choice.tokens += item.tokens
    return reply.whole(choices, plan.prompt_tokens, produced)


async def _streamed(reply: Reply, plan: Plan, items: AsyncIterator[Event | None]) -> AsyncGenerator[bytes, None]:
    opened = plan.kind == "completion"
    produced = offset = 0
    async for event in items:
        if event is None:
            yield b": still working\n\n"
            continue
        if not opened:
            opened = True
            yield _event(reply.opening())
        index, item = event
        if isinstance(item, Finish):
            produced += item.tokens
            offset = 0
            yield _event(reply.ending(index, item.reason))
        else:
            if item.text or plan.sampling.logprobs is not None:
                yield _event(reply.piece(index, item.text, item.tokens, offset=offset))
            offset += len(item.text)
    if plan.include_usage:
        yield _event(reply.usage(plan.prompt_tokens, produced))
    yield b"data: [DONE]\n\n"


_EVENT_STREAM_START = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-store"),
        (b"x-accel-buffering", b"no"),
    ],
}


def _event(body: Json) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _model_card(loaded: Loaded) -> Json:
    info = loaded.engine.info
    return {
        "id": info.model,
        "object": "model",
        "created": loaded.created,
        "owned_by": "wrinklefree",
        "engine": info.engine,
        "context_length": info.context_length,
    }


def _chat_page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that allow only its own style and script to run."""
    page = (resources.files("wrinklefree.serving") / "static" / "chat.html").read_text(encoding="utf-8")

    def digests(tag: str) -> str:
        blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        return " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(block.encode()).digest()).decode()}'" for block in blocks
        )

    policy = (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return page.encode(), {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": policy,
        "cache-control": "no-cache",
    }
