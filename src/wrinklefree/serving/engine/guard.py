"""Runs a server and takes it along when its parent dies: `python guard.py COMMAND ...`, a process of its own.

Standard input is a pipe from the parent. When that ends, because the parent closed it or died in whatever way, the
server gets SIGTERM and, some seconds later, SIGKILL. The obvious way, a death signal on Linux, is tied to the parent's
*thread*: a server started from a worker thread would die with that thread. This process has one thread, so here the
death signal covers the case that this process is killed itself.

The standard library only; run with `-I -S`, so that it starts at once.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

GRACE_SECONDS = 5.0
"""Between SIGTERM and SIGKILL."""
_PR_SET_PDEATHSIG = 1


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main(command: list[str]) -> int:
    """Run a command until it ends or standard input does; its exit status, negative for a signal."""
    # One thread so far, so the hook between fork and exec cannot meet a held lock.
    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=_die_with_parent)

    def stop_at_end_of_input() -> None:
        while os.read(0, 1 << 12):
            pass
        server.terminate()
        try:
            server.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            server.kill()

    threading.Thread(target=stop_at_end_of_input, daemon=True).start()
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    return server.wait()


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status if status >= 0 else 128 - status)  # not waiting for the thread that reads
