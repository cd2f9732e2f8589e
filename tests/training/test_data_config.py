"""Command lines of prepare_data.py and inspect_data.py."""

from collections.abc import Sequence

import pytest

from wrinklefree.training.data_config import parse_inspect, parse_prepare
from wrinklefree.utils.errors import ConfigError


def mistake(arguments: Sequence[str]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_prepare(arguments)
    return str(caught.value)


def test_own_keys_filters_and_those_of_the_run() -> None:
    command, config = parse_prepare(
        ["output=somewhere", "deduplicate=none", "filters.min_characters=7", "filters.max_digit_share=null",
         "max_tokens=1000", "data=packaged", "data.held_out_percent=5.0"]
    )  # fmt: skip
    assert (command.output, command.deduplicate, command.max_tokens) == ("somewhere", "none", 1000)
    assert (command.filters.min_characters, command.filters.max_digit_share) == (7, None)
    assert command.filters.max_symbol_share == 0.4
    assert config is not None
    assert config.data.name == "packaged"


def test_verify_composes_nothing() -> None:
    command, config = parse_prepare(["verify=somewhere"])
    assert (command.verify, config) == ("somewhere", None)


def test_mistakes_are_one_line() -> None:
    assert mistake([]) == "output: missing; give output=<folder for the tokens>"
    assert mistake(["output=x", "deduplicat=near"]).endswith("did you mean deduplicate?")
    assert "filters.min_letters: unknown key" in mistake(["output=x", "filters.min_letters=3"])
    assert "deduplicate: expected 'none', 'exact' or 'near', given 'all'" in mistake(["output=x", "deduplicate=all"])
    assert "data=recall is a task; only text is prepared" in mistake(["output=x", "data=recall"])


def test_inspection_takes_any_run() -> None:
    command, config = parse_inspect(["rows=2", "training=stage3_distill", "data=recall", "packing.packer=best_fit"])
    assert (command.rows, config.data.name, config.packing.packer) == (2, "recall", "best_fit")
