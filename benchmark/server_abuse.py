"""What hostile and clumsy clients get from the server, and whether it survives them.

    uv run python benchmark/server_abuse.py --model outputs/checkpoint-final

starts scripts/serve.py on a free port of this machine, mistreats it for about half a minute, stops it with SIGTERM, and
prints one row for each kind of client: what it got, what it should get, and how far the server's memory has grown by then.
Everything stays on the loopback address. The exit code is 1 if a row is wrong.
"""

import argparse
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import httpx2
import psutil

ROOT = Path(__file__).resolve().parents[1]
PATH = "/v1/completions"
JSON = {"content-type": "application/json"}
READ_SECONDS = 3
SMALL = json.dumps({"prompt": "x", "max_tokens": 8, "temperature": 0}).encode()


@dataclass(frozen=True)
class Row:
    """One kind of client: a name, what it does (returns the statuses that it got), and the statuses that are right."""

    name: str
    attack: Callable[[str], list[int]]
    right: frozenset[int]


def main() -> int:
    """Run every row against a fresh server; returns the exit code."""
    parser = argparse.ArgumentParser(description="Mistreat a server and print what each client got.")
    parser.add_argument("--model", required=True, help="a GGUF file or a checkpoint folder")
    parser.add_argument("--engine", default="auto")
    flags = parser.parse_args()
    command = [
        sys.executable, str(ROOT / "scripts" / "serve.py"), "--model", flags.model, "--engine", flags.engine,
        "--port", "0", "--slots", "4", "--read-timeout", str(READ_SECONDS), "--grace-period", "10",
    ]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if "listening on " not in line:
            raise SystemExit(line.strip())
        url = line.split("listening on ")[1].split(";")[0]
        wait_until_ready(url, process)
        good = mistreat(url, psutil.Process(process.pid))
    finally:
        process.terminate()
        _, log = process.communicate(timeout=60)
    tracebacks = log.count("Traceback")
    write(f"\nSIGTERM: exit code {process.returncode}; tracebacks in the log: {tracebacks}")
    return 0 if good and process.returncode == 0 and not tracebacks else 1


def mistreat(url: str, server: psutil.Process) -> bool:
    """Run the rows and print them; returns whether all were right and the server still answers."""
    before = server.memory_info().rss
    write("| client | got | right | seconds | memory |\n|---|---|---|---|---|")
    good = True
    for row in ROWS:
        started = time.monotonic()
        statuses = Counter(row.attack(url))
        seconds = time.monotonic() - started
        fine = set(statuses) <= row.right and ask(url, SMALL) == 200
        good = good and fine
        got = ", ".join(f"{count} x {name(status)}" for status, count in sorted(statuses.items()))
        right = " or ".join(name(status) for status in sorted(row.right))
        growth = (server.memory_info().rss - before) / 2**20
        write(f"| {row.name} | {got}{'' if fine else ' **wrong**'} | {right} | {seconds:.1f} | {growth:+.0f} MiB |")
    return good


def name(status: int) -> str:
    """A status for people; 0 is a connection that was closed without an answer."""
    return str(status) if status else "closed"


def ask(url: str, body: bytes | Iterator[bytes], *, path: str = PATH, method: str = "POST", **headers: str) -> int:
    """The status of one request."""
    try:
        return httpx2.request(method, url + path, content=body, headers={**JSON, **headers}, timeout=60).status_code
    except httpx2.TransportError:
        return 0


def at_once(count: int, body: bytes) -> Callable[[str], list[int]]:
    """So many clients at the same time."""

    def attack(url: str) -> list[int]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(lambda _: ask(url, body), range(count)))

    return attack


def once(body: bytes, **headers: str) -> Callable[[str], list[int]]:
    """One request with this body."""
    return lambda url: [ask(url, body, **headers)]


def connect(url: str) -> socket.socket:
    """A bare connection."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return socket.create_connection((host, int(port)), timeout=30)


def status_of(connection: socket.socket) -> int:
    """The status of what a connection answers."""
    try:
        line = connection.recv(65536).partition(b"\r\n")[0]
    except OSError:
        return 0
    return int(line.split()[1]) if line else 0


def raw(data: bytes) -> Callable[[str], list[int]]:
    """Bytes that need not be HTTP."""

    def attack(url: str) -> list[int]:
        with connect(url) as connection:
            connection.sendall(data)
            return [status_of(connection)]

    return attack


def slow(count: int, opening: bytes) -> Callable[[str], list[int]]:
    """Clients that send a byte now and then and never come to an end."""

    def attack(url: str) -> list[int]:
        connections = [connect(url) for _ in range(count)]
        for connection in connections:
            connection.sendall(opening)
        for _ in range(READ_SECONDS * 2 + 1):
            time.sleep(0.5)
            for connection in connections:
                try:
                    connection.send(b"a")
                except OSError:  # it was closed: its answer is read below
                    continue
        statuses = [status_of(connection) for connection in connections]
        for connection in connections:
            connection.close()
        return statuses

    return attack


def leave_midway(url: str) -> list[int]:
    """Clients that leave in the middle of a streamed answer; what counts is that the next request is answered."""
    body = json.dumps({"prompt": "x", "max_tokens": 400, "stream": True}).encode()
    for _ in range(32):
        with httpx2.stream("POST", url + PATH, content=body, headers=JSON) as response:
            next(response.iter_raw())
    return [ask(url, SMALL)]


def endless(url: str) -> list[int]:
    """A chunked body that does not end by itself (64 MiB at most)."""

    def chunks() -> Iterator[bytes]:
        for _ in range(1024):
            yield b"x" * 65536

    return [ask(url, chunks())]


def wait_until_ready(url: str, process: "subprocess.Popen[str]") -> None:
    """Wait until the model is loaded."""
    while process.poll() is None:
        if ask(url, b"", path="/health", method="GET") == 200:
            return
        time.sleep(0.1)
    assert process.stderr is not None
    raise SystemExit(process.stderr.read().strip())


def write(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n"
ROWS = [
    Row("64 requests at once", at_once(64, SMALL), frozenset({200})),
    Row("200 requests at once (4 slots, 64 in line)", at_once(200, SMALL), frozenset({200, 429})),
    Row("128 slow headers (a byte each half second)", slow(128, b"GET / HTTP/1.1\r\nX: "), frozenset({408})),
    Row("64 slow bodies", slow(64, HEAD), frozenset({408})),
    Row("2 MB body", once(b'{"prompt": "' + b"x" * 2**21 + b'"}'), frozenset({413})),
    Row("32 bodies of 2 MB at once", at_once(32, b" " * 2**21), frozenset({413})),
    Row("endless chunked body", endless, frozenset({413})),
    Row("16 prompts of 900 KB at once", at_once(16, b'{"prompt": "' + b"ab " * 300_000 + b'"}'), frozenset({400})),
    Row("malformed JSON", once(b'{"prompt": '), frozenset({400})),
    Row("not UTF-8", once(b'{"prompt": "\xff\xfe"}'), frozenset({400})),
    Row("half a surrogate", once(b'{"prompt": "\\ud800"}'), frozenset({400})),
    Row("JSON nested 100,000 deep", once(b'{"prompt": ' + b"[" * 100_000), frozenset({400})),
    Row("an integer of 100,000 digits", once(b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}"), frozenset({400})),
    Row("max_tokens of 10^20", once(b'{"prompt": "x", "max_tokens": 1' + b"0" * 20 + b"}"), frozenset({400})),
    Row("text/plain", once(SMALL, **{"content-type": "text/plain"}), frozenset({415})),
    Row("another host's name", once(SMALL, host="evil.example"), frozenset({421})),
    Row("unknown path", lambda url: [ask(url, SMALL, path="/v1/../../etc/passwd")], frozenset({404})),
    Row("wrong method", lambda url: [ask(url, b"", method="DELETE")], frozenset({405})),
    Row("TLS to the plain port", raw(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n"), frozenset({400})),
    Row("100 KB of headers", raw(b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 100_000), frozenset({431})),
    Row("32 clients that leave midway", leave_midway, frozenset({200})),
]

if __name__ == "__main__":
    sys.exit(main())
