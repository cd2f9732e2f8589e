"""A model small enough to go through everything in seconds, and text of our own to train it on."""

import random
from pathlib import Path

import pytest
import torch

from wrinklefree.data import facts
from wrinklefree.models.artifact import write_artifact
from wrinklefree.models.config import Architecture
from wrinklefree.models.llama import CausalLM
from wrinklefree.training import device
from wrinklefree.utils.tokenizer import train_tokenizer

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=320,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
WORDS = (
    "the", "a", "old", "new", "red", "sea", "ship", "wind", "sails", "turns", "sleeps", "harbour", "lamp", "river",
    "baker", "pilot", "works", "keeps", "colour", "cat", "dog", "is",
)  # fmt: skip


def sentences(seed: int, count: int) -> str:
    generator = random.Random(seed)
    return ". ".join(" ".join(generator.choices(WORDS, k=generator.randint(4, 12))) for _ in range(count)) + ".\n"


@pytest.fixture(autouse=True)
def few_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every 13th question of the recall task, of all its kinds: scoring 504 takes longer than training."""
    questions = facts.questions
    monkeypatch.setattr(facts, "questions", lambda split: questions(split)[::13])


@pytest.fixture(autouse=True)
def small_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of the machine, which every command measures, from matrices as small as these models."""
    measure = device.measured_flops_per_second
    monkeypatch.setattr(device, "measured_flops_per_second", lambda compute, size=128: measure(compute, 128))


@pytest.fixture(autouse=True)
def remembers_compositions(composed_once: None) -> None: ...


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 generated documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(200):
        (folder / f"{number}.txt").write_text(sentences(number, 8), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def micro_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with random weights."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer((sentences(number, 8) for number in range(100)), ARCHITECTURE.vocab_size)
    folder = tmp_path_factory.mktemp("base") / "artifact"
    write_artifact(folder, CausalLM(ARCHITECTURE), tokenizer, {"stage": "base", "tokens": 0})
    return folder


@pytest.fixture
def overrides(corpus: Path, micro_model: Path, tmp_path: Path) -> list[str]:
    """What every command of these tests has in common."""
    sizes = [
        f"model.architecture.{name}={value}" for name, value in ARCHITECTURE.model_dump().items() if _is_size(value)
    ]
    return [
        "model=tiny",
        "model.source=path",
        f"model.path={micro_model}",
        *sizes,
        f"output_dir={tmp_path / 'outputs'}",
        f"audit.directory={tmp_path / 'audit'}",
    ]


@pytest.fixture
def text(corpus: Path) -> list[str]:
    """`data=local` on the generated documents."""
    return ["data=local", f"data.sources=[{{kind: local, path: '{corpus}'}}]"]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
