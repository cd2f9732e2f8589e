"""The server with OpenAI's own client, and with clients that mean no good."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import psutil
import pytest
from tests.serving.conftest import TINY, ScriptedEngine, running, until

from wrinklefree.serving.limits import Limits
from wrinklefree.serving.server import Server, ServerSettings
from wrinklefree.serving.service import ServiceSettings
from wrinklefree.utils.errors import CheckpointError, ConfigError, CredentialsError, NetworkError

NAME = "tiny-scripted"
ROOT = Path(__file__).resolve().parents[2]
TEXT = "Hello, wörld! 🙂 bye"
ASK: Any = [{"role": "user", "content": "Hi"}]
QUICK = ServerSettings(port=0, limits=Limits(max_body_bytes=2**16, read_seconds=0.4), grace_seconds=5)


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(TEXT)


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine) -> Iterator[Server]:
    with running(engine, QUICK) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(
    server: Server, body: bytes | dict[str, Any], path: str = "/v1/completions", **headers: str
) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(server.address + path, content=content, headers={"content-type": "application/json", **headers})


def error_of(response: httpx2.Response) -> dict[str, Any]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def talk(server: Server, request: bytes, *, seconds: float = 10.0) -> bytes:
    """Send bytes, return everything that comes back until the server closes."""
    with socket.create_connection(server.socket.getsockname()[:2], timeout=seconds) as connection:
        connection.sendall(request)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    while chunk := connection.recv(65536):
        received += chunk
    return received


def head_of(length: int | None) -> bytes:
    """The start of a request with a body of so many bytes, or in chunks."""
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    start = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json"
    return f"{start}\r\n{body}\r\n\r\n".encode()


# What OpenAI's client sees.


def test_a_whole_chat_answer(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=[{"role": "developer", "content": "Be brief."}, *ASK],
        temperature=0,
        max_tokens=50,
        user="me",
    )
    tokens = len(engine.tokenizer.encode(TEXT))
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    prompt, sampling = engine.requests[-1]
    assert engine.tokenizer.decode(prompt) == "Be brief.\nUser: Hi\nAssistant:"
    assert (sampling.temperature, sampling.max_tokens, sampling.seed, sampling.logprobs) == (0, 50, None, None)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), tokens)
    assert answer.model == NAME
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.startswith("fp_")


def test_a_streamed_chat_answer(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(model=NAME, messages=ASK, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(pieces) == TEXT
    assert len(pieces) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens > 5
    assert len({chunk.id for chunk in chunks}) == 1


def test_streams_are_events_that_end_with_done(server: Server) -> None:
    response = post(server, {"prompt": "x", "stream": True, "max_tokens": 2})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.text.endswith("data: [DONE]\n\n")
    assert "usage" not in response.text


def test_every_stream_has_the_same_headers(server: Server) -> None:
    names = [sorted(post(server, {"prompt": "x", "stream": True, "max_tokens": 1}).headers.raw) for _ in range(5)]
    assert [len(headers) for headers in names] == [len(names[0])] * 5


@pytest.mark.parametrize(
    ("stop", "text"), [("ld!", "Hello, wör"), (["zzz", " wör"], "Hello,"), (["never"], TEXT), ("H", "")]
)
@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_are_cut(client: openai.OpenAI, stop: Any, text: str, stream: bool) -> None:
    if stream:
        chunks = client.chat.completions.create(model=NAME, messages=ASK, stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    else:
        answer = client.chat.completions.create(model=NAME, messages=ASK, stop=stop)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (text, "stop")


def test_the_limit_is_reported_as_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASK, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


@pytest.mark.parametrize(("seed", "used"), [(7, 7), (-1, 2**31 - 1), (2**63, 0)])
def test_seeds_reach_the_engine(client: openai.OpenAI, engine: ScriptedEngine, seed: int, used: int) -> None:
    answer = client.completions.create(model=NAME, prompt="x", seed=seed, max_tokens=60)
    assert answer.choices[0].text == f"{TEXT} seed {used}"
    assert engine.requests[-1][1].seed == used


def test_logprobs_of_a_chat(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    answer = client.chat.completions.create(model=NAME, messages=ASK, logprobs=True, top_logprobs=2, stop="ld!")
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.content is not None
    assert b"".join(bytes(entry.bytes or ()) for entry in found.content).decode() == "Hello, wör"
    first = engine.tokenizer.encode(TEXT)[0]
    entry = found.content[0]
    assert (entry.token, entry.logprob) == ("H", -0.5)
    assert [(other.token, other.logprob) for other in entry.top_logprobs] == [
        ("H", -0.5),
        (engine.tokenizer.decode([first + 1]), -1.5),
    ]
    streamed = client.chat.completions.create(model=NAME, messages=ASK, logprobs=True, stop="ld!", stream=True)
    together = [
        entry for chunk in streamed if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert [entry.token for entry in together] == [entry.token for entry in found.content]
    assert together[0].top_logprobs == []


def test_logprobs_of_a_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=NAME, prompt="x", logprobs=2, max_tokens=4)
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.tokens is not None
    assert "".join(found.tokens) == answer.choices[0].text == "Hello,"
    assert found.text_offset == [0, 1, 4, 5]
    assert found.token_logprobs == [-0.5] * 4
    assert found.top_logprobs is not None
    assert max(found.top_logprobs[0].values()) == -0.5


def test_prompts_of_every_shape(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    several = client.completions.create(model=NAME, prompt=["a", "b"], echo=True, max_tokens=2)
    assert [choice.text for choice in several.choices] == ["aHell", "bHell"]
    assert [choice.index for choice in several.choices] == [0, 1]
    assert several.usage is not None
    assert several.usage.completion_tokens == 4
    client.completions.create(model=NAME, prompt=[5, 6, 7], max_tokens=1)
    assert engine.requests[-1][0] == [5, 6, 7]
    streamed = client.completions.create(model=NAME, prompt=[[5], [6]], max_tokens=2, stream=True)
    texts = ["", ""]
    for chunk in streamed:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["Hell", "Hell"]


def test_a_completion_is_short_unless_asked_otherwise(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.completions.create(model=NAME, prompt="x")
    assert engine.requests[-1][1].max_tokens == 16
    client.chat.completions.create(model=NAME, messages=ASK)
    prompt, sampling = engine.requests[-1]
    assert sampling.max_tokens == engine.info.context_length - len(prompt)


def test_models(client: openai.OpenAI) -> None:
    [model] = client.models.list().data
    assert (model.id, model.owned_by) == (NAME, "wrinklefree")
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="the model 'gpt' is not served here"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize(
    ("options", "kind", "message", "parameter"),
    [
        ({"model": "gpt-4"}, openai.NotFoundError, "the one that is: 'tiny-scripted'", "model"),
        ({"n": 2}, openai.BadRequestError, "`n` is not supported", "n"),
        ({"tools": [{}]}, openai.BadRequestError, "`tools` is not supported", "tools"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "`response_format` is not", "response_format"),
        ({"extra_body": {"temperaturee": 1}}, openai.BadRequestError, "did you mean `temperature`?", "temperaturee"),
        ({"temperature": 2.5}, openai.BadRequestError, "less than or equal to 2, given 2.5", "temperature"),
        ({"top_logprobs": 3}, openai.BadRequestError, "needs `logprobs: true`", "top_logprobs"),
        ({"stop": list("abcde")}, openai.BadRequestError, "a list of at most 4 texts", "stop"),
        ({"max_tokens": 600}, openai.BadRequestError, "the context holds 512 tokens", "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "at least 1 item", "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, openai.BadRequestError, "given 'tool'", "messages"),
        ({"messages": [{"role": "user", "content": "7" * 600}]}, openai.BadRequestError, "the prompt has 6", "messages"),
        ({"messages": [{"role": "user", "content": "x" * 30_000}]}, openai.BadRequestError, "has at least", "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]},
            openai.BadRequestError, "images, audio and files are not supported", "messages",
        ),
    ],
)  # fmt: skip
def test_wrong_requests(
    client: openai.OpenAI, options: dict[str, Any], kind: type[openai.APIStatusError], message: str, parameter: str
) -> None:
    with pytest.raises(kind) as error:
        client.chat.completions.create(**{"model": NAME, "messages": ASK, **options})
    assert message in error.value.message
    assert error.value.param == parameter


def test_harmless_settings_are_ignored(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=ASK, n=1, presence_penalty=0, tools=[], store=False, metadata={"a": "b"}, logit_bias=None,
        response_format={"type": "text"}, extra_body={"anything": 1, "top_k": -1},
    )  # fmt: skip
    assert answer.choices[0].message.content == TEXT


def test_an_engine_that_breaks(client: openai.OpenAI, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(openai.InternalServerError, match="the engine failed: the engine broke"):
        client.completions.create(model=NAME, prompt="FAIL")
    chunks = client.completions.create(model=NAME, prompt="FAIL", stream=True)
    text = ""
    with pytest.raises(openai.APIError, match="the engine broke"):
        for chunk in chunks:
            text += chunk.choices[0].text
    assert text == "Hell"
    assert caplog.messages == ["the engine failed: the engine broke"] * 2


def test_metrics_count(server: Server, client: openai.OpenAI) -> None:
    def values() -> dict[str, float]:
        lines = httpx2.get(f"{server.address}/metrics").text.splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}

    before = values()
    client.completions.create(model=NAME, prompt=[5, 6], max_tokens=4)
    after = values()
    ok = 'wrinklefree_requests_total{method="POST",route="/v1/completions",status="200"}'
    assert after[ok] - before.get(ok, 0) == 1
    assert after["wrinklefree_prompt_tokens_total"] - before["wrinklefree_prompt_tokens_total"] == 2
    assert after["wrinklefree_completion_tokens_total"] - before["wrinklefree_completion_tokens_total"] == 4
    first = "wrinklefree_time_to_first_token_seconds_count"
    assert after[first] - before[first] == 1
    assert after["wrinklefree_ready"] == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("options", [{"stop": "ld!"}, {"stop": "H"}, {"prompt": ["a", "b"], "max_tokens": 3}])
def test_metrics_agree_with_usage(options: dict[str, Any], stream: bool) -> None:
    """Tokens that a stop string cut off count, and so does an answer without text."""
    with running(ScriptedEngine(TEXT)) as server:
        body = {"prompt": "x", "stream": stream, "max_tokens": 50} | options
        body |= {"stream_options": {"include_usage": True}} if stream else {}
        response = post(server, body)
        answer = json.loads(response.text.split("data: ")[-2]) if stream else response.json()
        lines = httpx2.get(f"{server.address}/metrics").text.splitlines()
    counted = {
        name: next(float(line.split()[1]) for line in lines if line.startswith(f"wrinklefree_{name}_total "))
        for name in ("prompt_tokens", "completion_tokens")
    }
    assert counted == {name: answer["usage"][name] for name in counted}
    assert counted["completion_tokens"] > 0


def test_the_page_allows_only_its_own_script(server: Server) -> None:
    page = httpx2.get(f"{server.address}/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "//" not in page.text.replace("http://www.w3.org/2000/svg", "").replace("// ", "")
    assert "innerHTML" not in page.text
    assert "access-control-allow-origin" not in page.headers


# State: loading, stopping, keys, hosts.


def test_a_server_answers_while_the_model_loads() -> None:
    go = threading.Event()

    def load() -> ScriptedEngine:
        go.wait(20)
        return ScriptedEngine()

    with running(load, wait=False) as server:
        until(lambda: server.started)
        response = post(server, {"prompt": "x"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "2")
        assert error_of(response)["code"] == "loading"
        health = httpx2.get(f"{server.address}/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        assert httpx2.get(f"{server.address}/v1/models").status_code == 503
        assert httpx2.get(f"{server.address}/").status_code == 200
        go.set()
        until(lambda: httpx2.get(f"{server.address}/health").status_code == 200)
        assert post(server, {"prompt": "x"}).status_code == 200


def test_a_model_that_does_not_load_ends_the_server() -> None:
    def load() -> ScriptedEngine:
        raise CheckpointError("model.gguf is truncated")

    server = Server(ServerSettings(port=0), load)
    with pytest.raises(CheckpointError, match="is truncated"):
        server.run_until_stopped()


def test_stopping_finishes_what_runs_and_turns_away_what_waits() -> None:
    engine = ScriptedEngine(slots=1)
    engine.go.clear()
    with running(engine) as server, ThreadPoolExecutor(2) as pool:
        runs = pool.submit(post, server, {"prompt": "x", "max_tokens": 60})
        until(lambda: engine.at_work == 1)
        waits = pool.submit(post, server, {"prompt": "y"})
        until(lambda: server.service.slots.waiting == 1)
        server.should_exit = True
        assert error_of(waits.result())["code"] == "stopping"
        assert waits.result().status_code == 503
        with pytest.raises(httpx2.TransportError):
            post(server, {"prompt": "z"})
        engine.go.set()
        assert runs.result().json()["choices"][0]["text"] == TEXT
    assert engine.closed
    assert len(engine.requests) == 1


def test_a_request_that_outlasts_the_grace_period_is_broken_off() -> None:
    engine = ScriptedEngine(delay=0.1)
    with running(engine, ServerSettings(port=0, grace_seconds=0.2)) as server, ThreadPoolExecutor(2) as pool:
        whole = pool.submit(post, server, {"prompt": "x"})
        streamed = pool.submit(post, server, {"prompt": "x", "stream": True})
        until(lambda: engine.at_work == 2)
        server.should_exit = True
        assert whole.result().status_code == 503
        assert '"code":"stopping"' in streamed.result().text
        assert "[DONE]" not in streamed.result().text
    assert engine.closed


def test_the_key() -> None:
    with running(ScriptedEngine(), ServerSettings(port=0, api_key="s3cret-key")) as server:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic s3cret-key"}):
            response = post(server, {"prompt": "x"}, **headers)
            assert response.status_code == 401
            assert error_of(response)["type"] == "authentication_error"
            assert response.headers["www-authenticate"] == "Bearer"
        assert "is missing" in post(server, {"prompt": "x"}).text
        assert "is wrong" in post(server, {"prompt": "x"}, authorization="Bearer nope").text
        assert post(server, {"prompt": "x"}, authorization="Bearer s3cret-key").status_code == 200
        assert httpx2.get(f"{server.address}/metrics").status_code == 401
        assert httpx2.get(f"{server.address}/health").status_code == 200
        assert httpx2.get(f"{server.address}/").status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_addresses_need_a_key(host: str) -> None:
    with pytest.raises(
        CredentialsError, match=r"can be reached from other machines: set an API key \(WRINKLEFREE_API_KEY"
    ):
        Server(ServerSettings(host=host, port=0), ScriptedEngine)


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n"])
def test_strange_keys_are_refused(key: str) -> None:
    with pytest.raises(ConfigError, match="the API key is empty or holds blanks"):
        Server(ServerSettings(port=0, api_key=key), ScriptedEngine)


def test_a_taken_port_and_a_wrong_host_are_one_sentence(server: Server) -> None:
    port = server.socket.getsockname()[1]
    with pytest.raises(NetworkError, match=rf"port {port} of 127.0.0.1 cannot be opened \(Address already in use\)"):
        Server(ServerSettings(port=port), ScriptedEngine)
    with pytest.raises(ConfigError, match="has no address"):
        Server(ServerSettings(host="no such host", port=0), ScriptedEngine)
    with pytest.raises(ConfigError, match="the port is 70000"):
        Server(ServerSettings(port=70000), ScriptedEngine)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", ""])
def test_a_foreign_host_name_is_refused(server: Server, host: str) -> None:
    response = httpx2.get(f"{server.address}/v1/models", headers={"host": host})
    assert response.status_code == 421
    assert "is not served here" in error_of(response)["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:99", "127.0.0.1:1", "[::1]", "[::1]:80"])
def test_names_of_this_machine_are_accepted(server: Server, host: str) -> None:
    assert httpx2.get(f"{server.address}/v1/models", headers={"host": host}).status_code == 200


# Clients that mean no good.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON in UTF-8"),
        (b"{", "not JSON in UTF-8"),
        (b'{"prompt": "\xff\xfe"}', "not JSON in UTF-8"),
        (b'{"prompt": "\\ud800"}', "not JSON in UTF-8"),
        (b'{"prompt": ' + b"[" * 30_000, "recursion limit"),
        (b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}", "number out of range"),
        (b'{"prompt": "x", "max_tokens": 99999999999999999999}', "the context holds 512"),
        (b'{"prompt": "x", "temperature": NaN}', "finite number"),
        (b'{"prompt": "x", "temperature": 1e999}', "finite number"),
        (b'{"prompt": "x", "max_tokens": true}', "valid integer"),
        (b'{"prompt": "x", "max_tokens": -1}', "greater than or equal to 1"),
        (b'{"prompt": [99999999]}', "the vocabulary has 4096"),
        (b'{"prompt": []}', "expected a text, at most 16 texts"),
        (b'{"prompt": {}}', "expected a text, at most 16 texts"),
        (b"[]", "no JSON object"),
        (b"null", "no JSON object"),
        (b"{}", "`prompt` is missing"),
    ],
)
def test_broken_bodies(server: Server, body: bytes, message: str) -> None:
    response = post(server, body)
    assert response.status_code == 400
    assert message in error_of(response)["message"]


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("GET", "/v1/%00%ff", 404),
        ("GET", "/static/../../etc/passwd", 404),
        ("GET", "/" + "a" * 4000, 404),
        ("GET", "/v1/completions", 405),
        ("PUT", "/v1/models", 405),
        ("BREW", "/", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
    ],
)
def test_unknown_paths_and_methods(server: Server, method: str, path: str, status: int) -> None:
    response = httpx2.request(method, server.address + path)
    assert response.status_code == status
    assert error_of(response)["message"]


def test_another_content_type_is_refused(server: Server) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        response = httpx2.post(f"{server.address}/v1/completions", content=b"{}", headers={"content-type": kind})
        assert response.status_code == 415
        assert "send application/json" in error_of(response)["message"]


def test_large_bodies(server: Server) -> None:
    announced = post(server, b'{"prompt": "' + b"x" * 2**21 + b'"}')
    assert announced.status_code == 413
    assert "larger than 65536 bytes" in error_of(announced)["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(200):
            yield b"x" * 2**14

    streamed = httpx2.post(
        f"{server.address}/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert streamed.status_code == 413


def test_a_body_without_end_is_cut_off(server: Server) -> None:
    head = head_of(None)
    received = b""
    sent = 0
    with socket.create_connection(server.socket.getsockname()[:2], timeout=10) as connection:
        connection.sendall(head)
        started = time.monotonic()
        try:
            while sent < 2**30:
                sent += connection.send(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
        except OSError:
            pass
        assert time.monotonic() - started < 9
        try:
            received = read_all(connection)
        except OSError:
            received = b""  # a reset may overtake the answer
    assert sent < 2**30
    assert received == b"" or received.startswith(b"HTTP/1.1 413 ")


def test_slow_headers_and_slow_bodies_time_out(server: Server) -> None:
    silent = talk(server, b"")
    assert silent.startswith(b"HTTP/1.1 408 ")
    assert b"headers did not arrive within 0.4 s" in silent
    head = head_of(100)
    slow = talk(server, head + b'{"prompt"')
    assert slow.startswith(b"HTTP/1.1 408 ")
    assert b"the body did not arrive within 0.4 s" in slow


@pytest.mark.parametrize("first", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"], ids=["new", "kept alive"])
def test_dripping_headers_do_not_extend_the_deadline(server: Server, first: bytes) -> None:
    with socket.create_connection(server.socket.getsockname()[:2], timeout=10) as connection:
        connection.sendall(first)
        if first:
            answer = b""
            while not answer.endswith(b"}"):
                answer += connection.recv(4096)
            assert answer.startswith(b"HTTP/1.1 200 ")
        started = time.monotonic()
        connection.settimeout(0.05)
        received = b""
        for byte in b"GET / HTTP/1.1\r\nX-Slow: " + b"a" * 1000:
            try:
                connection.sendall(bytes([byte]))
                received = connection.recv(4096)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408 ")
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET / FTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000, b"431"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -5\r\n\r\n", b"400"),
        (b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", b"501"),
    ],
)
def test_what_is_not_http_is_refused_in_json(server: Server, request_bytes: bytes, status: bytes) -> None:
    received = talk(server, request_bytes)
    assert received.startswith(b"HTTP/1.1 " + status + b" ")
    assert set(json.loads(received.partition(b"\r\n\r\n")[2])) == {"error"}


def test_a_broken_chunk_in_a_body_closes_the_connection(server: Server) -> None:
    head = head_of(None)
    assert talk(server, head + b"zz\r\n").startswith(b"HTTP/1.1 400 ")


def test_a_client_that_leaves_frees_its_slot(server: Server, engine: ScriptedEngine) -> None:
    engine.go.clear()
    closed = engine.closed_streams
    try:
        for stream in (True, False):
            body = json.dumps({"prompt": "x", "stream": stream}).encode()
            with socket.create_connection(server.socket.getsockname()[:2]) as connection:
                connection.sendall(head_of(len(body)) + body)
                until(lambda: engine.at_work == 1)
            engine.go.set()  # a generator sees it at its next token
            until(lambda: engine.at_work == 0 and server.service.slots.used == 0)
            engine.go.clear()
    finally:
        engine.go.set()
    assert engine.closed_streams == closed + 2


def test_a_full_line_says_come_back() -> None:
    engine = ScriptedEngine(slots=1)
    engine.go.clear()
    settings = ServerSettings(port=0, service=ServiceSettings(max_queue=1))
    with running(engine, settings) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(post, server, {"prompt": "x"})
        until(lambda: engine.at_work == 1)
        second = pool.submit(post, server, {"prompt": "x"})
        until(lambda: server.service.slots.waiting == 1)
        third = post(server, {"prompt": "x"})
        assert (third.status_code, third.headers["retry-after"]) == (429, "1")
        assert error_of(third)["code"] == "queue_full"
        engine.go.set()
        assert (first.result().status_code, second.result().status_code) == (200, 200)


def test_a_generation_that_takes_too_long_is_a_timeout() -> None:
    engine = ScriptedEngine(delay=0.05)
    settings = ServerSettings(port=0, service=ServiceSettings(request_seconds=0.2))
    with running(engine, settings) as server:
        whole = post(server, {"prompt": "x"})
        assert (whole.status_code, error_of(whole)["code"]) == (504, "timeout")
        streamed = post(server, {"prompt": "x", "stream": True})
        assert streamed.status_code == 200
        assert '"code":"timeout"' in streamed.text
        until(lambda: engine.at_work == 0)


def test_64_requests_at_once_all_get_their_own_answer() -> None:
    engine = ScriptedEngine(slots=4)
    with running(engine) as server, ThreadPoolExecutor(64) as pool:
        answers = list(pool.map(lambda seed: post(server, {"prompt": "x", "seed": seed, "max_tokens": 60}), range(64)))
        assert [answer.status_code for answer in answers] == [200] * 64
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts == [f"{TEXT} seed {seed}" for seed in range(64)]
        assert engine.most_at_work <= 4
        until(lambda: server.service.slots.used == 0)


def test_too_many_connections_are_turned_away_and_leave_room_again() -> None:
    settings = ServerSettings(port=0, limits=Limits(max_connections=8, read_seconds=1.0))
    with running(ScriptedEngine(), settings) as server:
        address = server.socket.getsockname()[:2]
        idle = [socket.create_connection(address, timeout=10) for _ in range(8)]
        try:
            until(lambda: len(server.server_state.connections) == 8)
            assert talk(server, b"").startswith(b"HTTP/1.1 503 ")
            assert all(connection.recv(100).startswith(b"HTTP/1.1 408 ") for connection in idle)
        finally:
            for connection in idle:
                connection.close()
        until(lambda: not server.server_state.connections)
        assert post(server, {"prompt": "x"}).status_code == 200


def test_a_client_that_does_not_read_is_dropped() -> None:
    engine = ScriptedEngine("word " * 2000, context_length=10**6)
    settings = ServerSettings(port=0, limits=Limits(write_seconds=0.3))
    body = json.dumps({"prompt": "x", "stream": True, "logprobs": 5, "max_tokens": 4000}).encode()
    with running(engine, settings) as server, socket.socket() as connection:
        server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(server.socket.getsockname()[:2])
        connection.sendall(head_of(len(body)) + body)
        until(lambda: engine.at_work == 1 or engine.closed_streams == 1)
        until(lambda: not server.server_state.connections)
        until(lambda: server.service.slots.used == 0)


# The process.


SCRIPTED = """
import sys
from wrinklefree.cli import set_up_logging
from wrinklefree.serving.limits import Limits
from wrinklefree.serving.server import Server, ServerSettings
sys.path.insert(0, sys.argv[1])
from tests.serving.conftest import ScriptedEngine
set_up_logging()
settings = ServerSettings(port=0, limits=Limits(read_seconds=5), grace_seconds=100)
sys.exit(Server(settings, lambda: ScriptedEngine("word " * 100)).run_until_stopped())
"""
SERVE = "import sys; from wrinklefree.cli import serve_main; sys.exit(serve_main(sys.argv[1:]))"


def start_process(program: str, *arguments: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "error", "-c", program, *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def address_of(process: "subprocess.Popen[str]") -> str:
    assert process.stderr is not None
    line = process.stderr.readline()
    assert "listening on http://127.0.0.1:" in line, line
    return line.split("listening on ")[1].split(";")[0]


def test_the_process_serves_the_tiny_model_and_ends_with_0_on_sigterm() -> None:
    flags = ["--model", str(TINY), "--engine", "torch", "--port", "0", "--threads", "1", "--context-length", "256"]
    with start_process(SERVE, *flags) as process:
        try:
            address = address_of(process)
            until(lambda: httpx2.get(f"{address}/health").status_code == 200, 60)
            with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
                ask: dict[str, Any] = {"model": "tiny", "prompt": "The capital of", "max_tokens": 12}
                greedy = client.completions.create(**ask, temperature=0)
                again = "".join(
                    chunk.choices[0].text for chunk in client.completions.create(**ask, temperature=0, stream=True)
                )
                assert greedy.choices[0].text == again != ""
                sampled = [client.completions.create(**ask, seed=seed).choices[0].text for seed in (3, 3, 4)]
                assert sampled[0] == sampled[1] != sampled[2]
                scored = client.completions.create(**ask, temperature=0, logprobs=2).choices[0].logprobs
                assert scored is not None
                assert scored.token_logprobs is not None
                assert all(logprob is not None and logprob <= 0 for logprob in scored.token_logprobs)
                assert scored.top_logprobs is not None
                assert [max(entry.values()) for entry in scored.top_logprobs] == pytest.approx(scored.token_logprobs)
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0
    assert "serving tiny with torch" in log
    assert log.rstrip().endswith("stopped")
    assert "Traceback" not in log


def test_the_process_survives_abuse_within_bounded_memory() -> None:
    with start_process(SCRIPTED, str(ROOT)) as process:
        try:
            address = address_of(process)
            until(lambda: httpx2.get(f"{address}/health").status_code == 200, 60)
            port = int(address.rpartition(":")[2])
            before = psutil.Process(process.pid).memory_info().rss
            idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(64)]
            with ThreadPoolExecutor(16) as pool:
                codes = list(pool.map(lambda number: abuse(address, number), range(80)))
            for connection in idle:
                connection.close()
            assert set(codes) == {200, 400, 413}
            assert psutil.Process(process.pid).memory_info().rss - before < 300 * 2**20
            assert httpx2.get(f"{address}/health").status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            _, log = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in log


def abuse(address: str, number: int) -> int:
    bodies = [
        b'{"prompt": "x", "max_tokens": 8}',
        b'{"prompt": "' + b"x" * 2**21 + b'"}',
        b"\xff" * 1000,
        b"[" * 100_000,
        b'{"prompt": "' + b"ab " * 100_000 + b'"}',
    ]
    headers = {"content-type": "application/json"}
    return httpx2.post(f"{address}/v1/completions", content=bodies[number % 5], headers=headers, timeout=60).status_code


def test_a_second_signal_ends_the_process_at_once() -> None:
    with start_process(SCRIPTED, str(ROOT)) as process:
        try:
            address = address_of(process)
            until(lambda: httpx2.get(f"{address}/health").status_code == 200, 60)
            port = int(address.rpartition(":")[2])
            body = b'{"prompt": "x", "max_tokens": 250, "temperature": 0}'
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(head_of(len(body)) + body[:-1])  # never complete: the server waits for it
                time.sleep(0.2)
                process.send_signal(signal.SIGTERM)
                time.sleep(0.3)
                assert process.poll() is None
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 128 + signal.SIGTERM
        finally:
            process.kill()


@pytest.mark.slow
def test_the_page_runs_in_a_browser(server: Server) -> None:
    browser = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip("needs chromium on PATH")
    command = [browser, "--headless", "--no-sandbox", "--virtual-time-budget=5000", "--dump-dom", f"{server.address}/"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert "tiny-scripted · scripted · context 512" in shown
    assert "Ask the model something" in shown
