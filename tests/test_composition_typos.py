"""Every key and every option misspelt by one edit, and values of the wrong type: one line that names it and what was meant."""

import copy
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from wrinklefree.composition import compose_tree, groups, normalize_overrides
from wrinklefree.training.config import RunConfig
from wrinklefree.utils.config import decode
from wrinklefree.utils.errors import ConfigError

COMMANDS = (
    ["training=stage1_subln"],
    ["training=stage1_9_layerwise"],
    ["training=stage2_pretrain", "distributed=fsdp_large", "gcs.enabled=true"],
    ["training=stage3_distill", "distillation=summarization"],
    ["training=fp_sft", "data.task=mnli"],
    ["training=bitdistill"],
)
Record = Callable[[str, object], None]


@pytest.fixture(scope="module")
def trees() -> list[dict[str, Any]]:
    return [compose_tree(command) for command in COMMANDS]


def misspelt(word: str, generator: random.Random) -> str:
    """One letter left out, doubled, replaced, or two exchanged; never the first, and never the same word."""
    while True:
        at = generator.randrange(1, len(word)) if len(word) > 1 else 0
        kind = generator.choice(["left out", "doubled", "replaced", "exchanged"])
        if kind == "left out":
            other = word[:at] + word[at + 1 :]
        elif kind == "doubled":
            other = word[:at] + word[at] + word[at:]
        elif kind == "replaced":
            other = word[:at] + generator.choice("aeiourstn") + word[at + 1 :]
        else:
            other = word[: at - 1] + word[at : at + 1] + word[at - 1 : at] + word[at + 1 :]
        if other and other != word:
            return other


def keys_of(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all keys, groups included, lists left out."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield (*path, key)
            yield from keys_of(value, (*path, key))


def holder(tree: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def mistake(tree: dict[str, Any]) -> str | None:
    """The error's text; None when the tree is taken."""
    try:
        decode(RunConfig, tree)
    except ConfigError as error:
        return str(error)
    return None


def test_a_misspelt_key_is_refused_and_the_right_one_suggested(
    trees: list[dict[str, Any]], record_property: Record
) -> None:
    generator = random.Random(0)
    typos: list[str] = []
    unhelped: list[str] = []
    seen: set[tuple[str, ...]] = set()
    for tree in trees:
        for path in keys_of(tree):
            # Steps of a pipeline have names of the user's choice.
            if path in seen or path[-2:-1] == ("steps",) or not re.fullmatch(r"[a-z_]{3,}", path[-1]):
                continue
            seen.add(path)
            for _ in range(2):
                changed = copy.deepcopy(tree)
                siblings = holder(changed, path)
                typo = misspelt(path[-1], generator)
                if typo in siblings:
                    continue
                siblings[typo] = siblings[path[-1]] if not isinstance(siblings[path[-1]], dict) else 1
                error = mistake(changed)
                typed = ".".join((*path[:-1], typo))
                assert error is not None, f"{typed} was taken"
                lines = [line for line in error.splitlines() if line.startswith(f"{typed}: unknown key")]
                assert lines, f"{typed}: {error}"
                typos.append(typed)
                if f"did you mean {'.'.join(path)}?" not in lines[0]:
                    unhelped.append(lines[0])
    assert len(typos) >= 300
    assert len(unhelped) <= 0.05 * len(typos), unhelped
    record_property("misspelt_keys", len(typos))
    record_property("misspelt_keys_without_suggestion", len(unhelped))


def test_a_misspelt_option_is_refused_and_the_right_one_suggested(record_property: Record) -> None:
    generator = random.Random(1)
    count = unhelped = 0
    for group, options in groups().items():
        for option in options:
            typo = misspelt(option, generator)
            if typo in options:
                continue
            with pytest.raises(ConfigError) as caught:
                normalize_overrides([f"{group}={typo}"])
            count += 1
            unhelped += f"did you mean {option}?" not in str(caught.value)
            assert str(caught.value).startswith(f"{group}: expected one of ")
    assert count >= 30
    # Options such as classification_v1 and _v2 are one letter apart themselves.
    assert unhelped <= 0.1 * count
    record_property("misspelt_options", count)


@pytest.mark.parametrize(("kind", "wrong"), [(bool, "perhaps"), (int, "many"), (float, "fast"), (int, [1]), (bool, 3)])
def test_a_value_of_another_type_is_refused_by_name(
    kind: type, wrong: object, trees: list[dict[str, Any]], record_property: Record
) -> None:
    count = 0
    seen: set[tuple[str, ...]] = set()
    for tree in trees:
        for path in keys_of(tree):
            if path in seen or type(holder(tree, path)[path[-1]]) is not kind:
                continue
            seen.add(path)
            changed = copy.deepcopy(tree)
            holder(changed, path)[path[-1]] = wrong
            error = mistake(changed)
            if error is None:  # `auto` beside a number, text beside a switch
                continue
            assert f"{'.'.join(path)}" in error, error
            assert error.count("\n") == 0, error
            count += 1
    assert count >= 5
    record_property("wrong_values", count)
