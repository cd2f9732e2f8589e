"""Two processes weigh sources as one does, and share out the documents of a training so that each is met once."""

import json
import random
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from benchmark.sharded_equality import ARCHITECTURE, Bed, Ranks, build
from wrinklefree.composition import compose
from wrinklefree.training.influence import weigh_sources
from wrinklefree.training.placement import Student
from wrinklefree.training.run import open_stream, share_rows

VOCABULARY = ARCHITECTURE.vocab_size
LETTERS = "abcdefghijklmnop"


class LetterTokenizer:
    """Tokens below the bed's 96 words."""

    eos_token_id, bos_token_id, pad_token_id, add_bos, fingerprint = 0, None, 1, False, "letters"

    def encode(self, text: str) -> list[int]:
        return [2 + ord(letter) % (VOCABULARY - 2) for letter in text]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    generator, folder, files = random.Random(1), tmp_path_factory.mktemp("texts"), {}
    for name in ("order", "noise", "probe"):
        lines = []
        for _ in range(80):
            first = generator.randrange(len(LETTERS))
            text = "".join(LETTERS[(first + n) % len(LETTERS)] for n in range(20))
            if name == "noise":
                text = "".join(generator.choices(LETTERS, k=20))
            lines.append(json.dumps({"text": text}) + "\n")
        files[name] = str(folder / f"{name}.jsonl")
        Path(files[name]).write_text("".join(lines), encoding="utf-8")
    return files


class Weights:
    """A stream that notes the weights it is given."""

    def __init__(self) -> None:
        self.given: list[list[float]] = []

    def set_weights(self, weights: Sequence[float]) -> None:
        self.given.append(list(weights))


def weigh(texts: dict[str, str], bed: Bed) -> dict[str, Any]:
    """Two training steps with an update after each, by the wiring of a run."""
    sources = ", ".join(f"{{kind: local, path: '{texts[name]}', weight: 0.5}}" for name in ("order", "noise"))
    config, _ = compose(
        [
            "model=tiny", "training=stage2_pretrain", "data=local", f"data.sources=[{sources}]", "training.batch_size=4",
            "training.max_seq_length=12", "influence.enabled=true", "influence.update_interval=1",
            f"influence.probes=[{{kind: local, path: '{texts['probe']}'}}]",
        ]
    )  # fmt: skip
    trainer, refresh = build(bed)
    stream = Weights()
    trainer.optimizer = optimizer = weigh_sources(
        config, trainer.optimizer, student=Student(trainer.model, refresh), tokenizer=LetterTokenizer(),
        compute=trainer.compute, stream=stream, total_steps=9,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip
    scores, losses = [], []
    for _ in range(2):
        losses.append(trainer.train_step().loss)
        assert optimizer.last_report is not None
        scores.append(optimizer.last_report.scores.combined)
    return {"scores": scores, "given": stream.given, "losses": losses}


@pytest.mark.parametrize("stage", ["stage2", "fp_pretrain"])
def test_two_processes_find_what_one_finds(stage: Any, texts: dict[str, str], ranks: Ranks) -> None:
    bed = Bed(stage=stage, steps=2, warmup=False, learning_rate=1e-3)
    (alone,), both = ranks.run(1, weigh, texts, bed), ranks.run(2, weigh, texts, bed)
    # The same bits on both, in the same step.
    assert both[0]["given"] == both[1]["given"]
    assert both[0]["scores"] == both[1]["scores"]
    assert len(alone["given"]) == 2
    for update, expected in enumerate(alone["scores"]):
        for source, values in expected.items():
            size = max(map(abs, values))
            assert both[0]["scores"][update][source] == pytest.approx(values, abs=2e-3 * size)
    for given, expected in zip(both[0]["given"], alone["given"], strict=True):
        assert given == pytest.approx(expected, abs=1e-3)
    # Scoring disturbs neither gathered weights nor gradients: the next step is that of one process.
    assert both[0]["losses"] == pytest.approx(alone["losses"], rel=1e-5)


# -- documents ---------------------------------------------------------------------------------------------------------

DOCUMENTS = 240
FIRST_NAME = 10


class NamingTokenizer:
    """A text is `<number> <length>`: the document's name, and filler."""

    eos_token_id, bos_token_id, pad_token_id, add_bos, fingerprint = 0, None, 1, False, "naming"

    def encode(self, text: str) -> list[int]:
        number, length = map(int, text.split())
        return [FIRST_NAME + number, *([2] * (length - 1))]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]


def read(corpus: str, steps: int) -> list[int]:
    """Names of the documents whose first token this rank trains on, in the batches of a training's steps."""
    config, _ = compose(
        [
            "model=tiny", "training=stage2_pretrain", "data=local", f"data.sources.0.path='{corpus}'",
            "data.held_out_percent=0", "training.batch_size=2", "training.gradient_accumulation_steps=2",
            "training.max_seq_length=32",
        ]
    )  # fmt: skip
    with closing(open_stream(config, NamingTokenizer())) as stream:  # pyright: ignore[reportArgumentType]
        rows, micro_batches = share_rows(stream, config.training)  # pyright: ignore[reportArgumentType]
        batches = [rows.next_batch() for _ in range(steps * micro_batches)]
    return [
        token - FIRST_NAME for batch in batches for token in batch.input_ids.flatten().tolist() if token >= FIRST_NAME
    ]


@pytest.mark.parametrize("world", [1, 2])
def test_each_document_of_an_epoch_is_trained_on_once_by_one_process(world: int, ranks: Ranks, tmp_path: Path) -> None:
    generator = random.Random(0)
    # With start and end token 16 positions each: two documents fill a row, so an epoch ends with a row.
    lines = [json.dumps({"text": f"{number} 14"}) + "\n" for number in range(DOCUMENTS)]
    generator.shuffle(lines)
    (tmp_path / "corpus.jsonl").write_text("".join(lines), encoding="utf-8")
    steps = DOCUMENTS // 2 // 4
    parts = ranks.run(world, read, str(tmp_path / "corpus.jsonl"), 2 * steps)
    met = Counter(name for part in parts for name in part)
    assert met == dict.fromkeys(range(DOCUMENTS), 2)
    first_epoch = [set(part[: len(part) // 2]) for part in parts]
    assert sum(map(len, first_epoch)) == DOCUMENTS == len(set().union(*first_epoch))
    assert [len(part) for part in parts] == [2 * DOCUMENTS // world] * world
