"""Each filter's figure on texts where it can be counted by hand, in several scripts."""

import pytest

from wrinklefree.data.config import FilterConfig
from wrinklefree.data.filters import (
    compression_ratio,
    digit_share,
    duplicate_lines,
    reason_to_drop,
    symbol_share,
    top_phrase_share,
)

OFF = FilterConfig(**dict.fromkeys(FilterConfig.model_fields))
ENGLISH = (
    "The whale swam north for most of the summer, and the ship that followed it lost sight of land for weeks. "
    "Nobody on board had been so far from home before; some wrote letters that would never be sent."
)
HINDI = "हिन्दी भारत की एक प्रमुख भाषा है जिसे बहुत से लोग बोलते और समझते हैं तथा इसमें बहुत साहित्य लिखा गया है।" * 2
JAPANESE = (
    "山の上の小さな町では、冬になると道が雪で閉ざされる。それでも郵便は毎日届き、子どもたちは橇で学校へ通う。"
    "夜は静かで、遠くの川の音だけが聞こえるそうだ。町の人は春を待ちながら、古い時計台の鐘を数えて暮らしている。"
)


@pytest.mark.parametrize("text", [ENGLISH, HINDI, JAPANESE], ids=["english", "hindi", "japanese"])
def test_prose_of_any_script_passes(text: str) -> None:
    assert reason_to_drop(text, FilterConfig()) is None


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("short", "min_characters"),
        ("=-=-=- *** !!! " * 20, "max_symbol_share"),
        ("12 345 67 890 a " * 20, "max_digit_share"),
        ("\n".join(["Home", "About", "Home"] * 20), "max_duplicate_line_share"),
        (ENGLISH + "\n" + ENGLISH + "\nand\nthis\nis\nthe\nend\nof\nit", "max_duplicate_line_characters"),
        ("buy it right now " * 12, "max_top_phrase_share"),
        ("吾輩は猫である" * 60, "min_compression_ratio"),
    ],
)
def test_what_is_dropped_and_why(text: str, reason: str) -> None:
    assert reason_to_drop(text, FilterConfig()) == reason


def test_a_filter_that_is_off_drops_nothing() -> None:
    assert reason_to_drop("!", OFF) is None
    assert reason_to_drop("a" * 11, OFF.model_copy(update={"max_characters": 10})) == "max_characters"


def test_figures_by_hand() -> None:
    assert symbol_share("a, b! c") == 2 / 5
    assert symbol_share("क्या") == 0.0
    assert digit_share("a1 23 ٤") == 4 / 5
    assert duplicate_lines("xx\n\nyy\n xx \nxx") == (2 / 4, 4 / 8)
    assert top_phrase_share("a b c d " * 3 + "xyz") == 12 / 15
    assert top_phrase_share("a b c d e a b c d") == 0.0
    assert symbol_share(" ") == digit_share("") == top_phrase_share("") == 0.0
    assert duplicate_lines("\n") == (0.0, 0.0)
    assert compression_ratio("") == 1.0
    assert compression_ratio("a" * 10_000) < 0.01
