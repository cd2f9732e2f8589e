"""Ask llama.cpp, in a process of its own, for tokens of texts and for next-token distributions.

The process is a child, because llama.cpp ends the process that it runs in when something in a file surprises it. It
computes with one thread, a key-value cache in float32 and no fused attention, so that what it says differs from another
decoder by float sums and by what the file's types mean, and by nothing else.
"""

import http.client
import importlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from wrinklefree.utils.errors import EngineError

SECONDS = 600.0
"""Longest that the child may take."""

_FORCE = 1e4
"""A logit bias that decides the token; reported probabilities are those before it."""


@dataclass(frozen=True)
class RuntimeAnswer:
    """What llama.cpp says."""

    logprobs: NDArray[np.float32]
    """Natural logarithms of the next token's probabilities, [prompts, vocabulary]."""
    tokens: list[list[int]]
    """Token ids of the texts, nothing added."""


def is_installed() -> bool:
    """Whether llama.cpp's package is there, without importing it."""
    return importlib.util.find_spec("xllamacpp") is not None


def ask_llama_cpp(
    model: Path, prompts: Sequence[Sequence[int]], texts: Sequence[str], *, vocab_size: int, plain_token: int
) -> RuntimeAnswer:
    """Next-token log-probabilities after each prompt, and the tokens of each text.

    Args:
        model: A GGUF file.
        prompts: Token ids.
        texts: What to tokenize.
        vocab_size: Tokens of the model.
        plain_token: A token of whole characters. It is forced as the answer: llama.cpp reports probabilities together
            with the answer's text, and holds both back while that ends inside a character.

    Raises:
        EngineError: llama.cpp does not load the file, dies, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="wrinklefree-") as folder:
        output = Path(folder) / "answer.npz"
        question = {
            "model": str(model),
            "prompts": [list(prompt) for prompt in prompts],
            "texts": list(texts),
            "vocab_size": vocab_size,
            "plain_token": plain_token,
            "socket": str(Path(folder) / "http.sock"),  # this ending makes it a socket file
            "output": str(output),
        }
        command = [sys.executable, "-m", __name__]
        try:
            done = subprocess.run(
                command, input=json.dumps(question), capture_output=True, text=True, timeout=SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise EngineError(f"llama.cpp did not answer for {model} within {SECONDS:.0f} s") from error
        if done.returncode != 0 or not output.is_file():
            said = " ".join(done.stderr.split())[-300:]
            raise EngineError(f"llama.cpp does not run {model} (exit code {done.returncode}): {said}")
        with np.load(output) as answer:
            lengths = answer["lengths"]
            split = np.split(answer["tokens"], np.cumsum(lengths)[:-1]) if len(lengths) else []
            return RuntimeAnswer(answer["logprobs"], [part.tolist() for part in split])


def main() -> None:
    """The child: read a question from standard input, write the answer's arrays."""
    question: dict[str, Any] = json.load(sys.stdin)
    server = _load(question)
    logprobs = np.full((len(question["prompts"]), question["vocab_size"]), np.nan, dtype=np.float32)
    for row, prompt in zip(logprobs, question["prompts"], strict=True):
        for entry in _next_token(server, prompt, question):
            row[entry["id"]] = entry["logprob"]
    if np.isnan(logprobs).any():
        raise SystemExit(f"{int(np.isnan(logprobs).sum())} log-probabilities are missing or not numbers")
    tokens = [_tokenize(question["socket"], text) for text in question["texts"]]
    np.savez(
        question["output"],
        logprobs=logprobs,
        lengths=np.array([len(ids) for ids in tokens], dtype=np.int64),
        tokens=np.array([index for ids in tokens for index in ids], dtype=np.int64),
    )


def _load(question: dict[str, Any]) -> Any:
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = question["model"]
    params.hostnames = [question["socket"]]
    params.verbosity = 1
    params.n_ctx = max(64, *(len(prompt) + 8 for prompt in question["prompts"]))
    params.n_parallel = 1
    params.warmup = False
    params.fit_params = False
    params.ui = False
    params.use_jinja = False
    params.chat_template = "chatml"
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(params)


def _next_token(server: Any, prompt: list[int], question: dict[str, Any]) -> list[dict[str, Any]]:
    body = {
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": question["vocab_size"],
        "n_probs": question["vocab_size"],
        "cache_prompt": False,
        "logit_bias": [[question["plain_token"], _FORCE]],
    }
    reply = server.handle_completions(body)
    if "choices" not in reply:
        raise SystemExit(str(reply.get("error", reply))[:300])
    return reply["choices"][0]["logprobs"]["content"][0]["top_logprobs"]


class _SocketFile(http.client.HTTPConnection):
    """HTTP over a socket file."""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(self.host)


def _tokenize(path: str, text: str) -> list[int]:
    connection = _SocketFile(path)
    body = json.dumps({"content": text, "add_special": False, "parse_special": True})
    connection.request("POST", "/tokenize", body, {"Content-Type": "application/json", "Host": "localhost"})
    reply = connection.getresponse()
    content = reply.read()
    connection.close()
    if reply.status != http.client.OK:
        raise SystemExit(f"llama.cpp's tokenizer answered {reply.status}: {content[:200]!r}")
    return json.loads(content)["tokens"]


if __name__ == "__main__":
    main()
    os._exit(0)  # destroying a server can wait for ever
