"""The Python client against our server, a server in a process, and servers that are something else."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tests.serving.conftest import TINY, ScriptedEngine, running, until

from wrinklefree.serving.bitnet_wrapper import Answer, BitNetClient, Delta, Health, Model, Usage, serve
from wrinklefree.serving.server import Server, ServerSettings
from wrinklefree.utils.errors import ConfigError, CredentialsError, EngineError, NetworkError

TEXT = "Hello, wörld! bye"


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(TEXT)


@pytest.fixture(scope="module")
def server(engine: ScriptedEngine) -> Iterator[Server]:
    with running(engine, ServerSettings(port=0, api_key="sesame")) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[BitNetClient]:
    with BitNetClient(f"{server.address}/v1/", "sesame") as client:
        yield client


def test_answers_are_typed(client: BitNetClient, engine: ScriptedEngine) -> None:
    answer = client.chat("Hi", seed=3, max_tokens=40)
    prompt = engine.requests[-1][0]
    text = f"{TEXT} seed 3"
    assert answer == Answer(text, "stop", "tiny-scripted", Usage(len(prompt), len(engine.tokenizer.encode(text))))
    assert client.complete("x", max_tokens=2).finish_reason == "length"
    client.complete([5, 6], max_tokens=1)
    assert engine.requests[-1][0] == [5, 6]
    client.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert engine.prompts()[-1] == "Be brief.\nUser: Hi\nAssistant:"


def test_streams_end_with_the_reason_and_the_count(client: BitNetClient) -> None:
    for stream in (client.stream_chat("Hi", max_tokens=4), client.stream_complete("Hi", max_tokens=4)):
        deltas = list(stream)
        assert "".join(delta.text for delta in deltas) == "Hello,"
        assert deltas[-1].finish_reason == "length"
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 4
        assert all(delta.finish_reason is None for delta in deltas[:-1])


def test_logprobs_have_one_shape(client: BitNetClient) -> None:
    chat = client.chat("Hi", logprobs=True, top_logprobs=2, max_tokens=2)
    completion = client.complete("Hi", logprobs=2, max_tokens=2)
    assert chat.logprobs == completion.logprobs
    assert [entry.token for entry in chat.logprobs] == ["H", "ell"]
    assert chat.logprobs[0].logprob == -0.5
    assert chat.logprobs[0].alternatives[0] == ("H", -0.5)
    streamed = [entry for delta in client.stream_chat("Hi", logprobs=True, max_tokens=2) for entry in delta.logprobs]
    assert [entry.token for entry in streamed] == ["H", "ell"]


def test_leaving_a_stream_frees_the_engine(client: BitNetClient, engine: ScriptedEngine, server: Server) -> None:
    stream = client.stream_chat("Hi")
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    until(lambda: engine.at_work == 0 and server.service.slots.used == 0)
    assert client.chat("Hi").text == TEXT


def test_state(client: BitNetClient) -> None:
    client.wait_until_ready(5)
    assert client.health() == Health(True, "ok")
    assert client.models() == [Model("tiny-scripted", "scripted", 512)]


def test_errors_are_of_their_kind_and_carry_the_servers_words(client: BitNetClient, server: Server) -> None:
    with pytest.raises(ConfigError, match="refused with status 400: `n` is not supported"):
        client.chat("Hi", n=3)
    with pytest.raises(ConfigError, match="status 404: the model 'gpt' is not served here"):
        list(client.stream_chat("Hi", model="gpt"))
    with pytest.raises(EngineError, match="status 500: the engine failed: the engine broke"):
        client.complete("FAIL")
    received: list[Delta] = []
    with pytest.raises(EngineError, match="the server broke off: the engine failed"):
        received.extend(client.stream_complete("FAIL"))
    with BitNetClient(server.address, "wrong") as stranger:
        assert stranger.health().ready
        with pytest.raises(CredentialsError, match="status 401: the API key is wrong"):
            stranger.chat("Hi")


def test_the_key_may_come_from_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WRINKLEFREE_API_KEY", "sesame")
    with BitNetClient(server.address) as client:
        assert client.chat("Hi").text == TEXT


def test_a_server_that_is_not_there() -> None:
    with BitNetClient("http://127.0.0.1:9", timeout=1) as client:
        with pytest.raises(NetworkError, match=r"http://127.0.0.1:9 cannot be reached .* is the server running\?"):
            client.chat("Hi")
        with pytest.raises(NetworkError, match="is not ready after 0.2 s"):
            client.wait_until_ready(0.2)


@pytest.mark.parametrize("url", ["localhost:8080", "", "ftp://localhost", "http://"])
def test_what_is_not_an_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address such as http://127.0.0.1:8080"):
        BitNetClient(url)


@contextmanager
def stranger(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server that is not ours."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            answer(self)

        do_GET = do_POST  # noqa: N815

        def log_message(self, format: str, *args: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{http.server_address[1]}"
        finally:
            http.shutdown()
            thread.join()


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"text": "x"}]}'])
def test_a_server_of_another_kind_is_named(body: bytes) -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    with stranger(answer) as url, BitNetClient(url) as client, pytest.raises(NetworkError, match="something else than"):
        client.complete("x")


def test_a_stream_that_breaks_off_is_an_error_after_what_came() -> None:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("content-type", "text/event-stream")
        handler.end_headers()
        handler.wfile.write(b'data: {"choices": [{"index": 0, "text": "one"}]}\n\n')

    with stranger(answer) as url, BitNetClient(url) as client:
        stream = client.stream_complete("x")
        assert next(stream) == Delta("one")
        with pytest.raises(NetworkError, match="broke off in the middle of an answer"):
            next(stream)


def test_a_server_for_the_length_of_a_block() -> None:
    with serve(TINY, arguments=["--threads", "1", "--slots", "1"]) as client:
        assert client.models()[0].engine == "torch"
        first = client.complete("The capital of", temperature=0, max_tokens=8)
        assert first.usage.completion_tokens == 8
        assert (
            "".join(delta.text for delta in client.stream_complete("The capital of", temperature=0, max_tokens=8))
            == first.text
        )
        address = client.base_url
    with BitNetClient(address, timeout=1) as late, pytest.raises(NetworkError, match="cannot be reached"):
        late.health()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(EngineError, match=r"ended with exit code 2: .*nothing\.gguf does not exist"),
        serve(tmp_path / "nothing.gguf"),
    ):
        raise AssertionError("it cannot be ready")
