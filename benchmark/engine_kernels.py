"""The CPU engine's integer kernels as shares of what the machine can do: reading memory, and the multiply instruction.

    uv run python -m benchmark.engine_kernels

One thread, and at the end what a second one can add. A product with one token reads weights that are in no cache (matrices are
taken in turns out of `--megabytes`) and is compared with a loop that only reads; a product with many tokens is compared with
the instruction that it is made of, run out of registers. Measurements take turns; every figure is the best round's, shares
are of the same round, and their median counts. The compiler is the engine's own choice ($CC, else zig, else the system's).
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import CDLL, c_char_p, c_int32, c_size_t, c_uint64, c_void_p
from functools import partial
from pathlib import Path

import numpy as np

from wrinklefree.native.build import SOURCES, compile_library, find_compiler
from wrinklefree.native.library import isa_names
from wrinklefree.native.pack import NIBBLE_BYTES, huge_array

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (2048, 2048), (8192, 2048), (2048, 8192), (9728, 2560))
HEADS = ((49152, 576), (32000, 2048))
KINDS = {"ternary": (0, 64), "int8": (1, 256), "int4": (2, NIBBLE_BYTES / 8)}
"""Number of the kernel, and bytes of 64 rows x 4 columns."""
AHEAD = (0, 1024, 2048, 4096, 8192)


def compiled(folder: Path) -> CDLL:
    """The engine's sources and this benchmark's loops as one library."""
    path = folder / "kernels.so"
    compile_library(path, find_compiler(), [f"-I{SOURCES}", str(Path(__file__).with_suffix(".c"))])
    library = CDLL(str(path))
    library.bench_read.restype, library.bench_read.argtypes = c_uint64, [c_void_p, c_size_t, c_size_t]
    library.bench_peak.restype, library.bench_peak.argtypes = c_size_t, [c_char_p, c_size_t]
    library.bench_products.restype = c_int32
    library.bench_products.argtypes = [
        c_char_p, c_int32, c_void_p, *[c_size_t] * 4, c_void_p, c_size_t, c_size_t, c_void_p,
    ]  # fmt: skip
    return library


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


class Kernel:
    """One kernel on one shape: the matrices that lie in memory, multiplied one after the other."""

    def __init__(
        self, library: CDLL, isa: str, kind: str, shape: tuple[int, int], tokens: int, memory: np.ndarray
    ) -> None:
        number, tile_bytes = KINDS[kind]
        rows, columns = shape
        blocks, groups = rows // 64, columns // 4
        block_bytes = int(groups * tile_bytes)
        self.bytes, self.products = blocks * block_bytes, rows * columns * tokens
        self._room, self._next = memory.nbytes // self.bytes, 0
        codes = np.random.default_rng(0).integers(-127, 128, (tokens, columns), dtype=np.int8)
        sums = np.zeros((tokens, 64), np.int32)

        def call(first: int, count: int) -> None:
            address = memory.ctypes.data + first * self.bytes
            last = (codes.ctypes.data, columns, tokens, sums.ctypes.data)
            assert library.bench_products(isa.encode(), number, address, count, blocks, block_bytes, groups, *last) == 0

        self._call = call

    def run(self, count: int) -> None:
        """So many matrices, from where the last run stopped."""
        while count:
            part = min(count, self._room - self._next)
            self._call(self._next, part)
            self._next = (self._next + part) % self._room
            count -= part

    def count_for(self, least: float) -> int:
        """Matrices that take about `least` seconds."""
        count, spent = 1, 0.0
        while spent < least / 8:
            count *= 4
            spent = seconds(partial(self.run, count))
        return max(1, round(count * least / spent))


def measure(library: CDLL, isa: str, arguments: argparse.Namespace) -> None:
    """Print the rows of one instruction set."""
    memory = huge_array((arguments.megabytes << 20,), np.uint8)
    memory[:] = np.random.default_rng(0).integers(0, 170, 1 << 20, dtype=np.uint8).repeat(arguments.megabytes)
    read_bytes = min(memory.nbytes, 128 << 20)
    repeats = 1_000_000

    def read() -> float:
        """With the prefetch distance that suits the machine."""
        spent = min(seconds(partial(library.bench_read, memory.ctypes.data, read_bytes, ahead)) for ahead in AHEAD)
        return read_bytes / spent / 1e9

    def peak() -> float:
        found = library.bench_peak(isa.encode(), repeats)
        return found / seconds(lambda: library.bench_peak(isa.encode(), repeats)) / 1e9

    cases = [("ternary", shape, 1) for shape in SHAPES] + [
        (kind, shape, 1) for kind in ("int8", "int4") for shape in HEADS
    ]
    cases += [("ternary", shape, tokens) for tokens in (2, 8, 32, 128) for shape in SHAPES[2:]]
    cases += [("int8", shape, tokens) for tokens in (2, 16) for shape in HEADS]
    for kind, shape, tokens in cases:
        kernel = Kernel(library, isa, kind, shape, tokens, memory)
        count = kernel.count_for(arguments.seconds)
        found: list[float] = []
        bound: list[float] = []
        for _ in range(arguments.rounds):
            bound.append(read() if tokens == 1 else peak())
            spent = seconds(partial(kernel.run, count))
            found.append(count * (kernel.bytes if tokens == 1 else kernel.products) / spent / 1e9)
        share = statistics.median(a / b for a, b in zip(found, bound, strict=True)) if bound[0] else float("nan")
        unit = "GB/s" if tokens == 1 else "G products/s"
        cells = [isa, kind, f"{shape[0]} x {shape[1]}", str(tokens), f"{max(found):.1f} {unit}", f"{max(bound):.1f}"]
        sys.stdout.write(f"| {' | '.join(cells)} | {share:.2f} |\n")
        sys.stdout.flush()


def two_threads(library: CDLL, isa: str, rounds: int) -> tuple[float, float]:
    """What two threads get of the multiply instruction and of reading, over what one gets: the most that an engine can."""
    memory = huge_array((256 << 20,), np.uint8)
    memory[:] = 1
    half = memory.nbytes // 2

    def wall(call: Callable[[int], object], threads: int) -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(call, range(threads)))
        return time.perf_counter() - start

    def multiply(_: int) -> None:
        library.bench_peak(isa.encode(), 20_000_000)

    def read(thread: int) -> None:
        library.bench_read(memory.ctypes.data + thread * half, half, 2048)

    def gain(call: Callable[[int], object]) -> float:
        return statistics.median(2 * wall(call, 1) / wall(call, 2) for _ in range(rounds))

    return gain(multiply), gain(read)


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isa", nargs="+", default=None, help="default: all of this CPU but plain C")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.05, help="of one kernel a round")
    parser.add_argument("--megabytes", type=int, default=512)
    arguments = parser.parse_args()
    isas = arguments.isa or [name for name in isa_names() if name != "plain"]
    sys.stdout.write(
        "| set | kernel | rows x columns | tokens | best | bound | share, median |\n|---|---|---|---|---|---|---|\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        for isa in isas:
            measure(library, isa, arguments)
        multiply, read = two_threads(library, isas[0], arguments.rounds)
    sys.stdout.write(
        f"\nTwo threads over one: {multiply:.2f} of {isas[0]}'s multiply instruction, {read:.2f} of reading.\n"
    )


if __name__ == "__main__":
    main()
