"""The table: sizes counted, seeds averaged, gap closure beside the reason when there is none."""

import pytest
import torch

from wrinklefree.models.config import Architecture, BitNetSpec
from wrinklefree.models.llama import CausalLM
from wrinklefree.training.comparison import Interval
from wrinklefree.training.evaluation import LanguageScore, TaskScore
from wrinklefree.training.report import Arm, ModelSize, Outcome, model_size, render_closure, render_table, summarize

ARCHITECTURE = Architecture(
    family="llama",
    vocab_size=10,
    hidden_size=8,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=4,
    max_position_embeddings=16,
    tie_word_embeddings=True,
)


def test_sizes_count_two_bits_a_ternary_weight() -> None:
    linear = 8 * 8 * 2 + 8 * 4 * 2 + 8 * 16 * 3
    rest = 10 * 8 + 3 * 8
    full = model_size(CausalLM(ARCHITECTURE), ternary=False)
    assert full == ModelSize(linear=2 * linear, total=2 * (linear + rest))
    student = CausalLM(ARCHITECTURE, BitNetSpec(placement="output", gain="ones"))
    subln = 8 + 16
    assert model_size(student, ternary=True) == ModelSize(linear // 4, linear // 4 + 2 * (rest + subln))


def arm(name: str, bits: float, accuracy: float, documents: int = 50) -> Arm:
    noise = torch.linspace(-1, 1, documents).tolist()
    hits = tuple(float(index < accuracy * 100) for index in range(100))
    language = LanguageScore(
        bits, Interval(bits - 0.1, bits + 0.1), 1.0, 3.0, 100,
        tuple(100 * bits + n for n in noise), (100,) * documents,
    )  # fmt: skip
    return Arm(
        name,
        f"what {name} is",
        1000,
        language,
        TaskScore("recall", "accuracy", accuracy, Interval(0, 1), hits),
        ModelSize(1, 2),
    )


def outcome(seed: int, shift: float = 0.0) -> Outcome:
    arms = (arm("full precision", 1.0, 0.9), arm("control", 1.0, 0.9), arm("naive ternary", 3.0, 0.1),
            arm("BitNet-SFT", 2.0, 0.88), arm("BitDistill", 1.2 + shift, 0.89))  # fmt: skip
    return Outcome(seed, arms, (("BitDistill", "a", "b"),))


def test_gap_closure_is_against_the_control_and_honest_about_no_gap() -> None:
    rows = {row.name: row for row in summarize([outcome(0)])}
    assert rows["BitDistill"].bits_closure is not None
    assert rows["BitDistill"].bits_closure.value == pytest.approx(0.8)
    assert rows["BitDistill"].task_closure is not None
    assert rows["BitDistill"].task_closure.value is None
    assert rows["control"].bits_closure is None
    text = render_closure(summarize([outcome(0)]))
    assert "gap closure on bits per byte, BitNet-SFT to control: 80%" in text
    assert "gap closure on the task, BitNet-SFT to control: undefined: the gap is 0.0200, below 0.05" in text


def test_several_seeds_give_the_mean_and_students_interval() -> None:
    [student] = [row for row in summarize([outcome(0), outcome(1, 0.2)]) if row.name == "BitDistill"]
    assert student.bits_per_byte == pytest.approx(1.3)
    assert student.bits_interval.high - student.bits_per_byte == pytest.approx(12.71 * 0.1)


def test_the_table_has_a_row_an_arm() -> None:
    lines = render_table(summarize([outcome(0)]), "recall", "accuracy").splitlines()
    assert len(lines) == 2 + 5
    assert len({len(line) for line in lines}) == 1
    assert "recall accuracy" in lines[0]
    assert lines[-1].startswith("| BitDistill ")
    assert "1.2000 [1.1000, 1.3000]" in lines[-1]
