"""What damaged and forged model files do to the readers of GGUF and safetensors.

Small valid files are changed at random (bits, counts, lengths, dimensions, offsets, types, names, truncation, splices),
then read whole: header, and every tensor that has a decoder. Each must end in one of two ways: an error of ours that
says what is wrong, or a complete read. A crash, another exception, a warning, memory beyond the limit, or five seconds
of work is a failure. The same seed makes the same files.

    uv run python -m benchmark.mutated_headers --count 10000
"""

import argparse
import json
import random
import resource
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from wrinklefree.models.weights import read_safetensors
from wrinklefree.quantization.number_types import NUMBER_TYPES, encode_values
from wrinklefree.quantization.packing import TERNARY_FORMATS
from wrinklefree.serving.gguf_writer import TensorPlan, write_gguf
from wrinklefree.utils.errors import WrinkleFreeError
from wrinklefree.utils.gguf import I2_S_LAYOUT_KEY, read_gguf
from wrinklefree.utils.gguf_blocks import FORMATS_BY_ID, FORMATS_BY_NAME

MEMORY_LIMIT = 512 * 2**20
"""Bytes of address space that a read may add: the files have a few thousand."""
TIME_LIMIT = 5.0
"""CPU-seconds of one read."""
EXTREMES = (0, 1, 2, 3, 127, 255, 2**15, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)

Mutation = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Field:
    """An integer in a GGUF header."""

    kind: str
    """`count`, `length`, `value type`, `dimension`, `tensor type` or `offset`."""
    at: int
    """Byte where it starts."""
    code: str
    """For `struct`."""


def gguf_file(folder: Path) -> bytes:
    """A file with a tensor of each type that has a decoder, and metadata of many kinds."""
    codes = np.array([[-1, 0, 1, 0] * 64], dtype=np.int8)
    values = np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)

    def ternary(name: str) -> TensorPlan:
        entry = TERNARY_FORMATS[name]
        return TensorPlan(f"t.{name}", codes.shape, entry.gguf_type, lambda: entry.pack(codes, 0.5))

    def numbers(name: str) -> TensorPlan:
        return TensorPlan(f"n.{name}", values.shape, name, lambda: encode_values(values, name))

    def zeros(name: str) -> TensorPlan:
        size = FORMATS_BY_NAME[name].nbytes((256,))
        return TensorPlan(f"z.{name}", (256,), name, lambda: np.zeros(size, dtype=np.uint8))

    metadata = {
        "general.architecture": "llama",
        I2_S_LAYOUT_KEY: "x86",
        "llama.block_count": 3,
        "epsilon": 1e-5,
        "wide": np.uint64(2**40),
        "flag": True,
        "words": ["a", "bc", "", "é"],
        "numbers": [1, 2, 3],
        "floats": [0.5, 1.5],
    }
    plans = [
        *(ternary(name) for name in TERNARY_FORMATS if name != "I2_S_ARM"),
        *(numbers(name) for name in NUMBER_TYPES),
        *(zeros(name) for name in ("Q4_1", "Q6_K", "IQ4_XS")),
    ]
    path = folder / "seed.gguf"
    write_gguf(path, metadata, plans)
    return path.read_bytes()


def safetensors_file() -> bytes:
    """A file with tensors of many types."""
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    return save({f"tensor.{index}": torch.ones(2, 3).to(kind) for index, kind in enumerate(kinds)}, {"format": "pt"})


def gguf_fields(data: bytes) -> list[Field]:
    """Every integer of a valid header, found by walking through it."""
    fields: list[Field] = []
    at = 8

    def integer(kind: str, code: str) -> int:
        nonlocal at
        fields.append(Field(kind, at, code))
        at += struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", data, fields[-1].at)[0]

    def string() -> None:
        nonlocal at
        size = integer("length", "Q")
        at += size

    def value(kind: int) -> None:
        nonlocal at
        sizes = {0: 1, 1: 1, 7: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 10: 8, 11: 8, 12: 8}
        if kind == 8:
            string()
        elif kind == 9:
            item = integer("value type", "I")
            for _ in range(integer("count", "Q")):
                value(item)
        else:
            at += sizes[kind]

    tensors, pairs = integer("count", "Q"), integer("count", "Q")
    for _ in range(pairs):
        string()
        value(integer("value type", "I"))
    for _ in range(tensors):
        string()
        for _ in range(integer("count", "I")):
            integer("dimension", "Q")
        integer("tensor type", "I")
        integer("offset", "Q")
    return fields


def gguf_mutations(data: bytes) -> dict[str, Mutation]:
    """Mutations that know where the header's integers are, and blind ones."""
    fields = gguf_fields(data)
    kinds = sorted({field.kind for field in fields})
    end = fields[-1].at + 8

    def forge(kind: str) -> Mutation:
        places = [field for field in fields if field.kind == kind]

        def mutate(content: bytes, source: random.Random) -> bytes:
            field = source.choice(places)
            bits = 8 * struct.calcsize(f"<{field.code}")
            old = struct.unpack_from(f"<{field.code}", content, field.at)[0]
            near = old + source.choice((-32, -8, -1, 1, 8, 32, 256))
            types = source.choice(list(FORMATS_BY_ID)) if kind == "tensor type" else source.randrange(16)
            new = source.choice((source.choice(EXTREMES), near, types)) % 2**bits
            return _overwritten(content, field.at, struct.pack(f"<{field.code}", new))

        return mutate

    def same_name(content: bytes, source: random.Random) -> bytes:
        lengths = [field for field in fields if field.kind == "length"]
        first, second = source.sample(lengths, 2)
        size = 8 + struct.unpack_from("<Q", content, first.at)[0]
        return _overwritten(content, second.at, content[first.at : first.at + size])

    return {**{f"forged {kind}": forge(kind) for kind in kinds}, "copied name": same_name, **_blind_mutations(end)}


def safetensors_mutations(data: bytes) -> dict[str, Mutation]:
    """Mutations of the JSON header, and blind ones."""
    end = 8 + struct.unpack_from("<Q", data)[0]
    header: dict[str, Any] = json.loads(data[8:end])
    names = [name for name in header if name != "__metadata__"]
    odd: tuple[Any, ...] = (*EXTREMES, -1, 1.5, None, True, "", "F32", [], [[]], {}, 1e308, "\ud800")

    def rebuilt(text: str) -> bytes:
        raw = text.encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(raw)) + raw + data[end:]

    def forge(key: str) -> Mutation:
        def mutate(_content: bytes, source: random.Random) -> bytes:
            changed = json.loads(data[8:end])
            entry = changed[source.choice(names)]
            if isinstance(entry[key], list) and entry[key] and source.random() < 0.7:
                entry[key][source.randrange(len(entry[key]))] = source.choice(odd)
            else:
                entry[key] = source.choice((*odd, "F4", "F8_E8M0", "C64", "U64", "I16", "BF16", "F64"))
            return rebuilt(json.dumps(changed))

        return mutate

    def same_name(_content: bytes, source: random.Random) -> bytes:
        first, second = source.sample(names, 2)
        return rebuilt(json.dumps(header).replace(json.dumps(first), json.dumps(second)))

    def lost_key(_content: bytes, source: random.Random) -> bytes:
        changed = json.loads(data[8:end])
        del changed[source.choice(names)][source.choice(("dtype", "shape", "data_offsets"))]
        return rebuilt(json.dumps(changed))

    def nested(_content: bytes, source: random.Random) -> bytes:
        depth = source.choice((10, 100, 1000, 50_000))
        return rebuilt('{"a":' + "[" * depth + "]" * depth + "}")

    def length(content: bytes, source: random.Random) -> bytes:
        return struct.pack("<Q", source.choice((*EXTREMES, end, end - 9, end - 7))) + content[8:]

    return {
        **{f"forged {key}": forge(key) for key in ("dtype", "shape", "data_offsets")},
        "forged header length": length,
        "copied name": same_name,
        "lost key": lost_key,
        "deep nesting": nested,
        **_blind_mutations(end),
    }


def _blind_mutations(end: int) -> dict[str, Mutation]:
    """Mutations of the first `end` bytes that know no format."""

    def bits(content: bytes, source: random.Random) -> bytes:
        changed = bytearray(content)
        for _ in range(source.choice((1, 1, 2, 4, 16))):
            changed[source.randrange(end)] ^= 1 << source.randrange(8)
        return bytes(changed)

    def truncate(content: bytes, source: random.Random) -> bytes:
        return content[: source.randrange(len(content))]

    def integer(content: bytes, source: random.Random) -> bytes:
        size = source.choice((4, 8))
        value = source.choice(EXTREMES) % 2 ** (8 * size)
        return _overwritten(content, source.randrange(end), value.to_bytes(size, "little"))

    def splice(content: bytes, source: random.Random) -> bytes:
        start, length, to = source.randrange(end), source.randrange(1, 200), source.randrange(end)
        replaced = source.choice((0, length, source.randrange(200)))
        return content[:to] + content[start : start + length] + content[to + replaced :]

    def noise(content: bytes, source: random.Random) -> bytes:
        return _overwritten(content, source.randrange(end), source.randbytes(source.randrange(1, 64)))

    return {"flipped bits": bits, "truncated": truncate, "extreme integer": integer, "splice": splice, "noise": noise}


def _overwritten(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def read_whole_gguf(path: Path) -> None:
    """Header, and every tensor as values and as codes; `AssertionError` when a read is not what the header says."""
    file = read_gguf(path)
    refused: WrinkleFreeError | None = None
    for name, info in file.tensors.items():
        # An odd tensor must not hide the ones behind it; one without a decoder is in the unchanged file, too.
        try:
            tensor = file.tensor(name)
        except WrinkleFreeError as error:
            refused = refused if "readable are" in str(error) else error
            continue
        assert tensor.shape == info.shape, f"{tensor.shape} read, {info.shape} announced"
        assert tensor.dtype == np.float32, f"{tensor.dtype} read"
        try:
            codes, scale = file.ternary(name)
        except WrinkleFreeError:
            continue
        assert np.array_equal(codes * scale, tensor), "codes and values differ"
    if refused is not None:
        raise refused


def read_whole_safetensors(path: Path) -> None:
    """Every tensor, touched."""
    for name, tensor in read_safetensors([path]):
        assert isinstance(name, str)
        assert tensor.numel() == prod(tensor.shape)
        tensor.clone()


def outcome(read: Callable[[Path], None], path: Path) -> str:
    """`refused`, `read`, or what went wrong."""
    started = time.process_time()
    try:
        read(path)
        result = "read"
    except WrinkleFreeError as error:
        message = str(error)
        tame = "\n" not in message and len(message) < 2000
        result = "refused" if tame else f"a message of {len(message)} characters or several lines"
    except MemoryError:
        result = "runaway allocation"
    except Exception as error:  # noqa: BLE001 - whatever escapes is the finding
        result = f"{type(error).__name__}: {str(error)[:100]}"
    return result if time.process_time() - started < TIME_LIMIT else "too slow"


@contextmanager
def bounded_memory(extra: int) -> Generator[None]:
    """Let allocations fail that would grow the address space by more than `extra` bytes."""
    old = resource.getrlimit(resource.RLIMIT_AS)
    statm = Path("/proc/self/statm")
    if statm.exists():
        used = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + extra, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def run(count: int, seed: int, folder: Path) -> Counter[tuple[str, str, str]]:
    """Read `count` changed files, half of each format; (format, mutation, outcome) -> how often."""
    source = random.Random(seed)
    gguf, tensors = gguf_file(folder), safetensors_file()
    formats = (
        ("gguf", gguf, gguf_mutations(gguf), read_whole_gguf),
        ("safetensors", tensors, safetensors_mutations(tensors), read_whole_safetensors),
    )
    counts: Counter[tuple[str, str, str]] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, content, mutations, read in formats:
            path = folder / f"changed.{name}"
            path.write_bytes(content)
            assert outcome(read, path) == "read", f"the unchanged {name} file is not read"
            with bounded_memory(MEMORY_LIMIT):
                for _ in range(count // 2):
                    mutation = source.choice(list(mutations))
                    path.write_bytes(mutations[mutation](content, source))
                    counts[name, mutation, outcome(read, path)] += 1
    return counts


def main(argv: Sequence[str]) -> int:
    """Print the table; 1 when an outcome is neither a refusal nor a read."""
    parser = argparse.ArgumentParser(prog="benchmark.mutated_headers", description="damage model files and read them")
    parser.add_argument("--count", type=int, default=10_000, help="files in all (default 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the changes (default 0)")
    arguments = parser.parse_args(argv)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        counts = run(arguments.count, arguments.seed, Path(folder))
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    rows = [f"{'format':12} {'change':22} {'refused':>8} {'read':>8} {'failed':>8}"]
    for name, mutation in sorted({key[:2] for key in counts}):
        refused, read = counts[name, mutation, "refused"], counts[name, mutation, "read"]
        failed = sum(number for key, number in counts.items() if key[:2] == (name, mutation)) - refused - read
        rows.append(f"{name:12} {mutation:22} {refused:8} {read:8} {failed:8}")
    failures = {key: number for key, number in counts.items() if key[2] not in {"refused", "read"}}
    rows += [f"FAILED {number} x {name}, {mutation}: {what}" for (name, mutation, what), number in failures.items()]
    rows.append(
        f"{sum(counts.values())} files, {sum(failures.values())} failures, peak memory grew by {grown / 1024:.0f} MiB"
    )
    sys.stdout.write("\n".join(rows) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
