"""Loads a file with llama.cpp and exits: `python llama_cpp_probe.py FILE PACKAGES FOLDER`, a process of its own.

On some broken files llama.cpp aborts the process it runs in. A check of the header cannot foresee all of them (mutated
headers that pass it: about 1 in 100 still aborts), so a file is tried here first, at small cost: the tensors are mapped,
not read, and the context holds a few tokens.
"""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

_kept: list[Any] = []
"""Destroying a server before its loop has begun waits for ever; this process ends without."""


def main(path: str, packages: str, folder: str) -> int:
    """0 when the file loads, 1 when it does not; llama.cpp's errors go to standard error, its socket into `folder`."""
    sys.path.append(packages)
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = path
    params.verbosity = 1
    socket = str(Path(folder) / "http.sock")
    params.hostnames = [socket] if len(socket) <= 100 else ["127.0.0.1"]
    params.n_threads_http = 1
    params.ui = params.fit_params = params.use_jinja = params.warmup = False
    params.chat_template = "chatml"
    params.n_parallel = 1
    params.n_ctx = 64
    params.n_batch = params.n_ubatch = 64
    params.cache_ram_mib = 0
    params.no_extra_bufts = True  # no second copy of the weights in another layout
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    try:
        _kept.append(xllamacpp.Server(params))
    except RuntimeError:
        return 1
    return 0


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))
