"""Speaks BitNet.cpp's server API for the tests of its engine: `stand_in_server.py MODE [options of llama-server]`.

Modes: plain, no_ids (as builds before 2025: text only), slow_start, crash_at_start, never_ready, crash_mid_stream,
garbage, no_end, flood (megabytes of log), deaf (ignores SIGTERM), refuse, hang (answers nothing more after one token).
The answer to a prompt p is the tokens 100 + p[-1], 101 + p[-1], ...; log-probabilities are made up.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mode = "plain"
    ready_at = 0.0
    slots = 1
    context = 0
    running = 0
    lock = threading.Lock()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def reply(self, status: int, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def do_GET(self) -> None:
        if time.monotonic() < self.ready_at:
            self.reply(503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}})
        else:
            self.reply(200, {"status": "ok", "running": type(self).running})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.headers["Authorization"] != f"Bearer {os.environ['LLAMA_API_KEY']}":
            self.reply(401, {"error": {"code": 401, "message": "Invalid API Key"}})
            return
        if self.mode == "refuse":
            self.reply(400, {"error": {"code": 400, "message": "the slots are tired"}})
            return
        with self.lock:
            type(self).running += 1
            if type(self).running > self.slots:
                sys.stdout.write("TOO MANY REQUESTS\n")
        try:
            self.answer(body)
        except OSError:
            sys.stdout.write("client gone\n")
            sys.stdout.flush()
            self.close_connection = True
        finally:
            with self.lock:
                type(self).running -= 1

    def answer(self, body: dict) -> None:
        assert len(body["prompt"]) + body["n_predict"] <= self.context
        ids = [100 + body["prompt"][-1] + index for index in range(body["n_predict"])]
        if not body["stream"]:
            self.reply(200, {"content": "", "tokens": ids, "stop": True})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        self.send(":\n\n")
        for count, index in enumerate(ids, start=1):
            message = {"content": f"{index} ", "stop": False, "tokens": [index], "tokens_predicted": count}
            if self.mode == "no_ids":
                message = {"content": "ab", "stop": False}
            elif "n_probs" in body:
                best = [{"id": index + other, "logprob": -0.5 - other} for other in range(body["n_probs"])]
                message["completion_probabilities"] = [{"id": index, "logprob": -0.5, "top_logprobs": best}]
            if self.mode == "flood":
                sys.stdout.write("x" * 20_000 + "\n" + "noise\n" * 20_000)
            if self.mode == "no_end" and count == 3:
                return
            if self.mode == "garbage" and count == 2:
                self.send("\x00\x01 what is this\n\n")
                return
            if self.mode == "crash_mid_stream" and count == 3:
                sys.stdout.write("ggml-bitnet: assertion failed: weights are tired\n")
                sys.stdout.flush()
                os._exit(134)
            if self.mode == "hang" and count == 2:
                time.sleep(3600)
            self.send(f"data: {json.dumps(message)}\n\n")
        final = {"content": "", "stop": True, "tokens": [], "tokens_predicted": len(ids)}
        if self.mode == "no_ids":
            del final["tokens"]
        self.send(f"data: {json.dumps(final)}\n\n")

    def send(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()


def main() -> None:
    mode = sys.argv[1]
    parser = argparse.ArgumentParser()
    for option in ("--model", "--host", "--port", "--ctx-size", "--parallel", "--threads"):
        parser.add_argument(option, required=option != "--threads")
    options = parser.parse_args(sys.argv[2:])
    assert options.host == "127.0.0.1"
    assert Path(options.model).is_file()
    sys.stdout.write(f"pid {os.getpid()}\nloading {options.model}\n")
    sys.stdout.flush()
    (Path(options.model).parent / "pid").write_text(str(os.getpid()))
    if mode == "crash_at_start":
        sys.stderr.write("error loading model: unknown model architecture: 'bitnet-25'\n")
        sys.exit(3)
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    Handler.mode = mode
    Handler.slots = int(options.parallel)
    Handler.context = int(options.ctx_size) // Handler.slots
    Handler.ready_at = time.monotonic() + {"slow_start": 0.5, "never_ready": 3600}.get(mode, 0.0)
    ThreadingHTTPServer(("127.0.0.1", int(options.port)), Handler).serve_forever()


if __name__ == "__main__":
    main()
