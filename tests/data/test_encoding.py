"""Worker processes change who tokenizes, never what comes out."""

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from wrinklefree.data.encoding import CHUNK, DocumentEncoder, already_encoded
from wrinklefree.data.tokens import encode_documents
from wrinklefree.utils.errors import DataError
from wrinklefree.utils.tokenizer import TextTokenizer, train_tokenizer

TEXTS = [f"document {number}: " + "words and more words " * (number % 7) for number in range(3 * CHUNK + 5)]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return train_tokenizer(TEXTS, 270)


def test_workers_give_the_same_documents_in_the_same_order(trained: TextTokenizer) -> None:
    expected = encode_documents(TEXTS, trained)
    with closing(DocumentEncoder(trained, 2)) as encode:
        for count in (0, 1, CHUNK, len(TEXTS)):
            found = encode(TEXTS[:count])
            assert len(found) == count
            assert all(np.array_equal(left, right) for left, right in zip(found, expected[:count], strict=True))
            assert all(document.dtype == np.int32 for document in found)


def test_a_killed_worker_is_an_error_that_says_so(trained: TextTokenizer) -> None:
    with closing(DocumentEncoder(trained, 1)) as encode:
        encode(TEXTS)
        (worker,) = encode._workers()._processes
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(
            DataError, match="one of 1 data workers was killed, perhaps for memory; lower data.num_workers"
        ):
            for _ in range(1000):
                encode(TEXTS)


def test_workers_end_when_the_training_process_is_killed(trained: TextTokenizer, tmp_path: Path) -> None:
    """Nobody else would end them: a worker that waits for work holds both ends of its queue."""
    trained.save(tmp_path)
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, signal\n"
        "from wrinklefree.data.encoding import DocumentEncoder\n"
        "from wrinklefree.utils.tokenizer import TextTokenizer\n"
        "if __name__ == '__main__':\n"
        f"    encode = DocumentEncoder(TextTokenizer.from_folder({str(tmp_path)!r}), 1)\n"
        "    encode(['text'])\n"
        "    print(*encode._workers()._processes, flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    worker = Path(f"/proc/{int(ended.stdout)}")
    for _ in range(200):
        # Gone, or a zombie that its new parent has not collected yet.
        if not worker.exists() or " Z " in (worker / "stat").read_text():
            break
        time.sleep(0.1)
    assert not worker.exists() or " Z " in (worker / "stat").read_text()


def test_tokens_need_no_encoder() -> None:
    tokens = [np.arange(3, dtype=np.int32)]
    assert already_encoded(tokens)[0] is tokens[0]
