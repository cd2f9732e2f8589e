"""Counts documents over ranks and workers, and kills a reading process again and again.

    uv run python -m benchmark.stream_audit            # both parts
    uv run python -m benchmark.stream_audit --kills 0  # the count only

Part 1: for 1, 2 and 4 processes, 0 and 2 workers each, every way of reading text and both packers, two epochs are drawn and
every document counted. Part 2: a process that draws batches (two sources, one of them streamed; workers; batches made
ahead) is killed with SIGKILL at random moments and started again from its last saved state, until it is done; every
batch that any of its lives drew must be the batch of an undisturbed run.
"""

import argparse
import hashlib
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice, product
from pathlib import Path

import numpy as np
from rich.console import Console

from wrinklefree.data.config import LocalSource, PackingConfig, PretrainData, TokensSource
from wrinklefree.data.prefetch import PrefetchedStream
from wrinklefree.data.pretrain_dataset import pretrain_stream
from wrinklefree.data.streams import TextStream
from wrinklefree.data.token_shards import TokenShardWriter, TokensRecord, manifest_extra, write_held_out
from wrinklefree.data.tokens import encode_documents
from wrinklefree.models.records import Batch
from wrinklefree.utils.manifest import write_manifest
from wrinklefree.utils.storage import atomic_write

DOCUMENTS = 3001
EPOCHS = 2
ROW = 64
SAVE_EVERY = 7
WAYS = ("local", "streamed", "tokens")
"""Files in memory, files read in order, prepared tokens."""
FIRST_NAME = 1000
"""Token of document 0: one token of a document names it, so that counting tokens counts documents."""


class NamingTokenizer:
    """A text is `<number> <length>`: the document's name, and filler."""

    eos_token_id, bos_token_id, pad_token_id, add_bos, fingerprint = 0, None, 1, False, "naming"

    def encode(self, text: str) -> list[int]:
        """The name, and filler up to the length."""
        number, length = map(int, text.split())
        return [FIRST_NAME + number, *([2] * (length - 1))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Each text's tokens."""
        return [self.encode(text) for text in texts]


def write_corpus(folder: Path, first: int, count: int) -> Path:
    """A JSON-lines file of documents shorter than a row, so that rows keep the order in which documents were dealt."""
    generator = random.Random(first)
    texts = [f"{number} {generator.randint(1, ROW - 3)}" for number in range(first, first + count)]
    file = folder / f"from-{first}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return file


def write_tokens(file: Path) -> Path:
    """The same documents as prepared tokens."""
    folder = file.with_suffix(".tokens")
    folder.mkdir()
    texts = [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]
    writer = TokenShardWriter(folder, vocab_size=FIRST_NAME + DOCUMENTS, tokens_a_shard=20_000)
    for document in encode_documents(texts, NamingTokenizer()):
        writer.add(document)
    writer.close()
    digests = writer.digests | {"held_out.jsonl": write_held_out(folder, [])}
    record = TokensRecord("naming", "audit", "-", 0.0, writer.documents, writer.tokens, writer.shards, writer.dtype)
    write_manifest(folder, manifest_extra(record, {}), digests=digests)
    return folder


def documents_of(stream: TextStream) -> Iterator[int]:
    """Documents in the order in which a process meets them."""
    while True:
        for piece in stream.next_row().pieces:
            yield from (piece.tokens[piece.tokens >= FIRST_NAME] - FIRST_NAME).tolist()


def count(folder: Path, console: Console, ways: Sequence[str] = WAYS) -> bool:
    """Part 1, for some ways of reading text."""
    file = write_corpus(folder, 0, DOCUMENTS)
    kinds = {
        "local": LocalSource(path=str(file)),
        "streamed": LocalSource(path=str(file), stream=True),
        "tokens": TokensSource(path=str(write_tokens(file))),
    }
    right = True
    for kind, world_size, workers in product(ways, (1, 2, 4), (0, 2)):
        source = kinds[kind]
        for packer in ("concat", "best_fit"):
            epochs: list[Counter[int]] = [Counter() for _ in range(EPOCHS)]
            for rank in range(world_size):
                data = PretrainData(
                    name="audit", sources=(source,), held_out_percent=0.0, num_workers=workers, shuffle_buffer=500
                )
                stream = pretrain_stream(
                    data, NamingTokenizer(), batch_size=1, max_seq_length=ROW, packing=PackingConfig(packer=packer),
                    seed=7, rank=rank, world_size=world_size,
                )  # fmt: skip
                with closing(stream):
                    # Blocks never cross an epoch, so that a process's share of one ends where it has met so many.
                    share, met = len(range(rank, DOCUMENTS, world_size)), documents_of(stream)
                    for counts in epochs:
                        counts.update(islice(met, share))
            once = [sum(times == 1 for times in counts.values()) for counts in epochs]
            never = [DOCUMENTS - len(counts) for counts in epochs]
            right &= once == [DOCUMENTS] * EPOCHS
            console.print(
                f"{kind:8} {packer:9} {world_size} processes x {workers} workers: of {DOCUMENTS} documents an epoch "
                f"{once} once, {never} never, {[DOCUMENTS - o - n for o, n in zip(once, never, strict=True)]} more often"
            )
    return right


def open_mixture(folder: Path) -> PrefetchedStream:
    """The stream of part 2."""
    sources = (
        LocalSource(path=str(folder / "from-0.jsonl"), weight=0.7),
        LocalSource(path=str(folder / f"from-{DOCUMENTS}.jsonl"), weight=0.3, stream=True),
    )
    data = PretrainData(name="audit", sources=sources, held_out_percent=0.0, num_workers=2, shuffle_buffer=300)
    stream = pretrain_stream(
        data, NamingTokenizer(), batch_size=4, max_seq_length=ROW, packing=PackingConfig(), seed=3
    )  # fmt: skip
    return PrefetchedStream(stream, ahead=3)


def digest(batch: Batch) -> str:
    """Of everything in a batch."""
    fields = (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
    return hashlib.sha256(b"".join(np.ascontiguousarray(field.numpy()).tobytes() for field in fields)).hexdigest()


def draw(folder: Path, batches: int) -> None:
    """One life of the process of part 2: goes on from the last saved state."""
    saved, log = folder / "state.json", folder / "drawn.txt"
    with closing(open_mixture(folder)) as stream:
        taken = 0
        if saved.exists():
            state = json.loads(saved.read_text())
            taken = state["taken"]
            stream.load_state_dict(state)
        while taken < batches:
            line = f"{taken} {digest(stream.next_batch())}\n"
            taken += 1
            with log.open("a") as file:
                file.write(line)
            if taken % SAVE_EVERY == 0:
                atomic_write(saved, json.dumps(stream.state_dict()))
            time.sleep(0.01)
    (folder / "done").touch()


def kill_and_resume(folder: Path, kills: int, console: Console) -> bool:
    """Part 2."""
    write_corpus(folder, 0, DOCUMENTS)
    write_corpus(folder, DOCUMENTS, DOCUMENTS)
    batches = 60 * (kills + 1)
    with closing(open_mixture(folder)) as stream:
        expected = [digest(stream.next_batch()) for _ in range(batches)]
    generator, killed, log = random.Random(0), 0, folder / "drawn.txt"
    command = [sys.executable, "-m", "benchmark.stream_audit", "--draw", str(folder), str(batches)]
    while not (folder / "done").exists():
        begun = len(log.read_text().splitlines()) if log.exists() else 0
        life = subprocess.Popen(command)
        target = begun + generator.randint(5, 60)
        while life.poll() is None and (killed == kills or not log.exists() or log.read_text().count("\n") < target):
            time.sleep(0.005)
        if life.poll() is None:
            life.send_signal(signal.SIGKILL)
            killed += 1
        elif life.returncode:
            return False
        life.wait()
    drawn = [line.split() for line in log.read_text().splitlines() if len(line.split()) == 2]
    wrong = sum(expected[int(number)] != found for number, found in drawn)
    complete = {int(number) for number, _ in drawn} == set(range(batches))
    console.print(
        f"killed {killed} times: {batches} batches of the undisturbed run, {len(drawn)} drawn in {killed + 1} lives, "
        f"{wrong} of them different, {'none' if complete else 'SOME'} missing"
    )
    return wrong == 0 and complete and killed == kills


def main() -> int:
    """Run; 1 when anything is not as it should be."""
    parser = argparse.ArgumentParser(description="Audit the data stream: documents counted, processes killed.")
    parser.add_argument(
        "--count", nargs="*", choices=WAYS, default=WAYS, help="ways of reading to count; none: only kill"
    )
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="0: the count only")
    parser.add_argument("--draw", nargs=2, metavar=("FOLDER", "BATCHES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.draw:
        draw(Path(options.draw[0]), int(options.draw[1]))
        return 0
    console = Console(soft_wrap=True)
    right = True
    if options.count:
        with tempfile.TemporaryDirectory() as folder:
            right &= count(Path(folder), console, options.count)
    if options.kills:
        with tempfile.TemporaryDirectory() as folder:
            right &= kill_and_resume(Path(folder), options.kills, console)
    console.print("all as it should be" if right else "WRONG")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
